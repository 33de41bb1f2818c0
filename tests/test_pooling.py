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
    FORMATS,
    array,
    compilers,
    dtype_of,
    error_of,
    gradients,
    image,
    of_any_image,
    only,
    random,
    skip_unless_there_is,
    some,
    traced,
)
from keras import ops

from diffstride import (
    DiffStride,
    DiffStride1D,
    DiffStride3D,
    FixedSpectralPooling,
    FixedSpectralPooling1D,
    FixedSpectralPooling3D,
    SpatialPooling,
    diffstride_layers,
)
from diffstride.ramps import RAMPS
from diffstride.resampling import METHODS, NORMS

# All methods, formats and norms; for each kind of a response some of them.
VARIANTS = list(itertools.product(METHODS, FORMATS, NORMS))
WIDTHS = (0.5, 1, 2.5, 4)
KINDS = [
    *itertools.product(RAMPS[:2], WIDTHS, (True,)),
    *itertools.product(RAMPS[:2], (4,), (False,)),
    ('straight_through', 2.5, True),
]

SIZES = (*range(1, 66), 224)
STRIDES = (1, 1.1, 1.25, 1.6, 2.2, 2.5, 3.3, 4.75, *range(2, 17))
GRID = list(itertools.product(SIZES, STRIDES))

DIFFSTRIDES = {1: DiffStride1D, 2: DiffStride, 3: DiffStride3D}
FIXED = {
    1: FixedSpectralPooling1D,
    2: FixedSpectralPooling,
    3: FixedSpectralPooling3D,
}
LAYERS = {
    'DiffStride': DiffStride,
    'FixedSpectralPooling': FixedSpectralPooling,
    'SpatialPooling': SpatialPooling,
}
every_layer = pytest.mark.parametrize('cls', LAYERS.values(), ids=LAYERS)


def pairs_of_axes(share, seed=0):
    """Yields sizes and strides of images: cases of the grid on both axes.

    Together they hold each case once, or 1 / share of the cases.
    """
    order = np.random.default_rng(seed).permutation(len(GRID))
    half = len(order) // 2
    for i, j in itertools.islice(zip(order, order[half:]), 0, half, share):
        yield zip(GRID[i], GRID[j])


# Values


def shares_of_the_grid(default, slow):
    return pytest.mark.parametrize(
        'share', [default, pytest.param(slow, marks=pytest.mark.slow)]
    )


def assert_values_on_the_grid(
    kind, share, variants, compile=lambda layer: layer
):
    ramp, width, cropping = kind
    seed = KINDS.index(kind)
    layers = []
    for method, data_format, norm in variants:
        arguments = {'method': method, 'data_format': data_format, 'norm': norm}
        layer = DiffStride(
            2.0, width, cropping=cropping, ramp=ramp, **arguments
        )
        layers.append((layer, compile(layer)))
    wrong = []
    for i, (sizes, strides) in some(enumerate(pairs_of_axes(share, seed))):
        layer, pool = layers[i % len(layers)]
        layer.strides.assign(strides)
        x = image(sizes, layer.data_format, batch=1, seed=i)
        expected = reference.diffstride(
            x,
            strides,
            width,
            ramp,
            layer.norm,
            cropping,
            data_format=layer.data_format,
        )
        error = error_of(pool(x), expected)
        if not error <= 2e-5:
            wrong.append((sizes, strides, layer.get_config(), error))
    assert not wrong


@shares_of_the_grid(40, slow=4)
@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_values_and_sizes_agree_with_reference(kind, share):
    assert_values_on_the_grid(kind, share, VARIANTS)


@only('tensorflow', 'graphs of unknown sizes')
@shares_of_the_grid(20, slow=2)
@pytest.mark.parametrize(
    'kind, variant',
    [
        (('outside', 4, True), ('auto', 'channels_last', 'forward')),
        (('outside', 0.5, True), ('fft', 'channels_first', 'ortho')),
        (('inside', 2.5, True), ('matmul', 'channels_first', 'backward')),
        (('inside', 4, False), ('matmul', 'channels_last', 'ortho')),
        (('straight_through', 2.5, True), ('fft', 'channels_last', 'backward')),
    ],
    ids=str,
)
def test_values_and_sizes_of_graphs_agree_with_reference(kind, variant, share):
    assert_values_on_the_grid(kind, share, [variant], of_any_image)


