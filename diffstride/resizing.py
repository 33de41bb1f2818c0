"""Resizing of maps through their spectra, up and down."""

from collections.abc import Sequence
from typing import Any

import gin
import keras
from keras import ops, tree

from diffstride import resampling, validation
from diffstride.pooling import SpectralResampling, spatial_axes


@keras.saving.register_keras_serializable(package='diffstride')
@gin.register(module='resizing')
class SpectralResizing(SpectralResampling):
    """Resizes spatial axes, up or down, to given sizes or to those of a map.

    It keeps the frequencies that input and output can both hold. An axis that
    grows is interpolated through its samples by the one periodic band-limited
    signal that they determine, exactly. An axis that shrinks loses the
    frequencies above the band of its new samples. The layer learns nothing. It
    brings a map that a learned stride shrank back to the grid of another map.

    One class serves 1 to 3 spatial axes; the input gives the rank.

    Args:
        size: Integer >= 1, the size of every spatial axis, or one per axis;
            None to take the sizes of a second input.
        data_format: 'channels_last', 'channels_first', or None for
            `keras.config.image_data_format()`.
        method: 'fft', 'matmul' (multiplication by a small matrix per axis), or
            'auto' for the one that should be faster.
        norm: 'forward' keeps the mean of the input, 'backward' multiplies it by
            N / M per axis from N to M samples, 'ortho' by sqrt(N / M).
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`; floating-point; or with one or
        three spatial axes. Without `size` a list [x, like] of two: `like` has
        the rank of x, and its batch, channels, dtype and values do not matter.

    Output shape:
        The shape of the input with `size`, or the spatial sizes of `like`, in
        place of its spatial sizes.

    Raises:
        ValueError: If an argument is out of its range, if the input is of
            another rank, has a spatial size of 0 or is not floating-point, or
            if there is no second input without `size` or one with it.

    Example:

    >>> tuple(SpectralResizing((20, 48))(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 20, 48, 8)

    A decoder meets a skip connection, whatever the strides between them:

    >>> skip = keras.ops.ones((1, 32, 32, 8))
    >>> x = DiffStride((2.0, 3.0))(skip)
    >>> tuple(SpectralResizing()([x, skip]).shape)
    (1, 32, 32, 8)
    """

    rank = 0  # The input gives it when the layer is built.

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        data_format: str | None = None,
        method: str = 'auto',
        norm: str = 'forward',
        **kwargs: Any,
    ):
        super().__init__(data_format, method, norm, **kwargs)
        self.size = None if size is None else validation.standardize_size(size)

    def build(self, input_shape: Any) -> None:
        shapes = input_shape or []  # Keras passes None for an empty list.
        x, _ = self._inputs(shapes, _is_list_of_shapes(shapes))
        ranks = (len(self.size),) if isinstance(self.size, tuple) else (1, 2, 3)
        validation.require(
            len(x) - 2 in ranks,
            f'The input of layer "{self.name}" must have ndim='
            + ' or '.join(str(rank + 2) for rank in ranks),
            shape=tuple(x),
        )
        self.rank = len(x) - 2
        self.built = True

    def compute_output_spec(self, inputs: Any) -> Any:
        if not self.built:
            self.build(tree.map_structure(lambda x: x.shape, inputs))
        return super().compute_output_spec(inputs)

    def call(self, inputs: Any) -> Any:
        self._check(inputs)
        x, like = self._inputs(inputs, isinstance(inputs, (list, tuple)))
        outputs, axes = [x], spatial_axes(self)
        for axis, size in zip(axes, self._sizes(ops.shape(like), axes)):
            outputs = resampling.resample(
                outputs, axis, size, self.norm, self.method
            )
        return outputs[0]

    def compute_output_shape(self, input_shape: Any) -> tuple:
        x, like = self._inputs(input_shape, _is_list_of_shapes(input_shape))
        axes = spatial_axes(self, len(x) - 2)
        shape = list(x)
        for axis, size in zip(axes, self._sizes(like, axes)):
            shape[axis] = size
        return tuple(shape)

    def _inputs(self, inputs, is_list):
        """Returns x and `like`, which are tensors or shapes."""
        count = len(inputs) if is_list else 1
        if self.size is None:
            validation.require(
                is_list and count == 2,
                f'Layer "{self.name}" must be called with a list [x, like], or '
                'have a `size`',
                inputs=count,
            )
            return inputs
        validation.require(
            not is_list,
            f'Layer "{self.name}", which has a `size`, must be called with one '
            'tensor, not with a list',
            inputs=count,
        )
        return inputs, inputs

    def _sizes(self, shape, axes):
        if self.size is None:
            return [shape[axis] for axis in axes]
        is_tuple = isinstance(self.size, tuple)
        return self.size if is_tuple else (self.size,) * len(axes)

    def _check(self, inputs):
        x, like = self._inputs(inputs, isinstance(inputs, (list, tuple)))
        super()._check(x)
        validation.require(
            len(like.shape) == len(x.shape)
            and all(like.shape[axis] != 0 for axis in spatial_axes(self)),
            f'The second input of layer "{self.name}" must have '
            f'ndim={self.rank + 2} and spatial sizes of at least 1',
            shape=tuple(like.shape),
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), 'size': self.size}


def _is_list_of_shapes(shape):
    return not shape or hasattr(shape[0], '__len__')
