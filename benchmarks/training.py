"""Measures time and memory of steps of resnet18 with several poolings.

    python3 benchmarks/training.py [--rounds 7] [--cases 32,64,32 8,32,64]

A case is the batch size, the width (the filters of the first convolution, 64 in
resnet18) and the size of the image. For each case it measures, in turns in one
process: strided convolutions; max pooling; FixedSpectralPooling; DiffStride
with the ramp 'straight_through', and with 'outside' (stride 2, R = 4); the
latter by the textbook's FFTs; and free pooling, a slice of its sizes. The time
that DiffStride takes beyond free pooling is the cost of pooling. The time that
free pooling takes beyond strided convolutions is the cost of larger maps, as
the MACs show. Two rows show 'outside' in mixed_bfloat16 and with XLA (with
static sizes). The last three show strided convolutions in mixed_bfloat16, and
in both dtypes with Keras's batch normalization in place of the package's.

It writes benchmarks/results/training.json and .md. The case 32,64,32 takes
about ten minutes at 3 rounds on two CPU cores.
"""

import argparse
import functools
import time
from unittest import mock

import keras
import numpy as np
from harness import (
    BACKEND,
    FreePooling,
    TextbookPooling,
    interleaved_seconds,
    machine,
    peak_bytes,
    ratio,
    wait,
    write,
)

from diffstride import (
    DiffStride,
    FixedSpectralPooling,
    complexity,
    diffstride_layers,
    resnet,
)

KERAS = {'norm_cls': keras.layers.BatchNormalization}
POOLINGS = {
    'strided convolution': (None, {}),
    'max pooling': (keras.layers.MaxPooling2D, {}),
    'FixedSpectralPooling': (FixedSpectralPooling, {}),
    'DiffStride, straight_through': (
        functools.partial(DiffStride, ramp='straight_through'),
        {},
    ),
    'free pooling': (FreePooling, {}),
    'DiffStride': (DiffStride, {}),
    'textbook': (TextbookPooling, {}),
    'DiffStride, mixed_bfloat16': (DiffStride, {'policy': 'mixed_bfloat16'}),
    'DiffStride, XLA': (DiffStride, {'jit_compile': True}),
    'strided, Keras normalization': (None, KERAS),
    'strided, mixed_bfloat16': (None, {'policy': 'mixed_bfloat16'}),
    'strided, mixed_bfloat16, Keras normalization': (
        None,
        {'policy': 'mixed_bfloat16', **KERAS},
    ),
}
if BACKEND == 'jax':
    del POOLINGS['DiffStride, XLA']  # All of them are compiled by XLA.

# Each of batch, width and size grows alone from the first case.
CASES = ((32, 32, 32), (128, 32, 32), (32, 64, 32), (32, 32, 64))


def model_of(
    pooling_cls,
    width,
    policy='float32',
    jit_compile=False,
    norm_cls=resnet.BatchNormalization,
):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    with mock.patch.object(resnet, 'BatchNormalization', norm_cls):
        model = resnet.resnet18(
            width=width, num_output_classes=10, pooling_cls=pooling_cls
        )
    keras.config.set_dtype_policy('float32')
    if jit_compile:
        for layer in diffstride_layers(model):
            layer.make_sizes_static()
    model.compile(
        # At a rate of 0 all sizes stay as they are at the start.
        keras.optimizers.SGD(0.0, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile or BACKEND == 'jax',
    )
    return model


def measure(case, rounds):
    """Returns one row of results per way of downsampling."""
    batch, width, size = case
    images = np.random.normal(size=(batch, size, size, 3)).astype('float32')
    labels = np.random.randint(0, 10, batch)
    training, inference, rows = {}, {}, {}
    for name, (pooling_cls, options) in POOLINGS.items():
        model = model_of(pooling_cls, width, **options)
        train = functools.partial(model.train_on_batch, images, labels)
        infer = functools.partial(model.predict_on_batch, images)
        start = time.perf_counter()
        wait(train())
        first = time.perf_counter() - start
        infer()
        training[name], inference[name] = train, infer
        rows[name] = {
            'case': case,
            'pooling': name,
            'first_step_seconds': first,
            'macs_per_image': _macs(model, size),
        }
    for kind, steps in (('training', training), ('inference', inference)):
        seconds = interleaved_seconds(steps, rounds)
        for name, row in rows.items():
            row[kind] = {
                'milliseconds': 1e3 * float(np.median(seconds[name])),
                'ratio, quartiles to free pooling': ratio(
                    seconds, name, 'free pooling'
                ),
                'peak_bytes': _median_peak(steps[name]),
            }
    return list(rows.values())


def _macs(model, size):
    layers = complexity(model, (size, size, 3)).layers
    return sum(x.macs for x in layers if x.class_name != 'FreePooling')


def _median_peak(step):
    peaks = [peak_bytes(step) for _ in range(5)]
    return None if None in peaks else int(np.median(peaks))


def table(results):
    """Returns the results as Markdown."""
    lines = [', '.join(f'{k} {v}' for k, v in results['machine'].items()), '']
    lines += [
        f'n = {results["rounds"]} interleaved rounds. Times are medians, with '
        'their ratio to free pooling and its quartiles over rounds. Memory: '
        'peak of live bytes of a step beyond weights and optimizer, median of '
        '5, and its ratio.'
    ]
    for case in dict.fromkeys(tuple(row['case']) for row in results['rows']):
        rows = [row for row in results['rows'] if tuple(row['case']) == case]
        free = next(row for row in rows if row['pooling'] == 'free pooling')
        batch, width, size = case
        lines += ['', f'### batch {batch}, width {width}, {size} x {size}', '']
        lines += [
            '| pooling | MMAC / image | training, ms | to free | MB | to free '
            '| inference, ms | to free | first step, s |',
            '| --- ' * 9 + '|',
        ]
        for row in rows:
            train, infer = row['training'], row['inference']
            peak, of_free = train['peak_bytes'], free['training']['peak_bytes']
            memory = (
                f'{peak / 1e6:.0f} | {peak / of_free:.2f}'
                if peak and of_free
                else '- | -'
            )
            lines += [
                f'| {row["pooling"]} | {row["macs_per_image"] / 1e6:.0f} '
                f'| {_cells(train)} | {memory} | {_cells(infer)} '
                f'| {row["first_step_seconds"]:.1f} |'
            ]
    return '\n'.join(lines)


def _cells(result):
    quartiles = result['ratio, quartiles to free pooling']
    return f'{result["milliseconds"]:.0f} | ' + '{:.2f} ({:.2f}-{:.2f})'.format(
        *quartiles
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--cases', nargs='*', help='batch,width,size ...')
    parser.add_argument('--out', default='training', help='name of the results')
    args = parser.parse_args()
    cases = CASES
    if args.cases:
        cases = [tuple(map(int, case.split(','))) for case in args.cases]
    rows = []
    for case in cases:
        rows += measure(case, args.rounds)
        print(case, flush=True)
    results = {'machine': machine(), 'rounds': args.rounds, 'rows': rows}
    write(args.out, results, table(results))


if __name__ == '__main__':
    main()
