"""Costs by hand, their gradients, and their way into the loss."""

import keras
import numpy as np
import pytest
from backends import (
    COMPILERS,
    EAGER,
    USUAL,
    array,
    gradients,
    random,
    refusals,
    sequential,
)
from keras import layers, ops

from diffstride import DiffStride, diffstride_layers
from diffstride.costs import ActivationCost, StrideCost

STRIDES = [(1.5, 2.0), (2.0, 3.0), (2.5, 1.25)]


def network(weight=0.2):
    return sequential(
        (16, 12, 3),
        DiffStride(STRIDES[0], 1.0),
        keras.Sequential([layers.ReLU(), DiffStride(STRIDES[1], 1.0)]),
        DiffStride(STRIDES[2], 1.0),
        layers.GlobalAveragePooling2D(),
        ActivationCost(weight),
    )


def cost_of(model):
    def cost(x):
        model(x)
        return sum(model.losses)

    cost = COMPILERS[USUAL](cost)
    return float(array(cost(np.zeros((1, 16, 12, 3), 'float32'))))


def by_hand(strides, weight=0.2):
    areas = np.prod(strides, axis=-1)
    return weight * np.sum(1 / np.cumprod(areas))


@pytest.mark.parametrize('shared_stride', [False, True])
def test_stride_cost_of_a_layer_and_its_gradient(shared_stride):
    layer = DiffStride(
        2.5, shared_stride=shared_stride, strides_regularizer=StrideCost(0.3)
    )
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(0.3 / 2.5**2)
    (gradient,) = gradients(StrideCost(3.0), [[2.0, 4.0]])
    np.testing.assert_allclose(array(gradient), [-3 / (4 * 4), -3 / (2 * 16)])


@pytest.mark.parametrize('policy', ['float32', 'mixed_bfloat16'])
def test_activation_cost_is_the_papers_and_leaves_the_output(policy):
    keras.config.set_dtype_policy(policy)
    model = network()
    x = random(2, 16, 12, 3)
    without = keras.Sequential(model.layers[:-1])
    y, expected = (COMPILERS[USUAL](call)(x) for call in (model, without))
    np.testing.assert_array_equal(array(y), array(expected))
    assert cost_of(model) == pytest.approx(by_hand(STRIDES))


@pytest.mark.parametrize('holder', ['sequential', 'functional', 'nested'])
def test_strides_are_trained_by_their_cost(holder):
    """One step of gradient descent on the cost alone, in `fit`."""
    model = network(weight=1.0)
    if holder == 'functional':
        model = keras.Model(model.inputs, model.outputs)
    elif holder == 'nested':
        model = keras.Sequential([keras.Input((16, 12, 3)), model])
    model.compile(
        keras.optimizers.SGD(0.1),
        lambda y, p: 0 * ops.sum(p, -1),
        run_eagerly=EAGER and holder != 'nested',
    )
    x = np.zeros((2, 16, 12, 3))
    model.fit(x, np.zeros((2, 3)), verbose=0)
    slopes = [
        (by_hand(STRIDES + x, 1.0) - by_hand(STRIDES - x, 1.0)) / 2e-5
        for x in 1e-5 * np.eye(6).reshape(6, 3, 2)
    ]
    expected = STRIDES - 0.1 * np.reshape(slopes, (3, 2))
    found = [layer.stride_values for layer in diffstride_layers(model)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


ALONE = keras.Sequential([ActivationCost()])
test_wrong_arguments = refusals(
    (lambda: StrideCost(-1), '`weight` must be a finite number, at least'),
    (lambda: ActivationCost('1'), '`weight` must be'),
    (lambda: ALONE(np.zeros((1, 2))), 'must have DiffStride layers'),
)
