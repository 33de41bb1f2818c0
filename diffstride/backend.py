"""What differs between the backends: known values, FFTs, own gradients."""

import contextlib

import keras
import numpy as np
from keras import ops


def sizes_must_be_constant():
    """Whether XLA compiles what is being traced."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util

        graph = tf.compat.v1.get_default_graph()
        return control_flow_util.GraphOrParentsInXlaContext(graph)
    return keras.backend.backend() == 'jax'


def shape_of(tensor):
    """Sizes of the axes: integers where they are known, else scalar tensors.

    While PyTorch traces for an exporter all sizes are tensors there. Only that
    of the batch is left one.
    """
    shape = tuple(ops.shape(tensor))
    if keras.backend.backend() == 'torch':
        return (*shape[:1], *map(int, shape[1:]))
    return shape


def static_sizes(tensor, axes):
    """Sizes of some axes: integers, and None where they are not known."""
    sizes = [tensor.shape[axis] for axis in axes]
    if keras.backend.backend() == 'torch':
        return [size if size is None else int(size) for size in sizes]
    return sizes


def eager_scope():
    """A context within which values are computed, while tracing too."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()


def is_symbolic():
    """Whether values of tensors are not known now."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def call_for_shapes(function, inputs):
    """Calls a function of which only the shapes that it meets are wanted."""
    if keras.backend.backend() == 'jax':
        import jax

        jax.eval_shape(lambda x: [None, function(x)][0], inputs)
    else:
        function(inputs)


def known_values(variable):
    """The values of a variable as a list of numbers, None while traced.

    On JAX also within what is differentiated, unless it is compiled.
    """
    value = variable.value
    if keras.backend.backend() == 'jax':
        import jax

        if isinstance(value, jax.core.Tracer):
            value = jax.lax.stop_gradient(value)
        if isinstance(value, jax.core.Tracer):
            return None  # Compiled, not differentiated alone.
        return np.asarray(value).reshape(variable.shape).tolist()
    if is_symbolic():
        return None
    return ops.convert_to_numpy(value).tolist()


def have_values(variables):
    """Whether they have.

    Not while shapes of a new model are inferred, nor on JAX while a function
    is traced to which Keras gave the values away.
    """
    values = [variable._value for variable in variables]
    if keras.backend.backend() == 'tensorflow':
        with eager_scope():
            return all(value.is_initialized() for value in values)
    return not any(
        value is None or getattr(value, 'is_deleted', bool)()
        for value in values
    )


def value_of(variable):
    """The present value of a variable as NumPy, while tracing too."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        with tf.init_scope():
            return variable.value.numpy()
    if keras.backend.backend() == 'jax':
        return np.asarray(variable._value)
    return ops.convert_to_numpy(variable.value)


def matmul(a, b):
    """The product of tensors of one dtype, in that dtype."""
    if keras.backend.backend() != 'torch':
        return ops.matmul(a, b)
    a, b = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    if a.dtype.itemsize < 8:
        return ops.matmul(a, b)
    return a @ b  # Keras would make it float32.


def filter_spectrum(inputs, weights, output_size):
    """irfft(weights * rfft(x)[: len(weights)], n=M): [..., N] -> [..., M]."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        spectrum = tf.signal.rfft(inputs)[..., : tf.shape(weights)[0]]
        spectrum *= tf.cast(weights, spectrum.dtype)
        return tf.signal.irfft(spectrum, [output_size])
    if 0 in inputs.shape:  # Which the FFT of PyTorch does not take.
        return ops.zeros((*inputs.shape[:-1], output_size), inputs.dtype)
    spectrum = ops.rfft(inputs)
    spectrum = [part[..., : len(weights)] * weights for part in spectrum]
    return ops.irfft(spectrum, output_size)


def custom_gradient(function, gradients):
    """Returns a function of a gradient that is not derived from its code.

    Args:
        function: Of (x, *others), returns y and what `gradients` needs of it.
        gradients: Of (what it needs, others, gradient of y), returns the tuple
            of the gradients of x and all others.
    """
    if keras.backend.backend() == 'jax':
        import jax

        def forward(x, *others):
            # Not function's y: this one has a gradient in turn.
            return apply(x, *others), (function(x, *others)[1], others)

        def backward(residuals, upstream):
            return gradients(*residuals, upstream)

        apply = jax.custom_vjp(lambda *args: function(*args)[0])
        apply.defvjp(forward, backward)
        return apply

    @ops.custom_gradient
    def apply(x, *others):
        y, kept = function(x, *others)

        def backward(*args, upstream=None):
            upstream = args[-1] if upstream is None else upstream
            return gradients(kept, others, upstream)

        return y, backward

    return apply
