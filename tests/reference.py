"""Float64 NumPy reference for spectral pooling, one axis at a time by FFT.

Sizes are those of exact arithmetic: a float stands for the decimal that its
shortest repr shows, so that 33 / 1.1 is 30. A Fraction may be given instead.
"""

import math
from fractions import Fraction

import numpy as np


def _exact(value):
    """Number as a Fraction; a float (of any width) as its shortest decimal."""
    return Fraction(str(value))


def _limits(size, smoothness, ramp):
    """Exact (S_min, S_max)."""
    half = Fraction(size, 2)
    s_min = {
        'outside': size / (size - min(_exact(smoothness), half)),
        'inside': Fraction(1),
    }[ramp]
    return s_min, max(s_min, half)


def _edge(size, stride, smoothness, ramp):
    """Exact (frequency where the mask reaches 0, width of its ramp)."""
    band = size / (2 * _exact(stride))
    width = _exact(smoothness)
    return {
        'outside': (band + width, width),
        'inside': (band, min(width, band)),
    }[ramp]


def _axes(x, data_format):
    """Spatial axes of a batch, in order."""
    first = {'channels_last': 1, 'channels_first': 2}[data_format]
    return range(first, first + x.ndim - 2)


def diffstride_limits(size, smoothness, ramp):
    """Strides (S_min, S_max), floats, that an axis of this size allows."""
    s_min, s_max = _limits(size, smoothness, ramp)
    return float(s_min), float(s_max)


def clip_stride(stride, size, smoothness, ramp, lower=None, upper=None):
    """Stride clipped to [S_min, S_max], then to [lower, upper]: a Fraction."""
    s_min, s_max = _limits(size, smoothness, ramp)
    stride = min(max(_exact(stride), s_min), s_max)
    if lower is not None:
        stride = max(stride, _exact(lower))
    if upper is not None:
        stride = min(stride, _exact(upper))
    return stride


def diffstride_size(size, stride, smoothness, ramp):
    """Output size M, an int, for a stride that is already clipped."""
    end, _ = _edge(size, stride, smoothness, ramp)
    return min(size, 2 * math.ceil(end))


def diffstride_response(size, output_size, stride, smoothness, ramp):
    """Mask m(f), f = 0 .. M//2, for a clipped stride: [output_size//2 + 1]."""
    end, width = _edge(size, stride, smoothness, ramp)
    mask = [(end - f) / width for f in range(output_size // 2 + 1)]
    return np.array([float(min(max(m, 0), 1)) for m in mask])


def fixed_size(size, stride):
    """Output size M, an int, of pooling with a fixed stride."""
    stride = _exact(stride)
    if stride == 1:
        return size
    return min(size, max(2, 2 * math.floor(size / (2 * stride))))


def resample(x, axis, output_size, response, norm):
    """Filters and resamples one axis through its spectrum.

    Args:
      x: real signals, [..., N, ...] with N at `axis`.
      axis: int.
      output_size: M, below, equal to or above N.
      response: weight of each frequency, [M//2 + 1].
      norm: 'forward' keeps the mean, 'backward' multiplies it by N / M,
        'ortho' by sqrt(N / M).

    Returns:
      float64, [..., M, ...].
    """
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    size = x.shape[-1]
    gain = {
        'forward': output_size / size,
        'backward': 1.0,
        'ortho': math.sqrt(output_size / size),
    }[norm]
    kept = min(size, output_size) // 2 + 1
    weights = gain * np.asarray(response, np.float64)[:kept]
    if output_size > size and size % 2 == 0:
        weights[-1] /= 2  # The Nyquist coefficient stands for both signs.
    spectrum = np.fft.rfft(x)[..., :kept] * weights
    return np.moveaxis(np.fft.irfft(spectrum, n=output_size), -1, axis)


def fixed_spectral_pooling(
    x, strides, norm='forward', data_format='channels_last'
):
    """Spectral pooling of a batch with fixed strides, one per spatial axis.

    [batch, *sizes, channels] -> [batch, *output_sizes, channels], or with the
    channels second.
    """
    for axis, stride in zip(_axes(x, data_format), strides, strict=True):
        size = fixed_size(x.shape[axis], stride)
        x = resample(x, axis, size, np.ones(size // 2 + 1), norm)
    return x


def diffstride(
    x,
    strides,
    smoothness=4.0,
    ramp='outside',
    norm='forward',
    cropping=True,
    lower=None,
    upper=None,
    data_format='channels_last',
    sizes=None,
    clip=True,
):
    """DiffStride of a batch, with one stride per spatial axis, clipped here.

    [batch, *sizes, channels] -> [batch, *output_sizes, channels], or with the
    channels second. `sizes`, one per axis, replaces the output sizes that
    follow from the strides; the masks still follow the strides.
    """
    axes = _axes(x, data_format)
    for i, (axis, stride) in enumerate(zip(axes, strides, strict=True)):
        size = output_size = x.shape[axis]
        if clip:
            stride = clip_stride(stride, size, smoothness, ramp, lower, upper)
        if sizes is not None:
            output_size = sizes[i]
        elif cropping:
            output_size = diffstride_size(size, stride, smoothness, ramp)
        mask = diffstride_response(size, output_size, stride, smoothness, ramp)
        x = resample(x, axis, output_size, mask, norm)
    return x


def diffstride_stride_gradient(
    x,
    weights,
    strides,
    smoothness=4.0,
    ramp='outside',
    norm='forward',
    cropping=True,
    lower=None,
    upper=None,
    data_format='channels_last',
    sizes=None,
    epsilon=1e-6,
):
    """Gradient of sum(weights * diffstride(x, ...)) in the strides: [rank].

    Central differences at constant output sizes. Clipping is straight-through:
    a stride outside its limits has the gradient of the clipped stride. Where a
    frequency lies on a corner of the mask, this is the mean of both sides.
    """
    y = diffstride(
        x,
        strides,
        smoothness,
        ramp,
        norm,
        cropping,
        lower,
        upper,
        data_format,
        sizes,
    )
    assert np.shape(weights) == y.shape, (np.shape(weights), y.shape)
    axes = _axes(x, data_format)
    sizes = [y.shape[axis] for axis in axes]
    strides = [
        clip_stride(s, x.shape[axis], smoothness, ramp, lower, upper)
        for s, axis in zip(strides, axes, strict=True)
    ]

    def loss(axis, change):
        moved = list(strides)
        moved[axis] += change
        y = diffstride(
            x,
            moved,
            smoothness,
            ramp,
            norm,
            data_format=data_format,
            sizes=sizes,
            clip=False,
        )
        return np.sum(np.asarray(weights, np.float64) * y)

    step = _exact(epsilon)
    return np.array(
        [
            (loss(i, step) - loss(i, -step)) / (2 * epsilon)
            for i in range(len(strides))
        ]
    )
