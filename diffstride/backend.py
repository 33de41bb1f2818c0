"""Differences between backends, and between numbers and tensors."""

import functools
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops


def is_compiled_by_xla() -> bool:
    """Tells whether XLA will compile the function that is being traced.

    It must be called while one is.
    """
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util

        graph = tf.compat.v1.get_default_graph()
        return control_flow_util.GraphOrParentsInXlaContext(graph)
    return keras.backend.backend() == 'jax'


def is_tensorflow_graph() -> bool:
    """Tells whether TensorFlow traces a graph, whose tensors have no values."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def shape_of(tensor: Any) -> tuple:
    """Returns the sizes of the axes: integers if known, else scalar tensors.

    PyTorch's exporters trace with tensors for all sizes. This returns a tensor
    for the size of the batch alone.
    """
    shape = tuple(ops.shape(tensor))
    if keras.backend.backend() == 'torch':
        return (*shape[:1], *map(int, shape[1:]))
    return shape


def static_sizes(tensor: Any, axes: Iterable[int]) -> list[int | None]:
    """Returns the sizes of some axes, None for those that are not known."""
    sizes = [tensor.shape[axis] for axis in axes]
    if keras.backend.backend() == 'torch':
        return [size if size is None else int(size) for size in sizes]
    return sizes


def known(*values: Any) -> bool:
    """Tells whether all values are numbers, not tensors."""
    return all(isinstance(value, numbers.Real) for value in values)


def minimum(a: Any, b: Any) -> Any:
    """Returns the lesser of two numbers or tensors."""
    return min(a, b) if known(a, b) else ops.minimum(a, b)


def maximum(a: Any, b: Any) -> Any:
    """Returns the greater of two numbers or tensors."""
    return max(a, b) if known(a, b) else ops.maximum(a, b)


def real(value: Any) -> Any:
    """Returns a float64 number or array, or a tensor as float32."""
    if isinstance(value, (numbers.Real, np.ndarray)):
        return value * 1.0
    return ops.cast(value, 'float32')


def call_for_shapes(function: Callable[[Any], Any], inputs: Any) -> None:
    """Calls a function only to learn the shapes of what it computes.

    On JAX it computes nothing. It may return anything.
    """
    if keras.backend.backend() != 'jax':
        function(inputs)
        return
    import jax

    def without_outputs(x):
        function(x)

    jax.eval_shape(without_outputs, inputs)


def known_values(variable: keras.Variable) -> tuple[float, ...] | None:
    """Returns the values of a variable, or None where they are not known.

    They are not known while TensorFlow traces a graph or JAX compiles. They
    are known while JAX only differentiates. `fit` on JAX deletes them.
    """
    value = variable.value
    if keras.backend.backend() == 'jax':
        import jax

        if isinstance(value, jax.core.Tracer):
            value = jax.lax.stop_gradient(value)
        if isinstance(value, jax.core.Tracer) or value.is_deleted():
            return None
        return tuple(np.asarray(value).reshape(variable.shape).tolist())
    if is_tensorflow_graph():
        return None
    return tuple(ops.convert_to_numpy(value).tolist())


def is_traced(variable: keras.Variable) -> bool:
    """Tells whether a variable has no values now, in a graph or a jit.

    PyTorch has neither.
    """
    return known_values(variable) is None


def stored_values(variable: keras.Variable) -> tuple[float, ...] | None:
    """Returns the values that a variable holds now, also while tracing.

    It returns None before the variable is initialized, and while `fit` on JAX
    has taken the values away.
    """
    value = variable._value
    if value is None:
        return None
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        if tf.executing_eagerly():
            return tuple(value.numpy().tolist())
        with tf.init_scope():
            if not value.is_initialized():
                return None
            return tuple(value.numpy().tolist())
    if keras.backend.backend() == 'jax':
        import jax

        if isinstance(value, jax.core.Tracer) or value.is_deleted():
            return None
        return tuple(np.asarray(value).tolist())
    return tuple(ops.convert_to_numpy(value).tolist())


def matmul(a: Any, b: Any) -> Any:
    """Returns the product of tensors of one dtype, in that dtype."""
    if keras.backend.backend() != 'torch':
        return ops.matmul(a, b)
    a, b = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    if a.dtype.itemsize < 8:
        return ops.matmul(a, b)
    return a @ b  # Keras would turn float64 into float32.


def filter_spectrum(inputs: Any, weights: Any, output_size: Any) -> Any:
    """Returns irfft(weights * rfft(inputs)[: len(weights)], n=output_size).

    Args:
        inputs: Float tensor [..., N].
        weights: Float tensor of the weights of the first frequencies.
        output_size: M, the length of the output [..., M].
    """
    if 0 in inputs.shape and None not in inputs.shape:
        # The FFTs of TensorFlow and PyTorch refuse an empty batch.
        return ops.zeros((*inputs.shape[:-1], output_size), inputs.dtype)
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        spectrum = tf.signal.rfft(inputs)[..., : tf.shape(weights)[0]]
        spectrum *= tf.cast(weights, spectrum.dtype)
        return tf.signal.irfft(spectrum, [output_size])
    spectrum = ops.rfft(inputs)
    spectrum = [part[..., : len(weights)] * weights for part in spectrum]
    return ops.irfft(spectrum, output_size)


def partial(function: Callable, **kwargs: Any) -> functools.partial:
    """Returns a partial function, whose tensors `custom_gradient` can find."""
    if keras.backend.backend() == 'jax':
        import jax

        return jax.tree_util.Partial(function, **kwargs)
    return functools.partial(function, **kwargs)


def custom_gradient(
    function: Callable, gradients: Callable, tables: Any = ()
) -> Callable:
    """Returns a function with a gradient of its own.

    Args:
        function: Takes (tables, x, *others), returns y and whatever `gradients`
            needs.
        gradients: Takes (tables, what it needs, others, gradient of y), returns
            the tuple of the gradients of x and all others.
        tables: Tensors without a gradient, within tuples and functions that
            `partial` returned. Neither function may use other tensors of an
            enclosing scope: `jax.checkpoint` drops them before the gradient is
            computed.
    """
    if keras.backend.backend() == 'jax':
        import jax

        leaves, structure = jax.tree.flatten(tables)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        leaves = [
            None if array else leaf for array, leaf in zip(is_array, leaves)
        ]

        def with_arrays(arrays):
            arrays = iter(arrays)
            return structure.unflatten(
                next(arrays) if array else leaf
                for array, leaf in zip(is_array, leaves)
            )

        def forward(arrays, x, *others):
            _, kept = function(with_arrays(arrays), x, *others)
            # `vjp` has this gradient too, so second derivatives exist.
            return vjp(arrays, x, *others), (arrays, kept, others)

        def backward(residuals, upstream):
            arrays, *residuals = residuals
            return None, *gradients(with_arrays(arrays), *residuals, upstream)

        vjp = jax.custom_vjp(
            lambda arrays, *args: function(with_arrays(arrays), *args)[0]
        )
        vjp.defvjp(forward, backward)
        return functools.partial(vjp, arrays)

    @ops.custom_gradient
    def apply(x, *others):
        y, kept = function(tables, x, *others)

        def backward(*args, upstream=None):
            upstream = args[-1] if upstream is None else upstream
            return gradients(tables, kept, others, upstream)

        return y, backward

    return apply


def with_gradient_of(value: Any, surrogate: Any) -> Any:
    """Returns `value`, with the gradient of `surrogate`."""
    return ops.stop_gradient(value) + (surrogate - ops.stop_gradient(surrogate))


def with_finite_gradient(x: Any) -> Any:
    """Returns `x`; its gradient is 0 where it would be infinite or NaN."""

    def function(tables, x):
        return 1.0 * x, None

    def gradients(tables, kept, others, upstream):
        return (ops.where(ops.isfinite(upstream), upstream, 0.0),)

    return custom_gradient(function, gradients)(x)


def with_zero_gradient(x: Any, variable: keras.Variable) -> Any:
    """Returns `x`, connected to a variable by a gradient of 0."""

    def function(tables, x, other):
        return 1 * x, None

    def gradients(tables, kept, others, upstream):
        return upstream, ops.zeros_like(others[0])

    apply = custom_gradient(function, gradients)
    return apply(x, ops.convert_to_tensor(variable))
