"""Batches of labelled images from any TFDS dataset or folder of images.

    data.load_datasets:
      name = 'cifar100'
      mixup_alpha = 0.2

Every random draw is stateless: a training batch is a pure function of the
seed, the epoch and the step. A run that was killed resumes at any epoch with
the numbers that it would have seen.
"""

import dataclasses
import difflib
import math
import numbers
import os
import textwrap
from collections.abc import Callable

import gin
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from diffstride.examples import gratings  # noqa: F401, registers 'gratings'

# Splits whose pixels take less are kept decoded in memory.
CACHE_BYTES = 2**30
# A split that is read from disk is shuffled by a buffer of encoded images: 1
# GB of ImageNet's. TFDS has already shuffled the examples among the files.
SHUFFLE_BUFFER = 10_000
# Enough for means and standard deviations to within a few tenths of a level.
STATISTICS_EXAMPLES = 10_000

AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Training and test batches, and what a model must know of them.

    A batch is (images, labels): float32 [batch, height, width, channels] and
    one-hot float32 [batch, num_classes].

    Attributes:
        train: a function, train(initial_epoch=0), that returns the endless
            tf.data.Dataset of training batches from the start of that epoch.
        test: the finite tf.data.Dataset of all test examples in order. Its
            last batch may be smaller.
        steps_per_epoch: training batches per epoch. The examples that do not
            fill a batch are left out, others in each epoch.
        num_classes: the number of classes.
        image_shape: (height, width, channels).
        class_names: one string per class.
        train_examples: the number of examples in the training split.
        test_examples: the number of examples in the test split.
    """

    train: Callable[..., tf.data.Dataset]
    test: tf.data.Dataset
    steps_per_epoch: int
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train_examples: int
    test_examples: int


@gin.configurable(module='data')
def load_datasets(
    name='cifar10',
    data_dir=None,
    batch_size=128,
    mixup_alpha=0.0,
    flip=True,
    crop_padding=4,
    normalization='dataset',
    image_size=None,
    train_split='train',
    test_split='test',
    seed=0,
    cache='auto',
):
    """Loads a training and a test split for image classification.

    Args:
        name: a TFDS dataset that has an image and a class label (prepared,
            and downloaded if need be), 'gratings', or the path of a folder
            with one folder of .png or .jpg images per class in each split:
            name/train/cat/1.png.
        data_dir: where TFDS keeps its datasets; None for its default.
        batch_size: examples per batch.
        mixup_alpha: Mixup's alpha, see `mixup`; 0 turns Mixup off.
        flip: whether to mirror every other training image, at random.
        crop_padding: training images are padded by this many pixels on each
            side and cropped back at random; 0 turns crops off. The padding
            has the value 0 after normalization: the mean color of 'dataset'.
        normalization: 'dataset' subtracts the mean and divides by the
            standard deviation of each channel, measured on the first 10,000
            training images; 'unit' divides by 255; None keeps 0 .. 255.
        image_size: (height, width) to resize to, whatever the aspect ratio;
            None if all images have the same size.
        train_split: the split to train on; TFDS slices work, 'train[:90%]'.
        test_split: the split to test on.
        seed: the seed of every random draw.
        cache: whether to keep the decoded images in memory; 'auto' does so
            for splits of less than 1 GiB.

    Returns:
        A `Datasets`.

    Raises:
        ValueError: an argument is wrong, or the dataset is unknown, cannot
            be prepared, or has no such split, image or class label.
    """
    _check_arguments(
        name, data_dir, batch_size, mixup_alpha, flip, crop_padding,
        normalization, image_size, train_split, test_split, seed, cache,
    )  # fmt: skip
    if _is_folder(name, train_split):
        builder = _folder_builder(name)
    else:
        builder = _tfds_builder(name, data_dir)
    image_key, label_key = _image_and_label(builder)
    train_count = _count(builder, 'train_split', train_split)
    test_count = _count(builder, 'test_split', test_split)
    if train_count < batch_size:
        raise ValueError(
            'batch_size must be at most the number of training examples, '
            f'{train_count}. Received: {batch_size}'
        )
    names = tuple(builder.info.features[label_key].names)
    height, width, channels = builder.info.features[image_key].shape
    channels = channels or 3

    def encoded(split):
        return _encoded(builder, split, image_key, label_key)

    def decode(image, label):
        image = tf.io.decode_image(image, channels, expand_animations=False)
        if image_size is not None:
            image = tf.image.resize(image, image_size, antialias=True)
            image = tf.saturate_cast(tf.round(image), tf.uint8)
        return image, label

    train_data, test_data = encoded(train_split), encoded(test_split)
    _check_labelled('train_split', train_split, train_data)
    _check_labelled('test_split', test_split, test_data)
    try:
        if image_size is not None:
            height, width = image_size
        elif height is None or width is None:
            height, width = _common_size(
                train_data.concatenate(test_data).map(decode, AUTOTUNE)
            )
    except tf.errors.OpError as error:
        raise _decoding_error(builder, decode) from error
