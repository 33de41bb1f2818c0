"""The pooling layers, against the float64 reference and in Keras models."""

import inspect
import itertools
import json
from functools import partial

import gin
import keras
import numpy as np
import pytest
import reference
from backends import (
    BACKEND,
    COMPILERS,
    DIFFSTRIDES,
    EAGER,
    FIXED,
    FORMATS,
    USUAL,
    array,
    dtype_of,
    error_of,
    gradients,
    image,
    of_any_image,
    of_unknown_sizes,
    random,
    refusals,
    sequential,
    shape_of,
    skip_unless_there_is,
    some,
    traced,
)
from keras import ops

from diffstride import DiffStride, DiffStride1D, DiffStride3D, SpectralResizing
from diffstride.blurring import BlurPooling
from diffstride.pooling import FixedSpectralPooling, SpatialPooling
from diffstride.ramps import RAMPS
from diffstride.resampling import METHODS

SIZES = (*range(1, 66), 224)
STRIDES = (1, 1.1, 1.25, 1.6, 2.2, 2.5, 3.3, 4.75, *range(2, 17))
GRID = list(itertools.product(SIZES, STRIDES))

# Each ramp with and without cropping, and the brickwall.
KINDS = [
    (DiffStride, 'auto', 'channels_last', 'forward', {}),
    (DiffStride, 'fft', 'channels_first', 'ortho', {'smoothness_factor': 0.5}),
    (DiffStride, 'fft', 'channels_last', 'forward', {'cropping': False}),
    (DiffStride, 'matmul', 'channels_first', 'backward',
     {'ramp': 'inside', 'smoothness_factor': 2.5}),
    (DiffStride, 'matmul', 'channels_last', 'ortho',
     {'ramp': 'inside', 'cropping': False}),
    (DiffStride, 'fft', 'channels_last', 'backward',
     {'ramp': 'straight_through'}),
    (FixedSpectralPooling, 'auto', 'channels_first', 'backward', {}),
]  # fmt: skip


