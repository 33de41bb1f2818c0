"""Batches of labelled recordings from any TFDS dataset, and networks for them.

A gin file uses them so:

    import diffstride.examples.audio

    train.train.load_data_fn = @audio.load_datasets
    train.train.model_cls = @audio.spectrogram_net
    audio.load_datasets:
      name = 'spoken_digit'
      test_filter = '_george_'
"""

import ast
import operator
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import ops

from diffstride import resnet
from diffstride.examples import data, sources
from diffstride.pooling import DiffStride, DiffStride1D
from diffstride.validation import (
    integer,
    is_finite,
    is_integer,
    one_of,
    require,
    standardize_strides,
)

# Lower levels, relative to the loudest part of a recording, are raised to this.
DYNAMIC_RANGE = 60.0  # dB

AUTOTUNE = tf.data.AUTOTUNE


@gin.configurable(module='audio', denylist=['seed'])  # train.seed sets it.
def load_datasets(
    name: str = 'spoken_digit',
    data_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    features: str = 'log_mel',
    duration: float = 1.0,
    num_mel_bins: int = 64,
    num_frames: int = 64,
    time_shift: float = 0.1,
    frequency_shift: int = 0,
    time_mask: float = 0.0,
    frequency_mask: int = 0,
    train_split: str = 'train',
    validation_split: str | float | None = 'auto',
    test_split: str | float = 'test',
    test_filter: str | None = None,
    filter_feature: str | None = None,
    class_weights: str | None = None,
    seed: int = 0,
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
        num_frames: The number of points in time of a spectrogram.
        time_shift: The largest shift in time of a training example, in
            seconds, which is random; 0 turns it off.
        frequency_shift: The largest shift of a training spectrogram towards
            high or low frequencies, in bins, like that of another speaker's
            voice; 0 turns it off.
        time_mask: The longest stretch of a training example that is masked by
            the mean, in seconds, at a random place (SpecAugment,
            arXiv:1904.08779); 0 turns it off.
        frequency_mask: The widest band that is masked, in bins, likewise.
        train_split: The split to train on, see `data.load_datasets`.
        validation_split: See `data.load_datasets`.
        test_split: See `data.load_datasets`. `test_filter` takes its place.
        test_filter: A regular expression. The recordings of the training
            split for which it is found in a text feature, such as the name of
            the file, are the test set, and in no other set. Thus one can test
            on a speaker who was not trained on. None to use `test_split`.
        filter_feature: The name of the text feature; None if there is one.
        class_weights: See `data.load_datasets`.
        seed: The seed of all random draws.

    Returns:
        The `data.Datasets`. Its `image_shape` is the shape of the features.

    Raises:
        ValueError: If an argument is wrong, or if the dataset does not fit.
    """
    require(isinstance(name, str) and name, '`name` must be a name', name=name)
    data.check_batches(batch_size, seed, class_weights)
    one_of('features', features, ('log_mel', 'waveform'))
    integer('num_mel_bins', num_mel_bins, least=1)
    integer('num_frames', num_frames, least=2)
    require(
        is_finite(duration, above=0),
        '`duration` must be a number of seconds, above 0',
        duration=duration,
    )
    require(
        is_finite(time_shift, least=0) and time_shift < duration,
        '`time_shift` must be a number of seconds, at least 0 and below '
        '`duration`',
        time_shift=time_shift,
    )
    require(
        is_finite(time_mask, least=0) and time_mask < duration,
        '`time_mask` must be a number of seconds, at least 0 and below '
        '`duration`',
        time_mask=time_mask,
    )
    for key, bins in (
        ('frequency_shift', frequency_shift),
        ('frequency_mask', frequency_mask),
    ):
        require(
            is_integer(bins, least=0)
            and bins < (num_mel_bins if features == 'log_mel' else 1),
            f'`{key}` must be a number of bins, at least 0 and below '
            '`num_mel_bins`, and 0 for waveforms',
            **{key: bins},
        )
    sources.check_splits(train_split, validation_split, test_split)
    require(
        test_filter is None or _is_pattern(test_filter),
        '`test_filter` must be a regular expression or None',
        test_filter=test_filter,
    )
    builder = sources.open_builder(name, data_dir, _audio_keys)
    rate = builder.info.features[_audio_keys(builder)[0]].sample_rate
    if not rate:
        raise ValueError(f'dataset {name!r} does not tell its sample rate')
    samples = round(duration * rate)
    if features == 'log_mel':
        extract = _log_mel(rate, samples, num_mel_bins, num_frames)
    else:
        extract = operator.itemgetter((..., None))
    text_key = pattern = None
    if test_filter is not None:
        pattern = re.compile(test_filter)
        text_key, test_split = _text_key(builder, filter_feature), train_split
    pieces = sources.resolve_splits(
        builder.info.splits, train_split, validation_split, test_split
    )
    splits = {}
    for split, parts in pieces.items():
        if parts:
            inputs, labels, texts = _read(
                builder, parts, text_key, samples, extract
            )
            if pattern is not None:
                found = np.array([bool(pattern.search(x)) for x in texts])
                chosen = found == (split == 'test')
                require(
                    chosen.any(),
                    '`test_filter` must match some recordings and not all of '
                    f'them, such as {texts[0]!r}',
                    test_filter=test_filter,
                )
                inputs, labels = inputs[chosen], labels[chosen]
            splits[split] = data.ExamplesInMemory(inputs, labels)
    shape = splits['train'].ordered.element_spec[0].shape
    frames = shape[-2] / duration

    def prepare(inputs, labels, key):
        keys = tf.unstack(tf.random.split(key, 4))
        inputs = shift(inputs, keys[0], round(time_shift * frames))
        inputs = mask(inputs, keys[1], round(time_mask * frames))
        if frequency_shift:
            inputs = shift(inputs, keys[2], frequency_shift, axis=1)
        if frequency_mask:
            inputs = mask(inputs, keys[3], frequency_mask, axis=1)
        return inputs, labels

    label = builder.info.features[_audio_keys(builder)[1]]
    mean, scale = data.statistics(splits['train'])
    return data.make_datasets(
        name,
        splits,
        tuple(label.names),
        mean,
        scale,
        prepare,
        batch_size,
        seed,
        class_weights,
        () if pattern else [*sources.notes_on(builder.info.splits, pieces)],
    )


def shift(
    inputs: tf.Tensor, key: tf.Tensor, most: int, axis: int = -2
) -> tf.Tensor:
    """Shifts each example of a batch at random; the edges repeat.

    Args:
        inputs: [batch, ..., time, channels], the batch size static.
        key: The seed of the stateless draws, [2].
        most: The largest shift.
        axis: The axis along which examples are shifted; time by default.

    Returns:
        Shifted inputs, shaped as they are.
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
    """Sets one stretch of each example of a batch to 0, the mean.

    Args:
        inputs: [batch, ..., time, channels], the batch size static.
        key: The seed of the stateless draws, [2].
        widest: The largest width of a stretch; the least is 0.
        axis: The axis along which the stretch lies; time by default.

    Returns:
        Masked inputs, shaped as they are.
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


@keras.saving.register_keras_serializable(package='diffstride')
class ResidualConv(keras.layers.Layer):
    """Computes x + relu(norm(conv(x))), the number of channels kept.

    Args:
        rank: 1 or 2, the number of spatial axes.
        kernel_size: The size of the kernel along each axis.
        data_format: 'channels_first' or 'channels_last'.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self, rank: int, kernel_size: int, data_format: str, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.rank = rank
        self.kernel_size = kernel_size
        self.data_format = data_format

    def build(self, input_shape: Sequence) -> None:
        axis = 1 if self.data_format == 'channels_first' else -1
        self.conv = _conv(
            self.rank,
            input_shape[axis],
            self.kernel_size,
            1,
            self.data_format,
            dtype=self.dtype_policy,
        )
        self.norm = keras.layers.BatchNormalization(
            axis=axis, dtype=self.dtype_policy
        )
        self.conv.build(input_shape)
        self.norm.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return inputs + ops.relu(self.norm(self.conv(inputs)))

    def compute_output_shape(self, input_shape: Sequence) -> Sequence:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            'rank': self.rank,
            'kernel_size': self.kernel_size,
            'data_format': self.data_format,
        }


