"""Tools of the benchmarks: baselines, steps, interleaved timing, memory.

Benchmarks run on the TensorFlow and JAX backends of Keras (KERAS_BACKEND), on
the device that these choose.
"""

import json
import os
import pathlib
import platform
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import keras
import numpy as np
from keras import ops

import diffstride
from diffstride.pooling import spatial_axes

RESULTS = pathlib.Path(__file__).parent / 'results'
BACKEND = keras.backend.backend()

if BACKEND == 'tensorflow':
    import tensorflow as tf

    tf.get_logger().setLevel('ERROR')
    GPUS = tf.config.list_physical_devices('GPU')
    rfft2d, irfft2d = tf.signal.rfft2d, tf.signal.irfft2d
elif BACKEND == 'jax':
    import jax

    GPUS = [d for d in jax.devices() if d.platform == 'gpu']
    rfft2d, irfft2d = jax.numpy.fft.rfft2, jax.numpy.fft.irfft2
else:
    raise SystemExit('The benchmarks need the TensorFlow or JAX backend.')


class _SizesOfDiffStride(diffstride.DiffStride):
    """A layer with the output sizes of DiffStride that pools another way."""

    def call(self, inputs):
        is_list = isinstance(inputs, list)
        maps = inputs if is_list else [inputs]
        sizes = [ops.shape(maps[0])[axis] for axis in spatial_axes(self)]
        plan = self._plan()
        plans = [plan(index, size) for index, size in enumerate(sizes)]
        outputs = [self.pool(x, sizes, *zip(*plans)) for x in maps]
        return outputs if is_list else outputs[0]


class TextbookPooling(_SizesOfDiffStride):
    """Pools by transpose, rfft2d, gather, mask, irfft2d, transpose."""

    def pool(self, inputs, sizes, output_sizes, responses):
        height, width = output_sizes
        by_row, by_column = (response.weights for response in responses)
        positive, negative = (height + 1) // 2, height // 2
        rows = ops.concatenate(
            [ops.arange(positive), ops.arange(sizes[0] - negative, sizes[0])]
        )
        by_row = ops.concatenate(
            [by_row[:positive], ops.flip(by_row[1 : negative + 1])]
        )
        gain = height * width / (sizes[0] * sizes[1])
        mask = (
            ops.expand_dims(by_row, 1) * by_column * ops.cast(gain, 'float32')
        )
        is_last = self.data_format == 'channels_last'
        x = ops.cast(inputs, 'float32')
        spectrum = rfft2d(ops.transpose(x, (0, 3, 1, 2)) if is_last else x)
        spectrum = ops.take(spectrum, rows, axis=2)[..., : width // 2 + 1]
        y = irfft2d(spectrum * ops.cast(mask, spectrum.dtype), (height, width))
        y = ops.transpose(y, (0, 2, 3, 1)) if is_last else y
        return ops.cast(y, inputs.dtype)


class FreePooling(_SizesOfDiffStride):
    """Returns a slice of the input, so that pooling costs next to nothing."""

    def pool(self, inputs, sizes, output_sizes, responses):
        slices = [slice(None)] * 4
        for axis, output_size in zip(spatial_axes(self), output_sizes):
            slices[axis] = slice(None, output_size)
        return inputs[tuple(slices)]


def forward(layer):
    """Returns a compiled function of an input that calls a layer."""
    if BACKEND == 'tensorflow':
        return tf.function(layer, autograph=False)
    variables = layer.trainable_variables, layer.non_trainable_variables
    values = [[v.value for v in group] for group in variables]
    step = jax.jit(lambda values, x: layer.stateless_call(*values, x)[0])
    return lambda x: step(values, x)


def forward_and_backward(layer):
    """Returns a compiled function of an input and the output's gradient.

    It returns the output and the gradients of the input and of all weights.
    """
    if BACKEND == 'tensorflow':
        weights = [v.value for v in layer.trainable_variables]

        @tf.function(autograph=False)
        def step(x, gradient):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            return y, tape.gradient(y, [x, *weights], gradient)

        return step

    fixed = [v.value for v in layer.non_trainable_variables]
    values = [v.value for v in layer.trainable_variables]

    @jax.jit
    def step(values, x, gradient):
        def function(values, x):
            return layer.stateless_call(values, fixed, x)[0]

        y, pull_back = jax.vjp(function, values, x)
        return y, pull_back(gradient)

    return lambda x, gradient: step(values, x, gradient)


def wait(results):
    """Waits until what a step returned has been computed."""
    if BACKEND == 'jax':
        jax.block_until_ready(results)
    else:
        tf.test.experimental.sync_devices()


def interleaved_seconds(steps, rounds):
    """Returns {name: [rounds] seconds} of steps that take turns.

    A step runs twice in each turn, and the second run is measured: the first
    finds the memory that another step left.

    Args:
        steps: {name: function without arguments}.
        rounds: Number of turns that are measured, after one that is not.
    """
    seconds = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            wait(step())
            if index > 0:
                start = time.perf_counter()
                wait(step())
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds, name, to):
    """Returns the ratio of two medians, and its quartiles over the rounds."""
    ratios = seconds[name] / seconds[to]
    return (
        float(np.median(seconds[name]) / np.median(seconds[to])),
        *map(float, np.quantile(ratios, [0.25, 0.75])),
    )


def peak_bytes(step):
    """Returns the peak of live bytes in a step, beyond those before it.

    TensorFlow's allocator measures them. It returns None on JAX, whose
    allocator cannot reset its peak, and on processors for which TensorFlow does
    not use oneDNN, where its allocator keeps no account.
    """
    if BACKEND == 'jax':
        return None
    device = 'GPU:0' if GPUS else 'CPU:0'
    try:
        before = tf.config.experimental.get_memory_info(device)['current']
    except ValueError:
        return None
    tf.config.experimental.reset_memory_stats(device)
    wait(step())
    return tf.config.experimental.get_memory_info(device)['peak'] - before


def machine():
    """Returns the device and the versions, which results depend on."""
    if GPUS:
        device = getattr(GPUS[0], 'device_kind', None)
        if BACKEND == 'tensorflow':
            details = tf.config.experimental.get_device_details(GPUS[0])
            device = details['device_name']
    else:
        text = pathlib.Path('/proc/cpuinfo')
        names = text.read_text().split('\n') if text.exists() else []
        names = [x.split(': ')[1] for x in names if x.startswith('model name')]
        device = f'{os.cpu_count()} x {names[0] if names else "CPU"}'
    module = tf if BACKEND == 'tensorflow' else jax
    return {
        'device': device,
        'python': platform.python_version(),
        'keras': keras.__version__,
        BACKEND: module.__version__,
        'diffstride': diffstride.__version__,
    }


def write(name, results, table):
    """Writes `results/<name>.json` and `.md`, and prints the table."""
    if BACKEND != 'tensorflow' or GPUS:
        name += f'_{BACKEND}' + ('_gpu' if GPUS else '')
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1)
    (RESULTS / f'{name}.json').write_text(text + '\n')
    (RESULTS / f'{name}.md').write_text(table + '\n')
    print(table)
    return RESULTS / name
