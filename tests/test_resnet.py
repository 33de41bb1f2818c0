"""Pre-activation ResNets: shapes, sizes, functions, errors and gin."""

import functools
import json

import gin
import keras
import numpy as np
import pytest
from backends import array, dtype_of, error_of, random, randomized, refusals
from keras import layers, ops

from diffstride import models, resnet
from diffstride.pooling import DiffStride, FixedSpectralPooling, SpatialPooling

# The example registers classes that gin files may name in this way.
AVERAGE_OF_GIN = gin.external_configurable(
    layers.AveragePooling2D, module='test.layers'
)


def max_pooling(strides, data_format):
    return layers.MaxPooling2D(
        3, strides, padding='same', data_format=data_format
    )


# The sizes of a map of 24 x 17 samples after strides of 2 and 3.
SIZES = {
    DiffStride: (20, 14),
    functools.partial(DiffStride, smoothness_factor=1.5): (16, 10),
    FixedSpectralPooling: (12, 4),
    SpatialPooling: (12, 6),
    None: (12, 6),
    layers.MaxPooling2D: (12, 6),
    max_pooling: (12, 6),
    layers.AveragePooling2D: (12, 5),
    AVERAGE_OF_GIN: (12, 5),
}
every_pooling = pytest.mark.parametrize('pooling_cls', SIZES)


def small_resnet(strides='1, 1, 2', filters=(4, 4, 6), classes=3, **kwargs):
    return resnet.Resnet(list(filters), strides, classes, **kwargs)


def pooling_layer(pooling_cls, **kwargs):
    kwargs = {'strides': 2, 'project': True, **kwargs}
    return resnet.ResidualLayer(6, pooling_cls=pooling_cls, **kwargs)


def layers_of(model, cls):
    return [x for x in models.flatten(model) if isinstance(x, cls)]


def residual_layers(model):
    return layers_of(model, resnet.ResidualLayer)


@every_pooling
def test_maps_shrink_where_the_strides_say(pooling_cls):
    layer = pooling_layer(strides=(2, 3), pooling_cls=pooling_cls)
    y = array(layer(random(2, 24, 17, 3)))
    assert np.isfinite(y).all() and y.shape == (2, *SIZES[pooling_cls], 6)
    learns = bool(layers_of(layer, DiffStride))
    shape = (2, None, None, 6) if learns else y.shape
    assert layer.compute_output_shape((2, 24, 17, 3)) in (y.shape, shape)


@pytest.mark.parametrize('channels_first', [None, True])
@pytest.mark.parametrize(
    'pooling_cls', [DiffStride, None, layers.AveragePooling2D, max_pooling]
)
def test_channels_first_computes_the_same_shapes(pooling_cls, channels_first):
    last = pooling_layer(pooling_cls)(keras.Input((24, 16, 3))).shape
    if channels_first is None:
        keras.config.set_image_data_format('channels_first')
    kwargs = {'pooling_cls': pooling_cls, 'channels_first': channels_first}
    first = pooling_layer(**kwargs)(keras.Input((3, 24, 16))).shape
    assert first == tuple(last[axis] for axis in (0, 3, 1, 2))
    model = small_resnet('2, 1, 2', **kwargs)
    assert model(keras.Input((24, 17, 3))).shape == (None, 3)
    assert isinstance(model.layers[0], layers.Permute)
    for layer in layers_of(model, (layers.Conv2D, DiffStride)):
        assert layer.data_format == 'channels_first'
    for layer in layers_of(model, layers.BatchNormalization):
        assert layer.axis == 1


def test_strides_are_a_string_or_a_list_or_pairs():
    for strides in [
        '1, 2, (3, 1.5)',
        ' 1,2.0 , [3,1.5], ',
        [1, 2, (3, 1.5)],
        [np.int64(1), np.float32(2), np.array([3, 1.5])],
    ]:
        assert resnet.parse_strides(strides) == [(1, 1), (2, 2), (3, 1.5)]
    model = small_resnet(strides, pooling_cls=DiffStride, num_layers=1)
    pools = [layer.pool for layer in residual_layers(model)]
    assert [x.stride_values for x in pools] == [(2.0, 2.0), (3.0, 1.5)]
    assert len(layers_of(model, DiffStride)) == 2  # None for a stride of 1.


def test_depths_and_filters_are_those_of_the_paper():
    for make, depth, projections, filters in [
        (resnet.resnet18, 18, 3, [64, 64, 128, 128, 256, 256, 512, 512]),
        (resnet.resnet56, 56, 2, [16] * 9 + [32] * 9 + [64] * 9),
        # A first block that strides projects.
        (functools.partial(resnet.resnet18, '2, 2, 2, 2, 2', 8),
         18, 4, [8, 8, 16, 16, 32, 32, 64, 64]),
    ]:  # fmt: skip
        model = make(num_output_classes=10)
        sizes = [x.kernel_size for x in layers_of(model, layers.Conv2D)]
        assert sizes.count((3, 3)) + 1 == depth
        assert sizes.count((1, 1)) == projections
        assert [layer.filters for layer in residual_layers(model)] == filters


