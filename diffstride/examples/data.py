"""Batches of labelled images from any TFDS dataset or folder of images.

    data.load_datasets:
      name = 'cifar100'
      mixup_alpha = 0.2

Every random draw is stateless: a training batch is a pure function of the
seed, the epoch and the step. A run that was killed resumes from any epoch
with the numbers that it would have seen.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import os
import pathlib
import socket
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Callable

import gin
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from diffstride.examples import gratings  # noqa: F401, registers 'gratings'

# A split whose pixels take less is kept decoded in memory.
CACHE_BYTES = 2**30
# A split read from disk is shuffled over this many examples, still encoded:
# about 1 GB of ImageNet's. That is enough, as TFDS stores them shuffled.
SHUFFLE_BUFFER = 10_000
# Enough for a mean and a standard deviation to within a level of 255.
STATISTICS_EXAMPLES = 10_000

AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Training and test batches, and what a model must know about them.

    A batch is (images, labels): float32 [batch, height, width, channels] and
    one-hot float32 [batch, num_classes].

    Attributes:
        train: a function `train(initial_epoch=0)` that returns an endless
            tf.data.Dataset: the training batches from that epoch on.
        test: the tf.data.Dataset of all test examples, in order. Its last
            batch may be smaller.
        steps_per_epoch: the number of training batches in an epoch. The
            examples that do not fill a batch are left out, others each time.
        num_classes: the number of classes.
        image_shape: (height, width, channels).
        class_names: one string per class.
        train_examples: the number of training examples.
        test_examples: the number of test examples.
    """

    train: Callable[..., tf.data.Dataset]
    test: tf.data.Dataset
    steps_per_epoch: int
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train_examples: int
    test_examples: int


