"""Spectral resampling along one axis, and the responses of the pooling layers.

For a real signal x of length N, an output length M and a response r(f) over the
frequencies f = 0 .. min(M, N) // 2 (in cycles per signal), the operator is

    y = gain * irfft(r * rfft(x)[:M // 2 + 1], n=M)
      = A x,  A[p, n] = gain / M * sum_f c_f r(f) cos(2 pi f (p / M - n / N)),

with c_f = 1 where 2 f is 0 or min(M, N), and c_f = 2 elsewhere, where f stands
for a pair of complex exponentials. Both forms are here: by FFT and by matrix.

A size is a Python integer where it is known and an int32 scalar tensor where it
is not. What depends on numbers alone is computed once, by NumPy in float64.

References: Riad et al., "Learning strides in convolutional neural networks",
ICLR 2022, arXiv:2202.01653; Rippel et al., "Spectral representations for
convolutional neural networks", NeurIPS 2015, arXiv:1506.03767.
"""

import functools
import math
import numbers

import keras
import numpy as np
from keras import ops

from diffstride import backend

METHODS = ('auto', 'fft', 'matmul')
NORMS = ('forward', 'backward', 'ortho')
RAMPS = ('outside', 'inside', 'straight_through')

# Above what float32 rounds off and below any difference in size that matters:
# the floor or ceiling of a number this near an integer is that integer.
_TOLERANCE = 2.0**-19


def resample(
    inputs,
    axis,
    output_size,
    norm='forward',
    method='auto',
    response=None,
    varying=None,
):
    """Resamples tensors along `axis` through their spectra, by one operator.

    Args:
        inputs: A list of float tensors [..., N, ...] of one N and one dtype.
        axis: The axis of length N, counted from 0.
        output_size: M, its length in the output: below, equal to or above N.
        norm: 'forward' keeps the mean, 'backward' multiplies it by N / M, as
            numpy.fft does by default, 'ortho' by sqrt(N / M).
        method: 'fft', 'matmul', or 'auto' for that of `fastest_method`.
        response: Float tensor or array of NumPy [min(M, N) // 2 + 1], the
            weight of each frequency; None for ones.
        varying: Frequencies and their response, int32 and float [count]: those
            to which a gradient goes, the others being constant; None for all of
            `response`, () for none. The fewer, the faster. The gradient is
            taken at `response`, which need not have the same values there.

    Returns:
        A list of tensors [..., M, ...] of the dtype of the inputs.
    """
    size = backend.shape_of(inputs[0])[axis]
    is_identity = _known(size, output_size) and size == output_size
    if is_identity and response is None and not varying:
        return inputs
    if method == 'auto':
        method = fastest_method(inputs[0].shape, axis, output_size)
    dtype = _table_dtype(inputs[0])
    constant = response
    if response is not None and not isinstance(response, np.ndarray):
        constant = ops.stop_gradient(response)
    is_constant = varying == () or (varying is None and response is None)
    if method == 'fft':
        operators = _filters(size, output_size, constant, norm, dtype)
    else:
        matrix = resampling_matrix(size, output_size, constant, norm, dtype)
        if is_constant:  # What is derived from the code is the adjoint, too.
            return [_multiply(x, axis, matrix) for x in inputs]
        operators = _products(matrix)
    if is_constant:
        return [_apply(x, axis, operators) for x in inputs]
    if varying is None:
        frequencies = ops.arange(ops.shape(response)[0], dtype='int32')
        varying = frequencies, response
    frequencies, response = varying
    scales = _scales(frequencies, size, output_size, norm)
    weights = ops.cast(response, dtype) * _cast(scales, dtype)
    bases = [
        _cast(_basis(frequencies, length), dtype)
        for length in (size, output_size)
    ]
    # Of a short axis, some rows of the spectrum are no less than the input.
    count = ops.shape(frequencies)[0]
    keeps_input = _known(size, count) and size < 4 * count
    return [
        _apply(x, axis, operators, bases, keeps_input, weights) for x in inputs
    ]


