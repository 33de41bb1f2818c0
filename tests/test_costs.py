"""Costs of strides: values by hand, gradients by differences, and training."""

import functools
import itertools
import math

import keras
import numpy as np
import pytest
from backends import gradients
from keras import layers, ops

from diffstride import (
    DiffStride,
    FixedSpectralPooling,
    SpectralResizing,
    complexity,
    resnet,
)
from diffstride.callbacks import RepinStrides, SettleStrides
from diffstride.pooling import diffstride_layers
from diffstride.regularizers import (
    ActivationCost,
    DifferentiableMacs,
    MacsCost,
    StrideCost,
    StrideCostModel,
)

SHAPE = (32, 24, 3)


def network(pooling_cls=DiffStride, strides='1.5, 1, 2, 3', **kwargs):
    model = resnet.Resnet(
        [4, 4, 8, 8],
        strides,
        10,
        num_layers=1,
        id_only=[0],
        pooling_cls=lambda **arguments: pooling_cls(**arguments, **kwargs),
    )
    model.build((None, *SHAPE))
    return model


def network_with_cost(stride_cost):
    return resnet.Resnet(
        [4, 4], '1, 2', 2, pooling_cls=DiffStride, stride_cost=stride_cost
    )


def assign(model, strides):
    for layer, stride in zip(diffstride_layers(model), strides, strict=True):
        layer.strides.assign(stride)


# One layer


@pytest.mark.parametrize('shared_stride', [False, True])
def test_stride_cost_of_a_layer(shared_stride):
    layer = DiffStride(
        2.5,
        shared_stride=shared_stride,
        strides_regularizer=StrideCost(0.3),
    )
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(0.3 / 2.5**2)


def test_gradient_of_stride_cost():
    (gradient,) = gradients(StrideCost(3.0), [[2.0, 4.0]])
    np.testing.assert_allclose(gradient, [-3 / (4 * 4), -3 / (2 * 16)])


def test_stride_cost_survives_saving(tmp_path):
    model = keras.Sequential(
        [DiffStride(2.0, strides_regularizer=StrideCost(0.5))]
    )
    model(np.ones((1, 8, 8, 1), 'float32'))
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    assert float(loaded.losses[0]) == 0.125


# Networks


def test_activation_cost_is_the_papers():
    model = network()
    strides = [(1.5, 2.0), (2.0, 3.0), (2.5, 1.25)]
    assign(model, strides)
    areas = [1 / (h * w) for h, w in strides]
    expected = 0.2 * sum(itertools.accumulate(areas, lambda a, b: a * b))
    cost = ActivationCost(0.2)
    assert float(cost.of(model)()) == pytest.approx(expected)
    backwards = cost.of(diffstride_layers(model)[::-1])
    assert float(backwards()) != pytest.approx(expected)


def test_gradient_of_activation_cost():
    model = network()
    variables = [layer.strides for layer in diffstride_layers(model)]
    cost = ActivationCost(2.0).of(model)
    for variable, gradient in zip(
        variables, gradients(cost, variables=variables)
    ):
        before = variable.numpy()
        for axis in range(2):
            step = 1e-2 * np.eye(2)[axis]
            variable.assign(before + step)
            above = float(cost())
            variable.assign(before - step)
            below = float(cost())
            variable.assign(before)
            assert (above - below) / 2e-2 == pytest.approx(
                float(gradient[axis]), rel=1e-3
            )


STRIDES = [
    [(1.5, 1.5), (2.0, 2.0), (3.0, 3.0)],
    [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)],
    [(2.3, 1.1), (1.7, 3.9), (1.2, 2.6)],
    [(5.0, 20.0), (3.0, 3.0), (8.0, 1.0)],
]


@pytest.mark.parametrize(
    'kwargs',
    [
        {'ramp': 'inside'},
        {'ramp': 'outside', 'smoothness_factor': 2.0},
        {'ramp': 'straight_through', 'smoothness_factor': 1.0},
        {'ramp': 'inside', 'lower_limit_stride': 1.3},
    ],
)
@pytest.mark.parametrize('strides', STRIDES)
def test_macs_are_those_of_complexity(kwargs, strides):
    model = network(**kwargs)
    macs = DifferentiableMacs(model, SHAPE)
    assign(model, strides)
    assert float(macs()) == pytest.approx(complexity(model, SHAPE).macs)


