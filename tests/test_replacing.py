"""Models that stride, and the same with learned strides in their place."""

import functools

import keras
import numpy as np
import pytest
import reference
from backends import NotTold, array, random, randomized, refusals, sequential
from keras import layers, ops

from diffstride import DiffStride, SpectralResizing, diffstride_layers, models
from diffstride.pooling import DiffStride3D, FixedSpectralPooling
from diffstride.replacing import replace_strides

NARROW = {'ramp': 'inside', 'smoothness_factor': 1.0}
SHAPE = (16, 16, 3)
ANY_SIZE = (None, None, 3)


def functional(function, shape=SHAPE):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


def assert_same_weights(model, other):
    """Checks the weights of all layers but ours, at any depth, by name."""

    def weights_of(model):
        return {
            layer.name: layer.get_weights()
            for layer in models.flatten(model)[1:]
            if not isinstance(layer, (keras.Model, DiffStride))
            and layer.get_weights()
        }

    check = np.testing.assert_array_equal
    keras.tree.map_structure(check, weights_of(model), weights_of(other))


def move(model, *strides):
    for layer, values in zip(diffstride_layers(model), strides, strict=True):
        layer.strides = values


def names_of(pools):
    return [pool.name.removesuffix('_pooling') for pool in pools]


def pooled(maps):
    """Returns maps pooled by stride 2 and the ramp of NARROW."""
    return reference.diffstride(array(maps), (2, 2), 1.0, 'inside')


CONVOLUTION = {'padding': 'same', 'activation': 'relu'}
STRIDED = [
    layers.Conv1D(4, 3, 2, **CONVOLUTION),
    layers.Conv1D(4, 3, 2, padding='causal'),
    layers.Conv2D(4, 3, (2, 3), padding='same', use_bias=False),
    layers.Conv2D(4, (5, 3), 2, groups=2),
    layers.Conv3D(4, 3, 2, **CONVOLUTION),
    layers.DepthwiseConv1D(3, 2, **CONVOLUTION),
    layers.DepthwiseConv2D(3, 2, depth_multiplier=2),
    layers.SeparableConv1D(4, 3, 2, **CONVOLUTION),
    layers.SeparableConv2D(4, 3, 2, padding='same'),
    layers.MaxPooling1D(2, padding='same'),
    layers.MaxPooling2D(3, 2),
    layers.MaxPooling3D(2),
    layers.AveragePooling1D(3, 2, padding='same'),
    layers.AveragePooling2D(2),
    layers.AveragePooling3D((2, 1, 3)),
]


@pytest.mark.parametrize('layer', STRIDED, ids=lambda layer: layer.name)
def test_layer_loses_its_stride_and_is_pooled(layer):
    """Sizes are those of the strided layer, rounded up to even."""
    rank = len(layer.strides)
    shape = (24, 12, 12)[:rank]
    model = randomized(sequential((*shape, 2), models.copy_layer(layer)))
    result = replace_strides(model, smoothness_factor=2.0)
    unstrided, pool = result.layers
    config = {**layer.get_config(), 'strides': (1,) * rank}
    assert unstrided.get_config() == config
    assert pool.name == f'{layer.name}_pooling'
    assert pool.stride_values == tuple(map(float, layer.strides))
    assert_same_weights(result, model)
    x = random(2, *shape, 2)
    y = array(unstrided(x))
    expected = reference.diffstride(y, layer.strides, ramp='straight_through')
    np.testing.assert_allclose(array(result(x)), expected, atol=2e-5)
    batch, *sizes, channels = model(x).shape
    even = [size + size % 2 for size in sizes]
    assert expected.shape == (batch, *even, channels)


@pytest.mark.parametrize(
    'layer, kwargs, is_pooled_first',
    [
        (layers.Conv2D(4, 1, 2), {}, True),
        (layers.DepthwiseConv2D(1, 2), {}, True),
        (layers.SeparableConv2D(4, 1, 2), {}, True),
        (layers.Conv2D(4, 1, 2, use_bias=False), {'norm': 'ortho'}, True),
        (layers.Conv2D(4, 1, 2, activation='relu'), {}, False),
        (layers.Conv2D(4, 1, 2), {'norm': 'backward'}, False),
        (layers.MaxPooling2D(1, 2), {}, False),
    ],
)
def test_pooling_comes_first_where_it_commutes(layer, kwargs, is_pooled_first):
    model = randomized(sequential((8, 8, 3), models.copy_layer(layer)))
    first, second = replace_strides(model, **NARROW, **kwargs).layers
    assert isinstance(first, DiffStride) == is_pooled_first
    if is_pooled_first:
        x = random(2, 8, 8, 3)
        y, z = second(first(x)), first(second(x))
        np.testing.assert_allclose(array(y), array(z), atol=1e-5)


