"""Batches of labelled images from any TFDS dataset or folder of images.

    data.load_datasets:
      name = 'cifar100'
      mixup_alpha = 0.2

Every random draw is stateless: a training batch is a pure function of the
seed, the epoch and the step. A run that was killed resumes from any epoch
with the numbers that it would have seen.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence

import gin
import numpy as np
import tensorflow as tf

from diffstride.examples import folders, sources
from diffstride.validation import (
    finite,
    integer,
    is_integer,
    one_of,
    require,
)

# A split whose pixels take less is kept decoded in memory.
CACHE_BYTES = 2**30
# These give a mean and a standard deviation to within a level of 255.
STATISTICS_EXAMPLES = 10_000
AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Batches of each split, and the properties that a model must know.

    A batch is (inputs, labels): float32 [batch, height, width, channels] and
    one-hot float32 [batch, num_classes].

    Attributes:
        train: A function `train(initial_epoch=0)` that returns an endless
            tf.data.Dataset: the training batches from that epoch on.
        validation: The tf.data.Dataset of the examples to choose a checkpoint
            or settings by, in order; None if there are none.
        test: The tf.data.Dataset of all test examples, in order. Its last
            batch may be smaller. It is meant to be used once, at the end.
        steps_per_epoch: The number of training batches in an epoch. The
            examples that do not fill a batch are left out, others each time.
        num_classes: The number of classes.
        image_shape: The shape of one input, (height, width, channels).
        class_names: One string per class.
        train_examples: The number of training examples.
        validation_examples: The number of validation examples.
        test_examples: The number of test examples.
        mean: The value that is subtracted from each channel, [channels].
            Pixels have the range 0..255; 16-bit values are divided by 257.
        scale: The value that each channel is then divided by, [channels].
        class_weights: The weight of each class in the loss, or None.
        summary: Lines for people, which say what was read and what may be a
            mistake.
    """

    train: Callable[..., tf.data.Dataset]
    validation: tf.data.Dataset | None
    test: tf.data.Dataset
    steps_per_epoch: int
    num_classes: int
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    train_examples: int
    validation_examples: int
    test_examples: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    class_weights: tuple[float, ...] | None
    summary: str


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

    A split is a name, a TFDS slice such as 'train[:90%]' or a sum of slices.
    A folder is sliced in the same way.

    Args:
        name: A TFDS dataset with an image and a class label, downloaded and
            prepared if need be; 'gratings'; or a folder of images, one folder
            per class in each split (name/train/cat/1.png) or without splits
            (name/cat/1.png), see `folders.read_folder`.
        data_dir: Where TFDS keeps its datasets; None for its default.
        batch_size: The number of examples in a batch.
        mixup_alpha: The alpha of `mixup`; 0 turns it off.
        flip: Whether to mirror half of the training images, at random. This
            helps with photographs and harms where left and right differ, as
            in digits, letters and signs.
        crop_padding: The largest shift of training images by `augment`, in
            pixels; 0 turns it off.
        normalization: 'dataset' subtracts the mean of each channel and
            divides by its standard deviation, both measured on the first
            10,000 training images; 'unit' divides by 255; None keeps 0..255.
            16-bit images keep all their bits and are first divided by 257. If
            they use a small part of their range, 'dataset' spreads it.
        image_size: (height, width) to resize all images to, whatever their
            aspect ratio; None if they all have the same size.
        channels: 1 for grey images and 3 for colors; None for 1 if all images
            are grey and 3 otherwise.
        train_split: The split to train on.
        validation_split: The split to choose a checkpoint by; or a number,
            the share of the training split that is held out for it, at its
            end; or None to hold out nothing and train on everything. 'auto'
            is the split called 'validation', 'valid', 'val' or 'dev', if
            there is one that is not the test split, and otherwise 0.1.
        test_split: The split to test on; or a number, the share of the
            training split that is held out for it, at its end.
        class_weights: 'balanced' for weights in the loss that are inversely
            proportional to the number of training examples of a class, with a
            mean of 1 over the examples; None for none.
        seed: The seed of all random draws.
        cache: Whether to keep the decoded images in memory; 'auto' does so
            for a split below 1 GiB.

    Returns:
        The `Datasets`.

    Raises:
        ValueError: If an argument is wrong; or if the dataset is unknown,
            cannot be prepared, or has no such split, image or class label.
    """
    require(
        isinstance(name, str) and name,
        "`name` must be the name of a TFDS dataset, 'gratings' or the path of "
        'a folder',
        name=name,
    )
    require(
        data_dir is None
        or (isinstance(data_dir, str | os.PathLike) and data_dir),
        '`data_dir` must be a path or None',
        data_dir=data_dir,
    )
    check_batches(batch_size, seed, class_weights)
    finite('mixup_alpha', mixup_alpha, least=0)
    require(isinstance(flip, bool), '`flip` must be True or False', flip=flip)
    integer('crop_padding', crop_padding, least=0)
    one_of('normalization', normalization, ('dataset', 'unit', None))
    require(
        image_size is None
        or (
            isinstance(image_size, list | tuple)
            and len(image_size) == 2
            and all(is_integer(size, least=1) for size in image_size)
        ),
        '`image_size` must be (height, width), two integers of at least 1, or '
        'None',
        image_size=image_size,
    )
    one_of('channels', channels, (1, 3, None))
    sources.check_splits(train_split, validation_split, test_split)
    require(
        isinstance(cache, bool) or cache == 'auto',
        "`cache` must be True, False or 'auto'",
        cache=cache,
    )
    source: sources.FolderSource | sources.TfdsSource
    if sources.is_folder(name, train_split):
        source = sources.FolderSource(name, train_split)
    else:
        source = sources.TfdsSource(name, data_dir)
    pieces = sources.resolve_splits(
        source.splits, train_split, validation_split, test_split
    )
    shape, dtype = source.shape(
        list(itertools.chain(*pieces.values())), image_size, channels
    )

    def read(record, label):
        image = folders.decode_image(source.contents(record), shape[-1], dtype)
        if image_size is not None:
            image = tf.image.resize(image, image_size, antialias=True)
            image = tf.saturate_cast(tf.round(image), dtype)
        return tf.ensure_shape(image, shape), label

    splits = {
        split: _load(source, parts, read, cache, class_weights is not None)
        for split, parts in pieces.items()
        if parts
    }
    mean, scale = np.zeros(shape[-1]), np.ones(shape[-1])
    if normalization == 'unit':
        scale = 255 * scale
    elif normalization == 'dataset':
        training = splits['train']
        mean, scale = folders.cached(
            f'statistics of {source.name} {pieces["train"]} {shape}',
            source.files(pieces['train']),
            0 if isinstance(training, ExamplesInMemory) else training.count,
            lambda: statistics(training),
        )

    def prepare(images, labels, key):
        augment_key, mixup_key = tf.unstack(tf.random.split(key))
        images = augment(images, augment_key, flip, crop_padding)
        if mixup_alpha:
            images, labels = mixup(images, labels, mixup_key, mixup_alpha)
        return images, labels

    return make_datasets(
        name,
        splits,
        source.class_names,
        mean,
        scale,
        prepare,
        batch_size,
        seed,
        class_weights,
        notes=(*source.notes, *sources.notes_on(source.splits, pieces)),
    )


def make_datasets(
    name: str,
    splits: dict,
    class_names: Sequence[str],
    mean: np.ndarray,
    scale: np.ndarray,
    prepare: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    batch_size: int,
    seed: int,
    class_weights: str | None = None,
    notes: Sequence[str] = (),
) -> Datasets:
    """Makes batches of examples.

    Args:
        name: The name of the dataset.
        splits: The examples of 'train', 'test' and possibly 'validation'.
        class_names: The names of the classes.
        mean: See `Datasets`, [channels].
        scale: See `Datasets`, [channels].
        prepare: A function of a training batch (inputs, labels) and a key, a
            seed [2], that augments and returns it.
        batch_size: The number of examples in a batch.
        seed: The seed of all random draws.
        class_weights: See `load_datasets`.
        notes: Further lines of the summary.

    Returns:
        The `Datasets`.
    """
    num_classes = len(class_names)
    training = splits['train']
    require(
        batch_size <= training.count,
        f'`batch_size` must be at most {training.count}, the number of '
        'training examples',
        batch_size=batch_size,
    )

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
        return (
            tf.data.Dataset.range(initial_epoch, tf.int64.max)
            .flat_map(epoch_batches)
            .map(prepare_step, AUTOTUNE)
            .prefetch(AUTOTUNE)
        )

    def batches(split):
        if split not in splits:
            return None
        return (
            splits[split]
            .ordered.batch(batch_size)
            .map(standardize, AUTOTUNE)
            .prefetch(AUTOTUNE)
        )

    shape = tuple(training.ordered.element_spec[0].shape)
    sizes = {split: examples.count for split, examples in splits.items()}
    weights = None
    if class_weights == 'balanced':
        counts = np.bincount(training.labels, minlength=num_classes)
        present = np.count_nonzero(counts)
        weights = tuple(
            float(training.count / (present * n)) if n else 1.0 for n in counts
        )
    return Datasets(
        train=train,
        validation=batches('validation'),
        test=batches('test'),
        steps_per_epoch=training.count // batch_size,
        num_classes=num_classes,
        image_shape=shape,
        class_names=tuple(class_names),
        train_examples=training.count,
        validation_examples=sizes.get('validation', 0),
        test_examples=sizes['test'],
        mean=tuple(map(float, mean)),
        scale=tuple(map(float, scale)),
        class_weights=weights,
        summary=_summary(name, splits, class_names, shape, notes),
    )


def augment(
    images: tf.Tensor, key: tf.Tensor, flip: bool, crop_padding: int
) -> tf.Tensor:
    """Mirrors and shifts each image of a batch at random.

    An image is padded with zeros by `crop_padding` pixels on each side and
    cropped back to its size anywhere inside.

    Args:
        images: [batch, height, width, channels], the batch size static.
        key: The seed of the stateless draws, [2].
        flip: Whether to mirror each image with probability 1/2.
        crop_padding: The largest shift, in pixels.

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


