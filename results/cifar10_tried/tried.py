"""Other ways in which strides could be learned."""

import gin
import keras
from keras import ops

from diffstride import pooling


@keras.saving.register_keras_serializable(package='tried')
class Tried(pooling.DiffStride):
    """DiffStride whose strides have another gradient.

    Args:
        multiplier: Of the gradient; under SGD it multiplies the learning rate.
        logarithmic: Whether the gradient is also multiplied by S^2, which is
            how S moves, to first order, where SGD learns log S.
        **kwargs: Of DiffStride.
    """

    def __init__(self, multiplier=1.0, logarithmic=False, **kwargs):
        super().__init__(**kwargs)
        self.multiplier = multiplier
        self.logarithmic = logarithmic

    @property
    def strides_per_axis(self):
        strides = super().strides_per_axis
        constant = ops.stop_gradient(strides)
        factor = self.multiplier
        if self.logarithmic:
            factor = factor * constant**2
        return constant + factor * (strides - constant)

    def get_config(self):
        return {
            **super().get_config(),
            'multiplier': self.multiplier,
            'logarithmic': self.logarithmic,
        }


gin.register(Tried, module='tried')
