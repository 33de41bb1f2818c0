"""Tests of the example's datasets."""

import functools
import itertools
import threading

import filelock
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from small_data import LocalBuilder, take

from diffstride.examples import augmentation, data, folders, sources

HEIGHT, WIDTH = 6, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (53, HEIGHT, WIDTH, 3))
TRAIN, TEST = np.split(PIXELS.astype(np.uint8), [40])
PLAIN = dict(crop_padding=0, normalization=None)
FEATURES = {
    'id': tfds.features.Text(),
    'image': tfds.features.Image(shape=(HEIGHT, WIDTH, 3)),
    'label': tfds.features.ClassLabel(num_classes=len(TRAIN)),
}


class TinyNoise(LocalBuilder):
    """Images of noise, each its own class: a label tells the example."""

    parts = FEATURES

    def _split_generators(self, dl_manager):
        return {
            'train': self._generate_examples(TRAIN),
            'test': self._generate_examples(TEST),
            'unlabelled': self._generate_examples(TEST, labelled=False),
        }

    def _generate_examples(self, images, labelled=True):
        for index, image in enumerate(images):
            label = index if labelled else -1
            yield index, {'id': str(index), 'image': image, 'label': label}


class TinyPhotos(TinyNoise):
    """Images whose sizes are not known before they are read."""

    parts = FEATURES | {'image': tfds.features.Image(shape=(None, None, 3))}

    def _split_generators(self, dl_manager):
        return super()._split_generators(dl_manager) | {
            'small': self._generate_examples(TEST[:, 1:])
        }


class TinyOffline(TinyNoise):
    def _split_generators(self, dl_manager):
        raise ConnectionError('Name or service not known')


class TinyPair(TinyNoise):
    parts = FEATURES | {'other': FEATURES['image']}


class TinyUnlabelled(TinyNoise):
    parts = FEATURES | {'label': tfds.features.Text()}


@pytest.fixture(scope='session')
def load(data_dir):
    """A function that loads `TinyNoise`, once for the same arguments."""
    load = functools.partial(data.load_datasets, 'tiny_noise', data_dir)
    return functools.cache(
        functools.partial(load, batch_size=8, validation_split=None)
    )


def test_datasets_describe_their_batches(load):
    datasets = load()
    assert datasets.image_shape == (HEIGHT, WIDTH, 3)
    assert datasets.class_names == tuple(map(str, range(40)))
    assert datasets.validation is None
    assert datasets.summary.splitlines() == [
        'tiny_noise: 40 train (1 to 1 of a class), no validation, '
        '13 test (0 to 1 of a class) examples of 6 x 8 x 3 in 40 classes',
        'Classes without test examples: 13, 14, 15, 16, 17 and 22 more.',
        'Splits that are not used: unlabelled.',
    ]
    for images, labels in take(datasets.train(), 1), take(datasets.test, 1):
        assert images.shape == (8, HEIGHT, WIDTH, 3)
        assert images.dtype == labels.dtype == 'float32'
        np.testing.assert_array_equal(labels, np.eye(40)[labels.argmax(-1)])


@pytest.mark.parametrize('cache', [True, False])
def test_an_epoch_shuffles_full_batches_and_a_test_serves_all(load, cache):
    weighted = {'class_weights': 'balanced', **PLAIN}
    datasets = load(batch_size=12, cache=cache, **weighted)
    assert datasets.class_weights == (1.0,) * 40
    assert [len(images) for images, _ in datasets.test] == [12, 1]
    images, labels = take(datasets.test)
    np.testing.assert_array_equal(np.sort(labels.argmax(-1)), range(13))
    np.testing.assert_array_equal(images, TEST[labels.argmax(-1)])
    assert datasets.steps_per_epoch == 3
    images, labels = take(datasets.train(), 6)
    examples = labels.argmax(-1)
    np.testing.assert_array_equal(images, TRAIN[examples])
    first, second = examples.reshape(2, 36)
    assert len(set(first)) == len(set(second)) == 36
    assert set(first) != set(second)
    assert (first != second).any() and (first != np.sort(first)).any()


