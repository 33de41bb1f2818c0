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

METHODS = ('auto', 'fft', 'matmul')
NORMS = ('forward', 'backward', 'ortho')
RAMPS = ('outside', 'inside')

# method="auto" multiplies by a matrix along axes up to this length: beyond, the
# FFT is faster (benchmarks/methods.py).
LONGEST_MATMUL = 512

# Above what float32 rounds off and below any difference in size that matters:
# the floor or ceiling of a number this near an integer is that integer.
_TOLERANCE = 2.0**-19


def resample(
    inputs, axis, output_size, response=None, norm='forward', method='auto'
):
    """Resamples `inputs` along `axis` through its spectrum.

    Args:
        inputs: Float tensor [..., N, ...].
        axis: The axis of length N, counted from 0.
        output_size: M, its length in the output: below, equal to or above N.
        response: Float tensor [min(M, N) // 2 + 1], the weight of each
            frequency; None for ones.
        norm: 'forward' keeps the mean, 'backward' multiplies it by N / M, as
            numpy.fft does by default, 'ortho' by sqrt(N / M).
        method: 'fft', 'matmul', or 'auto' for the faster of the two.

    Returns:
        Tensor [..., M, ...] of the dtype of `inputs`.
    """
    size = ops.shape(inputs)[axis]
    if response is None and _known(size, output_size) and size == output_size:
        return inputs
    if method == 'auto':
        long = _known(size) and size > LONGEST_MATMUL
        method = 'fft' if long else 'matmul'
    by_method = _resample_by_fft if method == 'fft' else _resample_by_matmul
    return by_method(inputs, axis, output_size, response, norm)


def _resample_by_matmul(inputs, axis, output_size, response, norm):
    shape = ops.shape(inputs)
    dtype = _table_dtype(inputs)
    matrix = resampling_matrix(shape[axis], output_size, response, norm, dtype)
    matrix = ops.cast(matrix, inputs.dtype)
    before, after = shape[:axis], shape[axis + 1 :]
    if after:
        columns = ops.reshape(inputs, (-1, shape[axis], math.prod(after)))
        outputs = ops.matmul(matrix, columns)
    else:
        rows = ops.reshape(inputs, (-1, shape[axis]))
        outputs = ops.matmul(rows, ops.transpose(matrix))
    return ops.reshape(outputs, (*before, output_size, *after))


def _resample_by_fft(inputs, axis, output_size, response, norm):
    size = ops.shape(inputs)[axis]
    dtype = _table_dtype(inputs)
    frequencies, xp = _frequencies(size, output_size)
    # When upsampling, the input's Nyquist coefficient is that of both signs.
    pair = (2 * frequencies == size) & (output_size > size)
    gain = _gain(size, output_size, norm)
    weights = ops.cast(_real(xp.where(pair, 0.5, 1.0)) * gain, dtype)
    if response is not None:
        weights = weights * ops.cast(response, dtype)
    x = ops.cast(ops.moveaxis(inputs, axis, -1), dtype)
    spectrum = ops.rfft(x)
    count = _minimum(size, output_size) // 2 + 1
    real, imag = (part[..., :count] * weights for part in spectrum)
    y = ops.moveaxis(ops.irfft((real, imag), output_size), -1, axis)
    # What is known of the shape is known again after this.
    shape = ops.shape(inputs)
    y = ops.reshape(y, (*shape[:axis], output_size, *shape[axis + 1 :]))
    return ops.cast(y, inputs.dtype)


def resampling_matrix(
    size, output_size, response=None, norm='forward', dtype='float32'
):
    """Returns A, [output_size, size]: an array of NumPy where all is known."""
    if response is None and _known(size, output_size):
        return _constant_matrix(size, output_size, norm)
    synthesis, weights, analysis = (
        ops.cast(table, dtype) for table in _tables(size, output_size, norm)
    )
    if response is not None:
        weights = weights * ops.cast(ops.concatenate([response] * 2), dtype)
    return ops.matmul(synthesis * weights, ops.transpose(analysis))


@functools.lru_cache(maxsize=256)
def _constant_matrix(size, output_size, norm):
    synthesis, weights, analysis = _tables(size, output_size, norm)
    return (synthesis * weights) @ analysis.T


