"""A small U-Net that learns its strides, on shapes that it draws itself.

    python3 -m diffstride.examples.unet

It runs on every Keras backend in a minute or two and downloads nothing. A
U-Net's decoder joins each map with one that the encoder had before pooling.
Here the sizes of these maps are learned, and `SpectralResizing` resizes the
decoder's map to the encoder's, whatever size that has. Only their outlines tell
disks from squares. Strides of 4 are too large for that, so learned strides come
down from there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from diffstride import (
    DiffStride,
    FixedSpectralPooling,
    SpectralResizing,
    validation,
)
from diffstride.callbacks import StrideLogger

SIZE = 32
CLASSES = ('background', 'disk', 'square')


def unet(
    num_classes: int,
    filters: Sequence[int] = (16, 32, 64),
    strides: float | Sequence[Any] = 2.0,
    pooling_cls: Callable[..., layers.Layer] = DiffStride,
) -> keras.Model:
    """Returns a U-Net for segmentation, with any strides (arXiv:1505.04597).

    Args:
        num_classes: Number of classes.
        filters: Number of filters at each level, from the finest to the
            coarsest. A pooling layer lies between two levels: 'pool_0', ...
        strides: A number for all pooling layers, or a sequence of one stride
            per layer, each a number or one per axis.
        pooling_cls: A layer class, or a callable that returns a layer, that
            takes `strides`, `data_format` and `name`.

    Returns:
        A model, float [batch, height, width, 1] -> logits float
        [batch, height, width, num_classes].

    Raises:
        ValueError: If there is not one stride for each pooling layer, or if a
            pooling layer refuses its stride.

    Example:

    >>> model = unet(num_classes=3, filters=(4, 8), strides=2.5)
    >>> tuple(model(keras.ops.ones((1, 30, 21, 1))).shape)
    (1, 30, 21, 3)
    """
    if isinstance(strides, (int, float, np.number)):
        strides = [strides] * (len(filters) - 1)
    validation.require(
        len(strides) == len(filters) - 1,
        '`strides` must be a number or one less than `filters`',
        strides=strides,
        filters=filters,
    )
    axes: dict[str, Any] = {'data_format': 'channels_last'}

    def convolve(x, count):
        for _ in range(2):
            conv = layers.Conv2D(
                count, 3, padding='same', use_bias=False, **axes
            )
            x = layers.BatchNormalization(momentum=0.9)(conv(x))
            x = layers.ReLU()(x)
        return x

    inputs = keras.Input((None, None, 1))
    x, skips = convolve(inputs, filters[0]), []
    for level, stride in enumerate(strides):
        skips.append(x)
        pool = pooling_cls(strides=stride, name=f'pool_{level}', **axes)
        x = convolve(pool(x), filters[level + 1])
    for count, skip in zip(filters[-2::-1], reversed(skips)):
        x = SpectralResizing(**axes)([x, skip])
        x = convolve(layers.Concatenate()([x, skip]), count)
    return keras.Model(inputs, layers.Conv2D(num_classes, 1, **axes)(x))


def draw(
    count: int, rng: np.random.Generator, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draws three bright disks or squares per image, on a noisy background.

    Returns:
        Images, float32 [count, size, size, 1], and classes, int32 [count, size,
        size], as indices of CLASSES. Radii lie between size / 8 and size / 5,
        and later shapes cover earlier ones.
    """
    y, x = np.mgrid[:size, :size]
    images = np.zeros((count, size, size))
    classes = np.zeros((count, size, size), 'int32')
    for image, labels in zip(images, classes):
        for _ in range(3):
            kind = rng.integers(1, len(CLASSES))
            radius = rng.uniform(size / 8, size / 5)
            down, right = np.abs([y, x] - rng.uniform(0, size, (2, 1, 1)))
            norm = np.hypot if CLASSES[kind] == 'disk' else np.maximum
            inside = norm(down, right) <= radius
            image[inside] = rng.uniform(0.5, 1.0)
            labels[inside] = kind
    images += rng.normal(0, 0.2, images.shape)
    return images[..., None].astype('float32'), classes


def train(
    model: keras.Model,
    data: tuple[np.ndarray, np.ndarray],
    epochs: int,
    learning_rate: float = 0.01,
    batch_size: int = 16,
) -> keras.callbacks.History:
    """Trains a model of `unet` on images and classes; returns its history."""
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, classes = data
    logger = StrideLogger(images.shape[1:])
    return model.fit(
        images, classes, batch_size, epochs, verbose=2, callbacks=[logger]
    )


def main(strides: float = 4.0, epochs: int = 8, seed: int = 0) -> None:
    """Compares learned strides with fixed ones from the same start."""
    rng = np.random.default_rng(seed)
    training_data, (images, classes) = draw(500, rng), draw(200, rng)
    learned = functools.partial(
        DiffStride, ramp='straight_through', smoothness_factor=2.0
    )
    for name, pooling_cls in (
        ('DiffStride', learned),
        ('FixedSpectralPooling', FixedSpectralPooling),
    ):
        print(f'{name} from strides of {strides}')
        keras.utils.set_random_seed(seed)
        model = unet(len(CLASSES), (8, 16, 32), strides, pooling_cls)
        train(model, training_data, epochs)
        mean_iou = keras.metrics.MeanIoU(len(CLASSES), sparse_y_pred=False)
        value = mean_iou(classes, model.predict(images, verbose=0))
        print(f'{name}: mean IoU {float(value):.3f}\n')


if __name__ == '__main__':
    main()
