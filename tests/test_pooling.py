"""The pooling layers, against the float64 reference and in Keras models."""

import inspect
import itertools
import json

import gin
import keras
import numpy as np
import pytest
import reference
from backends import (
    BACKEND,
    COMPILERS,
    compilers,
    dtype_of,
    gradients,
    of_unknown_sizes,
    only,
    skip_unless_there_is,
    some,
    traced,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from diffstride import (
    DiffStride,
    DiffStride1D,
    DiffStride3D,
    FixedSpectralPooling,
    FixedSpectralPooling1D,
    FixedSpectralPooling3D,
    SpatialPooling,
    complexity,
    pooling,
)

FORMATS = ('channels_last', 'channels_first')
METHODS = ('fft', 'matmul')
NORMS = ('forward', 'backward', 'ortho')
RAMPS = ('outside', 'inside')
SMOOTHNESSES = (0.5, 1, 2.5, 4)
VARIANTS = list(itertools.product(METHODS, FORMATS, NORMS))
KINDS = list(itertools.product(RAMPS, SMOOTHNESSES))

SIZES = (*range(1, 66), 224)
STRIDES = (1, 1.1, 1.25, 1.6, 2.2, 2.5, 3.3, 4.75, *range(2, 17))
GRID = list(itertools.product(SIZES, STRIDES))

LAYERS = {
    'DiffStride': DiffStride,
    'FixedSpectralPooling': FixedSpectralPooling,
    'SpatialPooling': SpatialPooling,
}
has_xla = pytest.mark.skipif(BACKEND == 'torch', reason='PyTorch has no XLA')
every_layer = pytest.mark.parametrize('cls', LAYERS.values(), ids=LAYERS)
DIFFSTRIDES = {1: DiffStride1D, 2: DiffStride, 3: DiffStride3D}
FIXED = {1: FixedSpectralPooling1D, 3: FixedSpectralPooling3D}


def random(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype('float32')


def image(sizes, data_format='channels_last', batch=2, channels=2, seed=0):
    first = (batch, channels, *sizes)
    last = (batch, *sizes, channels)
    return random(
        *(first if data_format == 'channels_first' else last), seed=seed
    )


def array(tensor):
    return np.asarray(tensor, 'float64')


def error_of(actual, expected):
    """Largest difference relative to the largest value, inf if shapes differ.

    NaN counts as infinitely wrong.
    """
    actual, expected = array(actual), array(expected)
    if actual.shape != expected.shape:
        return np.inf
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return error if np.isfinite(error) else np.inf


def graph(layer, data_format='channels_last', channels=2):
    """The layer compiled for inputs of unknown batch and spatial sizes.

    Where there is no such compiler, the layer itself.
    """
    shape = [None, *[None] * layer.rank, channels]
    if data_format == 'channels_first':
        shape = [None, channels, *[None] * layer.rank]
    pool = of_unknown_sizes(layer, (shape, 'float32'))
    return lambda x: pool(ops.convert_to_tensor(x))


def pairs_of_axes(share, seed=0):
    """Cases of the grid on both axes: each in one image, but 1 / share."""
    order = np.random.default_rng(seed).permutation(len(GRID))
    half = len(order) // 2
    for i, j in itertools.islice(zip(order, order[half:]), 0, half, share):
        yield zip(GRID[i], GRID[j])


# Exactness


def shares_of_the_grid(default, slow=1):
    return pytest.mark.parametrize(
        'share', [default, pytest.param(slow, marks=pytest.mark.slow)]
    )


every_kind = pytest.mark.parametrize('ramp, smoothness', KINDS)


def variant_of_diffstride(ramp, smoothness, method, data_format, norm):
    return DiffStride(
        2.0,
        smoothness,
        ramp=ramp,
        method=method,
        data_format=data_format,
        norm=norm,
    )


def error_at(layer, pool, sizes, strides, seed):
    """The error of `pool`, which calls the layer, at these strides."""
    layer.strides.assign(strides)
    x = image(sizes, layer.data_format, batch=1, seed=seed)
    y = reference.diffstride(
        x,
        strides,
        layer.smoothness_factor,
        layer.ramp,
        layer.norm,
        data_format=layer.data_format,
    )
    return error_of(pool(x), y)


@shares_of_the_grid(30, slow=4)
@every_kind
def test_eager_values_and_sizes_agree_with_reference(ramp, smoothness, share):
    layers = [
        variant_of_diffstride(ramp, smoothness, *variant)
        for variant in VARIANTS
    ]
    wrong = []
    seed = KINDS.index((ramp, smoothness))
    for i, (sizes, strides) in some(enumerate(pairs_of_axes(share, seed))):
        layer = layers[i % len(layers)]
        error = error_at(layer, layer, sizes, strides, seed=i)
        if not error <= 2e-5:
            wrong.append((sizes, strides, VARIANTS[i % len(layers)], error))
    assert not wrong


@shares_of_the_grid(20)
@every_kind
def test_graph_values_and_sizes_agree_with_reference(ramp, smoothness, share):
    seed = KINDS.index((ramp, smoothness))
    wrong = []
    variants = VARIANTS[seed % 4 :: 4][: 3 if share == 1 else 1]
    layers = []
    for variant in variants:
        layer = variant_of_diffstride(ramp, smoothness, *variant)
        layers.append((layer, graph(layer, layer.data_format)))
    for i, (sizes, strides) in some(
        enumerate(pairs_of_axes(share, seed + 100))
    ):
        layer, pool = layers[i % len(layers)]
        error = error_at(layer, pool, sizes, strides, seed=i)
        if not error <= 2e-5:
            wrong.append((sizes, strides, variants[i % len(layers)], error))
    assert not wrong


@shares_of_the_grid(20)
def test_fixed_values_and_sizes_agree_with_reference(share):
    wrong = []
    for i, (sizes, strides) in some(enumerate(pairs_of_axes(share))):
        method, data_format, norm = variant = VARIANTS[i % len(VARIANTS)]
        strides = tuple(strides)
        layer = FixedSpectralPooling(strides, data_format, method, norm)
        x = image(sizes, data_format, batch=1, seed=i)
        y = reference.fixed_spectral_pooling(x, strides, norm, data_format)
        error = error_of(layer(x), y)
        if not error <= 2e-5:
            wrong.append((sizes, strides, variant, error))
    assert not wrong


@pytest.mark.parametrize(
    'ramp, smoothness, cropping',
    [*((*kind, True) for kind in KINDS), *((ramp, 4, False) for ramp in RAMPS)],
)
def test_every_combination_of_arguments_agrees_with_reference(
    ramp, smoothness, cropping
):
    strides = (1.6, 3)
    for method, data_format, norm in some(VARIANTS):
        x = image((7, 12), data_format)
        layer = DiffStride(
            strides,
            smoothness,
            cropping,
            ramp=ramp,
            method=method,
            data_format=data_format,
            norm=norm,
        )
        y = reference.diffstride(
            x, strides, smoothness, ramp, norm, cropping, None, None,
            data_format,
        )  # fmt: skip
        assert error_of(layer(x), y) <= 2e-5, (method, data_format, norm)


@pytest.mark.parametrize('method, stride', [('fft', 1.6), ('matmul', 7.3)])
@pytest.mark.parametrize('cls', [DiffStride, FixedSpectralPooling])
def test_values_are_accurate_for_long_axes(cls, method, stride):
    x = image((4096, 1), batch=1)
    y = {
        DiffStride: reference.diffstride,
        FixedSpectralPooling: reference.fixed_spectral_pooling,
    }[cls](x, (stride, 1))
    assert error_of(cls((stride, 1), method=method)(x), y) <= 1e-5


@pytest.mark.parametrize(
    'limits', [(3, None), (None, 2.5), (1.2, 1.3), (20, 20), (1, 1)]
)
@pytest.mark.parametrize('ramp', RAMPS)
def test_limits_of_the_user_agree_with_reference(ramp, limits):
    lower, upper = limits
    x = image((17, 24))
    layer = DiffStride(
        lower or upper,
        2.5,
        lower_limit_stride=lower,
        upper_limit_stride=upper,
        ramp=ramp,
    )
    pool = graph(layer) if ramp == 'outside' else layer
    for strides in [(1, 2), (100, 1.25)]:
        layer.strides.assign(strides)
        y = reference.diffstride(
            x, strides, 2.5, ramp, lower=lower, upper=upper
        )
        assert error_of(layer(x), y) <= 2e-5
        assert error_of(pool(x), y) <= 2e-5


@pytest.mark.parametrize(
    'limits',
    [{'upper_limit_stride': 1.1}, {'lower_limit_stride': 1.3}],
    ids=str,
)
def test_a_limit_stored_in_float32_is_within_the_limits(limits):
    ((_, limit),) = limits.items()
    layer = DiffStride(limit, **limits)
    assert DiffStride(layer.stride_values, **limits).strides.shape == (2,)


@pytest.mark.parametrize('ramp', RAMPS)
def test_shared_stride_is_used_on_both_axes(ramp):
    x = image((15, 24))
    layer = DiffStride(2.5, shared_stride=True, ramp=ramp)
    y = DiffStride(2.5, ramp=ramp)(x)
    assert layer.strides.shape == (1,)
    assert np.array_equal(layer(x), y)


def test_pinned_sizes_stay_while_the_mask_follows():
    x = image((32, 24))
    layer = DiffStride((2.0, 3.0))
    layer.pin()
    layer.strides.assign((2.2, 2.9))
    y = reference.diffstride(x, (2.2, 2.9), sizes=(24, 16))
    assert layer.pinned_strides == (2.0, 3.0)
    for pool in (layer, graph(layer)):
        assert error_of(pool(x), y) <= 2e-5
    layer.unpin()
    assert layer(x).shape == layer(x).shape
    assert error_of(layer(x), reference.diffstride(x, (2.2, 2.9))) <= 2e-5


@pytest.mark.parametrize('pool_size', [1, 2, (3, 2)])
@pytest.mark.parametrize('strides', [1, 2, (3, 2)])
@pytest.mark.parametrize('data_format', FORMATS)
def test_spatial_pooling_is_the_mean_of_the_window(
    data_format, strides, pool_size
):
    if BACKEND == 'torch' and pool_size == (3, 2) and strides != 2:
        pytest.skip('Keras counts padding there, of unequal windows')
    x = image((11, 8), data_format)
    layer = SpatialPooling(pool_size, strides, data_format=data_format)
    expected = x.astype('float64')
    first = 1 if data_format == 'channels_last' else 2
    for axis, window, stride in zip(
        (first, first + 1),
        np.broadcast_to(pool_size, 2),
        np.broadcast_to(strides, 2),
    ):
        size = x.shape[axis]
        count = -(-size // stride)
        before = max((count - 1) * stride + window - size, 0) // 2
        starts = np.arange(count) * stride - before
        expected = np.stack(
            [
                expected.take(range(max(s, 0), min(s + window, size)), axis)
                .mean(axis)
                for s in starts
            ],
            axis,
        )  # fmt: skip
    assert error_of(layer(x), expected) <= 1e-6


def test_default_spatial_pooling_keeps_every_second_sample():
    x = image((7, 10))
    assert np.array_equal(SpatialPooling()(x), x[:, ::2, ::2])


# Sizes


def shape_of(sizes, data_format):
    first = data_format == 'channels_first'
    return (None, 5, *sizes) if first else (None, *sizes, 5)


@every_kind
def test_compute_output_shape_tells_pinned_sizes(ramp, smoothness):
    data_format = FORMATS[KINDS.index((ramp, smoothness)) % 2]
    layer = DiffStride(2.0, smoothness, ramp=ramp, data_format=data_format)
    for sizes, strides in pairs_of_axes(3):
        sizes, strides = tuple(sizes), tuple(strides)
        layer.strides.assign(strides)
        layer.pin()
        expected = tuple(
            reference.diffstride_size(
                size,
                reference.clip_stride(stride, size, smoothness, ramp),
                smoothness,
                ramp,
            )
            for size, stride in zip(sizes, strides)
        )
        actual = layer.compute_output_shape(shape_of(sizes, data_format))
        assert actual == shape_of(expected, data_format), (sizes, strides)


@pytest.mark.parametrize('data_format', FORMATS)
def test_compute_output_shape_of_fixed_strides(data_format):
    for sizes, strides in pairs_of_axes(1):
        sizes, strides = tuple(sizes), tuple(strides)
        layer = FixedSpectralPooling(strides, data_format)
        expected = tuple(map(reference.fixed_size, sizes, strides))
        actual = layer.compute_output_shape(shape_of(sizes, data_format))
        assert actual == shape_of(expected, data_format), (sizes, strides)


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize(
    'layer, pinned, sizes, expected',
    [
        (DiffStride, False, (32, 33), (None, None)),
        (DiffStride, True, (32, 33), (24, 26)),
        (DiffStride, True, (32, None), (24, None)),
        (DiffStride, False, (None, None), (None, None)),
        ((DiffStride, {'cropping': False}), False, (32, 33), (32, 33)),
        ((DiffStride, {'cropping': False}), True, (None, 33), (None, 33)),
        (FixedSpectralPooling, False, (32, 33), (16, 16)),
        (FixedSpectralPooling, False, (None, 33), (None, 16)),
        (SpatialPooling, False, (32, 33), (16, 17)),
    ],
)
def test_symbolic_and_computed_shapes_agree(
    layer, pinned, sizes, expected, data_format
):
    cls, arguments = layer if isinstance(layer, tuple) else (layer, {})
    layer = cls(strides=2, data_format=data_format, **arguments)
    if pinned:
        layer.pin()
    shape = shape_of(sizes, data_format)
    expected = shape_of(expected, data_format)
    assert layer.compute_output_shape(shape) == expected
    assert layer(keras.Input(shape[1:])).shape == expected


@only('tensorflow', 'graphs of unknown sizes')
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize(
    'cls, pinned',
    [(DiffStride, False), (DiffStride, True), (FixedSpectralPooling, False)],
)
def test_graphs_keep_the_sizes_that_are_known(cls, pinned, data_format, method):
    layer = cls(strides=2, method=method, data_format=data_format)
    if pinned:
        layer.pin()
    shape = shape_of((32, 33), data_format)
    import tensorflow as tf

    pool = traced(layer)
    y = pool.get_concrete_function(tf.TensorSpec(shape)).output_shapes
    assert tuple(y) == layer.compute_output_shape(shape)


@pytest.mark.parametrize('ramp', RAMPS)
@pytest.mark.parametrize('stride', [1.1, 1.6, 3.3])
def test_sizes_do_not_jump_by_rounding(stride, ramp):
    layer = DiffStride(stride, 2, ramp=ramp)
    pool = graph(layer)
    for size in (11, 16, 33, 48, 66, 198):
        x = image((size, size), batch=1)
        clipped = reference.clip_stride(stride, size, 2, ramp)
        expected = reference.diffstride_size(size, clipped, 2, ramp)
        assert tuple(pool(x).shape) == (1, expected, expected, 2)
        layer.pin()
        shape = layer.compute_output_shape(x.shape)
        assert shape == (1, expected, expected, 2)


# Gradients


def gradients_of(layer, x, weights, compiler='eager'):
    """Gradients of sum(weights * layer(x)) in x and in the strides, if any."""

    def both(x, weights):
        return gradients(
            lambda x: ops.sum(weights * layer(x)), [x], layer.weights
        )

    compiled = COMPILERS[compiler](both)
    return list(map(array, compiled(ops.array(x), ops.array(weights))))


def assert_stride_gradient(compiler, sizes, strides, channels=2, **arguments):
    """Compares with the reference, after assigning `strides` to a layer."""
    data_format = arguments.get('data_format', 'channels_last')
    arguments.setdefault('smoothness_factor', 4.0)
    lower = arguments.get('lower_limit_stride')
    upper = arguments.get('upper_limit_stride')
    layer = DIFFSTRIDES[len(sizes)](lower or upper or 2.0, **arguments)
    layer.strides.assign(strides)
    x = image(sizes, data_format, channels=channels)
    weights = random(*layer(x).shape, seed=1)
    _, actual = gradients_of(layer, x, weights, compiler)
    is_pinned = compiler == 'xla'
    assert layer.pinned_strides == (
        tuple(np.float32(strides)) if is_pinned else None
    )
    expected = reference.diffstride_stride_gradient(
        x,
        weights,
        strides,
        layer.smoothness_factor,
        layer.ramp,
        layer.norm,
        layer.cropping,
        lower,
        upper,
        data_format,
    )
    tolerance = 2e-3 * np.abs(expected).max()
    # Where the sum cancels: what float32 leaves of one as long.
    tolerance += 1e-7 * np.linalg.norm(x) * np.linalg.norm(weights)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    return actual


STRIDE_GRADIENTS = [
    ((16, 21), (2.3, 3.1), {}),
    ((16, 21), (2.3, 3.1), {'ramp': 'inside'}),
    ((33, 20), (1.7, 5.3), {'smoothness_factor': 0.7, 'norm': 'backward'}),
    ((33, 20), (1.7, 5.3), {'smoothness_factor': 2.5, 'ramp': 'inside'}),
    ((9, 40), (1.23, 7.7), {'smoothness_factor': 100, 'ramp': 'inside'}),
    ((12, 17), (2.3, 3.1), {'cropping': False, 'norm': 'ortho'}),
    ((12, 17), (2.3, 3.1), {'cropping': False, 'ramp': 'inside'}),
    ((1, 24), (2.3, 3.1), {}),
    ((2, 3), (1.4, 1.3), {'smoothness_factor': 0.5}),
]
STRIDE_GRADIENTS_AT_CORNERS = [
    ((32, 16), (2, 2), {}),
    ((32, 16), (2, 2), {'ramp': 'inside'}),
    ((32, 16), (4, 2), {'smoothness_factor': 2, 'norm': 'ortho'}),
    ((16, 32), (2, 4), {'smoothness_factor': 4, 'ramp': 'inside'}),
    ((24, 20), (2, 2.5), {'smoothness_factor': 0.5, 'norm': 'backward'}),
    ((24, 20), (2, 2.5), {'smoothness_factor': 0.5, 'ramp': 'inside'}),
    ((32, 64), (2, 8), {'cropping': False}),
]
STRIDE_GRADIENTS_OUTSIDE_LIMITS = [
    ((32, 16), (1, 0.5), {}),
    ((32, 16), (100, 20), {}),
    ((32, 16), (100, 20), {'ramp': 'inside'}),
    ((32, 16), (0.5, 0.5), {'ramp': 'inside'}),
    ((4, 6), (1, 1), {}),
    ((32, 16), (2, 8), {'lower_limit_stride': 3.1}),
    ((32, 16), (3, 8), {'upper_limit_stride': 2.3}),
    ((32, 16), (3, 8), {'upper_limit_stride': 2.3, 'ramp': 'inside'}),
]
STRIDE_GRADIENTS_OF_OTHER_RANKS = [
    ((21,), (2.3,), {}),
    ((40,), (7.7,), {'ramp': 'inside', 'norm': 'ortho'}),
    ((40,), (2,), {}),
    ((5, 16, 9), (1.6, 3.1, 1.2), {}),
    ((16, 5, 12), (2.3, 1.7, 2), {'ramp': 'inside', 'smoothness_factor': 2}),
    ((4, 5, 6), (2.3, 1.7, 1), {'cropping': False}),
]

EVERY_STRIDE_GRADIENT = (
    STRIDE_GRADIENTS
    + STRIDE_GRADIENTS_AT_CORNERS
    + STRIDE_GRADIENTS_OUTSIDE_LIMITS
    + STRIDE_GRADIENTS_OF_OTHER_RANKS
)


@pytest.mark.parametrize('case', range(len(EVERY_STRIDE_GRADIENT)))
def test_stride_gradient_agrees_with_reference(case):
    sizes, strides, arguments = EVERY_STRIDE_GRADIENT[case]
    assert_stride_gradient(
        'eager',
        sizes,
        strides,
        method=METHODS[case % 2],
        data_format=FORMATS[case // 2 % 2],
        **arguments,
    )


@pytest.mark.parametrize('compiler', compilers('graph', 'xla'))
@pytest.mark.parametrize(
    'sizes, strides, arguments, method, data_format',
    [
        (*STRIDE_GRADIENTS[0], 'fft', 'channels_first'),
        (*STRIDE_GRADIENTS_AT_CORNERS[1], 'matmul', 'channels_first'),
        (*STRIDE_GRADIENTS_OUTSIDE_LIMITS[0], 'matmul', 'channels_last'),
        (*STRIDE_GRADIENTS_OF_OTHER_RANKS[0], 'fft', 'channels_last'),
        (*STRIDE_GRADIENTS_OF_OTHER_RANKS[4], 'matmul', 'channels_first'),
    ],
)
def test_stride_gradient_agrees_with_reference_when_compiled(
    sizes, strides, arguments, method, data_format, compiler
):
    assert_stride_gradient(
        compiler,
        sizes,
        strides,
        method=method,
        data_format=data_format,
        **arguments,
    )


@pytest.mark.parametrize(
    'sizes, strides, arguments',
    [
        ((32, 16), (1, 0.5), {}),
        ((4, 6), (1, 1), {}),
        ((32, 16), (100, 20), {}),
        ((32, 16), (100, 20), {'ramp': 'inside'}),
        ((32, 16), (0.5, 1), {'ramp': 'inside'}),
    ],
)
def test_strides_outside_their_limits_have_a_gradient(
    sizes, strides, arguments
):
    x = image(sizes)
    layer = DiffStride(**arguments)
    layer.strides.assign(strides)
    weights = random(*layer(x).shape, seed=1)
    _, gradient = gradients_of(layer, x, weights)
    assert np.all(np.abs(gradient) > 1e-3)


def test_gradient_of_a_shared_stride_is_the_sum_over_the_axes():
    x = image((16, 21))
    separate = DiffStride(2.2)
    weights = random(*separate(x).shape, seed=1)
    _, expected = gradients_of(separate, x, weights)
    _, actual = gradients_of(DiffStride(2.2, shared_stride=True), x, weights)
    np.testing.assert_allclose(actual, [expected.sum()], rtol=1e-4)


@pytest.mark.parametrize(
    'compiler, method, data_format',
    [
        *itertools.product(['eager'], METHODS, FORMATS),
        *itertools.product(compilers('graph'), ['fft'], FORMATS[:1]),
        *zip(compilers('xla') * 2, METHODS, FORMATS[::-1]),
    ],
)
@pytest.mark.parametrize(
    'cls, pool',
    [
        (DiffStride, reference.diffstride),
        (FixedSpectralPooling, reference.fixed_spectral_pooling),
    ],
)
def test_input_gradient_is_the_transposed_operator(
    cls, pool, data_format, method, compiler
):
    sizes, strides = (13, 24), (1.6, 3)
    # The operator applied to a unit impulse at each position: [M, N].
    rows, columns = (
        pool(np.eye(size)[None], (stride,))[0]
        for size, stride in zip(sizes, strides)
    )
    channels_last = data_format == 'channels_last'
    x = image(sizes, data_format)
    weights = image((len(rows), len(columns)), data_format, seed=1)
    layer = cls(strides, method=method, data_format=data_format)
    actual, *_ = gradients_of(layer, x, weights, compiler)
    equation = 'bpqc->bijc' if channels_last else 'bcpq->bcij'
    expected = np.einsum('pi,qj,' + equation, rows, columns, weights)
    assert error_of(actual, expected) <= 2e-5


# A ramp in the gradient alone

STRAIGHT_THROUGH = [
    ((16, 21), (2.3, 3.1), 1.0),
    ((33, 20), (1.7, 5.3), 2.5),
    ((32, 24), (2.0, 3.0), 4.0),
    ((9, 40), (1.23, 7.7), 100.0),
    ((32, 16), (1.0, 1.0), 2.0),
    ((8, 8), (100.0, 1.05), 1.0),
]


@pytest.mark.parametrize('compiler', COMPILERS)
@pytest.mark.parametrize('case', range(len(STRAIGHT_THROUGH)))
def test_straight_through_agrees_with_reference(case, compiler):
    """Spectral pooling's values at the sizes and gradients of 'inside'."""
    sizes, strides, smoothness = STRAIGHT_THROUGH[case]
    layer = DiffStride(
        2.0, smoothness, ramp='straight_through', method=METHODS[case % 2]
    )
    layer.strides.assign(strides)
    x = image(sizes, channels=2)
    clipped = [
        reference.clip_stride(s, n, smoothness, 'inside')
        for n, s in zip(sizes, strides)
    ]
    outputs = [
        reference.diffstride_size(n, s, smoothness, 'inside')
        for n, s in zip(sizes, clipped)
    ]

    def pooled(axis=None, change=0.0):
        y = x
        for i, (size, output) in enumerate(zip(sizes, outputs)):
            mask = np.ones(output // 2 + 1)
            if i == axis:
                stride = clipped[i] + reference._exact(change)
                mask = reference.diffstride_response(
                    size, output, stride, smoothness, 'inside'
                )
            y = reference.resample(y, i + 1, output, mask, 'forward')
        return y

    expected = pooled()
    assert error_of(layer(x), expected) < 1e-5
    weights = random(*expected.shape, seed=1)
    _, actual = gradients_of(layer, x, weights, compiler)
    step = 1e-6
    by_differences = [
        np.sum(weights * (pooled(axis, step) - pooled(axis, -step)) / 2 / step)
        for axis in range(2)
    ]
    tolerance = 2e-3 * np.abs(by_differences).max()
    tolerance += 1e-7 * np.linalg.norm(x) * np.linalg.norm(weights)
    np.testing.assert_allclose(actual, by_differences, rtol=0, atol=tolerance)


# Properties of the operator


SPECTRAL = [
    (DiffStride, {}),
    (DiffStride, {'ramp': 'inside'}),
    (DiffStride, {'ramp': 'straight_through'}),
    (DiffStride, {'cropping': False}),
    (FixedSpectralPooling, {}),
]
every_operator = pytest.mark.parametrize('cls, arguments', SPECTRAL)


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize('method', METHODS)
def test_fixed_stride_of_one_is_the_identity(method, data_format):
    layer = FixedSpectralPooling(1, data_format, method)
    pool = graph(layer, data_format)
    for size in SIZES:
        x = image((size, 65 - size % 65), data_format, batch=1)
        assert np.array_equal(layer(x), x), size
        assert error_of(pool(x), x) <= 2e-5, size


@pytest.mark.parametrize('method', METHODS)
@every_operator
def test_data_formats_agree(cls, arguments, method):
    x = image((15, 24), channels=3)
    first, last = (
        cls((2.2, 3), data_format=data_format, method=method, **arguments)
        for data_format in ('channels_first', 'channels_last')
    )
    y = array(first(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    assert error_of(last(x), y) <= 2e-6


@pytest.mark.parametrize('method', METHODS)
@every_operator
def test_commutes_with_transposing_the_image(cls, arguments, method):
    x = image((15, 24))
    y = cls((2.2, 3), method=method, **arguments)(x)
    other = cls((3, 2.2), method=method, **arguments)(x.transpose(0, 2, 1, 3))
    assert error_of(array(other).transpose(0, 2, 1, 3), y) <= 2e-6


@pytest.mark.parametrize('norm', NORMS)
@every_operator
def test_commutes_with_a_1x1_convolution(cls, arguments, norm):
    keeps_mean = norm == 'forward'
    convolution = keras.layers.Conv2D(
        5, 1, use_bias=keeps_mean, bias_initializer='normal'
    )
    pool = cls((2.2, 3), norm=norm, **arguments)
    x = image((15, 24))
    assert error_of(pool(convolution(x)), convolution(pool(x))) <= 2e-6


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize('method', METHODS)
@every_operator
def test_keeps_the_mean_by_default(cls, arguments, method, data_format):
    axes = (1, 2) if data_format == 'channels_last' else (2, 3)
    for sizes, strides in [((15, 24), (2.2, 3)), ((1, 2), (1, 9))]:
        x = 3 + image(sizes, data_format)
        pool = cls(strides, method=method, data_format=data_format, **arguments)
        means = array(pool(x)).mean(axes)
        assert error_of(means, array(x).mean(axes)) <= 2e-6


@every_operator
def test_is_linear(cls, arguments):
    x, y = image((15, 24)), image((15, 24), seed=1)
    pool = cls((2.2, 3), **arguments)
    expected = 2 * array(pool(x)) - 3 * array(pool(y))
    assert error_of(pool(2 * x - 3 * y), expected) <= 2e-6


@pytest.mark.parametrize('norm', NORMS)
@every_operator
def test_methods_agree(cls, arguments, norm):
    x = image((33, 28))
    y, *others = (
        cls((2.2, 3), method=method, norm=norm, **arguments)(x)
        for method in ('auto', *METHODS)
    )
    for other in others:
        assert error_of(other, y) <= 2e-6


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    cls=st.sampled_from([DiffStride, FixedSpectralPooling]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    strides=st.tuples(st.integers(10, 1000), st.integers(10, 1000)),
    smoothness=st.sampled_from([0.01, 0.1, 0.5, 1, 3.7, 4, 10, 20.1, 50]),
    ramp=st.sampled_from(RAMPS),
    data_format=st.sampled_from(FORMATS),
    method=st.sampled_from(METHODS),
    limits=st.none() | st.tuples(st.integers(1, 5), st.integers(5, 50)),
)
def test_any_image_has_finite_values_of_the_right_shape_and_mean(
    cls, sizes, strides, smoothness, ramp, data_format, method, limits
):
    strides = tuple(stride / 10 for stride in strides)
    if cls is DiffStride:
        lower, upper = limits or (None, None)
        layer = DiffStride(
            lower or 2.0,
            smoothness,
            lower_limit_stride=lower,
            upper_limit_stride=upper,
            data_format=data_format,
            ramp=ramp,
            method=method,
        )
        layer.strides.assign(strides)
        expected = [
            reference.diffstride_size(
                size,
                reference.clip_stride(s, size, smoothness, ramp, lower, upper),
                smoothness,
                ramp,
            )
            for size, s in zip(sizes, strides)
        ]
    else:
        layer = FixedSpectralPooling(strides, data_format, method)
        expected = list(map(reference.fixed_size, sizes, strides))
    x = 5 + image(sizes, data_format, batch=1)
    y = array(layer(x))
    axes = (1, 2) if data_format == 'channels_last' else (2, 3)
    assert [y.shape[axis] for axis in axes] == expected
    assert np.all(np.isfinite(y))
    assert error_of(y.mean(axes), array(x).mean(axes)) <= 1e-5


# State


@pytest.mark.parametrize(
    'sizes, strides, arguments',
    [
        ((4, 4), (2, 2), {}),
        ((4, 4), (1, 1), {}),
        ((4, 4), (100, 100), {'ramp': 'inside'}),
        ((1, 1), (2, 2), {}),
        ((32, 33), (2, 50), {'lower_limit_stride': 3}),
        ((32, 33), (0.25, -1), {}),
    ],
)
def test_forward_pass_writes_to_no_variable(sizes, strides, arguments):
    layer = DiffStride(4.0, **arguments)
    layer.strides.assign(strides)
    model = keras.Sequential([keras.Input((None, None, 2)), layer])
    before = [weight.numpy() for weight in model.weights]
    x = image(sizes)
    outputs = [
        model(x, training=False),
        model(x, training=True),
        traced(model)(x, training=True),
    ]
    for y in outputs:
        assert np.all(np.isfinite(array(y)))
        assert error_of(y, outputs[0]) <= 1e-5
    assert layer.pinned_strides is None
    for weight, value in zip(model.weights, before, strict=True):
        assert weight.numpy().tobytes() == value.tobytes()


def test_layers_of_a_model_are_told_from_input_to_output():
    inner = keras.Sequential([DiffStride(3), DiffStride(4)])
    outer = keras.Sequential([DiffStride(2), inner, DiffStride(5)])
    layers = pooling.diffstride_layers(keras.Sequential([outer, DiffStride(6)]))
    assert [float(layer.strides[0]) for layer in layers] == [2, 3, 4, 5, 6]


def test_untrainable_strides_have_no_trainable_variable():
    layer = DiffStride(2.0, trainable=False)
    assert layer.trainable_variables == []
    assert len(layer.non_trainable_variables) == 1
    layer.trainable = True
    assert len(layer.trainable_variables) == 1


def test_regularizer_of_the_strides_is_a_loss_of_the_layer():
    layer = DiffStride((2, 3), strides_regularizer=keras.regularizers.L2(0.1))
    layer(image((8, 8)))
    assert float(sum(layer.losses)) == pytest.approx(1.3)


@pytest.mark.parametrize('method', METHODS)
@every_layer
def test_an_empty_batch_has_an_empty_result(cls, method):
    layer = cls() if cls is SpatialPooling else cls(method=method)
    y = layer(np.zeros((0, 32, 33, 2), 'float32'))
    assert tuple(y.shape) == (0, *layer(np.zeros((1, 32, 33, 2))).shape[1:])


def test_a_numpy_image_of_float64_is_cast_to_the_policy():
    assert dtype_of(DiffStride()(np.ones((1, 8, 8, 1)))) == 'float32'


# Precision


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'policy, tolerance',
    [
        ('float64', 1e-6),
        ('mixed_bfloat16', 2e-2),
        ('bfloat16', 2e-2),
        ('mixed_float16', 3e-3),
        ('float16', 3e-3),
    ],
)
@pytest.mark.parametrize(
    'cls, arguments',
    [
        (DiffStride, {}),
        (DiffStride, {'ramp': 'inside', 'norm': 'backward'}),
        (FixedSpectralPooling, {}),
    ],
)
def test_values_of_other_precisions_are_near_those_of_float32(
    cls, arguments, policy, tolerance, method
):
    skip_unless_there_is(policy)
    x = image((24, 33))
    layer = cls((2.2, 3), dtype=policy, method=method, **arguments)
    expected = cls((2.2, 3), method=method, **arguments)(x)
    y = layer(ops.cast(x, layer.compute_dtype))
    assert dtype_of(y) == layer.compute_dtype == policy.removeprefix('mixed_')
    assert error_of(y, expected) <= tolerance
    assert all(weight.dtype == 'float32' for weight in layer.weights)
    symbolic = layer(keras.Input((24, 33, 2), dtype=layer.compute_dtype))
    assert dtype_of(symbolic) == layer.compute_dtype


def test_float64_takes_the_stride_as_it_is_stored():
    skip_unless_there_is('float64')
    x = image((24, 33))
    layer = DiffStride((2.2, 3.3), dtype='float64')
    strides = [float(s) for s in np.array(layer.strides)]
    sizes = layer(x).shape[1:3]
    y = reference.diffstride(x, strides, sizes=sizes)
    assert error_of(layer(x), y) <= 1e-6


@pytest.mark.parametrize('floatx', ['float64', 'float16'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('cls', [DiffStride, FixedSpectralPooling])
def test_floatx_does_not_matter_to_a_layer_of_float32(cls, method, floatx):
    keras.config.set_floatx(floatx)
    x = image((24, 33))
    layer = cls((2.2, 3), method=method, dtype='float32')
    y = layer(x)
    assert dtype_of(y) == 'float32'
    assert error_of(graph(layer)(x), y) <= 2e-5


@pytest.mark.parametrize(
    'policy, method, eagerly',
    [
        ('float32', 'fft', True),
        ('float64', 'matmul', True),
        ('bfloat16', 'matmul', True),
        ('mixed_bfloat16', 'fft', True),
        ('mixed_bfloat16', 'matmul', True),
        ('mixed_float16', 'matmul', True),
        pytest.param('mixed_float16', 'fft', False, marks=pytest.mark.slow),
        pytest.param('float64', 'fft', False, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_works_in_every_precision(policy, method, eagerly):
    skip_unless_there_is(policy)
    keras.config.set_dtype_policy(policy)
    pool = DiffStride((2.2, 3), method=method)
    model = classifier(pool)
    # Not Adam, which on PyTorch leaves a float32 weight among others of
    # bfloat16 as it is.
    model.compile(
        keras.optimizers.SGD(0.1),
        'sparse_categorical_crossentropy',
        run_eagerly=eagerly,
    )
    before = pool.strides.numpy()
    history = model.fit(image((12, 12)), np.array([0, 1]), epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history['loss']))
    assert pool.strides.dtype == 'float32'
    assert np.all(np.isfinite(pool.strides.numpy()))
    assert not np.any(pool.strides.numpy() == before)


# Training


def classifier(*pools, shape=(None, None, 2)):
    layers = [keras.Input(shape)]
    for pool in pools:
        layers += [keras.layers.Conv2D(4, 3, padding='same'), pool]
    return keras.Sequential(
        [
            *layers,
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, activation='softmax', dtype='float32'),
        ]
    )


def energy_meter(pool):
    """The mean square of the pooled image: larger for smaller strides."""
    return keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            pool,
            keras.layers.Activation(ops.square),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )


def fit_energy(pool, share=1, optimizer=None, steps=30, **kwargs):
    """Trains strides to keep this share of the energy; returns the losses."""
    model = energy_meter(pool)
    x = image((16, 16), batch=16, channels=1)
    y = share * np.mean(x**2, axis=(1, 2))
    model.compile(optimizer or keras.optimizers.SGD(2.0), 'mse', **kwargs)
    history = model.fit(x, y, batch_size=16, epochs=steps, verbose=0)
    return history.history['loss'], model


@pytest.mark.parametrize(
    'ramp',
    [
        'outside',
        'straight_through',
        pytest.param('inside', marks=pytest.mark.slow),
    ],
)
def test_strides_and_sizes_move_and_the_loss_falls(ramp):
    if BACKEND == 'jax':
        pytest.skip('there sizes follow by RepinStrides, see test_callbacks')
    pool = DiffStride((4.0, 3.0), 2.0, ramp=ramp)
    inputs = keras.Input((16, 16, 1))
    pooled = keras.Model(inputs, pool(inputs))
    x = image((16, 16), channels=1)
    before, strides = pooled.predict(x, verbose=0), pool.strides.numpy()
    predict_function = pooled.predict_function
    losses, _ = fit_energy(pool)
    after = pooled.predict(x, verbose=0)
    assert losses[-1] < 0.7 * losses[0]
    assert np.all(pool.strides.numpy() < strides)
    assert pooled.predict_function is predict_function
    assert after.shape[1] > before.shape[1]
    assert after.shape[2] > before.shape[2]
    assert after.shape == pool(x).shape
    assert pool.pinned_strides is None


@has_xla
def test_pinned_strides_move_and_the_loss_falls_under_xla():
    pool = DiffStride((4.0, 3.0), 2.0)
    pool.pin()
    x = image((16, 16), channels=1)
    before, strides = pool(x), pool.strides.numpy()
    losses, model = fit_energy(pool, jit_compile=True)
    assert model.jit_compile is True
    assert losses[-1] < 0.9 * losses[0]
    assert np.all(pool.strides.numpy() < strides)
    assert pool(x).shape == before.shape
    assert pool.pinned_strides == tuple(strides)
    pool.pin()
    losses_after, _ = fit_energy(pool, jit_compile=True, steps=1)
    assert losses_after[0] < losses[-1]
    assert pool(x).shape[1] > before.shape[1]


@has_xla
def test_xla_trains_as_without_it():
    losses = [
        fit_energy(DiffStride(3.0, cropping=False), steps=3, jit_compile=jit)[0]
        for jit in (False, True)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@only('tensorflow', 'elsewhere such layers can be compiled')
def test_jit_compile_without_pin_falls_back_with_the_warning_of_keras():
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        losses, model = fit_energy(DiffStride(3.0), steps=2, jit_compile=True)
    assert model.jit_compile is False
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('pin', [False, True])
def test_automatic_jit_compile_is_silent(pin):
    pool = DiffStride(3.0)
    if pin:
        pool.pin()
    losses, _ = fit_energy(pool, steps=2)  # Warnings are errors.
    assert losses[-1] < losses[0]


@only('tensorflow', 'elsewhere they all can be')
def test_layers_tell_whether_xla_can_compile_them():
    pool = DiffStride(3.0)
    assert not pool.supports_jit
    pool.pin()
    assert pool.supports_jit
    pool.unpin()
    assert not pool.supports_jit
    assert DiffStride(3.0, cropping=False).supports_jit
    assert FixedSpectralPooling(3.0).supports_jit
    assert SpatialPooling().supports_jit


@pytest.mark.parametrize(
    'limits, ramp, share',
    [
        ((None, None), 'inside', 1),
        ((1.5, 3.5), 'inside', 0),
        ((1.5, 3.5), 'outside', 1),
        ((None, 2.5), 'outside', 0),
    ],
)
def test_a_huge_step_leaves_strides_within_their_limits(limits, ramp, share):
    lower, upper = limits
    pool = DiffStride(
        2.0, ramp=ramp, lower_limit_stride=lower, upper_limit_stride=upper
    )
    huge = keras.optimizers.SGD(1e6)
    losses, _ = fit_energy(pool, share, huge, steps=3, run_eagerly=True)
    assert np.all(np.isfinite(losses))
    strides = pool.strides.numpy()
    assert np.all(strides >= (lower or 1))
    assert np.all(strides <= (upper or np.inf))
    assert np.all(np.isfinite(strides) & (strides != 2))


@pytest.mark.parametrize(
    'stride, share, arguments',
    [
        (1.0, 0, {}),
        (8.5, 1, {}),
        (2.0, 0, {'lower_limit_stride': 2}),
        (4.0, 1, {'upper_limit_stride': 4, 'ramp': 'inside'}),
        (1.0, 0, {'ramp': 'straight_through'}),
    ],
)
def test_a_stride_at_a_limit_comes_back(stride, share, arguments):
    pool = DiffStride(stride, **arguments)
    adam = keras.optimizers.Adam(0.5)
    losses, _ = fit_energy(pool, share, adam, steps=4, run_eagerly=True)
    away = pool.strides.numpy() - stride
    assert np.all(away > 1 if share == 0 else away < -1)
    assert losses[-1] < losses[0]


@only('tensorflow', 'batches of tf.data')
def test_fit_works_on_images_of_any_size():
    import tensorflow as tf

    model = classifier(DiffStride((2, 3)), FixedSpectralPooling(1.6))
    model.compile('adam', 'sparse_categorical_crossentropy')

    def batches():
        for count, *sizes in [(4, 12, 16), (3, 17, 9), (2, 8, 33)]:
            yield image(sizes, batch=count), np.arange(count) % 3

    dataset = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec([None, None, None, 2]),
            tf.TensorSpec([None], 'int32'),
        ),
    )
    history = model.fit(
        dataset.repeat(), steps_per_epoch=3, epochs=3, shuffle=False, verbose=0
    )
    assert history.history['loss'][-1] < history.history['loss'][0]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.convolution = keras.layers.Conv2D(4, 3)
        self.pools = [DiffStride(2.2), FixedSpectralPooling(1.6)]
        self.dense = keras.layers.Dense(3, activation='softmax')

    def call(self, x):
        x = self.convolution(x)
        for pool in self.pools:
            x = pool(x)
        return self.dense(ops.max(x, axis=(1, 2)))


def test_fit_works_in_a_subclassed_model(tmp_path):
    model = Subclassed()
    model.compile('adam', 'sparse_categorical_crossentropy', run_eagerly=True)
    x = image((12, 16), batch=6)
    history = model.fit(x, np.arange(6) % 3, epochs=3, verbose=0)
    assert history.history['loss'][-1] < history.history['loss'][0]
    assert len(model.trainable_variables) == 5
    model.save_weights(tmp_path / 'model.weights.h5')
    other = Subclassed()
    other(x)
    other.load_weights(tmp_path / 'model.weights.h5')
    assert np.array_equal(other(x), model(x))


# Serialization


CONFIGS = [
    (
        DiffStride,
        {
            'strides': (2.5, 3.0),
            'smoothness_factor': 2.0,
            'cropping': False,
            'trainable': False,
            'shared_stride': False,
            'lower_limit_stride': 1.5,
            'upper_limit_stride': 4,
            'data_format': 'channels_first',
            'ramp': 'inside',
            'method': 'fft',
            'norm': 'ortho',
            'strides_regularizer': keras.regularizers.L2(0.1),
            'name': 'pool',
            'dtype': 'mixed_bfloat16',
        },
    ),
    (DiffStride, {'strides': 3, 'shared_stride': True, 'dtype': 'float64'}),
    (DiffStride, {'strides_regularizer': 'l1'}),
    (DiffStride, {'strides': np.array([2, 3]), 'upper_limit_stride': 3}),
    (
        DiffStride,
        {
            'strides': np.float32(2.5),
            'smoothness_factor': np.float32(1.5),
            'lower_limit_stride': np.int64(2),
        },
    ),
    (
        FixedSpectralPooling,
        {
            'strides': (2.5, 3.0),
            'data_format': 'channels_first',
            'method': 'fft',
            'norm': 'ortho',
            'name': 'pool',
            'dtype': 'float64',
        },
    ),
    (
        SpatialPooling,
        {
            'pool_size': (2, 3),
            'strides': (3, 4),
            'data_format': 'channels_first',
            'name': 'pool',
            'dtype': 'float64',
        },
    ),
    (DiffStride, {}),
    (FixedSpectralPooling, {}),
    (SpatialPooling, {}),
    (DiffStride1D, {'strides': (2.5,), 'norm': 'ortho', 'name': 'pool'}),
    (DiffStride1D, {}),
    (DiffStride3D, {'strides': (1, 2.5, 3), 'data_format': 'channels_first'}),
    (DiffStride3D, {'shared_stride': True}),
    (FixedSpectralPooling1D, {'strides': [2.5], 'method': 'fft'}),
    (FixedSpectralPooling1D, {}),
    (FixedSpectralPooling3D, {'strides': (1, 2.5, 3), 'norm': 'backward'}),
    (FixedSpectralPooling3D, {}),
]


@pytest.mark.parametrize('cls, arguments', CONFIGS)
def test_config_round_trips_through_json(cls, arguments):
    layer = cls(**arguments)
    config = layer.get_config()
    text = json.dumps(keras.layers.serialize(layer))
    copies = [
        cls.from_config(json.loads(json.dumps(config))),
        cls.from_config(config),
        keras.layers.deserialize(json.loads(text)),
    ]
    for copy in copies:
        assert type(copy) is cls
        assert json.dumps(copy.get_config()) == json.dumps(config)
        for name, value in arguments.items():
            if name not in ('strides', 'strides_regularizer', 'dtype'):
                assert getattr(copy, name) == value
        for weight, expected in zip(copy.weights, layer.weights, strict=True):
            assert np.array_equal(weight, expected)


@every_layer
def test_config_tests_cover_every_argument(cls):
    covered = next(arguments for c, arguments in CONFIGS if c is cls)
    parameters = set(inspect.signature(cls).parameters) - {'kwargs'}
    assert parameters <= set(covered)
    assert parameters <= set(cls().get_config())


def sequential(pool):
    return classifier(pool, shape=(12, 17, 2))


def functional(pool):
    inputs = keras.Input((12, 17, 2))
    x = keras.layers.Conv2D(4, 3, padding='same')(inputs)
    x = keras.layers.Concatenate()([pool(x), pool(ops.relu(x))])
    x = keras.layers.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def flattening(pool):
    inputs = keras.Input((12, 17, 2))
    x = keras.layers.Flatten()(pool(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def changed(make_model, pin, cls=DiffStride, **arguments):
    """A model whose weights are no longer the initial ones."""
    pool = cls(name='pool', **arguments)
    if pin:
        pool.pin()
    model = make_model(pool)
    for weight in model.weights:
        weight.assign_add(0.1 + 0.2 * np.random.random(weight.shape))
    return model


every_model = pytest.mark.parametrize(
    'make_model, pin, arguments',
    [
        (sequential, False, {}),
        (sequential, True, {'strides': 2.5}),
        (functional, False, {'strides': (1.5, 3)}),
        (functional, True, {'strides': 2, 'shared_stride': True}),
        (
            functional,
            False,
            {
                'strides': 2.5,
                'ramp': 'inside',
                'lower_limit_stride': 2.0,
                'upper_limit_stride': 3.0,
                'strides_regularizer': keras.regularizers.L1(0.01),
                'norm': 'ortho',
            },
        ),
        (flattening, True, {}),
        (flattening, False, {'cropping': False}),
        (flattening, False, {'cls': FixedSpectralPooling, 'strides': 1.6}),
        (functional, False, {'cls': SpatialPooling, 'pool_size': 2}),
    ],
)


def assert_same_model(actual, expected):
    x = image((12, 17), seed=1)
    assert np.array_equal(actual(x), expected(x))
    pool, expected_pool = actual.get_layer('pool'), expected.get_layer('pool')
    assert pool is not expected_pool
    assert pool.get_config() == expected_pool.get_config()
    assert np.array_equal(pool.strides, expected_pool.strides)
    for name in ('pinned_strides', 'supports_jit'):
        assert getattr(pool, name, 0) == getattr(expected_pool, name, 0)


@every_model
def test_a_saved_model_is_loaded_with_its_sizes(
    make_model, pin, arguments, tmp_path
):
    model = changed(make_model, pin, **arguments)
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    assert_same_model(loaded, model)


@every_model
def test_saved_weights_are_loaded_with_their_sizes(
    make_model, pin, arguments, tmp_path
):
    model = changed(make_model, pin, **arguments)
    model.save_weights(tmp_path / 'model.weights.h5')
    other = changed(
        make_model, False if make_model is sequential else pin, **arguments
    )
    other.load_weights(tmp_path / 'model.weights.h5')
    assert_same_model(other, model)


@every_model
def test_a_cloned_model_is_the_same(make_model, pin, arguments):
    model = changed(make_model, pin, **arguments)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_same_model(clone, model)
    assert not set(map(id, clone.weights)) & set(map(id, model.weights))


def test_loading_weights_without_pinned_sizes_unpins(tmp_path):
    following = changed(sequential, False)
    following.save_weights(tmp_path / 'model.weights.h5')
    other = changed(sequential, True)
    other.load_weights(tmp_path / 'model.weights.h5')
    assert other.get_layer('pool').pinned_strides is None
    assert_same_model(other, following)


@pytest.mark.parametrize(
    'name, value',
    [
        ('pinned_strides', [2.0]),
        ('pinned_strides', [2.0, 0.5]),
        ('frozen_strides', [2.0, 2.0, 2.0]),
        ('frozen_method', -1),
        ('frozen_method', 3),
        ('frozen_method', 0.5),
    ],
)
def test_what_was_saved_is_checked(name, value):
    layer = DiffStride(2.0)
    layer.freeze()
    store = {}
    layer.save_own_variables(store)
    store[name] = np.array(value)
    with pytest.raises(ValueError, match=f'`{name}`.*Received: {name}='):
        DiffStride(2.0).load_own_variables(store)
    if name != 'frozen_method':
        config = {**layer.get_config(), name: value}
        with pytest.raises(ValueError, match=f'`{name}`.*Received: {name}='):
            DiffStride.from_config(config)


def test_a_trained_model_is_loaded_and_trained_further(tmp_path):
    model = changed(sequential, False)
    model.compile('adam', 'sparse_categorical_crossentropy', run_eagerly=True)
    x, y = image((12, 17)), np.array([0, 1])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    assert_same_model(loaded, model)
    losses = [m.fit(x, y, verbose=0).history['loss'] for m in (loaded, model)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    strides = [m.get_layer('pool').strides.numpy() for m in (loaded, model)]
    np.testing.assert_allclose(*strides, rtol=1e-5)


@has_xla
def test_a_pinned_model_is_compiled_by_xla_when_loaded(tmp_path):
    model = changed(sequential, True)
    model.compile('adam', 'sparse_categorical_crossentropy', jit_compile=True)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    assert model.jit_compile is loaded.jit_compile is True


# Bad input


BAD_STRIDES = [
    0.5, 0, -2, (2, 0.99), (0.99, 2), float('inf'), float('nan'),
    (2, float('nan')), (float('-inf'), 2), (2,), (2, 2, 2), (), [3, 3, 3],
    'two', None, True, (2, None), (2, (3, 4)), 1j,
]  # fmt: skip


@pytest.mark.parametrize('strides', BAD_STRIDES, ids=str)
@every_layer
def test_bad_strides_are_refused(cls, strides):
    with pytest.raises(ValueError) as error:
        cls(strides=strides)
    message = str(error.value)
    assert '`strides`' in message
    assert 'must be' in message
    assert f'Received: strides={strides!r}' in message


@pytest.mark.parametrize(
    'cls, arguments, rule',
    [
        (DiffStride, {'smoothness_factor': 0}, 'above 0'),
        (DiffStride, {'smoothness_factor': -1.0}, 'above 0'),
        (DiffStride, {'smoothness_factor': float('nan')}, 'finite'),
        (DiffStride, {'smoothness_factor': float('inf')}, 'finite'),
        (DiffStride, {'smoothness_factor': None}, 'must be'),
        (DiffStride, {'smoothness_factor': True}, 'must be'),
        (DiffStride, {'lower_limit_stride': 0.99}, 'at least 1'),
        (DiffStride, {'lower_limit_stride': float('nan')}, 'finite'),
        (DiffStride, {'lower_limit_stride': (2, 2)}, 'a finite number'),
        (DiffStride, {'upper_limit_stride': 0}, 'at least 1'),
        (DiffStride, {'upper_limit_stride': -3.5}, 'at least 1'),
        (
            DiffStride,
            {'lower_limit_stride': 3, 'upper_limit_stride': 2.5},
            'must not exceed',
        ),
        (
            DiffStride,
            {'strides': (2.0, 3.5), 'upper_limit_stride': 3},
            'must lie between',
        ),
        (
            DiffStride,
            {'strides': (2.0, 3.5), 'lower_limit_stride': 2.5},
            'must lie between',
        ),
        (
            DiffStride,
            {'strides': (2.0, 3.5), 'shared_stride': True},
            'must be equal',
        ),
        (DiffStride, {'data_format': 'channels_lats'}, 'must be one of'),
        (DiffStride, {'data_format': ''}, 'must be one of'),
        (DiffStride, {'ramp': 'both'}, 'must be one of'),
        (DiffStride, {'ramp': None}, 'must be one of'),
        (
            DiffStride,
            {'ramp': 'straight_through', 'cropping': False},
            '`cropping` must be True',
        ),
        (DiffStride, {'cropping': 'no'}, 'must be one of'),
        (DiffStride, {'shared_stride': None}, 'must be one of'),
        (DiffStride, {'method': 'dct'}, 'must be one of'),
        (DiffStride, {'norm': 'mean'}, 'must be one of'),
        (FixedSpectralPooling, {'data_format': 'NHWC'}, 'must be one of'),
        (FixedSpectralPooling, {'data_format': ''}, 'must be one of'),
        (FixedSpectralPooling, {'method': 'FFT'}, 'must be one of'),
        (FixedSpectralPooling, {'norm': None}, 'must be one of'),
        (SpatialPooling, {'data_format': 'channels_lats'}, 'must be one of'),
        (SpatialPooling, {'strides': (2.0, 1.5)}, 'must be integers'),
        (SpatialPooling, {'pool_size': 0}, 'must be'),
        (SpatialPooling, {'pool_size': (2, 2, 2)}, 'must be'),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(cls, arguments, rule):
    with pytest.raises(ValueError) as error:
        cls(**arguments)
    message = str(error.value)
    assert rule in message
    assert 'Received' in message
    for name, value in arguments.items():
        assert name in message
        assert str(value) in message


@pytest.mark.parametrize(
    'shape, dtype, rule, received',
    [
        ((2, 8, 3), 'float32', 'ndim=4', '(2, 8, 3)'),
        ((2, 8, 8, 8, 3), 'float32', 'ndim=4', '(2, 8, 8, 8, 3)'),
        ((2, 0, 8, 3), 'float32', 'at least 1', '(2, 0, 8, 3)'),
        ((2, 8, 0, 3), 'float32', 'at least 1', '(2, 8, 0, 3)'),
        ((2, 8, 8, 3), 'int32', 'floating-point', 'int32'),
        ((2, 8, 8, 3), 'uint8', 'floating-point', 'uint8'),
        ((2, 8, 8, 3), 'bool', 'floating-point', 'bool'),
    ],
)
@pytest.mark.parametrize('mode', ['eager', 'traced', 'symbolic'])
@every_layer
def test_bad_inputs_are_refused(cls, mode, shape, dtype, rule, received):
    layer = cls(name='pool')
    x = ops.zeros(shape, dtype)
    if mode == 'traced':
        layer = traced(layer)
    if mode == 'symbolic':
        x = keras.KerasTensor(shape, dtype)
    with pytest.raises(ValueError) as error:
        layer(x)
    message = str(error.value)
    assert 'pool' in message
    assert rule in message
    assert received in message


@pytest.mark.parametrize(
    'rank, strides', [(1, (2, 2)), (1, [0.5]), (1, ()), (3, (2, 2)), (3, 0.9)]
)
@pytest.mark.parametrize('classes', [DIFFSTRIDES, FIXED])
def test_bad_strides_of_other_ranks_are_refused(classes, rank, strides):
    with pytest.raises(ValueError, match=f'or a sequence of {rank},') as error:
        classes[rank](strides)
    assert f'Received: strides={strides!r}' in str(error.value)


@pytest.mark.parametrize('mode', ['eager', 'symbolic'])
@pytest.mark.parametrize('rank', [1, 3])
@pytest.mark.parametrize('classes', [DIFFSTRIDES, FIXED])
def test_bad_inputs_of_other_ranks_are_refused(classes, rank, mode):
    make = ops.zeros if mode == 'eager' else keras.KerasTensor
    layer = classes[rank]()
    with pytest.raises(ValueError, match=f'must have ndim={rank + 2}'):
        layer(make((1, 8, 8, 1)))
    with pytest.raises(ValueError, match='at least 1'):
        layer(make((1, *[8] * (rank - 1), 0, 1)))


# One and three axes


OTHER_RANKS = {
    1: ((21,), (2.3,)),
    3: ((5, 16, 9), (1, 3.1, 1.6)),
}
every_other_rank = pytest.mark.parametrize(
    'classes, pool, rank',
    [
        (classes, pool, rank)
        for classes, pool in (
            (DIFFSTRIDES, reference.diffstride),
            (FIXED, reference.fixed_spectral_pooling),
        )
        for rank in OTHER_RANKS
    ],
)


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize('method', METHODS)
@every_other_rank
def test_other_ranks_agree_with_reference(
    classes, pool, rank, method, data_format
):
    sizes, strides = OTHER_RANKS[rank]
    layer = classes[rank](strides, method=method, data_format=data_format)
    x = image(sizes, data_format)
    expected = pool(x, strides, data_format=data_format)
    assert error_of(layer(x), expected) <= 2e-5
    # Linear: its gradient is the adjoint, here along a direction.
    weights = random(*expected.shape, seed=1)
    gradient, *_ = gradients_of(layer, x, weights)
    assert gradient.shape == x.shape
    direction = image(sizes, data_format, seed=2)
    along = np.sum(weights * pool(direction, strides, data_format=data_format))
    scale = np.linalg.norm(weights) * np.linalg.norm(direction)
    assert abs(np.sum(gradient * direction) - along) <= 1e-6 * scale


@pytest.mark.parametrize('data_format', FORMATS)
@every_other_rank
def test_shapes_of_other_ranks(classes, pool, rank, data_format):
    sizes, strides = OTHER_RANKS[rank]
    layer = classes[rank](strides, data_format=data_format)
    x = image(sizes, data_format, channels=5)
    y = pool(x, strides, data_format=data_format)
    is_first = data_format == 'channels_first'
    unknown = [None] * rank
    following = (None, 5, *unknown) if is_first else (None, *unknown, 5)
    known = (None, *y.shape[1:])
    inputs = keras.Input(x.shape[1:])
    if classes is DIFFSTRIDES:
        assert layer.compute_output_shape(x.shape)[1:] == following[1:]
        assert layer(inputs).shape == following
        layer.pin()
    assert layer.compute_output_shape((None, *x.shape[1:])) == known
    assert layer(inputs).shape == known
    assert error_of(graph(layer, data_format, channels=5)(x), y) <= 2e-5


@every_other_rank
def test_a_list_of_another_rank_is_pooled_as_its_maps_are(classes, pool, rank):
    sizes, strides = OTHER_RANKS[rank]
    layer = classes[rank](strides)
    maps = [ops.array(image(sizes, channels=c)) for c in (1, 3)]
    for x, y in zip(maps, layer(maps)):
        np.testing.assert_array_equal(y, layer(x))


@every_other_rank
def test_models_of_other_ranks_are_counted_saved_and_cloned(
    classes, pool, rank, tmp_path
):
    sizes, strides = OTHER_RANKS[rank]
    layer = classes[rank](strides, name='pool')
    model = keras.Sequential([keras.Input((*sizes, 2)), layer])
    x = image(sizes)
    y = pool(x, strides)
    macs, shape = 0, list(x.shape[1:])
    for axis in range(rank):
        size, shape[axis] = shape[axis], y.shape[axis + 1]
        if classes is DIFFSTRIDES or size != shape[axis]:
            macs += size * int(np.prod(shape))
    assert complexity(model, (*sizes, 2)).macs == macs
    if classes is DIFFSTRIDES:
        layer.strides.assign([s + 0.1 for s in strides])
        layer.pin()
    y = array(model(x))
    model.save(tmp_path / 'model.keras')
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for copy in (keras.models.load_model(tmp_path / 'model.keras'), clone):
        assert type(copy.get_layer('pool')) is classes[rank]
        assert np.array_equal(copy(x), y)


@pytest.mark.parametrize('rank', OTHER_RANKS)
@pytest.mark.parametrize('classes', [DIFFSTRIDES, FIXED])
def test_other_ranks_are_bound_by_gin(classes, rank):
    name = f'pooling.{classes[rank].__name__}'
    gin.parse_config(f'{name}.strides = 3.5')
    layer = gin.get_configurable(name)()
    assert np.array_equal(layer.strides, [3.5] * rank)


@pytest.mark.parametrize('rank', OTHER_RANKS)
def test_strides_of_other_ranks_are_learned(rank):
    pool = DIFFSTRIDES[rank](4.0, 2.0, ramp='inside')
    model = keras.Sequential([pool, keras.layers.Flatten()])
    model.compile(
        keras.optimizers.Adam(0.3),
        lambda y, x: -ops.mean(ops.square(x)),  # More for smaller strides.
        run_eagerly=True,
    )
    x = image((16,) * rank, channels=1)
    model.fit(x, np.zeros(2), epochs=4, verbose=0)
    assert pool.strides.shape == (rank,)
    assert np.all(pool.strides.numpy() < 3.5)


def test_stride_gradient_of_an_axis_whose_phases_exceed_int32():
    assert_stride_gradient('eager', (160_000,), (2.5,), channels=1)


def test_an_axis_too_long_for_exact_phases_is_refused():
    with pytest.raises(ValueError, match='at most 2\\^20'):
        DiffStride1D()(ops.zeros((1, 2**20 + 2, 1)))


# Lists of maps


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
@pytest.mark.parametrize('cls', [DiffStride, FixedSpectralPooling])
def test_a_list_is_pooled_as_its_maps_are(cls, data_format):
    layer = cls(3.0, data_format=data_format)
    maps = [ops.array(image((12, 15), data_format, channels=c)) for c in (1, 3)]
    pooled = layer(maps)
    assert isinstance(pooled, list)
    for x, y in zip(maps, pooled):
        np.testing.assert_array_equal(y, layer(x))
    assert layer.compute_output_shape([x.shape for x in maps]) == [
        layer.compute_output_shape(x.shape) for x in maps
    ]


def test_a_list_is_pooled_in_a_functional_model():
    inputs = [keras.Input((12, 12, channels)) for channels in (1, 2)]
    layer = FixedSpectralPooling(2)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == [(None, 6, 6, 1), (None, 6, 6, 2)]
    maps = [ops.array(image((12, 12), channels=c)) for c in (1, 2)]
    for x, y in zip(maps, model(maps)):
        np.testing.assert_allclose(y, layer(x), atol=1e-6)


@pytest.mark.parametrize(
    'shapes', [[], [(2, 8, 8, 3), (2, 8, 9, 3)], [(2, 8, 8, 3), (2, 8, 8)]]
)
@pytest.mark.parametrize('cls', [DiffStride, FixedSpectralPooling])
def test_a_list_of_unequal_maps_is_refused(cls, shapes):
    layer = cls(name='pool')
    with pytest.raises(ValueError, match='"pool" must'):
        layer([ops.zeros(shape) for shape in shapes])


@only('tensorflow', 'its compiler shows its programs')
@pytest.mark.parametrize('method', METHODS)
def test_xla_compiles_one_program_for_all_strides(method):
    import tensorflow as tf

    layer = DiffStride(2.0, method=method)
    layer.pin()
    x = ops.array(image((16, 16)))

    @tf.function(autograph=False, jit_compile=True)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = ops.sum(layer(x) ** 2)
        return tape.gradient(loss, layer.strides.value)

    programs = []
    for stride in (2.0, 2.3):
        layer.strides.assign([stride, stride])
        programs.append(gradients.experimental_get_compiler_ir(x)('hlo'))
    assert programs[0] == programs[1]
