"""The state of a layer with learned strides.

The state is two weights, saved and restored with all others: the strides, which
the optimizer moves, and the `record`, float32 [1 + n], which it does not move.

                      record[0]   record[1:]
    sizes follow      0           zeros
    static sizes      0           the strides that sizes are computed from
    held              1           the strides in use, which set sizes too
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from diffstride import backend, validation


class StrideState:
    """The strides that a layer uses, and those that set its sizes.

    Strides are learned or held. Sizes follow the strides, or are static: those
    of the strides at one time. Held strides have static sizes.

    Args:
        initial: The initial strides, one per spatial axis.
        shared: Whether all axes share one stride.
        lower: The least stride in use, at least 1.
        upper: The largest stride in use, or None.
        on_change: A function that is called, outside of tracing, after a value
            has changed.

    Raises:
        ValueError: If the lower limit is above the upper one, if an initial
            stride is outside of them, or if shared strides differ.

    Attributes:
        variable: The strides, a trainable float32 variable [n], where n is the
            number of axes, or 1 if they share a stride.
        record: The rest of the state, a non-trainable variable [1 + n].
    """

    def __init__(
        self,
        initial: Sequence[float],
        shared: bool,
        lower: float,
        upper: float | None,
        on_change: Callable[[], None],
    ):
        validation.require(
            upper is None or lower <= upper,
            '`lower_limit_stride` must not exceed `upper_limit_stride`',
            lower_limit_stride=lower,
            upper_limit_stride=upper,
        )
        self.rank = len(initial)
        self.shared = shared
        self.lower = lower
        self.upper = math.inf if upper is None else upper
        self._check(initial)
        stored = self._values_to_store(initial)
        self.variable = _Variable(stored, 'strides', True, on_change)
        self.variable.constraint = self._clipped_tensor
        zeros = [0.0] * (1 + len(stored))
        self.record = _Variable(zeros, 'stride_record', False, on_change)

    def _values_to_store(self, strides):
        """Returns the values to store of strides, one per axis."""
        return strides[:1] if self.shared else strides

    def _check(self, strides):
        validation.require(
            not self.shared or len(set(strides)) == 1,
            '`strides` must be equal on all axes with `shared_stride=True`',
            strides=strides,
        )
        rounding = 1e-6  # Strides may have gone through float32.
        validation.require(
            all(
                abs(stride - clipped) <= rounding * clipped
                for stride, clipped in zip(
                    strides, self._numbers_per_axis(strides)
                )
            ),
            '`strides` must lie between `lower_limit_stride` and '
            '`upper_limit_stride`',
            strides=strides,
            lower_limit_stride=self.lower,
            upper_limit_stride=self.upper,
        )

    @property
    def held(self) -> bool:
        """Whether learning is over."""
        return self.record.numbers()[0] > 0

    @property
    def has_static_sizes(self) -> bool:
        """Whether sizes stay as they are while the strides move."""
        return self.record.numbers()[1] > 0

    @property
    def held_strides(self) -> tuple[float, ...] | None:
        """The held strides, one per axis, or None while they are learned."""
        held, *strides = self.record.numbers()
        return self._numbers_per_axis(strides) if held > 0 else None

    @property
    def stride_values(self) -> tuple[float, ...]:
        """The strides in use, as numbers within the limits, one per axis."""
        return self.held_strides or self._numbers_per_axis(
            self.variable.numbers()
        )

    @property
    def size_strides(self) -> tuple[float, ...]:
        """The strides that sizes are computed from, as numbers."""
        _, *static = self.record.numbers()
        return self._numbers_per_axis(
            static if static[0] > 0 else self.variable.numbers()
        )

    def _numbers_per_axis(self, values):
        """Returns stored values within the limits, one per axis."""
        values = tuple(
            # A NaN stays NaN.
            x if math.isnan(x) else min(max(x, self.lower), self.upper)
            for x in values
        )
        return values * (self.rank // len(values))

    def strides_tensor(self) -> Any:
        """Returns the strides in use, float32 [rank], with their gradient.

        A gradient that is infinite or NaN counts as 0.
        """
        record = ops.convert_to_tensor(self.record)
        strides = ops.convert_to_tensor(self.variable)
        strides = ops.where(record[0] > 0, record[1:], strides)
        clipped = self._clipped_tensor(strides)
        strides = backend.with_gradient_of(clipped, strides)
        return backend.with_finite_gradient(self._broadcast(strides))

    def size_strides_tensor(self) -> Any:
        """Returns the strides that sizes are computed from, float32 [rank].

        They are not clipped: `Ramp.clip` keeps them within the limits.
        """
        record = ops.convert_to_tensor(self.record)
        strides = ops.convert_to_tensor(self.variable)
        return ops.stop_gradient(
            self._broadcast(ops.where(record[1] > 0, record[1:], strides))
        )

    def _clipped_tensor(self, strides):
        """Returns a tensor of strides within the limits."""
        return ops.clip(
            strides,
            ops.convert_to_tensor(self.lower, strides.dtype),
            ops.convert_to_tensor(self.upper, strides.dtype),
        )

    def _broadcast(self, strides):
        return ops.broadcast_to(strides, (self.rank,))

    def hold(self) -> None:
        """Ends learning: the strides in use stay, with their sizes."""
        self._fix_sizes(held=1.0)

    def make_sizes_static(self) -> None:
        """Computes sizes from the strides in use as they are now."""
        validation.require(
            not self.held,
            'Held strides must be released by `release()` before '
            '`make_sizes_static()`',
            held=True,
        )
        self._fix_sizes(held=0.0)

    def _fix_sizes(self, held):
        values = self._values_to_store(self.stride_values)
        validation.require(
            all(map(math.isfinite, values)),
            '`strides` must be finite for static sizes',
            strides=values,
        )
        self.record.assign([held, *values])

    def release(self) -> None:
        """Resumes learning from the strides in use; sizes follow them."""
        self.variable.assign(self._values_to_store(self.stride_values))
        self.record.assign([0.0] * self.record.shape[0])

    def assign(self, strides: Sequence[float]) -> None:
        """Sets learned strides, one per axis. Static sizes stay."""
        self._check(strides)
        validation.require(
            not self.held,
            '`strides` must be released by `release()` before they change',
            held=True,
        )
        self.variable.assign(self._values_to_store(strides))

    def get_config(self) -> dict[str, Any] | None:
        """Returns the state as plain numbers, or None if sizes follow."""
        if not self.has_static_sizes:
            return None
        return {
            'strides': list(self.variable.numbers()),
            'record': list(self.record.numbers()),
        }

    def set_config(self, config: dict[str, Any] | None) -> None:
        """Sets the state that `get_config` returned."""
        if config is not None:
            self.variable.assign(config['strides'])
            self.record.assign(config['record'])


class _Variable(keras.Variable):
    """A float32 variable that remembers its numbers and reports changes.

    Its numbers are its present values. While TensorFlow or JAX traces, they are
    those that it holds outside of the trace. While `fit` on JAX runs, it has no
    values, and they are the last known ones.
    """

    def __init__(self, values, name, trainable, on_change):
        self._last_numbers = tuple(map(float, values))
        self._on_change = None  # The initialization is not reported.
        super().__init__(
            lambda shape, dtype: ops.convert_to_tensor(values, dtype),
            shape=(len(values),),
            dtype='float32',
            trainable=trainable,
            autocast=False,
            name=name,
        )
        self._on_change = on_change

    def numbers(self):
        """Returns the values, one float each; while tracing, those stored."""
        if self._value is None:  # Keras would initialize it to read `value`.
            return self._last_numbers
        values = backend.known_values(self)
        return self._refreshed_numbers() if values is None else values

    def _refreshed_numbers(self):
        values = backend.stored_values(self)
        if values is not None:
            self._last_numbers = values
        return self._last_numbers

    def assign(self, value):
        """Assigns values and reports a change.

        On JAX, `fit` assigns the values of its training at the end of an epoch.
        """
        if self._on_change is None or backend.is_tensorflow_graph():
            return super().assign(value)
        before = self._last_numbers  # Traced functions may contain them.
        value = super().assign(value)
        if self._refreshed_numbers() != before:
            self._on_change()
        return value