@shares_of_the_grid(20, slow=1)
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
    'limits', [(3, None), (None, 2.5), (1.2, 1.3), (20, 20)], ids=str
)
@pytest.mark.parametrize('ramp', RAMPS[:2])
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
    for strides in [(1, 2), (100, 1.25)]:
        layer.strides.assign(strides)
        y = reference.diffstride(
            x, strides, 2.5, ramp, lower=lower, upper=upper
        )
        assert error_of(layer(x), y) <= 2e-5


@pytest.mark.parametrize(
    'limits', [{'upper_limit_stride': 1.1}, {'lower_limit_stride': 1.3}]
)
def test_a_limit_stored_in_float32_is_within_the_limits(limits):
    ((_, limit),) = limits.items()
    strides = array(DiffStride(limit).strides)
    assert DiffStride(strides, **limits).strides.shape == (2,)


def test_a_shared_stride_is_used_on_both_axes():
    x = image((16, 21))
    layer, separate = DiffStride(2.2, shared_stride=True), DiffStride(2.2)
    assert layer.strides.shape == (1,)
    assert np.array_equal(array(layer(x)), array(separate(x)))
    weights = random(*separate(x).shape, seed=1)
    _, expected = gradients_of(separate, x, weights)
    _, actual = gradients_of(layer, x, weights)
    np.testing.assert_allclose(actual, [expected.sum()], rtol=1e-4)


@pytest.mark.parametrize('method', METHODS[1:])
def test_a_fixed_stride_of_one_is_the_identity(method):
    layer = FixedSpectralPooling(1, method=method)
    x = image((7, 24))
    assert np.array_equal(array(layer(x)), x)
    assert error_of(of_any_image(layer)(x), x) <= 2e-5


OTHER_RANKS = {1: ((21,), (2.3,)), 3: ((5, 16, 9), (1, 3.1, 1.6))}
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
@every_other_rank
def test_other_ranks_agree_with_reference(classes, pool, rank, data_format):
    sizes, strides = OTHER_RANKS[rank]
    layer = classes[rank](strides, data_format=data_format)
    x = image(sizes, data_format)
    expected = pool(x, strides, data_format=data_format)
    assert error_of(layer(x), expected) <= 2e-5
    # The operator is linear: its gradient is the adjoint.
    weights = random(*expected.shape, seed=1)
    gradient, *_ = gradients_of(layer, x, weights)
    direction = image(sizes, data_format, seed=2)
    along = np.sum(weights * pool(direction, strides, data_format=data_format))
    scale = np.linalg.norm(weights) * np.linalg.norm(direction)
    assert abs(np.sum(gradient * direction) - along) <= 1e-6 * scale


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize(
    'classes, rank', [(DIFFSTRIDES, 1), (DIFFSTRIDES, 2), (FIXED, 3)]
)
def test_a_list_is_pooled_as_its_maps_are(classes, rank, data_format):
    layer = classes[rank](3.0, data_format=data_format)
    sizes = (12, 15, 8)[:rank]
    maps = [ops.array(image(sizes, data_format, channels=c)) for c in (1, 3)]
    pooled = layer(maps)
    assert isinstance(pooled, list)
    for x, y in zip(maps, pooled):
        assert np.array_equal(array(y), array(layer(x)))
    symbolic = layer([keras.KerasTensor(x.shape) for x in maps])
    assert [y.shape for y in symbolic] == [
        layer.compute_output_shape(x.shape) for x in maps
    ]


@pytest.mark.parametrize('pool_size', [1, 2, (3, 2)])
@pytest.mark.parametrize('strides', [2, (3, 2)])
@pytest.mark.parametrize('data_format', FORMATS)
def test_spatial_pooling_is_the_mean_of_the_window(
    data_format, strides, pool_size
):
    if BACKEND == 'torch' and pool_size == (3, 2) and strides != 2:
        pytest.skip('Keras counts padding there for unequal windows')
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
        windows = [
            expected.take(range(max(s, 0), min(s + window, size)), axis)
            for s in starts
        ]
        expected = np.stack([w.mean(axis) for w in windows], axis)
    assert error_of(layer(x), expected) <= 1e-6