@pytest.mark.parametrize('share', [40, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', range(len(KINDS)))
def test_values_and_sizes_agree_with_reference(kind, share):
    """Those of 1 / share of the cases; on TensorFlow learned ones in graphs."""
    cls, method, data_format, norm, arguments = KINDS[kind]
    arguments = {**arguments, 'data_format': data_format, 'norm': norm}
    layer = cls(method=method, **arguments)
    graph = of_any_image(layer) if BACKEND == 'tensorflow' else None
    order = np.random.default_rng(kind).permutation(len(GRID))
    half = len(order) // 2
    for i, pair in some(enumerate(zip(order[:half:share], order[half::share]))):
        sizes, strides = zip(*(GRID[case] for case in pair))
        if cls is DiffStride:
            layer.strides.assign(strides)
            pool = graph or COMPILERS[USUAL](layer)
        else:
            layer = cls(strides, method=method, **arguments)
            pool = COMPILERS[USUAL](layer)
        x = image(sizes, data_format, batch=1, seed=i)
        error = error_of(pool(x), reference.of_layer(layer, x, strides))
        assert error <= 2e-5, (sizes, strides)


def test_a_limit_stored_in_float32_is_within_the_limits():
    for limit in (1.1, 1.3):  # Float32 rounds the first up, the other down.
        strides = array(DiffStride(limit).strides)
        DiffStride(strides, lower_limit_stride=limit, upper_limit_stride=limit)


@pytest.mark.parametrize('data_format', FORMATS)
@pytest.mark.parametrize('cls', [DiffStride1D, FIXED[3]])
def test_a_list_is_pooled_as_its_maps_are(cls, data_format):
    layer = cls(3.0, data_format=data_format)
    sizes = (12, 15, 8)[: cls.rank]
    maps = [ops.array(image(sizes, data_format, channels=c)) for c in (1, 3)]
    pooled = layer(maps)
    assert isinstance(pooled, list)
    for x, y in zip(maps, pooled):
        assert np.array_equal(array(y), array(layer(x)))
    # Sizes that are not known may be equal to others.
    shapes = shape_of([None] * cls.rank, data_format), tuple(maps[1].shape)
    symbolic = layer([keras.KerasTensor(shape) for shape in shapes])
    expected = [layer.compute_output_shape(shape) for shape in shapes]
    assert [y.shape for y in symbolic] == expected


@pytest.mark.parametrize('data_format', FORMATS)
def test_spatial_pooling_is_average_pooling_or_subsampling(data_format):
    x = image((11, 8), data_format)
    kwargs = {'strides': (2, 3), 'data_format': data_format}
    average = keras.layers.AveragePooling2D((3, 2), padding='same', **kwargs)
    y = SpatialPooling((3, 2), **kwargs)(x)
    assert np.array_equal(array(y), array(average(x)))
    y = SpatialPooling(**kwargs)(x)
    is_first = data_format == 'channels_first'
    subsampled = x[:, :, ::2, ::3] if is_first else x[:, ::2, ::3]
    assert np.array_equal(array(y), subsampled)


@pytest.mark.parametrize('method', METHODS[1:])
def test_an_empty_batch_has_an_empty_result(method):
    for layer in DiffStride(method=method), SpectralResizing((24, 26)):
        y = layer(np.zeros((0, 32, 33, 2), 'float32'))
        assert tuple(y.shape) == (0, 24, 26, 2), layer


@pytest.mark.parametrize('data_format, method', [*zip(FORMATS, METHODS[1:])])
@pytest.mark.parametrize(
    'make, state, sizes, expected',
    [
        (DiffStride, 'release', (32, 33), (None, None)),
        (DiffStride, 'make_sizes_static', (33, 32), (26, 24)),
        (DiffStride, 'hold', (32, 33), (24, 26)),
        (partial(DiffStride, cropping=False), 'release', (9, 33), (9, 33)),
        (DiffStride3D, 'hold', (8, None, 33), (8, None, 26)),
        (FixedSpectralPooling, None, (32, 33), (16, 16)),
        (FixedSpectralPooling, None, (None, 33), (None, 16)),
        (FIXED[3], None, (9, 8, 33), (4, 4, 16)),
        (SpatialPooling, None, (32, 33), (16, 17)),
    ],
)
def test_shapes_are_told(make, state, sizes, expected, data_format, method):
    kwargs = {} if make is SpatialPooling else {'method': method}
    layer = make(strides=2, data_format=data_format, **kwargs)
    if state:
        getattr(layer, state)()
    shape = shape_of(sizes, data_format)
    expected = shape_of(expected, data_format)
    assert layer.compute_output_shape(shape) == expected
    assert layer(keras.Input(shape[1:])).shape == expected
    if BACKEND == 'tensorflow' and sizes == (32, 33):  # Graphs know them, too.
        pool = of_unknown_sizes(layer, (shape, 'float32'))
        assert tuple(pool.get_concrete_function().output_shapes) == expected


@pytest.mark.parametrize('ramp', RAMPS[:2])
def test_the_mask_is_that_of_the_operator(ramp):
    layer = DiffStride((1.6, 3.0), 2.5, ramp=ramp)
    whole = DiffStride((1.6, 3.0), 2.5, ramp=ramp, cropping=False)
    x = image((16, 13)).astype('float64')
    mask = np.fft.ifftshift(layer.mask((16, 13)))[:, :, None]
    masked = np.fft.ifft2(np.fft.fft2(x, axes=(1, 2)) * mask, axes=(1, 2))
    expected = reference.of_layer(whole, x)
    np.testing.assert_allclose(masked, expected, atol=1e-6)
    fixed = FixedSpectralPooling((1.0, 2.0)).mask((1, 8))
    assert fixed.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]


STRAIGHT = {'ramp': 'straight_through'}
# The spatial sizes, the strides and other arguments.
CASES = [
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
    ((32, 16), (2, 8), {'strides': 9, 'lower_limit_stride': 9}),
    ((32, 16), (3, 8), {'strides': 1.1, 'upper_limit_stride': 1.1}),
    # The ramp is in the gradient alone.
    ((33, 20), (1.7, 5.3), {**STRAIGHT, 'smoothness_factor': 2.5}),
    ((32, 24), (2, 3), {**STRAIGHT, 'smoothness_factor': 4}),
    ((9, 40), (1.23, 7.7), {**STRAIGHT, 'smoothness_factor': 100}),
    ((8, 8), (100, 1.05), {**STRAIGHT, 'smoothness_factor': 1}),
    # Other ranks have strides, too.
    ((40,), (7.7,), {'ramp': 'inside', 'norm': 'ortho'}),
    ((40,), (2,), {}),
    ((5, 16, 9), (1.6, 3.1, 1.2), {}),
    ((4, 5, 6), (2.3, 1.7, 1), {'cropping': False}),
    # The phases of this axis exceed int32.
    ((160_000,), (2.5,), {}),
    # Nothing is learned, or one stride for both axes.
    ((21,), (2.3,), None),
    ((16, 21), (2.2, 2.2), {'shared_stride': True}),
    ((5, 16, 9), (1, 3.1, 2), None),
    ((13, 24), (1.6, 3), None),
]


@pytest.mark.parametrize(
    'case, method, data_format, compiler',
    [
        *(
            (case, METHODS[1:][case % 2], FORMATS[case // 2 % 2], USUAL)
            for case in range(0, len(CASES), 3 if BACKEND == 'jax' else 1)
        ),
        *((case, 'fft', FORMATS[1], x) for case in (8, 32) for x in COMPILERS),
        *((22, 'matmul', 'channels_last', compiler) for compiler in COMPILERS),
    ],
)
def test_values_and_gradients_are_right(case, method, data_format, compiler):
    """The operator is linear, so its gradient is its adjoint."""
    sizes, strides, arguments = CASES[case]
    kwargs = {'method': method, 'data_format': data_format}
    is_learned = arguments is not None
    if is_learned:
        layer = DIFFSTRIDES[len(sizes)](**arguments, **kwargs)
        layer.strides.assign(strides[: layer.strides.shape[0]])
        if (compiler, BACKEND) == ('xla', 'tensorflow'):
            layer.make_sizes_static()
    else:
        layer = FIXED[len(sizes)](strides, **kwargs)
    x, direction = (image(sizes, data_format, seed=i) for i in (0, 2))
    expected = reference.of_layer(layer, x, strides)
    weights = random(*expected.shape, seed=1)

    def outputs(x, weights):
        variables = layer.trainable_variables
        loss = gradients(lambda x: ops.sum(weights * layer(x)), [x], variables)
        return [layer(x), *loss]

    outputs = COMPILERS[compiler](outputs)(ops.array(x), ops.array(weights))
    y, gradient, *actual = map(array, outputs)
    assert error_of(y, expected) <= 2e-5
    along = np.sum(weights * reference.of_layer(layer, direction, strides))
    scale = np.linalg.norm(weights) * np.linalg.norm(direction)
    assert gradient.shape == x.shape
    assert abs(np.sum(gradient * direction) - along) <= 1e-6 * scale
    assert len(actual) == is_learned
    if is_learned:
        expected = reference.stride_gradient_of_layer(
            layer, x, weights, strides
        )
        if layer.shared_stride:
            expected = expected.sum(keepdims=True)
        tolerance = 2e-3 * np.abs(expected).max()
        # This is what float32 leaves where the sum cancels.
        tolerance += 1e-7 * np.linalg.norm(x) * np.linalg.norm(weights)
        np.testing.assert_allclose(actual[0], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    'make, method, policy, floatx, tolerance',
    [
        (DiffStride, 'fft', 'mixed_bfloat16', 'float32', 2e-2),
        (DiffStride, 'matmul', 'bfloat16', 'float32', 2e-2),
        (DiffStride, 'matmul', 'mixed_float16', 'float32', 3e-3),
        (DiffStride, 'fft', 'float64', 'float32', 1e-6),
        (DiffStride, 'auto', 'float32', 'float64', 2e-5),
        (FixedSpectralPooling, 'fft', 'float16', 'float32', 3e-3),
        (FixedSpectralPooling, 'matmul', 'float64', 'float32', 1e-12),
        (FixedSpectralPooling, 'fft', 'float64', 'float32', 1e-12),
        (FixedSpectralPooling, 'auto', 'float32', 'float16', 2e-5),
    ],
)
def test_values_in_other_precisions(make, method, policy, floatx, tolerance):
    """In float64, the stride is taken as it is stored."""
    skip_unless_there_is(policy)
    keras.config.set_floatx(floatx)
    x = image((24, 33))
    layer = make((2.2, 3), dtype=policy, method=method, norm='backward')
    dtype = policy.removeprefix('mixed_')
    pools = [layer, of_any_image(layer)] if dtype == 'float32' else [layer]
    for pool in pools:
        y = pool(ops.cast(x, dtype))
        assert dtype_of(y) == layer.compute_dtype == dtype
        assert error_of(y, reference.of_layer(layer, x)) <= tolerance
    assert all(weight.dtype == 'float32' for weight in layer.weights)
    symbolic = layer(keras.Input((24, 33, 2), dtype=dtype))
    assert dtype_of(symbolic) == dtype
    assert dtype_of(layer(x.astype('float64'))) == dtype


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
    conv = keras.layers.Conv2D(4, 3, padding='same')
    pool = DiffStride((2.2, 3), method=method)
    rest = keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D()
    dense = keras.layers.Dense(3, activation='softmax', dtype='float32')
    model = sequential((None, None, 2), conv, pool, *rest, dense)
    # On PyTorch Adam does not move a float32 weight among others of bfloat16.
    eagerly = eagerly and EAGER
    model.compile(keras.optimizers.SGD(0.1), 'mse', run_eagerly=eagerly)
    before = array(pool.strides)
    history = model.fit(image((12, 12)), np.eye(2, 3), epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history['loss']))
    assert pool.strides.dtype == 'float32'
    assert np.all(np.isfinite(array(pool.strides)))
    assert not np.any(array(pool.strides) == before)


COMMON = {'data_format': 'channels_first', 'name': 'pool', 'dtype': 'float64'}
SPECTRAL = {**COMMON, 'method': 'fft', 'norm': 'ortho'}
# The first five have all arguments of their classes.
CONFIGS = [
    (DiffStride,
     {**SPECTRAL, 'strides': (2.5, 3.0), 'smoothness_factor': 2.0,
      'ramp': 'inside', 'cropping': False, 'trainable': False,
      'shared_stride': False, 'lower_limit_stride': 1.5,
      'upper_limit_stride': 4, 'strides_regularizer': 'l2'}),
    (FixedSpectralPooling, {**SPECTRAL, 'strides': (2.5, 3.0)}),
    (SpatialPooling, {**COMMON, 'pool_size': (2, 3), 'strides': (3, 4)}),
    (SpectralResizing, {**SPECTRAL, 'size': (5, 8)}),
    (BlurPooling,
     {**COMMON, 'strides': (3, 4), 'kernel_size': 5, 'pool_size': 2}),
    (SpectralResizing, {}),
    (DiffStride, {'strides': 3, 'shared_stride': True}),
    (DiffStride,
     {'strides': np.array([2, 3]), 'smoothness_factor': np.float32(1.5),
      'lower_limit_stride': np.int64(2)}),
    (DiffStride3D, {'strides': (1, 2.5, 3), 'data_format': 'channels_first'}),
]  # fmt: skip


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


@pytest.mark.parametrize('cls, covered', CONFIGS[:5])
def test_config_tests_cover_every_argument(cls, covered):
    parameters = set(inspect.signature(cls).parameters) - {'kwargs'}
    assert parameters <= set(covered)
    assert parameters <= set(cls().get_config())


def test_arguments_are_bound_by_gin():
    for cls in (*DIFFSTRIDES.values(), *FIXED.values()):
        name = f'pooling.{cls.__name__}'
        gin.parse_config(f'{name}.strides = 3.5')
        assert gin.get_configurable(name)().stride_values == (3.5,) * cls.rank
    gin.parse_config('resizing.SpectralResizing.size = (5, 8)')
    assert gin.get_configurable('resizing.SpectralResizing')().size == (5, 8)


NAN, INFINITY = float('nan'), float('inf')
# The class, the name of an argument, values that are refused, and the rule.
BAD_VALUES = [
    (DiffStride, 'strides',
     [0.5, 0, -2, (2, 0.99), INFINITY, NAN, (2, NAN), (-INFINITY, 2), (2,),
      (2, 2, 2), (), 'two', None, True, (2, None), (2, (3, 4)), 1j],
     'a sequence of 2'),
    (FixedSpectralPooling, 'strides', [(0.5, 2)], 'a sequence of 2'),
    (SpatialPooling, 'strides', [(2, 2, 2)], 'a sequence of 2'),
    (SpatialPooling, 'strides', [(2.0, 1.5)], 'must be integers'),
    (DiffStride3D, 'strides', [(2, 2)], 'a sequence of 3'),
    (DiffStride, 'smoothness_factor',
     [0, -1.0, NAN, INFINITY, None, True, '4'], 'a finite number, above 0'),
    (DiffStride, 'lower_limit_stride', [0.99, NAN, (2, 2), '2'],
     'a finite number, at least 1'),
    (DiffStride, 'upper_limit_stride', [0, -3.5, INFINITY],
     'a finite number, at least 1'),
    (DiffStride, 'data_format', ['channels_lats', ''], 'must be one of'),
    (DiffStride, 'ramp', ['both', None], 'must be one of'),
    (DiffStride, 'cropping', ['no'], 'must be True or False'),
    (DiffStride, 'shared_stride', [None], 'must be True or False'),
    (DiffStride, 'method', ['dct'], 'must be one of'),
    (DiffStride, 'norm', ['mean'], 'must be one of'),
    (SpectralResizing, 'size',
     [0, 2.0, True, 'two', (), (4, 0), (2, 2, 2, 2)],
     'must be an integer or one to three integers'),
    (BlurPooling, 'strides', [1.5], 'of BlurPooling must be integers'),
    (BlurPooling, 'kernel_size', [4], 'must be None or an odd integer'),
    (BlurPooling, 'pool_size', [0], 'must be an integer, at least 1'),
    (BlurPooling, 'data_format', ['last'], 'must be one of'),
]  # fmt: skip
BAD_PAIRS = [
    ({'lower_limit_stride': 3, 'upper_limit_stride': 2.5}, 'must not exceed'),
    ({'strides': (2.0, 3.5), 'upper_limit_stride': 3}, 'must lie between'),
    ({'strides': (2.0, 3.5), 'lower_limit_stride': 2.5}, 'must lie between'),
    ({'strides': (2.0, 3.5), 'shared_stride': True}, 'must be equal'),
    ({'ramp': 'straight_through', 'cropping': False}, '`cropping` must be'),
]
BAD = [(DiffStride, *pair) for pair in BAD_PAIRS]
for cls, name, values, rule in BAD_VALUES:
    BAD += [(cls, {name: value}, rule) for value in values]


@pytest.mark.parametrize('cls, arguments, rule', BAD)
def test_bad_arguments_are_refused(cls, arguments, rule):
    with pytest.raises(ValueError) as error:
        cls(**arguments)
    message = str(error.value)
    assert rule in message
    assert 'Received' in message
    for name, value in arguments.items():
        assert name in message
        assert str(value) in message


test_bad_sizes_are_refused = refusals(
    (lambda: DiffStride().output_size(0), '`size` must be an integer'),
    (lambda: DiffStride().output_size(2.5), '`size` must be an integer'),
    (lambda: DiffStride().output_size(np.int64(0)), '`size` must be an int'),
    # The phases of a longer axis would exceed int32.
    (lambda: DiffStride1D()(ops.zeros((1, 2**20 + 2, 1))), 'at most 2\\^20'),
)


def test_fixed_strides_are_not_assigned():
    layer = FixedSpectralPooling(2.0)
    with pytest.raises(AttributeError):
        layer.strides = (4.0, 4.0)
    assert layer.strides == (2.0, 2.0)


RESIZING = partial(SpectralResizing, 4)
SHAPE = (2, 8, 8, 3)
NOT_ONE, NOT_TWO = 'not with a list', 'a list .x, like., or have a `size`'
NOT_EQUAL = 'at least one tensor, of equal'


@pytest.mark.parametrize('mode', ['eager', 'traced', 'symbolic'])
@pytest.mark.parametrize(
    'cls, shape, dtype, rule',
    [
        (DiffStride, (2, 8, 3), 'float32', r'ndim=4.*\(2, 8, 3\)'),
        (DiffStride1D, (1, 8, 8, 1), 'float32', 'ndim=3'),
        (DiffStride, (2, 0, 8, 3), 'float32', r'at least 1.*\(2, 0, 8, 3\)'),
        (DiffStride3D, (1, 8, 8, 0, 1), 'float32', 'at least 1'),
        (FixedSpectralPooling, SHAPE, 'int32', 'floating-point.*int32'),
        (SpatialPooling, SHAPE, 'bool', 'floating-point.*bool'),
        (FixedSpectralPooling, [SHAPE, (2, 8, 9, 3)], 'float32', NOT_EQUAL),
        (DiffStride, [SHAPE, (2, 8, 8)], 'float32', 'ndim=4'),
        (DiffStride, [], 'float32', NOT_EQUAL),
        (BlurPooling, (2, 8, 3), 'float32', 'ndim=4'),
        (partial(BlurPooling, (4, 2)), (1, 3, 9, 8), 'float32',
         r'exceed half of the filter, \(3, 1\)'),
        (SpectralResizing, SHAPE, 'float32', NOT_TWO),
        (SpectralResizing, [], 'float32', NOT_TWO),
        (SpectralResizing, [SHAPE] * 3, 'float32', NOT_TWO),
        (RESIZING, [SHAPE, SHAPE], 'float32', NOT_ONE),
        (RESIZING, (2, 8), 'float32', 'ndim=3 or 4 or 5'),
        (RESIZING, (2, 4, 4, 4, 4, 1), 'float32', 'ndim=3 or 4 or 5'),
        (partial(SpectralResizing, (4, 4)), (2, 8, 3), 'float32', 'ndim=4'),
        (RESIZING, SHAPE, 'int32', 'floating-point'),
        (SpectralResizing, [SHAPE, (2, 8, 8)], 'float32', 'second .* ndim=4'),
        (SpectralResizing, [SHAPE, (2, 8, 0, 3)], 'float32',
         'second input .* at least 1'),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(cls, shape, dtype, rule, mode):
    layer = cls(name='pool')
    call = traced(layer) if mode == 'traced' else layer
    make = keras.KerasTensor if mode == 'symbolic' else ops.zeros
    is_list = isinstance(shape, list)
    inputs = [make(x, dtype) for x in shape] if is_list else make(shape, dtype)
    for _ in range(2):  # It may refuse when it is built, and after that.
        with pytest.raises(ValueError, match=rule) as error:
            call(inputs)
        assert 'pool' in str(error.value)