def test_only_chosen_layers_that_stride_are_replaced():
    names = ['transposed', 'chosen', 'other']
    model = sequential(
        SHAPE,
        layers.Conv2DTranspose(4, 3, 2, padding='same', name='transposed'),
        layers.MaxPooling2D(2, name='chosen'),
        layers.MaxPooling2D(2, name='other'),
    )
    assert names_of(diffstride_layers(replace_strides(model))) == names[1:]
    arguments = {'smoothness_factor': 2.5, 'ramp': 'outside', 'norm': 'ortho'}
    result = replace_strides(model, layers=['chosen'], **arguments)
    (pool,) = diffstride_layers(result)
    assert names_of([pool]) == ['chosen']
    assert pool.get_config().items() >= arguments.items()
    assert result.get_layer('other').strides == (2, 2)
    assert [x.name for x in result.layers if x is not pool] == names


def conv(name, filters=4, size=3, **kwargs):
    return layers.Conv2D(filters, size, 2, padding='same', name=name, **kwargs)


def down(x, size=2, name='down'):
    return layers.MaxPooling2D(size, padding='same', name=name)(x)


def block(x, filters, name):
    """A residual block that strides in both branches."""
    shortcut = conv(f'{name}_shortcut', filters, 1)(x)
    x = conv(f'{name}_main', filters, use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(name=f'{name}_norm')(x))
    x = layers.Conv2D(filters, 3, padding='same', name=f'{name}_last')(x)
    return layers.Add(name=f'{name}_add')([x, shortcut])


def residual_network(x):
    x = block(block(conv('stem')(x), 6, 'first'), 8, 'second')
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(x))


def several_outputs(x):
    """Two shortcuts meet, and two other paths do not."""
    shortcuts = [conv(name, size=1)(x) for name in 'ab']
    return [layers.Add()(shortcuts), down(x, 2, 'c'), down(x, 2, 'd')]


def parallel_paths(x):
    maps = [layers.ReLU()(down(x, 2, f'{name}1')) for name in 'ab']
    maps = [down(y, 2, f'{name}2') for y, name in zip(maps, 'ab')]
    return layers.Concatenate()(maps)


def padded_windows(x):
    a = layers.Conv2D(4, 3, 2, name='a')(layers.ZeroPadding2D(1)(x))
    a = layers.Conv2D(4, 3)(layers.ZeroPadding2D(1)(a))
    return layers.Concatenate()([a, layers.MaxPooling2D(1, 2, name='b')(x)])


def operators(x):
    y = ops.relu(conv('a', 3)(x)) * 2.0 + down(x, 2, 'b')
    return ops.mean(y, axis=(1, 2))


def squeeze_and_excitation(x):
    x = conv('a')(x)
    y = layers.Reshape((1, 1, 4))(layers.GlobalAveragePooling2D()(x))
    return layers.Multiply()([x, layers.Conv2D(4, 1)(y)])


def features(x):
    """An output of a learned size, not upsampled."""
    x = layers.ZeroPadding2D(1)(layers.UpSampling2D(2)(conv('a')(x)))
    return layers.MaxPooling2D(2, name='b')(x)


def autoencoder(x):
    x = layers.Conv2DTranspose(4, 3, 2, padding='same')(conv('down')(x))
    return layers.Conv2D(1, 3, padding='valid', name='decoded')(x)


def resized_output(x):
    return SpectralResizing()([autoencoder(x), x])


@pytest.mark.parametrize(
    'network, names, calls',
    [
        (resized_output, ['down'], [1]),
        (residual_network, ['stem', 'first_main', 'second_main'], [1, 2, 2]),
        (several_outputs, ['a', 'c', 'd'], [1, 1, 1]),
        (parallel_paths, ['a1', 'a2'], [2, 2]),
        (padded_windows, ['a'], [2]),
        (operators, ['a'], [2]),
        (squeeze_and_excitation, ['a'], [1]),
        (features, ['a', 'b'], [1, 1]),
    ],
)
def test_layers_share_a_pooling_where_their_maps_meet(network, names, calls):
    shape = ANY_SIZE if network is residual_network else SHAPE
    model = randomized(functional(network, shape))
    result = replace_strides(model)
    assert_same_weights(result, model)
    pools = diffstride_layers(result)
    assert names_of(pools) == names
    nodes = [result.get_layer(pool.name)._inbound_nodes for pool in pools]
    assert list(map(len, nodes)) == calls
    for width in (1.3, 3.0):
        move(result, *[(1.5 + i, width) for i in range(len(pools))])
        for y in keras.tree.flatten(result(random(1, 16, 16, 3))):
            assert np.isfinite(array(y)).all()


