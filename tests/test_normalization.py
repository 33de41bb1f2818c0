"""Batch normalization against NumPy, and against Keras where it must agree."""

import inspect

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    COMPILERS,
    array,
    dtype_of,
    error_of,
    gradients,
    of_unknown_sizes,
    only,
    random,
    skip_unless_there_is,
    traced,
)
from keras import ops

from diffstride.normalization import BatchNormalization

TOLERANCES = {'float32': 1e-5, 'mixed_float16': 2e-3, 'mixed_bfloat16': 1e-2}
GAMMA, BETA = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, -3.0])
CLASSES = BatchNormalization, keras.layers.BatchNormalization


def built(shape, cls=BatchNormalization, **kwargs):
    layer = cls(momentum=0.9, **kwargs)
    layer.build(shape)
    for weight, values in ((layer.gamma, GAMMA), (layer.beta, BETA)):
        if weight is not None:
            weight.assign(values)
    return layer


def normalized(x):
    """Returns (x - mean) / deviation, the mean and the variance of channels."""
    x = array(x)
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(variance + 1e-3), mean, variance


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize(
    'compiler, shape',
    [
        *(('eager', shape) for shape in [(16, 3), (8, 9, 3), (4, 7, 5, 3)]),
        # JAX assigns only eagerly.
        *((x, (8, 9, 3)) for x in ('graph', 'xla') if BACKEND == 'tensorflow'),
    ],
)
def test_training_agrees_with_numpy(compiler, shape, dtype):
    layer = built(shape, dtype=dtype)

    def train(x):
        return layer(x, training=True)

    x = ops.cast(2 * random(*shape) + 5, layer.compute_dtype)
    y = COMPILERS[compiler](train)(x)
    z, mean, variance = normalized(x)
    expected = GAMMA * z + BETA
    assert dtype_of(y) == layer.compute_dtype
    assert error_of(y, expected) <= TOLERANCES[dtype]
    assert error_of(layer.moving_mean, 0.1 * mean) <= 1e-5
    assert error_of(layer.moving_variance, 0.9 + 0.1 * variance) <= 1e-5
    of_any_shape = of_unknown_sizes(train, ([None] * len(shape), x.dtype))
    assert error_of(of_any_shape(x), expected) <= TOLERANCES[dtype]


def test_gradients_agree_with_numpy():
    layer = built((6, 4, 4, 3))
    x, slopes = 2 * random(6, 4, 4, 3) + 5, array(random(6, 4, 4, 3, seed=1))

    def loss(x):
        return ops.sum(layer(x, training=True) * ops.array(slopes, 'float32'))

    found = gradients(loss, [x], [layer.gamma, layer.beta])
    z, _, variance = normalized(x)
    # Ioffe and Szegedy, section 3.
    centred = slopes - slopes.mean((0, 1, 2)) - z * (slopes * z).mean((0, 1, 2))
    expected = GAMMA / np.sqrt(variance + 1e-3) * centred
    assert error_of(found[0], expected) <= 1e-5
    assert error_of(found[1], (slopes * z).sum((0, 1, 2))) <= 1e-5
    assert error_of(found[2], slopes.sum((0, 1, 2))) <= 1e-5


def test_averages_are_not_rounded_at_every_step():
    """In bfloat16, where 1 - 0.9 and 0.9 do not add up to 1."""
    x = random(64, 3) + 5
    ours, theirs = (built(x.shape, cls, dtype='bfloat16') for cls in CLASSES)
    for layer in [ours, theirs] * 50:
        layer(x, training=True)
    assert error_of(ours.moving_mean, theirs.moving_mean) <= 4e-3
    assert error_of(ours.moving_variance, theirs.moving_variance) <= 4e-3


CASES = {
    'inference': ({}, {}),
    'frozen': ({'trainable': False}, {'training': True}),
    'channels first': ({'axis': 1}, {'training': True}),
    'plain': ({'scale': False, 'center': False}, {'training': True}),
    'float64': ({'dtype': 'float64'}, {'training': True}),
    'integers': ({'dtype': 'bfloat16'}, {'training': True}),
    'masked': ({}, {'training': True, 'mask': np.arange(12).reshape(4, 3) % 2}),
}

if 'renorm' in inspect.signature(keras.layers.BatchNormalization).parameters:
    CASES['renorm'] = {'renorm': True}, {'training': True}


@pytest.mark.parametrize('case', CASES)
def test_other_calls_are_those_of_keras(case):
    skip_unless_there_is(case)
    kwargs, call = CASES[case]
    x = random(4, 3, 3)
    if case == 'integers':
        x = (300 * x).astype('int32')
    ours, theirs = (built(x.shape, cls, **kwargs) for cls in CLASSES)
    assert error_of(ours(x, **call), theirs(x, **call)) <= 1e-6
    for mine, other in zip(ours.weights, theirs.weights):
        np.testing.assert_allclose(array(mine), array(other), atol=1e-6)


@only('tensorflow', 'no other backend has this operation')
def test_one_operation_normalizes_in_training():
    layer = built((None, 4, 4, 3))
    for training, expected in ((True, 1), (False, 0)):
        graph = traced(lambda x, t=training: layer(x, training=t))
        nodes = graph.get_concrete_function(ops.ones((2, 4, 4, 3))).graph
        kinds = [node.type for node in nodes.get_operations()]
        assert kinds.count('FusedBatchNormV3') == expected
