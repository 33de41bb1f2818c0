"""1,000 steps with strides that move through many sizes."""

import gc
import os
import resource

import keras
import numpy as np
import pytest
from backends import random, sequential
from keras import ops

from diffstride import DiffStride
from diffstride.pooling import diffstride_layers


def resident_megabytes():
    with open('/proc/self/statm') as file:
        pages = int(file.read().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='Linux only')
def test_1000_steps_through_many_sizes_take_no_more_memory(monkeypatch):
    calls = []
    call = DiffStride.call
    monkeypatch.setattr(
        DiffStride,
        'call',
        lambda self, inputs: calls.append(self) or call(self, inputs),
    )
    model = sequential(
        (24, 24, 2),
        DiffStride(2.0, 2.0, ramp='inside'),
        keras.layers.Conv2D(4, 3, padding='same', activation='relu'),
        DiffStride(2.0, 2.0, method='fft'),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(2),
    )
    model.compile(keras.optimizers.SGD(1e-3), 'mse')
    x, y = np.tile(random(4, 24, 24, 2), (1000, 1, 1, 1)), np.zeros((4000, 2))
    draws, megabytes, sizes = np.random.default_rng(0), [], set()

    def move(batch, logs):
        """Sets one of 20 strides: libraries keep something for each size."""
        stride = 6 ** (draws.integers(20) / 19)
        for layer in diffstride_layers(model):
            layer.strides.assign([stride, stride])
            sizes.add((layer.name, layer.output_size(24)))
        if batch % 100 == 99:
            gc.collect()
            megabytes.append(resident_megabytes())

    mover = keras.callbacks.LambdaCallback(on_train_batch_begin=move)
    model.fit(x, y, batch_size=4, callbacks=[mover], verbose=0)
    assert len(sizes) > 15
    assert megabytes[-1] < megabytes[3] + 4  # After 1,000 and 400 steps.
    # When they are built, when shapes are inferred, in one trace.
    assert len(calls) <= 3 * len(diffstride_layers(model))
    assert np.all(np.isfinite(ops.convert_to_numpy(model(x[:4]))))