def meet(*maps):
    return layers.Add(name='meet')(list(maps))


def upsampling(x):
    return meet(x, layers.UpSampling2D(2)(down(x)))


def unequal_depths(x):
    return meet(down(x, 4), down(down(x, 2, 'down_a'), 2, 'down_b'))


def unequal_windows(x):
    y = layers.MaxPooling2D(2, name='down')(x)
    return meet(layers.Conv2D(3, 1, 2, name='down_a')(x), y)


def learned_before(x):
    return meet(down(x), DiffStride(2.0, ramp='inside', name='down_own')(x))


def flatten(x):
    return layers.Dense(2, name='meet')(layers.Flatten()(down(x)))


def segmentation(x):
    x = layers.UpSampling2D((1, 2))(layers.ReLU()(down(x, 4)))
    decoded = layers.Activation('softmax', name='decoded')(x)
    return {'mean': layers.GlobalMaxPooling2D()(x), 'map': decoded}


def nested_autoencoder(x):
    encoder = sequential(SHAPE, layers.MaxPooling2D(2, name='down'))
    decoder = sequential((8, 8, 3), layers.UpSampling2D(2))
    return layers.Activation('relu', name='decoded')(decoder(encoder(x)))


MEETING = [unequal_depths, unequal_windows, flatten, learned_before]
UPSAMPLED = r'"decoded".*learned by "down".*SpectralResizing'


@pytest.mark.parametrize(
    'network, shape, message',
    [
        (upsampling, SHAPE,
         r'"meet".*16 samples.*learned by "down".*`layers`.*SpectralResizing'),
        *((x, SHAPE, r'"meet".*"down.*`layers`') for x in MEETING),
        (nested_autoencoder, SHAPE, UPSAMPLED),
        *((x, y, UPSAMPLED) for x in (autoencoder, segmentation)
          for y in (SHAPE, ANY_SIZE)),
    ],
)  # fmt: skip
def test_sizes_that_could_come_apart_are_refused(network, shape, message):
    with pytest.raises(ValueError, match=message):
        replace_strides(functional(network, shape))


def enlarged(x):
    return layers.UpSampling2D(2, name='meet')(down(x))


@pytest.mark.parametrize('network', [flatten, enlarged])
def test_fixed_sizes_must_be_those_of_the_strided_layer(network):
    """A Dense layer needs them, and so does an output of the input's size."""
    model = functional(network)
    result = replace_strides(model, FixedSpectralPooling)
    assert result.output_shape == model.output_shape
    with pytest.raises(ValueError, match='"meet"'):  # 9 became 8.
        replace_strides(functional(network, (18, 18, 3)), FixedSpectralPooling)


def test_any_callable_can_make_the_pooling_of_a_layer():
    """The names of the model and of its input are kept, too."""

    def pooling_cls(strides, data_format, name, dtype):
        kwargs = {'data_format': data_format, 'name': name, 'dtype': dtype}
        return DiffStride(strides, ramp='inside', **kwargs)

    kwargs = {'padding': 'same', 'data_format': 'channels_first'}
    inputs = keras.Input((3, 16, 16), name='pixels')
    first = layers.Conv2D(4, 3, (2, 4), dtype='mixed_bfloat16', **kwargs)
    second = layers.Conv2D(4, 3, 2, dtype='float32', **kwargs)
    model = keras.Sequential([inputs, first, second], name='network')
    result = replace_strides(model, pooling_cls)
    assert result.name == 'network'
    assert result.inputs[0].name == 'pixels'
    policies = [layer.dtype_policy.name for layer in result.layers]
    assert policies == ['mixed_bfloat16'] * 2 + ['float32'] * 2
    pool, _ = diffstride_layers(result)
    assert pool.data_format == 'channels_first'
    assert pool.stride_values == (2.0, 4.0)
    assert pool.ramp == 'inside'


POOL = layers.MaxPooling2D(2, name='down')
replaced = functools.partial(replace_strides, sequential(SHAPE, POOL))