def _tables(size, output_size, norm):
    """Returns B_M [M, 2F], c gain / M [2F] and B_N [N, 2F], for F frequencies.

    A = B_M diag(c r gain / M) B_N^T, as cos(a - b) = cos a cos b + sin a sin b.
    """
    frequencies, xp = _frequencies(size, output_size)
    single = (frequencies == 0) | (
        2 * frequencies == _minimum(size, output_size)
    )
    scale = _gain(size, output_size, norm) / _real(output_size)
    weights = _real(xp.where(single, 1.0, 2.0)) * scale
    return (
        _basis(frequencies, output_size),
        xp.concatenate([weights, weights]),
        _basis(frequencies, size),
    )


def _basis(frequencies, size):
    """cos and sin of 2 pi f p / size, [size, 2F], of exactly reduced phases."""
    xp = np if isinstance(frequencies, np.ndarray) else ops
    positions = xp.arange(size, dtype='int32')[:, None]
    phases = (positions * frequencies) % size
    angles = _real(phases) * (2 * math.pi / _real(size))
    return xp.concatenate([xp.cos(angles), xp.sin(angles)], axis=1)


def _frequencies(size, output_size):
    """Returns f = 0 .. min(M, N) // 2, [F], and the module that holds it."""
    xp = np if _known(size, output_size) else ops
    count = _minimum(size, output_size) // 2 + 1
    return xp.arange(count, dtype='int32'), xp


def _gain(size, output_size, norm):
    if norm == 'backward':
        return 1.0
    gain = _real(output_size) / _real(size)
    return gain**0.5 if norm == 'ortho' else gain


def band_edge(size, stride):
    """b = N / (2 S), the highest frequency kept, in cycles per signal."""
    return _real(size) / (2.0 * stride)


def diffstride_response(size, output_size, stride, smoothness, ramp='outside'):
    """The response m(f) of DiffStride (Riad et al., Eq. 3), [M // 2 + 1].

    Its gradient reaches the stride; at a kink it is the mean of the slopes on
    both sides, as a central difference has it.

    Args:
        size: N.
        output_size: M.
        stride: S, a float32 scalar tensor, clipped by `clip_stride`.
        smoothness: R > 0, the width of the ramp, in frequencies.
        ramp: 'outside' of the band, falling from 1 at b to 0 at b + R, or
            'inside', from 1 at b - min(R, b) to 0 at b.
    """
    band = band_edge(size, stride)
    frequencies = ops.arange(output_size // 2 + 1, dtype='int32')
    distance = band - ops.cast(frequencies, 'float32')
    tolerance = _TOLERANCE * (band + smoothness)
    if ramp == 'outside':
        level, width = (smoothness + distance) / smoothness, smoothness
    else:
        width = _with_gradient_of(
            _step(smoothness - band, tolerance) * band,
            ops.minimum(smoothness, band),
        )
        level = distance / width
    tolerance = tolerance / width
    slope = _step(level, tolerance) - _step(level - 1, tolerance)
    response = _with_gradient_of(slope * level, ops.clip(level, 0, 1))
    return ops.where(frequencies > 0, response, 1.0)


def _step(x, tolerance):
    """0 below zero, 1 above, 1/2 at zero; a constant in the gradient."""
    sign = ops.sign(ops.where(ops.abs(x) <= tolerance, 0.0, x))
    return ops.stop_gradient((sign + 1) / 2)


def diffstride_size(size, stride, smoothness, ramp='outside'):
    """The even size M that holds all of DiffStride's response, at most N.

    An integer if size and stride are numbers, else an int32 scalar tensor.
    """
    edge = band_edge(size, stride) + (smoothness if ramp == 'outside' else 0.0)
    if _known(size, stride):
        return min(size, 2 * math.ceil(edge * (1 - _TOLERANCE)))
    half = ops.cast(ops.ceil(edge * (1 - _TOLERANCE)), 'int32')
    return ops.minimum(size, 2 * half)


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
            part of the ramp lies within the spectrum; with 'inside', 1. S is at
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
    return clipped if _known(stride) else _with_gradient_of(stride, clipped)


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


def _with_gradient_of(surrogate, value):
    """`value`, through which gradients flow as if it were `surrogate`."""
    return ops.stop_gradient(value) + (surrogate - ops.stop_gradient(surrogate))


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


def _table_dtype(inputs):
    wide = keras.backend.standardize_dtype(inputs.dtype) == 'float64'
    return 'float64' if wide else 'float32'
