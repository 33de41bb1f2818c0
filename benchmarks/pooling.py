"""Measures time and memory of pooling layers and of their alternatives.

    python3 benchmarks/pooling.py [--rounds 15] [--sizes 32 56] [--batches 32]
        [--formats channels_last] [--dtypes float32] [--out NAME]

For each shape, data format, dtype and pass it measures, in turns in one
process: DiffStride (stride 2, R = 4) by 'auto', 'matmul' and 'fft'; the same by
the textbook's rfft2d and irfft2d; FixedSpectralPooling; Keras's average and
maximum pooling and a strided convolution of as many channels, all of stride 2;
and, for the least possible time, a copy of the input and of the gradient. A
cell that the backend cannot compute is missing ('-').

It writes benchmarks/results/pooling.json, .md and .png. The full run takes
about an hour on two CPU cores.
"""

import argparse
import functools

import keras
import numpy as np
from harness import (
    TextbookPooling,
    forward,
    forward_and_backward,
    interleaved_seconds,
    machine,
    peak_bytes,
    ratio,
    write,
)
from keras import layers, ops

from diffstride import DiffStride, FixedSpectralPooling

# The shapes [batch, size, channels] are those of the poolings of resnet18 for
# 32 x 32 images at two batch sizes, of networks for larger images, and of large
# images.
SHAPES = (
    *(
        (batch, size, channels)
        for batch in (32, 128)
        for size, channels in (
            (32, 64), (32, 128), (24, 128), (24, 256), (20, 256), (20, 512),
        )
    ),
    (32, 7, 512),
    (32, 14, 512),
    (32, 28, 256),
    (16, 56, 128),
    (8, 112, 64),
    (4, 224, 64),
    (4, 512, 16),
    (2, 1024, 8),
)  # fmt: skip


class Copy(layers.Layer):
    """Copies its input; its gradient is a copy too."""

    def call(self, inputs):
        return inputs * ops.cast(2, inputs.dtype)


def poolings(channels):
    """Returns {name: function of data_format and dtype that makes a layer}."""
    return {
        'auto': DiffStride,
        'matmul': functools.partial(DiffStride, method='matmul'),
        'fft': functools.partial(DiffStride, method='fft'),
        'textbook': TextbookPooling,
        'fixed': FixedSpectralPooling,
        'average': functools.partial(layers.AveragePooling2D, 2),
        'maximum': functools.partial(layers.MaxPooling2D, 2),
        'convolution': functools.partial(
            layers.Conv2D, channels, 3, strides=2, padding='same'
        ),
        'copy': lambda data_format, dtype: Copy(dtype=dtype),
    }


def measure(shape, data_format, dtype, rounds):
    """Returns one row of results per pass."""
    batch, size, channels = shape
    axes = (batch, size, size, channels)
    if data_format == 'channels_first':
        axes = (batch, channels, size, size)
    images = ops.cast(np.random.normal(size=axes), dtype)
    steps = {'forward': {}, 'forward + backward': {}}
    for name, pooling in poolings(channels).items():
        layer = pooling(data_format=data_format, dtype=dtype)
        layer.build(images.shape)
        try:
            outputs = forward(layer)(images)
            gradient = ops.cast(np.random.normal(size=outputs.shape), dtype)
            step = functools.partial(
                forward_and_backward(layer), images, gradient
            )
            step()
        except Exception as error:
            print(f'{name}, {data_format}, {dtype}: {error}')
            continue
        steps['forward'][name] = functools.partial(forward(layer), images)
        steps['forward + backward'][name] = step
    for direction, functions in steps.items():
        seconds = interleaved_seconds(functions, rounds)
        yield {
            'shape': shape,
            'data_format': data_format,
            'dtype': dtype,
            'pass': direction,
            'milliseconds': {
                name: 1e3 * float(np.median(s)) for name, s in seconds.items()
            },
            'ratio, quartiles of auto to': {
                name: ratio(seconds, 'auto', name)
                for name in seconds
                if name != 'auto'
            },
            'peak_bytes': {
                name: peak_bytes(step) for name, step in functions.items()
            },
            'input_bytes': int(np.prod(axes))
            * (4 if dtype == 'float32' else 2),
        }