def fastest_method(shape, axis, output_size):
    """The method of least time by a model of it, 'matmul' where sizes vary.

    A matrix takes time in proportion to M for each input, and more where it
    multiplies few columns; the FFT in proportion to the logarithm of N, which
    hardly varies. Where M > N it is the other way round, the adjoint's. The two
    constants are fitted to measurements on a CPU, as benchmarks/pooling.py
    makes them, of 3 to 64 channels and 224 to 1024 pixels.
    """
    columns = shape[axis + 1 :]
    if not _known(shape[axis], output_size, *columns):
        return 'matmul'
    waste = 1 + 12 / math.prod(columns) if columns else 1
    return 'matmul' if min(shape[axis], output_size) * waste < 480 else 'fft'


def _apply(inputs, axis, operators, bases=(), keeps_input=False, *weights):
    """An operator along `axis`, with the gradient that its structure gives.

    The gradient of the inputs is the adjoint operator's. That of the weight of
    a frequency is the inner product of the spectra of the input and of the
    output's gradient there.

    Args:
        inputs: Tensor [..., N, ...].
        axis: Of length N.
        operators: The operator and its adjoint, functions of (tensor, axis).
        bases: Of an input's and an output's spectrum at the frequencies whose
            weights receive a gradient, [2 count, N] and [2 count, M].
        keeps_input: Whether the input is kept for it, or its spectrum there.
        *weights: None, or one tensor [count].
    """

    def function(inputs, *weights):
        kept = inputs
        if weights and not keeps_input:
            kept = _multiply(inputs, axis, bases[0])
        return operators[0](inputs, axis), kept if weights else None

    def gradients(kept, weights, upstream):
        # Not operators[1] alone: this has a gradient in turn.
        of_inputs = _apply(
            upstream, axis, operators[::-1], bases[::-1], keeps_input, *weights
        )
        if not weights:
            return (of_inputs,)
        if keeps_input:
            spectra = backend.matmul(bases[0], _outer(kept, upstream, axis))
            products = ops.sum(spectra * bases[1], axis=1)
        else:
            # The diagonal of a product of matrices: faster than sum(a * b).
            spectrum = _multiply(upstream, axis, bases[1])
            products = ops.diagonal(_outer(kept, spectrum, axis))
        cosine, sine = ops.split(products, 2)
        return of_inputs, cosine + sine

    return backend.custom_gradient(function, gradients)(inputs, *weights)


def _outer(a, b, axis):
    """[..., n, ...] and [..., m, ...] -> [n, m], sums over all other axes."""
    dtype, after = _table_dtype(a), ops.shape(a)[axis + 1 :]
    rows = (math.prod(after),) if after else ()
    a, b = (
        ops.reshape(ops.cast(x, dtype), (-1, ops.shape(x)[axis], *rows))
        for x in (a, b)
    )
    if not after:
        return backend.matmul(ops.transpose(a), b)
    return ops.sum(backend.matmul(a, ops.transpose(b, (0, 2, 1))), axis=0)


def _products(matrix):
    """The product with a matrix, and with its transpose."""
    return (
        functools.partial(_multiply, matrix=matrix),
        functools.partial(_multiply, matrix=_transpose(matrix)),
    )


def _multiply(inputs, axis, matrix):
    """[..., N, ...] -> [..., M, ...] by a matrix [M, N]."""
    output_size = ops.shape(matrix)[0]
    shape = backend.shape_of(inputs)
    before, after = shape[:axis], shape[axis + 1 :]
    if not after:
        matrix = _transpose(matrix)
    matrix = _cast(matrix, inputs.dtype)
    if after:
        columns = ops.reshape(inputs, (-1, shape[axis], math.prod(after)))
        outputs = backend.matmul(matrix, columns)
    else:
        rows = ops.reshape(inputs, (-1, shape[axis]))
        outputs = backend.matmul(rows, matrix)
    new_shape = [*before, output_size, *after]
    unknown = [i for i, size in enumerate(new_shape) if not _known(size)]
    if len(unknown) == 1:  # So that nothing is computed in a graph for it.
        new_shape[unknown[0]] = -1
    return ops.reshape(outputs, new_shape)