@pytest.mark.parametrize('cache', [True, False])
def test_training_resumes_at_any_epoch(load, cache):
    arguments = {'mixup_alpha': 0.2, 'crop_padding': 2, 'cache': cache}
    tf.random.set_seed(1)
    images, labels = take(load(**arguments).train(), 20)
    load.cache_clear()
    tf.random.set_seed(2)
    resumed = take(load(**arguments).train(3), 5)
    np.testing.assert_array_equal(images[-40:], resumed[0])
    np.testing.assert_array_equal(labels[-40:], resumed[1])
    # Another seed draws another stream.
    other = take(load(seed=2**32 - 1, **arguments).train(3), 5)
    assert (resumed[0] != other[0]).mean() > 0.5
    assert (resumed[1] != other[1]).any()


def test_flip_mirrors_half_of_the_images(load):
    images, labels = take(load(**PLAIN | {'flip': True}).train(), 50)
    originals = TRAIN[labels.argmax(-1)]
    kept = (images == originals).all((1, 2, 3))
    mirrored = (images == originals[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_crops_shift_by_at_most_the_padding(load):
    datasets = load(crop_padding=2, normalization='dataset')
    images, labels = take(datasets.train(), 50)
    plain, plain_labels = take(load(crop_padding=0).train(), 5)
    originals = plain[np.argsort(plain_labels.argmax(-1))]
    padded = np.pad(originals, [(0, 0), (2, 2), (2, 2), (0, 0)])
    padded = padded[labels.argmax(-1)]
    shifts = [
        (images == padded[:, y : y + HEIGHT, x : x + WIDTH]).all((1, 2, 3))
        for y, x in itertools.product(range(5), repeat=2)
    ]
    np.testing.assert_array_equal(np.sum(shifts, 0), 1)
    assert np.any(shifts, -1).all()


def test_mixup_mixes_images_and_labels_alike(load):
    images, labels = take(load(mixup_alpha=1.0, **PLAIN).train(), 5)
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    assert labels.min() >= 0
    assert ((labels > 0).sum(-1) == 2).all()
    # Lambda is drawn for each image.
    assert len(set(labels.max(-1))) == len(labels)
    mixed = np.einsum('bk,khwc->bhwc', labels, TRAIN.astype(np.float64))
    np.testing.assert_allclose(images, mixed, atol=1e-3)


@pytest.mark.parametrize('alpha', [1e-9, 0.01, 0.2, 1.0, 30.0, 1e15])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    ones = tf.one_hot(tf.range(20_000) % 2, 2)
    _, labels = augmentation.mixup(ones[:, None, None], ones, [1, 2], alpha)
    # Neighbours differ, so that the first class's share is lambda or
    # 1 - lambda, which are distributed alike.
    share = labels.numpy()[:, 0]
    assert np.isfinite(share).all()
    np.testing.assert_allclose(share.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(share.var(), 0.25 / (2 * alpha + 1), atol=0.01)


def test_normalization_standardizes_each_channel_or_scales_pixels(load):
    datasets = load(crop_padding=0)
    images, labels = take(datasets.train(), 5)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-5)
    images, labels = take(datasets.test)
    mean, deviation = TRAIN.mean((0, 1, 2)), TRAIN.std((0, 1, 2))
    expected = (TEST[labels.argmax(-1)] - mean) / deviation
    np.testing.assert_allclose(images, expected, atol=1e-5)
    # Others rebuild the preprocessing from these.
    np.testing.assert_allclose(datasets.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(datasets.scale, deviation, rtol=1e-5)
    images, labels = take(load(normalization='unit').test)
    np.testing.assert_allclose(images, TEST[labels.argmax(-1)] / 255, rtol=1e-6)


@pytest.mark.parametrize('cache', [True, False])
def test_image_size_resizes_with_antialiasing(load, cache):
    datasets = load(image_size=(3, 5), normalization=None, cache=cache)
    assert datasets.image_shape == (3, 5, 3)
    assert next(iter(datasets.train()))[0].shape == (8, 3, 5, 3)
    images, labels = take(datasets.test)
    expected = tf.image.resize(TEST[labels.argmax(-1)], (3, 5), antialias=True)
    np.testing.assert_allclose(images, expected, atol=0.51)


@pytest.mark.parametrize(
    'splits, train, validation, test',
    [
        (('train[:50%]', None, 'train[50%:]'), (0, 20), None, (20, 40)),
        (('train[:20]', 0.1, 'train[-5:]'), (0, 18), (18, 20), (35, 40)),
        (('train', 0.25, 0.5), (0, 15), (15, 20), (20, 40)),
        (('train', 'auto', 'test'), (0, 36), (36, 40), (0, 13)),
        (('train', 'test', 'test'), (0, 40), (0, 13), (0, 13)),
    ],
)
def test_splits_are_names_slices_or_shares(splits, train, validation, test):
    pieces = sources.resolve_splits({'train': [40], 'test': [13]}, *splits)
    limits = {name: piece[1:] for name, (piece,) in pieces.items()}
    assert limits.pop('validation', None) == validation
    assert limits == {'train': train, 'test': test}


def test_slices_hold_what_tfds_stores_there(load, data_dir):
    def classes_of(dataset):
        return set(take(dataset)[1].argmax(-1).tolist())

    splits = {'train_split': 'train[:20]', 'validation_split': 0.1}
    datasets = load(**splits, test_split='train[-5:]', **PLAIN)
    assert datasets.steps_per_epoch == 2 and ': 18 train' in datasets.summary
    builder = tfds.builder('tiny_noise', data_dir=data_dir)
    stored = [int(x['label']) for x in builder.as_dataset('train')]
    assert classes_of(datasets.train().take(4)) <= set(stored[:18])
    assert classes_of(datasets.validation) == set(stored[18:20])
    assert classes_of(datasets.test) == set(stored[35:])


def test_splits_are_cut_between_shards_and_what_they_share_is_told():
    shards = {'train': [3, 4, 5], 'test': [2]}
    pieces = sources.resolve_splits(shards, 'train[1shard:]', None, 'train[9:]')
    assert pieces == {'train': [('train', 3, 12)], 'test': [('train', 9, 12)]}
    note, _ = sources.notes_on(shards, pieces)
    assert note == '3 examples belong both to train and to test.'


def test_sizes_that_tfds_does_not_know_are_read(data_dir, monkeypatch):
    load = functools.partial(data.load_datasets, 'tiny_photos', data_dir, 8)
    assert load().image_shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match=r'5 x 8 and 6 x 8: set .*image_size'):
        load(test_split='small')
    # With an image_size they are not needed.
    monkeypatch.delattr(folders, 'kind_of')
    assert load(test_split='small', image_size=(4, 4)).image_shape == (4, 4, 3)


def test_one_process_prepares_a_dataset_and_others_wait(tmp_path):
    arguments = 'tiny_noise', tmp_path, 8
    loading = threading.Thread(target=data.load_datasets, args=arguments)
    with filelock.FileLock(tmp_path / 'tiny_noise.lock'):
        loading.start()
        loading.join(1)
        assert [x.name for x in tmp_path.iterdir()] == ['tiny_noise.lock']
    loading.join()
    assert (tmp_path / 'tiny_noise').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'name': 'gratngs'}, 'must be a TFDS .*did you mean gratings'),
        ({'name': 'no name!'}, "cannot open the dataset 'no name!'"),
        ({'name': 'gratings/big'}, "cannot open the dataset 'gratings/big'"),
        ({'name': 'gratings:9.9.9'}, 'cannot be loaded at version 9.9.9'),
        ({'name': 'tiny_offline'}, 'is not in .*service not known.*data_dir'),
        ({'name': 'tiny_pair'}, r'one Image and .*other \(Image\)'),
        ({'name': 'tiny_unlabelled'}, r'one ClassLabel .*: .*label \(Text\)'),
        ({'train_split': 'validation'}, r"train_split` .*'test', 'train', "),
        ({'test_split': 'test[99:]'}, '`test_split` must be one of'),
        ({'test_split': 'test[:0]'}, '`test_split` must be one of'),
        ({'test_split': 'test[:x]'}, '`test_split` must be one of'),
        ({'validation_split': 0.01}, '`validation_split` must be a share of'),
        ({'test_split': 'unlabelled'}, "split 'unlabelled' has no labels"),
        ({'batch_size': 37}, '`batch_size` must be at most 36,'),
    ],
)
def test_wrong_dataset_is_explained(data_dir, arguments, message):
    arguments = {'name': 'tiny_noise', 'data_dir': data_dir} | arguments
    with pytest.raises(ValueError, match=message):
        data.load_datasets(**{'batch_size': 8} | arguments)