def table(results):
    """Returns the results as Markdown."""
    names = list(poolings(1))
    lines = [', '.join(f'{k} {v}' for k, v in results['machine'].items()), '']
    lines += [
        f'n = {results["rounds"]} interleaved rounds. Ratio: time of DiffStride'
        ' (auto) over that of the other, of medians, with quartiles over '
        'rounds. Memory: peak of live bytes over those of the input.'
    ]
    kinds = dict.fromkeys(
        (row['data_format'], row['dtype'], row['pass'])
        for row in results['rows']
    )
    for kind in kinds:
        rows = [
            row
            for row in results['rows']
            if (row['data_format'], row['dtype'], row['pass']) == kind
        ]
        others = names[1:]
        lines += ['', '### ' + ', '.join(kind), '']
        lines += [
            '| batch, size, channels | auto, ms | to '
            + ' | to '.join(others)
            + ' |'
        ]
        lines += ['| --- ' * (len(others) + 2) + '|']
        for row in rows:
            ratios = row['ratio, quartiles of auto to']
            cells = [
                '{:.2f} ({:.2f}-{:.2f})'.format(*ratios[name])
                if name in ratios
                else '-'
                for name in others
            ]
            lines += [
                f'| {", ".join(map(str, row["shape"]))} | '
                f'{row["milliseconds"]["auto"]:.2f} | {" | ".join(cells)} |'
            ]
        if None in rows[0]['peak_bytes'].values():
            continue
        lines += ['', '| memory | ' + ' | '.join(names) + ' |']
        lines += ['| --- ' * (len(names) + 1) + '|']
        for row in rows:
            cells = [
                f'{row["peak_bytes"][name] / row["input_bytes"]:.2f}'
                if name in row['peak_bytes']
                else '-'
                for name in names
            ]
            lines += [
                f'| {", ".join(map(str, row["shape"]))} | {" | ".join(cells)} |'
            ]
    return '\n'.join(lines)


def plot(results, path):
    """Draws the time per input value against the size, for each method.

    It shows the median over the shapes of one size.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
    rows = [
        row
        for row in results['rows']
        if row['pass'] == 'forward + backward'
        and row['data_format'] == results['rows'][0]['data_format']
        and row['dtype'] == results['rows'][0]['dtype']
    ]
    sizes = sorted({row['shape'][1] for row in rows})
    for name in ('fft', 'matmul', 'auto', 'textbook', 'average', 'copy'):
        nanoseconds = {size: [] for size in sizes}
        for row in rows:
            batch, size, channels = row['shape']
            values = batch * size**2 * channels
            time = row['milliseconds'].get(name, np.nan)
            nanoseconds[size].append(1e6 * time / values)
        medians = [np.median(nanoseconds[size]) for size in sizes]
        style = '-' if name in ('fft', 'matmul') else ':'
        axes.loglog(sizes, medians, 'o' + style, label=name, markersize=3)
    axes.set_xlabel('height = width of the input, pixels')
    axes.set_ylabel('forward + backward, ns per input value')
    figure.legend(loc='outside right upper')
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--sizes', type=int, nargs='*', help='default: all')
    parser.add_argument('--batches', type=int, nargs='*', help='default: all')
    parser.add_argument(
        '--formats', nargs='*', default=['channels_last', 'channels_first']
    )
    parser.add_argument('--dtypes', nargs='*', default=['float32', 'bfloat16'])
    parser.add_argument('--out', default='pooling', help='name of the results')
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    rows = []
    for data_format in args.formats:
        for dtype in args.dtypes:
            for shape in SHAPES:
                if shape[0] in (args.batches or shape) and (
                    shape[1] in (args.sizes or shape)
                ):
                    rows += measure(shape, data_format, dtype, args.rounds)
                    print(rows[-1]['shape'], data_format, dtype, flush=True)
    results = {'machine': machine(), 'rounds': args.rounds, 'rows': rows}
    path = write(args.out, results, table(results))
    plot(results, path.with_suffix('.png'))


if __name__ == '__main__':
    main()
