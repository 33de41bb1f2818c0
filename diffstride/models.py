"""Access to parts of models that Keras keeps private.

These are the layers within a layer, the compiled functions, the calls and the
graph. No other module uses private parts of models or layers.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras


def flatten(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a model or layer and all layers within it, each once.

    They come in the order in which their containers hold them, which is from
    input to output in Sequential and Functional models.
    """
    found = {}

    def visit(layer):
        if layer not in found:
            found[layer] = None
            for inner in inner_layers(layer):
                visit(inner)

    visit(model)
    return list(found)


def inner_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that a layer holds directly."""
    return list(getattr(layer, '_layers', ()))


def recompile(model: keras.Model) -> None:
    """Makes the train, test and predict functions of a model again.

    The next batch traces them with the present sizes. A function that was never
    made is left alone.
    """
    for layer in flatten(model)[1:]:
        if isinstance(layer, keras.Model) and layer.input_spec is not None:
            layer.input_spec = None  # It requires the former sizes.
    for kind in ('train', 'test', 'predict'):
        if getattr(model, f'{kind}_function', None) is not None:
            getattr(model, f'make_{kind}_function')(force=True)


def recompile_models_with(layer: keras.layers.Layer) -> None:
    """Makes the functions of all models that hold a layer again.

    A layer does not know the models that hold it, so this looks through all
    objects. It takes some 50 ms, and is for changes of compiled sizes only.
    """
    for found in gc.get_objects():
        if issubclass(type(found), keras.Model) and layer in flatten(found):
            recompile(found)


def sync(model: keras.Model) -> None:
    """Gives variables their present values within `fit` on JAX.

    There the state of a training step lives outside the variables until the
    end of the epoch. On other backends this does nothing.
    """
    if keras.backend.backend() == 'jax':
        model.jax_state_sync()


@contextlib.contextmanager
def intercepted(
    layer: keras.layers.Layer, function: Callable[..., Any]
) -> Iterator[None]:
    """Replaces the call of a layer by a function within a context.

    Args:
        layer: Any layer.
        function: A function that takes the layer's own `call`, then the
            arguments of the call, and returns the outputs.
    """
    is_quantized = getattr(layer, 'quantization_mode', None) is not None
    name = 'quantized_call' if is_quantized else 'call'
    attributes = vars(layer)
    before = {name: attributes[name]} if name in attributes else {}
    call = getattr(layer, name)

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(call, *args, **kwargs)

    attributes[name] = wrapper
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def model_of(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns the innermost model that holds a layer, within the layer's call.

    A layer does not know the models that hold it. Keras knows the outermost
    layer that was called, but not while it trains on JAX; there this looks
    through all objects.
    """
    outermost = layer._get_call_context().entry_layer
    found = flatten(outermost) if outermost is not layer else gc.get_objects()
    holders = [
        x
        for x in found
        if issubclass(type(x), keras.Model) and layer in flatten(x)
    ]
    return min(holders, key=lambda x: len(flatten(x)), default=outermost)


def is_graph(layer: keras.layers.Layer) -> bool:
    """Tells whether a layer is a Sequential or Functional model."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and hasattr(layer, '_run_through_graph')
    )


def run_graph(model: keras.Model, inputs: Any, call: Callable[..., Any]) -> Any:
    """Runs a Sequential or Functional model with another way to call layers.

    Args:
        model: The model.
        inputs: Its inputs, in its structure: tensors or any other objects.
        call: A function that is called as call(layer, *args, **kwargs) in
            place of each layer.

    Returns:
        The outputs, in the structure of the model's.
    """
    inputs = flat_inputs(model, inputs)
    if isinstance(model, keras.Sequential):
        (x,) = inputs
        for layer in model.layers:
            x = call(layer, x)
        return x
    return model._run_through_graph(
        inputs, operation_fn=lambda layer: functools.partial(call, layer)
    )


def flat_inputs(model: keras.Model, inputs: Any) -> list:
    """Returns the inputs of a model in the order of `model.inputs`."""
    if isinstance(inputs, dict) and not isinstance(model.input, dict):
        inputs = [inputs[x.name] for x in model.inputs]
    return keras.tree.flatten(inputs)


def source(tensor: keras.KerasTensor) -> keras.layers.Layer:
    """Returns the layer that a symbolic tensor is an output of."""
    return tensor._keras_history.operation


def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a layer made from the config of another, without its weights."""
    if isinstance(layer, keras.layers.Lambda):
        # The copy shares the functions: Keras refuses to restore a Python
        # lambda from a config, and would not know the names that it uses.
        return type(layer)(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
            trainable=layer.trainable,
        )
    return type(layer).from_config(layer.get_config())


def set_trainable(model: keras.Model, value: bool) -> None:
    """Sets whether a model is trainable, without a change to its layers."""
    model._trainable = value
