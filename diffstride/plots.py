"""Plots of strides, costs and spectra. They need matplotlib: the extra `plot`.

Every function returns a `matplotlib.figure.Figure`, which belongs to no window:
`plots.strides(history).savefig('strides.png')`.
"""

import collections
import contextlib
import functools

import numpy as np
from keras import ops, tree

from diffstride import validation
from diffstride.complexity import recorded
from diffstride.pooling import DiffStride, SpectralPooling

_LINES = ('-', '--', ':')


def strides(history, initial=None):
    """Strides over the epochs.

    Args:
        history: Dict of lists, one value per epoch, as `fit` returns it in
            `.history` where `callbacks.StrideLogger` is at work.
        initial: Dict from the name of a layer to its initial strides, one per
            axis, shown as epoch 0; None for none.

    Returns:
        A figure.

    Raises:
        ValueError: If no stride is in the history.

    Example:

    >>> history = model.fit(x, y, callbacks=[StrideLogger()]).history
    >>> plots.strides(history).savefig('strides.png')
    """
    figure, axes = _figure('epoch', 'stride')
    draw_strides(axes, history, initial)
    axes.legend()
    return figure


def draw_strides(axes, history, initial=None, **style):
    """As `strides`, on given axes of matplotlib, in a style of lines."""
    keys = [key for key in history if key.startswith('stride/')]
    if not keys:
        raise ValueError(
            'The history must have strides, as callbacks.StrideLogger adds '
            f'them. Received: {list(history)}'
        )
    per_name = collections.Counter(key.split('/')[1] for key in keys)
    validation.require(
        not initial
        or all(len(initial.get(x, ())) == n for x, n in per_name.items()),
        f'`initial` must have as many strides of each layer: {dict(per_name)}',
        initial=initial,
    )
    names = list(per_name)
    drawn = dict.fromkeys(names, 0)
    for key in keys:
        _, name, axis = key.split('/')
        index = drawn[name]
        drawn[name] += 1
        start = [initial[name][index]] if initial else []
        values = start + list(history[key])
        axes.plot(
            np.arange(len(values)) + (0 if start else 1),
            values,
            **{
                'linestyle': _LINES[index],
                'marker': '.',
                'color': f'C{names.index(name)}',
                'label': f'{name}, {axis}',
                **style,
            },
        )
    axes.xaxis.get_major_locator().set_params(integer=True)


def strides_of_runs(groups):
    """Strides over the epochs of many runs, one panel for each group of them.

    Args:
        groups: Dict from the name of a group to a list of (history, initial),
            as `strides` takes them.

    Returns:
        A figure.

    Raises:
        ValueError: If there is no group, and as `strides`.
    """
    validation.require(
        groups, '`groups` must have at least one group', groups=groups
    )
    figure = _new_figure((5 * len(groups), 4))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (name, runs) in zip(panels, groups.items()):
        for history, initial in runs:
            draw_strides(axes, history, initial, alpha=0.6, marker='')
        axes.set_title(name)
        axes.set_xlabel('epoch')
    lines = {
        label: line
        for axes in panels
        for line, label in zip(*axes.get_legend_handles_labels())
    }
    panels[0].set_ylabel('stride')
    panels[0].legend(lines.values(), lines.keys())
    return figure


def accuracy_macs(points):
    """Accuracy against multiply-accumulates, a marker for each group.

    Args:
        points: Dict from the name of a group to a list of (MACs, accuracy) or
            (MACs, accuracy, standard deviation), accuracies from 0 to 1.

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
    rows = (len(points) + 1) // 2
    figure.set_size_inches(7, 4 + rows / 4)
    figure.legend(loc='outside lower center', ncols=2)
    return figure


def response(layer, size, index=0):
    """The response m(f) of a DiffStride layer, and what the crop keeps.

    Args:
        layer: A `DiffStride`, at its present strides.
        size: N, of the axis in the input.
        index: Of the spatial axis, from 0.

    Returns:
        A figure.

    Raises:
        ValueError: If the layer is no DiffStride, if the size is not an integer
            of at least 1, or if there is no such axis.

    Example:

    >>> plots.response(DiffStride(2.0), 32).savefig('response.png')
    """
    validation.require(
        isinstance(layer, DiffStride),
        '`layer` must be a DiffStride',
        layer=layer,
    )
    validation.require(
        validation.is_integer(size, least=1),
        '`size` must be an integer, at least 1',
        size=size,
    )
    validation.one_of('index', index, tuple(range(layer.rank)))
    figure, axes = _figure('frequency f (cycles per map)', 'response m(f)')
    values = layer.response(size, index)
    output_size = layer.present_size(index, size)
    stride = layer.stride_values[index]
    axes.plot(values, marker='.', label='m(f)')
    axes.axvspan(
        0,
        min(size, output_size) / 2,
        alpha=0.15,
        label=f'kept: {output_size} of {size} samples',
    )
    axes.axvline(
        size / (2 * stride),
        color='black',
        linestyle=':',
        label=f'b = N / (2 S), S = {stride:.2f}',
    )
    axes.legend()
    return figure


def pooled(model, image):
    """The map with most variance, before and after each pooling of a model.

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

    def keep(layer, inputs, outputs):
        pair = tree.flatten(inputs)[0], tree.flatten(outputs)[0]
        rows.append((layer, *map(ops.convert_to_numpy, pair)))

    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if isinstance(layer, SpectralPooling) and layer.rank == 2:
                end = functools.partial(keep, layer)
                stack.enter_context(recorded(layer, lambda end=end: end))
        model(ops.convert_to_tensor(image)[None], training=False)
    if not rows:
        raise ValueError(
            'The model must have spectral pooling layers of two spatial axes. '
            f'Received: {model.name}'
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
