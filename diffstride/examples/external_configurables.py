"""Registers with gin the classes and functions that a configuration may name.

They are those of the project, and Keras's layers, callbacks, optimizers,
schedules and losses, with names such as `keras.optimizers.SGD` (or, as in 2022,
`tf.keras.optimizers.SGD`). Register your own in a module that a gin file or a
binding then imports:

    import gin, keras

    @gin.register
    class MyLayer(keras.layers.Layer): ...
"""

import inspect

import gin
import keras

import diffstride.callbacks
import diffstride.resnet  # noqa: F401
from diffstride.examples import convnet, grid, schedules, train  # noqa: F401

for _module in (
    keras.layers,
    keras.callbacks,
    keras.optimizers,
    keras.optimizers.schedules,
    keras.losses,
):
    _classes = {k: x for k, x in vars(_module).items() if inspect.isclass(x)}
    # MaxPool2D is MaxPooling2D. Gin knows a class by the name that comes last.
    for _name in sorted(_classes, key=lambda k: k == _classes[k].__name__):
        gin.register(_name, module=f'tf.{_module.__name__}')(_classes[_name])
