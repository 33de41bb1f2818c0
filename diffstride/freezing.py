"""Copies of models whose strides, sizes and tables are constants."""

import json
import os
import tempfile
import zipfile
from typing import Any

import keras

from diffstride import models, resampling, validation
from diffstride.pooling import DiffStride, SpectralResampling


def freeze(
    model: keras.Model, method: str = 'matmul', dtype: str | None = 'float32'
) -> keras.Model:
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
    the constant strides within the graph. The copy computes in float32 by
    default, whatever the model does, because the runtimes of ONNX and LiteRT
    have no convolutions in bfloat16 or float64.

    The copy is made by saving the model and loading it, so it has the custom
    objects, names and state that a saved model has. It is not compiled. Static
    sizes become those of the strides as they are now. The copy can be saved and
    loaded; a subclass of Model, whose config does not tell of its layers, must
    be frozen again after loading to be exported.

    Args:
        model: A `keras.Model` that is built, with layers of this package at any
            depth. It does not change. It must be one that Keras can save and
            load; a subclass of Model needs `get_config` for it.
        method: The method of all its spectral layers, see `DiffStride`.
            'matmul' can be exported to ONNX and LiteRT, which have no inverse
            FFT; 'auto' may be faster for axes of 1000 samples and more.
        dtype: 'float32' for weights and computations in float32, or None for
            the dtypes of the model.

    Returns:
        A `keras.Model` of the same class.

    Raises:
        ValueError: If `model` is not a built Keras model, or cannot be copied,
            or has a layer that insists on another dtype; if `method` or `dtype`
            is unknown.

    Example:

    >>> model = keras.Sequential([keras.Input((32, 32, 3)), DiffStride(2.0)])
    >>> model.output_shape
    (None, None, None, 3)
    >>> freeze(model).output_shape
    (None, 24, 24, 3)
    """
    validation.one_of('method', method, resampling.METHODS)
    validation.one_of('dtype', dtype, ('float32', None))
    validation.require(
        isinstance(model, keras.Model) and model.built,
        '`model` must be a Keras model that is built',
        model=getattr(model, 'name', model),
    )
    frozen = model
    # The layers of the first copy are held after its graph was made, with sizes
    # that are not known. The graph of a copy of it has sizes.
    for _ in range(2):
        frozen = _copied(frozen, dtype)
        for layer in models.flatten(frozen):
            if isinstance(layer, SpectralResampling):
                layer.method = method
            if isinstance(layer, DiffStride):
                layer.hold()
                layer.trainable = False
    _call_symbolically(frozen)  # Keras exports only what was called.
    return frozen


def _copied(model, dtype):
    """Saves and loads a model, and returns the copy, which is not compiled."""
    custom_objects = {
        type(layer).__name__: type(layer)
        for layer in models.flatten(model)
        if not type(layer).__module__.startswith('keras.')
    }
    policy = keras.config.dtype_policy()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'model.keras')
            model.save(path)
            if dtype is not None:
                path = _converted(path, dtype)
                # Models that make their layers themselves follow this policy.
                keras.config.set_dtype_policy(dtype)
            copy = keras.saving.load_model(
                path,
                custom_objects=custom_objects,
                compile=False,
                safe_mode=False,  # The model was made in this process.
            )
    except Exception as error:
        raise ValueError(
            '`model` must be a model that Keras can save and load. '
            f'Received: model={model.name}, of which saving or loading says: '
            f'{error}'
        ) from error
    finally:
        keras.config.set_dtype_policy(policy)
    for layer in models.flatten(copy):
        is_float = keras.backend.is_float_dtype(layer.compute_dtype)
        validation.require(
            dtype in (None, layer.compute_dtype) or not is_float,
            f'`dtype` must be None for layer "{layer.name}", which computes in '
            f'{layer.compute_dtype} whatever its config says',
            dtype=dtype,
        )
    return copy


def _converted(path, dtype):
    """Writes a saved model with another dtype of its layers; returns the path.

    Keras writes an archive, in which the config is one file.
    """
    new_path = os.path.join(os.path.dirname(path), 'converted.keras')
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new_path, 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            if name == 'config.json':
                data = json.dumps(_with_dtype(json.loads(data), dtype))
            new.writestr(name, data)
    return new_path


def _with_dtype(config: Any, dtype: str) -> Any:
    """Returns a config, at any depth, with another dtype policy of layers."""
    if isinstance(config, list):
        return [_with_dtype(x, dtype) for x in config]
    if not isinstance(config, dict):
        return config
    if config.get('class_name') == 'DTypePolicy':
        # Layers of integers or strings stay as they are.
        is_float = 'float' in config['config']['name']
        return {**config, 'config': {'name': dtype}} if is_float else config
    return {key: _with_dtype(value, dtype) for key, value in config.items()}


def _call_symbolically(model):
    """Calls a model on symbolic tensors of the shapes of its inputs."""
    if isinstance(model, keras.Sequential):
        inputs = model.inputs[0]
    elif hasattr(model, 'inputs'):
        inputs = model.input
    else:  # A subclassed model has no graph of layers.
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
