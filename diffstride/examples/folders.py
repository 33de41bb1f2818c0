"""Folders of labelled images, and the decoding of images.

    name/train/cat/1.png        name/cat/1.png
    name/test/dog/2.jpg         name/dog/2.jpg

The folder of a class may hold further folders. All visible files are read, or
counted in `ImageFolder.notes`. Nothing is written to the folder.
"""

import collections
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
import PIL.Image
import tensorflow as tf

from diffstride.validation import require

SUFFIXES = set(
    '.bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp'
    .split()
)  # fmt: skip
# These are the first two bytes of the formats that TensorFlow decodes faster
# than Pillow: PNG, JPEG, GIF and BMP.
_MAGIC = [b'\x89P', b'\xff\xd8', b'GI', b'BM']
_SYSTEM_FOLDERS = {'__MACOSX', '$RECYCLE.BIN', '@eaDir', 'lost+found'}

# A part of a split is its name and where the part starts and stops.
Piece = tuple[str, int, int]


class ImageFolder:
    """A folder of images, a source of records that are paths.

    It has splits if one of its folders is called `train_split`, or if none of
    them holds images itself. Otherwise its folders are the classes of a split
    'train'. The images of a split are in an order that looks random, is the
    same at each start and has every class evenly spread. So a slice such as
    'train[:80%]' holds about 80% of each class.

    Attributes:
        name: The absolute path.
        class_names: The names of the classes, in alphabetical order.
        examples: Maps the name of each split to (paths, labels): strings [n]
            and integers [n].
        splits: Maps the name of each split to its number of images, in a list.
        notes: Sentences about what was skipped or looks like a mistake.

    Raises:
        ValueError: If there is no such folder.
    """

    # Labels are known without reading, and all records fit into a shuffle.
    knows_labels = True
    buffer = None

    def __init__(self, root: str, train_split: str = 'train'):
        root = os.path.expanduser(root)
        require(
            os.path.isdir(root), '`name` must be an existing folder', name=root
        )
        folders, files = _walk(root)
        images = [parts for parts in files if _suffix(parts) in SUFFIXES]
        has_splits = (train_split,) in folders or not any(
            len(parts) == 2 for parts in images
        )
        # The folder of a class is at this depth.
        depth = 2 if has_splits else 1
        found: dict[str, dict[str, list]] = {}
        for parts in images:
            if len(parts) > depth:
                split = parts[0] if has_splits else 'train'
                classes = found.setdefault(split, {})
                classes.setdefault(parts[depth - 1], []).append(parts)
        names = sorted({name for classes in found.values() for name in classes})
        self.name = os.path.abspath(root)
        self.class_names = tuple(names)
        self.examples = {
            split: _spread(root, classes, names)
            for split, classes in sorted(found.items())
        }
        self.splits = {k: [len(x)] for k, (x, _) in self.examples.items()}
        self.notes = tuple(_notes(folders, files, depth, names))

    def _select(self, pieces):
        parts = [
            [array[start:stop] for array in self.examples[split]]
            for split, start, stop in pieces
        ]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts))

    def records(self, pieces: Sequence[Piece]) -> tf.data.Dataset:
        """Returns a dataset of (record, label), always in one order."""
        return tf.data.Dataset.from_tensor_slices(self._select(pieces))

    def contents(self, record: tf.Tensor) -> tf.Tensor:
        """Returns the contents of the image file of a record."""
        return tf.io.read_file(record)

    def kind(self, pieces: Sequence[Piece]) -> tuple[set[tuple], int, tf.DType]:
        """Returns (height, width) of images, their channels and dtype."""
        paths, _ = self._select(pieces)
        return kind_of(paths.tolist())

    def check_images(self, pieces: Sequence[Piece]) -> None:
        """Raises a ValueError that names the first broken image, if any is."""
        for path in self._select(pieces)[0]:
            try:
                decode_image(self.contents(path), 3)
            except (tf.errors.OpError, OSError) as error:
                raise ValueError(f'cannot decode the image {path}') from error


def kind_of(
    images: Iterable[str | IO[bytes]],
) -> tuple[set[tuple], int, tf.DType]:
    """Returns the sizes of image files, their channels and dtype.

    It reads their headers alone.

    Raises:
        ValueError: If some are no images. The message names them.
    """
    sizes, has_colors, is_deep, broken = set(), False, False, []
    for file in images:
        try:
            with PIL.Image.open(file) as image:
                sizes.add(image.size[::-1])
                has_colors |= image.mode[0] not in '1LI'
                # The mode of a file of 3 x 16 bits is 'RGB'.
                layout = str(image.tile[0][3]) if image.tile else ''
                is_deep |= image.mode[0] == 'I' or ';16' in layout
        except OSError:
            broken.append(str(file))
    if broken:
        raise ValueError(f'cannot decode the image {enumeration(broken)}')
    dtype = tf.uint16 if is_deep else tf.uint8
    return sizes, 3 if has_colors else 1, dtype


