"""The drawn dataset: its spectra hold what its docstring says."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffstride.examples import data, gratings

N, CLASSES = gratings.SIZE, gratings.CLASSES


@pytest.fixture(scope='module')
def splits(data_dir):
    """Returns (pixels around 0, labels) of both splits."""
    splits = tfds.load('gratings', data_dir=data_dir, batch_size=-1)
    return {
        name: (split['image'][..., 0] / 255 - 0.5, split['label'])
        for name, split in tfds.as_numpy(splits).items()
    }


def test_splits_are_balanced_and_load_as_training_data(data_dir, splits):
    for split, count in (('train', 4000), ('test', 1000)):
        images, labels = splits[split]
        assert images.shape == (count, N, N)
        np.testing.assert_array_equal(np.bincount(labels), [count // 8] * 8)
    images = [*splits['train'][0], *splits['test'][0]]
    assert len({image.tobytes() for image in images}) == 5000
    # Drawing is deterministic.
    again = gratings.draw(np.arange(1000) % CLASSES, np.random.default_rng(1))
    stored = {image.tobytes() for image in splits['test'][0]}
    assert {image.tobytes() for image in again[..., 0] / 255 - 0.5} == stored
    builder = tfds.builder('gratings', data_dir=data_dir)
    assert builder.info.supervised_keys == ('image', 'label')
    assert builder.info.features['image'].dtype == np.uint8
    assert builder.url_infos is None
    datasets = data.load_datasets('gratings', data_dir)
    assert datasets.image_shape == (N, N, 1)
    assert datasets.class_names == tuple(f'pattern {i}' for i in range(1, 9))
    images, _ = next(iter(datasets.test))
    np.testing.assert_allclose(np.std(images), 1, atol=0.1)


def test_power_is_at_the_frequencies_along_the_width_alone(splits):
    images, _ = splits['train']
    power = np.mean(np.abs(np.fft.fft2(images) / N**2) ** 2, 0)[:, : N // 2 + 1]
    # White noise spreads its variance evenly over the N^2 frequencies.
    noise = power[8:25].mean()
    np.testing.assert_allclose(noise, 0.17**2 / N**2, rtol=0.05)
    # A grating has contrast^2 / 4; bends move some of it to the next rows.
    contrast = (0.040**3 - 0.024**3) / (3 * (0.040 - 0.024))
    stripes = power[[0, 1, 2, -1, -2]].sum(0)[list(gratings.FREQUENCIES)]
    np.testing.assert_allclose(stripes, contrast / 4 + 5 * noise, rtol=0.05)
    others = np.delete(power, gratings.FREQUENCIES, axis=1)[:, 1:]
    assert others.max() < 1.2 * noise


def test_all_classes_have_the_same_spectrum(splits):
    images, labels = splits['train']
    power = np.abs(np.fft.rfft(images.mean(1))) ** 2
    power = np.stack([power[labels == c].mean(0) for c in range(CLASSES)])
    power = power[:, list(gratings.FREQUENCIES)]
    assert np.all(np.abs(power / power.mean(0) - 1) < 0.1)


def matched(images, frequencies):
    """Returns the class whose first gratings fit best at any shift, [n]."""
    rows = np.fft.rfft(images.mean(1))
    scores = []
    for phases in gratings.PHASES:
        spectrum = np.zeros_like(rows)
        for f, phase in zip(frequencies, phases):
            spectrum[:, f] = rows[:, f] * np.exp(-1j * phase)
        scores.append(np.fft.irfft(spectrum, n=8 * N).max(-1))
    return np.argmax(scores, 0)


def test_phases_tell_the_class_and_a_stride_of_three_loses_them(splits):
    images, labels = splits['test']
    assert [f for f in gratings.FREQUENCIES if f < N / (2 * 3)] == [3, 4, 5]
    assert np.mean(matched(images, gratings.FREQUENCIES) == labels) > 0.99
    assert np.mean(matched(images, [3, 4, 5]) == labels) < 0.9
    # A linear readout does not suffice.
    (train, test), (labels, expected) = zip(splits['train'], splits['test'])
    train, test = train.reshape(-1, N * N), test.reshape(-1, N * N)
    gram = train.T @ train + 10 * np.eye(N * N)
    weights = np.linalg.solve(gram, train.T @ np.eye(CLASSES)[labels])
    assert np.mean((test @ weights).argmax(-1) == expected) < 0.3
