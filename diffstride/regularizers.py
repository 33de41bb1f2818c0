"""Costs of strides, so that they are learned within what a user pays.

`StrideCost` is for one layer. `ActivationCost` and `MacsCost` are of a whole
network, where a stride changes what all later layers compute. They are added to
the loss by `StrideCostModel`, or by hand: `cost.of(model)` returns a function
without arguments whose value is the cost at the present strides.
"""

import math

import gin
import keras
from keras import ops

from diffstride import spectral, validation
from diffstride.complexity import measure
from diffstride.pooling import SpectralPooling, diffstride_layers


def _register(cls):
    """Makes a class loadable by Keras and known to gin."""
    keras.saving.register_keras_serializable(package='diffstride')(cls)
    return gin.register(cls, module='regularizers')


class _Weighted:
    """What has a weight, in the loss, and can be saved."""

    def __init__(self, weight):
        validation.require(
            validation.is_finite(weight, least=0),
            '`weight` must be a finite number, at least 0',
            weight=weight,
        )
        self.weight = float(weight)

    def get_config(self):
        return {'weight': self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@_register
class StrideCost(_Weighted, keras.regularizers.Regularizer):
    """weight / (S_1 ... S_rank): the share of its input that a layer returns.

    Args:
        weight: Number >= 0, in the unit of the loss.

    Raises:
        ValueError: If the weight is not a number >= 0.

    Example:

    >>> layer = DiffStride(2.0, strides_regularizer=StrideCost(0.1))
    >>> float(layer.losses[0])  # 0.1 / (2 2)
    0.025
    """

    def __init__(self, weight=1.0):
        super().__init__(weight)

    def __call__(self, strides):
        return self.weight / ops.prod(strides)


@_register
class ActivationCost(_Weighted):
    """The paper's cost of a network: how large its maps are.

    With the strides S_h^l and S_w^l of the layers l in the order of depth it is
    weight * sum over l of prod over i <= l of 1 / (S_h^i S_w^i).

    Args:
        weight: Number >= 0, in the unit of the loss.

    Raises:
        ValueError: If the weight is not a number >= 0.

    Example:

    >>> model = keras.Sequential([DiffStride(2.0), DiffStride(2.0)])
    >>> float(ActivationCost(1.0).of(model)())  # 1 / 4 + 1 / 16
    0.3125

    Reference:
        Riad et al., "Learning strides in convolutional neural networks", ICLR
        2022, arXiv:2202.01653, Eq. 4.
    """

    def __init__(self, weight=1.0):
        super().__init__(weight)

    def of(self, model):
        """Returns the cost as a function without arguments.

        Args:
            model: A model whose DiffStride layers follow one another in the
                order in which it holds them, or a list of such layers in the
                order of depth.
        """
        is_list = isinstance(model, (list, tuple))
        layers = list(model) if is_list else diffstride_layers(model)

        def cost():
            product, total = 1.0, 0.0
            for layer in layers:
                product = product / ops.prod(layer.strides_per_axis)
                total = total + product
            return self.weight * total

        return cost


@_register
class MacsCost(_Weighted):
    """A price on the multiplications of a network beyond a budget.

    weight * max(0, log(MACs / budget)): the weight is what the loss pays for
    each factor of e = 2.7 by which the MACs for one image exceed the budget. It
    pays nothing within the budget. For a price on all MACs name a budget that
    the network cannot meet.

    The MACs are those that `complexity` counts at the present strides, exactly
    where all other layers keep the sizes of their inputs. Their gradient takes
    the output size of a pooling layer for N / S, which it is but for rounding
    and, with ramp='outside', 2 R samples more.

    The pooling layers, learned and fixed, must follow one another: what is
    called after one of them has its size. A network whose branches pool apart,
    or that enlarges its maps by something other than these layers, is counted
    wrongly.

    Args:
        budget: Number of MACs for one image, above 0.
        weight: Number >= 0, in the unit of the loss.
        input_shape: [height, width, channels] of the image.

    Raises:
        ValueError: If an argument is out of its range, or, from `of`, if a
            learned layer of the model is called more than once.

    Example:

    >>> model = keras.Sequential([
    ...     DiffStride(2.0, ramp='inside'),
    ...     keras.layers.Conv2D(8, 3, padding='same'),
    ... ])
    >>> complexity(model, (32, 32, 3)).macs
    129024
    >>> float(MacsCost(129024 / 2).of(model)())  # log 2
    0.6931
    """

    def __init__(self, budget, weight=1.0, input_shape=(32, 32, 3)):
        super().__init__(weight)
        validation.require(
            validation.is_finite(budget, above=0),
            '`budget` must be a finite number above 0',
            budget=budget,
        )
        self.budget = float(budget)
        self.input_shape = tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            'budget': self.budget,
            'input_shape': self.input_shape,
        }

    def of(self, model):
        """Returns the cost as a function without arguments."""
        macs = differentiable_macs(model, self.input_shape)
        return lambda: (
            self.weight * ops.relu(ops.log(macs()) - math.log(self.budget))
        )

    def meet_budget(self, model):
        """Multiplies all strides by one factor, so that the budget is used up.

        It is the least factor, from 1/16 to 16, with which the MACs are within
        the budget; limits of strides hold all the same. If there is none the
        strides stay as they are.

        Args:
            model: A model with DiffStride layers.

        Returns:
            The factor, or None.
        """
        macs = differentiable_macs(model, self.input_shape)
        strides = [layer.strides for layer in diffstride_layers(model)]
        before = [ops.convert_to_numpy(variable) for variable in strides]

        def is_within(factor):
            for variable, values in zip(strides, before):
                variable.assign(variable.constraint(values * factor))
            return float(macs()) <= self.budget

        most, least = 16.0, 1 / 16
        if not is_within(most):
            is_within(1.0)
            return None
        if is_within(least):
            return least
        for _ in range(40):
            middle = math.sqrt(least * most)
            if is_within(middle):
                most = middle
            else:
                least = middle
        most *= 1 + 2**-14  # Not at the very stride at which a size jumps.
        is_within(most)
        return most


