"""A U-Net whose sizes are learned: it trains, follows them and is saved."""

import functools

import keras
import numpy as np
import pytest
from backends import array

from diffstride import DiffStride, FixedSpectralPooling, diffstride_layers
from diffstride.examples import unet


def test_every_stride_is_trained_at_any_sizes(capsys, without_tracing):
    pooling = functools.partial(DiffStride, ramp='inside', smoothness_factor=2)
    model = unet.unet(3, (4, 4, 4), 2.6, pooling)
    pools = diffstride_layers(model)
    assert [pool.name for pool in pools] == ['pool_0', 'pool_1']
    images, classes = unet.draw(8, np.random.default_rng(0), 16)
    history = unet.train(model, (images, classes), epochs=2, batch_size=8)
    losses = history.history['loss']
    assert losses[-1] < losses[0]
    told = capsys.readouterr().out
    for pool in pools:
        assert told.count(f'stride/{pool.name}/width: ') == 2
        assert told.count(f'size/{pool.name}/height: ') == 2
    for strides in [(1.3, 4.0), (5.5, 1.4)]:
        for pool in pools:
            pool.strides = strides
        losses = [model.train_on_batch(images, classes) for _ in range(2)]
        assert losses[-1] < losses[0]
        for pool in pools:
            assert np.all(array(pool.strides) != np.float32(strides))
        assert model(images).shape == (8, 16, 16, 3)


@pytest.mark.parametrize(
    'pooling_cls', [FixedSpectralPooling, DiffStride, keras.layers.MaxPooling2D]
)
def test_output_has_the_sizes_of_the_input(pooling_cls):
    model = unet.unet(3, (2, 3), strides=[2], pooling_cls=pooling_cls)
    assert model.output_shape == (None, None, None, 3)
    outputs = model(np.zeros((2, 17, 12, 1), 'float32'))
    assert tuple(outputs.shape) == (2, 17, 12, 3)
    with pytest.raises(ValueError, match='`strides` must be a number or one'):
        unet.unet(3, (2, 3), strides=[2, 2], pooling_cls=pooling_cls)


def test_shapes_are_drawn_where_they_are_labelled():
    images, classes = unet.draw(20, np.random.default_rng(0))
    assert images.shape == (20, 32, 32, 1) and images.dtype == 'float32'
    assert set(np.unique(classes)) == {0, 1, 2}
    inside = images[..., 0][classes > 0]
    outside = images[..., 0][classes == 0]
    assert abs(outside.mean()) < 0.01
    assert 0.7 < inside.mean() < 0.8
    again, _ = unet.draw(20, np.random.default_rng(0))
    assert np.array_equal(again, images)