def mixup(
    images: tf.Tensor, labels: tf.Tensor, key: tf.Tensor, alpha: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each example with another of its batch.

        x = lambda x_i + (1 - lambda) x_j,  lambda ~ Beta(alpha, alpha)

    and the labels alike. Lambda is drawn for each image, where the authors'
    code draws one per batch: the mean is the same and the gradient less
    noisy. The partner j is the next example; the batch is already shuffled.

    Args:
        images: [batch, height, width, channels], the batch size static.
        labels: One-hot or soft, [batch, num_classes].
        key: The seed of the stateless draws, [2].
        alpha: The parameter of the Beta distribution, > 0. Small values
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


class ExamplesInMemory:
    """The examples of a split, held in memory.

    Attributes:
        count: The number of examples.
        ordered: A tf.data.Dataset of (input, label), always in one order.
        labels: Integers [count].
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray):
        self.count = len(labels)
        self.labels = labels
        with tf.device('CPU'):
            self._arrays = tf.constant(inputs), tf.constant(labels)
            self.ordered = tf.data.Dataset.from_tensor_slices(self._arrays)

    def shuffled(self, batch_size: int, key: tf.Tensor) -> tf.data.Dataset:
        """Returns the full batches of an epoch, in the order of a seed.

        Call it inside the function of a tf.data.Dataset.

        Args:
            batch_size: The number of examples in a batch.
            key: The seed of the stateless draws, [2].
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

    Args:
        source: A source of images.
        pieces: The pieces of the split.
        read: A function of (record, label) that returns (image, label).
        with_labels: Whether `labels` are needed even if they must be read.

    It has the attributes and methods of `ExamplesInMemory`, but `labels` may be
    None.
    """

    def __init__(
        self,
        source: sources.FolderSource | sources.TfdsSource,
        pieces: Sequence[sources.Piece],
        read: Callable[..., tuple[tf.Tensor, tf.Tensor]],
        with_labels: bool = False,
    ):
        self.count = sources.count(pieces)
        self.labels = None
        if source.knows_labels or with_labels:
            self.labels = source.labels(pieces)
        self._records = source.records(pieces)
        self._read = read
        self._buffer = source.buffer or self.count
        self.ordered = self._records.map(read, AUTOTUNE)

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


def _load(source, pieces, read, cache, with_labels):
    """Returns the examples of a split, in memory or on disk."""
    examples = ExamplesOnDisk(source, pieces, read, with_labels)
    # TFDS gives the label -1 to all examples of a split without labels.
    if any(label < 0 for _, label in examples.ordered.take(1)):
        raise ValueError(f'the split {pieces[0][0]!r} has no labels')
    image, _ = examples.ordered.element_spec
    if cache == 'auto':
        size = examples.count * math.prod(image.shape) * image.dtype.size
        cache = size < CACHE_BYTES
    if not cache:
        return examples

    def read_all():
        batch = examples.ordered.batch(examples.count)
        return next(batch.as_numpy_iterator())

    if not source.knows_labels:
        return ExamplesInMemory(*read_all())
    images = folders.cached(
        f'pixels of {source.name} {pieces} {image}',
        source.files(pieces),
        examples.count,
        lambda: read_all()[0],
    )
    return ExamplesInMemory(images, examples.labels)


def statistics(examples: 'ExamplesInMemory | ExamplesOnDisk') -> np.ndarray:
    """Returns the mean and the standard deviation of each channel.

    They are those of the first 10,000 examples. A constant channel gets a
    deviation of 1.

    Returns:
        float32 [2, channels].
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


def _summary(name, splits, class_names, shape, notes):
    """Returns lines that say what was read and what may be a mistake."""
    lines, described = [], []
    for split in 'train', 'validation', 'test':
        if split not in splits:
            described.append(f'no {split}')
            continue
        examples = splits[split]
        text = f'{examples.count:,} {split}'
        if examples.labels is not None:
            counts = np.bincount(examples.labels, minlength=len(class_names))
            text += f' ({counts.min():,} to {counts.max():,} of a class)'
            missing = [x for x, n in zip(class_names, counts) if not n]
            if missing:
                missing = folders.enumeration(missing)
                lines.append(f'Classes without {split} examples: {missing}.')
        described.append(text)
    size = ' x '.join(map(str, shape))
    first = (
        f'{name}: {", ".join(described)} examples of {size} in '
        f'{len(class_names):,} classes'
    )
    return '\n'.join([first, *lines, *notes])


def check_batches(
    batch_size: int, seed: int, class_weights: str | None
) -> None:
    """Checks the arguments that all loaders of datasets have."""
    integer('batch_size', batch_size, least=1)
    require(
        is_integer(seed, least=0) and seed < 2**63,
        '`seed` must be an integer in [0, 2**63)',
        seed=seed,
    )
    one_of('class_weights', class_weights, ('balanced', None))
