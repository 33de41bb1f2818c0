"""Makes Keras's optimizers, schedules and losses configurable by gin.

As `tf.keras.optimizers.SGD` (or `keras.optimizers.SGD`),
`tf.keras.optimizers.schedules.CosineDecay`,
`tf.keras.losses.CategoricalCrossentropy` and so on.
"""

import inspect

import gin
import keras


def _register_classes(module, base):
    for cls in vars(module).values():
        if inspect.isclass(cls) and issubclass(cls, base):
            gin.register(cls, module=f'tf.{module.__name__}')


_register_classes(keras.optimizers, keras.optimizers.Optimizer)
_register_classes(
    keras.optimizers.schedules, keras.optimizers.schedules.LearningRateSchedule
)
_register_classes(keras.losses, keras.losses.Loss)
