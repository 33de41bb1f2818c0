"""Pooling layers that crop the spectrum of a feature map."""

import math
import warnings

import gin
import keras
import numpy as np
from keras import ops

from diffstride import backend, spectral, validation


def _register(cls):
    """Makes a layer loadable by Keras and configurable as `pooling.<cls>`."""
    keras.saving.register_keras_serializable(package='diffstride')(cls)
    return gin.register(cls, module='pooling')


class SpectralResampling(keras.layers.Layer):
    """The base of all layers that resample spatial axes by their spectra."""

    rank = 2

    def __init__(self, data_format, method, norm, **kwargs):
        super().__init__(**kwargs)
        if data_format is None:
            data_format = keras.config.image_data_format()
        self.data_format = validation.one_of(
            'data_format', data_format, ('channels_last', 'channels_first')
        )
        self.method = validation.one_of('method', method, spectral.METHODS)
        self.norm = validation.one_of('norm', norm, spectral.NORMS)
        self.frozen = False

    @property
    def spatial_axes(self):
        return spatial_axes(self.data_format, self.rank)

    def _check(self, inputs):
        validation.check_inputs(self, inputs, self.spatial_axes)

    def compute_output_spec(self, inputs):
        self._check(inputs)
        return super().compute_output_spec(inputs)

    def freeze(self, method='matmul'):
        """Makes the layer a constant linear operator, see `diffstride.freeze`.

        Functions traced before go on as before.

        Args:
            method: As in the constructor.
        """
        self.method = validation.one_of('method', method, spectral.METHODS)
        self.frozen = True

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.frozen:
            method = spectral.METHODS.index(self.method)
            store['frozen_method'] = np.array(method)

    def load_own_variables(self, store):
        if 'frozen_method' in store.keys():
            known = tuple(range(len(spectral.METHODS)))
            method = store['frozen_method'][()].item()
            validation.one_of('frozen_method', method, known)
            self.method = spectral.METHODS[int(method)]
            self.frozen = True

    def get_config(self):
        return {
            **super().get_config(),
            'data_format': self.data_format,
            'method': self.method,
            'norm': self.norm,
            **({'frozen': True} if self.frozen else {}),  # Not an argument.
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        frozen = config.pop('frozen', False)
        layer = cls(**config)
        layer.frozen = frozen
        return layer


class SpectralPooling(SpectralResampling):
    """The base of the spectral pooling layers of all ranks.

    Resamples every spatial axis of a tensor, or of a list of tensors of equal
    spatial sizes and dtype, for which all tables are made once.
    """

    cropping = True

    def __init__(self, strides, data_format, method, norm, **kwargs):
        super().__init__(data_format, method, norm, **kwargs)
        self._initial_strides = validation.standardize_strides(
            strides, self.rank
        )

    @property
    def strides_per_axis(self):
        """The present strides, a sequence or a float32 tensor, [rank]."""
        raise NotImplementedError

    def _output_size(self, size, stride):
        """Output size, an integer where both are numbers, or a tensor."""
        raise NotImplementedError

    def _resampling(self, index, size):
        """Output size and other arguments of `spectral.resample`."""
        raise NotImplementedError

    def present_size(self, index, size):
        """Output size for a known size, as it is now."""
        raise NotImplementedError

    def size_with_gradient(self, index, size):
        """The output size at the present strides, with the gradient of N / S.

        Args:
            index: Of the spatial axis, from 0.
            size: N, a float32 scalar tensor of an integer.

        Returns:
            M, a float32 scalar tensor.
        """
        if not self.cropping:
            return size
        stride = self.strides_per_axis[index]
        output_size = self._output_size(ops.cast(size, 'int32'), stride)
        return spectral.with_gradient_of(
            size / stride, ops.cast(output_size, 'float32')
        )

    def _varies(self):
        """Whether the output size for a known size is not known."""
        return False

    def call(self, inputs):
        self._check(inputs)
        is_list = isinstance(inputs, (list, tuple))
        outputs = list(inputs) if is_list else [inputs]
        for index, axis in enumerate(self.spatial_axes):
            size = backend.shape_of(outputs[0])[axis]
            output_size, arguments = self._resampling(index, size)
            method = self.method
            if method == 'auto' and isinstance(size, int):
                present_size = output_size
                if not isinstance(output_size, int):
                    present_size = self.present_size(index, size)
                method = spectral.fastest_method(
                    outputs[0].shape, axis, present_size
                )
            outputs = spectral.resample(
                outputs, axis, output_size, self.norm, method, **arguments
            )
        return outputs if is_list else outputs[0]

    def compute_output_shape(self, input_shape):
        if hasattr(input_shape[0], '__len__'):
            return [self.compute_output_shape(shape) for shape in input_shape]
        shape = list(input_shape)
        for index, axis in enumerate(self.spatial_axes):
            if shape[axis] is not None:
                shape[axis] = (
                    None
                    if self._varies()
                    else self.present_size(index, shape[axis])
                )
        return tuple(shape)

    def get_config(self):
        return {**super().get_config(), 'strides': self._initial_strides}


@_register
class DiffStride(SpectralPooling):
    """Pooling whose strides are learned by gradient descent.

    Keeps the frequencies |f| <= N / (2 S) of each spatial axis of length N, S
    being the axis's stride, and samples the result anew on a smaller grid. The
    band has a ramp for an edge, through which the gradient reaches S.

    The output size follows the stride at every step where the backend allows
    it. In what XLA compiles, as in `fit` on JAX, sizes must be constant, so
    there they are *pinned*: computed from the strides at the time of `pin()`,
    which is called for you when it is traced. Under
    `model.compile(jit_compile=True)` on TensorFlow call it yourself before
    compiling. The response follows the stride exactly in both modes;
    `callbacks.RepinStrides` lets the sizes follow from epoch to epoch.

    A gradient of a stride that is infinite or not a number counts as 0.

    Args:
        strides: Initial strides: a number >= 1, or one per spatial axis.
        smoothness_factor: R > 0, the width of the ramp in frequencies.
        cropping: Whether the output is cropped to the frequencies that are
            left; False only masks, and keeps the input's size.
        trainable: Whether the strides are learned.
        shared_stride: Whether all axes share one stride.
        lower_limit_stride: None or a number >= 1 below which no stride goes.
        upper_limit_stride: None or a number above which no stride goes.
        data_format: 'channels_last', 'channels_first', or None for
            `keras.config.image_data_format()`.
        ramp: 'outside' (the paper's): the band is kept whole, the ramp reaches
            R frequencies further, and the output has about N / S + 2 R samples
            along the axis. 'inside': the ramp is the band's upper end, and the
            output has about N / S samples. 'straight_through': as 'inside', but
            the ramp is in the gradient alone; the output is that of spectral
            pooling, all that its samples can hold. Several of these layers
            share a budget well if R is the band of the smallest map, or more.
        method: 'fft', 'matmul' (multiplication by a small matrix per axis), or
            'auto' for the one that should be faster, for each axis by its
            sizes. They agree to rounding.
        norm: 'forward' keeps the mean of the input, 'backward' multiplies it by
            N / M per axis, M being the output size, 'ortho' by sqrt(N / M).
        strides_regularizer: Regularizer of the strides, [rank], such as
            `regularizers.StrideCost`.
        **kwargs: Of `keras.layers.Layer`, such as `name` and `dtype`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`; floating-point. Or a list of such
        tensors, of equal sizes but for the channels, pooled alike at less cost.

    Output shape:
        The same with each spatial size N replaced by M = min(N, 2 ceil(b + R))
        (ramp 'outside') or min(N, 2 ceil(b)) (the others), where b = N / (2 S).

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has a spatial size of 0 or is not floating-point.

    Attributes:
        strides: The learned strides, float32 under every dtype policy,
            [rank], or [1] with `shared_stride`.
        pinned_strides: The strides that the output sizes are computed from,
            or None while they follow `strides`.
        frozen_strides: The strides that are used instead of `strides`, as
            numbers, after `freeze()`; else None.

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
        strides=2.0,
        smoothness_factor=4.0,
        cropping=True,
        trainable=True,
        shared_stride=False,
        lower_limit_stride=None,
        upper_limit_stride=None,
        data_format=None,
        ramp='outside',
        method='auto',
        norm='forward',
        strides_regularizer=None,
        **kwargs,
    ):
        super().__init__(
            strides, data_format, method, norm, trainable=trainable, **kwargs
        )
        self.smoothness_factor = smoothness_factor
        self.cropping = cropping
        self.shared_stride = shared_stride
        self.lower_limit_stride = lower_limit_stride
        self.upper_limit_stride = upper_limit_stride
        self.ramp = validation.one_of('ramp', ramp, spectral.RAMPS)
        self.strides_regularizer = keras.regularizers.get(strides_regularizer)
        self._check_arguments()
        initial = self._initial_strides[: 1 if shared_stride else None]
        self.strides = self.add_weight(
            name='strides',
            shape=(len(initial),),
            dtype='float32',
            autocast=False,
            initializer=lambda shape, dtype: ops.convert_to_tensor(
                initial, dtype
            ),
            regularizer=self._regularizer_per_axis(),
        )
        self.frozen_strides = None
        self._sizes_used = set()
        self._known_strides = self._initial_strides
        self.unpin()
        self.unsettle()

    def _regularizer_per_axis(self):
        regularizer = self.strides_regularizer
        if regularizer is None or not self.shared_stride:
            return regularizer
        return lambda strides: regularizer(
            ops.broadcast_to(strides, (self.rank,))
        )

    @property
    def _limits(self):
        lower, upper = self.lower_limit_stride, self.upper_limit_stride
        return 1.0 if lower is None else lower, upper

    def _check_arguments(self):
        validation.require(
            validation.is_finite(self.smoothness_factor, above=0),
            '`smoothness_factor` must be a finite number above 0',
            smoothness_factor=self.smoothness_factor,
        )
        self.smoothness_factor = float(self.smoothness_factor)
        for name in ('cropping', 'shared_stride'):
            validation.one_of(name, getattr(self, name), (True, False))
        for name in ('lower_limit_stride', 'upper_limit_stride'):
            limit = getattr(self, name)
            if limit is not None:
                validation.require(
                    validation.is_finite(limit, least=1),
                    f'`{name}` must be None or a finite number, at least 1',
                    **{name: limit},
                )
                setattr(self, name, float(limit))
        lower, upper = self._limits
        limits = {'lower_limit_stride': lower, 'upper_limit_stride': upper}
        strides = self._initial_strides
        validation.require(
            upper is None or lower <= upper,
            '`lower_limit_stride` must not exceed `upper_limit_stride`',
            **limits,
        )
        rounding = 1e-6  # Of strides that went through float32.
        validation.require(
            min(strides) >= lower * (1 - rounding)
            and (upper is None or max(strides) <= upper * (1 + rounding)),
            '`strides` must lie between `lower_limit_stride` and '
            '`upper_limit_stride`',
            strides=strides,
            **limits,
        )
        validation.require(
            self.cropping or self.ramp != 'straight_through',
            "`cropping` must be True with `ramp='straight_through'`, which "
            'removes nothing else',
            cropping=self.cropping,
        )
        validation.require(
            not self.shared_stride or len(set(strides)) == 1,
            '`strides` must be equal on all axes with `shared_stride=True`',
            strides=strides,
        )

    @property
    def stride_values(self):
        """The present strides as numbers, one per spatial axis."""
        if self.frozen_strides is not None:
            return self.frozen_strides
        return self._per_axis(backend.value_of(self.strides))

    def _per_axis(self, values):
        values = tuple(map(float, values))
        return values * self.rank if self.shared_stride else values

    def pin(self):
        """Computes output sizes from the strides as they are now, from now on.

        Functions traced before keep the sizes that they were traced with.
        """
        self._pin_at(self.stride_values)

    def unpin(self):
        """Lets the output sizes follow the strides, where the backend can."""
        self._pin_at(None)

    def _pin_at(self, strides, by_need=False):
        self.pinned_strides = None if strides is None else tuple(strides)
        self._is_pinned_by_need = by_need
        self.supports_jit = (
            strides is not None
            or not self.cropping
            or keras.backend.backend() != 'tensorflow'
        )

    @property
    def variables(self):
        """As of every layer."""
        # Keras asks for them in `fit` on JAX before it takes their values away,
        # which are needed when it then traces.
        if keras.backend.backend() == 'jax':
            self._note_strides()
        return super().variables

    def _note_strides(self):
        if backend.have_values([self.strides]):
            self._known_strides = self.stride_values

    def _strides_of_sizes(self, training=False):
        """The strides that sizes are computed from, None if not known yet."""
        strides = self.pinned_strides
        if strides is None:
            values = backend.known_values(self.strides)
            if values is not None:
                return self._per_axis(values)
            if not backend.sizes_must_be_constant():
                return None
            self._note_strides()
            self._pin_at(self._known_strides, by_need=True)
            strides = self.pinned_strides
        is_learned = training and self.trainable and not self.settled
        if is_learned and self._is_pinned_by_need and self.cropping:
            _tell_that_sizes_are_constant()
        return strides

    def repin(self):
        """As `pin`, for sizes that are pinned already.

        Returns:
            Whether the layer was called in a compiled function with an output
            size that is another one now, so that it must be compiled again.
        """
        before = self.pinned_strides
        self.pin()
        return any(
            self._output_size(size, before[index])
            != self._output_size(size, self.pinned_strides[index])
            for index, size in self._sizes_used
        )

    @property
    def strides_per_axis(self):
        """The present strides as a float32 tensor, [rank]."""
        if self.frozen_strides is not None:
            return ops.convert_to_tensor(self.frozen_strides, 'float32')
        return ops.broadcast_to(
            ops.convert_to_tensor(self.strides), (self.rank,)
        )

    def response(self, size, index=0):
        """The weight that the layer gives to each frequency now.

        Args:
            size: N, of the axis in the input.
            index: Of the spatial axis, from 0.

        Returns:
            float32 array of NumPy [N // 2 + 1], for f = 0 .. N // 2 in cycles
            per N samples; 0 for what is cropped.
        """
        output_size = self.present_size(index, size)
        response = np.zeros(size // 2 + 1, 'float32')
        kept = min(size, output_size) // 2 + 1
        if self.ramp == 'straight_through':
            response[:kept] = 1.0
        else:
            stride = self.stride_values[index]
            response[:kept] = spectral.diffstride_response(
                *self._ramp_arguments(size, output_size, stride)
            )
        return response

    def mask(self, sizes):
        """The weights of all frequencies now, the mean in the middle.

        Args:
            sizes: N of each spatial axis of the input.

        Returns:
            float32 array of NumPy, of these sizes.
        """
        mask = np.ones((), 'float32')
        for index, size in enumerate(sizes):
            frequencies = np.abs(np.arange(size) - size // 2)
            mask = mask[..., None] * self.response(size, index)[frequencies]
        return mask

    def least_strides(self, sizes, output_sizes):
        """The least strides whose output sizes are at most these.

        Or, where no stride is large enough, the largest that has an effect.

        Args:
            sizes: N of each spatial axis of the input.
            output_sizes: M of each spatial axis.

        Returns:
            A list of numbers, one for each value of `strides`.
        """

        def least(size, output_size):
            too_low, enough = 1.0, float(size)
            if self._output_size(size, too_low) <= output_size:
                return too_low
            for _ in range(40):
                middle = (too_low + enough) / 2
                if self._output_size(size, middle) <= output_size:
                    enough = middle
                else:
                    too_low = middle
            # Not the very stride at which the size jumps.
            return enough * (1 + 2**-14)

        strides = [least(*pair) for pair in zip(sizes, output_sizes)]
        return [max(strides)] if self.shared_stride else strides

    def larger_sizes(self, sizes):
        """The output sizes after a step of one stride down, for each that can.

        Args:
            sizes: N of each spatial axis of the input.

        Returns:
            A list of tuples, M of each spatial axis.
        """

        def at(strides):
            return tuple(
                self._output_size(size, stride)
                for size, stride in zip(sizes, self._per_axis(strides))
            )

        strides = self.stride_values[: 1 if self.shared_stride else None]
        now = at(strides)
        least = self.least_strides(sizes, now)
        found = []
        for index in range(len(strides)):
            lowered = list(strides)
            lowered[index] = least[index] * (1 - 2**-12)
            if at(lowered) != now:
                found.append(at(lowered))
        return found

    def settle(self):
        """Ends the learning of the strides: they and all sizes stay.

        The strides remain a variable of the optimizer, whose every step they
        undo by their constraint. Functions traced before go on as before. What
        changes variables otherwise, such as the average of an optimizer with
        `use_ema=True`, is not undone.
        """
        self.pin()
        values = backend.value_of(self.strides).tolist()
        self.strides.constraint = _StrideLimits(values, values)
        self.settled = True

    def unsettle(self):
        """Lets the strides be learned again; sizes remain pinned."""
        self.strides.constraint = _StrideLimits(*self._limits)
        self.settled = False

    def freeze(self, method='matmul'):
        """Ends the learning of the strides for good: they become numbers.

        The variable `strides` remains, so that weights of this layer and of
        those that learn fit one another, but it is not looked up any more and
        stays not trainable. A size that is pinned remains as it is.

        Args:
            method: As in the constructor.
        """
        super().freeze(method)
        self._freeze_at(self.stride_values)

    def _freeze_at(self, strides):
        self.frozen_strides = tuple(strides)
        if self.pinned_strides is None:
            self.pin()
        self.trainable = False

    @keras.layers.Layer.trainable.setter
    def trainable(self, value):
        is_learned = self.frozen_strides is None
        keras.layers.Layer.trainable.fset(self, value and is_learned)

    def _clip(self, stride, size):
        return spectral.clip_stride(
            stride,
            size,
            self.smoothness_factor,
            self.ramp,
            self.lower_limit_stride,
            self.upper_limit_stride,
        )

    def _ramp_arguments(self, size, output_size, stride):
        """The first arguments of the functions of the ramp in `spectral`."""
        return (
            size,
            output_size,
            self._clip(stride, size),
            self.smoothness_factor,
            self.ramp,
        )

    def _output_size(self, size, stride):
        if not self.cropping:
            return size
        return spectral.diffstride_size(
            size, self._clip(stride, size), self.smoothness_factor, self.ramp
        )

    def call(self, inputs, training=None):
        self._strides_of_sizes(training)  # Pinned now, if need be.
        return super().call(inputs)

    def compute_output_spec(self, inputs, training=None):
        return super().compute_output_spec(inputs)

    def _resampling(self, index, size):
        if self.frozen_strides is not None:
            return self._frozen_resampling(index, size)
        stride = spectral.with_finite_gradient(self.strides_per_axis[index])
        strides = self._strides_of_sizes()
        output_size = self._output_size(
            size,
            ops.stop_gradient(stride) if strides is None else strides[index],
        )
        if isinstance(output_size, int) and self.pinned_strides is not None:
            self._sizes_used.add((index, size))
        about = self._ramp_arguments(size, output_size, stride)
        frequencies = spectral.ramp_frequencies(*about)
        keeps_all = self.ramp == 'straight_through'
        return output_size, {
            'response': (
                None if keeps_all else spectral.diffstride_response(*about)
            ),
            'varying': (
                frequencies,
                spectral.diffstride_response(*about, frequencies),
            ),
        }

    def _frozen_resampling(self, index, size):
        stride = self.frozen_strides[index]
        output_size = self._output_size(size, self.pinned_strides[index])
        response = None
        if self.ramp != 'straight_through':
            response = spectral.diffstride_response(
                *self._ramp_arguments(size, output_size, stride)
            )
        return output_size, {'response': response, 'varying': ()}

    def present_size(self, index, size):
        strides = self.pinned_strides or self.stride_values
        return self._output_size(size, strides[index])

    def _varies(self):
        return self.cropping and self.pinned_strides is None

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.pinned_strides is not None:
            store['pinned_strides'] = np.array(self.pinned_strides)
            store['settled'] = np.array(self.settled)
        if self.frozen_strides is not None:
            store['frozen_strides'] = np.array(self.frozen_strides)

    def load_own_variables(self, store):
        self.strides.assign(store['0'])
        was_frozen, self.frozen_strides = self.frozen_strides is not None, None
        is_pinned = 'pinned_strides' in store.keys()
        self._pin_at(self._saved(store, 'pinned_strides'))
        self.unsettle()
        if is_pinned and 'settled' in store.keys() and store['settled'][()]:
            self.settle()
        if 'frozen_strides' in store.keys():
            self._freeze_at(self._saved(store, 'frozen_strides'))
        elif was_frozen:
            self._freeze_at(self.stride_values)
        super().load_own_variables(store)

    def _saved(self, saved, name):
        """Strides of a file, which may be NaN, as the variable may."""
        if name not in saved.keys():
            return None
        strides = tuple(map(float, saved[name]))
        validation.require(
            len(strides) == self.rank and not any(s < 1 for s in strides),
            f'`{name}` of a saved layer must be {self.rank} numbers, each at '
            'least 1',
            **{name: strides},
        )
        return strides

    def get_config(self):
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
        if self.pinned_strides is not None:
            # Not an argument: what Model.compile must know on loading.
            config['pinned_strides'] = self.pinned_strides
            config['settled'] = self.settled
        if self.frozen_strides is not None:
            config['frozen_strides'] = self.frozen_strides
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        names = 'pinned_strides', 'settled', 'frozen_strides'
        saved = {name: config.pop(name) for name in names if name in config}
        layer = super().from_config(config)
        pinned_strides = layer._saved(saved, 'pinned_strides')
        frozen_strides = layer._saved(saved, 'frozen_strides')
        if pinned_strides is not None and saved.get('settled'):
            layer.strides.assign(pinned_strides[: layer.strides.shape[0]])
            layer.settle()
        layer._pin_at(pinned_strides)
        if frozen_strides is not None:
            layer.strides.assign(frozen_strides[: layer.strides.shape[0]])
            layer._freeze_at(frozen_strides)
        return layer


@_register
class DiffStride1D(DiffStride):
    """`DiffStride` over one axis, such as that of time.

    Args:
        strides: Initial stride: a number >= 1, or a sequence of one.
        **kwargs: All other arguments of `DiffStride`.

    Input shape:
        [batch, time, channels], or [batch, channels, time] with
        `data_format='channels_first'`; floating-point. Or a list of such
        tensors, of equal sizes but for the channels, pooled alike at less cost.

    Output shape:
        The same with the N samples of time replaced by M, as in `DiffStride`.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has no samples or is not floating-point.

    Example:

    >>> layer = DiffStride1D(strides=2.5)  # E.g. 100 frames of 64 bands.
    >>> tuple(layer(keras.ops.ones((1, 100, 64))).shape)
    (1, 48, 64)

    Reference:
        See `DiffStride`.
    """

    rank = 1


@_register
class DiffStride3D(DiffStride):
    """`DiffStride` over three axes, of a volume or of a video.

    Args:
        strides: Initial strides: a number >= 1, or three.
        **kwargs: All other arguments of `DiffStride`.

    Input shape:
        [batch, depth, height, width, channels], or
        [batch, channels, depth, height, width] with
        `data_format='channels_first'`; floating-point. The depth may be the
        time of a video. Or a list of such tensors, of equal sizes but for the
        channels, pooled alike at less cost.

    Output shape:
        The same with each spatial size N replaced by M, as in `DiffStride`.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has a spatial size of 0 or is not floating-point.

    Example:

    >>> layer = DiffStride3D(strides=(1.0, 2.0, 2.0), ramp='inside')
    >>> tuple(layer(keras.ops.ones((1, 8, 32, 32, 3))).shape)
    (1, 8, 16, 16, 3)

    Reference:
        See `DiffStride`.
    """

    rank = 3


@_register
class FixedSpectralPooling(SpectralPooling):
    """Pooling with fixed strides, fractional ones too, in the Fourier domain.

    Args:
        strides: A number >= 1, or one per spatial axis.
        data_format: As in `DiffStride`.
        method: As in `DiffStride`.
        norm: As in `DiffStride`.
        **kwargs: Of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width]
        with `data_format='channels_first'`; floating-point. Or a list of such
        tensors, of equal sizes but for the channels, pooled alike at less cost.

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
        strides=2.0,
        data_format=None,
        method='auto',
        norm='forward',
        **kwargs,
    ):
        super().__init__(strides, data_format, method, norm, **kwargs)

    @property
    def strides(self):
        return self._initial_strides

    @property
    def strides_per_axis(self):
        return self.strides

    def _output_size(self, size, stride):
        return spectral.fixed_size(size, stride)

    def _resampling(self, index, size):
        return self.present_size(index, size), {}

    def present_size(self, index, size):
        return self._output_size(size, self.strides[index])


