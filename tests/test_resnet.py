"""Pre-activation ResNets: shapes, sizes, functions, errors and gin."""

import functools
import json

import gin
import keras
import numpy as np
import pytest
from backends import dtype_of
from keras import ops

from diffstride import DiffStride, FixedSpectralPooling, SpatialPooling, resnet


def max_pooling(strides, data_format):
    return keras.layers.MaxPooling2D(
        3, strides, padding='same', data_format=data_format
    )


POOLINGS = {
    'DiffStride': DiffStride,
    'FixedSpectralPooling': FixedSpectralPooling,
    'SpatialPooling': SpatialPooling,
    'None': None,
    'MaxPooling2D': keras.layers.MaxPooling2D,
    'AveragePooling2D': keras.layers.AveragePooling2D,
    'function': max_pooling,
    'partial': functools.partial(DiffStride, smoothness_factor=1.5),
}
every_pooling = pytest.mark.parametrize(
    'pooling_cls', POOLINGS.values(), ids=POOLINGS
)


def images(*shape):
    values = np.random.default_rng(0).normal(size=shape)
    return values.astype('float32')


def small_resnet(strides='1, 1, 2', filters=(4, 4, 6), classes=3, **kwargs):
    return resnet.Resnet(list(filters), strides, classes, **kwargs)


def layers_of(layer, cls):
    """Returns the layers of a class within another, from input to output."""
    found = []
    for inner in layer._layers:
        found += [inner] if isinstance(inner, cls) else []
        found += layers_of(inner, cls)
    return found


def residual_layers(model):
    return layers_of(model, resnet.ResidualLayer)


def randomize(model):
    """Gives every weight a value of its own, strides and statistics too."""
    random = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign_add(0.1 + 0.3 * random.random(weight.shape))


# Shapes and sizes


@every_pooling
def test_outputs_are_finite_logits(pooling_cls):
    model = small_resnet('1, 2, (3, 2)', pooling_cls=pooling_cls, num_layers=1)
    y = model(images(2, 24, 17, 3))
    assert tuple(y.shape) == (2, 3)
    assert np.all(np.isfinite(y))
    assert model.dtype_policy.name == 'float32'


@pytest.mark.parametrize(
    'pooling_cls, sizes',
    [
        (DiffStride, [20, 18, 14]),
        (FixedSpectralPooling, [10, 4, 2]),
        (SpatialPooling, [11, 6, 2]),
        (None, [11, 6, 2]),
        (keras.layers.AveragePooling2D, [10, 5, 1]),
    ],
)
def test_maps_shrink_where_the_strides_say(pooling_cls, sizes):
    model = resnet.resnet18(
        '1, 1, 3, 2, 3', 2, num_output_classes=3, pooling_cls=pooling_cls
    )
    x = ops.convert_to_tensor(images(2, 32, 32, 3))
    actual = []
    for layer in model.layers:
        x = layer(x)
        if isinstance(layer, keras.Sequential):
            actual.append(tuple(x.shape[1:3]))
    assert actual == [(size, size) for size in [32, *sizes]]


@every_pooling
def test_computed_shapes_are_those_of_the_outputs(pooling_cls):
    layer = resnet.ResidualLayer(
        5, strides=(2, 3), pooling_cls=pooling_cls, project=True
    )
    shape = layer.compute_output_shape((2, 24, 17, 3))
    actual = tuple(layer(images(2, 24, 17, 3)).shape)
    sizes = (None, None) if layers_of(layer, DiffStride) else actual[1:3]
    assert tuple(shape) == (2, *sizes, 5)
    for pool in layers_of(layer, DiffStride):
        pool.pin()
    assert tuple(layer.compute_output_shape((2, 24, 17, 3))) == actual


@every_pooling
def test_channels_first_computes_the_same_shapes(pooling_cls):
    model = small_resnet(
        '2, 1, 2', pooling_cls=pooling_cls, channels_first=True
    )
    assert model(keras.Input((24, 17, 3))).shape == (None, 3)
    assert isinstance(model.layers[0], keras.layers.Permute)
    for layer in layers_of(model, keras.layers.Conv2D):
        assert layer.data_format == 'channels_first'
    for layer in layers_of(model, keras.layers.BatchNormalization):
        assert layer.axis == 1
    layer = resnet.ResidualLayer(
        5, strides=2, pooling_cls=pooling_cls, project=True, channels_first=True
    )
    y = layer(keras.Input((3, 24, 16)))
    pooled = resnet.ResidualLayer(
        5, strides=2, pooling_cls=pooling_cls, project=True
    )(keras.Input((24, 16, 3)))
    assert y.shape == tuple(pooled.shape[axis] for axis in (0, 3, 1, 2))


