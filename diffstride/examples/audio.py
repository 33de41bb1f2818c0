"""Batches of labelled recordings from any TFDS dataset.

A gin file uses them so:

    import diffstride.examples.audio

    train.train.load_data_fn = @audio.load_datasets
    train.train.model_cls = @convnet.convnet
    audio.load_datasets:
      name = 'spoken_digit'
      test_filter = '_george_'
"""

import operator
import re
from typing import Literal

import gin
import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from diffstride.examples import data, rules, sources
from diffstride.validation import require

# Lower levels, relative to the loudest part of a recording, are raised to this.
DYNAMIC_RANGE = 60.0  # dB


@gin.configurable(module='audio', denylist=['seed'])  # train.seed sets it.
def load_datasets(
    name: rules.Text = 'spoken_digit',
    data_dir: rules.Path | None = None,
    batch_size: rules.Count = 32,
    features: Literal['log_mel', 'waveform'] = 'log_mel',
    duration: rules.Seconds = 1.0,
    num_mel_bins: rules.Count = 64,
    num_frames: rules.Count = 64,
    time_shift: rules.Number = 0.1,
    frequency_shift: rules.CountOrZero = 0,
    time_mask: rules.Number = 0.0,
    frequency_mask: rules.CountOrZero = 0,
    train_split: rules.Text = 'train',
    validation_split: rules.SplitOrShare | None = 'auto',
    test_split: rules.SplitOrShare = 'test',
    test_filter: rules.Pattern | None = None,
    class_weights: Literal['balanced'] | None = None,
    seed: rules.Seed = 0,
) -> data.Datasets:
    """Loads the splits of a dataset for the classification of recordings.

    A recording is scaled to a peak of 1, and its middle is cut out or zeros
    are added on both sides. Its features are computed once, here, rather than
    in the network or for each batch: they cost more than a small network, and
    a shift in time is nearly the same after them. They are kept in memory and
    are standardized by the mean and deviation of the training set.

    Args:
        name: A TFDS dataset with audio and a class label.
        data_dir: Where TFDS keeps its datasets; None for its default.
        batch_size: The number of examples in a batch.
        features: 'log_mel' for spectrograms of Keras's MelSpectrogram, in
            decibels below the maximum of the recording and down to -60, with
            windows of four steps between frames:
            [num_mel_bins, num_frames, 1]. 'waveform' for the samples
            themselves: [duration * sample rate, 1].
        duration: The length that is kept of each recording, in seconds.
        num_mel_bins: The number of frequencies of a spectrogram.
        num_frames: The number of points in time of a spectrogram, at least 2.
            They are a whole number of samples apart, so with many points the
            last part of the recording may be left out.
        time_shift: The largest shift in time of a training example, in
            seconds, which is random; 0 turns it off.
        frequency_shift: The largest shift of a training spectrogram towards
            high or low frequencies, in bins, like that of another speaker's
            voice; 0 turns it off.
        time_mask: The longest stretch of a training example that is masked by
            the mean, in seconds, at a random place (SpecAugment,
            arXiv:1904.08779); 0 turns it off.
        frequency_mask: The widest band that is masked, in bins, likewise.
        train_split: See `data.load_datasets`.
        validation_split: See `data.load_datasets`.
        test_split: See `data.load_datasets`. `test_filter` takes its place.
        test_filter: A regular expression. The recordings of the training
            split for which it is found in a text feature, such as the name of
            the file, are the test set, and in no other set. Thus one can test
            on a speaker who was not trained on. None to use `test_split`.
        class_weights: See `data.load_datasets`.
        seed: The seed of all random draws.

    Raises:
        ValueError: If an argument is wrong, or if the dataset does not fit.
    """
    rules.check(load_datasets, locals())
    require(
        test_filter is None or test_split == 'test',
        '`test_split` must not be set beside `test_filter`, which replaces it',
        test_split=test_split,
    )
    bins = num_mel_bins if features == 'log_mel' else 1
    for key, value, limit, rule in (
        ('time_shift', time_shift, duration, '`duration`'),
        ('time_mask', time_mask, duration, '`duration`'),
        ('frequency_shift', frequency_shift, bins, 'the number of bins'),
        ('frequency_mask', frequency_mask, bins, 'the number of bins'),
    ):
        require(value < limit, f'`{key}` must be below {rule}', **{key: value})
    source = sources.TfdsSource(name, data_dir, tfds.features.Audio)
    rate = source.features[source.input].sample_rate
    if not rate:
        raise ValueError(f'dataset {name!r} does not tell its sample rate')
    samples = round(duration * rate)
    extract = operator.itemgetter((..., None))
    if features == 'log_mel':
        extract = _log_mel(rate, samples, num_mel_bins, num_frames)
    pieces = sources.resolve_splits(
        source.splits,
        train_split,
        validation_split,
        train_split if test_filter else test_split,
    )
    splits = {}
    for split, parts in pieces.items():
        inputs, labels, texts = _read(source, parts, samples, extract)
        if test_filter:
            chosen = _is_chosen(test_filter, texts, split == 'test')
            inputs, labels = inputs[chosen], labels[chosen]
        splits[split] = data.in_memory(inputs, labels)
    frames = splits['train'].shape[-2] / duration

    def prepare(inputs, labels, key):
        keys = tf.unstack(tf.random.split(key, 4))
        inputs = shift(inputs, keys[0], round(time_shift * frames))
        inputs = mask(inputs, keys[1], round(time_mask * frames))
        if frequency_shift:
            inputs = shift(inputs, keys[2], frequency_shift, axis=1)
        if frequency_mask:
            inputs = mask(inputs, keys[3], frequency_mask, axis=1)
        return inputs, labels

    return data.make_datasets(
        source,
        splits,
        prepare,
        batch_size,
        seed,
        class_weights,
        data.statistics(splits['train']),
        () if test_filter else [*sources.notes_on(source.splits, pieces)],
    )