@pytest.mark.parametrize(
    'strides, pool_after, stem',
    [
        ('1, 1, 2', 'activation', []),
        ('2, 1, 2', 'convolution', ['DiffStride']),
        ('2, 1, 2', 'activation',
         ['BatchNormalization', 'ReLU', 'DiffStride']),
    ],
)  # fmt: skip
def test_order_of_the_layers_of_a_network(strides, pool_after, stem):
    model = small_resnet(strides, pooling_cls=DiffStride, pool_after=pool_after)
    names = [type(layer).__name__ for layer in model.layers]
    assert names[: 1 + len(stem)] == ['Conv2D', *stem]
    assert names[1 + len(stem) :] == [
        *('Sequential', 'Sequential', 'BatchNormalization', 'ReLU'),
        *('GlobalAveragePooling2D', 'Dense'),
    ]
    places = {layer.pool_after for layer in residual_layers(model)}
    assert places == {pool_after}
    assert not any(x.use_bias for x in layers_of(model, layers.Conv2D))


def normalized(x, norm):
    scale = norm.gamma / ops.sqrt(norm.moving_variance + norm.epsilon)
    return (x - norm.moving_mean) * scale + norm.beta


def convolved(x, layer, strides=1):
    return ops.conv(x, layer.kernel, strides, padding='same')


@pytest.mark.parametrize('pool_after', resnet.POOL_AFTER)
@pytest.mark.parametrize('project', [False, True])
@pytest.mark.parametrize(
    'pooling_cls', [None, DiffStride, FixedSpectralPooling, SpatialPooling]
)
def test_layer_is_the_pre_activation_formula(pooling_cls, project, pool_after):
    kwargs = {'project': project, 'pool_after': pool_after}
    kwargs['strides'] = (2, 3) if project else 1
    layer = pooling_layer(pooling_cls, **kwargs)
    x = ops.convert_to_tensor(random(2, 11, 12, 6))
    layer(x)
    randomized(layer)
    pool = layer.pool or (lambda x: x)
    pools_late = pool_after == 'activation'
    strides = (2, 3) if project and pooling_cls is None else 1
    h = ops.relu(normalized(x, layer.norms[0]))
    y = convolved(h, layer.convs[0], strides)
    y = normalized(y if pools_late else pool(y), layer.norms[1])
    y = pool(ops.relu(y)) if pools_late else ops.relu(y)
    shortcut = x
    if project:
        # Here the 1x1 convolution runs before the pooling: the two commute.
        shortcut = pool(convolved(h, layer.shortcut, strides))
    expected = array(convolved(y, layer.convs[1]) + shortcut)
    assert error_of(layer(x), expected) <= 1e-5


@pytest.mark.parametrize('pooling_cls', [DiffStride, FixedSpectralPooling])
def test_losses_penalize_kernels_the_last_bias_and_strides(pooling_cls):
    weights = {'weight_decay': 0.25, 'stride_cost': 0.5}
    model = small_resnet('1, 2, (3, 1)', pooling_cls=pooling_cls, **weights)
    model.build((None, 16, 16, 3))
    randomized(model)
    model(random(1, 16, 16, 3))
    penalized = [layer.kernel for layer in layers_of(model, layers.Conv2D)]
    penalized += model.layers[-1].weights
    expected = 0.25 * sum(np.sum(array(x) ** 2) for x in penalized)
    areas = [np.prod(x.stride_values) for x in layers_of(model, DiffStride)]
    expected += 0.5 * np.sum(1 / np.cumprod(areas))
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


test_wrong_arguments_are_refused = refusals(
    (lambda: small_resnet('1, 1'),
     r'`strides` must be as many as `filters`, 3\. Rec.*strides=.*1\.0'),
    (lambda: small_resnet('1.5, 1, 1'), '`strides`.*integers.*=.1.5'),
    (lambda: small_resnet('1, 2, 2', id_only=[0]),
     r'`strides` must be 1 in the blocks of `id_only`.*=\[0\]'),
    (lambda: small_resnet(id_only=[2]), r'`id_only` must be .*=\[2\]'),
    (lambda: small_resnet(filters=(4, 0, 6)), '`filters` must be a list'),
    (lambda: resnet.ResidualLayer(4, strides=(1, 2)),
     r'`strides` must be 1 .*project=False\. Received: strides=\(1, 2\)'),
    (lambda: small_resnet('1 1 2'), "`strides`.*such as.*'1 1 2'"),
    (lambda: small_resnet('__import__("os").getcwd()'), 'such as'),
    (lambda: small_resnet(None), '`strides`.*such as.*=None'),
    (lambda: small_resnet(num_layers=0), '`num_layers` .*=0'),
    (lambda: resnet.Resnet([4], '1', 0), '`num_output_classes` .*=0'),
    (lambda: resnet.resnet18(width=0.5), '`width` .*=0.5'),
    (lambda: small_resnet(weight_decay=-1), '`weight_decay` .*=-1'),
    (lambda: small_resnet(stride_cost=-1), '`stride_cost` .*=-1'),
    (lambda: small_resnet(pooling_cls=lambda **unused: 'pool'),
     "`pooling_cls` must return a layer.*='pool'"),
    (lambda: small_resnet(pooling_cls=3), '`pooling_cls` must be .*=3'),
    (lambda: resnet.ResidualLayer(4, project='no'), "`project` .*='no'"),
    (lambda: resnet.ResidualLayer(4, pool_after=3), '`pool_after` .*=3'),
    (lambda: resnet.ResidualLayer(5)(random(1, 8, 8, 4)),
     '`filters`.*4.*filters=5'),
)  # fmt: skip


