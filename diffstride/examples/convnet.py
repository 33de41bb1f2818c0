"""A small convolutional network for images, spectrograms and waveforms.

A gin file uses it so:

    train.train.model_cls = @convnet.convnet
    convnet.convnet.strides = '(2, 1), (2, 2), 2'
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
from keras import ops

from diffstride import resnet
from diffstride.normalization import BatchNormalization
from diffstride.pooling import DiffStride, DiffStride1D
from diffstride.validation import require


@gin.configurable(module='convnet')
def convnet(
    num_output_classes: int,
    channels_first: bool | None = None,
    strides: str | Sequence = (2, 2, 2),
    pooling_cls: Callable | None = DiffStride,
    filters: Sequence[int] = (8, 16, 32),
) -> keras.Sequential:
    """Returns a small network for images, whose stages downsample.

    A stage is a 3 x 3 convolution, batch normalization, relu, the pooling and
    a `ResidualConv`. Global average pooling and a softmax follow the last.

    Args:
        num_output_classes: The number of outputs.
        channels_first: Whether the network computes in channels_first; its
            input is channels_last all the same. None for
            `keras.config.image_data_format()`.
        strides: The strides of each stage, each a number or one for the height
            (or frequency) and one for the width (or time), in a list or a
            string: '(2, 1), (2, 2), 2'.
        pooling_cls: The class of pooling layers, see `resnet.ResidualLayer`;
            None for strided convolutions.
        filters: The number of filters of each stage.

    Returns:
        A model, built at its first call: [batch, height, width, channels] ->
        [batch, num_output_classes].

    Raises:
        ValueError: If there is not one stride for each stage, or if a layer
            refuses what it gets.

    Example:

    >>> model = convnet(10, strides='(3, 1), (3, 1), (3, 1)')
    >>> tuple(model(keras.ops.ones((4, 64, 64, 1))).shape)
    (4, 10)
    """
    kinds = pooling_cls, channels_first
    return _net(2, 3, num_output_classes, strides, filters, *kinds)


@gin.configurable(module='convnet')
def convnet1d(
    num_output_classes: int,
    channels_first: bool | None = None,
    strides: str | Sequence = (8, 8, 4),
    pooling_cls: Callable | None = DiffStride1D,
    filters: Sequence[int] = (8, 16, 32),
) -> keras.Sequential:
    """Returns a small network for waveforms, a `convnet` of one axis.

    Its kernels have a size of 9. It maps [batch, time, channels] to
    [batch, num_output_classes].
    """
    kinds = pooling_cls, channels_first
    return _net(1, 9, num_output_classes, strides, filters, *kinds)


def _net(
    rank,
    kernel_size,
    num_classes,
    strides,
    filters,
    pooling_cls,
    channels_first,
):
    strides = resnet.parse_strides(strides, rank)
    require(
        len(strides) == len(filters),
        f'`strides` must be those of {len(filters)} stages, as many as '
        '`filters`',
        strides=strides,
    )
    if channels_first is None:
        channels_first = keras.config.image_data_format() == 'channels_first'
    data_format = 'channels_first' if channels_first else 'channels_last'
    conv, norm, _ = _layers(rank, kernel_size, data_format)
    layers = []
    if channels_first:
        layers.append(keras.layers.Permute((rank + 1, *range(1, rank + 1))))
    for width, stride in zip(filters, strides):
        conv_strides, pool = resnet.downsampling(
            stride, pooling_cls, channels_first
        )
        layers += [
            conv(width, strides=conv_strides),
            norm(),
            keras.layers.ReLU(),
            *([] if pool is None else [pool]),
            ResidualConv(rank, kernel_size, data_format),
        ]
    average = getattr(keras.layers, f'GlobalAveragePooling{rank}D')
    return keras.Sequential(
        [
            *layers,
            average(data_format=data_format),
            keras.layers.Dense(
                num_classes, activation='softmax', dtype='float32'
            ),
        ]
    )


def _layers(rank, kernel_size, data_format):
    """Returns makers of convolutions and normalizations, and their axis."""
    conv = functools.partial(
        keras.layers.Conv1D if rank == 1 else keras.layers.Conv2D,
        kernel_size=kernel_size,
        padding='same',
        data_format=data_format,
        use_bias=False,
        kernel_initializer='he_normal',
    )
    axis = 1 if data_format == 'channels_first' else -1
    norm = functools.partial(BatchNormalization, axis=axis)
    return conv, norm, axis


@keras.saving.register_keras_serializable(package='diffstride')
class ResidualConv(keras.layers.Layer):
    """Computes x + relu(norm(conv(x))), the number of channels kept.

    `rank` is the number of spatial axes, 1 or 2; `kernel_size` holds for each.
    """

    def __init__(
        self, rank: int, kernel_size: int, data_format: str, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.arguments = {
            'rank': rank,
            'kernel_size': kernel_size,
            'data_format': data_format,
        }

    def build(self, input_shape: Sequence) -> None:
        conv, norm, axis = _layers(**self.arguments)
        self.conv = conv(input_shape[axis], dtype=self.dtype_policy)
        self.norm = norm(dtype=self.dtype_policy)
        self.conv.build(input_shape)
        self.norm.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return inputs + ops.relu(self.norm(self.conv(inputs)))

    def compute_output_shape(self, input_shape: Sequence) -> Sequence:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.arguments}
