"""Batches of labelled images from any TFDS dataset or folder of images.

    data.load_datasets:
      name = 'cifar100'
      mixup_alpha = 0.2

Every random draw is stateless: a training batch is a pure function of the
seed, the epoch and the step. A run that was killed resumes from any epoch
with the numbers that it would have seen.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import gin
import numpy as np
import tensorflow as tf

from diffstride.examples import augmentation, folders, rules, sources
from diffstride.examples.folders import AUTOTUNE
from diffstride.validation import is_finite, require

# A split whose pixels take less is kept decoded in memory.
CACHE_BYTES = 2**30
# These give a mean and a standard deviation to within a level of 255.
STATISTICS_EXAMPLES = 10_000

_RULES = {
    'name': (
        "the name of a TFDS dataset, 'gratings' or the path of a folder",
        rules.is_text,
    ),
    **rules.DATASETS,
    'mixup_alpha': (
        'a finite number, at least 0',
        lambda x: is_finite(x, least=0),
    ),
    'flip': rules.choice(True, False),
    'crop_padding': rules.COUNT_OR_ZERO,
    'normalization': rules.choice('dataset', 'unit', None),
    'image_size': rules.SIZE,
    'channels': rules.choice(1, 3, None),
    'cache': rules.choice(True, False, 'auto'),
}


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Batches of each split, and the properties that a model must know.

    A batch is (inputs, labels): float32 [batch, height, width, channels] and
    one-hot float32 [batch, num_classes].

    Attributes:
        train: A function `train(initial_epoch=0)` that returns an endless
            dataset: the training batches from that epoch on.
        validation: The batches to choose a checkpoint by; None for none.
        test: The test batches, meant to be used once, at the end.
        steps_per_epoch: The number of training batches in an epoch. The
            examples that do not fill a batch are left out, others each time.
        image_shape: The shape of one input, (height, width, channels).
        class_names: One string per class.
        mean: The value that is subtracted from each channel, [channels].
            Pixels have the range 0..255; 16-bit values are divided by 257.
        scale: The value that each channel is then divided by, [channels].
        class_weights: The weight of each class in the loss, or None.
        summary: Lines that say what was read and what may be a mistake.
    """

    train: Callable[..., tf.data.Dataset]
    validation: tf.data.Dataset | None
    test: tf.data.Dataset
    steps_per_epoch: int
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    class_weights: tuple[float, ...] | None
    summary: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@gin.configurable(module='data', denylist=['seed'])  # train.seed sets it.
def load_datasets(
    name: str = 'cifar10',
    data_dir: str | os.PathLike | None = None,
    batch_size: int = 128,
    mixup_alpha: float = 0.0,
    flip: bool = False,
    crop_padding: int = 4,
    normalization: str | None = 'dataset',
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    train_split: str = 'train',
    validation_split: str | float | None = 'auto',
    test_split: str | float = 'test',
    class_weights: str | None = None,
    seed: int = 0,
    cache: bool | str = 'auto',
) -> Datasets:
    """Loads the splits of a dataset for image classification.

    A split is a name, a slice such as 'train[:90%]', or a sum of slices.

    Args:
        name: A TFDS dataset with an image and a class label; 'gratings'; or a
            folder of images, see `folders.ImageFolder`.
        data_dir: Where TFDS keeps its datasets; None for its default.
        batch_size: The number of examples in a batch.
        mixup_alpha: The alpha of `mixup`; 0 turns it off.
        flip: Whether to mirror half of the training images, at random. This
            harms where left and right differ, as in digits and signs.
        crop_padding: The largest shift of training images, in pixels.
        normalization: 'dataset' subtracts the mean of each channel and divides
            by its standard deviation, both measured on the first 10,000
            training images; 'unit' divides by 255; None keeps 0..255. 16-bit
            images keep all their bits and are first divided by 257.
        image_size: (height, width) to resize all images to, whatever their
            aspect ratio; None if they all have the same size.
        channels: 1 for grey images and 3 for colors; None for 1 if all images
            are grey and 3 otherwise.
        train_split: The split to train on.
        validation_split: The split to choose a checkpoint by; a share of the
            training split to hold out for it, at its end; or None. 'auto' is
            the split called 'validation', 'valid', 'val' or 'dev', if there is
            one that is not the test split, and otherwise 0.1.
        test_split: The split to test on; or a share of the training split.
        class_weights: 'balanced' for weights in the loss that are inversely
            proportional to the number of training examples of a class, with a
            mean of 1 over the examples; None for none.
        seed: The seed of all random draws.
        cache: Whether to keep the decoded images in memory; 'auto' does so
            for a split below 1 GiB.

    Raises:
        ValueError: If an argument is wrong; or if the dataset is unknown,
            cannot be prepared, or has no such split, image or class label.
    """
    rules.check(locals(), _RULES)
    source = sources.open_images(name, data_dir, train_split)
    pieces = sources.resolve_splits(
        source.splits, train_split, validation_split, test_split
    )
    read = _reader(source, pieces, image_size, channels)
    splits = {
        split: _load(source, parts, read, cache)
        for split, parts in pieces.items()
    }

    def prepare(images, labels, key):
        augment_key, mixup_key = tf.unstack(tf.random.split(key))
        images = augmentation.augment(images, augment_key, flip, crop_padding)
        if mixup_alpha:
            images, labels = augmentation.mixup(
                images, labels, mixup_key, mixup_alpha
            )
        return images, labels

    return make_datasets(
        source,
        splits,
        prepare,
        batch_size,
        seed,
        class_weights,
        _mean_and_scale(
            normalization, source, pieces['train'], splits['train']
        ),
        (*source.notes, *sources.notes_on(source.splits, pieces)),
    )


