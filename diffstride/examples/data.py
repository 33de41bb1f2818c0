"""Batches of labelled images from any TFDS dataset or folder of images.

    data.load_datasets:
      name = 'cifar100'
      mixup_alpha = 0.2

Every random draw is stateless: a training batch is a pure function of the
seed, the epoch and the step. A run that was killed resumes from any epoch
with the numbers that it would have seen.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gin
import numpy as np
import tensorflow as tf

from diffstride.examples import augmentation, folders, rules, sources
from diffstride.validation import require

AUTOTUNE = tf.data.AUTOTUNE
# A split whose pixels take less is kept decoded in memory.
CACHE_BYTES = 2**30
# These give a mean and a standard deviation to within a level of 255.
STATISTICS_EXAMPLES = 10_000


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


@gin.configurable(module='data', denylist=['seed'])  # train.seed sets it.
def load_datasets(
    name: rules.Text = 'cifar10',
    data_dir: rules.Path | None = None,
    batch_size: rules.Count = 128,
    mixup_alpha: rules.Number = 0.0,
    flip: bool = False,
    crop_padding: rules.CountOrZero = 4,
    normalization: Literal['dataset', 'unit'] | None = 'dataset',
    image_size: rules.Size | None = None,
    channels: Literal[1, 3] | None = None,
    train_split: rules.Text = 'train',
    validation_split: rules.SplitOrShare | None = 'auto',
    test_split: rules.SplitOrShare = 'test',
    class_weights: Literal['balanced'] | None = None,
    seed: rules.Seed = 0,
    cache: bool | Literal['auto'] = 'auto',
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
    rules.check(load_datasets, locals())
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

    if normalization == 'dataset':
        mean_and_scale = statistics(splits['train'])
    else:
        scale = 255.0 if normalization == 'unit' else 1.0
        mean_and_scale = np.outer([0, scale], np.ones(splits['train'].shape[2]))
    notes = [*source.notes, *sources.notes_on(source.splits, pieces)]
    return make_datasets(
        source,
        splits,
        prepare,
        batch_size,
        seed,
        class_weights,
        mean_and_scale,
        notes,
    )


def _reader(source, pieces, image_size, channels):
    """Returns a function from (record, label) to (image, label)."""
    everything = [piece for parts in pieces.values() for piece in parts]
    own_sizes, own_channels, dtype = source.kind(everything)
    sizes = {tuple(image_size)} if image_size else set(own_sizes)
    if len(sizes) > 1:
        (a, b), (c, d), *_ = sorted(sizes)
        raise ValueError(
            f'images differ in size, {a} x {b} and {c} x {d}: set '
            'data.load_datasets.image_size = (height, width)'
        )
    shape = *sizes.pop(), channels or own_channels

    def read(record, label):
        image = folders.decode_image(source.contents(record), shape[-1], dtype)
        if image_size is not None:
            image = tf.image.resize(image, image_size, antialias=True)
            image = tf.saturate_cast(tf.round(image), dtype)
        return tf.ensure_shape(image, shape), label

    return read


def make_datasets(
    source: Any,
    splits: dict[str, 'Examples'],
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

    weights = None
    if class_weights == 'balanced':
        counts = np.bincount(training.read_labels(), minlength=num_classes)
        mean_count = training.count / np.count_nonzero(counts)
        weights = tuple(float(mean_count / n) if n else 1.0 for n in counts)
    return Datasets(
        train=train,
        validation=batches('validation'),
        test=batches('test'),
        steps_per_epoch=training.count // batch_size,
        image_shape=training.shape,
        class_names=source.class_names,
        mean=tuple(map(float, mean)),
        scale=tuple(map(float, scale)),
        class_weights=weights,
        summary=_summary(source, splits, notes),
    )


@dataclasses.dataclass
class Examples:
    """The examples of a split.

    Attributes:
        count: The number of examples.
        ordered: A tf.data.Dataset of (input, label), always in one order.
        shuffled: A function of the batch size and a seed, [2], that returns
            the full batches of an epoch in the order of the seed. Call it
            inside the function of a tf.data.Dataset.
        read_labels: A function that returns the labels, integers [count].
        knows_labels: Whether they are known without reading the split.
    """

    count: int
    ordered: tf.data.Dataset
    shuffled: Callable[[int, tf.Tensor], tf.data.Dataset]
    read_labels: Callable[[], np.ndarray]
    knows_labels: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.ordered.element_spec[0].shape)


def in_memory(inputs: np.ndarray, labels: np.ndarray) -> Examples:
    """Returns examples that are held in memory."""
    count = len(labels)
    with tf.device('CPU'):
        arrays = tf.constant(inputs), tf.constant(labels)
        ordered = tf.data.Dataset.from_tensor_slices(arrays)

    def shuffled(batch_size, key):
        steps = count // batch_size
        order = tf.random.experimental.stateless_shuffle(tf.range(count), key)
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])
        return tf.data.Dataset.from_tensor_slices(order).map(
            lambda batch: tuple(tf.gather(array, batch) for array in arrays)
        )

    return Examples(count, ordered, shuffled, lambda: labels)


def on_disk(
    source: folders.ImageFolder | sources.TfdsImages,
    pieces: Sequence[folders.Piece],
    read: Callable[..., tuple[tf.Tensor, tf.Tensor]],
) -> Examples:
    """Returns examples that are read and decoded whenever they are used.

    `read` is a function of (record, label) that returns (image, label).
    """
    count, records = sources.count(pieces), source.records(pieces)

    def shuffled(batch_size, key):
        # Dataset.shuffle also depends on the global seed. Here, in the graph
        # of a function, this sets the seed of that graph alone.
        tf.random.set_seed(1)
        seed = tf.random.stateless_uniform([], key, 0, tf.int64.max, tf.int64)
        return (
            records.shuffle(
                source.buffer or count, seed, reshuffle_each_iteration=False
            )
            .map(read, AUTOTUNE)
            .batch(batch_size, drop_remainder=True)
        )

    def read_labels():
        labels = records.map(lambda _, label: label).batch(count)
        return next(labels.as_numpy_iterator())

    ordered = records.map(read, AUTOTUNE)
    return Examples(count, ordered, shuffled, read_labels, source.knows_labels)


def _load(source, pieces, read, cache):
    """Returns the examples of a split, in memory or on disk."""
    examples = on_disk(source, pieces, read)
    # TFDS gives the label -1 to all examples of a split without labels.
    if any(label < 0 for _, label in source.records(pieces).take(1)):
        raise ValueError(f'the split {pieces[0][0]!r} has no labels')
    spec, _ = examples.ordered.element_spec
    if cache == 'auto':
        size = examples.count * math.prod(spec.shape) * spec.dtype.size
        cache = size < CACHE_BYTES
    if not cache:
        return examples
    batch = examples.ordered.batch(examples.count)
    try:
        return in_memory(*next(batch.as_numpy_iterator()))
    except tf.errors.OpError:
        if isinstance(source, folders.ImageFolder):
            source.check_images(pieces)  # It names the file.
        raise


def statistics(examples: Examples) -> np.ndarray:
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
    names, missing, described = source.class_names, [], []
    for split in 'train', 'validation', 'test':
        examples = splits.get(split)
        text = f'{examples.count:,} {split}' if examples else f'no {split}'
        if examples and examples.knows_labels:
            counts = np.bincount(examples.read_labels(), minlength=len(names))
            text += f' ({counts.min():,} to {counts.max():,} of a class)'
            absent = [name for name, n in zip(names, counts) if not n]
            if absent:
                absent = folders.enumeration(absent)
                missing.append(f'Classes without {split} examples: {absent}.')
        described.append(text)
    first = (
        f'{source.name}: {", ".join(described)} examples of '
        f'{" x ".join(map(str, splits["train"].shape))} in '
        f'{len(names):,} classes'
    )
    return '\n'.join([first, *missing, *notes])
