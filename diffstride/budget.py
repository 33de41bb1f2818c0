"""Sizes within a budget of multiply-accumulates, without learning."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from diffstride import models, validation
from diffstride.macs import MacsOfStrides
from diffstride.pooling import diffstride_layers

# The relative distance that a stride keeps from one at which a size changes.
_MARGIN = 2.0**-14


def set_budget(
    model: keras.Model,
    macs: float | None = None,
    share: float | None = None,
    input_shape: Any = None,
) -> int:
    """Sets and holds the strides of a trained model so that it fits a budget.

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
    strides = strides_within(
        function, function.strides(), function.budget(macs, share)
    )
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


def strides_within(
    function: MacsOfStrides, strides: np.ndarray, budget: float
) -> np.ndarray:
    """Returns strides near the given ones whose sizes use up a budget.

    1. The logarithms of the strides move to the nearest point at which the
       smooth MACs are the budget.
    2. Single maps shrink by a step until the exact MACs are within the budget,
       because sizes are rounded up. The cheapest map comes first: the one with
       the least squared change of log sizes for the log MACs that it saves.
    3. Single maps grow by a step while the budget allows it and none doubles,
       at first those whose stride then is nearest to, or above, the given one.

    Args:
        function: The MACs of the model.
        strides: The strides, [n].
        budget: The MACs for one image.

    Returns:
        The new strides, [n].

    Raises:
        ValueError: If no sizes within the budget are found.
    """
    target, best_macs, best = budget, -1, None
    for _ in range(8):
        found = _fit(function, strides, target)
        macs = function.count(found)
        if best_macs < macs <= budget:
            best_macs, best = macs, found
        predicted = function.integer_macs(found)
        if macs == predicted:
            break
        # Other layers that shorten maps, or FFTs, made it inexact.
        corrected = budget * predicted / macs
        if macs > budget:
            corrected = min(corrected, 0.999 * target)
        target = corrected
    if best is None:
        raise ValueError(
            f'The budget must allow sizes near it. Received: budget={budget!r}'
        )
    return best


def _fit(function, strides, target):
    near, found = SizesNear(function, strides), strides
    is_within = function.integer_macs(strides) <= target
    # Sizes that are far below the budget had better grow together.
    if not is_within or _grown(near, strides, target) is not None:
        projected = function.project(near.preferred, target)
        found = _shrink(SizesNear(function, projected), target)
    while (larger := _grown(near, found, target)) is not None:
        found = larger
    return near.strides_for(function.integer_sizes(found)[1])


def _grown(near, strides, target):
    """Returns strides after a map has grown within the budget, or None."""
    function = near.function
    sizes = function.integer_sizes(strides)[1]
    macs = function.integer_macs(strides)
    for _, larger in sorted(near.larger(sizes)):
        grown = near.strides_for(larger)
        if macs < function.integer_macs(grown) <= target:
            return grown
    return None


def _shrink(near, target):
    """Returns strides after single maps have shrunk to meet the budget."""
    function, found = near.function, near.preferred
    wanted = function.smooth_sizes(found)[1]
    sizes = function.integer_sizes(found)[1]

    def distance(sizes):
        return np.sum(np.log(np.divide(sizes, wanted)) ** 2)

    def price(smaller):
        """Returns what is lost in nearness for what is saved in MACs."""
        saved = math.log(function.total(sizes) / function.total(smaller))
        lost = distance(smaller) - distance(sizes)
        return lost / saved if saved > 0 else math.inf

    while function.integer_macs(found) > target:
        smaller = [*near.smaller(sizes)]
        if not smaller:
            break  # All maps have their least sizes.
        found = near.strides_for(min(smaller, key=price))
        sizes = function.integer_sizes(found)[1]
    return found


class SizesNear:
    """Integer sizes near those of preferred strides, a step up or down.

    Sizes are those of all axes of the function after pooling.

    Args:
        function: The MACs of the model.
        preferred: The strides that others shall be near to, [n].
    """

    def __init__(self, function: MacsOfStrides, preferred: np.ndarray):
        self.function = function
        self.preferred = np.asarray(preferred, float)

    def _least_stride(self, axis, before, size):
        """Returns the least stride at which an axis has at most a size."""
        layer, index = self.function.axes[axis]
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

    def strides_for(self, sizes: Sequence[int]) -> np.ndarray:
        """Returns the strides nearest to the preferred ones with given sizes.

        Where limits of strides or a shared stride prevent a size, the result is
        the nearest stride with a smaller size, or the limit.
        """
        strides = np.array(self.preferred)
        for owner, axes in enumerate(self.function.axes_of_stride):
            before = self.function.integer_sizes(strides)[0]
            low, high = self._bounds(axes, before, sizes)
            nearest = min(self.preferred[owner], high * (1 - _MARGIN))
            if low > 1:
                nearest = max(nearest, low * (1 + _MARGIN))
            strides[owner] = np.clip(
                nearest, self.function.lower[owner], self.function.upper[owner]
            )
        return strides

    def smaller(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Yields sizes with one step down."""
        strides = self.strides_for(sizes)
        before, sizes = self.function.integer_sizes(strides)
        for owner, axes in enumerate(self.function.axes_of_stride):
            _, high = self._bounds(axes, before, sizes)
            raised = min(high * (1 + _MARGIN), self.function.upper[owner])
            smaller = self._with_stride(strides, owner, raised)
            if raised > strides[owner] and smaller != sizes:
                yield smaller

    def larger(self, sizes: Sequence[int]) -> Iterator[tuple]:
        """Yields (distance to the preferred stride, sizes with one step up).

        No map grows to twice the size that its preferred stride asks for.
        """
        strides = self.strides_for(sizes)
        before, sizes = self.function.integer_sizes(strides)
        for owner, axes in enumerate(self.function.axes_of_stride):
            low, _ = self._bounds(axes, before, sizes)
            lowered = max(low * (1 - _MARGIN), self.function.lower[owner])
            larger = self._with_stride(strides, owner, lowered)
            wanted = (
                before[i] / self.preferred[owner] + self.function.extra[i]
                for i in axes
            )
            is_doubled = all(larger[i] >= 2 * x for i, x in zip(axes, wanted))
            if larger != sizes and not is_doubled:
                yield math.log(self.preferred[owner] / lowered), larger

    def _with_stride(self, strides, owner, stride):
        """Returns the sizes after the axes of one stride alone have changed."""
        changed = np.array(strides)
        changed[owner] = stride
        sizes = self.function.integer_sizes(strides)[1]
        changed_sizes = self.function.integer_sizes(changed)[1]
        for axis in self.function.axes_of_stride[owner]:
            sizes[axis] = changed_sizes[axis]
        return sizes


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

    seen = dict.fromkeys(norms, 0)

    def call_in_training(layer, call, x, *args, **kwargs):
        count = len(x)
        layer.momentum = seen[layer] / (seen[layer] + count)
        seen[layer] += count
        return call(x, *args, **{**kwargs, 'training': True})

    examples = 0
    with contextlib.ExitStack() as stack:
        for layer in norms:
            layer.trainable = True  # A frozen layer ignores `training`.
            call = functools.partial(call_in_training, layer)
            stack.enter_context(models.intercepted(layer, call))
        try:
            for batch in batches:
                x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
                count = len(tree.flatten(x)[0])
                if count:
                    model(x, training=False)
                examples += count
        finally:
            for layer, momentum, trainable in momenta:
                layer.momentum, layer.trainable = momentum, trainable
    validation.require(
        examples, '`batches` must hold at least one example', examples=0
    )
