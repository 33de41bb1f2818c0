"""The resampling operator, against the reference and by its formula."""

from unittest import mock

import keras
import numpy as np
import pytest
import reference
from backends import (
    COMPILERS,
    USUAL,
    array,
    central_differences,
    error_of,
    gradients,
    image,
    of_any_image,
    of_unknown_sizes,
    only,
    random,
)
from keras import ops

from diffstride import DiffStride1D, FixedSpectralPooling1D, resampling
from diffstride.resampling import METHODS, Response


def resample(x, axis, size, response=None, method='auto'):
    """Resamples one tensor."""
    (y,) = resampling.resample([x], axis, size, 'forward', method, response)
    return y


@pytest.mark.parametrize(
    'method, size, output_size',
    [('fft', 4095, 2050), ('matmul', 4096, 600), ('auto', 4096, 1241)],
)
def test_long_axes_are_accurate(method, size, output_size):
    x = random(2, size)
    weights = np.linspace(1, 0.1, output_size // 2 + 1).astype('float32')
    response = Response(ops.convert_to_tensor(weights))
    y = resample(ops.convert_to_tensor(x), 1, output_size, response, method)
    expected = reference.resample(x, 1, output_size, weights)
    assert error_of(y, expected) <= 1e-5


@pytest.mark.parametrize('size', [7, 40])
@pytest.mark.parametrize('method', METHODS[1:])
def test_gradient_of_a_gradient_is_the_central_difference(method, size):
    """The input is kept for the gradient, or on long axes its spectrum."""
    x = random(2, size, 3)
    output_size = size // 2 + 1
    weights = np.linspace(1, 0.5, output_size // 2 + 1, dtype='float32')
    frequencies = ops.arange(len(weights), dtype='int32')
    if size > 7:
        frequencies = frequencies[-4:]

    def penalty(gradient_weights):
        response = Response(weights, frequencies, gradient_weights)

        def loss(x):
            return ops.sum(resample(x, 1, output_size, response, method) ** 2)

        return ops.sum(gradients(loss, [x])[0] ** 2)

    def expected_penalty(step):
        moved = weights.astype('float64')
        moved[array(frequencies).astype(int)] += step
        matrix = reference.resample(np.eye(size), 0, output_size, moved)
        return np.sum(np.einsum('pn,pm,bmc->bnc', 2 * matrix, matrix, x) ** 2)

    gradient_weights = ops.take(weights, frequencies)
    compiled = COMPILERS[USUAL](lambda x: gradients(penalty, [x]))
    (actual,) = compiled(gradient_weights)
    expected = central_differences(expected_penalty, np.zeros(len(frequencies)))
    assert error_of(actual, expected) <= 1e-4


@pytest.mark.parametrize(
    'shape, axis, output_size, method',
    [
        ((32, 32, 32, 64), 1, 24, 'matmul'),
        ((4, 512, 512, 64), 2, 264, 'matmul'),
        # The product with few columns is slow, that along the last axis not.
        ((4, 512, 512, 3), 2, 264, 'fft'),
        ((4, 3, 512, 512), 3, 264, 'matmul'),
        ((2, 1024, 1024, 8), 1, 520, 'fft'),
        ((2, 1024, 1024, 8), 1, 264, 'matmul'),
        # A large matrix takes long to make, whatever the smaller size.
        ((8, 1024, 64), 1, 394, 'fft'),
        ((1, 2**20 + 8, 64), 1, 10, 'fft'),
    ],
)
def test_the_fastest_method(monkeypatch, shape, axis, output_size, method):
    """Only the chosen one is made."""
    for name, other in [('_by_matrix', 'matmul'), ('_by_fft', 'fft')]:
        made = mock.Mock(side_effect=LookupError(other))
        monkeypatch.setattr(resampling, name, made)
    with pytest.raises(LookupError, match=method):
        resample(keras.KerasTensor(shape), axis, output_size)


def test_float16_holds_the_gradient_of_a_weight_on_a_long_axis():
    """The spectrum of a loud signal of 4096 samples is beyond float16."""
    x = 100 + random(1, 4096, 1)
    frequencies = np.array([0, 1, 5], 'int32')

    def gradient(dtype):
        def loss(x, gradient_weights):
            response = Response(None, ops.array(frequencies), gradient_weights)
            y = resample(ops.cast(x, dtype), 1, 64, response, 'fft')
            return ops.sum(ops.cast(y, 'float32') / 100)

        return array(gradients(loss, [x, np.ones(3, 'float32')])[1])

    expected = gradient('float32')
    assert np.abs(expected).max() > 60
    assert error_of(gradient('float16'), expected) < 1e-2


LENGTHS = [60, 600]  # A matrix is faster for the first, an FFT for the second.


@only('tensorflow', 'elsewhere sizes are known')
@pytest.mark.parametrize('ramp', ['outside', 'straight_through'])
def test_a_graph_chooses_the_method_by_sizes_met(monkeypatch, ramp):
    """No matrix is made for a long axis: it would grow with its square."""
    import tensorflow as tf

    def poisoned(size, output_size, *arguments):
        tf.debugging.assert_less(size, LENGTHS[1])
        return ops.full((output_size, size), np.nan)

    monkeypatch.setattr(resampling, 'resampling_matrix', poisoned)
    for layer in (DiffStride1D(2.2, ramp=ramp), FixedSpectralPooling1D(2.2)):
        pool = of_any_image(layer)
        for length in [*LENGTHS, 12_000]:
            is_by_matrix = np.isnan(array(pool(image((length,))))).all()
            assert is_by_matrix == (length == LENGTHS[0])


@only('tensorflow', 'elsewhere sizes are known')
def test_gradients_are_right_whichever_method_a_graph_chooses():
    """First ones in input and stride, and second ones in the input."""
    layer = DiffStride1D(2.2)

    def all_gradients(x, weights):
        def loss(x):
            return ops.sum(weights * layer(x))

        def penalty(x):
            (slopes,) = gradients(lambda x: ops.sum(layer(x) ** 2), [x])
            return ops.sum(slopes**2)

        return gradients(loss, [x], [layer.strides]) + gradients(penalty, [x])

    spec = [None, None, 2], 'float32'
    all_gradients = of_unknown_sizes(all_gradients, spec, spec)
    for length in LENGTHS:
        x = image((length,))
        matrix = reference.diffstride(np.eye(length)[None], (2.2,))[0]
        weights = image((len(matrix),), seed=1)
        of_x, of_stride, of_penalty = all_gradients(x, weights)
        expected = np.einsum('pn,bpc->bnc', matrix, weights)
        assert error_of(of_x, expected) <= 2e-5
        expected = reference.stride_gradient_of_layer(layer, x, weights, [2.2])
        np.testing.assert_allclose(of_stride, expected, rtol=2e-3)
        square = matrix.T @ matrix
        expected = 8 * np.einsum('nm,bmc->bnc', square @ square, x)
        assert error_of(of_penalty, expected) <= 2e-5
