"""Datasets of TFDS, and the choice of their splits."""

import contextlib
import difflib
import functools
import io
import itertools
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import filelock
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from diffstride.examples import (
    folders,
    gratings,  # noqa: F401, registers 'gratings'
)
from diffstride.examples.checkpoints import first_line
from diffstride.examples.folders import Piece
from diffstride.validation import require

# These names are common for the split that a training is watched on.
VALIDATION_NAMES = 'validation', 'valid', 'val', 'dev'


class TfdsSource:
    """A dataset of TFDS with a class label, prepared if need be.

    Attributes:
        name: The name of the dataset.
        class_names: The names of the classes.
        splits: Maps the name of each split to the lengths of its shards.
        features: Maps the names of features to `tfds.features`.
        input: The name of the input, of type `kind`, in an example.
        label: The name of the class label in an example.

    Raises:
        ValueError: If there is no such dataset, if it does not have one input
            of this kind and one label, or if it cannot be prepared.
    """

    def __init__(
        self, name: str, data_dir: str | os.PathLike | None, kind: type
    ):
        builder = _builder(name, data_dir)
        self.name = name
        self.input, self.label = _supervised_keys(builder, kind)
        dtype = builder.info.features[self.input].np_dtype
        if kind is tfds.features.Image and dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f'dataset {name!r} must have an Image of 8 or 16 bits'
            )
        self._builder = _prepared(builder, name, data_dir)
        self.features = dict(self._builder.info.features)
        self.class_names = tuple(self.features[self.label].names)
        self.splits = {
            split: info.shard_lengths
            for split, info in self._builder.info.splits.items()
        }

    def examples(
        self, pieces: Sequence[Piece], decoders: dict | None = None
    ) -> tf.data.Dataset:
        """Returns a dataset of dicts, always in the same order."""
        instructions = [
            tfds.core.ReadInstruction(split, start, stop, unit='abs')
            for split, start, stop in pieces
        ]
        return self._builder.as_dataset(
            split=functools.reduce(operator.add, instructions),
            decoders=decoders,
            read_config=tfds.ReadConfig(
                try_autocache=False, skip_prefetch=True
            ),
        )


class TfdsImages(TfdsSource):
    """A dataset of images, a source of records that are encoded images.

    It has the attributes and methods of `folders.ImageFolder`.
    """

    notes = ()
    knows_labels = False
    # This is about 1 GB of ImageNet. TFDS stores examples shuffled already.
    buffer = 10_000

    def __init__(self, name: str, data_dir: str | os.PathLike | None):
        super().__init__(name, data_dir, tfds.features.Image)

    def records(self, pieces: Sequence[Piece]) -> tf.data.Dataset:
        decoders = {self.input: tfds.decode.SkipDecoding()}
        return self.examples(pieces, decoders).map(
            operator.itemgetter(self.input, self.label)
        )

    def contents(self, record: tf.Tensor) -> tf.Tensor:
        return record

    def kind(
        self, pieces: Sequence[Piece]
    ) -> tuple[Iterable[tuple], int, tf.DType]:
        feature = self.features[self.input]
        *size, channels = feature.shape
        sizes = self._sizes(pieces) if None in size else [tuple(size)]
        return sizes, channels or 3, tf.as_dtype(feature.np_dtype)

    def _sizes(self, pieces):
        """Yields the sizes that occur. It reads all images, when needed."""
        records = self.records(pieces).as_numpy_iterator()
        images = (io.BytesIO(image) for image, _ in records)
        yield from folders.kind_of(images)[0]


def _builder(name, data_dir):
    try:
        return tfds.builder(name, data_dir=data_dir)
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
            f'cannot open the dataset {name!r}: {first_line(error)}'
        ) from error


def _prepared(builder, name, data_dir):
    """Downloads and prepares a dataset unless it is there."""
    if builder.data_path.exists():
        return builder
    root, lock = str(builder.data_dir_root), contextlib.nullcontext()
    try:
        print(f'Preparing {name} in {builder.data_dir}', flush=True)
        if '://' not in root:
            os.makedirs(root, exist_ok=True)
            lock = filelock.FileLock(os.path.join(root, f'{builder.name}.lock'))
        with lock:
            # Another process may have prepared it in the meantime.
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare()
    # Each dataset fails in its own way without a network.
    except Exception as error:
        raise ValueError(
            f'dataset {name!r} is not in {builder.data_dir} and could not be '
            f'downloaded and prepared there ({first_line(error)}); copy a '
            'prepared one and set data.load_datasets.data_dir, or connect to '
            'the network'
        ) from error
    return builder


