"""Registers with gin all that a configuration may name.

Beside the project's own functions these are Keras's layers, callbacks,
optimizers, schedules and losses, as `keras.optimizers.SGD` (or, as in 2022,
`tf.keras.optimizers.SGD`). One's own are registered in a module of one's own,
which a gin file or a binding then imports:

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
    for _cls in dict.fromkeys(_classes):  # Some have two names.
        if issubclass(_cls, _base):
            gin.register(_cls, module=f'tf.{_module.__name__}')