def _filters(size, output_size, response, norm, dtype):
    """The filter by FFT from N to M samples, and its adjoint."""
    frequencies, xp = _frequencies(size, output_size)
    scales = _scales(frequencies, size, output_size, norm)

    def filter_to(length):
        single = (frequencies == 0) | (2 * frequencies == length)
        # The inverse FFT counts pairs twice and divides by the length.
        weights = scales * _real(xp.where(single, 1.0, 0.5)) * _real(length)
        if response is not None:
            weights = _cast(weights, dtype) * _cast(response, dtype)
        return functools.partial(
            _filter, output_size=length, weights=weights, dtype=dtype
        )

    return filter_to(output_size), filter_to(size)


def _filter(inputs, axis, output_size, weights, dtype):
    """[..., N, ...] -> [..., M, ...], by weights of the first frequencies."""
    weights = _cast(weights, dtype)
    x = ops.cast(ops.moveaxis(inputs, axis, -1), dtype)
    y = ops.moveaxis(backend.filter_spectrum(x, weights, output_size), -1, axis)
    # What is known of the shape is known again after this.
    shape = ops.shape(inputs)
    y = ops.reshape(y, (*shape[:axis], output_size, *shape[axis + 1 :]))
    return ops.cast(y, inputs.dtype)


def resampling_matrix(
    size, output_size, response=None, norm='forward', dtype='float32'
):
    """Returns A, [output_size, size]: an array of NumPy where all is known."""
    if _known(size, output_size) and (
        response is None or isinstance(response, np.ndarray)
    ):
        weights = None if response is None else tuple(response.tolist())
        return _constant_matrix(size, output_size, norm, weights)
    frequencies, _ = _frequencies(size, output_size)
    weights = _cast(_scales(frequencies, size, output_size, norm), dtype)
    if response is not None:
        weights = weights * ops.cast(response, dtype)
    synthesis, analysis = (
        _cast(_basis(frequencies, length), dtype)
        for length in (output_size, size)
    )
    weights = ops.concatenate([weights, weights])
    return backend.matmul(ops.transpose(synthesis) * weights, analysis)


@functools.lru_cache(maxsize=64)
def _constant_matrix(size, output_size, norm, response):
    frequencies, _ = _frequencies(size, output_size)
    weights = _scales(frequencies, size, output_size, norm)
    if response is not None:
        weights = weights * np.array(response)
    weights = np.tile(weights, 2)
    synthesis = _basis(frequencies, output_size).T
    return (synthesis * weights) @ _basis(frequencies, size)


