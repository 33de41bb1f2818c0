"""Time of method='fft' over that of 'matmul', against the size of the image.

    python3 benchmarks/methods.py [--rounds 15]

Prints a Markdown table: for DiffStride (stride 2, R = 4, channels_last,
float32), forward and backward, the ratio of the medians of interleaved runs,
with the quartiles of the ratios of single runs. Above 1, the matrix is faster.
It is what `spectral.LONGEST_MATMUL` was chosen by.
"""

import argparse
import platform
import time

import keras
import numpy as np
import tensorflow as tf

import diffstride

# [batch, size, size, channels]
SHAPES = (
    (128, 7, 7, 512),
    (128, 14, 14, 256),
    (32, 32, 32, 64),
    (32, 56, 56, 64),
    (8, 112, 112, 64),
    (4, 224, 224, 64),
    (4, 256, 256, 32),
    (4, 384, 384, 16),
    (4, 512, 512, 16),
    (2, 1024, 1024, 8),
)


def training_step(method):
    """Returns a function of images that computes all gradients."""
    layer = diffstride.DiffStride(method=method)

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            loss = tf.reduce_sum(tf.square(layer(images)))
        return tape.gradient(loss, [images, layer.strides.value])

    return step


def seconds(function, images):
    start = time.perf_counter()
    for result in function(images):
        result.numpy()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=15)
    rounds = parser.parse_args().rounds
    print(
        f'{platform.machine()}, TensorFlow {tf.__version__}, Keras '
        f'{keras.__version__}, n = {rounds}\n'
    )
    print('| shape | fft / matmul | quartiles |\n| --- | --- | --- |')
    for shape in SHAPES:
        images = tf.random.normal(shape)
        steps = [training_step(method) for method in ('fft', 'matmul')]
        for step in steps:
            seconds(step, images)
        times = np.array(
            [[seconds(step, images) for step in steps] for _ in range(rounds)]
        )
        fft, matmul = np.median(times, axis=0)
        low, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.75])
        shape = ' x '.join(map(str, shape))
        print(
            f'| {shape} | {fft / matmul:.2f} | {low:.2f} to {high:.2f} |',
            flush=True,
        )


if __name__ == '__main__':
    main()
