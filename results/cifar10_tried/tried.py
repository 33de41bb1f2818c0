"""Other ways in which strides could be learned."""

import gin
import keras
from keras import ops

from diffstride import pooling, resnet


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


@gin.configurable(module='tried')
def scaled_shortcut(scale, **kwargs):
    """A ResNet-18 whose shortcuts are multiplied where it downsamples.

    Args:
        scale: Factor, which norm='backward' makes N / M per axis.
        **kwargs: Of `resnet.resnet18`.
    """
    model = resnet.configured(resnet.resnet18)(**kwargs)
    for layer in model._flatten_layers():
        if isinstance(layer, resnet.ResidualLayer) and layer.strides != (1, 1):
            layer.shortcut = keras.Sequential(
                [layer.shortcut, keras.layers.Rescaling(scale)]
            )
    return model