@gin.configurable(module='audio')
def spectrogram_net(
    num_output_classes: int,
    channels_first: bool | None = None,
    strides: str | Sequence = (2, 2, 2),
    pooling_cls: Callable | None = DiffStride,
    filters: Sequence[int] = (8, 16, 32),
) -> keras.Sequential:
    """Returns a small network for spectrograms, whose stages downsample.

    A stage is a 3 x 3 convolution, batch normalization, relu, the pooling and
    a `ResidualConv`. Global average pooling and a softmax follow the last.

    Args:
        num_output_classes: The number of outputs.
        channels_first: Whether the network computes in channels_first; its
            input is channels_last all the same. None for
            `keras.config.image_data_format()`.
        strides: The strides of each stage, each a number or one for frequency
            and one for time, in a list or a string: '(2, 1), (2, 2), 2'.
        pooling_cls: The class of pooling layers, see `resnet.ResidualLayer`;
            None for strided convolutions.
        filters: The number of filters of each stage.

    Returns:
        A model, built at its first call: [batch, frequency, time, channels] ->
        [batch, num_output_classes].

    Example:

    >>> model = spectrogram_net(10, strides='(3, 1), (3, 1), (3, 1)')
    >>> tuple(model(keras.ops.ones((4, 64, 64, 1))).shape)
    (4, 10)
    """
    return _net(
        2, 3, num_output_classes, channels_first, strides, pooling_cls, filters
    )


