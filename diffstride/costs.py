"""Costs of strides, so that they are learned within what a user pays.

`StrideCost` is for one layer. `ActivationCost` and `MacsCost` are of a whole
network, where a stride changes what all later layers compute. They are added to
the loss by `StrideCostModel`, or by hand: `cost.of(model)` returns a function
without arguments whose value is the cost at the present strides.
"""

import math

import gin
import keras
import numpy as np
from keras import ops

from diffstride import backend, spectral, validation
from diffstride.complexity import measure
from diffstride.pooling import (
    DiffStride,
    SpectralPooling,
    SpectralResampling,
    diffstride_layers,
)


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

        Raises:
            ValueError: If there is no such layer, or another one.
        """
        is_list = isinstance(model, (list, tuple))
        layers = list(model) if is_list else diffstride_layers(model)
        validation.require(
            layers and all(isinstance(x, DiffStride) for x in layers),
            '`model` must be a model with DiffStride layers, or a list of them',
            model=model,
        )

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

    The MACs are those that `complexity` counts for the present strides, whether
    or not sizes are pinned to others; exactly where all other layers keep the
    sizes of their inputs. Their gradient takes the output size of a pooling
    layer for N / S, which it is but for rounding and, with ramp='outside', 2 R
    samples more.

    The pooling layers, learned and fixed, must follow one another: what is
    called after one of them has its size. A network whose branches pool apart,
    or that enlarges its maps by a layer that is not of this package, is counted
    wrongly.

    Args:
        budget: Number of MACs for one image, above 0.
        weight: Number >= 0, in the unit of the loss.
        input_shape: [height, width, channels] of the image; None for the input
            shape of the model.

    Raises:
        ValueError: If an argument is out of its range. From `of`: if the model
            has no known input shape and none is given; if a layer of maps is
            called more than once, or has MACs that `complexity` does not know;
            if there is a SpectralResizing.

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

    def __init__(self, budget, weight=1.0, input_shape=None):
        super().__init__(weight)
        validation.require(
            validation.is_finite(budget, above=0),
            '`budget` must be a finite number above 0',
            budget=budget,
        )
        self.budget = float(budget)
        validation.require(
            input_shape is None
            or (
                isinstance(input_shape, (list, tuple))
                and len(input_shape) > 1
                and all(validation.is_integer(x, least=1) for x in input_shape)
            ),
            '`input_shape` must be None or [height, width, channels]',
            input_shape=input_shape,
        )
        self.input_shape = input_shape and tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            'budget': self.budget,
            'input_shape': self.input_shape,
        }

    def of(self, model):
        """Returns the cost as a function without arguments."""
        macs = self._macs(model)
        return lambda: (
            self.weight * ops.relu(ops.log(macs()) - math.log(self.budget))
        )

    def _macs(self, model):
        shape = self.input_shape
        if shape is None:
            shape = (getattr(model, 'input_shape', None) or (None,))[1:]
            validation.require(
                shape and None not in shape,
                '`input_shape` must be given where the model has none that is '
                'known',
                input_shape=self.input_shape,
            )
        return DifferentiableMacs(model, shape)

    def meet_budget(self, model):
        """Sets learned strides to use up the budget, near what was learned.

        All are scaled by one factor to the least within the budget. Then single
        maps grow by a step, those after them keeping their sizes, as long as
        one can: each time the one that grows by the least factor. The strides
        are the least that give these sizes. Limits of strides hold all the
        same. If no strides are within the budget they stay as they are.

        Args:
            model: A model with DiffStride layers.

        Returns:
            Whether the MACs are now within the budget.
        """
        macs = self._macs(model)
        layers = [x for x in diffstride_layers(model) if x.trainable]
        learned = [ops.convert_to_numpy(layer.strides) for layer in layers]

        def is_within():
            return float(ops.convert_to_numpy(macs())) <= self.budget

        def scale(factor):
            for layer, strides in zip(layers, learned):
                _assign(layer, factor * strides)
            return is_within()

        least, most = 2.0**-12, 2.0**12  # Beyond any map; limits hold.
        if not scale(most):
            scale(1.0)
            return False
        for _ in range(36):
            middle = math.sqrt(least * most)
            if scale(middle):
                most = middle
            else:
                least = middle
        scale(most)
        sizes = macs.output_sizes()
        is_growing = True
        while is_growing:
            is_growing = False
            for larger in macs.larger_sizes(sizes):
                macs.assign_sizes(larger)
                if is_within():
                    sizes, is_growing = larger, True
                    break
        macs.assign_sizes(sizes)
        return is_within()


def _assign(layer, strides):
    strides = np.array(strides, 'float32')
    layer.strides.assign(layer.strides.constraint(strides))


class DifferentiableMacs:
    """MACs for one image, as a function of the strides' present values.

    Called without arguments it returns a float32 scalar. See `MacsCost` for
    what it counts and for its gradient.

    Args:
        model: A model with DiffStride layers; it is built if it is not yet.
        input_shape: [height, width, channels] of the image.

    Raises:
        ValueError: As `MacsCost.of`.
    """

    def __init__(self, model, input_shape):
        rows, calls = measure(model, input_shape)
        self._stages, self._constant = [], 0
        for layer, row in rows.items():
            if not row.calls:
                continue
            is_pooling = isinstance(layer, SpectralPooling)
            validation.require(
                is_pooling or not isinstance(layer, SpectralResampling),
                'A network that resizes its maps has no MACs with a gradient',
                layer=row.name,
            )
            # What follows the last map, such as a classifier, has no size.
            is_on_maps = all(
                self._stages and len(shape) == self._stages[0].layer.rank + 2
                for shape in calls[layer][0].outputs
            )
            validation.require(
                row.macs is not None
                and (
                    row.calls == 1
                    or not (is_pooling or (is_on_maps and row.macs))
                ),
                'A layer of maps must be called once and have known MACs for '
                'these to have a gradient',
                layer=row.name,
                calls=row.calls,
                macs=row.macs,
            )
            if is_pooling:
                self._stages.append(_Stage(layer, *calls[layer]))
            elif is_on_maps:
                self._stages[-1].macs += row.macs
            else:
                self._constant += row.macs

    def __call__(self):
        total = _float(self._constant)
        for stage, before, sizes in self._walk():
            total += stage.pooling_macs(before, sizes)
            total += stage.macs * math.prod(
                size / then for size, then in zip(sizes, stage.after)
            )
        return total

    def _walk(self, visit=lambda stage, before: None):
        """Yields each stage and the sizes before and after it, as tensors.

        `visit` is called before the sizes after it are computed.
        """
        sizes, then = None, None
        for stage in self._stages:
            # What lies between two pooling layers keeps its ratio of sizes.
            before = [
                _rounded(_float(size) * (after / before))
                for size, before, after in zip(
                    sizes or stage.before, then or stage.before, stage.before
                )
            ]
            visit(stage, before)
            sizes = [
                stage.layer.size_with_gradient(index, size)
                for index, size in enumerate(before)
            ]
            then = stage.after
            yield stage, before, sizes

    def output_sizes(self):
        """The sizes after each pooling layer, a list of tuples of integers."""
        return [_integers(sizes) for _, _, sizes in self._walk()]

    def assign_sizes(self, sizes):
        """Gives learned strides the least values with at most these sizes."""
        targets = iter(sizes)

        def assign(stage, before):
            target = next(targets)
            if stage.is_learned:
                strides = stage.layer.least_strides(_integers(before), target)
                _assign(stage.layer, strides)

        for _ in self._walk(assign):
            pass

    def larger_sizes(self, sizes):
        """Sizes of which one map is larger by a step, least growth first."""
        self.assign_sizes(sizes)
        found = []
        for index, (stage, before, after) in enumerate(self._walk()):
            if stage.is_learned:
                for larger in stage.layer.larger_sizes(_integers(before)):
                    growth = math.prod(larger) / math.prod(_integers(after))
                    others = sizes[:index], sizes[index + 1 :]
                    found.append((growth, [*others[0], larger, *others[1]]))
        return [sizes for _, sizes in sorted(found)]


class _Stage:
    """A pooling layer and what is called after it, as they were measured."""

    def __init__(self, layer, call):
        axes = layer.spatial_axes
        self.layer = layer
        self.is_learned = isinstance(layer, DiffStride) and layer.trainable
        self.macs = 0  # Of what is called after it.
        self.before = [call.inputs[0][axis] for axis in axes]
        self.after = [call.outputs[0][axis] for axis in axes]
        self.channels = sum(
            math.prod(shape) // math.prod(self.before) for shape in call.inputs
        )

    def pooling_macs(self, before, after):
        """Of one matrix per axis, applied in turn."""
        shape, total = list(before), 0.0
        for index, size in enumerate(before):
            shape[index] = after[index]
            macs = size * math.prod(shape)
            if not self.layer.weights:  # It leaves an axis that keeps its size.
                macs = macs * _float(size != after[index])
            total = total + self.channels * macs
        return total


def _float(value):
    return ops.cast(value, 'float32')


def _integers(sizes):
    return tuple(int(ops.convert_to_numpy(size)) for size in sizes)


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

    Raises:
        ValueError: If the model has no DiffStride layers, or if the cost is
            none.

    Example:

    >>> model = StrideCostModel(model, MacsCost(budget=20e6, weight=0.1))
    >>> model.compile('sgd', 'sparse_categorical_crossentropy')
    """

    def __init__(self, model, stride_cost, **kwargs):
        super().__init__(**kwargs)
        validation.require(
            hasattr(stride_cost, 'of') and not isinstance(stride_cost, type),
            '`stride_cost` must be a cost of a model, such as MacsCost(25e6)',
            stride_cost=stride_cost,
        )
        validation.require(
            isinstance(model, keras.Model),
            '`model` must be a Keras model',
            model=model,
        )
        validation.require(
            diffstride_layers(model),
            '`model` must have DiffStride layers',
            model=model.name,
        )
        self.model = model
        self.stride_cost = stride_cost
        self._cost = None

    @property
    def input_shape(self):
        """That of the model."""
        return self.model.input_shape

    def build(self, input_shape):
        if not self.model.built:
            self.model.build(input_shape)
        self.built = True

    def make_train_function(self, force=False):
        self._make_cost()  # JAX takes the values away before it traces.
        return super().make_train_function(force)

    def _make_cost(self):
        if (
            self._cost is None
            and self.model.built
            and backend.have_values(self.model.variables)
        ):
            with backend.eager_scope():
                self._cost = self.stride_cost.of(self.model)

    def call(self, inputs, training=None):
        self._make_cost()
        if self._cost is not None:
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
