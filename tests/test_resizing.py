"""Resizing against the float64 reference, and where its sizes come from."""

import inspect
import json

import gin
import keras
import numpy as np
import pytest
import reference
from backends import (
    COMPILERS,
    compilers,
    gradients,
    of_unknown_sizes,
    skip_unless_there_is,
)
from keras import layers, ops

from diffstride import DiffStride, SpectralResizing, complexity

FORMATS = ('channels_last', 'channels_first')
METHODS = ('fft', 'matmul')
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
]


def random(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype('float32')


def maps(sizes, data_format='channels_last', batch=2, channels=3, seed=0):
    is_last = data_format == 'channels_last'
    shape = (*sizes, channels) if is_last else (channels, *sizes)
    return random(batch, *shape, seed=seed)


def resized(x, sizes, norm='forward', data_format='channels_last'):
    """The operator with a response of 1, float64."""
    for axis, size in zip(reference._axes(x, data_format), sizes):
        x = reference.resample(x, axis, size, np.ones(size // 2 + 1), norm)
    return x


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), 'float64')


def error_of(actual, expected):
    """Largest difference relative to the largest value, inf if shapes differ.

    NaN counts as infinitely wrong.
    """
    actual, expected = array(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return np.inf
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return error if np.isfinite(error) else np.inf


every_pair_of_sizes = pytest.mark.parametrize('sizes, new_sizes', SIZES)


# Values


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('data_format', FORMATS)
@every_pair_of_sizes
def test_values_agree_with_reference(sizes, new_sizes, data_format, method):
    x = maps(sizes, data_format)
    like = maps(new_sizes, data_format, batch=1, channels=5).astype('int32')
    for norm in ('forward', 'backward', 'ortho'):
        arguments = {'data_format': data_format, 'method': method, 'norm': norm}
        expected = resized(x, new_sizes, norm, data_format)
        y = SpectralResizing(new_sizes, **arguments)(x)
        assert error_of(y, expected) <= 1e-6
        y = SpectralResizing(**arguments)([x, like])
        assert error_of(y, expected) <= 1e-6


def wave(size):
    """A signal with frequencies up to 3 at `size` points of its period."""
    t = np.arange(size) / size
    return 2 + sum(np.cos(2 * np.pi * (f * t + 0.1 * f)) for f in (1, 2, 3))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('size', [7, 8, 15, 64])
@pytest.mark.parametrize('new_size', [7, 8, 20, 33])
def test_band_limited_signals_are_resized_exactly(size, new_size, method):
    y = SpectralResizing(new_size, method=method)(wave(size)[None, :, None])
    assert error_of(y, wave(new_size)[None, :, None]) <= 1e-6


def test_an_integer_is_the_size_of_every_axis():
    for sizes in [(9,), (9, 4), (4, 9, 5)]:
        x = maps(sizes)
        y = SpectralResizing(6)(x)
        assert error_of(y, resized(x, [6] * len(sizes))) <= 1e-6


def test_sizes_that_are_met_change_nothing():
    x = maps((7, 6))
    assert np.array_equal(ops.convert_to_numpy(SpectralResizing((7, 6))(x)), x)


def test_long_axes_are_resized_by_the_method_of_least_time():
    x = maps((3000,), batch=1, channels=1)
    assert error_of(SpectralResizing(4000)(x), resized(x, [4000])) <= 1e-6


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'policy, tolerance',
    [('float64', 1e-12), ('mixed_bfloat16', 2e-2), ('float16', 3e-3)],
)
def test_other_precisions(policy, tolerance, method):
    skip_unless_there_is(policy)
    x = maps((8, 13))
    layer = SpectralResizing((20, 6), method=method, dtype=policy)
    y = layer(ops.cast(x, layer.compute_dtype))
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    y = ops.cast(y, 'float64' if policy == 'float64' else 'float32')
    assert error_of(y, resized(x, (20, 6))) <= tolerance


# Gradients


def gradients_of(layer, x, like, weights, compiler='eager'):
    """Gradients of sum(weights * layer([x, like])) in x and in like."""
    resize = COMPILERS[compiler](lambda x, like: layer([x, like]))
    weights = ops.convert_to_tensor(weights)
    return gradients(lambda *xs: ops.sum(weights * resize(*xs)), [x, like])


@pytest.mark.parametrize(
    'compiler, method',
    [
        *(('eager', method) for method in METHODS),
        *((name, 'fft') for name in compilers('graph', 'xla')),
        *((name, 'matmul') for name in compilers('xla')),
    ],
)
def test_gradient_is_the_transposed_operator(compiler, method):
    # The operator applied to a unit impulse at each position: [M, N].
    rows, columns = (
        resized(np.eye(size)[None], [new_size])[0]
        for size, new_size in ((8, 20), (13, 6))
    )
    weights = maps((20, 6), seed=1)
    layer = SpectralResizing(method=method)
    of_x, of_like = gradients_of(
        layer, maps((8, 13)), maps((20, 6)), weights, compiler
    )
    expected = np.einsum('pi,qj,bpqc->bijc', rows, columns, weights)
    assert error_of(of_x, expected) <= 2e-6
    assert of_like is None or not np.any(ops.convert_to_numpy(of_like))


# Sizes


@pytest.mark.parametrize('data_format', FORMATS)
@every_pair_of_sizes
def test_static_shapes_are_told(sizes, new_sizes, data_format):
    x = maps(sizes, data_format).shape[1:]
    like = maps(new_sizes, data_format, channels=5).shape[1:]
    expected = (None, *maps(new_sizes, data_format).shape[1:])
    by_size = SpectralResizing(new_sizes, data_format)
    by_like = SpectralResizing(data_format=data_format)
    inputs = keras.Input(x), keras.Input(like)
    assert by_size.compute_output_shape((None, *x)) == expected
    assert by_size(inputs[0]).shape == expected
    shapes = [(None, *x), (7, *like)]
    assert by_like.compute_output_shape(shapes) == expected
    assert by_like(list(inputs)).shape == expected


def test_shapes_that_are_not_known_of_like_are_not_told():
    x, like = keras.Input((8, None, 3)), keras.Input((None, 9, 5))
    assert SpectralResizing()([x, like]).shape == (None, None, 9, 3)
    assert SpectralResizing()([like, x]).shape == (None, 8, None, 5)
    assert SpectralResizing(4)(like).shape == (None, 4, 4, 5)


@pytest.mark.parametrize('data_format', FORMATS)
@every_pair_of_sizes
def test_graphs_follow_sizes_known_when_they_run(sizes, new_sizes, data_format):
    x = maps(sizes, data_format)
    like = maps(new_sizes, data_format, channels=5)
    shapes = [[None] * x.ndim, [None] * x.ndim]
    for shape, tensor in zip(shapes, (x, like)):
        axis = -1 if data_format == 'channels_last' else 1
        shape[axis] = tensor.shape[axis]
    layer = SpectralResizing(data_format=data_format)
    resize = of_unknown_sizes(
        lambda x, like: layer([x, like]),
        *((shape, 'float32') for shape in shapes),
    )
    expected = resized(x, new_sizes, data_format=data_format)
    actual = resize(*map(ops.convert_to_tensor, (x, like)))
    assert error_of(actual, expected) <= 1e-6


def meeting(**arguments):
    """What DiffStride shrank, on the grid of its input, and the reverse."""
    inputs = keras.Input((12, 15, 2))
    pooled = DiffStride(3.0, 2.0, name='pool')(inputs)
    outputs = [
        SpectralResizing(**arguments)([pooled, inputs]),
        SpectralResizing(**arguments)([inputs, pooled]),
    ]
    return keras.Model(inputs, outputs)


def test_sizes_follow_a_learned_stride():
    model = meeting()
    assert model.output_shape[0] == (None, 12, 15, 2)
    x = maps((12, 15), channels=2)
    for strides in [(3.0, 2.0), (1.5, 4.5)]:
        model.get_layer('pool').strides.assign(strides)
        pooled = reference.diffstride(x, strides, 2.0)
        back, shrunk = model(x)
        assert error_of(back, resized(pooled, (12, 15))) <= 1e-5
        assert error_of(shrunk, resized(x, pooled.shape[1:3])) <= 1e-5


# Models


CONFIGS = [
    {},
    {'size': 5, 'norm': 'ortho'},
    {
        'size': np.array([5, 8]),
        'data_format': 'channels_first',
        'method': 'fft',
        'norm': 'backward',
        'dtype': 'float64',
        'name': 'resize',
    },
]


@pytest.mark.parametrize('arguments', CONFIGS)
def test_config_round_trips_through_json(arguments):
    layer = SpectralResizing(**arguments)
    config = layer.get_config()
    text = json.dumps(keras.layers.serialize(layer))
    for copy in (
        SpectralResizing.from_config(json.loads(json.dumps(config))),
        keras.layers.deserialize(json.loads(text)),
    ):
        assert type(copy) is SpectralResizing
        assert copy.get_config() == config
    names = set(inspect.signature(SpectralResizing).parameters) - {'kwargs'}
    assert names <= set(config)


def test_arguments_are_bound_by_gin():
    gin.parse_config('resizing.SpectralResizing.size = (5, 8)')
    assert gin.get_configurable('resizing.SpectralResizing')().size == (5, 8)


def test_models_are_saved_and_cloned(tmp_path):
    model = meeting(method='fft')
    model.get_layer('pool').strides.assign((1.5, 4.5))
    x = maps((12, 15), channels=2)
    model.save(tmp_path / 'model.keras')
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for copy in (keras.models.load_model(tmp_path / 'model.keras'), clone):
        for y, expected in zip(copy(x), model(x)):
            assert error_of(y, array(expected)) == 0


def test_training_passes_through():
    inputs = keras.Input((12, 12, 1))
    x = layers.Conv2D(2, 3, padding='same')(inputs)
    pool = DiffStride((2.2, 3.0))
    x = layers.Conv2D(2, 3, padding='same')(SpectralResizing(8)(pool(x)))
    model = keras.Model(inputs, SpectralResizing()([x, inputs]))
    model.compile(keras.optimizers.Adam(0.05), 'mse', run_eagerly=True)
    before = array(pool.strides)
    x = maps((12, 12), channels=1)
    losses = model.fit(x, x, epochs=4, verbose=0).history['loss']
    assert losses[-1] < losses[0]
    assert np.all(array(pool.strides) != before)


def test_macs_are_counted_of_the_first_input_alone():
    costs = complexity(meeting(), (12, 15, 2))
    pool, *resizings = costs.layers
    height, width, _ = pool.output_shape
    up = 12 * height * width + 15 * 12 * width
    down = height * 12 * 15 + width * height * 15
    assert [row.macs for row in resizings] == [2 * down, 2 * up]
    same = keras.Sequential([keras.Input((8, 9, 2)), SpectralResizing((8, 4))])
    assert complexity(same, (8, 9, 2)).macs == 8 * 4 * 9 * 2


# Bad input


@pytest.mark.parametrize(
    'size',
    [0, -3, 2.0, True, 'two', (), (2, 2.5), (4, 0), (2, 2, 2, 2), ((2, 3), 4)],
    ids=str,
)
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match='`size` must be an integer') as error:
        SpectralResizing(size)
    assert f'Received: size={size!r}' in str(error.value)


