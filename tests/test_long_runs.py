"""1,000 steps with strides that move through many sizes."""

import gc
import pathlib
import resource

import keras
import numpy as np
import pytest
from backends import array, random, sequential

from diffstride import DiffStride, diffstride_layers

STATM = pathlib.Path('/proc/self/statm')


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason='Linux only')
def test_1000_steps_through_many_sizes_take_no_more_memory():
    traces = []
    model = sequential(
        (24, 24, 2),
        DiffStride(2.0, 2.0, ramp='inside'),
        keras.layers.Lambda(lambda x: traces.append(x.shape) or x),
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
            pages = int(STATM.read_text().split()[1])
            megabytes.append(pages * resource.getpagesize() / 2**20)

    mover = keras.callbacks.LambdaCallback(on_train_batch_begin=move)
    model.fit(x, y, batch_size=4, callbacks=[mover], verbose=0)
    assert len(sizes) > 15
    assert megabytes[-1] < megabytes[3] + 4  # After 1,000 and 400 steps.
    # When the model is built, when shapes are inferred, in one trace.
    assert len(traces) <= 3
    assert np.all(np.isfinite(array(model(x[:4]))))
