"""The response of `DiffStride`, and the output size that it needs.

A stride S keeps the frequencies up to the band edge b = N / (2 S) of an axis of
N samples. `Ramp` lets the weight of a frequency fall to 0 around that edge, so
that the stride gets a gradient.

A size is an integer where it is known and an int32 scalar tensor elsewhere. A
stride is a number or a float32 scalar tensor.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from keras import ops

from diffstride import backend
from diffstride.backend import known, maximum, minimum, real
from diffstride.resampling import TOLERANCE, Response

RAMPS = ('outside', 'inside', 'straight_through')


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The response of DiffStride, a ramp from 1 to 0.

    Attributes:
        kind: 'outside' falls from 1 at b to 0 at b + R; 'inside' from 1 at
            b - min(R, b) to 0 at b. 'straight_through' is 1 in the forward
            pass and has the gradient of 'inside'.
        width: R > 0, in frequencies.
        lower: The least stride, at least 1.
        upper: The largest stride, or None.

    Reference:
        Riad et al., "Learning strides in convolutional neural networks", ICLR
        2022, arXiv:2202.01653, Eq. 3.
    """

    kind: str
    width: float
    lower: float = 1.0
    upper: float | None = None

    def clip(self, stride: Any, size: Any) -> Any:
        """Clips a stride to what the size allows, then to the limits.

        With 'outside', S is at least N / (N - min(R, N / 2)), so that a part
        of the ramp lies within the spectrum. S is at most N / 2, so that a band
        of one frequency stays. The limits come last, so they win. `StrideState`
        has applied them too, but the size may have moved the stride since. The
        gradient passes straight through, so that a stride beyond a limit can
        come back.
        """
        length, least = real(size), 1.0
        if self.kind == 'outside':
            least = length / (length - minimum(self.width, length / 2))
        clipped = minimum(maximum(stride, least), maximum(least, length / 2))
        clipped = maximum(clipped, self.lower)
        if self.upper is not None:
            clipped = minimum(clipped, self.upper)
        if known(stride):
            return clipped
        return backend.with_gradient_of(clipped, stride)

    def band_edge(self, size: Any, stride: Any) -> Any:
        """Returns b = N / (2 S) for the clipped stride, in cycles per N."""
        return real(size) / (2.0 * self.clip(stride, size))

    def output_size(self, size: Any, edge: Any) -> Any:
        """Returns M, the least even size that holds the response, or N.

        It needs no gradient: where M changes, only frequencies of weight 0 are
        added or dropped. The output of 'straight_through' jumps there, and its
        gradient ignores the jump.
        """
        end = edge + self.width if self.kind == 'outside' else edge
        half = end * (1 - TOLERANCE)
        if known(size, edge):  # A NaN stride yields the smallest size.
            half = 1 if math.isnan(half) else math.ceil(half)
            return min(size, 2 * half)
        half = ops.minimum(ops.ceil(half), real(size))  # It fits an int32.
        return ops.minimum(size, 2 * ops.maximum(1, ops.cast(half, 'int32')))

    def learned_response(
        self, size: Any, output_size: Any, edge: Any
    ) -> Response:
        """Returns forward weights, and those on the ramp for the gradient."""
        forward = self.forward_response(output_size, edge)
        frequencies = self.gradient_frequencies(size, output_size, edge)
        return Response(
            None if forward is None else forward.weights,
            frequencies,
            self.weights(frequencies, edge),
        )

    def forward_response(self, output_size: Any, edge: Any) -> Response | None:
        """Returns the weights m(f) of the forward pass, or None for ones."""
        if self.kind == 'straight_through':
            return None
        if known(output_size, edge):
            return Response(self.constant_weights(output_size, edge))
        frequencies = ops.arange(output_size // 2 + 1, dtype='int32')
        return Response(self.weights(frequencies, edge))

    def gradient_frequencies(
        self, size: Any, output_size: Any, edge: Any
    ) -> Any:
        """Returns the frequencies whose weight varies with the stride.

        They are those on the ramp with its two corners: int32 [count]. The
        count does not depend on the stride, so that it is an integer if M or N
        is. So there may be a few more frequencies, even below 0, and `weights`
        gives them no gradient.
        """
        start = ops.stop_gradient(edge)
        tolerance = TOLERANCE * (start + self.width)
        if self.kind != 'outside':
            start = start - ops.minimum(self.width, start)
        count = math.floor(self.width + 0.01) + 1  # The edge may be rounded.
        count = minimum(count, (size if known(size) else output_size) // 2 + 1)
        first = ops.cast(ops.ceil(start - tolerance), 'int32')
        first = ops.minimum(first, output_size // 2 + 1 - count)
        return first + ops.arange(count, dtype='int32')

    def weights(self, frequencies: Any, edge: Any) -> Any:
        """Returns the weights m(f), with the gradient of the band edge.

        At a corner of the ramp the gradient is the mean of the slopes on both
        sides, as a central difference gives it. 'straight_through' takes only
        its gradient from here, that of 'inside'.

        Args:
            frequencies: int32 tensor [count], in cycles per N samples.
            edge: The band edge, a float32 scalar tensor.
        """
        fixed = ops.stop_gradient(edge)
        distance = fixed - ops.cast(frequencies, 'float32')
        rounding = TOLERANCE * (fixed + self.width)
        if self.kind == 'outside':
            width, level = self.width, distance / self.width + 1
            slope = 1 / self.width
        else:
            width = ops.minimum(self.width, fixed)
            level = distance / width
            # A ramp as wide as the band widens with it.
            slope = (1 - level * _step(self.width - fixed, rounding)) / width
        slope *= _step(level, rounding / width)
        slope *= 1 - _step(level - 1, rounding / width)
        # The second term is 0, and its gradient is the slope.
        weights = ops.clip(level, 0, 1) + slope * (edge - fixed)
        return ops.where(frequencies > 0, weights, 1.0)

    def constant_weights(self, output_size: int, edge: float) -> np.ndarray:
        """Returns the forward weights of f = 0 .. M // 2, float64."""
        return _constant_weights(self, output_size, edge)


@functools.lru_cache(maxsize=256)
def _constant_weights(ramp, output_size, edge):
    frequencies = np.arange(output_size // 2 + 1)
    if ramp.kind == 'straight_through':
        weights = np.ones(len(frequencies))
    else:
        outside = ramp.kind == 'outside'
        width = ramp.width if outside else min(ramp.width, edge)
        end = edge + ramp.width if outside else edge
        weights = np.clip((end - frequencies) / width, 0.0, 1.0)
        weights[0] = 1.0
    weights.flags.writeable = False  # All callers share the array.
    return weights


def _step(x, rounding):
    """Returns 0 below zero, 1 above zero, and 1/2 at zero."""
    above, not_below = x > rounding, x > -rounding
    return (ops.cast(above, x.dtype) + ops.cast(not_below, x.dtype)) / 2
