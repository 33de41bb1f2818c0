"""Blurred subsampling against NumPy."""

import numpy as np
import pytest
from backends import array, error_of, only, random

from diffstride.blurring import BlurPooling

FILTERS = {1: [1], 3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}


def blurred(line, length):
    padded = np.pad(line, length // 2, mode='reflect')
    return np.convolve(padded, FILTERS[length], 'valid')


def expected(x, strides, lengths):
    for axis, stride, length in zip((1, 2), strides, lengths):
        x = np.apply_along_axis(blurred, axis, array(x), length)
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
@pytest.mark.parametrize('shape', [(16, 13), (3, 4)])
def test_values_agree_with_numpy(strides, kernel_size, lengths, shape):
    x = random(2, *shape, 3)
    layer = BlurPooling(strides, kernel_size)
    y, reference = array(layer(x)), expected(x, layer.strides, lengths)
    assert error_of(y, reference) <= 1e-6
    assert layer.compute_output_shape(x.shape) == y.shape
    first = BlurPooling(strides, kernel_size, data_format='channels_first')
    z = array(first(x.transpose(0, 3, 1, 2)))
    assert error_of(z.transpose(0, 2, 3, 1), reference) <= 1e-6


@only('tensorflow', 'sizes are known elsewhere')
def test_sizes_may_be_unknown():
    import tensorflow as tf

    x = random(2, 9, 12, 3)
    layer = BlurPooling((2, 3))
    shape = tf.TensorSpec((None, None, None, 3))
    outputs = tf.function(layer, input_signature=[shape])(x)
    assert error_of(outputs, expected(x, layer.strides, (3, 5))) <= 1e-6


def test_maximum_comes_before_the_blur():
    x = np.zeros((1, 9, 9, 1), 'float32')
    x[0, 4, 4] = 1.0
    y = array(BlurPooling(2, pool_size=3)(x))
    line = np.convolve([0, 0, 0, 1, 1, 1, 0, 0, 0], FILTERS[3], 'same')[::2]
    np.testing.assert_allclose(y[0, :, :, 0], np.outer(line, line), atol=1e-6)
