"""Settings of every test: fixed seeds, clean configuration, a small CPU."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import gin
import keras
import pytest

# Raised within Keras and TensorFlow, and of no consequence here.
HARMLESS_WARNINGS = [
    # keras.ops.convert_to_numpy of a tensor or variable, under NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",
    # Training on JAX without RepinStrides; test_callbacks.py checks it.
    'ignore:Output sizes of DiffStride are constants:UserWarning',
    # Functions of NumPy that are given tensors of PyTorch.
    'ignore:__array_wrap__ must accept context:DeprecationWarning',
    # Of PyTorch, in what it imports itself.
    'ignore:`torch.jit:DeprecationWarning',
    # float(x) of a tensor of PyTorch that has a gradient.
    'ignore:Converting a tensor with requires_grad=True:UserWarning',
]

if keras.backend.backend() == 'tensorflow':
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.config.threading.set_inter_op_parallelism_threads(2)
if keras.backend.backend() == 'jax':
    import jax

    jax.config.update('jax_disable_most_optimizations', True)
if keras.backend.backend() == 'torch':
    import torch

    # So that NumPy reads what a layer returns, as on the other backends.
    def _array(tensor, dtype=None, copy=None):
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # Which NumPy has not.
            tensor = tensor.float()
        array = tensor.numpy()
        return array if dtype is None else array.astype(dtype)

    torch.Tensor.__array__ = _array
    torch.Tensor.__array_wrap__ = lambda self, array, *arguments: array


def pytest_configure(config):
    for line in HARMLESS_WARNINGS:
        config.addinivalue_line('filterwarnings', line)


@pytest.fixture(autouse=True)
def fresh_state():
    keras.utils.set_random_seed(0)
    yield
    gin.clear_config()
    keras.config.set_image_data_format('channels_last')
    keras.config.set_floatx('float32')
    keras.config.set_dtype_policy('float32')
