"""What tests need of a backend: gradients, compilation, and marks."""

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def only(backend, reason):
    """Marks a test of what one backend alone has."""
    return pytest.mark.skipif(
        backend != BACKEND, reason=f'of {backend} alone: {reason}'
    )


def skip_unless_there_is(dtype):
    """Skips a test of float64 on JAX."""
    if BACKEND == 'jax' and dtype == 'float64':
        pytest.skip('JAX has float64 only if told so before it starts')


def some(cases):
    """A few of many cases on JAX, which compiles anew for each shape."""
    cases = list(cases)
    return cases[:: len(cases) // 4 + 1] if BACKEND == 'jax' else cases


def gradients(function, tensors=(), variables=()):
    """Of the scalar function(*tensors), in the tensors, then the variables."""
    tensors = [ops.convert_to_tensor(x) for x in tensors]
    variables = list(variables)
    if BACKEND == 'tensorflow':
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(*tensors)
        found = tape.gradient(loss, tensors + [v.value for v in variables])
        return [x if x is None else tf.convert_to_tensor(x) for x in found]
    if BACKEND == 'jax':
        import jax

        def loss_of(tensors, values):
            scope = keras.StatelessScope(list(zip(variables, values)))
            with scope:
                return function(*tensors)

        found = jax.grad(loss_of, (0, 1))(tensors, [v.value for v in variables])
        return found[0] + found[1]
    import torch

    tensors = [x.clone().requires_grad_() for x in tensors]
    found = torch.autograd.grad(
        function(*tensors),
        tensors + [v.value for v in variables],
        create_graph=True,
        materialize_grads=True,
    )
    return list(found)


def jacobian(function, x):
    """Of a vector in a scalar, [count]."""
    count = len(function(x))
    return np.array(
        [
            float(
                ops.convert_to_numpy(
                    gradients(lambda x, i=i: function(x)[i], [x])[0]
                )
            )
            for i in range(count)
        ]
    )


def traced(function):
    """Compiled for each shape of its arguments, where there is a compiler."""
    if BACKEND == 'tensorflow':
        import tensorflow as tf

        return tf.function(function, autograph=False)
    if BACKEND == 'jax':
        import jax

        return jax.jit(function)
    return function


def _with_xla(function):
    import tensorflow as tf

    return tf.function(function, autograph=False, jit_compile=True)


# What makes a function one that is compiled.
COMPILERS = {
    'tensorflow': {'eager': lambda f: f, 'graph': traced, 'xla': _with_xla},
    'jax': {'eager': lambda f: f, 'xla': traced},
    'torch': {'eager': lambda f: f},
}[BACKEND]


def compilers(*names):
    """Those of this backend among them."""
    return [name for name in names if name in COMPILERS]


def of_unknown_sizes(function, *signature):
    """Traced once for all sizes, as TensorFlow can; elsewhere as it is.

    Args:
        function: Of tensors.
        *signature: The shape of each, None for an unknown size, and its dtype.
    """
    if BACKEND != 'tensorflow':
        return function
    import tensorflow as tf

    return tf.function(
        function,
        input_signature=[tf.TensorSpec(*each) for each in signature],
        autograph=False,
    )
