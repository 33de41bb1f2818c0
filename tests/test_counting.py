"""MACs, shapes and parameters against counts by hand."""

import keras
import numpy as np
import pytest
from backends import BACKEND, only, sequential
from keras import layers, ops

from diffstride import models, resnet
from diffstride.counting import complexity
from diffstride.pooling import DiffStride, FixedSpectralPooling

# Layer, input shape, output shape, parameters, MACs. DiffStride has a record of
# its state beside the strides: 1 + n more parameters for n strides.
# fmt: off
LAYERS = [
    (layers.Conv1D(8, 5), (20, 3), (16, 8), 5 * 3 * 8 + 8, 16 * 8 * 5 * 3),
    (layers.Conv2D(8, (3, 5), strides=2, padding='same', groups=2),
     (12, 10, 4), (6, 5, 8), 3 * 5 * 2 * 8 + 8, (6 * 5) * 8 * (3 * 5 * 2)),
    (layers.Conv3D(2, 3),
     (5, 6, 7, 3), (3, 4, 5, 2), 27 * 3 * 2 + 2, (3 * 4 * 5) * 2 * (27 * 3)),
    (layers.Conv1DTranspose(4, 3, strides=2),
     (5, 3), (11, 4), 3 * 4 * 3 + 4, 5 * 3 * 4 * 3),
    (layers.Conv2DTranspose(4, (3, 5), strides=2, padding='same'),
     (5, 6, 3), (10, 12, 4), 3 * 5 * 4 * 3 + 4, (5 * 6) * 3 * 4 * (3 * 5)),
    (layers.Conv3DTranspose(2, 2),
     (2, 3, 4, 3), (3, 4, 5, 2), 8 * 2 * 3 + 2, (2 * 3 * 4) * 3 * 2 * 8),
    (layers.DepthwiseConv1D(3, depth_multiplier=2),
     (10, 4), (8, 8), 3 * 4 * 2 + 8, 8 * (4 * 2) * 3),
    (layers.DepthwiseConv2D((3, 5), depth_multiplier=2),
     (10, 9, 4), (8, 5, 8), 3 * 5 * 4 * 2 + 8, (8 * 5) * (4 * 2) * (3 * 5)),
    (layers.SeparableConv1D(6, 3, depth_multiplier=2),
     (10, 4), (8, 6), 3 * 4 * 2 + 8 * 6 + 6, 8 * (4 * 2 * 3 + 8 * 6)),
    (layers.SeparableConv2D(6, (3, 5), strides=2, padding='same'),
     (10, 8, 4), (5, 4, 6), 3 * 5 * 4 + 4 * 6 + 6, 20 * (4 * 3 * 5 + 4 * 6)),
    (layers.Dense(7), (3, 4, 5), (3, 4, 7), 5 * 7 + 7, (3 * 4) * 5 * 7),
    (layers.EinsumDense('abc,cde->abde', (None, 2, 6), bias_axes='de'),
     (4, 5), (4, 2, 6), 5 * 2 * 6 + 2 * 6, 4 * 5 * 2 * 6),
    (layers.EinsumDense('...x,xy->...y', 6),
     (3, 4, 5), (3, 4, 6), 5 * 6, (3 * 4) * 5 * 6),
    (layers.Embedding(9, 4), (6,), (6, 4), 9 * 4, 0),
    (layers.BatchNormalization(), (4, 4, 3), (4, 4, 3), 4 * 3, 0),
    (layers.LayerNormalization((1, 2)), (4, 3), (4, 3), 2 * 4 * 3, 0),
    (layers.PReLU(), (4, 3), (4, 3), 4 * 3, 0),
    # With R = 4, 32 becomes 24 at stride 2 and 20 at stride 3, and 4 stays 4.
    (DiffStride((2.0, 3.0)),
     (32, 32, 5), (24, 20, 5), 5, (32 * 24 * 32 + 32 * 20 * 24) * 5),
    (DiffStride(2.0, shared_stride=True),
     (32, 4, 5), (24, 4, 5), 3, (32 * 24 * 4 + 4 * 4 * 24) * 5),
    (FixedSpectralPooling(2.0, method='fft'), (32, 4, 5), (16, 2, 5), 0,
     (1.25 * (32 * 5 + 16 * 4) * 4 + 1.25 * (4 * 2 + 2 * 1) * 16) * 5),
    (DiffStride((2.0, 3.0), data_format='channels_first'),
     (5, 32, 32), (5, 24, 20), 5, (32 * 24 * 32 + 32 * 20 * 24) * 5),
    # An axis that stays as it is costs nothing.
    (FixedSpectralPooling(2.0), (2, 8, 5), (2, 4, 5), 0, (8 * 4 * 2) * 5),
]
# fmt: on


