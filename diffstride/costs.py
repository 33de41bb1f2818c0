"""Costs of strides in the loss.

`StrideCost` is the cost of one layer. `ActivationCost` is the paper's cost of a
network, where a stride also shrinks the maps of all later layers.
"""

from typing import Any

import gin
import keras
from keras import ops, tree

from diffstride import models, validation
from diffstride.pooling import diffstride_layers


@keras.saving.register_keras_serializable(package='diffstride')
@gin.register(module='costs')
class StrideCost(keras.regularizers.Regularizer):
    """Regularizer weight / (S_1 ... S_rank) of the strides of one layer.

    The fraction is the share of its input that the layer returns.

    Args:
        weight: Number >= 0, in the unit of the loss.

    Raises:
        ValueError: If the weight is not a finite number >= 0.

    Example:

    >>> layer = DiffStride(2.0, strides_regularizer=StrideCost(0.5))
    >>> float(layer.losses[0])  # 0.5 / (2 2)
    0.125
    """

    def __init__(self, weight: float = 1.0):
        self.weight = validation.finite('weight', weight, least=0)

    def __call__(self, strides: Any) -> Any:
        return self.weight / ops.prod(strides)

    def get_config(self) -> dict[str, Any]:
        return {'weight': self.weight}


@keras.saving.register_keras_serializable(package='diffstride')
@gin.register(module='costs')
class ActivationCost(keras.layers.Layer):
    """Adds the paper's cost of a network to its loss: the size of its maps.

    The layer returns its input. It stands near the end of a Sequential or
    Functional model, behind the DiffStride layers, and adds the cost of all of
    them. With the strides S_h^l and S_w^l of the layers l, in the order of
    `diffstride_layers(model)`, the cost is
    weight * sum over l of prod over i <= l of 1 / (S_h^i S_w^i).

    Args:
        weight: Number >= 0, in the unit of the loss.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Input shape:
        Any tensor, or structure of tensors.

    Output shape:
        The shape of the input.

    Raises:
        ValueError: If the weight is not a finite number >= 0, or in a call if
            the model has no DiffStride layers.

    Example:

    >>> model = keras.Sequential(
    ...     [DiffStride(2.0), DiffStride(2.0), ActivationCost(1.0)]
    ... )
    >>> outputs = model(keras.ops.ones((1, 32, 32, 3)))
    >>> float(model.losses[0])  # 1 / 4 + 1 / 16
    0.3125

    Reference:
        Riad et al., "Learning strides in convolutional neural networks", ICLR
        2022, arXiv:2202.01653, Eq. 4.
    """

    def __init__(self, weight: float = 1.0, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.weight = validation.finite('weight', weight, least=0)
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        model = models.model_of(self)
        layers = diffstride_layers(model)
        validation.require(
            layers,
            f'The model of layer "{self.name}" must have DiffStride layers',
            model=model.name,
        )
        product, total = 1.0, 0.0
        for layer in layers:
            product = product / ops.prod(layer.state.strides_tensor())
            total = total + product
        self.add_loss(self.weight * total)
        return inputs

    def compute_output_spec(self, inputs: Any) -> Any:
        return tree.map_structure(
            lambda x: keras.KerasTensor(x.shape, x.dtype), inputs
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), 'weight': self.weight}