@every_layer
def test_an_empty_batch_has_an_empty_result(cls):
    for method in METHODS[1:] if cls is not SpatialPooling else [None]:
        layer = cls() if method is None else cls(method=method)
        y = layer(np.zeros((0, 32, 33, 2), 'float32'))
        one = layer(np.zeros((1, 32, 33, 2)))
        assert tuple(y.shape) == (0, *one.shape[1:])


# Sizes


def shape_of(sizes, data_format):
    first = data_format == 'channels_first'
    return (None, 5, *sizes) if first else (None, *sizes, 5)


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize(
    'make, is_static, sizes, expected',
    [
        (DiffStride, False, (32, 33), (None, None)),
        (DiffStride, True, (32, 33), (24, 26)),
        (DiffStride, True, (32, None), (24, None)),
        (DiffStride, False, (None, None), (None, None)),
        (lambda **k: DiffStride(cropping=False, **k), False, (9, 33), (9, 33)),
        (DiffStride1D, False, (33,), (None,)),
        (DiffStride3D, True, (8, None, 33), (8, None, 26)),
        (FixedSpectralPooling, False, (32, 33), (16, 16)),
        (FixedSpectralPooling, False, (None, 33), (None, 16)),
        (FixedSpectralPooling1D, False, (33,), (16,)),
        (FixedSpectralPooling3D, False, (9, 8, 33), (4, 4, 16)),
        (SpatialPooling, False, (32, 33), (16, 17)),
    ],
)
def test_symbolic_and_computed_shapes_agree(
    make, is_static, sizes, expected, data_format
):
    layer = make(strides=2, data_format=data_format)
    if is_static:
        layer.make_sizes_static()
    shape = shape_of(sizes, data_format)
    expected = shape_of(expected, data_format)
    assert layer.compute_output_shape(shape) == expected
    assert layer(keras.Input(shape[1:])).shape == expected


@only('tensorflow', 'graphs of unknown sizes')
@pytest.mark.parametrize(
    'cls, state, method, data_format, sizes',
    [
        (DiffStride, '', 'fft', 'channels_last', (None, None)),
        (DiffStride, '', 'matmul', 'channels_first', (None, None)),
        (DiffStride, 'hold', 'matmul', 'channels_last', (24, 26)),
        (DiffStride, 'hold', 'fft', 'channels_first', (24, 26)),
        (FixedSpectralPooling, '', 'fft', 'channels_last', (16, 16)),
        (FixedSpectralPooling, '', 'matmul', 'channels_first', (16, 16)),
    ],
)
def test_graphs_keep_the_sizes_that_are_known(
    cls, state, method, data_format, sizes
):
    import tensorflow as tf

    layer = cls(strides=2, method=method, data_format=data_format)
    if state:
        getattr(layer, state)()
    shape = tf.TensorSpec(shape_of((32, 33), data_format))
    y = traced(layer).get_concrete_function(shape).output_shapes
    assert tuple(y) == shape_of(sizes, data_format)


@pytest.mark.parametrize('ramp', RAMPS[:2])
def test_sizes_do_not_jump_by_rounding(ramp):
    """They are the exact ones where N / S is an integer."""
    layer = DiffStride(2.0, 2, ramp=ramp)
    pool = of_any_image(layer)
    cases = itertools.product((1.1, 1.6, 3.3), (11, 16, 33, 48, 66, 198))
    for stride, size in some(cases):
        layer.strides = stride
        clipped = reference.clip_stride(stride, size, 2, ramp)
        expected = reference.diffstride_size(size, clipped, 2, ramp)
        y = pool(image((size, size), batch=1))
        assert tuple(y.shape) == (1, expected, expected, 2), (stride, size)
        assert layer.output_size(size) == expected


def test_output_sizes_of_other_strides_are_told():
    """They are those of the clipped stride, whatever the layer has now."""
    layer = DiffStride((2.0, 3.0), upper_limit_stride=4.0)
    assert layer.output_size(32, 1) == 20
    assert layer.output_size(32, 1, stride=2.0) == 24
    assert layer.output_size(32, stride=100.0) == 16
    assert FixedSpectralPooling(2).output_size(32, stride=3.0) == 10