@pytest.mark.parametrize(
    'layer, shape, output_shape, parameters, macs',
    # JAX compiles the initial weights of each.
    LAYERS[:: 3 if BACKEND == 'jax' else 1],
    ids=lambda x: type(x).__name__ if isinstance(x, layers.Layer) else None,
)
def test_a_layer_is_counted(layer, shape, output_shape, parameters, macs):
    result = complexity(layer, shape)
    (row,) = result.layers
    assert row.output_shape == output_shape
    assert row.activations == np.prod(output_shape)
    assert row.parameters == parameters
    assert row.macs == macs
    assert not result.is_lower_bound
    totals = result.parameters, result.activations, result.macs
    assert totals == (row.parameters, row.activations, row.macs)


def test_quantized_layers_and_those_in_every_time_step_are_counted():
    model = sequential((8,), layers.Dense(4))
    model.layers[0].quantize('int8')
    assert complexity(model, (8,)).macs == 8 * 4
    layer = layers.TimeDistributed(layers.Conv2D(4, 3))
    assert complexity(layer, (5, 8, 8, 3)).macs == 5 * (6 * 6) * 4 * 27


def test_the_table_of_nested_models_is_in_the_order_of_calls():
    conv = layers.Conv2D(4, 3, padding='same', name='conv')
    pool = DiffStride(strides=2.0, name='pool')
    inner = keras.Sequential([conv, pool], name='inner')
    dense = layers.Dense(3, name='dense')
    model = keras.Sequential([inner, layers.ReLU(name='relu'), dense])
    result = complexity(model, (32, 32, 2))
    # MACs: 32 32 4 (3 3 2), (32 24 32 + 32 24 24) 4 and 24 24 4 3.
    assert str(result).splitlines() == [
        'layer       class       output   parameters  activations     MACs',
        'inner/conv  Conv2D      32x32x4          76        4,096   73,728',
        'inner/pool  DiffStride  24x24x4           5        2,304  172,032',
        'relu        ReLU        24x24x4           0        2,304        0',
        'dense       Dense       24x24x3          15        1,728    6,912',
        'total                                    96       10,432  252,672',
    ]
    pool.make_sizes_static()
    pool.strides.assign([4.0, 4.0])  # Sizes are those that are computed.
    assert complexity(model, (32, 32, 2)).macs == result.macs


def test_a_residual_layer_follows_its_strides():
    layer = resnet.ResidualLayer(4, 3, 2, DiffStride, project=True)
    model = keras.Sequential([layer])
    for stride, size in [(2.0, 24), (4.0, 16), (3.0, 20)]:
        layer.pool.strides.assign([stride, stride])
        result = complexity(model, (32, 32, 2))
        (pool,) = [x for x in result.layers if x.class_name == 'DiffStride']
        assert pool.calls == 1  # It gets both maps in a list.
        assert pool.output_shape == ((size, size, 2), (size, size, 4))
        assert pool.activations == size**2 * (2 + 4)
        assert pool.macs == (32 * size * 32 + 32 * size * size) * (2 + 4)
        convs = 32**2 * 9 * 2 * 4 + size**2 * (9 * 4 * 4 + 2 * 4)
        assert result.macs == pool.macs + convs
        assert result.parameters == model.count_params()


class TiedDense(layers.Layer):
    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def test_a_shared_layer_has_one_row_and_tied_weights_count_once():
    dense, tied = layers.Dense(5), TiedDense()
    dense.build((None, 4, 5))
    tied.kernel = dense.kernel
    x = keras.Input((4, 5))
    result = complexity(keras.Model(x, tied(dense(dense(x)))))
    row, tied_row = result.layers
    assert row.calls == 2
    assert row.output_shape == (4, 5)
    assert row.activations == 2 * 4 * 5
    assert row.macs == 2 * (4 * 5 * 5)
    assert tied_row.macs is None
    assert result.parameters == row.parameters == 5 * 5 + 5


class WithOwnWeights(keras.Model):
    """Holds weights beside its layers, and a layer that is not called."""

    def __init__(self, shape):
        super().__init__()
        self.shift = self.add_weight(shape=shape, name='shift')
        self.dense = layers.Dense(3, activation=layers.PReLU())
        self.spare = layers.Dense(2)
        self.spare.build((None, 5))

    def call(self, inputs):
        return self.dense(inputs + self.shift)


