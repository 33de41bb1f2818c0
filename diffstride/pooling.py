"""Pooling layers that crop the spectrum of a feature map.

A call has two steps for each spatial axis. `_plan` returns the output size and
the weights of the frequencies, and `resampling.resample` computes the output.

`DiffStride._plan` turns strides into sizes: `_size_strides_in_call`, then
`Ramp.band_edge`, then `Ramp.output_size`. `resampling.resample` computes the
gradient of `Response.gradient_weights`, which reaches the variable through
`Ramp.weights`, `Ramp.band_edge` and `StrideState.strides_tensor`. The two
variables of a `StrideState` are saved as weights of the layer. The config has
the initial strides. While sizes are static or held it has the state too, since
models must know their shapes before weights are loaded.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
import numpy as np
from keras import ops, tree

from diffstride import backend, models, resampling, validation
from diffstride.backend import known, minimum, real
from diffstride.ramps import RAMPS, Ramp
from diffstride.strides import StrideState


def _register(cls):
    """Makes a layer loadable by Keras and configurable as `pooling.<cls>`."""
    keras.saving.register_keras_serializable(package='diffstride')(cls)
    return gin.register(cls, module='pooling')


class SpectralResampling(keras.layers.Layer):
    """Base class of all layers that resample spatial axes by their spectra."""

    rank = 2

    def __init__(
        self, data_format: str | None, method: str, norm: str, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if data_format is None:
            data_format = keras.config.image_data_format()
        self.data_format = validation.one_of(
            'data_format', data_format, ('channels_last', 'channels_first')
        )
        self.method = validation.one_of('method', method, resampling.METHODS)
        self.norm = validation.one_of('norm', norm, resampling.NORMS)

    def _check(self, inputs):
        validation.check_inputs(self, inputs, spatial_axes(self))

    def compute_output_spec(self, inputs: Any) -> Any:
        self._check(inputs)
        return super().compute_output_spec(inputs)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            'data_format': self.data_format,
            'method': self.method,
            'norm': self.norm,
        }


class SpectralPooling(SpectralResampling):
    """Base class of the spectral pooling layers of all ranks.

    It resamples every spatial axis of a tensor, or of a list of tensors of
    equal spatial sizes and dtype, for which all tables are made once.
    """

    cropping = True

    def __init__(
        self,
        strides: float | Sequence[float],
        data_format: str | None,
        method: str,
        norm: str,
        **kwargs: Any,
    ):
        super().__init__(data_format, method, norm, **kwargs)
        self._initial_strides = validation.standardize_strides(
            strides, self.rank
        )

    @property
    def stride_values(self) -> tuple[float, ...]:
        """The strides in use, as numbers, one per spatial axis."""
        return self._initial_strides

    def output_size(
        self, size: int, index: int = 0, stride: float | None = None
    ) -> int:
        """Returns the output size of one spatial axis, a number.

        Args:
            size: N, the size of the axis in the input.
            index: The spatial axis, counted from 0.
            stride: The stride to assume; None for the one that sizes are
                computed from at present.
        """
        if known(size):  # Tensors are not checked.
            validation.integer('size', size, least=1)
        validation.one_of('index', index, range(self.rank))
        if stride is None:
            stride = self._size_strides[index]
        else:
            stride = validation.finite('stride', stride, least=1)
        return self._size_at(size, stride)

    @property
    def _size_strides(self):
        """The strides that sizes are computed from, as numbers."""
        return self.stride_values

    def _size_at(self, size, stride):
        """Returns the output size; size and stride may be tensors."""
        raise NotImplementedError

    def _forward_weights(self, size, index):
        """Returns the forward weights of the frequencies that are kept."""
        raise NotImplementedError

    def _plan(self) -> Callable:
        """Returns a function of (index, size) for the spatial axes.

        It returns the output size and the `Response`, or None for weights of 1.
        """
        raise NotImplementedError

    def call(self, inputs: Any) -> Any:
        self._check(inputs)
        is_list = isinstance(inputs, (list, tuple))
        outputs = list(inputs) if is_list else [inputs]
        plan = self._plan()
        for index, axis in enumerate(spatial_axes(self)):
            size = backend.shape_of(outputs[0])[axis]
            output_size, response = plan(index, size)
            if response is None and output_size is size:
                continue  # Tensors cannot be compared without a graph.
            outputs = resampling.resample(
                outputs, axis, output_size, self.norm, self.method, response
            )
        return outputs if is_list else outputs[0]

    def compute_output_shape(self, input_shape: Any) -> Any:
        if hasattr(input_shape[0], '__len__'):
            return [self.compute_output_shape(shape) for shape in input_shape]
        shape = list(input_shape)
        for index, axis in enumerate(spatial_axes(self)):
            if shape[axis] is not None:
                shape[axis] = self._size_if_known(shape[axis], index)
        return tuple(shape)

    def _size_if_known(self, size, index):
        return self.output_size(size, index)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), 'strides': self._initial_strides}

    def mask(self, sizes: Sequence[int]) -> np.ndarray:
        """Returns the weight that the layer gives to each frequency now.

        Args:
            sizes: N of each spatial axis of the input.

        Returns:
            A float32 array of these sizes, for the frequencies
            f = -(N // 2) .. (N - 1) // 2 along each axis, in cycles per N
            samples. Cropped frequencies have a weight of 0. If the
            output is smaller, M < N, a cosine of frequency M / 2 comes out at
            half of its weight.
        """
        validation.require(
            len(sizes) == self.rank,
            f'`sizes` must have {self.rank} numbers, one per spatial axis',
            sizes=sizes,
        )
        mask = np.ones((), 'float32')
        for index, size in enumerate(sizes):
            weights = np.zeros(size // 2 + 1, 'float32')
            kept = self.output_size(size, index) // 2 + 1
            weights[:kept] = self._forward_weights(size, index)
            frequencies = np.abs(np.arange(size) - size // 2)
            mask = mask[..., None] * weights[frequencies]
        return mask


@dataclasses.dataclass
class _TracedConstants:
    """The constants that traced functions took from a layer.

    They are the strides if these were held, and the output sizes by spatial
    axis and input size. Where the input size was not known, they are the stride
    that sets the output size, by spatial axis.
    """

    held_strides: tuple[float, ...] | None
    sizes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    size_strides: dict[int, float] = dataclasses.field(default_factory=dict)

    def note(
        self, index: int, size: Any, output_size: Any, stride: Any
    ) -> None:
        """Notes what sets the size of an axis, if it is a constant."""
        if known(output_size):
            self.sizes[index, size] = output_size
        elif known(stride):
            self.size_strides[index] = stride

    def are_those_of(self, layer: 'DiffStride') -> bool:
        """Tells whether a function that is traced now would take the same."""
        return (
            self.held_strides == layer.state.held_strides
            and all(
                layer.output_size(size, index) == output_size
                for (index, size), output_size in self.sizes.items()
            )
            and all(
                layer.state.size_strides[index] == stride
                for index, stride in self.size_strides.items()
            )
        )


@_register
class DiffStride(SpectralPooling):
    """Pooling whose strides are learned by gradient descent.

    It keeps the frequencies |f| <= N / (2 S) of each spatial axis of length N,
    where S is the axis's stride, and samples the result anew on a smaller grid.
    The edge of the band is a ramp, through which the gradient reaches S.

    The output size follows the stride at every step where the backend allows
    it. XLA needs constant sizes. JAX takes those of the time of tracing, and
    Keras traces anew after an epoch in which a size changed. For
    `model.compile(jit_compile=True)` on TensorFlow call `make_sizes_static()`
    first; `callbacks.UpdateSizes` then lets the sizes follow from epoch to
    epoch. The response follows the stride in every case.

    The strides and their state (held or not, static sizes) are weights, so
    saving and restoring weights saves and restores the sizes too.

    An infinite or NaN gradient of a stride counts as 0.

    Args:
        strides: Initial strides: a number >= 1, or one per spatial axis.
        smoothness_factor: R > 0, the width of the ramp in frequencies.
        cropping: Whether the output is cropped to the frequencies that are
            left. With False they are only masked, and the size stays.
        trainable: Whether the strides are learned. `hold()` also fixes sizes.
        shared_stride: Whether all axes share one stride.
        lower_limit_stride: The least stride, a number >= 1, or None for 1.
        upper_limit_stride: The largest stride, a number >= 1, or None.
        data_format: 'channels_last', 'channels_first', or None for
            `keras.config.image_data_format()`.
        ramp: 'outside' (the paper's): the band is kept whole, the ramp reaches
            R frequencies further, and the output has about N / S + 2 R samples
            along the axis. 'inside': the ramp is the band's upper end, and the
            output has about N / S samples. 'straight_through': the same size,
            but the ramp is in the gradient alone, and all frequencies that the
            output can hold keep their weight.
        method: 'fft', 'matmul' (multiplication by a small matrix per axis), or
            'auto' for the one that should be faster, for each axis by its
            sizes. They agree to rounding.
        norm: 'forward' keeps the mean of the input, 'backward' multiplies it by
            N / M per axis, M being the output size, 'ortho' by sqrt(N / M).
        strides_regularizer: A regularizer of the strides, [rank], such as
            `costs.StrideCost`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`; floating-point. Or a list of such
        tensors of equal spatial sizes, which are pooled alike at less cost.

    Output shape:
        The same with each spatial size N replaced by M = min(N, 2 ceil(b + R))
        (ramp 'outside') or min(N, 2 ceil(b)) (the others), where b = N / (2 S)
        and S is at most N / 2.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has a spatial size of 0 or is not floating-point.

    Attributes:
        strides: The learned strides, a float32 variable under every dtype
            policy, [rank], or [1] with `shared_stride`. Assigning numbers to
            the attribute sets its values.
        held: Whether `hold()` has ended learning, whatever `trainable` is.
        state: The `StrideState`, which knows whether the layer
            `has_static_sizes`, and has the strides in use as a tensor,
            `strides_tensor()`.

    Example:

    >>> layer = DiffStride(strides=(2.0, 3.0))
    >>> tuple(layer(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 24, 20, 8)

    Reference:
        Riad et al., "Learning strides in convolutional neural networks", ICLR
        2022, arXiv:2202.01653, Eq. 3 and Algorithm 2.
    """

    def __init__(
        self,
        strides: float | Sequence[float] = 2.0,
        smoothness_factor: float = 4.0,
        cropping: bool = True,
        trainable: bool = True,
        shared_stride: bool = False,
        lower_limit_stride: float | None = None,
        upper_limit_stride: float | None = None,
        data_format: str | None = None,
        ramp: str = 'outside',
        method: str = 'auto',
        norm: str = 'forward',
        strides_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            strides, data_format, method, norm, trainable=trainable, **kwargs
        )
        self.smoothness_factor = validation.finite(
            'smoothness_factor', smoothness_factor, above=0
        )
        self.cropping = validation.boolean('cropping', cropping)
        self.shared_stride = validation.boolean('shared_stride', shared_stride)
        limits = _limits(lower_limit_stride, upper_limit_stride)
        self.lower_limit_stride, self.upper_limit_stride = limits
        self.ramp = validation.one_of('ramp', ramp, RAMPS)
        self.strides_regularizer = keras.regularizers.get(strides_regularizer)
        validation.require(
            self.cropping or ramp != 'straight_through',
            "`cropping` must be True with `ramp='straight_through'`, which "
            'changes nothing else in the output',
            cropping=cropping,
        )
        lower, upper = self.lower_limit_stride or 1.0, self.upper_limit_stride
        self._ramp = Ramp(ramp, self.smoothness_factor, lower, upper)
        self._traced: _TracedConstants | None = None
        with keras.name_scope(self.name):
            self.state = StrideState(
                self._initial_strides,
                self.shared_stride,
                lower,
                upper,
                self._on_change,
            )
        if self.strides_regularizer is not None:
            # It sees the strides in use. Held ones still add to the loss, but
            # get no gradient.
            self.state.variable.regularizer = lambda _: (
                self.strides_regularizer(self.state.strides_tensor())
            )
        # Keras saves variables that are attributes of a layer, in an order that
        # depends on `trainable` at this moment. So it is set after both.
        self._tracked_strides = self.state.variable
        self._tracked_record = self.state.record
        self.state.variable.trainable = trainable
        self._on_change()

    @property
    def strides(self) -> keras.Variable:
        """The learned strides, a variable."""
        return self.state.variable

    @strides.setter
    def strides(self, values: Any) -> None:
        self.state.assign(validation.standardize_strides(values, self.rank))

    @property
    def stride_values(self) -> tuple[float, ...]:
        """The strides in use, as numbers, one per spatial axis."""
        return self.state.stride_values

    def make_sizes_static(self) -> None:
        """Fixes the output sizes at those of the present strides.

        The strides go on being learned. XLA needs this on TensorFlow. Calling
        it again updates the sizes.
        """
        self.state.make_sizes_static()

    def hold(self) -> None:
        """Ends the learning of the strides, which stay as they are.

        Sizes become those of the present strides, and stay, too. The optimizer
        may still move the variable `strides`, which has no effect.
        """
        self.state.hold()

    def release(self) -> None:
        """Lets the strides be learned, and the sizes follow them.

        Functions of Keras models are traced anew. A `tf.function` of your own
        that was traced before keeps the held strides.
        """
        self.state.release()

    @property
    def held(self) -> bool:
        """Whether learning is over, by `hold()`."""
        return self.state.held

    @property
    def _size_strides(self):
        return self.state.size_strides

    def _size_at(self, size, stride):
        if not self.cropping:
            return size
        edge = self._ramp.band_edge(size, stride)
        return self._ramp.output_size(size, edge)

    def call(self, inputs: Any) -> Any:
        outputs = super().call(inputs)
        if self.trainable and self.held:
            # Keras warns if a trainable variable gets no gradient.
            return tree.map_structure(
                lambda x: backend.with_zero_gradient(x, self.state.variable),
                outputs,
            )
        return outputs

    def _plan(self):
        held_strides = self.state.held_strides
        is_traced = backend.is_traced(self.state.record)
        if is_traced:
            self._traced = self._traced or _TracedConstants(held_strides)
        strides = held_strides or self.state.strides_tensor()
        size_strides = self._size_strides_in_call(is_traced)

        def plan(index, size):
            # The response follows the stride, the size may be a static one.
            edge = self._ramp.band_edge(size, strides[index])
            output_size = self._size_at(size, size_strides[index])
            if is_traced:
                self._traced.note(index, size, output_size, size_strides[index])
            response = (
                self._ramp.forward_response(output_size, edge)
                if held_strides
                else self._ramp.learned_response(size, output_size, edge)
            )
            return output_size, response

        return plan

    def _size_strides_in_call(self, is_traced):
        """Returns the strides that set sizes.

        Eager calls and held strides give numbers. A graph of TensorFlow reads
        a tensor from the variables each time it runs, even for static sizes.
        XLA, which JAX always uses, compiles the numbers of now as constants.
        """
        if not is_traced or self.held:
            return self.state.size_strides
        if not backend.is_compiled_by_xla():
            return self.state.size_strides_tensor()
        validation.require(
            self.supports_jit,
            f'Sizes of layer "{self.name}" must be static for XLA on '
            'TensorFlow: call make_sizes_static() on it before',
            has_static_sizes=False,
        )
        return self.state.size_strides

    def _on_change(self):
        """Follows a change of the state.

        It sets whether XLA can compile the layer, and recompiles the models
        that were traced with constants that the state no longer has.
        """
        is_static = self.state.has_static_sizes
        self.supports_jit = (
            keras.backend.backend() != 'tensorflow'
            or not self.cropping
            or is_static
        )
        if self._traced is None:
            return
        # XLA would keep sizes that follow the strides again.
        has_sizes = bool(self._traced.sizes or self._traced.size_strides)
        is_stale = has_sizes and not self.supports_jit
        if is_stale or not self._traced.are_those_of(self):
            self._traced = None
            models.recompile_models_with(self)

    def _size_if_known(self, size, index):
        if self.cropping and not self.state.has_static_sizes:
            return None
        return self.output_size(size, index)

    def _forward_weights(self, size, index):
        edge = self._ramp.band_edge(size, self.stride_values[index])
        output_size = self.output_size(size, index)
        return self._ramp.constant_weights(output_size, edge)

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            'smoothness_factor': self.smoothness_factor,
            'cropping': self.cropping,
            'shared_stride': self.shared_stride,
            'lower_limit_stride': self.lower_limit_stride,
            'upper_limit_stride': self.upper_limit_stride,
            'ramp': self.ramp,
            'strides_regularizer': keras.regularizers.serialize(
                self.strides_regularizer
            ),
        }
        state = self.state.get_config()
        # Models must know static sizes before their weights are loaded. While
        # sizes follow, a clone starts at the initial strides.
        return config if state is None else {**config, 'state': state}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> 'DiffStride':
        config = dict(config)
        state = config.pop('state', None)
        layer = super().from_config(config)
        layer.state.set_config(state)
        return layer


def _limits(lower, upper):
    limits = {'lower_limit_stride': lower, 'upper_limit_stride': upper}
    return [
        None if value is None else validation.finite(name, value, least=1)
        for name, value in limits.items()
    ]


@_register
class DiffStride1D(DiffStride):
    """`DiffStride` over one axis, such as time: [batch, time, channels].

    Example:

    >>> layer = DiffStride1D(strides=2.5)  # For 100 frames of 64 bands.
    >>> tuple(layer(keras.ops.ones((1, 100, 64))).shape)
    (1, 48, 64)
    """

    rank = 1


@_register
class DiffStride3D(DiffStride):
    """`DiffStride` over three axes: [batch, depth, height, width, channels].

    Example:

    >>> layer = DiffStride3D(strides=(1.0, 2.0, 2.0), ramp='inside')
    >>> tuple(layer(keras.ops.ones((1, 8, 32, 32, 3))).shape)
    (1, 8, 16, 16, 3)
    """

    rank = 3


@_register
class FixedSpectralPooling(SpectralPooling):
    """Pooling with fixed strides, fractional ones too, in the Fourier domain.

    Args:
        strides: A number >= 1, or one per spatial axis.
        data_format: See `DiffStride`.
        method: See `DiffStride`.
        norm: See `DiffStride`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`; floating-point. Or a list of such
        tensors of equal spatial sizes, which are pooled alike at less cost.

    Output shape:
        The same with each spatial size N replaced by N / S rounded down to an
        even number, at least 2 and at most N. A stride of 1 changes nothing.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has a spatial size of 0 or is not floating-point.

    Example:

    >>> layer = FixedSpectralPooling(strides=(1.6, 3.0))
    >>> tuple(layer(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 20, 10, 8)

    Reference:
        Rippel et al., "Spectral representations for convolutional neural
        networks", NeurIPS 2015, arXiv:1506.03767, Algorithm 1.
    """

    def __init__(
        self,
        strides: float | Sequence[float] = 2.0,
        data_format: str | None = None,
        method: str = 'auto',
        norm: str = 'forward',
        **kwargs: Any,
    ):
        super().__init__(strides, data_format, method, norm, **kwargs)

    @property
    def strides(self) -> tuple[float, ...]:
        """The strides, one per spatial axis."""
        return self._initial_strides

    def _size_at(self, size, stride):
        if stride == 1:
            return size
        half = real(size) / (2 * stride) * (1 + resampling.TOLERANCE)
        if known(size):
            return min(size, max(2, 2 * math.floor(half)))
        half = ops.cast(ops.floor(half), 'int32')
        return minimum(size, ops.maximum(2, 2 * half))

    def _plan(self):
        return lambda index, size: (
            self._size_at(size, self.strides[index]),
            None,
        )

    def _forward_weights(self, size, index):
        return 1.0


@_register
class FixedSpectralPooling1D(FixedSpectralPooling):
    """`FixedSpectralPooling` over one axis: [batch, time, channels].

    Example:

    >>> layer = FixedSpectralPooling1D(strides=2.5)
    >>> tuple(layer(keras.ops.ones((1, 100, 64))).shape)
    (1, 40, 64)
    """

    rank = 1


@_register
class FixedSpectralPooling3D(FixedSpectralPooling):
    """`FixedSpectralPooling` over [batch, depth, height, width, channels].

    Example:

    >>> layer = FixedSpectralPooling3D(strides=(1.0, 1.6, 3.0))
    >>> tuple(layer(keras.ops.ones((1, 8, 32, 32, 3))).shape)
    (1, 8, 20, 10, 3)
    """

    rank = 3


@_register
class SpatialPooling(keras.layers.AveragePooling2D):
    """Average pooling with 'same' padding: the baseline without a spectrum.

    With the default `pool_size` it keeps every S-th sample, as a strided
    convolution does.

    Args:
        pool_size: Size of the window, an integer >= 1 or one per axis.
        strides: An integer >= 1, or one per axis.
        **kwargs: Arguments of `keras.layers.AveragePooling2D`, except
            `padding`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`.

    Output shape:
        The same with each spatial size N replaced by ceil(N / S).

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> layer = SpatialPooling(strides=3)
    >>> tuple(layer(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 11, 11, 8)
    """

    rank = 2

    def __init__(
        self,
        pool_size: int | Sequence[int] = (1, 1),
        strides: int | Sequence[int] = (2, 2),
        **kwargs: Any,
    ):
        strides = validation.integer_strides('SpatialPooling', strides)
        super().__init__(pool_size, strides, padding='same', **kwargs)

    def _check_input(self, inputs):
        validation.check_inputs(self, inputs, spatial_axes(self))

    def call(self, inputs: Any) -> Any:
        self._check_input(inputs)
        return super().call(inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        self._check_input(inputs)
        return super().compute_output_spec(inputs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config['padding']
        return config


def spatial_axes(layer: keras.layers.Layer, rank: int | None = None) -> range:
    """Returns the spatial axes of a batch.

    Args:
        layer: A layer with a `data_format`.
        rank: The number of these axes; None for `layer.rank`.
    """
    first = 2 if layer.data_format == 'channels_first' else 1
    return range(first, first + (layer.rank if rank is None else rank))


def diffstride_layers(model: keras.layers.Layer) -> list[DiffStride]:
    """Returns the DiffStride layers of a model or layer, at any depth.

    They come in the order in which their containers hold them, which is from
    input to output in Sequential and Functional models.
    """
    validation.require(
        isinstance(model, keras.layers.Layer),
        '`model` must be a Keras model or layer',
        model=model,
    )
    return [x for x in models.flatten(model) if isinstance(x, DiffStride)]