@pytest.mark.parametrize('ramp', RAMPS[:2])
def test_response_and_mask_are_those_of_the_operator(ramp):
    layer = DiffStride((1.6, 3.0), 2.5, ramp=ramp)
    sizes = 16, 13
    responses = []
    for index, (size, stride) in enumerate(zip(sizes, layer.stride_values)):
        kept = layer.output_size(size, index) // 2 + 1
        expected = np.zeros(size // 2 + 1)
        expected[:kept] = reference.diffstride_response(
            size, 2 * kept - 2, np.float32(stride), 2.5, ramp
        )
        response = layer.response(size, index)
        np.testing.assert_allclose(response, expected, atol=1e-6)
        frequencies = np.fft.fftshift(np.fft.fftfreq(size, 1 / size))
        responses.append(response[np.abs(frequencies).astype(int)])
    mask = layer.mask(sizes)
    assert np.array_equal(mask, np.outer(*responses).astype('float32'))
    assert FixedSpectralPooling(2.0).response(8).tolist() == [1, 1, 1, 0, 0]


# Gradients


def gradients_of(layer, x, weights, compiler='eager'):
    """Returns those of sum(weights * layer(x)), in x and in learned strides."""

    def both(x, weights):
        return gradients(
            lambda x: ops.sum(weights * layer(x)), [x], layer.trainable_weights
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
    if compiler == 'xla':
        layer.make_sizes_static()
    _, actual = gradients_of(layer, x, weights, compiler)
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
    # This is what float32 leaves where the sum cancels.
    tolerance += 1e-7 * np.linalg.norm(x) * np.linalg.norm(weights)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


STRIDE_GRADIENTS = [
    ((16, 21), (2.3, 3.1), {}),
    ((33, 20), (1.7, 5.3), {'smoothness_factor': 0.7, 'norm': 'backward'}),
    ((33, 20), (1.7, 5.3), {'smoothness_factor': 2.5, 'ramp': 'inside'}),
    ((9, 40), (1.23, 7.7), {'smoothness_factor': 100, 'ramp': 'inside'}),
    ((12, 17), (2.3, 3.1), {'cropping': False, 'norm': 'ortho'}),
    ((12, 17), (2.3, 3.1), {'cropping': False, 'ramp': 'inside'}),
    ((1, 24), (2.3, 3.1), {}),
    ((2, 3), (1.4, 1.3), {'smoothness_factor': 0.5}),
    # A frequency lies on a corner of the ramp.
    ((32, 16), (2, 2), {}),
    ((32, 16), (2, 2), {'ramp': 'inside'}),
    ((16, 32), (2, 4), {'smoothness_factor': 4, 'ramp': 'inside'}),
    ((24, 20), (2, 2.5), {'smoothness_factor': 0.5, 'norm': 'backward'}),
    ((32, 64), (2, 8), {'cropping': False}),
    # The stride is outside its limits.
    ((32, 16), (1, 0.5), {}),
    ((32, 16), (100, 20), {}),
    ((32, 16), (100, 20), {'ramp': 'inside'}),
    ((32, 16), (0.5, 0.5), {'ramp': 'inside'}),
    ((4, 6), (1, 1), {}),
    ((32, 16), (2, 8), {'lower_limit_stride': 3.1}),
    ((32, 16), (3, 8), {'upper_limit_stride': 2.3, 'ramp': 'inside'}),
    # The ramp is in the gradient alone.
    *(
        (*case, {'ramp': 'straight_through', 'smoothness_factor': width})
        for *case, width in [
            ((33, 20), (1.7, 5.3), 2.5),
            ((32, 24), (2, 3), 4),
            ((9, 40), (1.23, 7.7), 100),
            ((8, 8), (100, 1.05), 1),
        ]
    ),
    # Other ranks have strides, too.
    ((40,), (7.7,), {'ramp': 'inside', 'norm': 'ortho'}),
    ((40,), (2,), {}),
    ((5, 16, 9), (1.6, 3.1, 1.2), {}),
    ((4, 5, 6), (2.3, 1.7, 1), {'cropping': False}),
]


@pytest.mark.parametrize('case', range(len(STRIDE_GRADIENTS)))
def test_stride_gradient_agrees_with_reference(case):
    sizes, strides, arguments = STRIDE_GRADIENTS[case]
    assert_stride_gradient(
        'eager',
        sizes,
        strides,
        method=METHODS[1:][case % 2],
        data_format=FORMATS[case // 2 % 2],
        **arguments,
    )


@pytest.mark.parametrize('compiler', compilers('graph', 'xla'))
@pytest.mark.parametrize(
    'case, method, data_format',
    [(8, 'fft', 'channels_first'), (22, 'matmul', 'channels_last')],
)
def test_stride_gradient_agrees_with_reference_when_compiled(
    case, method, data_format, compiler
):
    sizes, strides, arguments = STRIDE_GRADIENTS[case]
    arguments = {**arguments, 'method': method, 'data_format': data_format}
    assert_stride_gradient(compiler, sizes, strides, **arguments)


def test_stride_gradient_of_an_axis_whose_phases_exceed_int32():
    assert_stride_gradient('eager', (160_000,), (2.5,), channels=1)


def test_an_axis_too_long_for_exact_phases_is_refused():
    with pytest.raises(ValueError, match='at most 2\\^20'):
        DiffStride1D()(ops.zeros((1, 2**20 + 2, 1)))


@pytest.mark.parametrize(
    'classes, compiler, method, data_format',
    [
        (DIFFSTRIDES, 'eager', 'fft', 'channels_last'),
        (DIFFSTRIDES, 'eager', 'matmul', 'channels_first'),
        (FIXED, 'eager', 'fft', 'channels_first'),
        (FIXED, 'eager', 'matmul', 'channels_last'),
        *(
            (DIFFSTRIDES, c, 'fft', 'channels_first')
            for c in compilers('graph')
        ),
        *(
            (DIFFSTRIDES, c, 'matmul', 'channels_last')
            for c in compilers('xla')
        ),
        *((FIXED, c, 'fft', 'channels_last') for c in compilers('xla')),
    ],
)
def test_input_gradient_is_the_transposed_operator(
    classes, compiler, method, data_format
):
    pool = reference.fixed_spectral_pooling
    if classes is DIFFSTRIDES:
        pool = reference.diffstride
    sizes, strides = (13, 24), (1.6, 3)
    # The operator is applied to a unit impulse at each position: [M, N].
    rows, columns = (
        pool(np.eye(size)[None], (stride,))[0]
        for size, stride in zip(sizes, strides)
    )
    x = image(sizes, data_format)
    weights = image((len(rows), len(columns)), data_format, seed=1)
    layer = classes[2](strides, method=method, data_format=data_format)
    if compiler == 'xla' and classes is DIFFSTRIDES:
        layer.make_sizes_static()
    actual, *_ = gradients_of(layer, x, weights, compiler)
    is_last = data_format == 'channels_last'
    equation = 'bpqc->bijc' if is_last else 'bcpq->bcij'
    expected = np.einsum('pi,qj,' + equation, rows, columns, weights)
    assert error_of(actual, expected) <= 2e-5


# Precision


@pytest.mark.parametrize(
    'make, method, policy, tolerance',
    [
        (DiffStride, 'fft', 'mixed_bfloat16', 2e-2),
        (DiffStride, 'matmul', 'bfloat16', 2e-2),
        (DiffStride, 'matmul', 'mixed_float16', 3e-3),
        (DiffStride, 'fft', 'float16', 3e-3),
        (FixedSpectralPooling, 'fft', 'bfloat16', 2e-2),
        (FixedSpectralPooling, 'matmul', 'mixed_float16', 3e-3),
        (FixedSpectralPooling, 'fft', 'float64', 1e-6),
    ],
)
def test_values_of_other_precisions_are_near_the_reference(
    make, policy, tolerance, method
):
    skip_unless_there_is(policy)
    x = image((24, 33))
    layer = make((2.2, 3), dtype=policy, method=method, norm='backward')
    expected = make((2.2, 3), norm='backward')(x)
    y = layer(ops.cast(x, layer.compute_dtype))
    assert dtype_of(y) == layer.compute_dtype == policy.removeprefix('mixed_')
    assert error_of(y, expected) <= tolerance
    assert all(weight.dtype == 'float32' for weight in layer.weights)
    symbolic = layer(keras.Input((24, 33, 2), dtype=layer.compute_dtype))
    assert dtype_of(symbolic) == layer.compute_dtype


@pytest.mark.parametrize('method', METHODS[1:])
def test_float64_takes_the_stride_as_it_is_stored(method):
    skip_unless_there_is('float64')
    x = image((24, 33))
    layer = DiffStride((2.2, 3.3), dtype='float64', method=method)
    y = reference.diffstride(x, layer.stride_values, sizes=(20, 18))
    assert dtype_of(layer(x)) == 'float64'
    assert error_of(layer(x), y) <= 1e-6


@pytest.mark.parametrize('floatx', ['float64', 'float16'])
@pytest.mark.parametrize('cls', [DiffStride, FixedSpectralPooling])
def test_floatx_does_not_matter_to_a_layer_of_float32(cls, floatx):
    layer, x = cls((2.2, 3), dtype='float32'), image((24, 33))
    expected = array(layer(x))
    keras.config.set_floatx(floatx)
    for pool in (cls((2.2, 3), dtype='float32'), of_any_image(layer)):
        y = pool(ops.array(x))
        assert dtype_of(y) == 'float32'
        assert error_of(y, expected) <= 2e-5


def test_a_numpy_image_of_float64_is_cast_to_the_policy():
    assert dtype_of(DiffStride()(np.ones((1, 8, 8, 1)))) == 'float32'


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


@pytest.mark.parametrize(
    'policy, method, eagerly',
    [
        ('float64', 'matmul', True),
        ('mixed_bfloat16', 'fft', True),
        ('bfloat16', 'matmul', True),
        pytest.param('mixed_float16', 'fft', False, marks=pytest.mark.slow),
        pytest.param('float64', 'fft', False, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_works_in_every_precision(policy, method, eagerly):
    skip_unless_there_is(policy)
    keras.config.set_dtype_policy(policy)
    pool = DiffStride((2.2, 3), method=method)
    model = classifier(pool)
    # On PyTorch Adam does not move a float32 weight among others of bfloat16.
    model.compile(
        keras.optimizers.SGD(0.1),
        'sparse_categorical_crossentropy',
        run_eagerly=eagerly,
    )
    before = array(pool.strides)
    history = model.fit(image((12, 12)), np.array([0, 1]), epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history['loss']))
    assert pool.strides.dtype == 'float32'
    assert np.all(np.isfinite(array(pool.strides)))
    assert not np.any(array(pool.strides) == before)


# Training


@only('tensorflow', 'graphs of unknown sizes')
def test_fit_works_on_images_of_any_size():
    import tensorflow as tf

    model = classifier(DiffStride((2, 3)))
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


@pytest.mark.parametrize('rank', DIFFSTRIDES)
def test_strides_of_every_rank_are_learned_in_a_subclassed_model(rank):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.pools = [DIFFSTRIDES[rank](4.0, 2.0, ramp='inside')]
            self.flatten = keras.layers.Flatten()

        def call(self, x):
            return self.flatten(self.pools[0](x))

    model = Subclassed()
    model.compile(
        keras.optimizers.Adam(0.3),
        lambda y, x: -ops.mean(ops.square(x)),  # Less for smaller strides.
        run_eagerly=True,
    )
    model.fit(image((16,) * rank, channels=1), np.zeros(2), epochs=4, verbose=0)
    (strides,) = model.trainable_variables
    assert strides.shape == (rank,)
    assert np.all(array(strides) < 3.5)


def test_regularizer_of_the_strides_is_a_loss_of_the_layer():
    """A shared stride counts for each axis."""
    l2 = keras.regularizers.L2(0.1)
    for arguments, loss in [
        ({'strides': (2, 3)}, 1.3),
        ({'strides': 3, 'shared_stride': True}, 1.8),
    ]:
        layer = DiffStride(strides_regularizer=l2, **arguments)
        layer(image((8, 8)))
        assert float(sum(layer.losses)) == pytest.approx(loss)


def test_untrainable_strides_have_no_trainable_variable():
    layer = DiffStride(2.0, trainable=False)
    assert layer.trainable_variables == []
    layer.trainable = True
    assert layer.trainable_variables == [layer.strides]


def test_layers_of_a_model_are_told_from_input_to_output():
    inner = keras.Sequential([DiffStride(3), DiffStride(4)])
    outer = keras.Sequential([DiffStride(2), inner, DiffStride(5)])
    layers = diffstride_layers(keras.Sequential([outer, DiffStride(6)]))
    assert [layer.initial_strides[0] for layer in layers] == [2, 3, 4, 5, 6]


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
    (DiffStride1D, {'strides': (2.5,), 'norm': 'ortho', 'name': 'pool'}),
    (DiffStride3D, {'strides': (1, 2.5, 3), 'data_format': 'channels_first'}),
    (FixedSpectralPooling1D, {'strides': [2.5], 'method': 'fft'}),
    (FixedSpectralPooling3D, {'strides': (1, 2.5, 3), 'norm': 'backward'}),
]


@pytest.mark.parametrize('cls, arguments', CONFIGS)
def test_config_round_trips_through_json(cls, arguments):
    layer = cls(**arguments)
    config = layer.get_config()
    text = json.dumps(keras.layers.serialize(layer))
    for copy in (
        cls.from_config(json.loads(json.dumps(config))),
        cls.from_config(config),
        keras.layers.deserialize(json.loads(text)),
    ):
        assert type(copy) is cls
        assert json.dumps(copy.get_config()) == json.dumps(config)
        for name, value in arguments.items():
            if name not in ('strides', 'strides_regularizer', 'dtype'):
                assert getattr(copy, name) == value
        for weight, expected in zip(copy.weights, layer.weights, strict=True):
            assert np.array_equal(array(weight), array(expected))


@every_layer
def test_config_tests_cover_every_argument(cls):
    covered = next(arguments for c, arguments in CONFIGS if c is cls)
    parameters = set(inspect.signature(cls).parameters) - {'kwargs'}
    assert parameters <= set(covered)
    assert parameters <= set(cls().get_config())


@pytest.mark.parametrize('rank', DIFFSTRIDES)
@pytest.mark.parametrize('classes', [DIFFSTRIDES, FIXED])
def test_arguments_are_bound_by_gin(classes, rank):
    name = f'pooling.{classes[rank].__name__}'
    gin.parse_config(f'{name}.strides = 3.5')
    layer = gin.get_configurable(name)()
    assert layer.stride_values == (3.5,) * rank


# Bad arguments and inputs


NAN, INFINITY = float('nan'), float('inf')
BAD_STRIDES = [
    0.5, 0, -2, (2, 0.99), INFINITY, NAN, (2, NAN), (-INFINITY, 2), (2,),
    (2, 2, 2), (), 'two', None, True, (2, None), (2, (3, 4)), 1j,
]  # fmt: skip
BAD_ARGUMENTS = [
    *((DiffStride, {'strides': s}, 'a sequence of 2') for s in BAD_STRIDES),
    (FixedSpectralPooling, {'strides': (0.5, 2)}, 'a sequence of 2'),
    (SpatialPooling, {'strides': (2, 2, 2)}, 'a sequence of 2'),
    (DiffStride1D, {'strides': (2, 2)}, 'a sequence of 1'),
    (DiffStride3D, {'strides': (2, 2)}, 'a sequence of 3'),
    (FixedSpectralPooling1D, {'strides': [0.5]}, 'a sequence of 1'),
    (FixedSpectralPooling3D, {'strides': 0.9}, 'a sequence of 3'),
    *(
        (DiffStride, {'smoothness_factor': width}, 'a finite number, above 0')
        for width in (0, -1.0, NAN, INFINITY, None, True, '4')
    ),
    *(
        (DiffStride, {'lower_limit_stride': s}, 'a finite number, at least 1')
        for s in (0.99, NAN, (2, 2), '2')
    ),
    *(
        (DiffStride, {'upper_limit_stride': s}, 'a finite number, at least 1')
        for s in (0, -3.5, INFINITY)
    ),
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
    (
        DiffStride,
        {'ramp': 'straight_through', 'cropping': False},
        '`cropping` must be True',
    ),
    *(
        (DiffStride, {name: value}, f'`{name}` must be one of')
        for name, value in [
            ('data_format', 'channels_lats'),
            ('data_format', ''),
            ('ramp', 'both'),
            ('ramp', None),
            ('cropping', 'no'),
            ('shared_stride', None),
            ('method', 'dct'),
            ('norm', 'mean'),
        ]
    ),
    *(
        (FixedSpectralPooling, {name: value}, f'`{name}` must be one of')
        for name, value in [
            ('data_format', 'NHWC'),
            ('method', 'FFT'),
            ('norm', None),
        ]
    ),
    (SpatialPooling, {'data_format': 'channels_lats'}, 'must be one of'),
    (SpatialPooling, {'strides': (2.0, 1.5)}, 'must be integers'),
    (SpatialPooling, {'pool_size': 0}, 'must be'),
]  # fmt: skip


@pytest.mark.parametrize('cls, arguments, rule', BAD_ARGUMENTS)
def test_bad_arguments_are_refused(cls, arguments, rule):
    with pytest.raises(ValueError) as error:
        cls(**arguments)
    message = str(error.value)
    assert rule in message
    assert 'Received' in message
    for name, value in arguments.items():
        assert name in message
        assert str(value) in message


BAD_INPUTS = [
    ((2, 8, 3), 'float32', 'ndim=4', '(2, 8, 3)'),
    ((2, 8, 8, 8, 3), 'float32', 'ndim=4', '(2, 8, 8, 8, 3)'),
    ((2, 0, 8, 3), 'float32', 'at least 1', '(2, 0, 8, 3)'),
    ((2, 8, 0, 3), 'float32', 'at least 1', '(2, 8, 0, 3)'),
    ((2, 8, 8, 3), 'int32', 'floating-point', 'int32'),
    ((2, 8, 8, 3), 'bool', 'floating-point', 'bool'),
]


@pytest.mark.parametrize('mode', ['eager', 'traced', 'symbolic'])
@every_layer
def test_bad_inputs_are_refused(cls, mode):
    layer = cls(name='pool')
    call = traced(layer) if mode == 'traced' else layer
    make = keras.KerasTensor if mode == 'symbolic' else ops.zeros
    for shape, dtype, rule, received in BAD_INPUTS:
        with pytest.raises(ValueError, match=rule) as error:
            call(make(shape, dtype))
        assert 'pool' in str(error.value)
        assert received in str(error.value)


@pytest.mark.parametrize(
    'cls, shape, rule',
    [
        (DiffStride1D, (1, 8, 8, 1), 'ndim=3'),
        (FixedSpectralPooling3D, (1, 8, 8, 1), 'ndim=5'),
        (DiffStride3D, (1, 8, 8, 0, 1), 'at least 1'),
        *(
            (cls, shapes, '"pool" must be at least one tensor, of equal')
            for cls in (DiffStride, FixedSpectralPooling)
            for shapes in ([], [(2, 8, 8, 3), (2, 8, 9, 3)])
        ),
        (DiffStride, [(2, 8, 8, 3), (2, 8, 8)], 'ndim=4'),
    ],
)
def test_bad_ranks_and_lists_are_refused(cls, shape, rule):
    is_list = isinstance(shape, list)
    inputs = list(map(ops.zeros, shape)) if is_list else ops.zeros(shape)
    with pytest.raises(ValueError, match=rule):
        cls(name='pool')(inputs)


# XLA


@only('tensorflow', 'its compiler shows its programs')
@pytest.mark.parametrize('method', METHODS[1:])
def test_xla_compiles_one_program_for_all_strides(method):
    import tensorflow as tf

    layer = DiffStride(2.0, method=method)
    layer.make_sizes_static()
    x = ops.array(image((16, 16)))

    @tf.function(autograph=False, jit_compile=True)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = ops.sum(layer(x) ** 2)
        return tape.gradient(loss, layer.strides.value)

    programs = []
    for stride in (2.0, 2.3):
        layer.strides = stride
        programs.append(gradients.experimental_get_compiler_ir(x)('hlo'))
    assert programs[0] == programs[1]