@every_pooling
def test_layer_config_round_trips_through_json(pooling_cls):
    layer = pooling_layer(
        pooling_cls,
        kernel_size=5,
        strides=(2, 3),
        channels_first=True,
        weight_decay=0.1,
        batch_norm_args={'momentum': 0.5, 'epsilon': 0.1},
        pool_after='activation',
        name='residual',
        dtype='mixed_bfloat16',
    )
    config = json.loads(json.dumps(keras.layers.serialize(layer)))
    copy = keras.layers.deserialize(config)
    assert copy.get_config() == layer.get_config()
    for name in ('filters', 'kernel_size', 'strides', 'pool_after', 'name'):
        assert getattr(copy, name) == getattr(layer, name)
    assert copy.norms[0].momentum == 0.5
    assert copy.convs[0].kernel_regularizer.l2 == pytest.approx(0.1)
    assert type(copy.pool).__name__ == type(layer.pool).__name__
    assert copy.pool is None or copy.pool is not layer.pool
    assert copy(keras.Input((4, 8, 8))).dtype == 'bfloat16'
    inner = [*copy.convs, *copy.norms, copy.shortcut]
    inner += layers_of(copy, DiffStride)
    assert {x.dtype_policy.name for x in inner} == {'mixed_bfloat16'}


@pytest.mark.parametrize('pooling_cls', [DiffStride, max_pooling])
def test_copies_are_the_same_whatever_gin_says(pooling_cls, tmp_path):
    keras.config.set_dtype_policy('mixed_bfloat16')
    model = small_resnet('2, 1, (2, 3)', pooling_cls=pooling_cls, num_layers=1)
    x = random(2, 24, 17, 3)
    model(x)
    randomized(model)
    assert dtype_of(model(x)) == 'float32'
    model.save(tmp_path / 'model.keras')
    keras.config.set_dtype_policy('float32')
    gin.parse_config("""
        pooling.DiffStride.smoothness_factor = 1.0
        resnet.ResidualLayer.kernel_size = 5
        batch_norm.epsilon = 0.5
    """)
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    for copy in (loaded, keras.models.clone_model(model)):
        copy(x)
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(array(copy(x)), array(model(x)))
        assert not set(map(id, copy.weights)) & set(map(id, model.weights))
        for layer in layers_of(copy, layers.Conv2D):
            assert layer.compute_dtype == 'bfloat16'
        for pool in layers_of(copy, DiffStride):
            assert pool.strides.dtype == 'float32'


def test_bindings_of_gin_reach_the_whole_network():
    gin.parse_config("""
        resnet.resnet18.strides = '1, 1, 3, 2, 3'
        resnet.Resnet:
          pooling_cls = @pooling.DiffStride
          pool_after = 'activation'
          num_output_classes = 7
          output_activation = 'softmax'
        resnet.ResnetBlock.num_layers = 1
        resnet.ResidualLayer.kernel_size = 5
        pooling.DiffStride:
          smoothness_factor = 2.0
          ramp = 'inside'
        batch_norm.epsilon = 0.5
    """)
    model = resnet.resnet18(width=2)
    pools = layers_of(model, DiffStride)
    assert {(x.smoothness_factor, x.ramp) for x in pools} == {(2.0, 'inside')}
    assert [pool.stride_values[0] for pool in pools] == [3, 2, 3]
    norms = layers_of(model, layers.BatchNormalization)
    assert [norm.epsilon for norm in norms] == [0.5] * len(norms)
    residual = [(x.kernel_size, x.pool_after) for x in residual_layers(model)]
    assert set(residual) == {(5, 'activation')}
    assert model.layers[-1].units == 7
    assert model.layers[-1].activation is keras.activations.softmax
    # A class in the call gets the bindings, too.
    for make in (pooling_layer, small_resnet):
        (*_, pool) = layers_of(make(pooling_cls=DiffStride), DiffStride)
        assert pool.smoothness_factor == 2.0