@gin.configurable(module='data', denylist=['seed'])  # It is train.seed.
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
        name: a TFDS dataset with an image and a class label, downloaded and
            prepared if need be; 'gratings'; or a folder of .png and .jpg
            images, one folder per class in each split: name/train/cat/1.png.
        data_dir: where TFDS keeps its datasets; None for its default.
        batch_size: the number of examples in a batch.
        mixup_alpha: the alpha of `mixup`; 0 turns it off.
        flip: whether to mirror half of the training images, at random.
        crop_padding: pixels that `augment` shifts training images by, at
            most; 0 turns it off.
        normalization: 'dataset' subtracts the mean of each channel and
            divides by its standard deviation, both measured on the first
            10,000 training images; 'unit' divides by 255; None keeps 0..255.
        image_size: (height, width) to resize all images to, whatever their
            aspect ratio; None if they all have the same size.
        train_split: the split to train on, or a TFDS slice, 'train[:90%]'.
        test_split: the split to test on, or a slice.
        seed: the seed of all random draws.
        cache: whether to keep the decoded images in memory; 'auto' does so
            for a split below 1 GiB.

    Returns:
        The `Datasets`.

    Raises:
        ValueError: an argument is wrong; or the dataset is unknown, cannot
            be prepared, or has no such split, no image or no class label.
    """
    check_arguments(
        _RULES, name=name, data_dir=data_dir, batch_size=batch_size,
        mixup_alpha=mixup_alpha, flip=flip, crop_padding=crop_padding,
        normalization=normalization, image_size=image_size,
        train_split=train_split, test_split=test_split, seed=seed,
        cache=cache,
    )  # fmt: skip
    if _is_folder(name, train_split):
        builder = _folder_builder(name)
    else:
        builder = _tfds_builder(name, data_dir)
    _, label_key = _feature_keys(builder)
    class_names = tuple(builder.info.features[label_key].names)
    num_classes = len(class_names)
    train_count = _count(builder, train_split=train_split)
    test_count = _count(builder, test_split=test_split)
    if batch_size > train_count:
        raise ValueError(
            f'batch_size must be at most {train_count}, the number of training '
            f'examples. Received: {batch_size}'
        )
    with _naming_broken_files(builder, train_split, test_split):
        if image_size is None:
            image_shape = _common_shape(builder, train_split, test_split)
            decode = _decode
        else:
            image_shape = *image_size, _channels(builder)
            decode = _decode_and_resize
        decode = functools.partial(decode, shape=image_shape)
        train_examples = _Examples(builder, train_split, decode, cache)
        test_examples = _Examples(builder, test_split, decode, cache)
        offset, scale = _offset_and_scale(normalization, train_examples)

    def standardize(images, labels):
        images = (tf.cast(images, tf.float32) - offset) / scale
        return images, tf.one_hot(labels, num_classes)

    def epoch_batches(epoch):
        batches = train_examples.shuffled(batch_size, tf.stack([seed, epoch]))
        return batches.enumerate().map(lambda *batch: (epoch, *batch))

    def prepare(epoch, step, examples):
        key = tf.random.fold_in(tf.stack([seed, epoch]), step)
        augment_key, mixup_key = tf.unstack(tf.random.split(key))
        images, labels = standardize(*examples)
        images = augment(images, augment_key, flip, crop_padding)
        if mixup_alpha:
            images, labels = mixup(images, labels, mixup_key, mixup_alpha)
        return images, labels

    def train(initial_epoch=0):
        return (
            tf.data.Dataset.range(initial_epoch, tf.int64.max)
            .flat_map(epoch_batches)
            .map(prepare, AUTOTUNE)
            .prefetch(AUTOTUNE)
        )

    return Datasets(
        train=train,
        test=test_examples.ordered.batch(batch_size)
        .map(standardize, AUTOTUNE)
        .prefetch(AUTOTUNE),
        steps_per_epoch=train_count // batch_size,
        num_classes=num_classes,
        image_shape=image_shape,
        class_names=class_names,
        train_examples=train_count,
        test_examples=test_count,
    )


def augment(images, key, flip, crop_padding):
    """Mirrors and shifts each image of a batch at random.

    An image is padded with zeros by `crop_padding` pixels on each side and
    cropped back to its size anywhere inside.

    Args:
        images: [batch, height, width, channels], the batch size static.
        key: the seed of the stateless draws, [2].
        flip: whether to mirror each image with probability 1/2.
        crop_padding: the largest shift, in pixels.

    Returns:
        Images, [batch, height, width, channels].
    """
    batch, height, width, _ = images.shape
    flip_key, crop_key = tf.unstack(tf.random.split(key))
    rows, columns = tf.range(height)[None], tf.range(width)[None]
    if flip:
        mirrored = tf.random.stateless_uniform([batch, 1], flip_key) < 0.5
        columns = tf.where(mirrored, width - 1 - columns, columns)
    if crop_padding:
        down, right = tf.unstack(
            tf.random.stateless_uniform(
                [2, batch, 1], crop_key, 0, 2 * crop_padding + 1, tf.int32
            )
        )
        rows, columns = rows + down, columns + right
        padding = [crop_padding, crop_padding]
        images = tf.pad(images, [[0, 0], padding, padding, [0, 0]])
        images = tf.gather(images, rows, axis=1, batch_dims=1)
    if flip or crop_padding:
        images = tf.gather(images, columns, axis=2, batch_dims=1)
    return images


def mixup(images, labels, key, alpha):
    """Mixes each example with another of its batch.

        x = lambda x_i + (1 - lambda) x_j,  lambda ~ Beta(alpha, alpha)

    and the labels alike. Lambda is drawn for each image, where the authors'
    code draws one per batch: the mean is the same and the gradient less
    noisy. The partner j is the next example; the batch is already shuffled.

    Args:
        images: [batch, height, width, channels], the batch size static.
        labels: one-hot or soft, [batch, num_classes].
        key: the seed of the stateless draws, [2].
        alpha: the parameter of the Beta distribution, > 0. Small values
            leave most images nearly as they are; 1 is uniform.

    Returns:
        Mixed images and labels, shaped as the inputs.

    Reference:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
        arXiv:1710.09412.
    """
    weights = _sample_beta(alpha, images.shape[0], key)

    def mix(x):
        weight = tf.reshape(weights, [-1] + [1] * (x.shape.rank - 1))
        return weight * x + (1 - weight) * tf.roll(x, -1, axis=0)

    return mix(images), mix(labels)


def _sample_beta(alpha, count, key):
    """Draws `count` numbers from Beta(alpha, alpha), float32 [count].

    Beta is G / (G + G') of two Gamma(alpha) draws, which underflow to 0 / 0
    at small alpha. Their logarithms do not: with U uniform,

        log G(alpha) = log G(alpha + 1) + log(U) / alpha
    """
    # Beyond these limits lambda is 0 or 1, or 1/2, to float32 precision.
    alpha = np.clip(np.float64(alpha), 1e-6, 1e12)
    gamma_key, uniform_key = tf.unstack(tf.random.split(key))
    shape = [2, count]
    gamma = tf.random.stateless_gamma(
        shape, gamma_key, alpha + 1, dtype=tf.float64
    )
    uniform = 1 - tf.random.stateless_uniform(
        shape, uniform_key, dtype=tf.float64
    )
    log_gamma = tf.math.log(gamma) + tf.math.log(uniform) / alpha
    return tf.cast(tf.sigmoid(log_gamma[0] - log_gamma[1]), tf.float32)


class _Examples:
    """The examples of one split, in memory or read from disk.

    Attributes:
        count: how many there are.
        ordered: a tf.data.Dataset of (image, label), always in this order:
            uint8 [height, width, channels] and an integer [].
    """

    def __init__(self, builder, split, decode, cache):
        self.count = builder.info.splits[split].num_examples
        self._encoded = _encoded(builder, split)
        self._decode = decode
        self._in_memory = None
        self.ordered = self._encoded.map(decode, AUTOTUNE)
        # TFDS marks so every example of a split that has no labels.
        if any(label < 0 for _, label in self.ordered.take(1)):
            raise ValueError(f'the split {split!r} has no labels')
        if cache == 'auto':
            shape = self.ordered.element_spec[0].shape
            cache = self.count * math.prod(shape) < CACHE_BYTES
        if cache:
            with tf.device('CPU'):
                arrays = self.ordered.batch(self.count).get_single_element()
                self.ordered = tf.data.Dataset.from_tensor_slices(arrays)
            self._in_memory = arrays

    def shuffled(self, batch_size, key):
        """The full batches of one epoch, in the order of the seed `key` [2].

        Call it inside the function of a tf.data.Dataset.
        """
        if self._in_memory is None:
            # Dataset.shuffle also depends on the global seed. Here, in the
            # graph of a function, this sets the seed of that graph alone.
            tf.random.set_seed(1)
            seed = tf.random.stateless_uniform(
                [], key, 0, tf.int64.max, tf.int64
            )
            return (
                self._encoded.shuffle(
                    SHUFFLE_BUFFER, seed, reshuffle_each_iteration=False
                )
                .map(self._decode, AUTOTUNE)
                .batch(batch_size, drop_remainder=True)
            )
        steps = self.count // batch_size
        order = tf.random.experimental.stateless_shuffle(
            tf.range(self.count), key
        )
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])
        images, labels = self._in_memory
        return tf.data.Dataset.from_tensor_slices(order).map(
            lambda batch: (tf.gather(images, batch), tf.gather(labels, batch))
        )


def _encoded(builder, split):
    """The (encoded image, label) of a split, always in the same order."""
    image_key, label_key = _feature_keys(builder)
    dataset = builder.as_dataset(
        split=split,
        decoders={image_key: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False, skip_prefetch=True),
    )
    return dataset.map(lambda example: (example[image_key], example[label_key]))


def _decode(image, label, shape):
    image = tf.io.decode_image(image, shape[-1], expand_animations=False)
    return tf.ensure_shape(image, shape), label


def _decode_and_resize(image, label, shape):
    image, label = _decode(image, label, (None, None, shape[-1]))
    image = tf.image.resize(image, shape[:-1], antialias=True)
    return tf.saturate_cast(tf.round(image), tf.uint8), label


def _channels(builder):
    image_key, _ = _feature_keys(builder)
    return builder.info.features[image_key].shape[-1] or 3


def _common_shape(builder, *splits):
    """The one shape that all images have, (height, width, channels)."""
    image_key, _ = _feature_keys(builder)
    shape = *builder.info.features[image_key].shape[:-1], _channels(builder)
    if None not in shape:
        return shape
    decode = functools.partial(_decode, shape=shape)
    found = set()
    for split in splits:
        images = _encoded(builder, split).map(decode, AUTOTUNE)
        for size in images.map(lambda image, _: tf.shape(image)):
            found.add(tuple(size.numpy().tolist()))
            if len(found) > 1:
                (a, b, _), (c, d, _) = sorted(found)
                raise ValueError(
                    f'images differ in size, {a} x {b} and {c} x {d}: set '
                    'data.load_datasets.image_size = (height, width)'
                )
    return found.pop()


def _offset_and_scale(normalization, examples):
    """What to subtract from each channel and then divide by: [channels]."""
    if normalization is None:
        return 0.0, 1.0
    if normalization == 'unit':
        return 0.0, 255.0
    count, total, squares = 0, 0.0, 0.0
    for images, _ in examples.ordered.take(STATISTICS_EXAMPLES).batch(500):
        pixels = images.numpy().astype(np.float64)
        count += pixels[..., 0].size
        total += pixels.sum((0, 1, 2))
        squares += np.square(pixels).sum((0, 1, 2))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # A constant channel has nothing to scale.
    deviation = np.where(deviation > 1e-3, deviation, 1)
    return mean.astype(np.float32), deviation.astype(np.float32)


def _is_folder(name, train_split):
    """Whether `name` is a path, or a folder here that holds the split."""
    return (
        name.startswith(('/', '.', '~'))
        or '://' in name
        or os.path.isdir(os.path.join(name, train_split))
    )


def _folder_builder(name):
    root = os.path.expanduser(name)
    if not tf.io.gfile.isdir(root):
        raise ValueError(f'name must be an existing folder. Received: {name!r}')
    return tfds.ImageFolder(root, shape=(None, None, 3))


def _tfds_builder(name, data_dir):
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known)
        hint = f' (did you mean {" or ".join(close)}?)' if close else ''
        raise ValueError(
            "name must be a TFDS dataset, 'gratings' or the path of a folder "
            f'of images. Received: {name!r}{hint}'
        ) from error
    # A wrong config, version or namespace raises errors of many types.
    except Exception as error:
        raise ValueError(
            f'cannot open the dataset {name!r}: {_one_line(error)}'
        ) from error
    _feature_keys(builder)
    try:
        if not builder.data_path.exists():
            print(f'Preparing {name} in {builder.data_dir}', flush=True)
            _check_network(builder)
        builder.download_and_prepare()
    # Each dataset fails in its own way without a network.
    except Exception as error:
        raise ValueError(
            f'dataset {name!r} is not in {builder.data_dir} and could not be '
            f'downloaded and prepared there ({_one_line(error)}); copy a '
            'prepared one and set data.load_datasets.data_dir, or connect to '
            'the network'
        ) from error
    return builder


def _check_network(builder):
    """Raises a ConnectionError if no host of the dataset can be found.

    TFDS itself goes on trying for minutes. What was downloaded before, which
    has an INFO beside it, needs no network, and a proxy finds hosts itself.
    """
    downloads = pathlib.Path(builder.data_dir_root, 'downloads')
    hosts = {
        urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()
    }
    hosts.discard(None)
    if (
        builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        or urllib.request.getproxies()
        or any(downloads.glob('*.INFO'))
        or any(downloads.glob(f'{builder.name}/*.INFO'))
    ):
        return
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            reason = f'{host}: {error.strerror}'
    if hosts:
        raise ConnectionError(reason)


def _feature_keys(builder):
    """The names of the image and of the class label in an example.

    These are the supervised keys, or else the only ones of their kind.
    """
    features = dict(builder.info.features)

    def find(kind, keys):
        return [
            key
            for key, feature in features.items()
            if key in keys and isinstance(feature, kind)
        ]

    for keys in builder.info.supervised_keys or (), features:
        images = find(tfds.features.Image, keys)
        labels = find(tfds.features.ClassLabel, keys)
        if len(images) == len(labels) == 1 and (
            features[images[0]].np_dtype == np.uint8
        ):
            return images[0], labels[0]
    kinds = ', '.join(f'{k} ({type(f).__name__})' for k, f in features.items())
    raise ValueError(
        f'dataset {builder.name!r} must have one 8-bit Image and one '
        f'ClassLabel among its features. It has: {kinds}'
    )


def _count(builder, **split_argument):
    """The number of examples in a split, of which there must be some."""
    ((argument, split),) = split_argument.items()
    known = sorted(builder.info.splits)
    if isinstance(builder, tfds.ImageFolder):
        rule = (
            f'a folder inside {builder.data_dir} that holds one folder of '
            '.png or .jpg images per class'
        )
        count = split in known and builder.info.splits[split].num_examples
    else:
        rule = f'one of {known} or a slice that holds examples'
        try:
            count = builder.info.splits[split].num_examples
        except (KeyError, ValueError):
            count = 0
    if not count:
        raise ValueError(f'{argument} must be {rule}. Received: {split!r}')
    return count


@contextlib.contextmanager
def _naming_broken_files(builder, *splits):
    """Turns the failure to decode an image into an error with its path."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if isinstance(builder, tfds.ImageFolder):
            for split in splits:
                _check_files(builder, split)
        raise ValueError(
            f'cannot decode {builder.name!r}: {_one_line(error)}'
        ) from error


def _check_files(builder, split):
    decoders = {'image': tfds.decode.SkipDecoding()}
    for example in builder.as_dataset(split=split, decoders=decoders):
        try:
            tf.io.decode_image(example['image'], 3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            path = example['image/filename'].numpy().decode()
            raise ValueError(f'cannot decode the image {path}') from error


def _one_line(error):
    return textwrap.shorten(str(error), 400) or type(error).__name__


def is_int(value, least, below=2**63):
    """Whether it is an integer in [least, below), and no bool."""
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and least <= value < below
    )


def check_arguments(rules, prefix='', **arguments):
    """Raises a ValueError at the first argument that breaks its rule.

    Args:
        rules: A dict from names to (whether a value holds, what it must be).
        prefix: Of the names in the message.
        **arguments: What is checked, in this order.
    """
    for name, value in arguments.items():
        holds, rule = rules[name]
        if not holds(value):
            raise ValueError(
                f'{prefix}{name} must be {rule}. Received: {value!r}'
            )


_RULES = {
    'name': (
        lambda x: isinstance(x, str) and x,
        "the name of a TFDS dataset, 'gratings' or the path of a folder",
    ),
    'data_dir': (
        lambda x: x is None or (isinstance(x, str | os.PathLike) and x != ''),
        'a path or None',
    ),
    'batch_size': (lambda x: is_int(x, 1), 'an int >= 1'),
    'mixup_alpha': (
        lambda x: (
            isinstance(x, numbers.Real)
            and not isinstance(x, bool)
            and math.isfinite(x)
            and x >= 0
        ),
        'a finite number >= 0',
    ),
    'flip': (lambda x: isinstance(x, bool), 'True or False'),
    'crop_padding': (lambda x: is_int(x, 0), 'an int >= 0'),
    'normalization': (
        lambda x: x is None or x in ('dataset', 'unit'),
        "'dataset', 'unit' or None",
    ),
    'image_size': (
        lambda x: (
            x is None
            or (
                isinstance(x, list | tuple)
                and len(x) == 2
                and all(is_int(size, 1) for size in x)
            )
        ),
        '(height, width), two ints >= 1, or None',
    ),
    'train_split': (lambda x: isinstance(x, str) and x, 'a split name'),
    'test_split': (lambda x: isinstance(x, str) and x, 'a split name'),
    'seed': (lambda x: is_int(x, 0), 'an int >= 0'),
    'cache': (
        lambda x: isinstance(x, bool) or x == 'auto',
        "True, False or 'auto'",
    ),
}
