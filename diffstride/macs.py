"""The MACs of a model as a function of its strides.

`MacsOfStrides` measures a model a few times and then knows its MACs for any
strides, on numbers alone. The MACs of a layer are sums of products of sizes,
and a size is linear in that of the map that the last pooling layer before it
returned. Let r_k be the sizes that pooling layers return, divided by those at
the start; then the total is sum_j c_j prod_k (1 + B_jk (r_k - 1)). The slopes B
are measured: one pooling layer after the other returns a map of twice the size
along one axis, and the products that follow grow or stay.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from diffstride import counting, validation
from diffstride.pooling import DiffStride, SpectralPooling, spatial_axes

# The size of the smallest map that a DiffStride layer returns, without a ramp.
_LEAST_SIZE = 2.0


class MacsOfStrides:
    """The MACs for one image as a function of the strides of some layers.

    Strides are float64 arrays [n]: those of all layers, one after the other,
    with one number per axis or per layer with `shared_stride`.

    Between integers a size counts as N / S, or N / S + 2 R with the ramp
    'outside', and at most N. At integer sizes the MACs are those of
    `complexity`, unless layers without learned strides round sizes, as a
    strided convolution of a map of odd size does, or layers have
    `method='fft'`, whose MACs are not linear in a size. Then they are
    approximate; `count` is exact in each case.

    Args:
        model: A model with DiffStride layers.
        input_shape: The shape of its input, see `complexity`; None for the
            input shape of the model.
        layers: The layers whose strides vary. All others stay as they are.

    Attributes:
        layers: The layers, in the order of their calls.
        axes: The pooled axes of all pooling layers, (layer, its axis) each.
        axes_of_stride: The indices of the axes that each stride sets.
        lower, upper: The limits of the strides, [n].
        extra: The samples that a ramp adds to the size of each axis.

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
        self.lower = np.repeat(lower, counts)
        self.upper = np.repeat(upper, counts)
        # Sizes belong to the axes of all pooling layers. `_owner` is the index
        # of an axis's stride among those that vary, followed by constants.
        self._poolings = [
            x for x in calls if isinstance(x, SpectralPooling) and x.cropping
        ]
        self.axes = [(x, i) for x in self._poolings for i in range(x.rank)]
        self._owner: list[int] = []
        self._constants: list[float] = []
        for layer, index in self.axes:
            if layer in self.layers:
                start, stop = self._parts[self.layers.index(layer)]
                self._owner.append(start + index % (stop - start))
            else:
                self._owner.append(starts[-1] + len(self._constants))
                self._constants.append(layer.stride_values[index])
        self.axes_of_stride = [
            [axis for axis, x in enumerate(self._owner) if x == owner]
            for owner in range(starts[-1])
        ]
        self.extra = [
            2 * x.smoothness_factor
            if getattr(x, 'ramp', None) == 'outside'
            else 0.0
            for x, _ in self.axes
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
        def terms(calls, skip_identity=False):
            found = (
                counting.mac_terms(layer, calls.get(layer, []), skip_identity)
                for layer in rows
            )
            return np.array([*itertools.chain(*found)], float)

        first = terms(calls, skip_identity=True)
        slopes, upstream = [], []
        for axis, (layer, _) in enumerate(self.axes):
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
            slopes.append(terms(calls)[first > 0] / first[first > 0] - 1)
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
        least = self._least_sizes()
        self._least = [2 * math.ceil(x / 2 - 1e-6) for x in least]
        self._least_bands = np.maximum(
            _LEAST_SIZE, np.subtract(least, self.extra)
        )

    def _least_sizes(self):
        """Returns the sizes after pooling below which a later map is empty.

        A convolution with the padding 'valid' makes its input smaller, so a map
        of a few samples may leave nothing for the next pooling layer.
        """
        least = [1.0] * len(self.axes)
        for axis in reversed(range(len(self.axes))):
            for parent, slope in self._parents[axis]:
                ratio = 1 - (1 - least[axis] / self._before[axis]) / slope
                least[parent] = max(least[parent], ratio * self._after[parent])
        return least

    def _returning(self, sizes):
        """Returns the `output_shapes` with which `measure` sets sizes."""
        shapes = {}
        for layer in self._poolings:
            own = [size for size, x in zip(sizes, self.axes) if x[0] is layer]
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
                for stride in layer.get_config()['strides'][
                    : layer.strides.shape[0]
                ]
            ]
            share = 1.0 if share is None else share
            macs = round(share * self.count(np.array(initial)), 6)
        least = self.integer_macs(self.upper)
        validation.require(
            macs >= least,
            f'The budget must be at least {least:,} MACs for one image, those '
            'of the largest strides',
            macs=macs,
        )
        return float(macs)

    def __call__(self, strides: np.ndarray) -> float:
        """Returns the MACs with smooth sizes."""
        return self.total(self.smooth_sizes(strides)[1])

    def gradient(self, strides: np.ndarray) -> np.ndarray:
        """Returns the gradient of the MACs in the strides, below 0.

        A size that is limited by N counts as one that is not limited, so that
        small strides have a gradient. A stride beyond the one that gives the
        least size has none.
        """
        before, after = self.smooth_sizes(strides)
        ratios = np.divide(after, self._after)
        axis_strides = np.concatenate([strides, self._constants])[self._owner]
        # It holds the derivatives of log sizes with respect to log strides.
        jacobian = np.zeros((len(after), len(after)))
        for axis, slopes in enumerate(self._upstream):
            row = _elasticity(slopes, ratios) @ jacobian
            row[axis] -= 1
            band = before[axis] / axis_strides[axis]
            if band >= self._least_bands[axis]:
                jacobian[axis] = row * band / (band + self.extra[axis])
        terms = self._coefficients * _growth(self._slopes, ratios)
        total = terms @ _elasticity(self._slopes, ratios) @ jacobian
        return np.bincount(self._owner, total)[: len(strides)] / strides

    def smooth_sizes(self, strides: np.ndarray) -> tuple[list, list]:
        """Returns the sizes of all axes before and after, between integers."""

        def size(axis, before, stride):
            band = max(before / stride, self._least_bands[axis])
            return min(before, band + self.extra[axis])

        return self._sizes(strides, size)

    def integer_sizes(self, strides: np.ndarray) -> tuple[list, list]:
        """Returns the sizes of all axes before and after, as layers do.

        Where a layer would return fewer samples than the layers behind it
        need, the size is the least that they take.
        """

        def size(axis, before, stride):
            layer, index = self.axes[axis]
            before = round(before)
            after = layer.output_size(before, index, stride)
            return max(after, min(before, self._least[axis]))

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

    def total(self, after: Sequence[float]) -> float:
        """Returns the MACs at some sizes of all axes after pooling."""
        ratios = np.divide(after, self._after)
        return float(self._coefficients @ _growth(self._slopes, ratios))

    def integer_macs(self, strides: np.ndarray) -> int:
        """Returns the MACs at the integer sizes of strides."""
        return round(self.total(self.integer_sizes(strides)[1]))

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
        return np.minimum(
            nearest, np.maximum(self.lower, self._largest_strides(nearest))
        )

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
            return np.clip(moved, self.lower, self.upper)

        return line

    def tangent(self, strides: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Returns the part of a direction that keeps the MACs.

        Args:
            strides: The strides, [n].
            direction: A direction of their logarithms, [n]. This takes out the
                part that would change the MACs to first order, exceed a limit
                or lead beyond the least size of a map.

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
            stopped = (strides <= self.lower) & (tangent < 0)
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
        before, _ = self.smooth_sizes(strides)
        largest = np.ones(len(strides) + len(self._constants))
        np.maximum.at(largest, self._owner, np.divide(before, _LEAST_SIZE))
        # Where a later map could be empty, the strictest axis counts.
        bands = self._least_bands
        limits = np.where(bands > _LEAST_SIZE, before / bands, np.inf)
        np.minimum.at(largest, self._owner, limits)
        return np.minimum(self.upper, largest[: len(strides)])


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


def _growth(slopes, ratios):
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