@pytest.mark.parametrize(
    'name, value', [('data_format', 'NHWC'), ('method', 'dct'), ('norm', None)]
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f'`{name}` must be one of'):
        SpectralResizing(2, **{name: value})


@pytest.mark.parametrize('mode', ['eager', 'symbolic'])
@pytest.mark.parametrize(
    'size, shapes, rule',
    [
        (None, (2, 8, 8, 3), 'a list .x, like., or have a `size`'),
        (None, [], 'a list .x, like., or have a `size`'),
        (None, [(2, 8, 8, 3)], 'a list .x, like., or have a `size`'),
        (None, [(2, 8, 8, 3)] * 3, 'a list .x, like., or have a `size`'),
        (4, [(2, 8, 8, 3), (2, 8, 8, 3)], 'not with a list'),
        (4, (2, 8), 'ndim=3 or 4 or 5'),
        (4, (2, 4, 4, 4, 4, 1), 'ndim=3 or 4 or 5'),
        ((4, 4), (2, 8, 3), 'ndim=4'),
        (4, (2, 8, 0, 3), 'at least 1'),
        (None, [(2, 8, 8, 3), (2, 8, 8)], 'second input .* ndim=4'),
        (None, [(2, 8, 8, 3), (2, 8, 0, 3)], 'second input .* at least 1'),
    ],
)
def test_bad_inputs_are_refused(size, shapes, rule, mode):
    make = ops.zeros if mode == 'eager' else keras.KerasTensor
    is_list = isinstance(shapes, list)
    inputs = [make(x) for x in shapes] if is_list else make(shapes)
    layer = SpectralResizing(size, name='resize')
    for _ in range(2):  # When it is built and after that.
        with pytest.raises(ValueError, match=rule) as error:
            layer(inputs)
        assert 'resize' in str(error.value)


def test_integers_and_another_rank_are_refused():
    layer = SpectralResizing(3)
    with pytest.raises(ValueError, match='floating-point'):
        layer(ops.zeros((2, 8, 8, 3), 'int32'))
    layer(ops.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match='ndim=4'):
        layer(ops.zeros((2, 8, 3)))
