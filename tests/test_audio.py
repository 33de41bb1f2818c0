"""Tests of the example's recordings and of its networks for them."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from small_data import LocalBuilder, take

from diffstride.examples import audio

RATE = 1000
# Recordings shorter and longer than a second, one digit a tone of 110 Hz and
# the other of 310 Hz; of each digit four by each speaker.
LENGTHS = 600, 1000, 1500, 801


def recording(digit, length):
    time = np.arange(length) / RATE
    return np.round(9000 * np.cos(2 * np.pi * (110, 310)[digit] * time))


FEATURES = {
    'audio': tfds.features.Audio(sample_rate=RATE),
    'file': tfds.features.Text(),
    'speaker': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=['low', 'high']),
}


class TinyTones(LocalBuilder):
    parts = FEATURES

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for digit, speaker, (index, length) in itertools.product(
            range(2), ('anna', 'ben', 'carl'), enumerate(LENGTHS)
        ):
            name = f'{digit}_{speaker}_{index}.wav'
            samples = recording(digit, length).astype(np.int64)
            texts = {'file': name, 'speaker': speaker}
            yield name, {'audio': samples, 'label': digit, **texts}


@pytest.fixture(scope='session')
def load(data_dir):
    """A function that loads `TinyTones`, once for the same arguments."""
    defaults = dict(name='tiny_tones', data_dir=data_dir, batch_size=4)
    defaults.update(validation_split=None, test_filter='_ben_', time_shift=0)
    return functools.cache(functools.partial(audio.load_datasets, **defaults))


def raw(dataset, datasets):
    """Inputs before standardization, and labels as integers."""
    inputs, labels = take(dataset)
    return inputs * datasets.scale + datasets.mean, labels.argmax(-1)


def test_filter_holds_a_speaker_out(load):
    datasets = load()
    assert datasets.class_names == ('low', 'high')
    assert datasets.summary == (
        'tiny_tones: 16 train (8 to 8 of a class), no validation, 8 test (4 to '
        '4 of a class) examples of 64 x 64 x 1 in 2 classes'
    )
    # The speaker is told by a text feature of any name.
    assert load(test_filter='^ben$').summary == datasets.summary
    # Without a filter the splits are shares.
    datasets = load(test_filter=None, test_split=0.25, validation_split=0.5)
    assert datasets.summary.startswith('tiny_tones: 9 train')
    assert '9 validation' in datasets.summary and '6 test' in datasets.summary


def test_waveform_is_centred_and_scaled_to_its_peak(load):
    datasets = load(features='waveform')
    assert datasets.image_shape == (RATE, 1)
    waveforms, digits = raw(datasets.test, datasets)
    expected = []
    for digit, length in itertools.product(range(2), LENGTHS):
        samples = recording(digit, length)
        samples /= np.abs(samples).max()
        missing = max(RATE - length, 0)
        samples = np.pad(samples, (missing // 2, missing - missing // 2))
        start = (len(samples) - RATE) // 2
        expected.append(samples[start : start + RATE])
    distance = np.abs(waveforms[:, None, :, 0] - expected).max(-1)
    np.testing.assert_allclose(distance.min(1), 0, atol=1e-5)
    assert sorted(distance.argmin(1)) == list(range(8))
    np.testing.assert_array_equal(distance.argmin(1) // 4, digits)
    # Training inputs are standardized.
    inputs, _ = take(datasets.train(), datasets.steps_per_epoch)
    np.testing.assert_allclose(inputs.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(), 1, atol=1e-4)


def test_log_mel_is_that_of_each_recording_alone(load):
    datasets = load(num_mel_bins=20, num_frames=26)
    plain = load(features='waveform')
    waveforms, _ = raw(plain.test, plain)
    spectrograms, digits = raw(datasets.test, datasets)
    assert spectrograms.shape == (8, 20, 26, 1)
    # 25 steps of 40 samples, windows of 160, in float64.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(160) / 160)
    for waveform, spectrogram in zip(waveforms[..., 0], spectrograms):
        padded = np.pad(waveform, 128, mode='reflect')
        frames = np.stack([padded[i : i + 256] for i in range(0, 1001, 40)])
        frames = frames * np.pad(window, 48)
        power = np.abs(np.fft.rfft(frames)) ** 2
        mel = 10 * np.log10(np.maximum(power @ mel_matrix(20, 129), 1e-10)).T
        expected = np.maximum(mel - mel.max(), -60)
        np.testing.assert_allclose(spectrogram[..., 0], expected, atol=0.05)
    # The loudest bin lies at the tone.
    loudest = spectrograms[..., 13, 0].argmax(-1)
    assert len(set(loudest[digits == 0])) == len(set(loudest[digits == 1])) == 1
    assert loudest[digits == 0][0] < loudest[digits == 1][0]


def mel_matrix(bins, frequencies):
    """Triangles on the mel scale from 20 Hz to half the sample rate."""

    def mel(frequency):
        return 1127 * np.log1p(frequency / 700)

    edges = np.linspace(mel(20), mel(RATE / 2), bins + 2)
    x = mel(np.linspace(0, RATE / 2, frequencies))[:, None]
    rising = (x - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - x) / (edges[2:] - edges[1:-1])
    matrix = np.maximum(0, np.minimum(rising, falling))
    matrix[0] = 0
    return matrix


@pytest.mark.parametrize('axis', [1, 2])
def test_shift_moves_each_example_and_repeats_the_edges(axis):
    ramp = np.arange(10.0, dtype='float32')
    inputs = np.tile(ramp[:, None], (200, 3, 1, 1))
    inputs = np.moveaxis(inputs, 2, axis)
    key = tf.constant([1, 2])
    shifted = audio.shift(tf.constant(inputs), key, 3, axis).numpy()
    shifted = np.moveaxis(shifted, axis, 2)[..., 0]
    offsets = shifted[:, 0, 4] - 4
    assert set(offsets) == {-3, -2, -1, 0, 1, 2, 3}
    expected = np.clip(ramp + offsets[:, None], 0, 9)
    assert (shifted == expected[:, None]).all()


@pytest.mark.parametrize('axis', [1, 2])
def test_mask_sets_one_stretch_to_0(axis):
    inputs = np.random.default_rng(0).uniform(1, 2, (200, 10, 10, 1))
    masked = audio.mask(tf.constant(inputs), tf.constant([1, 2]), 3, axis)
    is_masked = masked.numpy() == 0
    np.testing.assert_array_equal(masked, np.where(is_masked, 0, inputs))
    is_masked = np.moveaxis(is_masked, axis, 1)[..., 0]
    assert (is_masked == is_masked[:, :, :1]).all()
    assert set(is_masked[:, :, 0].sum(1)) == {0, 1, 2, 3}
    edges = np.abs(np.diff(is_masked[:, :, 0].astype(int))).sum(1)
    assert edges.max() <= 2  # It is one stretch.
    assert is_masked[:, 0].any() and is_masked[:, -1].any()


def test_training_examples_are_shifted_and_masked(load):
    """So they are in a training that is resumed."""
    plain = {'num_mel_bins': 16, 'num_frames': 20}
    expected, _ = take(load(**plain).train(), 8)
    test, _ = take(load(**plain).test)
    shifts = {'time_shift': 0.2, 'frequency_shift': 3}
    masks = {'time_mask': 0.5, 'frequency_mask': 5}
    for name, value in {**shifts, **masks}.items():
        datasets = load(**plain, **{name: value})
        found, labels = take(datasets.train(), 8)
        changed = (found != expected).any(axis=(1, 2, 3))
        assert 0.3 < changed.mean() <= 1, name
        resumed, resumed_labels = take(datasets.train(1), 4)
        np.testing.assert_array_equal(resumed, found[16:])
        np.testing.assert_array_equal(resumed_labels, labels[16:])
        np.testing.assert_array_equal(take(datasets.test)[0], test)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'num_frames': 1}, '`num_frames` must be at least 2'),
        ({'num_frames': 2000}, 'at most 1001 in 1000 samples'),
        ({'test_filter': 'nobody'}, 'match some recordings and not all'),
        ({'test_filter': 'wav'}, 'match some recordings and not all'),
        ({'test_split': 'train'}, '`test_split` must not be set beside'),
        ({'name': 'gratings'}, 'one Audio and one ClassLabel'),
    ],
)
def test_what_does_not_fit_is_explained(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)