@gin.configurable(module='audio')
def waveform_net(
    num_output_classes: int,
    channels_first: bool | None = None,
    strides: str | Sequence = (8, 8, 4),
    pooling_cls: Callable | None = DiffStride1D,
    filters: Sequence[int] = (8, 16, 32),
) -> keras.Sequential:
    """Returns a small network for waveforms, a `spectrogram_net` of one axis.

    Its kernels have a size of 9. It maps [batch, time, channels] to
    [batch, num_output_classes].
    """
    return _net(
        1, 9, num_output_classes, channels_first, strides, pooling_cls, filters
    )


def _net(
    rank,
    kernel_size,
    num_output_classes,
    channels_first,
    strides,
    pooling_cls,
    filters,
):
    if isinstance(strides, str):
        try:
            strides = ast.literal_eval(f'[{strides}]')
        except (SyntaxError, ValueError):
            strides = ()
    require(
        isinstance(strides, list | tuple) and len(strides) == len(filters),
        f'`strides` must be those of {len(filters)} stages, as many as '
        '`filters`, in a list or a string',
        strides=strides,
    )
    if channels_first is None:
        channels_first = keras.config.image_data_format() == 'channels_first'
    data_format = 'channels_first' if channels_first else 'channels_last'
    axis = 1 if channels_first else -1
    layers = []
    if channels_first:
        layers.append(keras.layers.Permute((rank + 1, *range(1, rank + 1))))
    for width, stride in zip(filters, strides):
        stride = standardize_strides(stride, rank)
        conv_strides, pool = 1, None
        if max(stride) > 1:
            conv_strides, pool = resnet._downsampling(
                stride, pooling_cls, channels_first
            )
        if pool is not None:
            conv_strides = 1
        layers += [
            _conv(rank, width, kernel_size, conv_strides, data_format),
            keras.layers.BatchNormalization(axis=axis),
            keras.layers.ReLU(),
        ]
        if pool is not None:
            layers.append(pool)
        layers.append(ResidualConv(rank, kernel_size, data_format))
    average = getattr(keras.layers, f'GlobalAveragePooling{rank}D')
    layers += [
        average(data_format=data_format),
        keras.layers.Dense(
            num_output_classes, activation='softmax', dtype='float32'
        ),
    ]
    return keras.Sequential(layers)


def _conv(rank, filters, kernel_size, strides, data_format, **kwargs):
    conv = keras.layers.Conv1D if rank == 1 else keras.layers.Conv2D
    return conv(
        filters,
        kernel_size,
        strides=strides,
        padding='same',
        data_format=data_format,
        use_bias=False,
        kernel_initializer='he_normal',
        **kwargs,
    )


def _log_mel(rate, samples, num_mel_bins, num_frames):
    """Returns a function from [batch, samples] to [batch, bins, frames, 1]."""
    step = samples // (num_frames - 1)
    require(
        step >= 1,
        f'`num_frames` must be at most {samples + 1} in {samples} samples',
        num_frames=num_frames,
    )
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


def _read(builder, pieces, text_key, samples, extract):
    """Returns the features, labels and texts of a split."""
    audio_key, label_key = _audio_keys(builder)

    def cut(example):
        waveform = tf.cast(example[audio_key], tf.float32)
        if waveform.shape.rank == 2:
            waveform = tf.reduce_mean(waveform, -1)
        peak = tf.reduce_max(tf.abs(waveform))
        waveform = tf.math.divide_no_nan(waveform, peak)
        missing = tf.maximum(samples - tf.size(waveform), 0)
        waveform = tf.pad(waveform, [[missing // 2, missing - missing // 2]])
        start = (tf.size(waveform) - samples) // 2
        waveform = tf.ensure_shape(waveform[start:][:samples], [samples])
        text = '' if text_key is None else example[text_key]
        return waveform, example[label_key], text

    batches = (
        sources.read_pieces(builder, pieces)
        .map(cut, AUTOTUNE)
        .batch(256)
        .map(lambda waveforms, *others: (extract(waveforms), *others))
    )
    arrays = zip(*batches.as_numpy_iterator())
    inputs, labels, texts = map(np.concatenate, arrays)
    return inputs, labels, [text.decode() for text in texts]


def _audio_keys(builder):
    return sources.supervised_keys(builder, tfds.features.Audio)


def _text_key(builder, filter_feature):
    features = builder.info.features.items()
    keys = [k for k, x in features if isinstance(x, tfds.features.Text)]
    if filter_feature is None and len(keys) == 1:
        return keys[0]
    return one_of('filter_feature', filter_feature, tuple(keys))


def _is_pattern(text):
    try:
        return isinstance(text, str) and bool(re.compile(text))
    except re.error:
        return False
