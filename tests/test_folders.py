"""Tests of folders of images."""

import itertools
import os

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from small_data import take

from diffstride.examples import data, folders

HEIGHT, WIDTH = 6, 8
SHAPE = HEIGHT, WIDTH, 3


def write_image(path, shape=SHAPE, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full(shape, level, np.uint8)
    path.write_bytes(tf.io.encode_png(image).numpy())


def load_folder(root, **arguments):
    plain = dict(batch_size=2, crop_padding=0, normalization=None)
    plain['validation_split'] = None
    return data.load_datasets(str(root), **plain | arguments)


@pytest.fixture
def folder(tmp_path):
    """A folder of images: 3 of cats and 3 of dogs in each split."""
    root = tmp_path / 'photos'
    # Grey images become RGB and the alpha channel is dropped.
    for split, (animal, level), channels in itertools.product(
        ('train', 'test'), (('cat', 50), ('dog', 200)), (1, 3, 4)
    ):
        path = root / split / animal / f'{channels}.png'
        write_image(path, (HEIGHT, WIDTH, channels), level)
    return root


def test_folder_of_images(folder):
    datasets = load_folder(folder, batch_size=6)
    assert datasets.class_names == ('cat', 'dog')
    assert datasets.image_shape == SHAPE
    assert datasets.summary == (
        f'{folder}: 6 train (3 to 3 of a class), no validation, 6 test (3 to 3 '
        'of a class) examples of 6 x 8 x 3 in 2 classes'
    )
    for images, labels in take(datasets.train(), 1), take(datasets.test):
        assert labels.sum(0).tolist() == [3, 3]
        levels = 50 * labels[:, 0] + 200 * labels[:, 1]
        assert (images == levels[:, None, None, None]).all()


def test_folder_without_splits_is_sliced_evenly(tmp_path):
    for name, index in itertools.product('ab', range(10)):
        level = 10 * index + (name == 'b')
        write_image(tmp_path / name / f'{index}.png', level=level)
    datasets = load_folder(tmp_path, validation_split=0.25, test_split=0.2)
    training = take(datasets.train(), datasets.steps_per_epoch)
    parts = [training, take(datasets.validation), take(datasets.test)]
    for (_, labels), count in zip(parts, (6, 2, 2), strict=True):
        assert labels.sum(0).tolist() == [count, count]
    images, labels = map(np.concatenate, zip(*parts))
    levels = images[:, 0, 0, 0]
    assert len(set(levels)) == 20
    np.testing.assert_array_equal(levels % 10, labels.argmax(-1))
    slices = {'train_split': 'train[:80%]', 'test_split': 'train[80%:]'}
    sliced = take(load_folder(tmp_path, **slices).test)
    np.testing.assert_array_equal(sliced[0], parts[2][0])


def test_what_is_no_class_and_no_image_is_named(folder, monkeypatch):
    """Images of a class may lie deeper; a link that leads back ends there."""
    write_image(folder / 'train/cat/black/deep/0.png')
    (folder / 'train/cat/black/up').symlink_to('..')
    for name in ('.git/x/0', 'train/.ipynb_checkpoints/0', 'train/__MACOSX/0',
                 'train/cat/._0', 'train/outside'):  # fmt: skip
        write_image(folder / f'{name}.png')
    (folder / 'train/empty').mkdir()
    (folder / 'docs/api').mkdir(parents=True)
    for name in 'labels.csv', 'train/cat/a.txt', 'docs/b.txt', 'docs/api/c.txt':
        (folder / name).write_text('text')
    monkeypatch.chdir(folder.parent)  # A folder beside is found by its name.
    datasets = load_folder('photos')
    assert datasets.class_names == ('cat', 'dog')
    assert '/photos: 7 train (3 to 4 of a class)' in datasets.summary
    assert datasets.summary.splitlines()[1:] == [
        'Skipped 1 images that are in no folder of a class.',
        'Skipped 4 files: 3 .txt, 1 .csv.',
        'Skipped folders without images: docs/api, train/empty.',
    ]


def test_classes_that_a_split_lacks_or_of_two_cases_are_named(folder):
    """A split called val is for validation."""
    write_image(folder / 'train/B/0.png')
    write_image(folder / 'val/dog/0.png', level=7)
    write_image(folder / 'test/b/0.png')
    datasets = load_folder(folder, validation_split='auto')
    images, labels = take(datasets.validation)
    assert labels.tolist() == [[0, 0, 0, 1]] and (images == 7).all()
    assert datasets.class_names == ('B', 'b', 'cat', 'dog')
    assert datasets.summary.splitlines()[1:] == [
        'Classes without train examples: b.',
        'Classes without validation examples: B, b, cat.',
        'Classes without test examples: B.',
        'Classes that differ in case alone: B and b.',
    ]


IMAGE = np.indices((HEIGHT, WIDTH)).sum(0)[..., None] * [[[3, 2, 1]]] + 100
# The greatest error of an image by the suffix of its file.
ERRORS = {'bmp': 0, 'gif': 4, 'jpg': 5, 'png': 0, 'PPM': 0, 'tif': 0, 'webp': 0}


def encoded(path):
    """Writes IMAGE in the format of the path's suffix; returns the contents."""
    options = {'.jpg': {'quality': 95, 'subsampling': 0}}
    options['.webp'] = {'lossless': True}
    image = PIL.Image.fromarray(IMAGE.astype(np.uint8))
    image.save(path, **options.get(path.suffix, {}))
    return path.read_bytes()


@pytest.mark.parametrize('dtype', [tf.uint8, tf.uint16])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('suffix', ERRORS)
def test_decode_image(suffix, channels, dtype, tmp_path):
    contents = encoded(tmp_path / f'image.{suffix}')
    image = folders.decode_image(contents, channels, dtype)
    expected = IMAGE if channels == 3 else IMAGE @ [[0.299], [0.587], [0.114]]
    assert image.dtype == dtype
    scale = 257 if dtype == tf.uint16 else 1
    tolerance = ERRORS[suffix] + (0 if channels == 3 else 0.51)
    np.testing.assert_allclose(image / scale, expected, atol=tolerance + 1e-3)


def test_grey_images_stay_grey_and_constant_ones_unscaled(folder):
    assert load_folder(folder).image_shape[-1] == 3
    for path in folder.rglob('*.png'):
        write_image(path, (HEIGHT, WIDTH, 1), level=9)
    write_image(path, (HEIGHT, WIDTH, 2), level=9)  # With an alpha channel.
    datasets = load_folder(folder)
    assert datasets.image_shape == (HEIGHT, WIDTH, 1)
    assert (take(datasets.test)[0] == 9).all()
    # A constant channel is not scaled.
    images, _ = take(load_folder(folder, normalization='dataset').test)
    np.testing.assert_allclose(images, 0, atol=1e-5)


@pytest.mark.parametrize(
    'suffix, channels', [('png', 1), ('png', 3), ('tif', 1), ('pgm', 1)]
)
def test_16_bits_keep_small_values(tmp_path, suffix, channels):
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).repeat(channels)
    values = values.reshape(HEIGHT, WIDTH, channels)
    path = tmp_path / 'bits' / f'16.{suffix}'
    path.parent.mkdir()
    if suffix == 'png':
        path.write_bytes(tf.io.encode_png(values).numpy())
    elif suffix == 'pgm':  # Pillow writes it with 8 bits.
        header = f'P5 {WIDTH} {HEIGHT} 65535\n'.encode()
        path.write_bytes(header + values.astype('>u2').tobytes())
    else:
        PIL.Image.fromarray(values[..., 0]).save(path)
    all_of = {'batch_size': 1, 'test_split': 'train'}
    datasets = load_folder(tmp_path, normalization='dataset', **all_of)
    images, _ = take(datasets.test)
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(images[0], expected, atol=1e-4)
    write_image(path.with_name('8.png'), (HEIGHT, WIDTH, 1))
    images, _ = take(load_folder(tmp_path, **all_of).test)
    images = images[np.argsort(images.mean((1, 2, 3)))]
    np.testing.assert_allclose(images[0], values / 257, rtol=1e-6)
    np.testing.assert_allclose(images[1], 100, rtol=1e-6)


@pytest.mark.parametrize('suffix', ERRORS)
def test_a_broken_image_is_named(folder, suffix):
    path = folder / 'test' / 'cat' / f'broken.{suffix}'
    path.write_bytes(b'no image')
    message = f'cannot decode the image {path}'
    with pytest.raises(ValueError, match=message):
        load_folder(folder, cache=False)
    path.write_bytes(encoded(path)[:-15])  # It has a whole header.
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


@pytest.mark.parametrize('content', [None, 'train', 'train/cat'])
def test_folder_must_hold_images(tmp_path, content):
    os.makedirs(tmp_path / (content or ''), exist_ok=True)
    rule = '`name` must be a folder that holds one folder of images per class'
    with pytest.raises(ValueError, match=rule):
        load_folder(tmp_path)


@pytest.mark.parametrize('cache', [True, False])
def test_class_weights_balance_the_classes(folder, cache):
    (folder / 'train/cat/1.png').rename(folder / 'train/dog/2.png')
    datasets = load_folder(folder, class_weights='balanced', cache=cache)
    # 6 examples in 2 classes: 2 cats and 4 dogs.
    assert datasets.class_weights == (6 / (2 * 2), 6 / (2 * 4))
    assert load_folder(folder).class_weights is None