test_wrong_arguments = refusals(
    (lambda: replace_strides(keras.Model()), "`model` must .*='Model'"),
    (lambda: replace_strides(layers.Conv2D(4, 3, 2)), '`model`.*Conv2D'),
    (lambda: replace_strides(keras.Sequential([layers.MaxPooling2D(2)])),
     '`model`.*built'),
    (lambda: replace_strides(sequential(SHAPE, NotTold(object()), POOL)),
     r'(?s)`model` must.*layer "not_told".*get_c'),
    (lambda: replace_strides(sequential(SHAPE, layers.Conv2D(4, 3))),
     'a layer to replace'),
    (lambda: replaced(layers=['up']), "`layers`.*'down'.*'up'"),
    (lambda: replaced(layers=[]), 'a layer to replace'),
    (lambda: replaced(layers=5), '`layers` must be names.*=5'),
    (lambda: replaced(5), '`pooling_cls` must be a class.*=5'),
    (lambda: replaced(name='x'), "`kwargs` must not.*'name'"),
    (lambda: replaced(smoothness_factor=-1.0), '`smoothness_factor`'),
    (lambda: replace_strides(functional(residual_network), layers='first_main'),
     r'first_add.*first_main'),
    (lambda: replace_strides(
        sequential((8, 2), layers.MaxPooling1D(2, name='down')), DiffStride3D),
     '`pooling_cls` must be a pooling over 1 axes.*"down"'),
)  # fmt: skip


def test_the_given_model_is_left_as_it_is():
    model = randomized(functional(residual_network))
    model.compile('sgd', 'mse')
    config, x = model.to_json(), random(2, 16, 16, 3)
    before = array(model(x))
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    result = replace_strides(model, **NARROW)
    for variable in result.variables:
        variable.assign(np.ones(variable.shape))
    assert model.to_json() == config
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    np.testing.assert_array_equal(array(model(x)), before)
    assert not set(map(id, model.layers)) & set(map(id, result.layers))


def base_within(x):
    """An inner base with a learned stride of its own."""
    own = DiffStride(1.5, name='own')
    base = sequential(SHAPE, own, conv('inner'), name='base')
    return layers.GlobalMaxPooling2D()(down(base(x), 2, 'outer'))


ALL = {'own', 'inner', 'outer'}


@pytest.mark.parametrize(
    'network, trainable, learned',
    [
        (base_within, {}, ALL),
        (base_within, {'base': False}, {'outer'}),
        (base_within, {'base': False, 'inner': True}, ALL - {'own'}),
        (base_within, {'inner': False}, ALL - {'inner'}),
        (base_within, {'outer': False}, ALL - {'outer'}),
        (residual_network, {'first_shortcut': False}, {'stem', 'second_main'}),
    ],
)
def test_strides_of_frozen_layers_are_not_learned(network, trainable, learned):
    model = functional(network)
    for layer in models.flatten(model):  # A model comes before its layers.
        if layer.name in trainable:
            layer.trainable = trainable[layer.name]
    result = replace_strides(model, **NARROW)
    flags = {layer.name: layer.trainable for layer in models.flatten(result)}
    assert flags.items() >= trainable.items()
    pools = diffstride_layers(result)
    variables = set(map(id, result.trainable_variables))
    found = [pool for pool in pools if id(pool.strides) in variables]
    assert set(names_of(found)) == learned
    pools = diffstride_layers(replace_strides(model, trainable=True))
    assert all(pool.trainable for pool in pools if pool.name != 'own')


def test_several_inputs_and_outputs_in_their_structures():
    inputs = {x: keras.Input(SHAPE, name=x) for x in ('left', 'right')}
    layer = conv('conv')
    maps = [layer(x) for x in inputs.values()]
    outputs = {'left': maps[0], 'sum': layers.Add()(maps)}
    result = replace_strides(randomized(keras.Model(inputs, outputs)), **NARROW)
    assert names_of(diffstride_layers(result)) == ['conv']
    x = {x: random(1, 16, 16, 3, seed=len(x)) for x in inputs}
    left, right = (pooled(result.get_layer('conv')(y)) for y in x.values())
    y = result(x)
    assert set(y) == set(outputs)
    np.testing.assert_allclose(array(y['left']), left, atol=1e-4)
    np.testing.assert_allclose(array(y['sum']), left + right, atol=1e-4)


def test_a_model_that_shares_a_pooling_is_dissolved():
    norm = layers.BatchNormalization(name='norm')
    branch = sequential(SHAPE, conv('inside'), norm)

    def network(x):
        y = layers.Conv2D(4, 1, 2, name='outside')(x)
        return layers.Add()([branch(x, training=True), y])

    model = randomized(functional(network))
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    assert names_of(diffstride_layers(result)) == ['inside']
    x = random(2, 16, 16, 3)
    inside, outside = (
        pooled(result.get_layer(name)(x)) for name in ('inside', 'outside')
    )
    norm = result.get_layer('norm')
    expected = array(norm(inside, training=True)) + outside
    np.testing.assert_allclose(array(result(x)), expected, atol=1e-4)


