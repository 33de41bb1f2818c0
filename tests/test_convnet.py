"""The small network for images and sound."""

import keras
import numpy as np
import pytest
from backends import random

from diffstride import FixedSpectralPooling, diffstride_layers
from diffstride.examples.convnet import ResidualConv, convnet, convnet1d


def test_each_axis_is_downsampled():
    strides = '(2, 1), (1, 4), 2'
    model = convnet(5, None, strides, FixedSpectralPooling, [3, 4, 6])
    y = keras.ops.convert_to_numpy(model(random(2, 16, 24, 1)))
    np.testing.assert_allclose(y.sum(-1), [1, 1], atol=1e-6)
    residual = [x for x in model.layers if isinstance(x, ResidualConv)]
    shapes = [layer.output.shape[1:] for layer in residual]
    assert shapes == [(8, 24, 3), (8, 6, 4), (4, 2, 6)]
    with pytest.raises(ValueError, match='`strides` must be those of 3 stages'):
        convnet(2, strides='2, 2')


def test_channels_first_is_the_same_network():
    x, outputs = random(2, 16, 16, 2), []
    arguments = [1, (2, 1)], FixedSpectralPooling, [4, 4]
    for channels_first in False, True:
        keras.utils.set_random_seed(0)
        model = convnet(3, channels_first, *arguments)
        model.build(x.shape)
        try:
            outputs.append(keras.ops.convert_to_numpy(model(x)))
        except Exception as error:  # TensorFlow on some CPUs.
            assert 'NHWC' in str(error) or 'NCHW' in str(error)
            return
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
    'net, shape', [(convnet, (12, 16, 1)), (convnet1d, (256, 1))]
)
def test_nets_learn_and_are_saved(tmp_path, net, shape):
    model = net(2, strides=(1, 2), filters=(2, 3))
    x, y = random(8, *shape), np.eye(2, dtype='float32')[np.arange(8) % 2]
    model.build((None, *shape))
    before = [layer.stride_values for layer in diffstride_layers(model)]
    loss = 'categorical_crossentropy'
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
    losses = model.fit(x, y, epochs=4, verbose=0).history['loss']
    assert losses[-1] < losses[0]
    after = [layer.stride_values for layer in diffstride_layers(model)]
    assert after != before
    model.save(tmp_path / 'model.keras')
    loaded = keras.saving.load_model(tmp_path / 'model.keras')
    outputs = [each.predict(x, verbose=0) for each in (loaded, model)]
    np.testing.assert_allclose(*outputs, atol=1e-6)
