"""Blurred subsampling against NumPy, and in a network."""

import keras
import numpy as np
import pytest
from backends import array, error_of, random, refusals

from diffstride.blurring import BlurPooling

FILTERS = {1: [1], 3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}


def expected(x, strides, lengths):
    for axis, stride, length in zip((1, 2), strides, lengths):
        half = length // 2
        x = np.apply_along_axis(
            lambda v, half=half, length=length: np.convolve(
                np.pad(v, half, mode='reflect'), FILTERS[length], 'valid'
            ),
            axis,
            np.asarray(x, 'float64'),
        )
        x = x.take(range(0, x.shape[axis], stride), axis)
    return x


@pytest.mark.parametrize(
    'strides, kernel_size, lengths',
    [
        (2, None, (3, 3)),
        ((3, 1), None, (5, 1)),
        ((1, 2), 5, (5, 5)),
        (2, 1, (1, 1)),
    ],
)
@pytest.mark.parametrize('shape', [(16, 13), (7, 8)])
def test_values_agree_with_numpy(strides, kernel_size, lengths, shape):
    x = random(2, *shape, 3)
    layer = BlurPooling(strides, kernel_size)
    y = array(layer(x))
    assert error_of(y, expected(x, layer.strides, lengths)) <= 1e-6
    assert layer.compute_output_shape(x.shape) == y.shape
    first = BlurPooling(strides, kernel_size, data_format='channels_first')
    z = array(first(x.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(z.transpose(0, 2, 3, 1), y)


def test_maximum_comes_before_the_blur():
    x = np.zeros((1, 9, 9, 1), 'float32')
    x[0, 4, 4] = 1.0
    y = array(BlurPooling(2, pool_size=3)(x))
    line = np.convolve([0, 0, 0, 1, 1, 1, 0, 0, 0], FILTERS[3], 'same')[::2]
    np.testing.assert_allclose(y[0, :, :, 0], np.outer(line, line), atol=1e-6)


test_wrong_arguments_are_refused = refusals(
    (lambda: BlurPooling(1.5), '`strides` of BlurPooling must be integers'),
    (lambda: BlurPooling(0), '`strides` must be .*=0'),
    (lambda: BlurPooling(kernel_size=4), '`kernel_size` must be None or .*=4'),
    (lambda: BlurPooling(pool_size=0), '`pool_size` must be .*=0'),
    (lambda: BlurPooling(data_format='last'), "`data_format` must .*='last'"),
)


def test_wrong_inputs_are_refused():
    layer = BlurPooling((4, 2))
    for make in (lambda shape: np.zeros(shape, 'float32'), keras.KerasTensor):
        with pytest.raises(ValueError, match=r'have ndim=4.*=\(1, 32, 8\)'):
            layer(make((1, 32, 8)))
        with pytest.raises(ValueError, match=r'exceed half.* filter, \(3, 1\)'):
            layer(make((1, 3, 9, 8)))
    assert layer(np.zeros((1, 4, 2, 8), 'float32')).shape == (1, 1, 1, 8)
