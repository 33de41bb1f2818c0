"""Measures how long StrideBudget takes between two batches of training.

    python3 benchmarks/budget.py

It takes a minute on two CPU cores.
"""

import argparse
import functools
import time

import harness
import keras
import numpy as np

from diffstride import DiffStride, resnet
from diffstride.callbacks import StrideBudget


class TimedBudget(StrideBudget):
    """Keeps the times of its calls, and when they began."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.began, self.seconds = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.began.append(time.perf_counter())
        super().on_train_batch_end(batch, logs)
        self.seconds.append(time.perf_counter() - self.began[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batches', type=int, default=40)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--width', type=int, default=16)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    pooling = functools.partial(
        DiffStride, ramp='straight_through', shared_stride=True
    )
    model = resnet.resnet18(
        num_output_classes=10, width=args.width, pooling_cls=pooling
    )
    model.build((None, 32, 32, 3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), loss)
    budget = TimedBudget(share=0.8, learn=1.0)
    random = np.random.default_rng(0)
    count = args.batches * args.batch_size
    images = random.normal(size=(count, 32, 32, 3)).astype('float32')
    labels = random.integers(10, size=count)
    model.fit(images, labels, args.batch_size, verbose=0, callbacks=[budget])
    # The first batches compile.
    step = 1e3 * np.median(np.diff(budget.began)[4:])
    own = 1e3 * np.median(budget.seconds[4:])
    print(
        f'{harness.BACKEND}, n = {args.batches}: a step takes {step:.0f} ms, '
        f'of which StrideBudget takes {own:.1f} ms: {own / step:.2%}'
    )


if __name__ == '__main__':
    main()
