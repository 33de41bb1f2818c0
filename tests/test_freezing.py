"""Frozen copies of models: the same function, with constants; its exports."""

import functools
import itertools

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from backends import NotTold, array, error_of, image, refusals, sequential
from keras import layers, ops
from runtimes import RUNTIMES, exports_to_onnx

from diffstride import DiffStride, diffstride_layers, freeze, models, resnet
from diffstride.pooling import FixedSpectralPooling, SpectralResampling
from diffstride.resizing import SpectralResizing


def moved(model):
    """Gives every learned stride another value than it began with."""
    for index, layer in enumerate(diffstride_layers(model)):
        layer.strides = (1.7 + 0.2 * index, 2.3)
    return model


def network():
    """A small model that strides thrice, by all kinds of layers."""
    first = layers.Conv2D(4, 3, padding='same')
    residual = resnet.ResidualLayer(6, 3, 2, DiffStride, project=True)
    pools = FixedSpectralPooling(1.3), DiffStride(1.5, smoothness_factor=1.0)
    last = layers.Conv2D(4, 3)
    return moved(sequential((16, 16, 2), first, residual, *pools, last))


class Subclass(keras.Model):
    """A model that makes its layers itself, as its config does not tell."""

    def __init__(self, filters=3, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = layers.Conv2D(filters, 3)
        fixed = FixedSpectralPooling(1.2, method='fft')
        self.pools = [DiffStride(2.0, ramp='inside'), fixed]

    def call(self, inputs):
        x = self.conv(inputs)
        for pool in self.pools:
            x = pool(x)
        return x

    def get_config(self):
        return {**super().get_config(), 'filters': self.filters}


def subclass():
    model = Subclass(filters=4)
    model(image((16, 16)))
    return moved(model)


def functional():
    """Calls one pooling layer twice and holds a model within another."""
    inputs = keras.Input((16, 16, 2))
    pool = DiffStride(2.0, smoothness_factor=1.0)
    a = pool(layers.Conv2D(3, 3, padding='same')(inputs))
    b = pool(layers.Lambda(lambda x: x[..., :1])(inputs))
    c = sequential((16, 16, 2), DiffStride())(inputs)
    d = SpectralResizing(method='fft')([a, inputs])
    return moved(keras.Model(inputs, [a + b, ops.mean(c, axis=(1, 2)), d]))


def mixed(shape=(24, 20, 2), **kwargs):
    """All ramps and arguments that change the operator."""
    return sequential(
        shape,
        DiffStride((1.2, 1.4), ramp='inside', **kwargs),
        DiffStride(1.5, 1.0, ramp='straight_through', **kwargs),
        DiffStride(1.2, cropping=False, **kwargs),
        DiffStride(1.3, shared_stride=True, **kwargs),
        FixedSpectralPooling((1.5, 1.0), **kwargs),
    )


any_size = functools.partial(mixed, (None, None, 2))
first = functools.partial(mixed, (2, 24, 20), data_format='channels_first')


def state_of(model):
    return (
        [(v.path, v.trainable, array(v).tolist()) for v in model.variables],
        [layer.get_config() for layer in diffstride_layers(model)],
        [layer.supports_jit for layer in diffstride_layers(model)],
    )


@pytest.mark.parametrize('make', [network, functional, subclass])
def test_computes_the_same_function_and_leaves_the_model_alone(make, tmp_path):
    model, x = make(), image((16, 16), batch=3)
    model.compile('adam', 'mse')
    expected = [array(y) for y in keras.tree.flatten(model(x))]
    before = state_of(model)
    frozen = freeze(model)
    assert not frozen.compiled
    learned = len(model.trainable_variables) - len(diffstride_layers(model))
    assert len(frozen.trainable_variables) == learned
    path = tmp_path / 'frozen.keras'
    frozen.save(path)
    kwargs = {'custom_objects': {'Subclass': Subclass}, 'safe_mode': False}
    loaded = keras.saving.load_model(path, **kwargs)
    for copy in frozen, loaded:
        for y, z in zip(keras.tree.flatten(copy(x)), expected, strict=True):
            assert error_of(y, z) < 1e-6
        if copy is loaded and make is subclass:
            continue  # Its config does not tell of its layers.
        for layer in models.flatten(copy):
            if isinstance(layer, SpectralResampling):
                assert layer.method == 'matmul'
                assert not layer.trainable_variables
    for variable in frozen.variables:
        variable.assign(variable + 1)
    assert state_of(model) == before


@pytest.mark.parametrize('sizes', [(16, 13), (4, 1)])
@pytest.mark.parametrize(
    'layer',
    [
        DiffStride((2.25, 3.5), 2.5, data_format='channels_first'),
        DiffStride((2.25, 3.5), 2.5, ramp='inside', lower_limit_stride=2.2),
        DiffStride((2.25, 3.5), cropping=False, ramp='inside', norm='ortho'),
        DiffStride(2.25, 2.5, shared_stride=True, norm='backward'),
        DiffStride((2.5, 1.5), 1.0, ramp='straight_through'),
        FixedSpectralPooling((2.5, 1.5), 'channels_first', 'fft'),
    ],
)
def test_values_agree_with_reference(layer, sizes):
    x = image(sizes, layer.data_format)
    model = freeze(sequential(x.shape[1:], layer))
    expected = reference.of_layer(layer, x)
    assert error_of(model(x), expected) < 1e-6
    assert model.output_shape == (None, *expected.shape[1:])


def test_unknown_sizes_are_computed_from_constant_strides():
    model = any_size()
    frozen = freeze(model)
    assert frozen.output_shape == (None, None, None, 2)
    call = tf.function(frozen, [tf.TensorSpec((None, None, None, 2))])
    for batch, *sizes in ((2, 16, 13), (1, 33, 8)):
        x = image(sizes, batch=batch)
        assert error_of(call(x), model(x)) < 1e-6


@pytest.mark.parametrize('method', ['auto', 'fft', 'matmul'])
def test_tables_and_sizes_are_constants_of_graphs(method):
    last = DiffStride(1.7, method=method)
    first = DiffStride(1.7, data_format='channels_first', method=method)
    fixed = FixedSpectralPooling(1.3, method=method)
    model = freeze(sequential((16, 16, 16), last, first, fixed))
    shape = tf.TensorSpec((None, 16, 16, 16))
    graph = tf.function(model).get_concrete_function(shape).graph.as_graph_def()
    nodes = list(graph.node)
    for function in graph.library.function:
        nodes += function.node_def
    # Keras takes the shape of the batch, without use.
    unused = {'Shape', 'StridedSlice', 'NoOp'}
    products = {'Const', 'Reshape', 'BatchMatMulV2', 'MatMul'}
    allowed = products | unused | {'Placeholder', 'Identity'}
    assert {node.op for node in nodes} <= allowed
    assert not model.trainable_variables


@pytest.mark.parametrize('state', ['make_sizes_static', 'hold', 'release'])
def test_the_strides_in_use_are_frozen(state):
    """They are within the limits, and static sizes become theirs."""
    pools = (DiffStride(1.5, 1.0, upper_limit_stride=3.0) for _ in 'ab')
    model, x = sequential((16, 16, 2), *pools), image((16, 16))
    for layer in diffstride_layers(model):
        getattr(layer, state)()
        layer.strides.assign([0.2, 7.0])  # Without effect if it is held.
    frozen = freeze(model)
    if state == 'make_sizes_static':
        for layer in diffstride_layers(model):
            layer.make_sizes_static()
    assert error_of(frozen(x), model(x)) < 1e-6
    for copy, layer in zip(*map(diffstride_layers, (frozen, model))):
        assert copy.stride_values == pytest.approx(layer.stride_values)
    again = freeze(frozen, method='fft')
    assert {layer.method for layer in diffstride_layers(again)} == {'fft'}
    assert error_of(again(x), model(x)) < 1e-6


def test_weights_of_a_learning_model_are_frozen_when_loaded(tmp_path):
    model, x = network(), image((16, 16))
    frozen = freeze(model)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1)
    model.save_weights(tmp_path / 'a.weights.h5')
    frozen.load_weights(tmp_path / 'a.weights.h5')
    assert error_of(frozen(x), model(x)) < 1e-6
    assert not any(x.trainable_variables for x in diffstride_layers(frozen))


