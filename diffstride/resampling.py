"""Spectral resampling along one axis.

For a real signal x of length N, an output length M and a response r(f) over the
frequencies f = 0 .. min(M, N) // 2 (in cycles per signal), the operator is

    y = gain * irfft(r * rfft(x)[:M // 2 + 1], n=M)
      = A x,  A[p, n] = gain / M * sum_f c_f r(f) cos(2 pi f (p / M - n / N)),

with c_f = 1 where 2 f is 0 or min(M, N), and c_f = 2 elsewhere, where f stands
for a pair of complex exponentials. Both forms are here: by FFT and by matrix.

A size is a Python integer where it is known and an int32 scalar tensor where it
is not. Tables that depend on numbers alone are computed by NumPy in float64.

References: Riad et al., "Learning strides in convolutional neural networks",
ICLR 2022, arXiv:2202.01653; Rippel et al., "Spectral representations for
convolutional neural networks", NeurIPS 2015, arXiv:1506.03767.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from diffstride import backend
from diffstride.backend import known, maximum, minimum, real

METHODS = ('auto', 'fft', 'matmul')
NORMS = ('forward', 'backward', 'ortho')

# A number this near an integer counts as that integer, where it is rounded up
# or down. The tolerance is above the rounding errors of float32 and below any
# difference in size that matters.
TOLERANCE = 2.0**-19

# A matrix with more values is slower than the FFT.
_MOST_OF_A_MATRIX = 300_000


class Response(NamedTuple):
    """The weights of the frequencies of an axis, some of which may vary.

    Attributes:
        weights: Tensor or NumPy array [min(M, N) // 2 + 1]; None for ones.
            Their gradient is not used.
        gradient_frequencies: int32 tensor [count], the frequencies whose
            weights receive a gradient; None for none. Fewer are faster.
        gradient_weights: Tensor [count], the weights at these frequencies as a
            function of learned variables; only their gradient is used.
    """

    weights: Any = None
    gradient_frequencies: Any = None
    gradient_weights: Any = None


def resample(
    inputs: Sequence,
    axis: int,
    output_size: Any,
    norm: str = 'forward',
    method: str = 'auto',
    response: Response | None = None,
) -> list:
    """Resamples tensors along `axis` through their spectra, by one operator.

    Args:
        inputs: A list of float tensors [..., N, ...] of one N and one dtype.
        axis: The axis of length N, counted from 0.
        output_size: M, its length in the output: below, equal to or above N.
        norm: 'forward' keeps the mean, 'backward' multiplies it by N / M, as
            numpy.fft does by default, 'ortho' by sqrt(N / M).
        method: 'fft', 'matmul', or 'auto' for the one that should be faster.
        response: The weights of the frequencies; None for ones. An axis that
            keeps its size without a response is left as it is.

    Returns:
        A list of tensors [..., M, ...] of the dtype of the inputs.
    """
    size = backend.shape_of(inputs[0])[axis]
    if response is None:
        if known(size, output_size) and size == output_size:
            return list(inputs)
        response = Response()
    dtype = _table_dtype(inputs[0])
    weights = response.weights
    if weights is not None and not isinstance(weights, np.ndarray):
        weights = ops.stop_gradient(weights)  # Others have the gradient.
    if method == 'auto':
        shape = backend.shape_of(inputs[0])
        method = _fastest_method(shape, axis, output_size)
    operators = _operators(method, size, output_size, weights, norm, dtype)
    if response.gradient_frequencies is None:
        if isinstance(method, str) and method == 'matmul':
            # Automatic differentiation already yields the adjoint here.
            return [operators[0](x, axis) for x in inputs]
        return [_apply(x, axis, operators) for x in inputs]
    # The roots keep the spectra of long axes within the range of float16.
    roots = [real(size) ** 0.5, real(output_size) ** 0.5]
    scales = _scales(response.gradient_frequencies, size, output_size, norm)
    scales = _cast(scales * roots[0] * roots[1], dtype)
    scaled_weights = ops.cast(response.gradient_weights, dtype) * scales
    bases = [
        _cast(_basis(response.gradient_frequencies, length) / root, dtype)
        for length, root in zip((size, output_size), roots)
    ]
    # The gradient needs either the input or its spectrum on the ramp, which has
    # two rows per frequency. On a short axis the input costs less time.
    count = ops.shape(response.gradient_frequencies)[0]
    keeps_input = known(size, count) and size < 4 * count
    return [
        _apply(x, axis, operators, bases, keeps_input, scaled_weights)
        for x in inputs
    ]


def _operators(method, *arguments):
    """Returns the operator and its adjoint, functions of (tensor, axis).

    Args:
        method: 'fft', 'matmul', or a boolean tensor that is true for 'matmul'.
        *arguments: The sizes, weights, norm and dtype of the tables.
    """
    if isinstance(method, str):
        make = _by_matrix if method == 'matmul' else _by_fft
        return make(*arguments)

    # The tables are made within the branches: a matrix grows with the square of
    # the size and must not be made where the FFT is chosen.
    def chosen(index, inputs, axis):
        return ops.cond(
            method,
            lambda: _by_matrix(*arguments)[index](inputs, axis),
            lambda: _by_fft(*arguments)[index](inputs, axis),
        )

    return functools.partial(chosen, 0), functools.partial(chosen, 1)


def _fastest_method(shape, axis, output_size):
    """Returns the method that should take less time.

    It is 'matmul' or 'fft' where the known sizes decide, else a boolean tensor
    that is true for 'matmul'.

    A matrix takes M N multiplications per line, and more time for each where it
    multiplies few columns. The FFT takes max(M, N) times a logarithm, which
    hardly varies. So the smaller size decides. The two constants are fitted to
    measurements on a CPU, as benchmarks/pooling.py makes them, with 3 to 64
    channels and 224 to 1024 pixels. A learned stride makes the matrix anew at
    each step, so a large one is slow whatever the smaller size.
    """
    sizes, columns = (shape[axis], output_size), shape[axis + 1 :]
    waste = 1 + 12 / maximum(real(math.prod(columns)), 1.0) if columns else 1.0
    limit = 480 / waste
    is_small = real(sizes[0]) * real(sizes[1]) <= _MOST_OF_A_MATRIX
    is_below = real(minimum(*sizes)) < limit
    if known(limit, *sizes):
        return 'matmul' if is_below and is_small else 'fft'
    if known(limit) and any(known(size) and size < limit for size in sizes):
        return 'matmul'
    return ops.logical_and(is_below, is_small)


def _apply(inputs, axis, operators, bases=(), keeps_input=False, *weights):
    """Applies an operator along `axis`, with a custom gradient.

    The adjoint operator gives the gradient of the inputs. The gradient of the
    weight of a frequency is the inner product of the spectra of the input and
    of the output's gradient at this frequency.

    Args:
        inputs: Tensor [..., N, ...].
        axis: The axis of length N.
        operators: The operator and its adjoint, functions of (tensor, axis).
        bases: The matrices [2 count, N] and [2 count, M] that give the spectra
            of an input and of an output at the frequencies whose weights
            receive a gradient.
        keeps_input: Whether the input is kept for the gradient. Otherwise its
            spectrum at these frequencies is.
        *weights: Nothing, or the weights of these frequencies, [count].
    """

    def function(tables, inputs, *weights):
        operators, bases = tables
        kept = inputs
        if weights and not keeps_input:
            kept = multiply(inputs, axis, bases[0])
        return operators[0](inputs, axis), kept if weights else None

    def gradients(tables, kept, weights, upstream):
        operators, bases = tables
        # By this recursion second derivatives exist.
        of_inputs = _apply(
            upstream, axis, operators[::-1], bases[::-1], keeps_input, *weights
        )
        if not weights:
            return (of_inputs,)
        if keeps_input:
            spectra = backend.matmul(bases[0], _outer(kept, upstream, axis))
            per_weight = ops.sum(spectra * bases[1], axis=1)
        else:
            # The diagonal of a matrix product is faster than sum(a * b).
            spectrum = multiply(upstream, axis, bases[1])
            per_weight = ops.diagonal(_outer(kept, spectrum, axis))
        real_parts, imaginary_parts = ops.split(per_weight, 2)
        return of_inputs, real_parts + imaginary_parts

    apply = backend.custom_gradient(function, gradients, (operators, bases))
    return apply(inputs, *weights)


def _outer(a, b, axis):
    """Returns the products of a and b, summed over all axes but one, [n, m].

    Args:
        a: Tensor [..., n, ...].
        b: Tensor [..., m, ...].
        axis: The axis of lengths n and m.
    """
    dtype, after = _table_dtype(a), ops.shape(a)[axis + 1 :]
    rows = (math.prod(after),) if after else ()
    a, b = (
        ops.reshape(ops.cast(x, dtype), (-1, ops.shape(x)[axis], *rows))
        for x in (a, b)
    )
    if not after:
        return backend.matmul(ops.transpose(a), b)
    return ops.sum(backend.matmul(a, ops.transpose(b, (0, 2, 1))), axis=0)


def _by_matrix(size, output_size, weights, norm, dtype):
    """Returns the product with the matrix, and with its transpose."""
    matrix = resampling_matrix(size, output_size, weights, norm, dtype)
    return (
        backend.partial(multiply, matrix=matrix),
        backend.partial(multiply, matrix=_transpose(matrix)),
    )


def multiply(inputs: Any, axis: int, matrix: Any) -> Any:
    """Multiplies an axis by a matrix [M, N]: [..., N, ...] -> [..., M, ...]."""
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
    unknown = [i for i, size in enumerate(new_shape) if not known(size)]
    if len(unknown) == 1:  # A graph need not compute this size.
        new_shape[unknown[0]] = -1
    return ops.reshape(outputs, new_shape)


def _by_fft(size, output_size, weights, norm, dtype):
    """Returns the filter by FFT from N to M samples, and its adjoint."""
    frequencies, xp = _frequencies(size, output_size)
    scales = _scales(frequencies, size, output_size, norm)

    def filter_to(length):
        single = (frequencies == 0) | (2 * frequencies == length)
        # The inverse FFT counts pairs twice and divides by the length.
        factors = scales * real(xp.where(single, 1.0, 0.5)) * real(length)
        if weights is not None:
            factors = _cast(factors, dtype) * _cast(weights, dtype)
        return backend.partial(
            _filter, output_size=length, factors=factors, dtype=dtype
        )

    return filter_to(output_size), filter_to(size)


def _filter(inputs, axis, output_size, factors, dtype):
    """Scales the first frequencies of an axis, which gets a new length."""
    factors = _cast(factors, dtype)
    x = ops.cast(ops.moveaxis(inputs, axis, -1), dtype)
    y = ops.moveaxis(backend.filter_spectrum(x, factors, output_size), -1, axis)
    # The FFT loses the static shape, which this restores.
    shape = ops.shape(inputs)
    y = ops.reshape(y, (*shape[:axis], output_size, *shape[axis + 1 :]))
    return ops.cast(y, inputs.dtype)


def resampling_matrix(
    size: Any,
    output_size: Any,
    weights: Any = None,
    norm: str = 'forward',
    dtype: str = 'float32',
) -> Any:
    """Returns A, [output_size, size], a NumPy array if all values are known."""
    if known(size, output_size) and (
        weights is None or isinstance(weights, np.ndarray)
    ):
        weights = None if weights is None else tuple(weights.tolist())
        return _constant_matrix(size, output_size, norm, weights)
    frequencies, _ = _frequencies(size, output_size)
    factors = _cast(_scales(frequencies, size, output_size, norm), dtype)
    if weights is not None:
        factors = factors * ops.cast(weights, dtype)
    synthesis, analysis = (
        _cast(_basis(frequencies, length), dtype)
        for length in (output_size, size)
    )
    factors = ops.concatenate([factors, factors])
    return backend.matmul(ops.transpose(synthesis) * factors, analysis)


@functools.lru_cache(maxsize=64)
def _constant_matrix(size, output_size, norm, weights):
    frequencies, _ = _frequencies(size, output_size)
    factors = _scales(frequencies, size, output_size, norm)
    if weights is not None:
        factors = factors * np.array(weights)
    factors = np.tile(factors, 2)
    synthesis = _basis(frequencies, output_size).T
    return (synthesis * factors) @ _basis(frequencies, size)


def _basis(frequencies, size):
    """Returns cos and sin of 2 pi f p / size, [2 F, size], from exact phases.

    Raises:
        ValueError: If the size is above 2^20, where int32 does not hold them.
    """
    if known(size) and size > 2**20:
        raise ValueError(
            'The size of an axis must be at most 2^20 with a learned stride '
            f"or `method='matmul'`. Received: size={size}"
        )
    xp = np if isinstance(frequencies, np.ndarray) else ops
    f, p = frequencies[:, None], xp.arange(size, dtype='int32')
    if known(size) and size < 2**16:
        phases = f * p % size
    else:  # The product may exceed int32, and is reduced in two steps.
        phases = (f * (p // 1024) % size * 1024 + f * (p % 1024)) % size
    angles = real(phases) * (2 * math.pi / real(size))
    return xp.concatenate([xp.cos(angles), xp.sin(angles)])


def _frequencies(size, output_size):
    """Returns f = 0 .. min(M, N) // 2, [F], and its module: NumPy or Keras."""
    xp = np if known(size, output_size) else ops
    count = minimum(size, output_size) // 2 + 1
    return xp.arange(count, dtype='int32'), xp


def _scales(frequencies, size, output_size, norm):
    """Returns c_f gain / M, the factors of A, for each frequency."""
    xp = np if isinstance(frequencies, np.ndarray) else ops
    single = (frequencies == 0) | (
        2 * frequencies == minimum(size, output_size)
    )
    scale = _gain(size, output_size, norm) / real(output_size)
    return real(xp.where(single, 1.0, 2.0)) * scale


def _gain(size, output_size, norm):
    if norm == 'backward':
        return 1.0
    gain = real(output_size) / real(size)
    return gain**0.5 if norm == 'ortho' else gain


def _transpose(matrix):
    return matrix.T if isinstance(matrix, np.ndarray) else ops.transpose(matrix)


def _cast(table, dtype):
    """Returns a table as a tensor; a float64 array is rounded only once."""
    if isinstance(table, np.ndarray):
        return ops.convert_to_tensor(table, dtype)
    return ops.cast(table, dtype)


def _table_dtype(inputs):
    wide = keras.backend.standardize_dtype(inputs.dtype) == 'float64'
    return 'float64' if wide else 'float32'