def test_macs_with_fixed_strides_among_them():
    model = keras.Sequential(
        [
            layers.Conv2D(4, 3, padding='same'),
            FixedSpectralPooling(1.5),
            layers.Conv2D(4, 3, padding='same'),
            DiffStride(2.0, ramp='inside'),
            layers.Conv2D(4, 3, padding='same'),
        ]
    )
    macs = DifferentiableMacs(model, SHAPE)
    assert float(macs()) == complexity(model, SHAPE).macs
    assign(model, [(3.0, 1.2)])
    assert float(macs()) == pytest.approx(complexity(model, SHAPE).macs)


def test_gradient_of_macs_is_that_of_sizes_in_proportion():
    """With sizes N / S exactly, d MACs / dS by hand."""
    model = keras.Sequential(
        [
            DiffStride((2.0, 3.0), ramp='inside'),
            layers.Conv2D(5, 3, padding='same'),
        ]
    )
    macs = DifferentiableMacs(model, (32, 24, 3))
    (layer,) = diffstride_layers(model)
    (gradient,) = gradients(macs, variables=[layer.strides])

    def by_hand(h, w):
        rows, columns = 32 / h, 24 / w
        pool = 3 * (rows * 32 * 24 + rows * columns * 24)
        return pool + rows * columns * 9 * 3 * 5

    assert float(macs()) == by_hand(2.0, 3.0)
    step = 1e-4
    np.testing.assert_allclose(
        gradient,
        [
            (by_hand(2 + step, 3) - by_hand(2 - step, 3)) / (2 * step),
            (by_hand(2, 3 + step) - by_hand(2, 3 - step)) / (2 * step),
        ],
        rtol=1e-5,
    )


def test_gradient_of_macs_reaches_earlier_strides():
    """What a second layer returns shrinks with the stride of the first."""
    model = keras.Sequential(
        [
            DiffStride(2.0, ramp='inside'),
            DiffStride(2.0, ramp='inside'),
            layers.Conv2D(7, 3, padding='same'),
        ]
    )
    macs = DifferentiableMacs(model, (32, 32, 1))
    first, second = diffstride_layers(model)
    found = gradients(macs, variables=[first.strides, second.strides])

    def by_hand(h, w, h2, w2):
        a, b = 32 / h, 32 / w
        pools = 32 * 32 * a + 32 * a * b
        pools += a * b * a / h2 + b * (a / h2) * (b / w2)
        return pools + (a / h2) * (b / w2) * 9 * 7

    strides = np.full(4, 2.0)
    assert float(macs()) == by_hand(*strides)
    expected = [
        (by_hand(*(strides + step)) - by_hand(*(strides - step))) / 2e-4
        for step in 1e-4 * np.eye(4)
    ]
    np.testing.assert_allclose(
        np.concatenate([np.asarray(x) for x in found]), expected, rtol=1e-4
    )


def test_macs_of_a_fixed_layer_that_leaves_an_axis():
    model = keras.Sequential(
        [
            DiffStride(2.0, ramp='inside'),
            layers.Conv2D(4, 3, padding='same'),
            FixedSpectralPooling((1, 2)),
            layers.Conv2D(4, 3, padding='same'),
        ]
    )
    macs = DifferentiableMacs(model, (32, 32, 1))
    for strides in ((2.0, 2.0), (4.0, 1.0), (3.0, 16.0)):
        assign(model, [strides])
        assert float(macs()) == complexity(model, (32, 32, 1)).macs


def test_macs_cost_takes_the_shape_of_the_model():
    model = network(ramp='inside')
    given = MacsCost(1e5, input_shape=SHAPE).of(model)()
    assert float(MacsCost(1e5).of(model)()) == float(given)
    unbuilt = keras.Sequential([DiffStride(2.0)])
    with pytest.raises(ValueError, match='`input_shape` must be given'):
        MacsCost(1e5).of(unbuilt)