@_register
class FixedSpectralPooling1D(FixedSpectralPooling):
    """`FixedSpectralPooling` over one axis, such as that of time.

    Args:
        strides: A number >= 1, or a sequence of one.
        **kwargs: All other arguments of `FixedSpectralPooling`.

    Input shape:
        [batch, time, channels], or [batch, channels, time] with
        `data_format='channels_first'`; floating-point. Or a list of such
        tensors, of equal sizes but for the channels, pooled alike at less cost.

    Output shape:
        The same with the N samples of time replaced by N / S rounded down to
        an even number, at least 2 and at most N. A stride of 1 changes nothing.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has no samples or is not floating-point.

    Example:

    >>> layer = FixedSpectralPooling1D(strides=2.5)
    >>> tuple(layer(keras.ops.ones((1, 100, 64))).shape)
    (1, 40, 64)

    Reference:
        See `FixedSpectralPooling`.
    """

    rank = 1


@_register
class FixedSpectralPooling3D(FixedSpectralPooling):
    """`FixedSpectralPooling` over three axes, of a volume or of a video.

    Args:
        strides: A number >= 1, or three.
        **kwargs: All other arguments of `FixedSpectralPooling`.

    Input shape:
        [batch, depth, height, width, channels], or
        [batch, channels, depth, height, width] with
        `data_format='channels_first'`; floating-point. The depth may be the
        time of a video. Or a list of such tensors, of equal sizes but for the
        channels, pooled alike at less cost.

    Output shape:
        The same with each spatial size N replaced by N / S rounded down to an
        even number, at least 2 and at most N. A stride of 1 changes nothing.

    Raises:
        ValueError: If an argument is out of its range, or if the input is of
            another rank, has a spatial size of 0 or is not floating-point.

    Example:

    >>> layer = FixedSpectralPooling3D(strides=(1.0, 1.6, 3.0))
    >>> tuple(layer(keras.ops.ones((1, 8, 32, 32, 3))).shape)
    (1, 8, 20, 10, 3)

    Reference:
        See `FixedSpectralPooling`.
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
        **kwargs: Of `keras.layers.AveragePooling2D`, but `padding`.

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

    def __init__(self, pool_size=(1, 1), strides=(2, 2), **kwargs):
        strides = validation.standardize_strides(strides, 2)
        validation.require(
            all(stride == int(stride) for stride in strides),
            '`strides` of SpatialPooling must be integers',
            strides=strides,
        )
        super().__init__(
            pool_size,
            strides=tuple(map(int, strides)),
            padding='same',
            **kwargs,
        )

    def _check_input(self, inputs):
        axes = spatial_axes(self.data_format, rank=2)
        validation.check_inputs(self, inputs, axes)

    def call(self, inputs):
        self._check_input(inputs)
        return super().call(inputs)

    def compute_output_spec(self, inputs):
        self._check_input(inputs)
        return super().compute_output_spec(inputs)

    def get_config(self):
        config = super().get_config()
        del config['padding']
        return config


def spatial_axes(data_format, rank):
    """The range of the spatial axes of a batch."""
    first = 2 if data_format == 'channels_first' else 1
    return range(first, first + rank)


def diffstride_layers(model):
    """Returns the DiffStride layers of a model or layer, at any depth.

    In the order in which their containers hold them, which is from input to
    output in Sequential and Functional models.
    """
    layers = [model] if isinstance(model, DiffStride) else []
    for inner in model._layers:
        layers += [x for x in diffstride_layers(inner) if x not in layers]
    return layers


_told = set()  # Warnings of which one in a process is enough.


def _tell_that_sizes_are_constant():
    if 'constant sizes' not in _told:
        _told.add('constant sizes')
        warnings.warn(
            'Output sizes of DiffStride are constants in compiled functions '
            'and stay as they are while the strides learn: add '
            'diffstride.callbacks.RepinStrides() to the callbacks of fit, or '
            'call pin() on the layers to keep the sizes',
            stacklevel=2,
        )


@keras.saving.register_keras_serializable(package='diffstride')
class _StrideLimits(keras.constraints.Constraint):
    """Keeps strides within limits after each step of the optimizer."""

    def __init__(self, lower=1.0, upper=None):
        self.lower = lower
        self.upper = upper

    def __call__(self, strides):
        upper = math.inf if self.upper is None else self.upper
        lower, upper = (
            ops.convert_to_tensor(limit, strides.dtype)
            for limit in (self.lower, upper)
        )
        return ops.clip(strides, lower, upper)

    def get_config(self):
        return {'lower': self.lower, 'upper': self.upper}