def _walk(root):
    """Returns the visible folders and files below a folder, as parts of paths.

    Links are followed, but for those that lead back.
    """
    folders, files = [], []
    for path, inner, names in os.walk(root, followlinks=True):
        inner[:] = [
            name
            for name in sorted(inner)
            if name[0] != '.'
            and name not in _SYSTEM_FOLDERS
            and not _leads_back(os.path.join(path, name))
        ]
        parts = pathlib.Path(path).relative_to(root).parts
        folders += [(*parts, name) for name in inner]
        files += [(*parts, name) for name in sorted(names) if name[0] != '.']
    return folders, files


def _leads_back(path):
    return os.path.islink(path) and any(
        os.path.samefile(path, parent) for parent in pathlib.Path(path).parents
    )


def _suffix(parts):
    return os.path.splitext(parts[-1])[1].lower()


def _spread(root, classes, names):
    """Returns the paths and labels of a split, classes evenly spread."""
    rows = []
    for label, name in enumerate(names):
        ranked = sorted(
            (_digest(''.join(f'/{part}' for part in parts)), parts)
            for parts in classes.get(name, ())
        )
        rows += [
            ((i + 0.5) / len(ranked), rank, os.path.join(root, *parts), label)
            for i, (rank, parts) in enumerate(ranked)
        ]
    *_, paths, labels = zip(*sorted(rows))
    return np.array(paths), np.array(labels)


def _digest(text):
    return hashlib.md5(text.encode(errors='surrogateescape')).digest()


def _notes(folders, files, depth, names):
    suffixes = collections.Counter(map(_suffix, files))
    skipped = {k: n for k, n in suffixes.most_common() if k not in SUFFIXES}
    images = [parts for parts in files if _suffix(parts) in SUFFIXES]
    outside = sum(len(parts) <= depth for parts in images)
    if outside:
        yield f'Skipped {outside:,} images that are in no folder of a class.'
    if skipped:
        kinds = [f'{n:,} {k or "without suffix"}' for k, n in skipped.items()]
        yield f'Skipped {sum(skipped.values()):,} files: {enumeration(kinds)}.'
    held = {parts[:depth] for parts in images}
    empty = [x for x in folders if len(x) == depth and x not in held]
    if empty:
        empty = enumeration(['/'.join(parts) for parts in empty])
        yield f'Skipped folders without images: {empty}.'
    alike = collections.defaultdict(list)
    for name in names:
        alike[name.lower()].append(name)
    pairs = [' and '.join(group) for group in alike.values() if len(group) > 1]
    if pairs:
        yield f'Classes that differ in case alone: {enumeration(pairs)}.'


def enumeration(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names and how many there are beyond them."""
    more = len(names) - most
    text = ', '.join(names[:most])
    return f'{text} and {more:,} more' if more > 0 else text


def decode_image(
    contents: tf.Tensor, channels: int, dtype: tf.DType = tf.uint8
) -> tf.Tensor:
    """Decodes an image file, or the first image of an animation.

    With 1 or 3 channels, colors become grey and grey becomes RGB as needed; an
    alpha channel is dropped. With tf.uint16, the values of files of 8 bits are
    multiplied by 257, so that 255 becomes 65,535.

    Returns:
        The image, [height, width, channels].
    """
    image = tf.cond(
        tf.reduce_any(tf.strings.substr(contents, 0, 2) == _MAGIC),
        lambda: _decode_with_tensorflow(contents, dtype),
        lambda: tf.numpy_function(
            lambda x: _decode_with_pillow(x, dtype), [contents], dtype
        ),
    )
    image = tf.ensure_shape(image, (None, None, None))
    has_colors = tf.shape(image)[-1] > 2
    image = image[..., : tf.where(has_colors, 3, 1)]
    if channels == 1:
        image = tf.cond(has_colors, lambda: _grey(image), lambda: image)
    else:
        shape = tf.concat([tf.shape(image)[:2], [3]], 0)
        image = tf.broadcast_to(image, shape)
    return tf.ensure_shape(image, (None, None, channels))


def _decode_with_tensorflow(contents, dtype):
    def decode_8_bits():
        return tf.io.decode_image(contents, expand_animations=False)

    if dtype == tf.uint8:
        return decode_8_bits()
    # For formats other than PNG, TensorFlow multiplies by 256.
    return tf.cond(
        tf.strings.substr(contents, 0, 2) == _MAGIC[0],
        lambda: tf.io.decode_png(contents, dtype=tf.uint16),
        lambda: 257 * tf.cast(decode_8_bits(), tf.uint16),
    )


def _decode_with_pillow(contents, dtype):
    with PIL.Image.open(io.BytesIO(contents)) as image:
        if image.mode.startswith('I'):
            pixels = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        else:
            is_grey = image.mode in ('1', 'L', 'LA')
            image = image.convert('L' if is_grey else 'RGB')
            pixels = np.uint16(257) * np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if dtype == tf.uint16 else (pixels // 257).astype(np.uint8)


def _grey(image):
    # Rounding to the nearest is done here, on the scale of the image itself.
    weights = tf.constant([0.299, 0.587, 0.114])
    grey = tf.tensordot(tf.cast(image, tf.float32), weights, 1)
    return tf.cast(tf.round(grey), image.dtype)[..., None]
