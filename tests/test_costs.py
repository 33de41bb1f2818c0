"""Costs by hand, their gradients, and their way into the loss."""

import keras
import numpy as np
import pytest
from backends import (
    COMPILERS,
    EAGER,
    USUAL,
    array,
    central_differences,
    gradients,
    random,
    refusals,
    sequential,
)
from keras import layers, ops

from diffstride import DiffStride, diffstride_layers
from diffstride.costs import ActivationCost, StrideCost

STRIDES = [(1.5, 2.0), (2.0, 3.0), (2.5, 1.25)]


def network():
    first, second, third = (DiffStride(strides, 1.0) for strides in STRIDES)
    inner = keras.Sequential([layers.ReLU(), second])
    head = layers.GlobalAveragePooling2D(), ActivationCost(0.2)
    return sequential((16, 12, 3), first, inner, third, *head)


def by_hand(strides):
    areas = np.prod(strides, axis=-1)
    return 0.2 * np.sum(1 / np.cumprod(areas))


@pytest.mark.parametrize('shared_stride', [False, True])
def test_stride_cost_of_a_layer_and_its_gradient(shared_stride):
    layer = DiffStride(
        2.5, shared_stride=shared_stride, strides_regularizer=StrideCost(0.3)
    )
    assert float(sum(layer.losses)) == pytest.approx(0.3 / 2.5**2)
    layer.hold()
    layer.strides.assign(2 * layer.strides)  # An optimizer may move them.
    assert float(sum(layer.losses)) == pytest.approx(0.3 / 2.5**2)
    (gradient,) = gradients(StrideCost(3.0), [[2.0, 4.0]])
    np.testing.assert_allclose(array(gradient), [-3 / (4 * 4), -3 / (2 * 16)])


@pytest.mark.parametrize('policy', ['float32', 'mixed_bfloat16'])
def test_activation_cost_is_the_papers_and_leaves_the_output(policy):
    keras.config.set_dtype_policy(policy)
    model = network()
    x = random(2, 16, 12, 3)
    without = COMPILERS[USUAL](keras.Sequential(model.layers[:-1]))

    def outputs(x):
        return model(x), sum(model.losses)

    y, cost = COMPILERS[USUAL](outputs)(x)
    np.testing.assert_array_equal(array(y), array(without(x)))
    assert float(array(cost)) == pytest.approx(by_hand(STRIDES))


@pytest.mark.parametrize('holder', ['sequential', 'functional', 'nested'])
def test_strides_are_trained_by_their_cost(holder):
    """One step of gradient descent on the cost alone, in `fit`."""
    model = network()
    if holder == 'functional':
        model = keras.Model(model.inputs, model.outputs)
    elif holder == 'nested':
        model = keras.Sequential([keras.Input((16, 12, 3)), model])
    model.compile(
        keras.optimizers.SGD(0.5),
        lambda y, p: 0 * ops.sum(p, -1),
        run_eagerly=EAGER and holder != 'nested',
    )
    x = np.zeros((2, 16, 12, 3))
    model.fit(x, np.zeros((2, 3)), verbose=0)
    start = np.ravel(STRIDES)
    slopes = central_differences(lambda x: by_hand(x.reshape(3, 2)), start)
    found = np.ravel([x.stride_values for x in diffstride_layers(model)])
    np.testing.assert_allclose(found, start - 0.5 * slopes, rtol=1e-5)


ALONE = keras.Sequential([ActivationCost()])
test_wrong_arguments = refusals(
    (lambda: StrideCost(-1), '`weight` must be a finite number, at least'),
    (lambda: ActivationCost('1'), '`weight` must be'),
    (lambda: ALONE(np.zeros((1, 2))), 'must have DiffStride layers'),
)