def differentiable_macs(model, input_shape):
    """Returns MACs for one image as a function of the strides' present values.

    See `MacsCost` for what it counts and for its gradient.

    Args:
        model: A model with DiffStride layers; it is built if it is not yet.
        input_shape: [height, width, channels] of the image.

    Returns:
        A function without arguments that returns a float32 scalar.
    """
    rows, calls = measure(model, input_shape)
    stages, constant = [], 0
    for layer, row in rows.items():
        if isinstance(layer, SpectralPooling) and row.calls:
            validation.require(
                row.calls == 1,
                'A pooling layer must be called once in a network whose MACs '
                'have a gradient',
                layer=row.name,
                calls=row.calls,
            )
            stages.append(_Stage(layer, row.macs, *calls[layer]))
        elif stages and stages[-1].is_followed_by(calls.get(layer)):
            stages[-1].macs += row.macs or 0
        else:
            constant += row.macs or 0

    def macs():
        total, sizes, then = float(constant), None, None
        for stage in stages:
            # What lies between two pooling layers keeps its ratio of sizes.
            before = [
                _rounded(size * (after / before))
                for size, before, after in zip(
                    sizes or stage.before, then or stage.before, stage.before
                )
            ]
            sizes = [
                stage.layer.size_with_gradient(index, size)
                for index, size in enumerate(before)
            ]
            then = stage.after
            own = _macs_per_channel(before, sizes)
            own /= _macs_per_channel(stage.before, stage.after)
            total += stage.own_macs * own
            total += stage.macs * math.prod(
                size / then for size, then in zip(sizes, stage.after)
            )
        return total

    return macs


class _Stage:
    """A pooling layer and what is called after it, as they were measured."""

    def __init__(self, layer, macs, call):
        self.layer = layer
        self.own_macs = macs
        self.macs = 0
        axes = layer.spatial_axes
        self.before = [call.inputs[0][axis] for axis in axes]
        self.after = [call.outputs[0][axis] for axis in axes]

    def is_followed_by(self, calls):
        """Whether what is called so returns maps, and not numbers."""
        return bool(calls) and all(
            len(shape) == self.layer.rank + 2 for shape in calls[0].outputs
        )


def _macs_per_channel(before, after):
    """Of one matrix per axis, applied in turn."""
    shape, total = list(before), 0
    for index, size in enumerate(before):
        shape[index] = after[index]
        total = total + size * math.prod(shape)
    return total


def _rounded(size):
    return spectral.with_gradient_of(size, ops.round(size))


@keras.saving.register_keras_serializable(package='diffstride')
class StrideCostModel(keras.Model):
    """A model and a cost of its strides, which it adds to the loss.

    Args:
        model: A Keras model with DiffStride layers.
        stride_cost: `ActivationCost`, `MacsCost`, or any object whose
            `of(model)` returns a function without arguments; if it is to be
            saved, one that Keras can serialize.
        **kwargs: Of `keras.Model`.

    Example:

    >>> model = StrideCostModel(model, MacsCost(budget=20e6, weight=0.1))
    >>> model.compile('sgd', 'sparse_categorical_crossentropy')
    """

    def __init__(self, model, stride_cost, **kwargs):
        super().__init__(**kwargs)
        self.model = model
        self.stride_cost = stride_cost
        self._cost = stride_cost.of(model)

    @property
    def input_shape(self):
        """That of the model."""
        return self.model.input_shape

    def build(self, input_shape):
        if not self.model.built:
            self.model.build(input_shape)
        self.built = True

    def call(self, inputs, training=None):
        self.add_loss(self._cost())
        return self.model(inputs, training=training)

    def get_config(self):
        return {
            **super().get_config(),
            'model': keras.saving.serialize_keras_object(self.model),
            'stride_cost': keras.saving.serialize_keras_object(
                self.stride_cost
            ),
        }

    @classmethod
    def from_config(cls, config):
        inner = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ('model', 'stride_cost')
        }
        return cls(**{**config, **inner})