def _supervised_keys(builder, kind):
    """Returns the names of the input and of the class label in an example.

    These are the supervised keys, or else the only ones of their kind.
    """
    features = dict(builder.info.features)
    for keys in builder.info.supervised_keys or (), features:
        inputs, labels = (
            [k for k in features if k in keys and isinstance(features[k], each)]
            for each in (kind, tfds.features.ClassLabel)
        )
        if len(inputs) == len(labels) == 1:
            return inputs[0], labels[0]
    kinds = ', '.join(f'{k} ({type(f).__name__})' for k, f in features.items())
    raise ValueError(
        f'dataset {builder.name!r} must have one {kind.__name__} and one '
        f'ClassLabel among its features. It has: {kinds}'
    )


def open_images(
    name: str, data_dir: str | os.PathLike | None, train_split: str
) -> folders.ImageFolder | TfdsImages:
    """Returns the folder of images, or the TFDS dataset, of this name."""
    split = re.split(r'[\[+]', train_split)[0]
    if (
        name.startswith(('/', '.', '~'))
        or os.path.isdir(os.path.join(name, split))
        or (os.path.isdir(name) and name not in tfds.list_builders())
    ):
        folder = folders.ImageFolder(name, split)
        if not folder.examples:
            raise ValueError(
                '`name` must be a folder that holds one folder of images per '
                'class, in each split or without splits. Received: '
                f'name={name!r}. {" ".join(folder.notes)}'.strip()
            )
        return folder
    return TfdsImages(name, data_dir)


def resolve_splits(
    splits: Mapping[str, Sequence[int]],
    train_split: str,
    validation_split: str | float | None,
    test_split: str | float,
) -> dict[str, list[Piece]]:
    """Returns the pieces of 'train', 'test' and possibly 'validation'.

    `splits` maps the splits of a dataset to the lengths of their shards. The
    other arguments are names, slices and shares, see `data.load_datasets`.

    Raises:
        ValueError: If there is no such split, or if it has no example.
    """
    train = _pieces(splits, 'train_split', train_split)
    train, test = _held_out(splits, train, 'test_split', test_split)
    if validation_split == 'auto':
        used = {split for split, _, _ in train + test}
        unused = [x for x in VALIDATION_NAMES if x in splits and x not in used]
        # A tenth of fewer than five examples is none.
        share = 0.1 if count(train) >= 5 else None
        validation_split = unused[0] if unused else share
    if validation_split is None:
        return {'train': train, 'test': test}
    train, validation = _held_out(
        splits, train, 'validation_split', validation_split
    )
    return {'train': train, 'validation': validation, 'test': test}


def _held_out(splits, train, name, split):
    """Returns the pieces that are left to train on, and those of a split.

    The split, the argument `name`, is a name, a slice, or a share that is cut
    off the end of each piece.
    """
    if isinstance(split, str):
        return train, _pieces(splits, name, split)
    kept, held_out = [], []
    for key, start, stop in train:
        middle = stop - math.floor((stop - start) * split + 0.5)
        kept += [(key, start, middle)] if start < middle else []
        held_out += [(key, middle, stop)] if middle < stop else []
    require(
        kept and held_out,
        f'`{name}` must be a share of the {count(train)} training examples '
        'that holds one or more and leaves one or more',
        **{name: split},
    )
    return kept, held_out


def _pieces(splits, name, split):
    """Returns the pieces of a named or sliced split, the argument `name`."""
    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=lengths, num_bytes=0)
        for key, lengths in splits.items()
    }
    try:
        instruction = tfds.core.ReadInstruction.from_spec(split)
        pieces = [
            (
                x.splitname,
                x.from_ or 0,
                sum(splits[x.splitname]) if x.to is None else x.to,
            )
            for x in instruction.to_absolute(infos)
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


def count(pieces: Sequence[Piece]) -> int:
    """Returns the number of examples in the pieces."""
    return sum(stop - start for _, start, stop in pieces)


def notes_on(
    splits: Mapping[str, Sequence[int]],
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
