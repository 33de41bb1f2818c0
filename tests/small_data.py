"""Data and models of small trainings, which a gin file of tests imports."""

import gin
import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from diffstride.examples.data import Datasets

EPOCH = 4  # Batches of 8 images.
CLASSES = ('dark', 'light')


@gin.configurable(module='small_data')
def images(seed=0, validation=True, brightness=1.0, class_weights=None):
    """Returns data of two classes, dark and light; 12 x 16 pixels."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    pixels = rng.normal(size=(64, 12, 16, 3)) + labels[:, None, None, None]
    pixels = (brightness * pixels).astype('float32')
    labels = np.eye(2, dtype='float32')[labels]

    def batches(start, stop):
        arrays = pixels[start:stop], labels[start:stop]
        examples = tf.data.Dataset.from_tensor_slices(arrays)
        return examples.batch(8, drop_remainder=True)

    def noisy_batches(epoch):
        key = tf.stack([tf.constant(seed, tf.int64), epoch])
        return batches(0, 8 * EPOCH).map(
            lambda x, y: (x + 0.1 * tf.random.stateless_normal(x.shape, key), y)
        )

    def train(initial_epoch=0):
        epochs = tf.data.Dataset.range(initial_epoch, 10**6)
        return epochs.flat_map(noisy_batches)

    return Datasets(
        train=train,
        validation=batches(32, 48) if validation else None,
        test=batches(48, 64),
        steps_per_epoch=EPOCH,
        image_shape=(12, 16, 3),
        class_names=CLASSES,
        mean=np.zeros(3, 'float32'),
        scale=np.ones(3, 'float32'),
        class_weights=class_weights,
        summary='32 images of 2 classes',
    )


@gin.register(module='small_data')
def linear(num_output_classes, channels_first, units=0):
    """Returns the smallest classifier."""
    layers = [keras.layers.GlobalAveragePooling2D()]
    if int(units):  # A grid gives a string.
        layers.append(keras.layers.Dense(int(units)))
    layers.append(keras.layers.Dense(num_output_classes, activation='softmax'))
    return keras.Sequential(layers)


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset without files of its own, with the `parts` of a subclass."""

    VERSION = tfds.core.Version('1.0.0')
    code_path = None

    def _info(self):
        features = tfds.features.FeaturesDict(self.parts)
        return tfds.core.DatasetInfo(builder=self, features=features)


def picture(channel, seed=0, size=(12, 16), brighter=40):
    """Returns noise in which one channel is brighter by some levels."""
    pixels = np.random.default_rng(seed).integers(40, 120, (*size, 3))
    pixels[..., channel] += brighter
    return pixels.astype(np.uint8)


def write_pictures(folder, channels, first=0, **kwargs):
    """Writes a JPEG for each channel, which is brighter in it."""
    folder.mkdir(parents=True)
    for seed, channel in enumerate(channels, first):
        pixels = picture(channel, seed, **kwargs)
        Image.fromarray(pixels).save(folder / f'{seed}.jpg')


def take(dataset, count=-1):
    """The first batches, or all, as arrays (inputs, labels), in a row."""
    batches = dataset.take(count).as_numpy_iterator()
    inputs, labels = zip(*batches, strict=True)
    return np.concatenate(inputs), np.concatenate(labels)