def test_a_cost_of_a_network_that_is_built_by_its_first_batch():
    model = resnet.Resnet(
        [4, 4], '1, 2', 2, pooling_cls=DiffStride, stride_cost=MacsCost(1e4)
    )
    model.compile('sgd', 'mse')
    x = np.zeros((4, 20, 12, 3))
    model.fit(x, np.zeros((4, 2)), verbose=0)
    for layer in diffstride_layers(model):
        layer.unpin()  # On JAX sizes are those of before the step.
    macs = complexity(model, (20, 12, 3)).macs
    cost = MacsCost(1e4, input_shape=(20, 12, 3)).of(model)
    assert float(cost()) == pytest.approx(math.log(macs / 1e4))
    model(x)
    assert float(cost()) == pytest.approx(float(model.losses[0]))


def test_macs_cost_is_free_within_the_budget():
    model = network(ramp='inside')
    macs = complexity(model, SHAPE).macs
    beyond = MacsCost(macs / 2, weight=0.5, input_shape=SHAPE).of(model)
    within = MacsCost(macs * 1.01, input_shape=SHAPE).of(model)
    assert float(beyond()) == pytest.approx(0.5 * math.log(2), rel=1e-5)
    assert float(within()) == 0


def sizes_of(model):
    """After each pooling layer, of one image."""
    shapes = [
        x.output_shape
        for x in complexity(model, SHAPE).layers
        if x.class_name == 'DiffStride'
    ]
    # Of two branches, whose channels differ.
    shapes = [x[0] if isinstance(x[0], tuple) else x for x in shapes]
    return [shape[:2] for shape in shapes]


@pytest.mark.parametrize('share', [0.5, 1.3])
@pytest.mark.parametrize(
    'kwargs',
    [
        {'ramp': 'inside'},
        {'ramp': 'outside', 'smoothness_factor': 1.0},
        {'ramp': 'straight_through', 'lower_limit_stride': 1.2},
    ],
)
def test_meeting_a_budget(kwargs, share):
    """No stride can be lowered, nor any map enlarged with the others' sizes."""
    model = network(**kwargs)
    cost = MacsCost(share * complexity(model, SHAPE).macs, input_shape=SHAPE)
    assert cost.meet_budget(model)
    assert 0.9 * cost.budget < complexity(model, SHAPE).macs <= cost.budget
    after = np.array([x.stride_values for x in diffstride_layers(model)])
    sizes = sizes_of(model)
    for index in np.ndindex(after.shape):
        lowered = after.copy()
        lowered[index] *= 0.999
        if lowered[index] >= kwargs.get('lower_limit_stride', 1):
            assign(model, lowered)
            assert complexity(model, SHAPE).macs > cost.budget
    macs = DifferentiableMacs(model, SHAPE)
    larger = macs.larger_sizes(sizes)
    assert len(larger) >= 4
    for others in larger:
        macs.assign_sizes(others)
        assert sizes_of(model) == macs.output_sizes() == others
        assert complexity(model, SHAPE).macs > cost.budget


def test_a_budget_is_met_by_the_sizes_that_just_fit():
    """Where 32 becomes 14, 8 and 4 by common scaling, 16, 8 and 4 fit too."""
    model = network(
        strides='2, 1, 2, 2', ramp='straight_through', shared_stride=True
    )
    budget = complexity(model, SHAPE).macs
    assign(model, [[2.4], [1.8], [2.1]])
    assert MacsCost(budget, input_shape=SHAPE).meet_budget(model)
    assert sizes_of(model) == [(16, 12), (8, 6), (4, 4)]
    assert complexity(model, SHAPE).macs == budget


def test_a_budget_that_cannot_be_met():
    model = network(ramp='inside')
    before = [layer.stride_values for layer in diffstride_layers(model)]
    assert not MacsCost(1.0, input_shape=SHAPE).meet_budget(model)
    after = [layer.stride_values for layer in diffstride_layers(model)]
    assert after == before