def _reader(source, pieces, image_size, channels):
    """Returns a function from (record, label) to (image, label)."""
    everything = [piece for parts in pieces.values() for piece in parts]
    sizes, own_channels, dtype = source.kind(everything)
    size = image_size
    for each in () if image_size else sizes:
        size = size or each
        if each != size:
            (a, b), (c, d) = sorted([size, each])
            raise ValueError(
                f'images differ in size, {a} x {b} and {c} x {d}: set '
                'data.load_datasets.image_size = (height, width)'
            )
    shape = *size, channels or own_channels

    def read(record, label):
        image = folders.decode_image(source.contents(record), shape[-1], dtype)
        if image_size is not None:
            image = tf.image.resize(image, image_size, antialias=True)
            image = tf.saturate_cast(tf.round(image), dtype)
        return tf.ensure_shape(image, shape), label

    return read


def _mean_and_scale(normalization, source, pieces, examples):
    """Returns what is subtracted and what is divided by, [2, channels]."""
    shape = examples.shape
    if normalization != 'dataset':
        scale = 255.0 if normalization == 'unit' else 1.0
        return np.outer([0.0, scale], np.ones(shape[-1]))
    return folders.cached(
        f'statistics of {source.name} {pieces} {shape}',
        source.files(pieces),
        0 if isinstance(examples, ExamplesInMemory) else examples.count,
        lambda: statistics(examples),
    )


def make_datasets(
    source: Any,
    splits: dict,
    prepare: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    batch_size: int,
    seed: int,
    class_weights: str | None,
    mean_and_scale: np.ndarray,
    notes: Sequence[str],
) -> Datasets:
    """Makes batches of the examples of 'train', 'test' and 'validation'.

    `prepare` is a function of a training batch (inputs, labels) and a key, a
    seed [2], that augments and returns it. `mean_and_scale` are those of
    `Datasets`, [2, channels]. `notes` are lines of the summary.
    """
    num_classes = len(source.class_names)
    training = splits['train']
    require(
        batch_size <= training.count,
        f'`batch_size` must be at most {training.count}, the number of '
        'training examples',
        batch_size=batch_size,
    )
    mean, scale = mean_and_scale

    def standardize(inputs, labels):
        levels = 257 if inputs.dtype == tf.uint16 else 1
        inputs = (tf.cast(inputs, tf.float32) / levels - mean) / scale
        return inputs, tf.one_hot(labels, num_classes)

    def epoch_batches(epoch):
        batches = training.shuffled(batch_size, tf.stack([seed, epoch]))
        return batches.enumerate().map(lambda *batch: (epoch, *batch))

    def prepare_step(epoch, step, examples):
        key = tf.random.fold_in(tf.stack([seed, epoch]), step)
        return prepare(*standardize(*examples), key)

    def train(initial_epoch=0):
        epochs = tf.data.Dataset.range(initial_epoch, tf.int64.max)
        steps = epochs.flat_map(epoch_batches).map(prepare_step, AUTOTUNE)
        return steps.prefetch(AUTOTUNE)

    def batches(split):
        if split not in splits:
            return None
        ordered = splits[split].ordered.batch(batch_size)
        return ordered.map(standardize, AUTOTUNE).prefetch(AUTOTUNE)

    return Datasets(
        train=train,
        validation=batches('validation'),
        test=batches('test'),
        steps_per_epoch=training.count // batch_size,
        image_shape=training.shape,
        class_names=source.class_names,
        mean=tuple(map(float, mean)),
        scale=tuple(map(float, scale)),
        class_weights=_weights(training, num_classes, class_weights),
        summary=_summary(source, splits, notes),
    )


def _weights(examples, num_classes, kind):
    if kind is None:
        return None
    counts = np.bincount(examples.read_labels(), minlength=num_classes)
    present = np.count_nonzero(counts)
    return tuple(
        float(examples.count / (present * n)) if n else 1.0 for n in counts
    )


