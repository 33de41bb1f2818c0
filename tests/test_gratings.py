"""Tests of the drawn dataset."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffstride.examples import data, gratings


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('gratings')


@pytest.fixture(scope='session')
def splits(data_dir):
    """The arrays of both splits, as {split: {feature: array}}."""
    splits = tfds.load('gratings', data_dir=data_dir, batch_size=-1)
    return tfds.as_numpy(splits)


def power(images, axis):
    """The power at the frequencies of the classes along an axis, [n, 8]."""
    pixels = images[..., 0].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(pixels, axis=axis)) ** 2
    other = 3 - axis
    return spectrum.mean(other)[:, list(gratings.FREQUENCIES)]


@pytest.mark.parametrize('split, count', [('train', 4000), ('test', 1000)])
def test_sizes_and_balance(splits, split, count):
    images, labels = splits[split]['image'], splits[split]['label']
    assert images.shape == (count, 32, 32, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), [count // 8] * 8)


def test_builder_needs_no_files_of_its_own(data_dir, splits):
    builder = tfds.builder('gratings', data_dir=data_dir)
    assert builder.info.supervised_keys == ('image', 'label')
    assert builder.info.features['label'].names[0] == '6 cycles'
    assert builder.url_infos is None


def test_loads_as_training_data(data_dir, splits):
    datasets = data.load_datasets('gratings', data_dir)
    assert datasets.image_shape == (32, 32, 1)
    assert datasets.num_classes == 8
    images, _ = next(iter(datasets.test))
    np.testing.assert_allclose(np.std(images), 1, atol=0.1)


def test_drawing_is_deterministic():
    labels = np.arange(8)
    first, again, other = (
        gratings.draw(labels, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


def test_splits_share_no_image(splits):
    images = np.concatenate([splits[s]['image'] for s in ('train', 'test')])
    assert len({image.tobytes() for image in images}) == 5000


def test_frequency_along_the_width_tells_the_class(splits):
    images, labels = splits['test']['image'], splits['test']['label']
    assert np.mean(power(images, axis=2).argmax(-1) == labels) > 0.99


def test_frequency_along_the_height_tells_nothing(splits):
    images, labels = splits['test']['image'], splits['test']['label']
    assert np.mean(power(images, axis=1).argmax(-1) == labels) < 0.2


def test_classes_lie_beyond_a_stride_of_three():
    assert min(gratings.FREQUENCIES) > gratings.SIZE / (2 * 3)
    assert max(gratings.FREQUENCIES) < gratings.SIZE / 2


def test_linear_readout_does_not_suffice(splits):
    train, test = (
        (
            splits[s]['image'].reshape(-1, 32 * 32) / 255 - 0.5,
            splits[s]['label'],
        )
        for s in ('train', 'test')
    )
    pixels, labels = train
    gram = pixels.T @ pixels + 10 * np.eye(32 * 32)
    weights = np.linalg.solve(gram, pixels.T @ np.eye(8)[labels])
    pixels, labels = test
    assert np.mean((pixels @ weights).argmax(-1) == labels) < 0.3