@pytest.mark.parametrize('make', ['layer', 'block', 'network'])
def test_keras_image_data_format_is_the_default(make):
    keras.config.set_image_data_format('channels_first')
    arguments = {'strides': 2, 'pooling_cls': DiffStride, 'project': True}
    model = {
        'layer': lambda: resnet.ResidualLayer(5, **arguments),
        'block': lambda: resnet.ResnetBlock(5, 2, pooling_cls=DiffStride),
        'network': lambda: small_resnet(pooling_cls=DiffStride),
    }[make]()
    for layer in layers_of(model, (keras.layers.Conv2D, DiffStride)):
        assert layer.data_format == 'channels_first'
    shape = (24, 16, 3) if make == 'network' else (3, 24, 16)
    y = model(keras.Input(shape))
    assert y.shape[1] == (3 if make == 'network' else 5)


def test_images_of_unknown_size_are_accepted():
    model = small_resnet(pooling_cls=DiffStride)
    assert model(keras.Input((None, None, 3))).shape == (None, 3)
    for size in (16, 21):
        assert np.all(np.isfinite(model(images(2, size, 18, 3))))


@pytest.mark.parametrize(
    'strides',
    [
        '1, 2, (3, 1.5)',
        ' 1,2.0 , [3,1.5], ',
        [1, 2, (3, 1.5)],
        (1.0, (2, 2), [3, 1.5]),
        [np.int64(1), np.float32(2), np.array([3, 1.5])],
    ],
    ids=str,
)
def test_strides_are_a_string_or_a_list_or_pairs(strides):
    model = small_resnet(strides, pooling_cls=DiffStride, num_layers=1)
    assert len(layers_of(model.layers[0], DiffStride)) == 0
    assert [layer.strides for layer in residual_layers(model)] == [
        (2.0, 2.0),
        (3.0, 1.5),
    ]
    assert resnet.parse_strides(strides) == [(1, 1), (2, 2), (3, 1.5)]


@pytest.mark.parametrize(
    'strides, count', [('1, 1, 1', 0), ('2, 1, 1', 1), ('1, 1, (1, 2)', 1)]
)
def test_a_stride_of_one_makes_no_pooling_layer(strides, count):
    model = small_resnet(strides, pooling_cls=DiffStride)
    assert len(layers_of(model, DiffStride)) == count


# Architecture


@pytest.mark.parametrize(
    'width, classes, pooling_cls, strides, count',
    [
        (64, 10, None, '1, 1, 2, 2, 2', 11179978),
        (64, 10, DiffStride, '1, 1, 2, 2, 2', 11179978 + 3 * 2),
        (64, 100, FixedSpectralPooling, '1, 1, 2, 2, 2', 11179978 + 90 * 513),
        (8, 10, None, '1, 1, 2, 2, 2', 177154),
        (8, 10, DiffStride, '1, 1, 3, 1, (1, 2)', 177154 + 2 * 2),
        # A first block that strides projects: a 1x1 convolution, 8 -> 8.
        (8, 10, DiffStride, '2, 2, 2, 2, 2', 177154 + 8 * 8 + 5 * 2),
    ],
)
def test_parameters_of_resnet18(width, classes, pooling_cls, strides, count):
    model = resnet.resnet18(
        strides, width, num_output_classes=classes, pooling_cls=pooling_cls
    )
    model(keras.Input((32, 32, 3)))
    assert model.count_params() == count


def test_depths_are_those_of_the_names():
    for make, depth, projections in [
        (resnet.resnet18, 18, 3),
        (resnet.resnet56, 56, 2),
    ]:
        model = make(num_output_classes=10)
        sizes = [
            layer.kernel_size for layer in layers_of(model, keras.layers.Conv2D)
        ]
        assert sizes.count((3, 3)) + 1 == depth
        assert sizes.count((1, 1)) == projections


def test_resnet56_has_the_filters_of_the_paper():
    model = resnet.resnet56(num_output_classes=10)
    filters = [layer.filters for layer in residual_layers(model)]
    assert filters == [16] * 9 + [32] * 9 + [64] * 9


