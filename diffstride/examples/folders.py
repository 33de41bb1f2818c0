"""Reading of folders of labelled images.

    name/train/cat/1.png        name/cat/1.png
    name/test/dog/2.jpg         name/dog/2.jpg

The folder of a class may hold further folders. All visible files are read, or
counted in `ImageFolder.notes`. Nothing is written to the folder.
"""

import collections
import dataclasses
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from diffstride.validation import require

try:
    import PIL.Image

    _HAS_PILLOW = True
except ImportError:
    _HAS_PILLOW = False

# These are the first two bytes of the formats that TensorFlow decodes; Pillow
# decodes the others. Old versions of TensorFlow do not decode WebP.
_MAGIC = [b'\x89P', b'\xff\xd8', b'GI', b'BM']
_PILLOW_SUFFIXES = {'.pbm', '.pgm', '.pnm', '.ppm', '.tif', '.tiff', '.webp'}
if hasattr(tf.io, 'decode_webp'):
    _MAGIC.append(b'RI')
    _PILLOW_SUFFIXES.remove('.webp')
SUFFIXES = _PILLOW_SUFFIXES | set(
    '.bmp .gif .jfif .jpe .jpeg .jpg .png .webp'.split()
)
_SYSTEM_FOLDERS = {'__MACOSX', '$RECYCLE.BIN', '@eaDir', 'lost+found'}

# Results for fewer examples take less than seconds, and are not stored.
CACHED_EXAMPLES = 1_000

AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    The images of a split are in an order that looks random, is the same at
    each start and has every class evenly spread. So a slice such as
    'train[:80%]' holds about 80% of each class.

    Attributes:
        root: The path of the folder.
        class_names: The names of the classes, in alphabetical order.
        splits: Maps the name of each split to (paths, labels): strings [n]
            and integers [n].
        notes: Sentences about what was skipped or looks like a mistake.
    """

    root: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    notes: tuple[str, ...]


def read_folder(root: str, train_split: str = 'train') -> ImageFolder:
    """Lists the images of a folder.

    Args:
        root: The path of a folder. It has splits if one of its folders is
            called `train_split`, or if none of them holds images itself;
            otherwise its folders are the classes of a split 'train'.
        train_split: The name of the training split.

    Returns:
        The `ImageFolder`.

    Raises:
        ValueError: If there is no such folder.
    """
    require(os.path.isdir(root), '`name` must be an existing folder', name=root)
    skipped: collections.Counter[str] = collections.Counter()
    empty: list[str] = []
    found: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)

    def add_classes(split, folder):
        for name in _folders(folder):
            images = _images(os.path.join(folder, name), skipped)
            if images:
                found[split][name] = images
            else:
                empty.append(os.path.relpath(os.path.join(folder, name), root))

    folders = _folders(root)
    if train_split in folders or not any(
        _is_image(file) for name in folders for file in _files(root, name)
    ):
        for split in folders:
            add_classes(split, os.path.join(root, split))
            files = _files(root, split)
            _count_files(files, skipped)
            if not found[split] and not files and not _folders(root, split):
                empty.append(split)
    else:
        add_classes('train', root)
    _count_files(_files(root), skipped)
    names = tuple(sorted({name for split in found.values() for name in split}))
    return ImageFolder(
        root,
        names,
        {
            split: _spread(classes, names, root)
            for split, classes in sorted(found.items())
            if classes
        },
        tuple(_notes(skipped, empty, names)),
    )


def decode_image(
    contents: tf.Tensor, channels: int, dtype: tf.DType = tf.uint8
) -> tf.Tensor:
    """Decodes an image file, or the first image of an animation.

    Args:
        contents: The bytes of the file, a string [].
        channels: 1 or 3. Colors become grey and grey becomes RGB as needed;
            an alpha channel is dropped. 0 keeps what the file has.
        dtype: tf.uint8, or tf.uint16 to keep all 16 bits of files that have
            them. The values of other files are then multiplied by 257, so
            that 255 becomes 65,535.

    Returns:
        The image, [height, width, channels].
    """
    image = tf.cond(
        _is_known_to_tensorflow(contents),
        lambda: _decode_with_tensorflow(contents, dtype),
        lambda: tf.numpy_function(
            lambda x: _decode_with_pillow(x, dtype), [contents], dtype
        ),
    )
    image = tf.ensure_shape(image, (None, None, None))
    own = tf.shape(image)[-1]
    if channels == 0:
        return image
    image = image[..., : tf.where(own <= 2, 1, 3)]
    if channels == 3:
        shape = tf.concat([tf.shape(image)[:-1], [3]], 0)
        return tf.ensure_shape(tf.broadcast_to(image, shape), (None, None, 3))
    image = tf.cond(own <= 2, lambda: image, lambda: _grey(image))
    return tf.ensure_shape(image, (None, None, 1))


def measure(paths: Sequence[str]) -> np.ndarray:
    """Decodes images to find out their sizes and kinds.

    Args:
        paths: The paths of images, strings [n].

    Returns:
        The height, width, number of channels and bits (8 or 16) of each
        image, int32 [n, 4].

    Raises:
        ValueError: If some cannot be decoded. The message names them.
    """

    def kind(index, path):
        contents = tf.io.read_file(path)
        image = decode_image(contents, 0)
        bits = tf.cond(
            _is_known_to_tensorflow(contents),
            lambda: tf.where(_is_png_of_16_bits(contents), 16, 8),
            lambda: tf.numpy_function(
                lambda x: np.int32(8 * _open(x).itemsize), [contents], tf.int32
            ),
        )
        return index, tf.concat([tf.shape(image), [bits]], 0)

    kinds = np.zeros((len(paths), 4), np.int32)
    batches = tf.data.Dataset.from_tensor_slices(list(paths)).enumerate()
    batches = batches.map(kind, AUTOTUNE).ignore_errors().batch(1000)
    for indices, values in batches.as_numpy_iterator():
        kinds[indices] = values
    broken = [path for path, (height, *_) in zip(paths, kinds) if not height]
    if broken:
        raise ValueError(f'cannot decode the image {enumeration(broken)}')
    return kinds


def cached(
    key: str, files: Iterable[str], count: int, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns the array that `make` returns, and keeps it for the next start.

    It is kept in $XDG_CACHE_HOME/diffstride, or ~/.cache/diffstride, until
    the path, the size or the time of one of the files changes.

    Args:
        key: A text that names the computation and its parameters.
        files: The paths of the files that it is computed from.
        count: The number of examples. Results for few examples are not kept.
        make: A function that computes the array.
    """
    if count < CACHED_EXAMPLES:
        return make()
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    digest = hashlib.sha256(key.encode())
    path = pathlib.Path(home, 'diffstride', f'{digest.hexdigest()[:32]}.npz')
    try:
        for file in files:
            status = os.stat(file)
            line = f'\n{file} {status.st_size} {status.st_mtime_ns}'
            digest.update(line.encode(errors='surrogateescape'))
    except OSError:  # The files are not on a local disk.
        return make()
    fingerprint = digest.hexdigest()
    try:
        with path.open('rb') as kept, np.load(kept) as stored:
            if stored['fingerprint'] == fingerprint:
                return stored['array']
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # There is none yet, or only a part of it.
    array = make()
    part = path.with_suffix(f'.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open('wb') as new:
            np.savez(new, fingerprint=fingerprint, array=array)
        part.replace(path)
    except OSError:  # A full or read-only disk is no reason to stop.
        part.unlink(missing_ok=True)
    return array


def enumeration(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names and how many there are beyond them."""
    more = len(names) - most
    text = ', '.join(names[:most])
    return f'{text} and {more:,} more' if more > 0 else text


def _folders(*parts):
    """Returns the names of the visible folders in a folder, sorted."""
    with os.scandir(os.path.join(*parts)) as entries:
        return sorted(x.name for x in entries if _is_visible(x) and x.is_dir())


def _files(*parts):
    """Returns the paths of the visible files in a folder, sorted."""
    with os.scandir(os.path.join(*parts)) as entries:
        return sorted(
            x.path for x in entries if _is_visible(x) and not x.is_dir()
        )


def _is_visible(entry):
    return not entry.name.startswith('.') and (
        entry.name not in _SYSTEM_FOLDERS
    )


def _suffix(path):
    return os.path.splitext(path)[1].lower()


def _is_image(path):
    suffix = _suffix(path)
    return suffix in SUFFIXES and (
        _HAS_PILLOW or suffix not in _PILLOW_SUFFIXES
    )


def _images(folder, skipped, parents=()):
    """Returns the images in a folder, at any depth; counts other files."""
    parents = (*parents, os.path.realpath(folder))
    files = _files(folder)
    images = [file for file in files if _is_image(file)]
    skipped.update(_suffix(file) for file in files if not _is_image(file))
    for name in _folders(folder):
        inner = os.path.join(folder, name)
        if os.path.realpath(inner) not in parents:  # A link may lead back.
            images += _images(inner, skipped, parents)
    return images


def _count_files(files, skipped):
    """Counts the files outside of the folders of classes."""
    skipped.update(
        'outside' if _is_image(file) else _suffix(file) for file in files
    )


def _notes(skipped, empty, names):
    outside = skipped.pop('outside', 0)
    if outside:
        yield f'Skipped {outside:,} images that are in no folder of a class.'
    missing = sorted(_PILLOW_SUFFIXES & set(skipped)) if not _HAS_PILLOW else ()
    kinds = [
        f'{count:,} {suffix or "without suffix"}'
        for suffix, count in skipped.most_common()
    ]
    if kinds:
        yield f'Skipped {skipped.total():,} files: {enumeration(kinds)}.'
    if missing:
        yield f'To read {", ".join(missing)}: pip install pillow.'
    if empty:
        yield f'Skipped folders without images: {enumeration(empty)}.'
    alike = collections.defaultdict(list)
    for name in names:
        alike[name.lower()].append(name)
    pairs = [' and '.join(group) for group in alike.values() if len(group) > 1]
    if pairs:
        yield f'Classes that differ in case alone: {enumeration(pairs)}.'


def _spread(images, names, root):
    """Returns the paths and labels of a split, classes evenly spread."""
    paths, labels, positions, ranks = [], [], [], []
    for label, name in enumerate(names):
        files = [
            (hashlib.md5(_relative(path, root)).digest(), path)
            for path in images.get(name, ())
        ]
        for index, (rank, path) in enumerate(sorted(files)):
            paths.append(path)
            labels.append(label)
            positions.append((index + 0.5) / len(files))
            ranks.append(rank)
    order = sorted(range(len(paths)), key=lambda i: (positions[i], ranks[i]))
    return np.array(paths)[order], np.array(labels)[order]


def _relative(path, root):
    return (
        path[len(root) :].replace(os.sep, '/').encode(errors='surrogateescape')
    )


def _is_known_to_tensorflow(contents):
    return tf.reduce_any(tf.strings.substr(contents, 0, 2) == _MAGIC)


def _is_png(contents):
    return tf.strings.substr(contents, 0, 2) == _MAGIC[0]


def _is_png_of_16_bits(contents):
    return _is_png(contents) & (tf.strings.substr(contents, 24, 1) == b'\x10')


def _decode_with_tensorflow(contents, dtype):
    def decode_8_bits():
        return tf.io.decode_image(contents, expand_animations=False)

    if dtype == tf.uint8:
        return decode_8_bits()
    # For other formats TensorFlow multiplies by 256.
    return tf.cond(
        _is_png(contents),
        lambda: tf.io.decode_png(contents, dtype=tf.uint16),
        lambda: 257 * tf.cast(decode_8_bits(), tf.uint16),
    )


def _decode_with_pillow(contents, dtype):
    pixels = _open(contents)
    if dtype == tf.uint16 and pixels.dtype == np.uint8:
        return np.uint16(257) * pixels
    if dtype == tf.uint8 and pixels.dtype == np.uint16:
        return (pixels // 257).astype(np.uint8)
    return pixels


def _open(contents):
    """Reads an image by Pillow, uint8 or uint16 [height, width, 1 or 3]."""
    if not _HAS_PILLOW:
        raise ValueError('no image that TensorFlow decodes')
    with PIL.Image.open(io.BytesIO(contents)) as image:
        if image.mode.startswith('I'):
            pixels = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        else:
            is_grey = image.mode in ('1', 'L', 'LA')
            pixels = np.asarray(image.convert('L' if is_grey else 'RGB'))
    return pixels.reshape(*pixels.shape[:2], -1)


def _grey(image):
    # Rounding to the nearest is done here, on the scale of the image itself.
    weights = tf.constant([0.299, 0.587, 0.114])
    grey = tf.tensordot(tf.cast(image, tf.float32), weights, 1)
    return tf.cast(tf.round(grey), image.dtype)[..., None]
