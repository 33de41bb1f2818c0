"""Float64 NumPy reference for spectral pooling, one axis at a time by FFT.

Sizes are those of exact arithmetic: a float stands for the decimal that its
shortest repr shows, so that 33 / 1.1 is 30. A Fraction may be given instead.
"""

import math
from fractions import Fraction

import numpy as np


def _exact(value):
    """Returns a number as a Fraction; a float as its shortest decimal."""
    return Fraction(str(value))


def _axes(x, data_format):
    """Returns the spatial axes of a batch, in order."""
    first = {'channels_last': 1, 'channels_first': 2}[data_format]
    return range(first, first + x.ndim - 2)


def _edge(size, stride, smoothness, ramp):
    """Returns (frequency where the mask reaches 0, width of its ramp)."""
    band = size / (2 * _exact(stride))
    width = _exact(smoothness)
    if ramp == 'outside':
        return band + width, width
    return band, min(width, band)


def clip_stride(stride, size, smoothness, ramp, lower=None, upper=None):
    """Clips a stride to what the size allows, then to the limits."""
    half = Fraction(size, 2)
    s_min = Fraction(1)
    if ramp == 'outside':
        s_min = size / (size - min(_exact(smoothness), half))
    stride = min(max(_exact(stride), s_min), max(s_min, half))
    stride = max(stride, _exact(lower or 1))
    return stride if upper is None else min(stride, _exact(upper))


def diffstride_size(size, stride, smoothness, ramp):
    """Returns the output size M for a stride that is already clipped."""
    end, _ = _edge(size, stride, smoothness, ramp)
    return min(size, 2 * math.ceil(end))


def diffstride_response(size, output_size, stride, smoothness, ramp):
    """Returns the mask m(f), f = 0 .. M // 2, for a clipped stride."""
    end, width = _edge(size, stride, smoothness, ramp)
    mask = [(end - f) / width for f in range(output_size // 2 + 1)]
    return np.array([float(min(max(m, 0), 1)) for m in mask])


def fixed_size(size, stride):
    """Returns the output size M of pooling with a fixed stride."""
    stride = _exact(stride)
    if stride == 1:
        return size
    return min(size, max(2, 2 * math.floor(size / (2 * stride))))


def resample(x, axis, output_size, response=None, norm='forward'):
    """Filters and resamples one axis, from N to M samples, by its spectrum.

    `response` has the weight of each frequency, [M // 2 + 1]; None for ones.
    The norm 'forward' keeps the mean, 'backward' multiplies it by N / M, and
    'ortho' by sqrt(N / M). The result is float64.
    """
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    size = x.shape[-1]
    gain = {'forward': 1, 'backward': 0, 'ortho': 0.5}[norm]
    weights = np.full(min(size, output_size) // 2 + 1, 1.0)
    weights *= (output_size / size) ** gain
    if response is not None:
        weights *= np.asarray(response, np.float64)[: len(weights)]
    if output_size > size and size % 2 == 0:
        weights[-1] /= 2  # The Nyquist coefficient stands for both signs.
    spectrum = np.fft.rfft(x)[..., : len(weights)] * weights
    return np.moveaxis(np.fft.irfft(spectrum, n=output_size), -1, axis)


def resize(x, sizes, norm='forward', data_format='channels_last'):
    """Resamples each spatial axis to its size in `sizes`."""
    for axis, size in zip(_axes(x, data_format), sizes, strict=True):
        x = resample(x, axis, size, norm=norm)
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
    sloped_axes=(),
):
    """Pools a batch as DiffStride does, with strides that are clipped here.

    `sizes`, one per axis, replace the output sizes that follow from the
    strides; the masks still follow the strides. With 'straight_through' the
    mask is 1, but on the axes of `sloped_axes`, counted from 0.
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
        mask = None
        if ramp != 'straight_through' or i in sloped_axes:
            mask = diffstride_response(
                size, output_size, stride, smoothness, ramp
            )
        x = resample(x, axis, output_size, mask, norm)
    return x


def _arguments(layer):
    """Returns the keyword arguments of `diffstride` that a layer has."""
    return {
        'smoothness': layer.smoothness_factor,
        'ramp': layer.ramp,
        'norm': layer.norm,
        'cropping': layer.cropping,
        'lower': layer.lower_limit_stride,
        'upper': layer.upper_limit_stride,
        'data_format': layer.data_format,
    }


def of_layer(layer, x, strides=None):
    """Returns what a DiffStride or FixedSpectralPooling layer returns.

    Without `strides` they are those of the layer, as decimals of float32.
    """
    strides = np.float32(layer.stride_values) if strides is None else strides
    if hasattr(layer, 'ramp'):
        return diffstride(x, strides, **_arguments(layer))
    axes = _axes(x, layer.data_format)
    sizes = [fixed_size(x.shape[a], s) for a, s in zip(axes, strides)]
    return resize(x, sizes, layer.norm, layer.data_format)


def stride_gradient_of_layer(layer, x, weights, strides, epsilon=1e-6):
    """Returns the gradient of sum(weights * layer(x)) in strides, [rank].

    It is by central differences at constant output sizes. Clipping is
    straight-through: a stride outside its limits has the gradient of the
    clipped stride. Where a frequency lies on a corner of the mask, this is the
    mean of both sides.
    """
    axes, arguments = _axes(x, layer.data_format), _arguments(layer)
    names = 'smoothness', 'ramp', 'lower', 'upper'
    limits = {name: arguments[name] for name in names}
    strides = [
        clip_stride(s, x.shape[axis], **limits)
        for s, axis in zip(strides, axes, strict=True)
    ]
    y = diffstride(x, strides, **arguments)
    assert np.shape(weights) == y.shape, (np.shape(weights), y.shape)
    sizes = [y.shape[axis] for axis in axes]

    def loss(axis, change):
        moved = list(strides)
        moved[axis] += change
        y = diffstride(
            x, moved, **arguments, sizes=sizes, clip=False, sloped_axes=(axis,)
        )
        return np.sum(np.asarray(weights, np.float64) * y)

    step = _exact(epsilon)
    slopes = [loss(i, step) - loss(i, -step) for i in range(len(strides))]
    return np.array(slopes) / (2 * epsilon)
