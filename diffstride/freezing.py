"""Copies of models whose strides, sizes and tables are constants."""

import os
import tempfile

import keras

from diffstride import spectral, validation
from diffstride.pooling import SpectralResampling
from diffstride.regularizers import StrideCostModel


def freeze(model, method='matmul'):
    """Returns a copy of a model in which every spectral pooling is constant.

    The copy computes the same function, faster: its strides are numbers, which
    are not learned any more, its output sizes are constants, and its tables are
    made once per input size, in float64, and embedded in every graph. All other
    weights are as trainable as they are in the model, and gradients flow
    through the pooling layers to them and to the inputs.

    This is the model to export, with Keras's own

        freeze(model).export('model.onnx', format='onnx')

    and likewise for 'tf_saved_model' and 'litert'. Exported graphs are the
    simplest where the sizes of the images are known: the batch size may be
    left free, as in `Input((32, 32, 3))`. Otherwise tables are computed from
    the constant strides within the graph. What runs ONNX and LiteRT files has
    no convolutions in bfloat16 or float64: export models of dtype float32.

    The copy is made by saving the model and loading it, so it has the custom
    objects, names and state that a saved model has. It is not compiled. A size
    that is pinned remains as it is; pin again for the sizes of the present
    strides. Of a `StrideCostModel` the copy is that of its model, without the
    cost. The copy can be saved, loaded and frozen again.

    Args:
        model: A `keras.Model` that is built, with layers of this package at any
            depth. It does not change. It must be one that Keras can save and
            load; a subclass of Model needs `get_config` for it.
        method: Of all its spectral layers, see `DiffStride`. 'matmul'
            is what can be exported to ONNX and LiteRT, which have no inverse
            FFT; 'auto' may be faster for axes of 1000 samples and more.

    Returns:
        A `keras.Model` of the same class.

    Raises:
        ValueError: If `model` is not a built Keras model, or cannot be copied;
            if `method` is unknown.

    Example:

    >>> model = keras.Sequential([keras.Input((32, 32, 3)), DiffStride(2.0)])
    >>> model.output_shape
    (None, None, None, 3)
    >>> freeze(model).output_shape
    (None, 24, 24, 3)
    """
    validation.one_of('method', method, spectral.METHODS)
    while isinstance(model, StrideCostModel):
        model = model.model
    validation.require(
        isinstance(model, keras.Model) and model.built,
        '`model` must be a Keras model that is built',
        model=getattr(model, 'name', model),
    )
    frozen = _copied(model)
    for layer in frozen._flatten_layers():
        if isinstance(layer, SpectralResampling):
            layer.freeze(method)
    frozen = _copied(frozen)  # Whose symbolic shapes know the sizes.
    _call_symbolically(frozen)  # Keras exports what was called.
    return frozen


def _copied(model):
    """Returns a copy of a model, not compiled, with the state that it saves."""
    classes = {type(layer) for layer in model._flatten_layers()}
    custom_objects = {
        cls.__name__: cls
        for cls in classes
        if not cls.__module__.startswith('keras.')
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'model.keras')
            model.save(path)
            return keras.saving.load_model(
                path,
                custom_objects=custom_objects,
                compile=False,
                safe_mode=False,  # It was not made by others.
            )
    except Exception as error:
        raise ValueError(
            '`model` must be a model that Keras can save and load. '
            f'Received: model={model.name}, of which saving or loading says: '
            f'{error}'
        ) from error


def _call_symbolically(model):
    """Calls a model of one input, or of one structure of them."""
    if isinstance(model, keras.Sequential):
        inputs = model.inputs[0]
    elif hasattr(model, 'inputs'):
        inputs = model.input
    else:  # A subclass, of no graph of layers.
        shapes = (model.get_build_config() or {}).get('input_shape')
        if shapes is None:
            return
        inputs = keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor(
                (None, *shape[1:]), model.input_dtype
            ),
            shapes,
        )
    model(
        keras.tree.map_structure(
            lambda x: keras.KerasTensor(x.shape, x.dtype), inputs
        )
    )