class ExamplesInMemory:
    """The examples of a split, held in memory.

    Attributes:
        count: The number of examples.
        shape: The shape of an input.
        ordered: A tf.data.Dataset of (input, label), always in one order.
        labels: Integers [count], or None if they must be read first.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray):
        self.count = len(labels)
        self.labels = labels
        with tf.device('CPU'):
            self._arrays = tf.constant(inputs), tf.constant(labels)
            self.ordered = tf.data.Dataset.from_tensor_slices(self._arrays)
        self.shape = tuple(self.ordered.element_spec[0].shape)

    def read_labels(self) -> np.ndarray:
        """Returns the labels, also where `labels` is None."""
        return self.labels

    def shuffled(self, batch_size: int, key: tf.Tensor) -> tf.data.Dataset:
        """Returns the full batches of an epoch, in the order of a seed, [2].

        Call it inside the function of a tf.data.Dataset.
        """
        steps = self.count // batch_size
        order = tf.random.experimental.stateless_shuffle(
            tf.range(self.count), key
        )
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])
        inputs, labels = self._arrays
        return tf.data.Dataset.from_tensor_slices(order).map(
            lambda batch: (tf.gather(inputs, batch), tf.gather(labels, batch))
        )


class ExamplesOnDisk:
    """The examples of a split, read and decoded whenever they are used.

    It has the attributes and methods of `ExamplesInMemory`. `read` is a
    function of (record, label) that returns (image, label).
    """

    def __init__(
        self,
        source: folders.ImageFolder | sources.TfdsImages,
        pieces: Sequence[folders.Piece],
        read: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    ):
        self.count = sources.count(pieces)
        self.read_labels = functools.partial(source.labels, pieces)
        self.labels = self.read_labels() if source.knows_labels else None
        self._records = source.records(pieces)
        self._read = read
        self._buffer = source.buffer or self.count
        self.ordered = self._records.map(read, AUTOTUNE)
        self.shape = tuple(self.ordered.element_spec[0].shape)

    def shuffled(self, batch_size: int, key: tf.Tensor) -> tf.data.Dataset:
        # Dataset.shuffle also depends on the global seed. Here, in the graph
        # of a function, this sets the seed of that graph alone.
        tf.random.set_seed(1)
        seed = tf.random.stateless_uniform([], key, 0, tf.int64.max, tf.int64)
        return (
            self._records.shuffle(
                self._buffer, seed, reshuffle_each_iteration=False
            )
            .map(self._read, AUTOTUNE)
            .batch(batch_size, drop_remainder=True)
        )


def _load(source, pieces, read, cache):
    """Returns the examples of a split, in memory or on disk."""
    examples = ExamplesOnDisk(source, pieces, read)
    # TFDS gives the label -1 to all examples of a split without labels.
    if any(label < 0 for _, label in examples.ordered.take(1)):
        raise ValueError(f'the split {pieces[0][0]!r} has no labels')
    spec, _ = examples.ordered.element_spec
    if cache == 'auto':
        size = examples.count * math.prod(examples.shape) * spec.dtype.size
        cache = size < CACHE_BYTES
    if not cache:
        return examples

    def read_all():
        batch = examples.ordered.batch(examples.count)
        return next(batch.as_numpy_iterator())

    if not source.knows_labels:
        return ExamplesInMemory(*read_all())
    images = folders.cached(
        f'pixels of {source.name} {pieces} {spec}',
        source.files(pieces),
        examples.count,
        lambda: read_all()[0],
    )
    return ExamplesInMemory(images, examples.labels)


def statistics(examples: 'ExamplesInMemory | ExamplesOnDisk') -> np.ndarray:
    """Returns the mean and the deviation of each channel, [2, channels].

    They are those of the first 10,000 examples. A constant channel gets a
    deviation of 1.
    """
    count, total, squares = 0, 0.0, 0.0
    batches = examples.ordered.take(STATISTICS_EXAMPLES).batch(500)
    for inputs, _ in batches.as_numpy_iterator():
        levels = 257 if inputs.dtype == np.uint16 else 1
        values = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
        values /= levels
        count += len(values)
        total += values.sum(0)
        squares += np.square(values).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    deviation = np.where(deviation > 1e-3, deviation, 1)
    return np.stack([mean, deviation]).astype(np.float32)


def _summary(source, splits, notes):
    """Returns lines that say what was read and what may be a mistake."""
    names, lines, described = source.class_names, [], []
    for split in 'train', 'validation', 'test':
        if split not in splits:
            described.append(f'no {split}')
            continue
        examples = splits[split]
        text = f'{examples.count:,} {split}'
        if examples.labels is not None:
            counts = np.bincount(examples.labels, minlength=len(names))
            text += f' ({counts.min():,} to {counts.max():,} of a class)'
            missing = [x for x, n in zip(names, counts) if not n]
            if missing:
                missing = folders.enumeration(missing)
                lines.append(f'Classes without {split} examples: {missing}.')
        described.append(text)
    first = (
        f'{source.name}: {", ".join(described)} examples of '
        f'{" x ".join(map(str, splits["train"].shape))} in '
        f'{len(names):,} classes'
    )
    return '\n'.join([first, *lines, *notes])
