"""Helpers of the tests: numbers, models, gradients, compilers, processes."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from diffstride import DiffStride, DiffStride1D, DiffStride3D
from diffstride.pooling import (
    FixedSpectralPooling,
    FixedSpectralPooling1D,
    FixedSpectralPooling3D,
)

BACKEND = keras.backend.backend()
# How models are compiled on TensorFlow whose graph is not what a test is about:
# to trace it takes longer than a few steps.
EAGER = BACKEND == 'tensorflow'
FORMATS = ('channels_last', 'channels_first')
# The layers of every rank.
DIFFSTRIDES = {1: DiffStride1D, 2: DiffStride, 3: DiffStride3D}
FIXED = {
    1: FixedSpectralPooling1D,
    2: FixedSpectralPooling,
    3: FixedSpectralPooling3D,
}


def random(*shape, seed=0):
    """Returns normal noise, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype('float32')


def shape_of(sizes, data_format='channels_last', channels=2, batch=None):
    """Returns the shape of a batch with these spatial sizes."""
    if data_format == 'channels_first':
        return (batch, channels, *sizes)
    return (batch, *sizes, channels)


def image(sizes, data_format='channels_last', batch=2, channels=2, seed=0):
    """Returns a batch of noise with these spatial sizes, float32."""
    return random(*shape_of(sizes, data_format, channels, batch), seed=seed)


def array(tensor):
    """Returns the values of a tensor of any backend and dtype, float64."""
    return np.asarray(ops.convert_to_numpy(tensor), 'float64')


def error_of(actual, expected):
    """Returns the largest relative error; infinite for another shape or NaN."""
    actual, expected = array(actual), array(expected)
    if actual.shape != expected.shape:
        return np.inf
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return error if np.isfinite(error) else np.inf


def dtype_of(tensor):
    """Returns the name of a tensor's dtype."""
    return keras.backend.standardize_dtype(tensor.dtype)


def sequential(shape, *layers, **kwargs):
    """Returns a Sequential model of layers for inputs of this shape."""
    return keras.Sequential([keras.Input(shape), *layers], **kwargs)


def randomized(model):
    """Changes every weight, strides and statistics too; returns the model."""
    random = np.random.default_rng(1)
    for weight in model.weights:
        if 'record' not in weight.path:
            weight.assign_add(0.1 + 0.3 * random.random(weight.shape))
    return model


class NotTold(keras.layers.Layer):
    """A layer whose config does not tell how to make it."""

    def __init__(self, thing):
        super().__init__(name='not_told')

    def call(self, x):
        return x


def only(backend, reason):
    """Marks a test that is about one backend."""
    return pytest.mark.skipif(
        backend != BACKEND, reason=f'for {backend} alone: {reason}'
    )


def skip_unless_there_is(dtype):
    """Skips a test of float64 on JAX."""
    if BACKEND == 'jax' and dtype == 'float64':
        pytest.skip('JAX has float64 only if told so before it starts')


def refusals(*cases):
    """Returns a test that calls are refused, each with a message."""

    @pytest.mark.parametrize('call, message', cases)
    def test(call, message):
        with pytest.raises(ValueError, match=message):
            call()

    return test


def some(cases):
    """Returns a few of the cases on JAX, which compiles for each shape."""
    cases = list(cases)
    return cases[:: len(cases) // 4 + 1] if BACKEND == 'jax' else cases


def gradients(function, tensors=(), variables=()):
    """Returns the gradients of a scalar in the tensors, then the variables."""
    tensors = [ops.convert_to_tensor(x) for x in tensors]
    values = [variable.value for variable in variables]
    if BACKEND == 'tensorflow':
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(*tensors)
        found = tape.gradient(loss, tensors + values)
        return [x if x is None else tf.convert_to_tensor(x) for x in found]
    if BACKEND == 'jax':
        import jax

        def loss_of(tensors, values):
            with keras.StatelessScope(list(zip(variables, values))):
                return function(*tensors)

        of_tensors, of_values = jax.grad(loss_of, (0, 1))(tensors, values)
        return of_tensors + of_values
    import torch

    tensors = [x.clone().requires_grad_() for x in tensors]
    loss = function(*tensors)
    kwargs = {'create_graph': True, 'materialize_grads': True}
    return list(torch.autograd.grad(loss, tensors + values, **kwargs))


def central_differences(function, x, step=1e-6):
    """Returns the slopes of a scalar function of a vector."""
    slopes = [function(x + d) - function(x - d) for d in step * np.eye(len(x))]
    return np.array(slopes) / (2 * step)


def traced(function, jit_compile=None):
    """Compiles a function for each shape of its arguments, if possible."""
    if BACKEND == 'tensorflow':
        import tensorflow as tf

        return tf.function(function, autograph=False, jit_compile=jit_compile)
    if BACKEND == 'jax':
        import jax

        # JAX keeps the traces of a function, whose strides may have moved.
        return jax.jit(lambda *args, **kwargs: function(*args, **kwargs))
    return function


COMPILERS = {'eager': lambda f: f}
if BACKEND == 'tensorflow':
    COMPILERS['graph'] = traced
if BACKEND != 'torch':
    COMPILERS['xla'] = lambda f: traced(f, jit_compile=True)
# JAX compiles a whole function in less time than each of its operations.
USUAL = 'xla' if BACKEND == 'jax' else 'eager'


def of_unknown_sizes(function, *signature):
    """Traces a function on TensorFlow once, for a (shape, dtype) per tensor."""
    if BACKEND != 'tensorflow':
        return function
    import tensorflow as tf

    specs = [tf.TensorSpec(*each) for each in signature]
    return tf.function(function, input_signature=specs, autograph=False)


def of_any_image(layer):
    """Returns a layer, compiled on TensorFlow for images of every size."""
    shape = shape_of([None] * layer.rank, layer.data_format)
    pool = of_unknown_sizes(layer, (shape, 'float32'))
    return lambda x: pool(ops.convert_to_tensor(x))


def environment(**variables):
    """Returns variables for a process that imports what this one can."""
    paths = [str(pathlib.Path(__file__).parent), *sys.path]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), **variables}


def run_apart(*arguments, **kwargs):
    """Runs Python, with these arguments, apart; returns how it ended."""
    kwargs = {'env': environment(), 'text': True, **kwargs}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, **kwargs)


def output_of(*arguments, **kwargs):
    """Returns what `run_apart` prints; it must end well."""
    done = run_apart(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(*arguments, **kwargs):
    """Starts Python in a process of its own; see `run_apart`."""
    kwargs = {'env': environment(), 'text': True, **kwargs}
    return subprocess.Popen([sys.executable, *arguments], **kwargs)