def _is_chosen(pattern, texts, of_test):
    """Returns which recordings are of the test set, or of the others."""
    found = np.array([bool(re.search(pattern, x, re.M)) for x in texts])
    chosen = found == of_test
    require(
        chosen.any(),
        '`test_filter` must match some recordings and not all of them, such '
        f'as {texts[0]!r}',
        test_filter=pattern,
    )
    return chosen


def _log_mel(rate, samples, num_mel_bins, num_frames):
    """Returns a function from [batch, samples] to [batch, bins, frames, 1]."""
    require(
        2 <= num_frames <= samples + 1,
        f'`num_frames` must be at least 2 and at most {samples + 1} in '
        f'{samples} samples',
        num_frames=num_frames,
    )
    step = samples // (num_frames - 1)
    window = 4 * step
    layer = keras.layers.MelSpectrogram(
        sampling_rate=rate,
        sequence_stride=step,
        sequence_length=window,
        fft_length=2 ** (window - 1).bit_length(),
        num_mel_bins=num_mel_bins,
        # The layer cuts below the maximum of the batch, not of a recording.
        top_db=1e3,
    )

    def log_mel(waveforms):
        decibels = layer(waveforms)[..., :num_frames, None]
        decibels -= tf.reduce_max(decibels, axis=(1, 2, 3), keepdims=True)
        return tf.maximum(decibels, -DYNAMIC_RANGE)

    return log_mel


def _read(source, pieces, samples, extract):
    """Returns the features, labels and texts of a split.

    A text has a line for each text feature of the recording.
    """
    keys = [
        key
        for key, feature in source.features.items()
        if isinstance(feature, tfds.features.Text)
    ]

    def cut(example):
        waveform = tf.cast(example[source.input], tf.float32)
        if waveform.shape.rank == 2:
            waveform = tf.reduce_mean(waveform, -1)
        peak = tf.reduce_max(tf.abs(waveform))
        waveform = tf.math.divide_no_nan(waveform, peak)
        missing = tf.maximum(samples - tf.size(waveform), 0)
        waveform = tf.pad(waveform, [[missing // 2, missing - missing // 2]])
        start = (tf.size(waveform) - samples) // 2
        waveform = tf.ensure_shape(waveform[start:][:samples], [samples])
        texts = [example[key] for key in keys]
        text = tf.strings.join(texts, '\n') if texts else ''
        return waveform, example[source.label], text

    batches = source.examples(pieces).map(cut, data.AUTOTUNE).batch(256)
    batches = batches.map(lambda waves, *others: (extract(waves), *others))
    arrays = zip(*batches.as_numpy_iterator())
    inputs, labels, texts = map(np.concatenate, arrays)
    return inputs, labels, [text.decode() for text in texts]


def shift(
    inputs: tf.Tensor, key: tf.Tensor, most: int, axis: int = -2
) -> tf.Tensor:
    """Shifts each example by up to `most` at random; the edges repeat.

    The inputs are [batch, ..., time, channels], the batch size static. They are
    shifted along the axis, time by default.
    """
    batch, length = inputs.shape[0], inputs.shape[axis]
    offsets = tf.random.stateless_uniform(
        [batch, 1], key, -most, most + 1, tf.int32
    )
    places = tf.clip_by_value(tf.range(length) + offsets, 0, length - 1)
    axis %= inputs.shape.rank
    return tf.gather(inputs, places, axis=axis, batch_dims=1)


def mask(
    inputs: tf.Tensor, key: tf.Tensor, widest: int, axis: int = -2
) -> tf.Tensor:
    """Sets one stretch of each example, up to `widest`, to 0, the mean.

    The inputs are those of `shift`. The stretch lies at random along the axis.
    """
    batch, length = inputs.shape[0], inputs.shape[axis]
    width_key, start_key = tf.unstack(tf.random.split(key))
    width = tf.random.stateless_uniform(
        [batch, 1], width_key, 0, widest + 1, tf.int32
    )
    start = tf.random.stateless_uniform([batch, 1], start_key)
    start = tf.cast(start * tf.cast(length - width + 1, tf.float32), tf.int32)
    places = tf.range(length)
    kept = (places < start) | (places >= start + width)
    shape = [batch] + [1] * (inputs.shape.rank - 1)
    shape[axis] = length
    return inputs * tf.cast(tf.reshape(kept, shape), inputs.dtype)