@pytest.mark.parametrize(
    'make, policy',
    [
        *((network, x) for x in ('mixed_bfloat16', 'mixed_float16', 'float64')),
        pytest.param(subclass, 'bfloat16', marks=pytest.mark.slow),
    ],
)
def test_other_precisions_become_float32_or_are_kept(make, policy):
    keras.config.set_dtype_policy(policy)
    model, x = make(), image((16, 16))
    expected = model(x)
    coarse = {'mixed_float16': 2e-3, 'float64': 1e-6}.get(policy, 2e-2)
    kept = freeze(model, dtype=None)
    y = kept(x)
    assert y.dtype == expected.dtype
    assert error_of(y, expected) < coarse
    assert kept.dtype_policy.name == policy
    frozen = freeze(model)
    y = frozen(x)
    assert y.dtype == 'float32'
    assert error_of(y, expected) < coarse
    for layer in models.flatten(frozen):
        assert layer.compute_dtype == 'float32'
    assert {variable.dtype for variable in frozen.variables} == {'float32'}
    assert keras.config.dtype_policy().name == policy


def test_layers_of_integers_keep_their_dtype():
    words = layers.IntegerLookup(vocabulary=[7, 5])
    embedding = layers.Embedding(5, 4, dtype='float64')
    inputs = keras.Input((2,), dtype='int64')
    model = keras.Sequential([inputs, words, embedding])
    frozen = freeze(model)
    assert frozen.layers[0].compute_dtype == words.compute_dtype != 'float32'
    x = np.array([[5, 7], [1, 0]])
    assert error_of(frozen(x), model(x)) < 1e-6