def test_weights_of_containers_and_of_idle_layers_are_counted():
    model = WithOwnWeights((4,))
    result = complexity(model, (4,))
    own, dense, activation, spare = result.layers
    assert (own.parameters, own.activations, own.macs) == (4, 0, 0)
    assert (dense.parameters, dense.macs) == (4 * 3 + 3, 4 * 3)
    assert (activation.parameters, activation.activations) == (3, 3)
    assert (spare.output_shape, spare.calls, spare.macs) == (None, 0, 0)
    assert spare.parameters == 5 * 2 + 2
    assert result.activations == 3
    assert result.parameters == 4 + 15 + 3 + 12 == model.count_params()


RECURRENT = layers.LSTM(3), layers.Bidirectional(layers.GRU(3))


@pytest.mark.parametrize(
    'layer',
    [*RECURRENT, layers.MultiHeadAttention(2, 4), WithOwnWeights((2, 4))],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_macs_make_the_total_a_lower_bound(layer):
    x = keras.Input((2, 4))
    is_attention = isinstance(layer, layers.MultiHeadAttention)
    y = layer(x, x) if is_attention else layer(x)
    model = keras.Model(x, layers.Dense(3)(y))
    result = complexity(model, (2, 4))
    assert result.is_lower_bound
    assert result.macs == sum(row.macs or 0 for row in result.layers) > 0
    assert result.parameters == model.count_params()
    lines = str(result).splitlines()
    assert any(line.endswith(' ?') for line in lines)
    assert lines[-1].endswith(f'>= {result.macs:,}')


@pytest.mark.skipif(
    not hasattr(layers, 'ReversibleEmbedding'), reason='Keras is too old'
)
def test_an_embedding_that_multiplies_is_unknown():
    embedding, inputs = layers.ReversibleEmbedding(9, 4), keras.Input((6,))
    model = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    assert complexity(model).is_lower_bound


class Mapped(layers.Wrapper):
    def call(self, inputs):
        return ops.vectorized_map(self.layer, inputs)


@only('tensorflow', 'graphs')
def test_a_layer_that_is_traced_is_unknown():
    assert complexity(Mapped(layers.Dense(3)), (6, 4)).is_lower_bound


class Stateful(layers.Wrapper):
    """Changes its state at every call, in inference too."""

    def __init__(self):
        super().__init__(layers.BatchNormalization())
        self.calls = self.add_weight(name='calls', trainable=False)
        self.dropout = layers.Dropout(0.5)
        self.fails = False

    def call(self, inputs):
        self.calls.assign_add(1.0)
        self.add_loss(ops.sum(inputs))
        if self.fails:
            raise RuntimeError('as asked')
        x = self.layer(inputs + 1, training=True)
        return self.dropout(x, training=True)


def test_nothing_of_a_built_model_changes():
    layer, pool = Stateful(), DiffStride(strides=2.0)
    pool.call = own_call = pool.call  # The user set it.
    model = sequential((12, 12, 2), layer, pool)
    model(np.ones((2, 12, 12, 2), 'float32'))
    before = [np.array(x) for x in model.variables]
    attributes = {x: set(vars(x)) for x in models.flatten(model)}
    complexity(model, (12, 12, 2))
    assert not model.losses  # The loss of the zeros is gone.
    layer.fails = True
    with pytest.raises(RuntimeError, match='as asked'):
        complexity(model, (12, 12, 2))
    assert not model.losses
    assert len(before) == len(model.variables) > 0
    for old, new in zip(before, model.variables):
        np.testing.assert_array_equal(old, new)
    assert {x: set(vars(x)) for x in models.flatten(model)} == attributes
    assert vars(pool)['call'] is own_call


def test_an_unbuilt_model_is_built_for_any_batch_and_size():
    model = resnet.Resnet([4, 4, 6], '1, 1, 2', 3, pooling_cls=DiffStride)
    result = complexity(model, (16, 12, 3))
    assert result.parameters == model.count_params()
    assert model.input_shape == (None, 16, 12, 3)
    assert model(keras.Input((16, 12, 3), 4)).shape == (4, 3)
    assert result == complexity(model, (16, 12, 3))


@pytest.mark.parametrize(
    'shape', ['32', (0, 3), (4.0, 3), (None, 3), (True, 3), [(4,), 3]], ids=repr
)
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r'`input_shape` must be .*at least 1'):
        complexity(layers.Dense(3), shape)


def test_a_model_that_knows_no_sizes_needs_a_shape():
    known = sequential((8, 8, 1), layers.Conv2D(2, 3))
    unknown = sequential((None, None, 1), layers.Conv2D(2, 3))
    assert complexity(known) == complexity(known, (8, 8, 1))
    for model in unknown, keras.Sequential([layers.Dense(3)]):
        with pytest.raises(ValueError, match='`input_shape` must be given'):
            complexity(model)
