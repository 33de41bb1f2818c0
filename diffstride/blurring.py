"""Blurred subsampling, the antialiased baseline without a spectrum."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import gin
import keras
import numpy as np
from keras import ops

from diffstride import backend, resampling, validation
from diffstride.backend import known
from diffstride.pooling import spatial_axes


@keras.saving.register_keras_serializable(package='diffstride')
@gin.register(module='pooling')
class BlurPooling(keras.layers.Layer):
    """Pooling that blurs with a binomial filter and keeps every S-th sample.

    It is the antialiased counterpart of a strided convolution or, with a
    `pool_size`, of maximum pooling.

    Args:
        strides: An integer >= 1, or one per axis.
        kernel_size: Odd length of the filter, such as 3 for (1, 2, 1) / 4; None
            for 2 S - 1 along an axis of stride S.
        pool_size: Window of a maximum pooling at stride 1 before the blur; 1
            for none.
        data_format: 'channels_last', 'channels_first', or None for
            `keras.config.image_data_format()`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`. Each axis must be longer than half
        the filter, because its samples are reflected at the borders.

    Output shape:
        The same with each spatial size N replaced by ceil(N / S).

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, not floating-point, or too small for the filter.

    Example:

    >>> layer = BlurPooling(strides=2)
    >>> tuple(layer(keras.ops.ones((1, 33, 32, 8))).shape)
    (1, 17, 16, 8)

    Reference:
        Zhang, "Making convolutional networks shift-invariant again", ICML 2019,
        arXiv:1904.11486.
    """

    rank = 2

    def __init__(
        self,
        strides: int | Sequence[int] = 2,
        kernel_size: int | None = None,
        pool_size: int = 1,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.strides = validation.integer_strides('BlurPooling', strides)
        validation.require(
            kernel_size is None
            or (validation.is_integer(kernel_size, 1) and kernel_size % 2),
            '`kernel_size` must be None or an odd integer, at least 1',
            kernel_size=kernel_size,
        )
        self.kernel_size = kernel_size
        self.pool_size = validation.integer('pool_size', pool_size, least=1)
        self.data_format = validation.one_of(
            'data_format',
            data_format or keras.config.image_data_format(),
            ('channels_last', 'channels_first'),
        )

    def _lengths(self):
        """Returns the lengths of the filter along both axes."""
        return [self.kernel_size or 2 * s - 1 for s in self.strides]

    def _check(self, inputs):
        axes, lengths = spatial_axes(self), self._lengths()
        validation.check_inputs(self, inputs, axes)
        sizes = backend.static_sizes(inputs, axes)
        validation.require(
            all(
                size is None or size > length // 2
                for size, length in zip(sizes, lengths)
            ),
            f'The spatial sizes of the input of layer "{self.name}" must '
            f'exceed half of the filter, {tuple(x // 2 for x in lengths)}',
            shape=tuple(inputs.shape),
        )

    def compute_output_spec(self, inputs: Any) -> Any:
        self._check(inputs)
        return super().compute_output_spec(inputs)

    def call(self, inputs: Any) -> Any:
        self._check(inputs)
        x, axes = inputs, spatial_axes(self)
        if self.pool_size > 1:
            x = ops.max_pool(x, self.pool_size, 1, 'same', self.data_format)
        for axis, stride, length in zip(axes, self.strides, self._lengths()):
            if stride > 1 or length > 1:
                matrix = _matrix(backend.shape_of(x)[axis], stride, length)
                x = resampling.multiply(x, axis, matrix)
        return x

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        shape = list(input_shape)
        for axis, stride in zip(spatial_axes(self), self.strides):
            if shape[axis] is not None:
                shape[axis] = math.ceil(shape[axis] / stride)
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            'strides': self.strides,
            'kernel_size': self.kernel_size,
            'pool_size': self.pool_size,
            'data_format': self.data_format,
        }


def _matrix(size, stride, length):
    """Returns the matrix [M, N] that blurs an axis and keeps M samples."""
    if known(size):
        return _constant_matrix(size, stride, length)
    return _matrix_by(ops, size, stride, length)


@functools.lru_cache(maxsize=64)
def _constant_matrix(size, stride, length):
    return _matrix_by(np, size, stride, length)


def _matrix_by(xp, size, stride, length):
    """Returns the matrix as an array of the module `xp`, NumPy or Keras."""
    offsets = np.arange(length, dtype='int32') - length // 2
    weights = [
        math.comb(length - 1, i) / 2 ** (length - 1) for i in range(length)
    ]
    count = (size + stride - 1) // stride
    places = xp.arange(count, dtype='int32')[:, None] * stride + offsets
    # The samples are reflected at the borders.
    places = size - 1 - xp.abs(size - 1 - xp.abs(places))
    is_used = places[..., None] == xp.arange(size, dtype='int32')
    return xp.sum(xp.where(is_used, np.array(weights)[:, None], 0.0), axis=1)