def _basis(frequencies, size):
    """cos and sin of 2 pi f p / size, [2F, size], of exactly reduced phases.

    Raises:
        ValueError: If the size is above 2^20, where int32 does not hold them.
    """
    if _known(size) and size > 2**20:
        raise ValueError(
            'The size of an axis must be at most 2^20 for its stride to have '
            f'a gradient. Received: size={size}'
        )
    xp = np if isinstance(frequencies, np.ndarray) else ops
    f, p = frequencies[:, None], xp.arange(size, dtype='int32')
    if _known(size) and size < 2**16:
        phases = f * p % size
    else:  # The product may exceed int32, and is reduced in two steps.
        phases = (f * (p // 1024) % size * 1024 + f * (p % 1024)) % size
    angles = _real(phases) * (2 * math.pi / _real(size))
    return xp.concatenate([xp.cos(angles), xp.sin(angles)])


def _frequencies(size, output_size):
    """Returns f = 0 .. min(M, N) // 2, [F], and the module that holds it."""
    xp = np if _known(size, output_size) else ops
    count = _minimum(size, output_size) // 2 + 1
    return xp.arange(count, dtype='int32'), xp


def _scales(frequencies, size, output_size, norm):
    """c_f gain / M, where f is one or a pair of complex exponentials."""
    xp = np if isinstance(frequencies, np.ndarray) else ops
    single = (frequencies == 0) | (
        2 * frequencies == _minimum(size, output_size)
    )
    scale = _gain(size, output_size, norm) / _real(output_size)
    return _real(xp.where(single, 1.0, 2.0)) * scale


def _gain(size, output_size, norm):
    if norm == 'backward':
        return 1.0
    gain = _real(output_size) / _real(size)
    return gain**0.5 if norm == 'ortho' else gain


def _transpose(matrix):
    return matrix.T if isinstance(matrix, np.ndarray) else ops.transpose(matrix)


def band_edge(size, stride):
    """b = N / (2 S), the highest frequency kept, in cycles per signal."""
    return _real(size) / (2.0 * stride)


def diffstride_response(
    size, output_size, stride, smoothness, ramp='outside', frequencies=None
):
    """The response m(f) of DiffStride (Riad et al., Eq. 3), [count].

    Its gradient reaches the stride; at a kink it is the mean of the slopes on
    both sides, as a central difference has it.

    Args:
        size: N.
        output_size: M.
        stride: S, a float32 scalar tensor, clipped by `clip_stride`. If it is
            a number, as both sizes are, the response is float64, of NumPy.
        smoothness: R > 0, the width of the ramp, in frequencies.
        ramp: 'outside' of the band, falling from 1 at b to 0 at b + R; or
            'inside' and 'straight_through', from 1 at b - min(R, b) to 0 at b.
        frequencies: int32 [count]; None for 0 .. M // 2.
    """
    if frequencies is None:
        if _known(size, output_size, stride):
            return _constant_response(
                size, output_size, stride, smoothness, ramp
            )
        frequencies = ops.arange(output_size // 2 + 1, dtype='int32')
    band = band_edge(size, stride)
    edge = ops.stop_gradient(band)
    distance = edge - ops.cast(frequencies, 'float32')
    tolerance = _TOLERANCE * (edge + smoothness)
    if ramp == 'outside':
        width, level = smoothness, distance / smoothness + 1
        slope = 1 / smoothness
    else:
        width = ops.minimum(smoothness, edge)
        level = distance / width
        # Where the ramp is as wide as the band, it widens with the band.
        slope = (1 - level * _step(smoothness - edge, tolerance)) / width
    tolerance = tolerance / width
    slope *= _step(level, tolerance) - _step(level - 1, tolerance)
    response = ops.clip(level, 0, 1) + slope * (band - edge)
    return ops.where(frequencies > 0, response, 1.0)


@functools.lru_cache(maxsize=256)
def _constant_response(size, output_size, stride, smoothness, ramp):
    edge = band_edge(size, stride)
    width = smoothness if ramp == 'outside' else min(smoothness, edge)
    end = edge + (smoothness if ramp == 'outside' else 0.0)
    frequencies = np.arange(output_size // 2 + 1)
    response = np.clip((end - frequencies) / width, 0.0, 1.0)
    response[0] = 1.0
    response.flags.writeable = False  # All callers share it.
    return response


def _step(x, tolerance):
    """0 below zero, 1 above, 1/2 at zero."""
    above, not_below = x > tolerance, x > -tolerance
    return (ops.cast(above, x.dtype) + ops.cast(not_below, x.dtype)) / 2


def ramp_frequencies(size, output_size, stride, smoothness, ramp='outside'):
    """The frequencies, of 0 .. M // 2, where the response varies with S.

    They are those on the ramp, its two corners included, or few more: int32
    [count], count being an integer where M or N is.
    """
    edge = band_edge(size, ops.stop_gradient(stride))
    if ramp != 'outside':
        edge = edge - ops.minimum(smoothness, edge)
    first = ops.ceil(edge - _TOLERANCE * (edge + smoothness))
    count = math.floor(smoothness + 0.01) + 1
    highest = output_size // 2
    count = _minimum(count, (size if _known(size) else output_size) // 2 + 1)
    first = ops.minimum(ops.cast(first, 'int32'), highest + 1 - count)
    return first + ops.arange(count, dtype='int32')


def diffstride_size(size, stride, smoothness, ramp='outside'):
    """The even size M that holds all of DiffStride's response, at most N.

    An integer if size and stride are numbers, else an int32 scalar tensor.
    """
    edge = band_edge(size, stride) + (smoothness if ramp == 'outside' else 0.0)
    # What is not a number gets the least size, and fills it with its like.
    if _known(size, stride):
        half = edge * (1 - _TOLERANCE)
        return min(size, 2 * (1 if math.isnan(half) else math.ceil(half)))
    half = ops.cast(ops.ceil(edge * (1 - _TOLERANCE)), 'int32')
    return ops.minimum(size, 2 * ops.maximum(1, half))


def clip_stride(
    stride, size, smoothness, ramp='outside', lower=None, upper=None
):
    """Clips a stride to what the size allows, then to the user's limits.

    The gradient is straight-through, so that a stride outside can come back.

    Args:
        stride: S, a number or a float32 scalar tensor.
        size: N.
        smoothness: R.
        ramp: With 'outside', S is at least N / (N - min(R, N / 2)), so that a
            part of the ramp lies within the spectrum; else 1. S is at
            most N / 2: a band of one frequency stays.
        lower: The user's lower limit or None.
        upper: The user's upper limit or None.
    """
    length = _real(size)
    least = 1.0
    if ramp == 'outside':
        least = length / (length - _minimum(smoothness, length / 2))
    clipped = _minimum(_maximum(stride, least), _maximum(least, length / 2))
    if lower is not None:
        clipped = _maximum(clipped, lower)
    if upper is not None:
        clipped = _minimum(clipped, upper)
    return clipped if _known(stride) else with_gradient_of(stride, clipped)


def fixed_size(size, stride):
    """Size of spectral pooling: N at stride 1, else N / S down to even, >= 2.

    An integer if the size is one, else an int32 scalar tensor.
    """
    if stride == 1:
        return size
    half = _real(size) / (2 * stride) * (1 + _TOLERANCE)
    if _known(size):
        return min(size, max(2, 2 * math.floor(half)))
    return ops.minimum(
        size, ops.maximum(2, 2 * ops.cast(ops.floor(half), 'int32'))
    )


def with_gradient_of(surrogate, value):
    """`value`, through which gradients flow as if it were `surrogate`."""
    return ops.stop_gradient(value) + (surrogate - ops.stop_gradient(surrogate))


def with_finite_gradient(x):
    """`x`, whose gradient is 0 where it would be infinite or not a number."""

    def gradients(kept, others, upstream):
        return (ops.where(ops.isfinite(upstream), upstream, 0.0),)

    return backend.custom_gradient(lambda x: (1.0 * x, None), gradients)(x)


def _known(*values):
    return all(isinstance(value, numbers.Real) for value in values)


def _minimum(a, b):
    return min(a, b) if _known(a, b) else ops.minimum(a, b)


def _maximum(a, b):
    return max(a, b) if _known(a, b) else ops.maximum(a, b)


def _real(value):
    """A number or array as float64; a tensor as float32, whatever floatx."""
    if isinstance(value, (numbers.Real, np.ndarray)):
        return value * 1.0
    return ops.cast(value, 'float32')


def _cast(table, dtype):
    """A tensor of a table; not through float32 if it is an array of NumPy."""
    if isinstance(table, np.ndarray):
        return ops.convert_to_tensor(table, dtype)
    return ops.cast(table, dtype)


def _table_dtype(inputs):
    wide = keras.backend.standardize_dtype(inputs.dtype) == 'float64'
    return 'float64' if wide else 'float32'