def test_a_budget_that_is_never_used_up():
    model = network(ramp='inside')
    for strides in (2.0, 100.0):
        assign(model, np.full((3, 2), strides))
        MacsCost(1e12, input_shape=SHAPE).meet_budget(model)
        assert {
            s for x in diffstride_layers(model) for s in x.stride_values
        } == {1}


def test_a_budget_that_is_met_far_away():
    model = keras.Sequential([DiffStride(1.0), layers.Conv2D(8, 1)])
    shape = (512, 512, 1)
    cost = MacsCost(0.01 * complexity(model, shape).macs, input_shape=shape)
    assert cost.meet_budget(model)
    assert 0.9 * cost.budget < complexity(model, shape).macs <= cost.budget


def test_strides_that_settle_meet_the_budget():
    model = network(ramp='inside')
    cost = MacsCost(0.6 * complexity(model, SHAPE).macs, 0.1, SHAPE)
    model = StrideCostModel(model, cost)
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x = np.random.normal(size=(8, *SHAPE))
    model.fit(
        x,
        np.arange(8),
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[SettleStrides(epoch=1)],
    )
    assert 0.5 < complexity(model, SHAPE).macs / cost.budget <= 1


def test_meeting_a_budget_leaves_fixed_strides():
    model = keras.Sequential(
        [DiffStride(2.0, trainable=False), DiffStride(2.0), layers.Conv2D(8, 3)]
    )
    macs = complexity(model, (32, 32, 3)).macs
    MacsCost(0.9 * macs, input_shape=(32, 32, 3)).meet_budget(model)
    fixed, learned = (x.stride_values for x in diffstride_layers(model))
    assert fixed == (2.0, 2.0)
    assert min(learned) > 2


def test_strides_that_settle_beyond_their_budget_are_told():
    model = network(ramp='inside')
    model = StrideCostModel(model, MacsCost(1.0))
    model.compile('sgd', 'mse')
    x = np.zeros((2, *SHAPE))
    with pytest.warns(UserWarning, match='meet the budget of 1 MACs'):
        model.fit(x, np.zeros((2, 10)), verbose=0, callbacks=[SettleStrides(0)])


@pytest.mark.parametrize(
    'shared', [DiffStride(2.0), layers.Conv2D(3, 1), FixedSpectralPooling(2)]
)
def test_a_layer_called_twice_has_no_macs_with_a_gradient(shared):
    model = keras.Sequential([DiffStride(2.0), shared, DiffStride(1.5), shared])
    with pytest.raises(ValueError, match='called once'):
        DifferentiableMacs(model, SHAPE)


def test_a_network_that_resizes_has_no_macs_with_a_gradient():
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(
        inputs, SpectralResizing()([DiffStride(2.0)(inputs), inputs])
    )
    with pytest.raises(ValueError, match='resizes its maps'):
        MacsCost(1e3).of(model)


def test_a_layer_of_unknown_macs_has_none_with_a_gradient():
    inputs = keras.Input((4, 4, 3))
    x = DiffStride(1.5)(inputs)
    model = keras.Model(inputs, layers.MultiHeadAttention(1, 2)(x, x))
    with pytest.raises(ValueError, match='known MACs'):
        DifferentiableMacs(model, (4, 4, 3))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: StrideCost(-1), '`weight` must be a finite number, at least'),
        (lambda: ActivationCost('1'), '`weight` must be'),
        (lambda: MacsCost(0), '`budget` must be a finite number above 0'),
        (lambda: MacsCost(1e6, math.nan), '`weight` must be'),
        (lambda: MacsCost(1e6, 1, 32), '`input_shape` must be None or'),
        (lambda: MacsCost(1e6, 1, ()), '`input_shape` must be None or'),
        (lambda: MacsCost(1e6, 1, (32.5, 32, 3)), '`input_shape` must be None'),
        (
            lambda: ActivationCost().of(keras.Sequential([layers.ReLU()])),
            '`model` must be a model with DiffStride layers',
        ),
        (
            lambda: ActivationCost().of([layers.ReLU()]),
            '`model` must be a model with DiffStride layers',
        ),
        (
            lambda: StrideCostModel(keras.Sequential(), ActivationCost()),
            '`model` must have DiffStride layers',
        ),
        (lambda: network_with_cost('x'), '`stride_cost` must be a cost'),
        (lambda: network_with_cost(MacsCost), '`stride_cost` must be a cost'),
        (lambda: network_with_cost(-1), '`stride_cost` must be a finite num'),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Models with a cost


