"""The small network and its whitening of patches."""

import keras
import numpy as np
import pytest
from backends import random
from small_data import take
from small_runs import prepared

from diffstride import FixedSpectralPooling, complexity, diffstride_layers
from diffstride.examples.convnet import (
    PatchWhitening,
    ResidualConv,
    convnet,
    convnet1d,
)

WHITENED = {'whitened': 24, 'activation': 'silu'}


def test_each_axis_is_downsampled():
    model = convnet(
        5, None, '(2, 1), (1, 4), 2', FixedSpectralPooling, [3, 4, 6]
    )
    y = keras.ops.convert_to_numpy(model(random(2, 16, 24, 1)))
    np.testing.assert_allclose(y.sum(-1), [1, 1], atol=1e-6)
    residual = [x for x in model.layers if isinstance(x, ResidualConv)]
    shapes = [layer.output.shape[1:] for layer in residual]
    assert shapes == [(8, 24, 3), (8, 6, 4), (4, 2, 6)]


def test_channels_first_is_the_same_network():
    x, outputs = random(2, 16, 16, 3), []
    for channels_first in False, True:
        keras.utils.set_random_seed(0)
        model = convnet(
            3,
            channels_first,
            [1, (2, 1)],
            FixedSpectralPooling,
            [4, 4],
            **WHITENED,
        )
        model.build(x.shape)
        next(y for y in model.layers if hasattr(y, 'adapt')).adapt(x)
        try:
            outputs.append(keras.ops.convert_to_numpy(model(x)))
        except Exception as error:  # TensorFlow on some CPUs.
            assert 'NHWC' in str(error) or 'NCHW' in str(error)
            return
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
    'net, shape, arguments',
    [
        (convnet, (12, 16, 1), {}),
        (convnet, (8, 8, 3), WHITENED),
        (convnet1d, (256, 1), {'activation': 'silu'}),
    ],
)
def test_nets_learn_and_are_saved(tmp_path, net, shape, arguments):
    model = net(2, strides=(1, 2), filters=(2, 3), **arguments)
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
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )


def test_strides_must_be_as_many_as_filters():
    with pytest.raises(ValueError, match='`strides` must be those of 3 stages'):
        convnet(2, strides='2, 2')


def images_of_correlated_pixels(count):
    images = random(count, 17, 16, 3)
    images[:, 1:] += images[:, :-1]
    return images + images[..., ::-1] * [0.5, 0, 0.2]


def test_whitened_patches_are_uncorrelated():
    images = images_of_correlated_pixels(20)
    layer = PatchWhitening(24, dtype='float64')
    layer.build(images.shape)
    layer.adapt(images)
    y = keras.ops.convert_to_numpy(layer(images))[:, :-1, :-1]  # No padding.
    np.testing.assert_allclose(y[..., 12:], -y[..., :12], atol=1e-12)
    y = y[..., :12].reshape(-1, 12)
    moments = y.T @ y / len(y)
    np.testing.assert_allclose(moments, np.diag(np.diag(moments)), atol=1e-9)
    # Each component has a mean square of s / (s + floor).
    patches = np.stack(
        [images[:, i : i + 16, j : j + 15] for i in (0, 1) for j in (0, 1)], -2
    ).reshape(-1, 12)
    squares = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    expected = squares / (squares + PatchWhitening.floor)
    np.testing.assert_allclose(np.diag(moments), expected, rtol=1e-9)


def test_fewer_filters_are_the_largest_components():
    images = images_of_correlated_pixels(4)
    kernels = []
    for filters in 24, 10:
        layer = PatchWhitening(filters)
        layer.build(images.shape)
        layer.adapt(images)
        kernels.append(keras.ops.convert_to_numpy(layer.kernel))
    np.testing.assert_array_equal(kernels[1][..., :5], kernels[0][..., :5])


@pytest.mark.parametrize(
    'filters, message',
    [
        (3, '`filters` must be even'),
        (0, '`filters` must be an integer, at least 2'),
        (26, '`filters` must be at most 24'),
    ],
)
def test_filters_must_fit_a_patch(filters, message):
    with pytest.raises(ValueError, match=message):
        PatchWhitening(filters).build((None, 8, 8, 3))


def test_a_training_adapts_the_network_and_does_not_train_its_filters():
    training = prepared(
        'import small_data',
        'train.load_data_fn = @small_data.images',
        'train.model_cls = @convnet.convnet',
        'train.num_epochs = 1',
        'convnet.convnet.filters = [2, 2]',
        'convnet.convnet.strides = "1, 2"',
        'convnet.convnet.whitened = 8',
    )
    model = training.model
    layer = model.layers[0]
    images, _ = take(training.datasets.train(), 16)
    expected = PatchWhitening(8)
    expected.build(images.shape)
    expected.adapt(images)
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    np.testing.assert_array_equal(
        kernel, keras.ops.convert_to_numpy(expected.kernel)
    )
    assert not layer.trainable_variables
    row = next(
        row
        for row in complexity(model, training.datasets.image_shape).layers
        if row.name == layer.name
    )
    assert row.macs > 0
