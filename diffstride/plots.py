"""Plots of strides, costs and spectra. They need matplotlib: the extra `plot`.

Every function returns a `matplotlib.figure.Figure` that belongs to no window:
`plots.strides(history).savefig('strides.png')`.
"""

import collections
import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from diffstride import models, validation
from diffstride.pooling import DiffStride, SpectralPooling

_LINES = ('-', '--', ':')


def strides(
    history: Mapping[str, Sequence[float]],
    initial: Mapping[str, Sequence[float]] | None = None,
) -> Any:
    """Plots strides over the epochs.

    Args:
        history: Maps names to one value per epoch, as the `.history` that `fit`
            returns with `callbacks.StrideLogger` does.
        initial: Maps the names of layers to their initial strides, one per
            axis, which are drawn as epoch 0; None to leave them out.

    Returns:
        A figure.

    Raises:
        ValueError: If the history has no strides, or if `initial` has another
            number of them.

    Example:

    >>> history = model.fit(x, y, callbacks=[StrideLogger()]).history
    >>> plots.strides(history).savefig('strides.png')
    """
    keys = [key for key in history if key.startswith('stride/')]
    validation.require(
        keys,
        '`history` must have strides, as callbacks.StrideLogger adds them',
        history=list(history),
    )
    counts = collections.Counter(key.split('/')[1] for key in keys)
    validation.require(
        not initial
        or all(len(initial.get(x, ())) == n for x, n in counts.items()),
        f'`initial` must have as many strides of each layer: {dict(counts)}',
        initial=initial,
    )
    figure, axes = _figure('epoch', 'stride')
    for color, name in enumerate(counts):
        of_layer = [key for key in keys if key.split('/')[1] == name]
        for index, key in enumerate(of_layer):
            values = list(history[key])
            if initial:
                values = [initial[name][index], *values]
            axes.plot(
                np.arange(len(values)) + (0 if initial else 1),
                values,
                linestyle=_LINES[index],
                marker='.',
                color=f'C{color}',
                label=f'{name}, {key.split("/")[2]}',
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def accuracy_macs(points: Mapping[str, Sequence[tuple]]) -> Any:
    """Plots accuracy against multiply-accumulates, one marker per group.

    Args:
        points: Maps the name of a group to a list of (MACs, accuracy) or
            (MACs, accuracy, standard deviation), with accuracies from 0 to 1.

    Returns:
        A figure.

    Raises:
        ValueError: If a group has no points.

    Example:

    >>> plots.accuracy_macs({'DiffStride': [(20e6, 0.69), (35e6, 0.72, 0.01)]})
    """
    validation.require(
        points and all(points.values()),
        '`points` must have at least one of each group',
        points=points,
    )
    figure, axes = _figure('million multiply-accumulates per image', '')
    axes.set_ylabel('test accuracy (%)')
    for index, (name, group) in enumerate(points.items()):
        # A point without a deviation has a deviation of 0.
        rows = np.array([(*row, 0.0)[:3] for row in sorted(group)])
        axes.errorbar(
            rows[:, 0] / 1e6,
            100 * rows[:, 1],
            100 * rows[:, 2],
            linestyle='',
            marker='osD^vP*X<>'[index % 10],
            capsize=2,
            label=name,
        )
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter('{x:g}')
    axes.xaxis.get_minor_locator().set_params(subs=(2, 3, 5))
    lines_of_legend = (len(points) + 1) // 2
    figure.set_size_inches(7, 4 + lines_of_legend / 4)
    figure.legend(loc='outside lower center', ncols=2)
    return figure


def response(layer: DiffStride, size: int, index: int = 0) -> Any:
    """Plots the response m(f) of a DiffStride layer and what the crop keeps.

    Args:
        layer: A `DiffStride`, at its present strides.
        size: N, the size of the axis in the input.
        index: The spatial axis, counted from 0.

    Returns:
        A figure.

    Raises:
        ValueError: If the layer is not a DiffStride, if the size is not an
            integer >= 1, or if there is no such axis.

    Example:

    >>> plots.response(DiffStride(2.0), 32).savefig('response.png')
    """
    validation.require(
        isinstance(layer, DiffStride),
        '`layer` must be a DiffStride',
        layer=layer,
    )
    validation.integer('size', size, least=1)
    validation.one_of('index', index, tuple(range(layer.rank)))
    figure, axes = _figure('frequency f (cycles per map)', 'response m(f)')
    sizes = [1] * layer.rank
    sizes[index] = size
    # The mask begins at f = -(N // 2), and it is the same at f and -f.
    values = layer.mask(sizes).ravel()[size // 2 :: -1]
    output_size = layer.output_size(size, index)
    stride = layer.stride_values[index]
    edge = float(layer._ramp.band_edge(size, stride))
    axes.plot(values, marker='.', label='m(f)')
    axes.axvspan(
        0,
        min(size, output_size) / 2,
        alpha=0.15,
        label=f'kept: {output_size} of {size} samples',
    )
    axes.axvline(
        edge,
        color='black',
        linestyle=':',
        label=f'b = N / (2 S), S = {stride:.2f}',
    )
    axes.legend()
    return figure


def pooled(model: keras.Model, image: Any) -> Any:
    """Plots the map with most variance before and after each pooling.

    Args:
        model: A built Keras model of images with spectral pooling layers.
        image: Array [height, width, channels].

    Returns:
        A figure with a row for each pooling layer of two spatial axes.

    Raises:
        ValueError: If the model calls no such layer.

    Example:

    >>> plots.pooled(model, images[0]).savefig('pooled.png')
    """
    rows = []

    def keep(layer, call, inputs):
        outputs = call(inputs)
        pair = tree.flatten(inputs)[0], tree.flatten(outputs)[0]
        rows.append((layer, *map(ops.convert_to_numpy, pair)))
        return outputs

    with contextlib.ExitStack() as stack:
        for layer in models.flatten(model):
            if isinstance(layer, SpectralPooling) and layer.rank == 2:
                function = functools.partial(keep, layer)
                stack.enter_context(models.intercepted(layer, function))
        model(ops.convert_to_tensor(image)[None], training=False)
    validation.require(
        rows,
        '`model` must have spectral pooling layers of two spatial axes',
        model=model.name,
    )
    figure = _new_figure((5, 2.3 * len(rows)))
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for axes, (layer, *maps) in zip(grid, rows):
        if layer.data_format == 'channels_first':
            maps = [np.moveaxis(x, 1, -1) for x in maps]
        channel = np.argmax(maps[0].var(axis=(0, 1, 2)))
        for axis, x in zip(axes, maps):
            x = x[0, ..., channel]
            axis.imshow(x, cmap='gray')
            axis.set_title(f'{layer.name}: {x.shape[0]} x {x.shape[1]}')
            axis.set_axis_off()
    return figure


def _figure(x, y):
    figure = _new_figure((6, 4))
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _new_figure(size):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'Plots need matplotlib: pip install diffstride[plot]'
        ) from None
    return Figure(figsize=size, layout='constrained')