def test_network_ends_in_norm_relu_mean_and_dense():
    model = small_resnet(pooling_cls=DiffStride)
    assert [type(layer).__name__ for layer in model.layers] == [
        'Conv2D',
        'Sequential',
        'Sequential',
        'BatchNormalization',
        'ReLU',
        'GlobalAveragePooling2D',
        'Dense',
    ]
    assert not any(
        layer.use_bias for layer in layers_of(model, keras.layers.Conv2D)
    )


def normalized(x, norm):
    scale = norm.gamma / np.sqrt(norm.moving_variance + norm.epsilon)
    return (x - norm.moving_mean) * scale + norm.beta


def convolved(x, layer, strides=1):
    return ops.conv(x, layer.kernel, strides, padding='same')


@pytest.mark.parametrize('project', [False, True])
@pytest.mark.parametrize('pooling_cls', [None, DiffStride])
def test_layer_is_the_pre_activation_formula(pooling_cls, project):
    strides = (2, 3) if project else 1
    layer = resnet.ResidualLayer(
        6, strides=strides, pooling_cls=pooling_cls, project=project
    )
    x = ops.convert_to_tensor(images(2, 11, 12, 6))
    layer(x)
    randomize(layer)
    pool = layer.pool or (lambda x: x)
    if project and pooling_cls:
        strides = 1
    h = ops.relu(normalized(x, layer.norms[0]))
    y = pool(convolved(h, layer.convs[0], strides))
    y = convolved(ops.relu(normalized(y, layer.norms[1])), layer.convs[1])
    shortcut = x
    if project:
        # The 1x1 convolution before the pooling: the two commute.
        shortcut = pool(convolved(h, layer.shortcut, strides))
    np.testing.assert_allclose(layer(x), y + shortcut, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    'pooling_cls', [DiffStride, FixedSpectralPooling, SpatialPooling]
)
def test_pooling_before_the_shortcut_is_as_after_it(pooling_cls):
    inputs = keras.Input((21, 16, 4))
    layer = resnet.ResidualLayer(
        6, strides=(2, 3), pooling_cls=pooling_cls, project=True
    )
    layer(inputs)
    randomize(layer)
    h = ops.relu(layer.norms[0](inputs))
    y = layer.pool(layer.convs[0](h))
    y = layer.convs[1](ops.relu(layer.norms[1](y)))
    other = keras.Model(inputs, y + layer.pool(layer.shortcut(h)))
    x = images(2, 21, 16, 4)
    expected = np.array(other(x))
    error = np.abs(np.array(layer(x)) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def test_one_pooling_layer_serves_both_branches():
    layer = resnet.ResidualLayer(
        6, strides=2, pooling_cls=DiffStride, project=True
    )
    layer(images(2, 16, 16, 4))
    assert layers_of(layer, DiffStride) == [layer.pool]
    assert [w.path for w in layer.trainable_weights].count(
        layer.pool.strides.path
    ) == 1


def test_batch_statistics_move_in_training_alone():
    layer = resnet.ResidualLayer(4)
    x = 3 + images(4, 8, 8, 4)
    layer(x, training=False)
    assert np.all(layer.norms[0].moving_mean.numpy() == 0)
    layer(x, training=True)
    assert np.all(layer.norms[0].moving_mean.numpy() > 0.1)


def test_training_moves_strides_and_lowers_the_loss():
    model = small_resnet(
        '1, (1.5, 2)', (4, 4), pooling_cls=DiffStride, num_layers=1
    )
    x, y = images(8, 12, 12, 3), np.arange(8) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
    history = model.fit(x, y, batch_size=8, epochs=4, verbose=0)
    assert history.history['loss'][-1] < history.history['loss'][0]
    (pool,) = layers_of(model, DiffStride)
    assert np.all(pool.strides.numpy() != (1.5, 2))


def test_outputs_are_float32_under_mixed_precision():
    keras.config.set_dtype_policy('mixed_bfloat16')
    model = small_resnet(pooling_cls=DiffStride, num_layers=1)
    assert dtype_of(model(images(2, 12, 12, 3))) == 'float32'
    (pool,) = layers_of(model, DiffStride)
    assert pool.compute_dtype == 'bfloat16'
    assert pool.strides.dtype == 'float32'


@pytest.mark.parametrize('project', [False, True])
@pytest.mark.parametrize('dtype', ['float64', 'mixed_bfloat16'])
def test_dtype_of_a_layer_is_that_of_its_convolutions(dtype, project):
    layer = resnet.ResidualLayer(
        4, strides=2 if project else 1, project=project, dtype=dtype
    )
    y = layer(images(1, 8, 8, 4))
    assert dtype_of(y) == layer.compute_dtype
    for inner in layer.convs + layer.norms:
        assert inner.compute_dtype == layer.compute_dtype


def test_precision_of_a_network_is_saved_with_it(tmp_path):
    keras.config.set_dtype_policy('mixed_bfloat16')
    model = changed(DiffStride, False)
    model.save(tmp_path / 'model.keras')
    keras.config.set_dtype_policy('float32')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    for layer in layers_of(loaded, keras.layers.Conv2D):
        assert layer.compute_dtype == 'bfloat16'
    assert_same_network(loaded, model)


# Keywords of 2022


def test_id_only_blocks_do_not_project():
    for id_only, expected in [((), [True, True]), ([0], [False, True])]:
        model = small_resnet(id_only=id_only, num_layers=2)
        actual = [layer.project for layer in residual_layers(model)]
        assert actual == [expected[0], False, expected[1], False]


def test_project_first_tells_whether_a_block_projects_and_strides():
    for project in (True, False):
        block = resnet.ResnetBlock(
            filters=7,
            strides=1 if project else (2, 4),
            num_layers=3,
            project_first=project,
            kernel_size=5,
            channels_first=False,
        )
        projecting = [layer.project for layer in block.layers]
        assert projecting == [project, False, False]
        assert [layer.kernel_size for layer in block.layers] == [5] * 3
        assert tuple(block(images(1, 8, 8, 7)).shape) == (1, 8, 8, 7)


def test_output_activation_and_number_of_classes():
    model = small_resnet(
        classes=11, output_activation='softmax', pooling_cls=DiffStride
    )
    y = model(images(4, 16, 16, 3))
    assert tuple(y.shape) == (4, 11)
    np.testing.assert_allclose(ops.sum(y, axis=-1), np.ones(4), rtol=1e-5)


@pytest.mark.parametrize('weight_decay', [0.0, 0.25])
def test_weight_decay_penalizes_kernels_and_the_last_bias(weight_decay):
    model = small_resnet(weight_decay=weight_decay, pooling_cls=DiffStride)
    model(images(1, 16, 16, 3))
    randomize(model)
    penalized = [
        *(layer.kernel for layer in layers_of(model, keras.layers.Conv2D)),
        *model.layers[-1].weights,
    ]
    expected = weight_decay * sum(
        np.sum(weight.numpy().astype('float64') ** 2) for weight in penalized
    )
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


# Errors


@pytest.mark.parametrize(
    'make, rule, received',
    [
        (lambda: small_resnet('1, 1'), 'as many as `filters`, 3', '1.0'),
        (lambda: small_resnet('1, 1, 2, 2'), 'as many as `filters`', '2.0'),
        (lambda: small_resnet([]), 'as many as `filters`', '[]'),
        (lambda: resnet.resnet18('1, 1', num_output_classes=2),
         'as many as `filters`, 5', '1.0'),
        (lambda: resnet.resnet18('1', num_output_classes=2),
         'as many as `filters`, 5', '1.0'),
        (lambda: small_resnet('1, 1, 1.5'), 'integers', '1.5'),
        (lambda: small_resnet('1.5, 1, 1'), 'integers', '1.5'),
        (lambda: small_resnet('1, 1, 1.5', pooling_cls=SpatialPooling),
         'integers', '1.5'),
        (lambda: small_resnet('1, 2, 2', id_only=[0]), 'id_only', '(2.0, 2.0)'),
        (lambda: resnet.ResidualLayer(4, strides=(1, 2)), 'project=False',
         '(1, 2)'),
        (lambda: small_resnet('one, 1, 2'), 'such as', "'one, 1, 2'"),
        (lambda: small_resnet('1, 1, 2]'), 'such as', "'1, 1, 2]'"),
        (lambda: small_resnet('1 1 2'), 'such as', "'1 1 2'"),
        (lambda: small_resnet('__import__("os").getcwd()'), 'such as', 'os'),
        (lambda: small_resnet(None), 'such as', 'None'),
        (lambda: small_resnet(3), 'such as', '3'),
        (lambda: small_resnet('1, 1, 0.5'), 'at least 1', '0.5'),
        (lambda: small_resnet([1, 1, float('nan')]), 'finite', 'nan'),
        (lambda: small_resnet('1, 1, (2, 2, 2)'), 'sequence of 2', '(2, 2, 2)'),
        (lambda: small_resnet("1, 1, 'x'"), 'sequence of 2', "'x'"),
    ],
)  # fmt: skip
def test_bad_strides_are_refused(make, rule, received):
    with pytest.raises(ValueError) as error:
        make()
    message = str(error.value)
    assert '`strides`' in message
    assert rule in message
    assert 'Received: strides=' in message
    assert received in message.split('Received')[1]


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: small_resnet(weight_decay=None), '`weight_decay` .*=None'),
        (lambda: small_resnet(weight_decay=-1), '`weight_decay` .*=-1'),
        (lambda: resnet.ResidualLayer(4, project='no'), "`project` .*='no'"),
        (lambda: small_resnet(pooling_cls=DiffStride, stride_cost={}),
         '`stride_cost` .*={}'),
        (lambda: small_resnet(pooling_cls=lambda **unused: 'pool'),
         "`pooling_cls` .*='pool'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_change_of_channels_without_projection_is_refused():
    layer = resnet.ResidualLayer(5)
    with pytest.raises(ValueError, match=r'`filters`.*4.*filters=5'):
        layer(images(1, 8, 8, 4))


def test_an_unknown_keyword_is_refused():
    with pytest.raises((TypeError, ValueError), match='pooling'):
        small_resnet(pooling=DiffStride)


# Serialization


@every_pooling
def test_layer_config_round_trips_through_json(pooling_cls):
    layer = resnet.ResidualLayer(
        6,
        kernel_size=5,
        strides=(2, 3),
        pooling_cls=pooling_cls,
        project=True,
        channels_first=True,
        weight_decay=0.1,
        batch_norm_args={'momentum': 0.5, 'epsilon': 0.1},
        name='residual',
        dtype='mixed_bfloat16',
    )
    config = json.loads(json.dumps(keras.layers.serialize(layer)))
    copy = keras.layers.deserialize(config)
    assert copy.get_config() == layer.get_config()
    for name in ('filters', 'kernel_size', 'strides', 'channels_first', 'name'):
        assert getattr(copy, name) == getattr(layer, name)
    assert copy.norms[0].momentum == 0.5
    assert copy.convs[0].kernel_regularizer.l2 == pytest.approx(0.1)
    assert type(copy.pool) is type(layer.pool)
    assert copy.pool is None or copy.pool is not layer.pool


def changed(pooling_cls, pin):
    model = small_resnet('2, 1, (2, 3)', pooling_cls=pooling_cls, num_layers=1)
    for pool in layers_of(model, DiffStride):
        pool.pin() if pin else None
    model(images(1, 24, 17, 3))
    randomize(model)
    return model


every_change = pytest.mark.parametrize(
    'pooling_cls, pin',
    [
        (DiffStride, False),
        (DiffStride, True),
        (FixedSpectralPooling, False),
        (max_pooling, False),
        (None, False),
    ],
)


def assert_same_network(actual, expected):
    x = images(2, 24, 17, 3)
    assert np.array_equal(actual(x), expected(x))
    assert actual.count_params() == expected.count_params()
    assert not set(map(id, actual.weights)) & set(map(id, expected.weights))
    pools, expected = (layers_of(m, DiffStride) for m in (actual, expected))
    assert [pool.pinned_strides for pool in pools] == [
        pool.pinned_strides for pool in expected
    ]


@every_change
def test_a_saved_network_gives_the_same_when_loaded(pooling_cls, pin, tmp_path):
    model = changed(pooling_cls, pin)
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    assert_same_network(loaded, model)


@every_change
def test_a_cloned_network_gives_the_same(pooling_cls, pin):
    model = changed(pooling_cls, pin)
    clone = keras.models.clone_model(model)
    clone(images(2, 24, 17, 3))
    clone.set_weights(model.get_weights())
    assert_same_network(clone, model)


def test_saved_weights_give_the_same_when_loaded(tmp_path):
    model = changed(DiffStride, True)
    model.save_weights(tmp_path / 'model.weights.h5')
    other = changed(DiffStride, False)
    other.load_weights(tmp_path / 'model.weights.h5')
    assert_same_network(other, model)


# Gin


def test_bindings_of_gin_reach_the_whole_network():
    gin.parse_config("""
        resnet.resnet18.strides = '1, 1, 3, 2, 3'
        resnet.Resnet:
          pooling_cls = @pooling.DiffStride
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
    assert [pool.smoothness_factor for pool in pools] == [2.0] * 3
    assert [pool.ramp for pool in pools] == ['inside'] * 3
    assert [float(pool.strides[0]) for pool in pools] == [3, 2, 3]
    norms = layers_of(model, keras.layers.BatchNormalization)
    assert [norm.epsilon for norm in norms] == [0.5] * len(norms)
    assert {layer.kernel_size for layer in residual_layers(model)} == {5}
    assert model.layers[-1].units == 7
    assert model.layers[-1].activation is keras.activations.softmax


@pytest.mark.parametrize(
    'value, cls',
    [
        ('@pooling.FixedSpectralPooling', FixedSpectralPooling),
        ('@pooling.SpatialPooling', SpatialPooling),
        ('@pooling.DiffStride', DiffStride),
        ('None', None),
    ],
)
def test_pooling_cls_is_bound_by_gin(value, cls):
    gin.parse_config(f'resnet.Resnet.pooling_cls = {value}')
    model = small_resnet('1, 1, 3')
    pools = [layer.pool for layer in residual_layers(model)]
    strided = [pool for pool in pools if pool is not None]
    assert [type(pool) for pool in strided] == ([cls] if cls else [])


@pytest.mark.parametrize(
    'make',
    [
        lambda: resnet.ResidualLayer(
            4, strides=2, pooling_cls=DiffStride, project=True
        ),
        lambda: resnet.ResnetBlock(4, 2, pooling_cls=DiffStride),
        lambda: small_resnet(pooling_cls=DiffStride),
        lambda: resnet.resnet18(
            num_output_classes=2, width=2, pooling_cls=DiffStride
        ),
    ],
    ids=['ResidualLayer', 'ResnetBlock', 'Resnet', 'resnet18'],
)
def test_bindings_of_pooling_reach_networks(make):
    gin.parse_config('pooling.DiffStride.smoothness_factor = 2.0')
    pools = layers_of(make(), DiffStride)
    assert pools
    assert {pool.smoothness_factor for pool in pools} == {2.0}


@pytest.mark.parametrize(
    'make',
    [
        lambda: resnet.ResnetBlock(4),
        lambda: small_resnet(weight_decay=0.5),
    ],
    ids=['ResnetBlock', 'Resnet'],
)
def test_bindings_of_layers_reach_networks(make):
    gin.parse_config("""
        resnet.ResidualLayer.weight_decay = 0.5
        batch_norm.momentum = 0.25
    """)
    model = make()
    for layer in layers_of(model, keras.layers.Conv2D):
        assert float(layer.kernel_regularizer.l2) == 0.5
    for layer in layers_of(model, keras.layers.BatchNormalization):
        assert layer.momentum == 0.25


def test_an_argument_in_the_call_wins_over_gin():
    gin.parse_config("""
        resnet.resnet18.strides = '1, 1, 3, 2, 3'
        batch_norm.epsilon = 0.5
    """)
    model = resnet.resnet18(
        [1, 1, 2, 2, 2], width=2, num_output_classes=2, pooling_cls=DiffStride
    )
    pools = layers_of(model, DiffStride)
    assert [float(pool.strides[0]) for pool in pools] == [2, 2, 2]
    layer = resnet.ResidualLayer(4, batch_norm_args={'epsilon': 0.25})
    assert layer.norms[0].epsilon == 0.25


def test_loading_and_cloning_ignore_gin(tmp_path):
    model = changed(DiffStride, False)
    model.save(tmp_path / 'model.keras')
    gin.parse_config("""
        pooling.DiffStride.smoothness_factor = 1.0
        resnet.ResidualLayer.kernel_size = 5
        batch_norm.epsilon = 0.5
    """)
    x = images(2, 24, 17, 3)
    for copy in (
        keras.models.load_model(tmp_path / 'model.keras'),
        keras.models.clone_model(model),
    ):
        copy(x)
        copy.set_weights(model.get_weights())
        assert np.array_equal(copy(x), model(x))
