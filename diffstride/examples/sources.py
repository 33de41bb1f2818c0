"""Sources of examples: folders of images and datasets of TFDS."""

import difflib
import functools
import itertools
import math
import operator
import os
import pathlib
import re
import socket
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from diffstride.examples import (
    folders,
    gratings,  # noqa: F401, registers 'gratings'
)
from diffstride.validation import is_finite, require

# These names are common for the split that a training is watched on.
VALIDATION_NAMES = 'validation', 'valid', 'val', 'dev'

AUTOTUNE = tf.data.AUTOTUNE

# A part of a split is its name and where the part starts and stops.
Piece = tuple[str, int, int]


class FolderSource:
    """A folder of images. Its records are paths.

    Attributes:
        name: The path.
        class_names: The names of the classes.
        notes: See `folders.ImageFolder`.
        splits: Maps names to `tfds.core.SplitInfo`.
        knows_labels: Whether `labels` returns without reading examples.
        buffer: The number of records to shuffle at a time; None for all.
    """

    knows_labels = True
    buffer = None

    def __init__(self, name: str, train_split: str):
        folder = folders.read_folder(
            os.path.expanduser(name), split_name(train_split)
        )
        if not folder.splits:
            raise ValueError(
                '`name` must be a folder that holds one folder of images per '
                'class, in each split or without splits. Received: '
                f'name={name!r}. {" ".join(folder.notes)}'.strip()
            )
        self.name = os.path.abspath(folder.root)
        self.class_names = folder.class_names
        self.notes = folder.notes
        self.splits = {
            split: tfds.core.SplitInfo(
                name=split, shard_lengths=[len(paths)], num_bytes=0
            )
            for split, (paths, _) in folder.splits.items()
        }
        self._examples = folder.splits

    def _select(self, pieces):
        parts = [
            [array[start:stop] for array in self._examples[split]]
            for split, start, stop in pieces
        ]
        return [np.concatenate(arrays) for arrays in zip(*parts)]

    def files(self, pieces: Sequence[Piece]) -> list[str]:
        """Returns the paths of the files that hold these pieces."""
        return self._select(pieces)[0].tolist()

    def labels(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Returns the labels, integers [n]."""
        return self._select(pieces)[1]

    def records(self, pieces: Sequence[Piece]) -> tf.data.Dataset:
        """Returns a dataset of (record, label), always in one order."""
        return tf.data.Dataset.from_tensor_slices(tuple(self._select(pieces)))

    def contents(self, record: tf.Tensor) -> tf.Tensor:
        """Returns the contents of the image file of a record."""
        return tf.io.read_file(record)

    def shape(
        self,
        pieces: Sequence[Piece],
        image_size: tuple[int, int] | None,
        channels: int | None,
    ) -> tuple[tuple[int, int, int], tf.DType]:
        """Returns (height, width, channels), and the dtype, of the images."""
        paths = self.files(pieces)
        kinds = folders.cached(
            f'kinds of {self.name}',
            paths,
            len(paths),
            lambda: folders.measure(paths),
        )
        channels = channels or (3 if (kinds[:, 2] > 2).any() else 1)
        dtype = tf.uint16 if (kinds[:, 3] == 16).any() else tf.uint8
        return (*(image_size or _size([kinds[:, :2]])), channels), dtype


class TfdsSource:
    """A dataset of TFDS. Its records are encoded images.

    It has the attributes and methods of `FolderSource`.
    """

    notes = ()
    knows_labels = False
    # This is about 1 GB of ImageNet. TFDS stores examples shuffled already.
    buffer = 10_000

    def __init__(self, name: str, data_dir: str | os.PathLike | None):
        self._builder = open_builder(name, data_dir, _image_keys)
        self._keys = _image_keys(self._builder)
        features = self._builder.info.features
        image_key, label_key = self._keys
        self._image = features[image_key]
        self.name = name
        self.class_names = tuple(features[label_key].names)
        self.splits = self._builder.info.splits

    def files(self, pieces: Sequence[Piece]) -> list[str]:
        return sorted(map(str, self._builder.data_path.iterdir()))

    def labels(self, pieces: Sequence[Piece]) -> np.ndarray:
        labels = self.records(pieces).map(lambda _, label: label).batch(1000)
        return np.concatenate(list(labels.as_numpy_iterator()))

    def records(self, pieces: Sequence[Piece]) -> tf.data.Dataset:
        image, label = self._keys
        decoders = {image: tfds.decode.SkipDecoding()}
        dataset = read_pieces(self._builder, pieces, decoders)
        return dataset.map(lambda x: (x[image], x[label]))

    def contents(self, record: tf.Tensor) -> tf.Tensor:
        return record

    def shape(
        self,
        pieces: Sequence[Piece],
        image_size: tuple[int, int] | None,
        channels: int | None,
    ) -> tuple[tuple[int, int, int], tf.DType]:
        *own_size, own_channels = self._image.shape
        if image_size is None and None in own_size:
            sizes = self.records(pieces).map(
                lambda image, _: tf.shape(folders.decode_image(image, 0))[:2],
                AUTOTUNE,
            )
            image_size = _size(sizes.batch(1000).as_numpy_iterator())
        shape = *(image_size or own_size), channels or own_channels or 3
        return shape, tf.as_dtype(self._image.np_dtype)


def _size(batches):
    """Returns the (height, width) of all images, given in batches [n, 2]."""
    found = set()
    for sizes in batches:
        found.update(map(tuple, np.unique(sizes, axis=0).tolist()))
        if len(found) > 1:
            (a, b), (c, d) = min(found), max(found)
            raise ValueError(
                f'images differ in size, {a} x {b} and {c} x {d}: set '
                'data.load_datasets.image_size = (height, width)'
            )
    return found.pop()


def is_folder(name: str, train_split: str) -> bool:
    """Returns whether a name is a folder, rather than a TFDS dataset."""
    return (
        name.startswith(('/', '.', '~'))
        or os.path.isdir(os.path.join(name, split_name(train_split)))
        or (os.path.isdir(name) and name not in tfds.list_builders())
    )


def split_name(split: str) -> str:
    """Returns 'train' for 'train', 'train[:80%]' and 'train[:10]+test'."""
    return re.split(r'[\[+]', split)[0]


def check_splits(
    train_split: str,
    validation_split: str | float | None,
    test_split: str | float,
) -> None:
    """Checks the arguments of `resolve_splits`."""

    def is_name(split):
        return isinstance(split, str) and split != ''

    def is_name_or_share(split):
        return is_name(split) or (is_finite(split, above=0) and split < 1)

    rule = 'must be the name of a split, a slice of one'
    require(
        is_name(train_split),
        f'`train_split` {rule} or a sum of slices',
        train_split=train_split,
    )
    require(
        validation_split is None or is_name_or_share(validation_split),
        f'`validation_split` {rule}, a share between 0 and 1, or None',
        validation_split=validation_split,
    )
    require(
        is_name_or_share(test_split),
        f'`test_split` {rule}, or a share between 0 and 1',
        test_split=test_split,
    )


def resolve_splits(
    splits: Mapping[str, tfds.core.SplitInfo],
    train_split: str,
    validation_split: str | float | None,
    test_split: str | float,
) -> dict[str, list[Piece]]:
    """Resolves the names, slices and shares of `data.load_datasets`.

    Args:
        splits: The splits that a dataset has.
        train_split: See `data.load_datasets`.
        validation_split: See `data.load_datasets`.
        test_split: See `data.load_datasets`.

    Returns:
        A dict from 'train', 'validation' and 'test' to their pieces. If there
        is no validation, that list is empty.

    Raises:
        ValueError: If there is no such split, or if it has no example.
    """
    train = _pieces(splits, 'train_split', train_split)
    if isinstance(test_split, str):
        test = _pieces(splits, 'test_split', test_split)
    else:
        train, test = _divide(train, 'test_split', test_split)
    if validation_split == 'auto':
        used = {split for split, _, _ in train + test}
        unused = [x for x in VALIDATION_NAMES if x in splits and x not in used]
        # A tenth of fewer than five examples is none.
        share = 0.1 if count(train) >= 5 else None
        validation_split = unused[0] if unused else share
    if validation_split is None:
        validation = []
    elif isinstance(validation_split, str):
        validation = _pieces(splits, 'validation_split', validation_split)
    else:
        train, validation = _divide(train, 'validation_split', validation_split)
    return {'train': train, 'validation': validation, 'test': test}


def _pieces(splits, name, split):
    """Returns the pieces of a split, the argument `name`."""
    try:
        instruction = tfds.core.ReadInstruction.from_spec(split)
        pieces = [
            (
                piece.splitname,
                piece.from_ or 0,
                splits[piece.splitname].num_examples
                if piece.to is None
                else piece.to,
            )
            for piece in instruction.to_absolute(splits)
        ]
    # Unknown names and wrong slices raise errors of different types.
    except (AssertionError, KeyError, NotImplementedError, ValueError):
        pieces = []
    pieces = [piece for piece in pieces if piece[1] < piece[2]]
    share = ' or a share of the training split, such as 0.2'
    require(
        pieces,
        f'`{name}` must be one of {sorted(splits)}, a slice of one that holds '
        f'examples{share if name != "train_split" else ""}',
        **{name: split},
    )
    return pieces


def _divide(pieces, name, share):
    """Cuts a share, the argument `name`, off the end of each piece."""
    kept, held_out = [], []
    for split, start, stop in pieces:
        middle = stop - math.floor((stop - start) * share + 0.5)
        kept += [(split, start, middle)] if start < middle else []
        held_out += [(split, middle, stop)] if middle < stop else []
    require(
        kept and held_out,
        f'`{name}` must be a share of the {count(pieces)} training examples '
        'that holds one or more and leaves one or more',
        **{name: share},
    )
    return kept, held_out


def count(pieces: Sequence[Piece]) -> int:
    """Returns the number of examples in the pieces."""
    return sum(stop - start for _, start, stop in pieces)


def notes_on(
    splits: Mapping[str, tfds.core.SplitInfo],
    pieces: Mapping[str, Sequence[Piece]],
) -> Iterator[str]:
    """Yields sentences on probable mistakes in the choice of splits."""
    for a, b in itertools.combinations(pieces, 2):
        shared = sum(
            max(0, min(stop, end) - max(start, begin))
            for split, start, stop in pieces[a]
            for other, begin, end in pieces[b]
            if split == other
        )
        if shared:
            yield f'{shared:,} examples belong both to {a} and to {b}.'
    used = {split for parts in pieces.values() for split, _, _ in parts}
    unused = sorted(set(splits) - used)
    if unused:
        yield f'Splits that are not used: {folders.enumeration(unused)}.'


def read_pieces(
    builder: tfds.core.DatasetBuilder,
    pieces: Sequence[Piece],
    decoders: dict | None = None,
) -> tf.data.Dataset:
    """Returns the examples of a TFDS dataset, always in the same order."""
    instructions = [
        tfds.core.ReadInstruction(split, start, stop, unit='abs')
        for split, start, stop in pieces
    ]
    return builder.as_dataset(
        split=functools.reduce(operator.add, instructions),
        decoders=decoders,
        read_config=tfds.ReadConfig(try_autocache=False, skip_prefetch=True),
    )


def open_builder(
    name: str,
    data_dir: str | os.PathLike | None,
    check: Callable[[tfds.core.DatasetBuilder], object],
) -> tfds.core.DatasetBuilder:
    """Returns a dataset of TFDS, downloaded and prepared if need be.

    Args:
        name: The name of the dataset.
        data_dir: Where TFDS keeps its datasets; None for its default.
        check: A function of the builder that raises a ValueError if the
            dataset is of the wrong kind, before it is downloaded.

    Raises:
        ValueError: If there is no such dataset, or it cannot be prepared.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known)
        hint = f' (did you mean {" or ".join(close)}?)' if close else ''
        raise ValueError(
            "`name` must be a TFDS dataset, 'gratings' or the path of a folder "
            f'of images. Received: name={name!r}{hint}'
        ) from error
    # A wrong config, version or namespace raises errors of many types.
    except Exception as error:
        raise ValueError(
            f'cannot open the dataset {name!r}: {_one_line(error)}'
        ) from error
    check(builder)
    try:
        if not builder.data_path.exists():
            print(f'Preparing {name} in {builder.data_dir}', flush=True)
            _check_network(builder)
        builder.download_and_prepare()
    # Each dataset fails in its own way without a network.
    except Exception as error:
        raise ValueError(
            f'dataset {name!r} is not in {builder.data_dir} and could not be '
            f'downloaded and prepared there ({_one_line(error)}); copy a '
            'prepared one and set data.load_datasets.data_dir, or connect to '
            'the network'
        ) from error
    return builder


