"""Resizing against the float64 reference, and where its sizes come from."""

import itertools

import keras
import numpy as np
import pytest
import reference
from backends import (
    BACKEND,
    COMPILERS,
    FORMATS,
    USUAL,
    array,
    error_of,
    image,
    of_unknown_sizes,
    only,
    shape_of,
)

from diffstride import DiffStride, SpectralResizing
from diffstride.counting import complexity
from diffstride.resampling import METHODS, NORMS

# Up, down, both and neither, from and to odd and even sizes.
SIZES = [
    ((9,), (14,)),
    ((10,), (25,)),
    ((12,), (7,)),
    ((8, 9), (16, 18)),
    ((8, 13), (20, 6)),
    ((1, 12), (5, 1)),
    ((7, 6), (7, 6)),
    ((4, 7, 6), (6, 7, 3)),
    ((9, 4), (6, 6)),
    ((2, 3), (3, 2)),
    ((1, 2, 31), (4, 1, 32)),
]
# Each pair of sizes with each norm, and with some format and method.
CASES = [
    (*sizes, FORMATS[i % 2], METHODS[1 + i // 2 % 2], norm)
    for i, (sizes, norm) in enumerate(itertools.product(SIZES, NORMS))
]


def test_values_agree_with_reference():
    compiled = COMPILERS[USUAL]
    # JAX compiles for every pair of sizes.
    cases = CASES[::4] if BACKEND == 'jax' else CASES
    for sizes, new_sizes, data_format, method, norm in cases:
        x = image(sizes, data_format)
        like = image(new_sizes, data_format, batch=1, channels=5)
        arguments = {'data_format': data_format, 'method': method, 'norm': norm}
        expected = reference.resize(x, new_sizes, norm, data_format)
        size = new_sizes if len({*new_sizes}) > 1 else new_sizes[0]
        y = compiled(SpectralResizing(size, **arguments))(x)
        assert error_of(y, expected) <= 1e-6, (sizes, new_sizes, arguments)
        y = compiled(SpectralResizing(**arguments))([x, like.astype('int32')])
        assert error_of(y, expected) <= 1e-6, (sizes, new_sizes, arguments)
        assert sizes != new_sizes or np.array_equal(array(y), x)


def test_static_shapes_are_told():
    for sizes, new_sizes, data_format, *_ in CASES:
        x = shape_of(sizes, data_format)
        like = shape_of(new_sizes, data_format, channels=5, batch=7)
        expected = shape_of(new_sizes, data_format)
        by_size = SpectralResizing(new_sizes, data_format)
        by_like = SpectralResizing(data_format=data_format)
        inputs = [keras.Input(shape[1:]) for shape in (x, like)]
        assert by_size.compute_output_shape(x) == expected
        assert by_size.compute_output_spec(inputs[0]).shape == expected
        assert by_size(inputs[0]).shape == expected
        assert by_like.compute_output_shape([x, like]) == expected
        assert by_like(inputs).shape == expected


def test_unknown_sizes_of_like_stay_unknown():
    x, like = keras.Input((8, None, 3)), keras.Input((None, 9, 5))
    assert SpectralResizing()([x, like]).shape == (None, None, 9, 3)
    assert SpectralResizing(4)(like).shape == (None, 4, 4, 5)


@only('tensorflow', 'graphs of unknown sizes')
@pytest.mark.parametrize('data_format', FORMATS)
def test_graphs_follow_sizes_known_when_they_run(data_format):
    layer = SpectralResizing(data_format=data_format)
    spec = shape_of([None, None], data_format), 'float32'
    resize = of_unknown_sizes(lambda x, like: layer([x, like]), spec, spec)
    for sizes, new_sizes in [pair for pair in SIZES if len(pair[0]) == 2]:
        x, like = image(sizes, data_format), image(new_sizes, data_format)
        expected = reference.resize(x, new_sizes, data_format=data_format)
        assert error_of(resize(x, like), expected) <= 1e-6


def test_macs_are_counted_for_the_first_input_alone():
    inputs = keras.Input((12, 15, 2))
    pooled = DiffStride(3.0, 2.0)(inputs)
    pairs = [pooled, inputs], [inputs, pooled]
    outputs = [SpectralResizing()(pair) for pair in pairs]
    pool, *resizings = complexity(keras.Model(inputs, outputs)).layers
    height, width, _ = pool.output_shape
    up = 12 * height * width + 15 * 12 * width
    down = height * 12 * 15 + width * height * 15
    assert [row.macs for row in resizings] == [2 * down, 2 * up]
    same = keras.Sequential([keras.Input((8, 9, 2)), SpectralResizing((8, 4))])
    assert complexity(same, (8, 9, 2)).macs == 8 * 4 * 9 * 2
