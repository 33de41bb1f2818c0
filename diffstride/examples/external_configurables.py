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
from diffstride.examples import grid, schedules, train  # noqa: F401

gin.external_configurable(grid.grid, module='grid')

for _module, _base in (
    (keras.layers, keras.layers.Layer),
    (keras.callbacks, keras.callbacks.Callback),
    (keras.optimizers, keras.optimizers.Optimizer),
    (
        keras.optimizers.schedules,
        keras.optimizers.schedules.LearningRateSchedule,
    ),
    (keras.losses, keras.losses.Loss),
):
    _classes = filter(inspect.isclass, vars(_module).values())
    for _cls in dict.fromkeys(_classes):  # Some classes have two names.
        if issubclass(_cls, _base):
            gin.register(_cls, module=f'tf.{_module.__name__}')