def _check_network(builder):
    """Raises a ConnectionError if no host of the dataset can be found.

    TFDS itself goes on trying for minutes. Files that were downloaded before,
    with an INFO beside them, need no network, and a proxy finds hosts itself.
    """
    downloads = pathlib.Path(builder.data_dir_root, 'downloads')
    hosts = {
        urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()
    }
    hosts.discard(None)
    if (
        builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        or urllib.request.getproxies()
        or any(downloads.glob('*.INFO'))
        or any(downloads.glob(f'{builder.name}/*.INFO'))
    ):
        return
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            reason = f'{host}: {error.strerror}'
    if hosts:
        raise ConnectionError(reason)


def _image_keys(builder):
    """Returns the names of the image and of the class label in an example."""
    keys = supervised_keys(builder, tfds.features.Image)
    if builder.info.features[keys[0]].np_dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f'dataset {builder.name!r} must have an Image of 8 or 16 bits'
        )
    return keys


def supervised_keys(
    builder: tfds.core.DatasetBuilder, kind: type
) -> tuple[str, str]:
    """Returns the names of the input and of the class label in an example.

    These are the supervised keys, or else the only ones of their kind.

    Args:
        builder: The dataset.
        kind: The type of the input, such as `tfds.features.Image`.

    Raises:
        ValueError: If there are none or several.
    """
    features = dict(builder.info.features)

    def find(kind, keys):
        return [
            key
            for key, feature in features.items()
            if key in keys and isinstance(feature, kind)
        ]

    for keys in builder.info.supervised_keys or (), features:
        inputs = find(kind, keys)
        labels = find(tfds.features.ClassLabel, keys)
        if len(inputs) == len(labels) == 1:
            return inputs[0], labels[0]
    kinds = ', '.join(f'{k} ({type(f).__name__})' for k, f in features.items())
    raise ValueError(
        f'dataset {builder.name!r} must have one {kind.__name__} and one '
        f'ClassLabel among its features. It has: {kinds}'
    )


def _one_line(error: Exception) -> str:
    """Returns the message of an error, shortened, in one line."""
    return textwrap.shorten(str(error), 400) or type(error).__name__