def test_models_within_models_are_replaced(tmp_path):
    """A shared Sequential, then a Functional of a fixed input size."""
    stem = sequential((32, 32, 3), conv('stem', 3), name='stems')
    inner = functional(conv('inside'))
    inner.name = 'inner'
    left, right = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    x = layers.Add()([stem(left), stem(right)])
    y = layers.GlobalMaxPooling2D()(inner(x, training=False))
    model = randomized(keras.Model([left, right], y))
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    assert names_of(diffstride_layers(result)) == ['stem', 'inside']
    assert isinstance(result.get_layer('stems'), keras.Sequential)
    inner = result.get_layer('inner')
    assert inner.input_shape == (None, None, None, 3)
    assert isinstance(inner.layers[-1], DiffStride)
    x = [random(2, 32, 32, 3, seed=seed) for seed in (0, 1)]
    move(result, (1.5, 2.3), (1.7, 2.3))
    result.save(tmp_path / 'model.keras')
    loaded = keras.saving.load_model(tmp_path / 'model.keras')
    for strides in (1.5, 2.3), (2.7, 1.1):
        move(loaded, strides, strides)
        move(result, strides, strides)
        expected = array(result(x))
        np.testing.assert_allclose(array(loaded(x)), expected, rtol=1e-5)


def test_vocabularies_statistics_and_functions_are_kept():
    """Strides and poolings leave constant signals as they are."""
    pytest.importorskip('tensorflow')  # For the lookup, on every backend.
    factor = 3.0
    words, norm = layers.IntegerLookup(), layers.Normalization()
    words.adapt([7, 7, 5, 3])
    norm.adapt(0.05 * random(64, 8, 4) + 0.01)
    first = layers.Lambda(lambda x: ops.tanh(factor * x))
    second = layers.Lambda(lambda x: x[..., :2], output_shape=(8, 2))
    rest = layers.Embedding(5, 4), norm, first, second, layers.Conv1D(2, 1, 2)
    model = keras.Sequential([keras.Input((8,), dtype='int64'), words, *rest])
    result = replace_strides(model, **NARROW)
    x = np.array([[5] * 8, [7] * 8])
    np.testing.assert_allclose(array(result(x)), array(model(x)), atol=2e-6)


class Network(keras.Model):
    """A class that can be made from layers, with its own step."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


class WithFactor(Network):
    def __init__(self, inputs, outputs, factor=1.0, **kwargs):
        super().__init__(inputs, outputs, **kwargs)


class OfDepth(keras.Model):
    """A class that cannot be made from layers, without methods of its own."""

    def __init__(self, depth):
        inputs = keras.Input(SHAPE)
        super().__init__(inputs, layers.MaxPooling2D(depth)(inputs))


def test_classes_of_models_are_kept_or_refused():
    inputs = keras.Input((8, 8, 1))
    outputs = layers.GlobalAveragePooling2D()(layers.MaxPooling2D(2)(inputs))
    assert type(replace_strides(Network(inputs, outputs))) is Network
    with pytest.raises(ValueError, match=r'own `train_step`.*WithFactor'):
        replace_strides(WithFactor(inputs, outputs))
    result = replace_strides(OfDepth(2))
    assert type(result) is not OfDepth
    assert len(diffstride_layers(result)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ResNet50', 'MobileNetV2', 'EfficientNetB0'])
def test_applications(name):
    kwargs = {'weights': None, 'classes': 3, 'input_shape': (64, 64, 3)}
    model = getattr(keras.applications, name)(**kwargs)
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    pools = diffstride_layers(result)
    assert len(pools) == 5

    # At the start, each layer behind a pooling has the sizes that it had.
    x, y = 64 * random(2, 64, 64, 3), random(2, 3)

    def shapes(model, names):
        outputs = [model.get_layer(name).output for name in names]
        return [y.shape for y in keras.Model(model.inputs[0], outputs)(x)]

    strides = {x.name: getattr(x, 'strides', (1,)) for x in model.layers[1:]}
    names = [name for name in strides if max(strides[name]) == 1]
    assert shapes(result, names) == shapes(model, names)
    result.compile(keras.optimizers.SGD(0.1), 'mse', run_eagerly=True)
    assert np.isfinite(result.train_on_batch(x, y))
    for pool in pools:
        assert pool.stride_values != (2.0, 2.0)