def test_a_layer_that_insists_on_a_dtype_is_named():
    class Coarse(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.ReLU(dtype='bfloat16', name='coarse_relu')

        def call(self, inputs):
            return self.inner(inputs)

    model = sequential((8, 8, 1), DiffStride(), Coarse())
    with pytest.raises(ValueError, match=r'`dtype` must.*"coarse_relu".*bfl'):
        freeze(model)
    x = image((8, 8), channels=1)
    assert error_of(freeze(model, dtype=None)(x), model(x)) < 1e-6


test_wrong_arguments_are_refused = refusals(
    (lambda: freeze(keras.Sequential([DiffStride()])), '`model`.*is built'),
    (lambda: freeze(DiffStride()), '`model`.*is built'),
    (lambda: freeze(3), '`model`.*is built. Received: model=3'),
    (lambda: freeze(sequential((8, 8, 1), NotTold(object()))),
     '(?s)`model`.*save and load. Received: model=sequential.*get_c'),
    (lambda: freeze(network(), method='gemm'), '`method` must be one of'),
    (lambda: freeze(network(), dtype='int8'), '`dtype` must be one of'),
)  # fmt: skip


@pytest.mark.slow  # Commands export to each kind in the usual tests.
@exports_to_onnx
@pytest.mark.parametrize('kind', RUNTIMES)
@pytest.mark.parametrize('make', [network, mixed, first, any_size, subclass])
def test_exports_are_right_for_any_batch(make, kind, tmp_path):
    policy = 'mixed_bfloat16' if make is network else 'float32'
    keras.config.set_dtype_policy(policy)
    model = make()
    suffix, load = RUNTIMES[kind]
    path = str(tmp_path / f'model{suffix}')
    freeze(model).export(path, format=kind, verbose=False)
    run = load(path)
    tolerance = 1e-4 if policy == 'float32' else 2e-2
    sizes = {any_size: [(24, 20, 2), (13, 32, 2)], subclass: [(16, 16, 2)]}
    shapes = sizes.get(make) or [model.input_shape[1:]]
    for batch, shape in itertools.product((1, 3), shapes):
        x = image(shape[:2], batch=batch, channels=shape[2])
        assert error_of(run(x), model(x)) < tolerance