@pytest.mark.parametrize(
    'cost', [ActivationCost(0.3), MacsCost(1e5, 0.3, SHAPE)]
)
def test_model_with_a_cost_adds_it_to_the_loss(cost, tmp_path):
    model = network(ramp='inside')
    x = np.random.normal(size=(2, *SHAPE)).astype('float32')
    with_cost = StrideCostModel(model, cost)
    np.testing.assert_array_equal(with_cost(x), model(x))
    expected = float(cost.of(model)())
    assert expected > 0
    with_cost(x)
    model(x)
    added = sum(map(float, with_cost.losses)) - sum(map(float, model.losses))
    assert added == pytest.approx(expected, rel=1e-5)
    assert with_cost.input_shape == model.input_shape

    with_cost.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    np.testing.assert_array_equal(loaded(x), model(x))
    assert sum(map(float, loaded.losses)) == pytest.approx(
        sum(map(float, with_cost.losses))
    )


def test_resnet_with_a_cost():
    def cost_of(stride_cost, pooling_cls=DiffStride):
        return getattr(
            resnet.Resnet(
                [4, 4], '1, 2', 2, pooling_cls=pooling_cls,
                stride_cost=stride_cost,
            ),
            'stride_cost',
            None,
        )  # fmt: skip

    assert isinstance(cost_of(0.5), ActivationCost)
    assert cost_of(0.5).weight == 0.5
    macs = MacsCost(1e6)
    assert cost_of(macs) is macs
    assert cost_of(None) is cost_of(0) is cost_of(0.0) is None
    assert cost_of(0.5, pooling_cls=None) is None


@functools.cache
def macs_and_strides_of_training(stride_cost):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16, 16, 3)).astype('float32')
    y = rng.integers(0, 2, 64)
    model = resnet.Resnet(
        [4, 4, 8],
        '2, 1, 2',
        2,
        num_layers=1,
        stride_cost=stride_cost,
        pooling_cls=lambda **kwargs: DiffStride(
            smoothness_factor=1.0, ramp='inside', **kwargs
        ),
    )
    model.compile(
        keras.optimizers.SGD(0.3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    repin = RepinStrides()  # On JAX.
    model.fit(x, y, 16, epochs=3, verbose=0, callbacks=[repin])
    strides = [s for x in diffstride_layers(model) for s in x.stride_values]
    return complexity(model, (16, 16, 3)).macs, strides


@pytest.mark.parametrize('stride_cost', [3.0, MacsCost(1e3, 3.0, (16, 16, 3))])
def test_strides_grow_with_their_cost(stride_cost):
    """With the same data and seed, a price makes larger strides, fewer MACs."""
    free_macs, free_strides = macs_and_strides_of_training(0)
    macs, strides = macs_and_strides_of_training(stride_cost)
    assert macs < 0.8 * free_macs
    assert all(a > b for a, b in zip(strides, free_strides))


def test_adamw_can_be_told_not_to_decay_strides():
    """With no gradient, only the decay would move strides."""
    for excluded, expected in (([], False), (['strides'], True)):
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), layers.Conv2D(1, 1), DiffStride(2.0)]
        )
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=excluded)
        model.compile(optimizer, lambda y, p: 0.0 * ops.sum(p, axis=(1, 2, 3)))
        x = np.ones((4, 8, 8, 1))
        model.fit(x, x, verbose=0)
        (layer,) = diffstride_layers(model)
        assert (layer.stride_values == (2.0, 2.0)) == expected
