"""Frozen copies of models: the same function, of constants; and its exports."""

import itertools

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import ops

from diffstride import (
    DiffStride,
    FixedSpectralPooling,
    SpectralResizing,
    complexity,
    freeze,
    regularizers,
    resnet,
)
from diffstride.pooling import SpectralPooling, diffstride_layers

# `np.object`, which Keras sets for tf2onnx when NumPy has none.
exports_to_onnx = pytest.mark.filterwarnings(
    'ignore:In the future `np.object` will be defined:FutureWarning'
)


def images(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype('float32')


def array(tensor):
    return np.asarray(tensor, 'float64')


def error(actual, expected):
    actual, expected = array(actual), array(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def moved(model):
    """Gives every learned stride another value than it began with."""
    for index, layer in enumerate(diffstride_layers(model)):
        values = np.array([1.7 + 0.2 * index, 2.3])
        layer.strides.assign(values[: layer.strides.shape[0]])
    return model


def network(shape=(16, 16, 2), **kwargs):
    """A small model that strides thrice, by all kinds of layers."""
    return moved(
        keras.Sequential(
            [
                keras.Input(shape),
                keras.layers.Conv2D(4, 3, padding='same'),
                resnet.ResidualLayer(
                    6, strides=2, pooling_cls=DiffStride, project=True
                ),
                FixedSpectralPooling(1.3),
                DiffStride(1.5, smoothness_factor=1.0, **kwargs),
                keras.layers.Conv2D(4, 3),
            ]
        )
    )


class Subclass(keras.Model):
    """Makes its layers itself: its config does not tell of them."""

    def __init__(self, filters=3, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = keras.layers.Conv2D(filters, 3)
        self.pools = [
            DiffStride(2.0),
            DiffStride(2.0, ramp='inside'),
            FixedSpectralPooling(1.2, method='fft'),
        ]

    def call(self, inputs):
        x = self.conv(inputs)
        for pool in self.pools:
            x = pool(x)
        return x

    def get_config(self):
        return {**super().get_config(), 'filters': self.filters}


def subclass():
    model = Subclass(filters=4)
    model(images(2, 16, 16, 2))
    return moved(model)


def functional():
    """Calls one pooling layer twice and holds a model within another."""
    inputs = keras.Input((16, 16, 2))
    pool = DiffStride(2.0, smoothness_factor=1.0)
    a = pool(keras.layers.Conv2D(3, 3, padding='same')(inputs))
    b = pool(keras.layers.Lambda(lambda x: x[..., :1])(inputs))
    c = keras.Sequential([keras.Input((16, 16, 2)), DiffStride()])(inputs)
    return moved(keras.Model(inputs, [a + b, ops.mean(c, axis=(1, 2))]))


def with_cost():
    inner = network()
    return regularizers.StrideCostModel(inner, regularizers.ActivationCost(0.1))


def with_cost_inside():
    return keras.Sequential([keras.Input((16, 16, 2)), with_cost()])


MODELS = {
    'sequential': network,
    'functional': functional,
    'subclass': subclass,
    'cost': with_cost,
    'cost inside': with_cost_inside,
}
every_model = pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)


@every_model
def test_computes_the_same_function(make):
    model, x = make(), images(3, 16, 16, 2)
    frozen = freeze(model)
    for compute in (
        lambda model: model(x),
        lambda model: model.predict(x, verbose=0),
    ):
        for actual, expected in zip(
            keras.tree.flatten(compute(frozen)),
            keras.tree.flatten(compute(model)),
        ):
            assert error(actual, expected) < 1e-6


@every_model
def test_given_model_does_not_change(make):
    model = make()
    layers = diffstride_layers(model)

    def state():
        return (
            [(v.path, v.trainable, array(v).tolist()) for v in model.variables],
            [layer.get_config() for layer in layers],
            [layer.supports_jit for layer in layers],
        )

    before = state()
    frozen = freeze(model)
    for variable in frozen.variables:
        variable.assign(variable + 1)
    assert state() == before


KINDS = [
    {'ramp': ramp, 'cropping': cropping}
    for ramp, cropping in itertools.product(
        ('outside', 'inside'), (True, False)
    )
]
KINDS += [
    {'shared_stride': True},
    {'lower_limit_stride': 2.2},
    {'norm': 'ortho', 'method': 'fft'},
    {'norm': 'backward', 'smoothness_factor': 20.0, 'ramp': 'inside'},
]


@pytest.mark.parametrize('sizes', [(16, 13), (33, 8), (4, 1)])
@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_values_agree_with_reference(kind, data_format, sizes):
    kind = {'smoothness_factor': 2.5, **kind}
    first = data_format == 'channels_first'
    shape = (2, *sizes) if first else (*sizes, 2)
    strides = (2.25, 2.25) if 'shared_stride' in kind else (2.25, 3.5)
    layer = DiffStride(strides, data_format=data_format, **kind)
    model = freeze(keras.Sequential([keras.Input(shape), layer]))
    x = images(2, *shape)
    expected = reference.diffstride(
        x,
        strides,
        kind['smoothness_factor'],
        kind.get('ramp', 'outside'),
        kind.get('norm', 'forward'),
        kind.get('cropping', True),
        kind.get('lower_limit_stride'),
        data_format=data_format,
    )
    assert error(model(x), expected) < 1e-6
    assert model.output_shape == (None, *expected.shape[1:])


@pytest.mark.parametrize(
    'layer',
    [
        DiffStride((2.5, 1.5), ramp='straight_through', smoothness_factor=1.0),
        FixedSpectralPooling((2.5, 1.5), method='fft'),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_poolings_without_a_ramp_agree_with_reference(layer):
    model = freeze(keras.Sequential([keras.Input((20, 15, 2)), layer]))
    x = images(2, 20, 15, 2)
    sizes = (8, 10)
    expected = x
    for axis, size in zip((1, 2), sizes):
        ones = np.ones(size // 2 + 1)
        expected = reference.resample(expected, axis, size, ones, 'forward')
    assert error(model(x), expected) < 1e-6


@pytest.mark.parametrize('ramp', ['outside', 'inside', 'straight_through'])
def test_unknown_sizes_are_computed_from_constant_strides(ramp):
    layer = DiffStride((1.7, 2.3), 2.0, ramp=ramp)
    model = keras.Sequential(
        [keras.Input((None, None, 2)), layer, FixedSpectralPooling(1.3)]
    )
    frozen = freeze(model)
    assert frozen.output_shape == (None, None, None, 2)
    frozen.layers[0].strides.assign([3.0, 3.0])
    call = tf.function(
        frozen, input_signature=[tf.TensorSpec((None, None, None, 2))]
    )
    for shape in ((2, 16, 13, 2), (1, 33, 8, 2)):
        x = images(*shape)
        assert error(call(x), model(x)) < 1e-6


def test_strides_are_not_looked_up_any_more():
    frozen, x = freeze(network()), images(2, 16, 16, 2)
    before = array(frozen(x))
    complexity(frozen, (16, 16, 2))
    for layer in diffstride_layers(frozen):
        assert layer.stride_values == layer.frozen_strides
        layer.strides.assign([5.0, 5.0])
    np.testing.assert_array_equal(array(frozen(x)), before)


def test_resizing_is_frozen_too(tmp_path):
    """Its FFT could not be exported."""
    inputs = keras.Input((12, 15, 2))
    pooled = DiffStride(3.0, 2.0)(inputs)
    resize = SpectralResizing(method='fft', name='resize')
    model = keras.Model(inputs, resize([pooled, inputs]))
    frozen = freeze(model)
    x = np.random.default_rng(0).normal(size=(2, 12, 15, 2)).astype('float32')
    np.testing.assert_allclose(array(frozen(x)), array(model(x)), atol=1e-5)
    frozen.save(tmp_path / 'frozen.keras')
    loaded = keras.models.load_model(tmp_path / 'frozen.keras')
    for each in (frozen, loaded):
        assert each.get_layer('resize').frozen
        assert each.get_layer('resize').method == 'matmul'
    assert resize.method == 'fft'


def operations(function):
    """All operations of a graph and of the functions that it calls."""
    graph = function.graph.as_graph_def()
    nodes = list(graph.node)
    for inner in graph.library.function:
        nodes += inner.node_def
    return [node.op for node in nodes]


@pytest.mark.parametrize('method', ['auto', 'fft', 'matmul'])
def test_tables_and_sizes_are_constants_of_graphs(method):
    layers = [
        DiffStride(1.7, data_format=data_format, method=method)
        for data_format in ('channels_last', 'channels_first')
    ]
    layers.append(FixedSpectralPooling(1.3, method=method))
    model = freeze(keras.Sequential([keras.Input((16, 16, 16)), *layers]))
    graph = tf.function(model).get_concrete_function(
        tf.TensorSpec((None, 16, 16, 16))
    )
    found = set(operations(graph))
    # Keras takes the shape of the batch, without use.
    unused = {'Shape', 'StridedSlice', 'NoOp'}
    products = {'Const', 'Reshape', 'BatchMatMulV2', 'MatMul'}
    assert found <= products | unused | {'Placeholder', 'Identity'}
    assert model.count_params() == 4 and not model.trainable_variables


@pytest.mark.parametrize('method', ['auto', 'fft'])
def test_other_methods_can_be_asked_for(method):
    model, x = network(), images(2, 16, 16, 2)
    frozen = freeze(model, method=method)
    assert {layer.method for layer in diffstride_layers(frozen)} == {method}
    assert error(frozen(x), model(x)) < 1e-6


@every_model
def test_gradients_of_inputs_and_other_weights_are_the_same(make):
    model, x = make(), tf.constant(images(2, 16, 16, 2))
    frozen = freeze(model)

    def gradients(model):
        weights = [v for v in model.trainable_variables if v.name != 'strides']
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = keras.tree.flatten(model(x))
            loss = sum(ops.sum(ops.square(y)) for y in outputs)
        return tape.gradient(loss, [x, *(v.value for v in weights)])

    actual, expected = gradients(frozen), gradients(model)
    assert len(actual) == len(expected) > 2
    for a, b in zip(actual, expected):
        assert error(a, b) < 1e-5


def test_strides_stay_when_the_copy_is_trained_on():
    model = network(strides_regularizer=regularizers.StrideCost(1.0))
    frozen = freeze(model)
    frozen.trainable = False
    frozen.trainable = True
    assert len(frozen.trainable_variables) == len(model.trainable_variables) - 2
    assert len(frozen.losses) == len(model.losses) - 1  # The strides' cost.
    before = [layer.stride_values for layer in diffstride_layers(frozen)]
    frozen.compile('sgd', 'mse')
    x = images(4, 16, 16, 2)
    y = np.zeros((4, *frozen.output_shape[1:]))
    first, *_, last = frozen.fit(x, y, epochs=4, verbose=0).history['loss']
    assert last < first
    assert before == [
        layer.stride_values for layer in diffstride_layers(frozen)
    ]


def test_pinned_sizes_remain_while_the_response_is_that_of_now():
    model, x = network(), images(2, 16, 16, 2)
    for layer in diffstride_layers(model):
        layer.pin()
        layer.strides.assign([1.2, 3.0])
    frozen = freeze(model)
    assert error(frozen(x), model(x)) < 1e-6
    for ours, theirs in zip(
        diffstride_layers(frozen), diffstride_layers(model)
    ):
        assert ours.pinned_strides == theirs.pinned_strides
        assert ours.frozen_strides == theirs.stride_values


def test_settled_strides_remain_settled():
    model, x = network(), images(2, 16, 16, 2)
    for layer in diffstride_layers(model):
        layer.settle()
    frozen = freeze(model)
    assert all(layer.settled for layer in diffstride_layers(frozen))
    assert error(frozen(x), model(x)) < 1e-6


def assert_frozen_alike(actual, expected):
    for a, b in zip(diffstride_layers(actual), diffstride_layers(expected)):
        assert a.frozen_strides == b.frozen_strides is not None
        assert a.pinned_strides == b.pinned_strides is not None
        assert not a.trainable
        np.testing.assert_array_equal(array(a.strides), array(b.strides))
    for layer in actual._flatten_layers():
        if isinstance(layer, SpectralPooling):
            assert layer.frozen and layer.method == 'matmul'


@every_model
def test_stays_frozen_when_saved_and_loaded(make, tmp_path):
    frozen, x = freeze(make()), images(2, 16, 16, 2)
    frozen.save(tmp_path / 'frozen.keras')
    loaded = keras.saving.load_model(
        tmp_path / 'frozen.keras',
        custom_objects={'Subclass': Subclass},
        safe_mode=False,
    )
    assert_frozen_alike(loaded, frozen)
    assert_frozen_alike(freeze(frozen), frozen)
    for a, b in zip(
        keras.tree.flatten(loaded(x)), keras.tree.flatten(frozen(x))
    ):
        np.testing.assert_array_equal(array(a), array(b))


def test_config_tells_and_clones_are_frozen():
    frozen = freeze(network())
    layer = diffstride_layers(frozen)[0]
    assert layer.get_config()['frozen_strides'] == layer.frozen_strides
    clone = keras.models.clone_model(frozen)
    clone.set_weights(frozen.get_weights())
    assert_frozen_alike(clone, frozen)


def test_weights_of_a_learning_model_are_frozen_when_loaded(tmp_path):
    model, x = network(), images(2, 16, 16, 2)
    frozen = freeze(model)
    for variable in model.variables:
        variable.assign(variable + 0.1)
    model.save_weights(tmp_path / 'a.weights.h5')
    frozen.load_weights(tmp_path / 'a.weights.h5')
    assert_frozen_alike(frozen, freeze(model))
    assert error(frozen(x), model(x)) < 1e-6


def test_all_axes_of_a_frozen_model_tell_their_sizes():
    model = network()
    assert model.output_shape == (None, None, None, 4)
    frozen = freeze(model)
    assert frozen.output_shape == (None, *model(images(1, 16, 16, 2)).shape[1:])
    head = keras.Sequential(  # Needs all sizes.
        [frozen, keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    assert head(images(3, 16, 16, 2)).shape == (3, 2)


@pytest.mark.parametrize(
    'policy', ['mixed_bfloat16', 'mixed_float16', 'float64']
)
def test_other_precisions_are_kept(policy):
    keras.config.set_dtype_policy(policy)
    model, x = network(), images(2, 16, 16, 2)
    frozen = freeze(model)
    y = frozen(x)
    assert y.dtype == model(x).dtype
    tolerance = {'mixed_bfloat16': 2e-2, 'mixed_float16': 2e-3}
    assert error(y, model(x)) < tolerance.get(policy, 1e-6)


def test_frozen_models_compile_with_xla():
    model, x = network(), images(2, 16, 16, 2)
    call = tf.function(freeze(model), jit_compile=True)
    assert error(call(x), model(x)) < 1e-5


def test_a_compiled_model_with_an_optimizer_is_copied_without_it():
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), DiffStride(), keras.layers.Conv2D(2, 1)]
    )
    model.compile('adam', 'mse')
    x = images(4, 8, 8, 2)
    model.fit(x, np.zeros(model(x).shape), verbose=0)
    frozen = freeze(model)
    assert not frozen.compiled
    assert error(frozen(x), model(x)) < 1e-6


def test_layers_that_are_not_registered_are_copied():
    class Twice(keras.layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    model = keras.Sequential([keras.Input((8, 8, 1)), DiffStride(), Twice()])
    x = images(2, 8, 8, 1)
    assert error(freeze(model)(x), model(x)) < 1e-6


class NotSaved(keras.Model):
    """What it is made with is not in its config."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.pool = DiffStride()

    def call(self, inputs):
        return self.function(self.pool(inputs))


def not_saved():
    model = NotSaved(lambda x: x)
    model(images(1, 8, 8, 1))
    return model


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: keras.Sequential([DiffStride()]), 'that is built'),
        (lambda: DiffStride(), 'that is built'),
        (lambda: 3, 'that is built. Received: model=3'),
        (not_saved, 'can save and load. Received: model=not_saved.*get_config'),
    ],
    ids=['not built', 'layer', 'number', 'not saved'],
)
def test_what_cannot_be_copied_is_refused(make, message):
    with pytest.raises(ValueError, match=f'(?s)`model` must be.*{message}'):
        freeze(make())


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match='`method` must be one of'):
        freeze(network(), method='gemm')


def served(path):
    loaded = tf.saved_model.load(path)
    return lambda x: loaded.serve(x)


def run_by_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    return lambda x: session.run(None, {entry.name: x})[0]


def run_by_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    entry = interpreter.get_input_details()[0]['index']

    def run(x):
        interpreter.resize_tensor_input(entry, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry, x)
        interpreter.invoke()
        result = interpreter.get_output_details()[0]['index']
        return interpreter.get_tensor(result)

    return run


RUNTIMES = {
    'tf_saved_model': ('', served),
    'onnx': ('.onnx', run_by_onnxruntime),
    'litert': ('.tflite', run_by_litert),
}
every_format = pytest.mark.parametrize('kind', RUNTIMES)


def assert_export_agrees(model, kind, folder, *shapes):
    suffix, load = RUNTIMES[kind]
    path = str(folder / f'model{suffix}')
    freeze(model).export(path, format=kind, verbose=False)
    run = load(path)
    for seed, shape in enumerate(shapes):
        x = images(*shape, seed=seed)
        assert error(run(x), model(x)) < 1e-4


@exports_to_onnx
@every_format
def test_export_runs_with_any_batch_size(kind, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((16, 12, 2)),
            keras.layers.Conv2D(4, 3),
            DiffStride((1.7, 2.3), method='fft'),
            keras.layers.BatchNormalization(),
            FixedSpectralPooling(1.3, method='fft'),
        ]
    )
    shapes = [(batch, 16, 12, 2) for batch in (1, 3)]
    assert_export_agrees(model, kind, tmp_path, *shapes)


def mix(data_format):
    """All ramps and arguments that change the operator."""
    first = data_format == 'channels_first'
    return [
        DiffStride(1.2, ramp='inside', data_format=data_format),
        DiffStride(1.5, 1.0, ramp='straight_through', data_format=data_format),
        DiffStride(1.2, cropping=False, data_format=data_format),
        DiffStride(1.3, shared_stride=True, data_format=data_format),
        FixedSpectralPooling((1.5, 1.0), data_format=data_format),
    ], (2, 24, 20) if first else (24, 20, 2)


@pytest.mark.slow
@exports_to_onnx
@every_format
@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_all_kinds_of_layers_are_exported(data_format, kind, tmp_path):
    layers, shape = mix(data_format)
    model = keras.Sequential([keras.Input(shape), *layers])
    assert_export_agrees(model, kind, tmp_path, (1, *shape), (3, *shape))


@pytest.mark.slow
@exports_to_onnx
@every_format
def test_models_of_unknown_sizes_are_exported(kind, tmp_path):
    layers, _ = mix('channels_last')
    model = keras.Sequential([keras.Input((None, None, 2)), *layers])
    shapes = (1, 24, 20, 2), (3, 13, 32, 2)
    assert_export_agrees(model, kind, tmp_path, *shapes)


@pytest.mark.slow
@exports_to_onnx
@every_format
@pytest.mark.parametrize('make', [subclass, with_cost, with_cost_inside])
def test_models_of_other_kinds_are_exported(make, kind, tmp_path):
    shapes = (1, 16, 16, 2), (3, 16, 16, 2)
    assert_export_agrees(make(), kind, tmp_path, *shapes)


@pytest.mark.slow
@exports_to_onnx
@every_format
def test_resnet18_with_learned_strides_is_exported(kind, tmp_path):
    model = moved(
        resnet.resnet18(num_output_classes=10, width=8, pooling_cls=DiffStride)
    )
    model.build((None, 32, 32, 3))
    moved(model)
    shapes = (1, 32, 32, 3), (3, 32, 32, 3)
    assert_export_agrees(model, kind, tmp_path, *shapes)
