"""Models that stride, and the same with learned strides in their place."""

import keras
import numpy as np
import pytest
import reference
from keras import layers, ops

from diffstride import (
    DiffStride,
    DiffStride3D,
    FixedSpectralPooling,
    SpectralResizing,
    models,
    replace_strides,
)
from diffstride.pooling import diffstride_layers

NARROW = {'ramp': 'inside', 'smoothness_factor': 1.0}


def sequential(*layers_, shape=(16, 16, 3)):
    return keras.Sequential([keras.Input(shape), *layers_])


def functional(function, shape=(16, 16, 3)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype('float32')


def numbers(x):
    return ops.convert_to_numpy(x)


def randomized(model):
    """Gives every weight other values, so that copies are seen."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 0.5, weight.shape))
    return model


def weights_of(model):
    """Returns {layer name: weights} of all layers but ours, at any depth."""
    return {
        layer.name: layer.get_weights()
        for layer in models.flatten(model)[1:]
        if not hasattr(layer, 'layers')
        and not isinstance(layer, DiffStride)
        and layer.get_weights()
    }


def assert_same_weights(model, other):
    ours, theirs = weights_of(model), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        for x, y in zip(weights, theirs[name], strict=True):
            np.testing.assert_array_equal(x, y)


def move(model, *strides):
    for layer, values in zip(diffstride_layers(model), strides, strict=True):
        layer.strides = values


# The layers that take the place of a strided one


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
    layers.MaxPooling2D((1, 2)),
    layers.MaxPooling3D(2),
    layers.AveragePooling1D(3, 2, padding='same'),
    layers.AveragePooling2D(2),
    layers.AveragePooling3D((2, 1, 3)),
]


@pytest.mark.parametrize('layer', STRIDED, ids=lambda layer: layer.name)
def test_layer_loses_its_stride_and_is_pooled(layer):
    layer = type(layer).from_config(layer.get_config())
    rank = len(layer.strides)
    shape = (24, 12, 12)[:rank]
    model = randomized(sequential(layer, shape=(*shape, 2)))
    result = replace_strides(model, ramp='inside', smoothness_factor=2.0)
    unstrided, pool = result.layers
    x = images(2, *shape, 2)

    assert unstrided.name == layer.name
    assert set(unstrided.strides) == {1}
    assert unstrided.get_config() == {
        **layer.get_config(),
        'strides': (1,) * rank,
    }
    assert pool.name == f'{layer.name}_pooling'
    assert pool.stride_values == tuple(map(float, layer.strides))
    assert pool.ramp == 'inside'
    assert_same_weights(result, model)
    expected = reference.diffstride(
        numbers(unstrided(x)), layer.strides, 2.0, 'inside'
    )
    np.testing.assert_allclose(numbers(result(x)), expected, atol=2e-5)
    sizes = numbers(model(x)).shape
    even = tuple(size + size % 2 for size in sizes[1:-1])
    assert expected.shape == (sizes[0], *even, sizes[-1])


@pytest.mark.parametrize('window, stride', [(1, 2), (2, 4), (3, 2), (7, 3)])
@pytest.mark.parametrize('padding', ['same', 'valid'])
def test_sizes_are_those_of_the_strided_layer_rounded_up_to_even(
    window, stride, padding
):
    for size in (8, 9, 14, 33):
        strided = layers.MaxPooling2D(window, stride, padding)
        model = sequential(strided, shape=(size, size, 1))
        pool = replace_strides(model).layers[-1]
        whole = model.output_shape[1]
        samples = size if padding == 'same' else size - window + 1
        expected = min(samples, whole + whole % 2)
        assert pool.output_size(samples) == expected


def band_limited(size, highest, channels, seed=0):
    """Images without frequencies above `highest`: [1, size, size, channels]."""
    spectrum = np.fft.rfft2(
        images(size, size, channels, seed=seed), axes=(0, 1)
    )
    frequency = np.abs(np.fft.fftfreq(size, 1 / size))
    spectrum[frequency > highest] = 0
    spectrum[:, np.arange(size // 2 + 1) > highest] = 0
    return np.fft.irfft2(spectrum, (size, size), axes=(0, 1))[None]


@pytest.mark.parametrize('size, stride', [(16, 2), (24, 3)])
def test_band_limited_maps_give_what_the_strided_convolution_does(size, stride):
    model = randomized(
        sequential(layers.Conv2D(4, 1, stride), shape=(size, size, 3))
    )
    result = replace_strides(model, **NARROW)
    x = band_limited(size, size // (2 * stride) - 1, 3)
    np.testing.assert_allclose(numbers(result(x)), numbers(model(x)), atol=2e-6)
    x = band_limited(size, size // 2, 3)
    assert np.abs(numbers(result(x)) - numbers(model(x))).max() > 0.1


def test_window_that_begins_where_it_did_gives_what_the_strided_one_does():
    # Wrapped around, so that the map of the convolution is band-limited too.
    model = randomized(sequential(layers.Conv2D(4, 3, 2), shape=(18, 18, 3)))
    result = replace_strides(model, **NARROW)
    x = np.pad(band_limited(16, 3, 3), ((0, 0), (1, 1), (1, 1), (0, 0)), 'wrap')
    np.testing.assert_allclose(numbers(result(x)), numbers(model(x)), atol=5e-6)


def test_pooling_comes_before_a_convolution_of_one_sample():
    for layer in (
        layers.Conv2D(4, 1, 2),
        layers.DepthwiseConv2D(1, 2),
        layers.SeparableConv2D(4, 1, 2),
    ):
        model = randomized(sequential(layer, shape=(8, 8, 3)))
        pool, conv = replace_strides(model, **NARROW).layers
        x = images(2, 8, 8, 3)
        assert isinstance(pool, DiffStride)
        assert conv.name == layer.name
        np.testing.assert_allclose(
            numbers(conv(pool(x))), numbers(pool(conv(x))), atol=1e-5
        )


@pytest.mark.parametrize(
    'layer, kwargs',
    [
        (layers.Conv2D(4, 1, 2, activation='relu'), {}),
        (layers.Conv2D(4, 1, 2), {'norm': 'backward'}),
        (layers.MaxPooling2D(1, 2), {}),
    ],
    ids=['activation', 'bias without the mean', 'no convolution'],
)
def test_pooling_comes_after_what_it_does_not_commute_with(layer, kwargs):
    layer = type(layer).from_config(layer.get_config())
    result = replace_strides(sequential(layer), **kwargs)
    assert isinstance(result.layers[1], DiffStride)


def test_layers_without_stride_stay():
    model = sequential(
        layers.Conv2D(4, 3, padding='same'),
        layers.Conv2DTranspose(4, 3, 2, padding='same'),
        layers.MaxPooling2D(3, 1, padding='same'),
        layers.MaxPooling2D(2, name='strided'),
        layers.GlobalAveragePooling2D(),
        layers.Dense(2),
    )
    result = replace_strides(model)
    names = [layer.name for layer in model.layers]
    assert [x.name for x in result.layers if x.name in names] == names
    assert len(diffstride_layers(result)) == 1


# Maps that meet


def block(x, filters, stride, name):
    """A residual block that strides in both branches."""
    shortcut = layers.Conv2D(filters, 1, stride, name=f'{name}_shortcut')(x)
    x = layers.Conv2D(
        filters, 3, stride, padding='same', use_bias=False, name=f'{name}_main'
    )(x)
    x = layers.BatchNormalization(name=f'{name}_norm')(x)
    x = layers.ReLU(name=f'{name}_relu')(x)
    x = layers.Conv2D(filters, 3, padding='same', name=f'{name}_last')(x)
    return layers.Add(name=f'{name}_add')([x, shortcut])


def residual_network():
    def network(x):
        x = layers.Conv2D(4, 3, 2, padding='same', name='stem')(x)
        x = block(x, 6, 2, 'first')
        x = block(x, 8, 2, 'second')
        x = layers.GlobalAveragePooling2D(name='mean')(x)
        return layers.Dense(3, name='classes')(x)

    return randomized(functional(network, (32, 32, 3)))


def test_branches_of_a_residual_block_share_a_pooling():
    model = residual_network()
    result = replace_strides(model, **NARROW)
    pools = diffstride_layers(result)
    assert [pool.name for pool in pools] == [
        'stem_pooling',
        'first_main_pooling',
        'second_main_pooling',
    ]
    assert_same_weights(result, model)
    x = images(2, 32, 32, 3)
    assert np.isfinite(numbers(result(x))).all()
    for strides in ((1.3, 2.9), (1.0, 3.7), (2.2, 2.2)), ((3.1, 1.4),) * 3:
        move(result, *strides)
        assert result(x).shape == (2, 3)


def test_residual_block_is_computed_as_by_hand():
    model = randomized(functional(lambda x: block(x, 4, 2, 'one')))
    result = replace_strides(model, **NARROW)
    x = images(2, 16, 16, 3)

    def pooled(maps):
        return reference.diffstride(maps, (2, 2), 1.0, 'inside')

    at = result.get_layer
    main = np.float32(pooled(numbers(at('one_main')(x))))
    main = at('one_last')(at('one_relu')(at('one_norm')(main)))
    shortcut = at('one_shortcut')(np.float32(pooled(x)))
    expected = numbers(main) + numbers(shortcut)
    np.testing.assert_allclose(numbers(result(x)), expected, atol=1e-4)


def two_shortcuts(x):
    return layers.Add()([layers.Conv2D(4, 1, 2, name=n)(x) for n in 'ab'])


def parallel_paths(x):
    def path(x, name):
        x = layers.MaxPooling2D(3, 2, padding='same', name=f'{name}1')(x)
        x = layers.ReLU()(x)
        return layers.AveragePooling2D(3, 2, padding='same', name=f'{name}2')(x)

    return layers.Concatenate()([path(x, 'a'), path(x, 'b')])


def paths_that_do_not_meet(x):
    return [
        layers.GlobalMaxPooling2D()(layers.MaxPooling2D(2, name=n)(x))
        for n in 'ab'
    ]


def padded_windows(x):
    a = layers.Conv2D(4, 3, 2, name='a')(layers.ZeroPadding2D(1)(x))
    a = layers.Conv2D(4, 3)(layers.ZeroPadding2D(1)(a))
    return layers.Concatenate()([a, layers.MaxPooling2D(1, 2, name='b')(x)])


def operators(x):
    a = layers.Conv2D(3, 3, 2, padding='same', name='a')(x)
    b = layers.MaxPooling2D(2, padding='same', name='b')(x)
    return ops.mean(ops.relu(a) * 2.0 + b, axis=(1, 2))


def squeeze_and_excitation(x):
    x = layers.Conv2D(4, 3, 2, padding='same', name='a')(x)
    y = layers.Reshape((1, 1, 4))(layers.GlobalAveragePooling2D()(x))
    return layers.Multiply()([x, layers.Conv2D(4, 1)(y)])


def layer_called_twice(x):
    conv = layers.Conv2D(3, 3, 2, padding='same', name='a')
    return layers.GlobalMaxPooling2D()(conv(layers.ReLU()(conv(x))))


@pytest.mark.parametrize(
    'network, names, calls',
    [
        (two_shortcuts, ['a'], 1),
        (parallel_paths, ['a1', 'a2'], 2),
        (paths_that_do_not_meet, ['a', 'b'], 1),
        (padded_windows, ['a'], 2),
        (operators, ['a'], 2),
        (squeeze_and_excitation, ['a'], 1),
        (layer_called_twice, ['a'], 2),
    ],
)
def test_layers_share_a_pooling_where_their_maps_meet(network, names, calls):
    result = replace_strides(functional(network))
    pools = diffstride_layers(result)
    assert [pool.name for pool in pools] == [f'{x}_pooling' for x in names]
    for pool in pools:
        nodes = result.get_layer(pool.name)._inbound_nodes
        assert len(nodes) == calls
    move(result, *[(1.5 + i, 3.0) for i in range(len(pools))])
    result(images(1, 16, 16, 3))


def test_unknown_sizes_of_the_input():
    model = functional(lambda x: block(x, 4, 2, 'one'), (None, None, 3))
    result = replace_strides(model, **NARROW)
    assert len(diffstride_layers(result)) == 1
    if keras.backend.backend() != 'jax':
        for size in 8, 12:
            shape = result(images(1, size, 16, 3)).shape
            assert tuple(shape) == (1, size // 2, 8, 4)


# Models that cannot have learned strides


def upsampling(x):
    y = layers.MaxPooling2D(2, padding='same', name='down')(x)
    y = layers.UpSampling2D(2)(y)
    return layers.Concatenate(name='meet')([x, y])


def unequal_depths(x):
    y = layers.MaxPooling2D(2, padding='same', name='down_a')(x)
    y = layers.MaxPooling2D(2, padding='same', name='down_b')(y)
    x = layers.MaxPooling2D(4, padding='same', name='down_c')(x)
    return layers.Add(name='meet')([x, y])


def unequal_strides(x):
    y = layers.MaxPooling2D(3, (2, 4), padding='same', name='down_a')(x)
    x = layers.MaxPooling2D(3, (2, 2), padding='same', name='down_b')(x)
    x = layers.MaxPooling2D((1, 2), name='down_c')(x)
    return layers.Add(name='meet')([x, y])


def unequal_windows(x):
    y = layers.MaxPooling2D(2, name='down_a')(x)
    x = layers.Conv2D(3, 1, 2, name='down_b')(x)
    return layers.Add(name='meet')([x, y])


def flatten(x):
    x = layers.MaxPooling2D(2, padding='same', name='down')(x)
    return layers.Dense(2, name='meet')(layers.Flatten()(x))


def reshape(x):
    return layers.Reshape((64, 3), name='meet')(
        layers.MaxPooling2D(2, name='down')(x)
    )


def fixed_size(x):
    y = layers.Resizing(8, 8)(x)
    x = layers.MaxPooling2D(2, name='down')(x)
    return layers.Subtract(name='meet')([x, y])


@pytest.mark.parametrize(
    'network',
    [
        upsampling,
        unequal_depths,
        unequal_strides,
        unequal_windows,
        flatten,
        reshape,
        fixed_size,
    ],
)
def test_sizes_that_could_come_apart_are_refused(network):
    model = functional(network)
    with pytest.raises(ValueError, match=r'"meet".*"down.*`layers`'):
        replace_strides(model)


def test_both_sides_are_named():
    with pytest.raises(
        ValueError, match=r'16 samples.*learned by "down".*SpectralResizing'
    ):
        replace_strides(functional(upsampling))


# Outputs


def autoencoder(x):
    x = layers.Conv2D(4, 3, 2, padding='same', name='down')(x)
    x = layers.Conv2DTranspose(4, 3, 2, padding='same')(x)
    return layers.Conv2D(1, 3, padding='valid', name='decoded')(x)


def segmentation(x):
    x = layers.MaxPooling2D(4, padding='same', name='down')(x)
    x = layers.UpSampling2D((1, 2))(layers.ReLU()(x))
    return {
        'mean': layers.GlobalMaxPooling2D()(x),
        'map': layers.Activation('softmax', name='decoded')(x),
    }


def nested_autoencoder(x):
    encoder = sequential(
        layers.AveragePooling2D(2, padding='same', name='down')
    )
    decoder = sequential(layers.UpSampling2D(2), shape=(8, 8, 3))
    return layers.Activation('relu', name='decoded')(decoder(encoder(x)))


@pytest.mark.parametrize(
    'network', [autoencoder, segmentation, nested_autoencoder]
)
@pytest.mark.parametrize('shape', [(16, 16, 3), (None, None, 3)])
def test_an_upsampled_output_is_refused(network, shape):
    if network is nested_autoencoder:
        shape = (16, 16, 3)
    with pytest.raises(
        ValueError, match=r'"decoded".*learned by "down".*SpectralResizing'
    ):
        replace_strides(functional(network, shape))


def test_an_upsampled_line_is_refused():
    model = sequential(
        layers.Conv1D(4, 3, 2, padding='same', name='down'),
        layers.UpSampling1D(2, name='decoded'),
        shape=(16, 3),
    )
    with pytest.raises(ValueError, match=r'"decoded".*"down"'):
        replace_strides(model)


def test_an_output_of_a_fixed_size_must_keep_that_of_the_input():
    def replaced(size):
        model = sequential(
            layers.AveragePooling2D(2, padding='same'),
            layers.UpSampling2D(2, name='decoded'),
            shape=(size, size, 3),
        )
        return replace_strides(model, FixedSpectralPooling)

    assert replaced(16).output_shape == (None, 16, 16, 3)
    with pytest.raises(ValueError, match=r'"decoded".*16 samples'):
        replaced(18)  # 18 become 8, then 16.


def test_an_output_that_is_resized_to_the_input_is_trained():
    model = functional(lambda x: SpectralResizing()([autoencoder(x), x]))
    result = replace_strides(randomized(model), **NARROW)
    result.compile(keras.optimizers.SGD(0.1), 'mse', run_eagerly=True)
    x = images(2, 16, 16, 3)
    for strides in (2.0, 2.0), (1.3, 3.1):
        move(result, strides)
        assert np.isfinite(result.train_on_batch(x, x[..., :1]))


def test_features_of_a_learned_size_are_allowed():
    def network(x):
        x = layers.Conv2D(4, 3, 2, padding='same')(x)
        x = layers.UpSampling2D(2)(x)
        return layers.MaxPooling2D(2)(layers.ZeroPadding2D(1)(x))

    result = replace_strides(functional(network))
    move(result, (1.5, 3.0), (2.0, 2.0))
    assert result(images(1, 16, 16, 3)).shape[0] == 1


# Sizes that are fixed


def test_fixed_sizes_may_be_flattened():
    model = randomized(functional(flatten))
    result = replace_strides(model, FixedSpectralPooling)
    assert not diffstride_layers(result)
    assert result(images(2, 16, 16, 3)).shape == (2, 2)
    assert_same_weights(result, model)


def test_fixed_sizes_must_be_those_of_the_strided_layer_to_be_flattened():
    model = functional(flatten, (18, 18, 3))  # 9 became 8.
    with pytest.raises(ValueError, match='"meet"'):
        replace_strides(model, FixedSpectralPooling)


# The choice of layers


def test_only_chosen_layers_are_replaced():
    model = residual_network()
    arguments = {'smoothness_factor': 2.5, 'ramp': 'outside', 'norm': 'ortho'}
    result = replace_strides(model, layers=['stem'], **arguments)
    config = result.get_layer('stem_pooling').get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert len(diffstride_layers(result)) == 1
    assert result.get_layer('first_main').strides == (2, 2)
    move(result, (1.7, 2.6))
    result(images(1, 32, 32, 3))


def test_one_branch_alone_is_refused():
    model = residual_network()
    with pytest.raises(ValueError, match=r'first_add.*first_main'):
        replace_strides(model, layers=['first_main'])


def test_any_callable_is_a_pooling_cls():
    calls = []

    def pooling_cls(**kwargs):
        calls.append(kwargs)
        return layers.AveragePooling2D(2, **kwargs)

    model = sequential(
        layers.Conv2D(2, 3, (2, 2), padding='same', name='conv'),
    )
    result = replace_strides(model, pooling_cls)
    (call,) = calls
    assert call['strides'] == (2, 2)
    assert call['data_format'] == 'channels_last'
    assert call['name'] == 'conv_pooling'
    assert result.output_shape == (None, 8, 8, 2)


def subclassed():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    return Subclassed()


@pytest.mark.parametrize(
    'model, kwargs, match',
    [
        (subclassed(), {}, '`model`.*Subclassed'),
        (layers.Conv2D(4, 3, 2), {}, '`model`.*Conv2D'),
        (keras.Sequential([layers.MaxPooling2D(2)]), {}, '`model`.*built'),
        (sequential(layers.Conv2D(4, 3)), {}, 'a layer to replace'),
        (
            sequential(layers.MaxPooling2D(2, name='down')),
            {'layers': ['up']},
            "`layers`.*'down'.*'up'",
        ),
        (
            sequential(layers.MaxPooling2D(2, name='down')),
            {'layers': []},
            'a layer to replace',
        ),
        (
            sequential(layers.MaxPooling1D(2, name='down'), shape=(8, 2)),
            {'pooling_cls': DiffStride3D},
            '`pooling_cls` must be a pooling over 1 axes.*"down"',
        ),
        (
            sequential(layers.MaxPooling2D(2)),
            {'smoothness_factor': -1.0},
            '`smoothness_factor`',
        ),
    ],
)
def test_wrong_arguments(model, kwargs, match):
    with pytest.raises(ValueError, match=match):
        replace_strides(model, **kwargs)


# The parts of a model that are kept


def test_the_given_model_is_left_as_it_is():
    model = residual_network()
    model.compile('sgd', 'mse')
    config = model.to_json()
    weights = [numbers(x) for x in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    x = images(2, 32, 32, 3)
    before = numbers(model(x))

    result = replace_strides(model, **NARROW)
    for variable in result.variables:
        variable.assign(np.ones(variable.shape))

    assert model.to_json() == config
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    for variable, value in zip(model.variables, weights, strict=True):
        np.testing.assert_array_equal(numbers(variable), value)
    np.testing.assert_array_equal(numbers(model(x)), before)
    assert not set(map(id, model.layers)) & set(map(id, result.layers))


def test_the_given_model_works_after_its_copy_was_trained():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(2, 3, 2),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
        ]
    )
    x = images(4, 8, 8, 1)
    before = numbers(model(x))
    result = replace_strides(model, **NARROW)
    result.compile('sgd', 'mse')
    result.fit(x, images(4, 2), verbose=0)
    result.evaluate(x, images(4, 2), verbose=0)
    np.testing.assert_array_equal(numbers(model(x)), before)


def test_trainable_flags_dtypes_and_names_are_kept():
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3), name='pixels'),
            layers.Conv2D(4, 3, 2, dtype='mixed_bfloat16', trainable=False),
            layers.BatchNormalization(trainable=False),
            layers.Conv2D(4, 3, 2, dtype='float32'),
        ],
        name='network',
    )
    result = replace_strides(model)
    assert result.name == 'network'
    assert result.inputs[0].name == 'pixels'
    first, first_pool, norm, second, second_pool = result.layers
    assert (first.trainable, norm.trainable, second.trainable) == (
        False,
        False,
        True,
    )
    assert first.dtype_policy.name == 'mixed_bfloat16'
    assert first_pool.dtype_policy.name == 'mixed_bfloat16'
    assert second_pool.dtype_policy.name == 'float32'
    assert len(result.trainable_variables) == 3
    assert not first_pool.trainable
    assert second_pool.trainable


def base_within(frozen):
    """A model whose inner base, or one layer of it, is frozen."""
    base = sequential(
        DiffStride(1.5, name='own'),
        layers.Conv2D(4, 3, 2, padding='same', name='inner'),
    )
    base.name = 'base'

    def network(x):
        x = base(x)
        x = layers.MaxPooling2D(2, name='outer')(x)
        return layers.GlobalMaxPooling2D()(x)

    model = functional(network)
    for layer in models.flatten(model):
        if layer.name == frozen:
            layer.trainable = False
    return model


@pytest.mark.parametrize(
    'frozen, learned',
    [
        (None, {'own', 'inner_pooling', 'outer_pooling'}),
        ('base', {'outer_pooling'}),
        ('inner', {'own', 'outer_pooling'}),
        ('outer', {'own', 'inner_pooling'}),
    ],
)
def test_strides_within_a_frozen_base_are_not_learned(frozen, learned):
    result = replace_strides(base_within(frozen), **NARROW)
    variables = set(map(id, result.trainable_variables))
    pools = diffstride_layers(result)
    found = {x.name for x in pools if id(x.strides) in variables}
    assert found == learned
    result.compile(keras.optimizers.SGD(0.5), 'mse', run_eagerly=True)
    before = {pool.name: pool.stride_values for pool in pools}
    result.train_on_batch(images(2, 16, 16, 3), images(2, 4))
    moved = {x.name for x in pools if x.stride_values != before[x.name]}
    assert moved == learned


def test_a_stride_that_a_frozen_layer_shares_is_not_learned():
    model = residual_network()
    model.get_layer('first_shortcut').trainable = False
    pools = diffstride_layers(replace_strides(model))
    assert [pool.trainable for pool in pools] == [True, False, True]
    pools = diffstride_layers(replace_strides(model, trainable=True))
    assert all(pool.trainable for pool in pools)


def test_a_frozen_model_stays_frozen():
    model = sequential(layers.Conv2D(4, 3, 2, name='conv'))
    model.trainable = False
    model.get_layer('conv').trainable = True
    result = replace_strides(model)
    assert not result.trainable_variables
    result.trainable = True
    assert len(result.trainable_variables) == 3


def test_channels_first():
    model = sequential(
        layers.Conv2D(4, 3, (2, 4), 'same', 'channels_first', name='conv'),
        layers.GlobalAveragePooling2D('channels_first'),
        shape=(3, 16, 16),
    )
    result = replace_strides(model)
    pool = result.get_layer('conv_pooling')
    assert pool.data_format == 'channels_first'
    assert pool.stride_values == (2.0, 4.0)
    assert pool.compute_output_shape((None, 4, 16, 16))[1] == 4
    assert_same_weights(result, model)


def test_several_inputs_and_outputs_in_their_structures():
    left = keras.Input((16, 16, 3), name='left')
    right = keras.Input((16, 16, 3), name='right')
    conv = layers.Conv2D(4, 3, 2, padding='same', name='conv')
    a, b = conv(left), conv(right)
    model = keras.Model(
        {'left': left, 'right': right},
        {'sum': layers.Add()([a, b]), 'left': a},
    )
    result = replace_strides(randomized(model), **NARROW)
    (pool,) = diffstride_layers(result)
    assert pool.name == 'conv_pooling'
    x = {'left': images(1, 16, 16, 3), 'right': images(1, 16, 16, 3, seed=1)}
    y = result(x)
    assert set(y) == {'sum', 'left'}
    at = result.get_layer('conv')
    expected = numbers(at(x['left'])) + numbers(at(x['right']))
    expected = reference.diffstride(expected, (2, 2), 1.0, 'inside')
    np.testing.assert_allclose(numbers(y['sum']), expected, atol=1e-4)
    assert y['left'].shape == (1, 8, 8, 4)


def nested_network():
    """A shared Sequential, then a Functional of a fixed input size."""
    stem = sequential(
        layers.Conv2D(3, 3, 2, padding='same', name='stem'), shape=(32, 32, 3)
    )
    stem.name = 'stems'
    inner = functional(
        lambda x: layers.Conv2D(4, 3, 2, padding='same', name='inside')(x)
    )
    inner.name = 'inner'
    left, right = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    x = layers.Add()([stem(left), stem(right)])
    y = inner(x, training=False)
    return randomized(
        keras.Model([left, right], layers.GlobalMaxPooling2D()(y))
    )


def test_models_within_models():
    model = nested_network()
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    assert [pool.name for pool in diffstride_layers(result)] == [
        'stem_pooling',
        'inside_pooling',
    ]
    assert isinstance(result.get_layer('stems'), keras.Sequential)
    inner = result.get_layer('inner')
    assert isinstance(inner.get_layer('inside_pooling'), DiffStride)
    assert inner.input_shape == (None, None, None, 3)
    x = [images(2, 32, 32, 3), images(2, 32, 32, 3, seed=1)]
    move(result, (1.3, 2.9), (3.7, 1.0))
    assert result(x).shape == (2, 4)


def sharing_network():
    """A Sequential that meets a layer outside."""
    branch = sequential(
        layers.Conv2D(4, 3, 2, padding='same', name='inside'),
        layers.BatchNormalization(name='norm'),
    )

    def network(x):
        y = layers.Conv2D(4, 1, 2, name='outside')(x)
        return layers.Add()([branch(x, training=True), y])

    return randomized(functional(network))


def test_a_model_that_shares_a_pooling_is_dissolved():
    model = sharing_network()
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    assert len(diffstride_layers(result)) == 1
    x = images(2, 16, 16, 3)
    expected = [
        reference.diffstride(
            numbers(result.get_layer(name)(x)), (2, 2), 1.0, 'inside'
        )
        for name in ('inside', 'outside')
    ]
    norm = result.get_layer('norm')
    expected[0] = numbers(norm(expected[0], training=True))
    np.testing.assert_allclose(numbers(result(x)), sum(expected), atol=1e-4)


@pytest.mark.parametrize(
    'network', [residual_network, nested_network, sharing_network]
)
def test_saving_and_loading(network, tmp_path):
    result = replace_strides(network(), **NARROW)
    pools = diffstride_layers(result)
    move(result, *[(1.5 + 0.2 * i, 2.3) for i in range(len(pools))])
    result.save(tmp_path / 'model.keras')
    loaded = keras.saving.load_model(tmp_path / 'model.keras')
    x = [images(2, *y.shape[1:], seed=i) for i, y in enumerate(result.inputs)]
    x = x if len(x) > 1 else x[0]
    np.testing.assert_allclose(
        numbers(loaded(x)), numbers(result(x)), rtol=1e-5
    )
    assert len(diffstride_layers(loaded)) == len(pools)
    for model in loaded, result:
        move(model, *[(2.7, 1.1 + 0.3 * i) for i in range(len(pools))])
    np.testing.assert_allclose(
        numbers(loaded(x)), numbers(result(x)), rtol=1e-5
    )


def test_a_stride_that_was_learned_before_is_not_shared():
    def network(x):
        y = DiffStride(2.0, ramp='inside', name='own')(x)
        x = layers.MaxPooling2D(3, 2, padding='same', name='down')(x)
        return layers.Add(name='meet')([x, y])

    with pytest.raises(ValueError, match=r'"meet".*"down".*"own"'):
        replace_strides(functional(network))


def test_preprocessing_and_functions_are_kept():
    factor = 3.0
    norm = layers.Normalization()
    norm.adapt(images(64, 16, 16, 3) * 3.0 + 5.0)
    model = sequential(
        norm,
        layers.Lambda(lambda x: ops.tanh(factor * x)),
        layers.Lambda(lambda x: x[..., :2], output_shape=(16, 16, 2)),
        layers.Conv2D(2, 1, 2, name='conv'),
    )
    result = replace_strides(model, **NARROW)
    x = images(2, 16, 16, 3)
    for layer in model.layers[:3]:
        x = layer(x)
    x = reference.diffstride(numbers(x), (2, 2), 1.0, 'inside')
    expected = numbers(model.layers[3](x.repeat(2, 1).repeat(2, 2)))
    actual = numbers(result(images(2, 16, 16, 3)))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_layer_that_cannot_be_copied_is_named():
    class Scale(layers.Layer):
        def __init__(self, function):
            super().__init__(name='scale')
            self.function = function

        def call(self, x):
            return self.function(x)

    model = sequential(Scale(lambda x: 2 * x), layers.MaxPooling2D(2))
    with pytest.raises(
        ValueError, match=r'(?s)`model` must.*layer "scale".*get_c'
    ):
        replace_strides(model)


def test_vocabularies_are_kept():
    pytest.importorskip('tensorflow')  # For the lookup, on every backend.
    words = layers.IntegerLookup()
    words.adapt([7, 7, 5, 3])
    model = keras.Sequential(
        [
            keras.Input((8,), dtype='int64'),
            words,
            layers.Embedding(5, 4),
            layers.Conv1D(2, 1, 2),
        ]
    )
    result = replace_strides(randomized(model), **NARROW)
    x = np.array([[5] * 8, [7] * 8])
    np.testing.assert_allclose(numbers(result(x)), numbers(model(x)), atol=2e-6)


def test_classes_of_models_are_kept_where_they_can_be():
    class Network(keras.Model):
        def hello(self):
            return 'hello'

    inputs = keras.Input((16, 16, 3))
    model = Network(inputs, layers.MaxPooling2D(2)(inputs))
    assert replace_strides(model).hello() == 'hello'

    class OfDepth(keras.Model):
        def __init__(self, depth):
            inputs = keras.Input((16, 16, 3))
            super().__init__(inputs, layers.MaxPooling2D(depth)(inputs))

    result = replace_strides(OfDepth(2))
    assert isinstance(result, keras.Model)
    assert len(diffstride_layers(result)) == 1


def test_an_own_training_step_is_kept_or_refused():
    class Network(keras.Model):
        steps = 0

        def train_step(self, *args, **kwargs):
            type(self).steps += 1
            return super().train_step(*args, **kwargs)

    class WithFactor(Network):
        def __init__(self, inputs, outputs, factor=1.0, **kwargs):
            super().__init__(inputs, outputs, **kwargs)
            self.factor = factor

    inputs = keras.Input((8, 8, 1))
    outputs = layers.GlobalAveragePooling2D()(layers.MaxPooling2D(2)(inputs))
    result = replace_strides(Network(inputs, outputs))
    result.compile('sgd', 'mse')
    result.fit(images(2, 8, 8, 1), images(2, 1), verbose=0)
    assert Network.steps
    with pytest.raises(ValueError, match=r'own `train_step`.*WithFactor'):
        replace_strides(WithFactor(inputs, outputs, factor=2.0))


# Known networks


APPLICATIONS = {
    'ResNet50': 5,
    'MobileNetV2': 5,
    'EfficientNetB0': 5,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', APPLICATIONS)
def test_applications(name, tmp_path):
    model = getattr(keras.applications, name)(
        weights=None, classes=3, input_shape=(64, 64, 3)
    )
    result = replace_strides(model, **NARROW)
    assert_same_weights(result, model)
    pools = diffstride_layers(result)
    assert len(pools) == APPLICATIONS[name]

    # Sizes at the start, of every layer.
    def shapes(model, names):
        part = keras.Model(
            model.inputs[0], [model.get_layer(x).output for x in names]
        )
        return [tuple(y.shape) for y in part(images(2, 64, 64, 3))]

    strided = {
        x.name for x in model.layers if max(getattr(x, 'strides', (1,))) > 1
    }
    names = [x.name for x in model.layers[1:] if x.name not in strided]
    assert shapes(result, names) == shapes(model, names)

    result.compile(keras.optimizers.SGD(0.1), 'mse')
    x, y = 64 * images(2, 64, 64, 3), images(2, 3)
    history = result.fit(x, y, verbose=0)
    assert np.isfinite(history.history['loss'][0])
    for pool in pools:
        assert pool.stride_values != (2.0, 2.0)

    move(result, *[(1.6 + 0.1 * i, 2.4) for i in range(len(pools))])
    moved = numbers(result(x))
    assert np.isfinite(moved).all()
    result.save(tmp_path / 'model.keras')
    loaded = keras.saving.load_model(tmp_path / 'model.keras')
    np.testing.assert_allclose(numbers(loaded(x)), moved, rtol=1e-4)
