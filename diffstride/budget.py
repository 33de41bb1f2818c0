"""The MACs of a model as a function of its strides, and sizes within a budget.

`MacsOfStrides` measures a model a few times and then knows its MACs for any
strides, on numbers alone. The MACs of a layer are sums of products of sizes,
and a size is linear in that of the map that the last pooling layer before it
returned. Let r_k be the sizes that pooling layers return, divided by those at
the start; then the total is sum_j c_j prod_k (1 + B_jk (r_k - 1)). The slopes B
are measured: one pooling layer after the other returns a map of twice the size
along one axis, and the products that follow grow or stay.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from diffstride import counting, models, validation
from diffstride.pooling import (
    DiffStride,
    SpectralPooling,
    diffstride_layers,
    spatial_axes,
)

# The relative distance that a stride keeps from one at which a size changes.
_MARGIN = 2.0**-14
# The size of the smallest map that a DiffStride layer returns, without a ramp.
_LEAST_SIZE = 2.0


def set_budget(
    model: keras.Model,
    macs: float | None = None,
    share: float | None = None,
    input_shape: Any = None,
) -> int:
    """Sets the strides of a trained model so that it fits a budget, and holds.

    Nothing is learned. The strides move as little as possible to sizes within
    the budget that use it up: no map can grow by a step without exceeding it.
    The weights were trained for other sizes, so accuracy suffers. Part of it
    comes back by `recalibrate`, and more by further training.

    Args:
        model: A model with DiffStride layers, whose trainable ones are set,
            held or not.
        macs: The budget, in multiply-accumulates for one image as `complexity`
            counts them. Either `macs` or `share` must be given.
        share: The budget as a share of the MACs at the initial strides.
        input_shape: The shape of the input, see `complexity`; None for the
            input shape of the model.

    Returns:
        The MACs for one image now.

    Raises:
        ValueError: If an argument is out of its range; if the budget is
            impossible, with the least possible one; if the model has no
            DiffStride layers to set; or if its MACs cannot be counted.

    Example:

    >>> set_budget(model, macs=25e6)
    24883200
    >>> recalibrate(model, dataset.take(20))
    """
    check_budget(macs, share)
    layers = [x for x in diffstride_layers(model) if x.trainable and x.cropping]
    function = MacsOfStrides(model, input_shape, layers)
    strides = function.fit(function.strides(), function.budget(macs, share))
    for layer in function.layers:
        layer.release()
    function.assign(strides)
    for layer in function.layers:
        layer.hold()
    return function.count(strides)


def check_budget(macs: float | None, share: float | None) -> None:
    """Raises a ValueError unless exactly one is given, and above 0."""
    validation.require(
        (macs is None) != (share is None),
        'Either `macs` or `share` must be given',
        macs=macs,
        share=share,
    )
    name, value = ('macs', macs) if share is None else ('share', share)
    validation.finite(name, value, above=0)


def known_input_shape(model: keras.layers.Layer) -> Any:
    """Returns the input shape without the batch axis, None if not known."""
    if getattr(model, 'input_shape', None) is None:  # Subclasses have none.
        return None
    is_sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs[0] if is_sequential else model.input
    shape = tree.map_structure(lambda x: tuple(x.shape[1:]), inputs)
    return None if None in tree.flatten(shape) else shape


class MacsOfStrides:
    """The MACs for one image as a function of the strides of some layers.

    Strides are float64 arrays [n]: those of all layers, one after the other,
    with one number per axis or per layer with `shared_stride`.

    Between integers a size counts as N / S, or N / S + 2 R with the ramp
    'outside', and at most N. At integer sizes the MACs are those of
    `complexity`, unless layers without learned strides round sizes, as a
    strided convolution of a map of odd size does. Then they are approximate;
    `count` and `fit` are exact in each case.

    Args:
        model: A model with DiffStride layers.
        input_shape: The shape of its input, see `complexity`; None for the
            input shape of the model.
        layers: The layers whose strides vary. All others stay as they are.

    Raises:
        ValueError: If there are no layers, if the input shape is not known, if
            the MACs of a layer are unknown, or if the layers behind one of the
            pooling layers do not take maps of any size.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        input_shape: Any,
        layers: Sequence[DiffStride],
    ):
        validation.require(
            layers,
            '`model` must have trainable DiffStride layers with cropping',
            model=model.name,
        )
        if input_shape is None:
            input_shape = known_input_shape(model)
        validation.require(
            input_shape is not None,
            '`input_shape` must be given for a model that does not know its '
            'own; one that is not built yet knows it after `model.build`',
            input_shape=None,
        )
        self._measure = functools.partial(counting.measure, model, input_shape)
        rows, calls = self._measure()
        for row in rows.values():
            validation.require(
                row.macs is not None,
                f'The MACs of layer "{row.name}" must be known for a budget',
                macs=None,
            )
        self.layers = [layer for layer in calls if layer in layers]
        counts = [x.strides.shape[0] for x in self.layers]
        starts = list(itertools.accumulate(counts, initial=0))
        self._parts = list(itertools.pairwise(starts))
        lower = [x.lower_limit_stride or 1.0 for x in self.layers]
        upper = [x.upper_limit_stride or 1e9 for x in self.layers]
        self._lower = np.repeat(lower, counts)
        self._upper = np.repeat(upper, counts)
        # Sizes belong to the axes of all pooling layers. `_owner` is the index
        # of an axis's stride among those that vary, followed by constants.
        self._poolings = [
            x for x in calls if isinstance(x, SpectralPooling) and x.cropping
        ]
        self._axes = [(x, i) for x in self._poolings for i in range(x.rank)]
        self._owner: list[int] = []
        self._constants: list[float] = []
        for layer, index in self._axes:
            if layer in self.layers:
                start, stop = self._parts[self.layers.index(layer)]
                self._owner.append(start + index % (stop - start))
            else:
                self._owner.append(starts[-1] + len(self._constants))
                self._constants.append(layer.stride_values[index])
        self._axes_of = [
            [axis for axis, x in enumerate(self._owner) if x == owner]
            for owner in range(starts[-1])
        ]
        self._extra = [
            2 * x.smoothness_factor
            if getattr(x, 'ramp', None) == 'outside'
            else 0.0
            for x, _ in self._axes
        ]
        self._before, self._after = self._sizes_of(calls)
        self._measure_slopes(rows, calls)

    def _sizes_of(self, calls):
        """Returns the sizes of all pooled axes, before and after."""
        sizes = [], []
        for layer in self._poolings:
            for side, found in enumerate(sizes):
                shapes = {
                    tuple(shape[axis] for axis in spatial_axes(layer))
                    for call in calls[layer]
                    for shape in call[side]
                }
                validation.require(
                    len(shapes) == 1,
                    f'Layer "{layer.name}" must pool maps of one size for a '
                    'budget',
                    sizes=shapes,
                )
                found.extend(shapes.pop())
        return sizes

    def _measure_slopes(self, rows, calls):
        def products(calls, skip_identity=False):
            found = (
                counting.products(layer, calls.get(layer, []), skip_identity)
                for layer in rows
            )
            return np.array([*itertools.chain(*found)], float)

        first = products(calls, skip_identity=True)
        slopes, upstream = [], []
        for axis, (layer, _) in enumerate(self._axes):
            sizes = list(self._after)
            sizes[axis] *= 2
            try:
                _, calls = self._measure(self._returning(sizes))
                before, _ = self._sizes_of(calls)
            except Exception as error:
                raise ValueError(
                    f'The layers behind "{layer.name}" must take maps of any '
                    'size for a budget, and branches that meet must share '
                    f'their pooling layer. {error}'
                ) from error
            slopes.append(products(calls)[first > 0] / first[first > 0] - 1)
            upstream.append(np.divide(before, self._before) - 1)
            validation.require(
                before[: axis + 1] == self._before[: axis + 1],
                f'Layer "{layer.name}" must not pool its own output again',
                sizes=before,
            )
        # Products with equal slopes are added up.
        self._slopes, group = np.unique(
            np.transpose(slopes).round(12), axis=0, return_inverse=True
        )
        self._coefficients = np.bincount(group.ravel(), first[first > 0])
        self._upstream = np.transpose(upstream)
        self._parents = [
            [(other, float(row[other])) for other in np.flatnonzero(row)]
            for row in self._upstream
        ]

    def _returning(self, sizes):
        """Returns the `output_shapes` with which `measure` sets sizes."""
        shapes = {}
        for layer in self._poolings:
            own = [size for size, x in zip(sizes, self._axes) if x[0] is layer]
            shapes[layer] = functools.partial(_with_sizes, layer, own)
        return shapes

    def strides(self) -> np.ndarray:
        """Returns the present strides of the layers."""
        return np.array(
            [
                stride
                for layer in self.layers
                for stride in layer.stride_values[: layer.strides.shape[0]]
            ]
        )

    def assign(self, strides: np.ndarray) -> None:
        """Sets the strides of the layers."""
        for layer, (start, stop) in zip(self.layers, self._parts):
            layer.strides.assign(np.asarray(strides[start:stop], 'float32'))

    def count(self, strides: np.ndarray) -> int:
        """Returns the exact MACs, by a call of the model."""
        shapes = {}
        for layer, (start, stop) in zip(self.layers, self._parts):
            own = list(strides[start:stop]) * (layer.rank // (stop - start))
            shapes[layer] = functools.partial(_with_strides, layer, own)
        rows, _ = self._measure(shapes)
        return sum(row.macs for row in rows.values())

    def budget(self, macs: float | None, share: float | None) -> float:
        """Returns the budget in MACs, from MACs or a share of the initial ones.

        Raises:
            ValueError: If no strides meet the budget.
        """
        if macs is None:
            initial = [
                stride
                for layer in self.layers
                for stride in layer.initial_strides[: layer.strides.shape[0]]
            ]
            share = 1.0 if share is None else share
            macs = round(share * self.count(np.array(initial)), 6)
        least = math.ceil(self._total(self._integer_sizes(self._upper)[1]))
        validation.require(
            macs >= least,
            f'The budget must be at least {least:,} MACs for one image, those '
            'of the largest strides',
            macs=macs,
        )
        return float(macs)

    def __call__(self, strides: np.ndarray) -> float:
        """Returns the MACs with smooth sizes."""
        return self._total(self._smooth_sizes(strides)[1])

    def gradient(self, strides: np.ndarray) -> np.ndarray:
        """Returns the gradient of the MACs in the strides, below 0.

        A size that is limited by N counts as one that is not limited, so that
        small strides have a gradient. A stride beyond the one that gives the
        least size has none.
        """
        before, after = self._smooth_sizes(strides)
        ratios = np.divide(after, self._after)
        axis_strides = np.concatenate([strides, self._constants])[self._owner]
        # It holds the derivatives of log sizes with respect to log strides.
        jacobian = np.zeros((len(after), len(after)))
        for axis, slopes in enumerate(self._upstream):
            row = _elasticity(slopes, ratios) @ jacobian
            row[axis] -= 1
            band = before[axis] / axis_strides[axis]
            if band >= _LEAST_SIZE:
                jacobian[axis] = row * band / (band + self._extra[axis])
        products = self._coefficients * _products(self._slopes, ratios)
        total = products @ _elasticity(self._slopes, ratios) @ jacobian
        return np.bincount(self._owner, total)[: len(strides)] / strides

    def _smooth_sizes(self, strides):
        def size(axis, before, stride):
            band = max(before / stride, _LEAST_SIZE)
            return min(before, band + self._extra[axis])

        return self._sizes(strides, size)

    def _integer_sizes(self, strides):
        def size(axis, before, stride):
            layer, index = self._axes[axis]
            return layer.output_size(round(before), index, stride)

        return self._sizes(strides, size)

    def _sizes(self, strides, size):
        """Returns the sizes before and after, by size(axis, before, stride)."""
        strides = [*map(float, strides), *self._constants]
        befores, afters, ratios = [], [], []
        for axis, before in enumerate(self._before):
            for other, slope in self._parents[axis]:
                before *= 1 + slope * (ratios[other] - 1)
            before = max(before, 1.0)
            after = size(axis, before, strides[self._owner[axis]])
            befores.append(before)
            afters.append(after)
            ratios.append(after / self._after[axis])
        return befores, afters

    def _total(self, after):
        ratios = np.divide(after, self._after)
        return float(self._coefficients @ _products(self._slopes, ratios))

    def project(self, strides: np.ndarray, budget: float) -> np.ndarray:
        """Moves strides to where the smooth MACs are the budget.

        Their logarithms move to the nearest such point within their limits,
        along the gradient that the MACs have there.

        Args:
            strides: The strides, [n].
            budget: The MACs for one image.

        Returns:
            The new strides, all at a limit if none have the budget.
        """
        strides = nearest = np.asarray(strides, float)
        for _ in range(6):
            before = nearest
            line = self._line(strides, nearest)
            nearest = _crossing(line, self, budget)
            if np.allclose(nearest, before, rtol=0.01):
                break
        return nearest

    def _line(self, strides, nearest):
        """Returns strides as a function of a step, along the gradient there.

        The gradient is that in the logarithms of the strides. The gradient in
        the strides themselves would move small ones most. If it is 0, since
        all maps have their least size, all strides move alike.
        """
        direction = -nearest * self.gradient(nearest)
        if not np.any(direction):
            direction = np.ones(len(direction))
        direction = direction / np.max(direction)

        def line(step):
            moved = strides * np.exp(np.clip(step * direction, -50, 50))
            return np.clip(moved, self._lower, self._upper)

        return line

    def tangent(self, strides: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Returns the part of a direction that keeps the MACs.

        Args:
            strides: The strides, [n].
            direction: A direction of their logarithms, [n]. What would change
                the MACs to first order, exceed a limit, or lead beyond the
                least size of a map is taken out.

        Returns:
            The direction that is left, [n].
        """
        upper = self._largest_strides(strides)
        normal = strides * self.gradient(strides)
        tangent, free = direction, np.ones(len(strides), bool)
        for _ in strides:  # A stride that is stopped may stop another one.
            tangent = np.where(free, direction, 0.0)
            normal = np.where(free, normal, 0.0)
            tangent -= (
                normal * (normal @ tangent) / max(normal @ normal, 1e-300)
            )
            stopped = (strides <= self._lower) & (tangent < 0)
            stopped |= (strides >= upper) & (tangent > 0)
            if not np.any(stopped):
                break
            free &= ~stopped
        return tangent

    def along(self, strides: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Moves the logarithms of strides by the `tangent` part of a step."""
        moved = strides * np.exp(self.tangent(strides, step))
        return np.minimum(
            moved, np.maximum(strides, self._largest_strides(strides))
        )

    def _largest_strides(self, strides):
        """Returns the strides beyond which sizes stay as they are."""
        before, _ = self._smooth_sizes(strides)
        largest = np.ones(len(strides) + len(self._constants))
        np.maximum.at(largest, self._owner, np.divide(before, _LEAST_SIZE))
        return np.minimum(self._upper, largest[: len(strides)])

    def fit(self, strides: np.ndarray, budget: float) -> np.ndarray:
        """Returns strides near the given ones whose sizes use up a budget.

        Their logarithms move to the nearest strides whose smooth MACs are the
        budget. Sizes there are rounded up, so that single maps then shrink by a
        step until the exact MACs are within it: each time the one that moves
        the logarithms of sizes least from those wanted, in squared distance,
        for the logarithm of the MACs that it saves. Then single maps grow by a
        step, as long as the budget allows it and none doubles: at first those
        whose stride then is nearest to, or above, the given one.

        Raises:
            ValueError: If no sizes within the budget are found.
        """
        target, best_macs, best = budget, -1, None
        for _ in range(8):
            found = self._fit(strides, target)
            macs = self.count(found)
            if best_macs < macs <= budget:
                best_macs, best = macs, found
            predicted = self._total(self._integer_sizes(found)[1])
            if abs(macs - predicted) < 0.5:
                break
            # Other layers that shorten maps made the prediction inexact.
            corrected = budget * predicted / macs
            if macs > budget:
                corrected = min(corrected, 0.999 * target)
            target = corrected
        if best is None:
            raise ValueError(
                'The budget must allow sizes near it. '
                f'Received: budget={budget!r}'
            )
        return best

    def _fit(self, strides, target):
        strides = np.asarray(strides, float)

        def total(found):
            return self._total(self._integer_sizes(found)[1])

        def is_within(found):
            return round(total(found)) <= target

        def grow(found):
            while True:
                sizes = self._integer_sizes(found)[1]
                for _, larger in sorted(self._larger_sizes(sizes, strides)):
                    grown = self._strides_for(larger, strides)
                    if is_within(grown) and total(grown) > total(found):
                        found = grown
                        break
                else:
                    return self._strides_for(sizes, strides)

        if is_within(strides):
            grown = grow(strides)
            # Sizes that are far below the budget had better grow together.
            if total(grown) == total(strides):
                return grown
        return grow(self._shrink(self.project(strides, target), is_within))

    def _shrink(self, strides, is_within):
        wanted = self._smooth_sizes(strides)[1]
        found, sizes = strides, self._integer_sizes(strides)[1]

        def distance(sizes):
            return np.sum(np.log(np.divide(sizes, wanted)) ** 2)

        def price(smaller):
            """Returns what is lost in nearness for what is saved in MACs."""
            saved = math.log(self._total(sizes) / self._total(smaller))
            lost = distance(smaller) - distance(sizes)
            return lost / saved if saved > 0 else math.inf

        while not is_within(found):
            smaller = [*self._smaller_sizes(sizes, strides)]
            if not smaller:
                break  # All maps have their least sizes.
            found = self._strides_for(min(smaller, key=price), strides)
            sizes = self._integer_sizes(found)[1]
        return found

    def _least_stride(self, axis, before, size):
        """Returns the least stride at which an axis has at most a size."""
        layer, index = self._axes[axis]
        low, high = 1.0, max(2.0, float(before))
        before = round(before)
        if layer.output_size(before, index, low) <= size:
            return low
        for _ in range(40):
            middle = (low + high) / 2
            if layer.output_size(before, index, middle) <= size:
                high = middle
            else:
                low = middle
        return high

    def _bounds(self, axes, before, sizes):
        """Returns between which strides axes have at most their sizes."""
        return (
            max(self._least_stride(i, before[i], sizes[i]) for i in axes),
            min(self._least_stride(i, before[i], sizes[i] - 1) for i in axes),
        )

    def _strides_for(self, sizes, preferred):
        """Returns the strides nearest to the preferred ones with given sizes.

        Where limits of strides or a shared stride prevent a size, the result is
        the nearest stride with a smaller size, or the limit.
        """
        strides = np.array(preferred)
        for owner, axes in enumerate(self._axes_of):
            before = self._integer_sizes(strides)[0]
            low, high = self._bounds(axes, before, sizes)
            nearest = min(preferred[owner], high * (1 - _MARGIN))
            if low > 1:
                nearest = max(nearest, low * (1 + _MARGIN))
            strides[owner] = np.clip(
                nearest, self._lower[owner], self._upper[owner]
            )
        return strides

    def _smaller_sizes(self, sizes, preferred):
        """Yields sizes with one step down."""
        strides = self._strides_for(sizes, preferred)
        before, sizes = self._integer_sizes(strides)
        for owner, axes in enumerate(self._axes_of):
            _, high = self._bounds(axes, before, sizes)
            raised = min(high * (1 + _MARGIN), self._upper[owner])
            smaller = self._with_stride(strides, owner, raised)
            if raised > strides[owner] and smaller != sizes:
                yield smaller

    def _larger_sizes(self, sizes, preferred):
        """Yields (distance to the preferred stride, sizes with one step up).

        No map grows to twice the size that its preferred stride asks for.
        """
        strides = self._strides_for(sizes, preferred)
        before, sizes = self._integer_sizes(strides)
        for owner, axes in enumerate(self._axes_of):
            low, _ = self._bounds(axes, before, sizes)
            lowered = max(low * (1 - _MARGIN), self._lower[owner])
            larger = self._with_stride(strides, owner, lowered)
            is_doubled = all(
                larger[i] >= 2 * (before[i] / preferred[owner] + self._extra[i])
                for i in axes
            )
            if larger != sizes and not is_doubled:
                yield math.log(preferred[owner] / lowered), larger

    def _with_stride(self, strides, owner, stride):
        """Returns the sizes after the axes of one stride alone have changed."""
        changed = np.array(strides)
        changed[owner] = stride
        before, after = (self._integer_sizes(x)[1] for x in (strides, changed))
        for axis in self._axes_of[owner]:
            before[axis] = after[axis]
        return before


def _with_sizes(layer, sizes, shape):
    """Returns a shape with other sizes of the layer's spatial axes."""
    shape = list(shape)
    for axis, size in zip(spatial_axes(layer), sizes):
        shape[axis] = size
    return tuple(shape)


def _with_strides(layer, strides, shape):
    """Returns the shape of a layer's output at given strides."""
    sizes = [
        layer.output_size(shape[axis], index, stride)
        for index, (axis, stride) in enumerate(
            zip(spatial_axes(layer), strides)
        )
    ]
    return _with_sizes(layer, sizes, shape)


def _factors(slopes, ratios):
    """Returns 1 + B (r - 1), above 0: [..., axes]."""
    return np.maximum(1 + slopes * (ratios - 1), 1e-9)


def _products(slopes, ratios):
    """Returns prod_k (1 + B_k (r_k - 1)): [...]."""
    return _factors(slopes, ratios).prod(axis=-1)


def _elasticity(slopes, ratios):
    """Returns the derivatives of log 1 + B (r - 1) in log r: [..., axes]."""
    return slopes * ratios / _factors(slopes, ratios)


def _crossing(line, macs, budget):
    """Returns the strides on a line with MACs of a budget, or just below."""
    return line(_root(lambda step: math.log(macs(line(step)) / budget)))


def _root(excess: Callable[[float], float]) -> float:
    """Returns a step at which a falling function is 0 or just below.

    A function that does not cross 0 yields a step far out.
    """
    # It holds the last step and value on each side; the key True is above 0.
    ends: dict[bool, tuple[float, float]] = {}
    step, value = 0.0, excess(0.0)
    for exponent in range(-10, 40):
        ends[value > 0] = step, value
        if len(ends) == 2:
            break
        step = 2.0**exponent if value > 0 else -(2.0**exponent)
        value = excess(step)
    else:
        return step
    # The Illinois variant of the method of false position.
    for _ in range(100):
        (low, above), (high, below) = ends[True], ends[False]
        if high - low < 1e-9 * max(abs(high), 1e-3) or abs(value) < 1e-9:
            break
        step = (low * below - high * above) / (below - above)
        value = excess(step)
        other = ends[value <= 0]
        ends[value <= 0] = other[0], other[1] / 2
        ends[value > 0] = step, value
    return step if abs(value) < 1e-9 else ends[False][0]


def recalibrate(model: keras.Model, batches: Iterable) -> None:
    """Computes new statistics of all batch normalization layers of a model.

    After its sizes have changed, a network computes with means and variances of
    other maps. This calls the model on some batches with the batch statistics,
    and replaces the moving statistics by their average over the batches,
    weighted by batch sizes. All other layers run as in inference, and no other
    weight changes.

    Args:
        model: A built model.
        batches: An iterable of batches as `fit` takes them: x, or tuples that
            begin with it. A few thousand images are enough.

    Raises:
        ValueError: If there are no batches.

    Example:

    >>> replaced = replace_strides(model)
    >>> recalibrate(replaced, dataset.take(20))
    """
    norms = [
        layer
        for layer in models.flatten(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [(layer, layer.momentum, layer.trainable) for layer in norms]

    def call_in_training(call, *args, **kwargs):
        return call(*args, **{**kwargs, 'training': True})

    seen = 0
    with contextlib.ExitStack() as stack:
        for layer in norms:
            layer.trainable = True  # Otherwise it ignores `training`.
            stack.enter_context(models.intercepted(layer, call_in_training))
        try:
            for batch in batches:
                x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
                count = len(tree.flatten(x)[0])
                for layer in norms:
                    layer.momentum = seen / (seen + count)
                model(x, training=False)
                seen += count
        finally:
            for layer, momentum, trainable in momenta:
                layer.momentum, layer.trainable = momentum, trainable
    validation.require(seen, '`batches` must have at least one batch', seen=0)
