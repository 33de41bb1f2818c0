"""A finished training as a classifier of images.

The commands evaluate, predict and export share it:

    python3 -m diffstride.examples.evaluate --workdir=/tmp/run
    python3 -m diffstride.examples.predict --workdir=/tmp/run cat.jpg dog.png
    python3 -m diffstride.examples.export --workdir=/tmp/run --format=onnx
"""

import csv
import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from diffstride.examples import checkpoints, folders

_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder of a training that has finished an epoch.',
)
OUTPUT = flags.DEFINE_string(
    'output', None, 'The folder to write files to; it is made if need be.'
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model of the best epoch, and the values that its use needs.

    The pixels of images [height, width, channels] are standardized as
    (pixels - mean) / scale. `settings` is the text of config.gin.
    """

    model: keras.Model
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    scale: np.ndarray
    settings: str


def load_run(workdir: str | os.PathLike | None = None) -> Run:
    """Loads the result of a training from its workdir, by default --workdir.

    Raises:
        ValueError: If the flag is not set, or the folder holds no trained
            model.
    """
    workdir = workdir or _WORKDIR.value
    if not workdir:
        raise ValueError('--workdir must be the folder of a finished training')
    workdir = pathlib.Path(workdir).expanduser()
    data = checkpoints.read(workdir / 'data.json')
    if data is None or not checkpoints.epoch_folders(workdir):
        raise ValueError(f'{workdir} holds no trained model')
    settings = (workdir / 'config.gin').read_text()
    for module in re.findall(r'^import (\S+)', settings, re.MULTILINE):
        importlib.import_module(module)  # It may register classes.
    path = checkpoints.result_file(workdir)
    return Run(
        model=keras.models.load_model(path, compile=False),
        class_names=tuple(data['class_names']),
        image_shape=tuple(data['image_shape']),
        mean=np.asarray(data['mean'], 'float32'),
        scale=np.asarray(data['scale'], 'float32'),
        settings=settings,
    )


def classifier(run: Run) -> keras.Model:
    """Returns a model of raw images, which contains the preprocessing.

    It maps pixels in 0..255, float32 [batch, height, width, channels],
    to the probabilities of the classes, float32 [batch, classes].
    """
    images = keras.Input(run.image_shape, dtype='float32', name='images')
    # With three axes they are per channel under any image_data_format.
    mean, scale = (
        np.broadcast_to(x, (1, 1, run.image_shape[-1])).astype(float)
        for x in (run.mean, run.scale)
    )
    standardize = keras.layers.Rescaling(
        scale=(1 / scale).tolist(),
        offset=(-mean / scale).tolist(),
        dtype='float32',
    )
    outputs = run.model(standardize(images))
    # The model may put out logits.
    noise = np.random.default_rng(0).normal(size=(8, *run.image_shape))
    found = keras.ops.convert_to_numpy(run.model(noise.astype('float32')))
    if found.min() < 0 or not np.allclose(found.sum(-1), 1, atol=1e-2):
        outputs = keras.layers.Softmax(dtype='float32')(outputs)
    return keras.Model(images, outputs, name='classifier')


def require_images(run: Run) -> None:
    """Raises a ValueError if a run was trained on recordings."""
    if '@audio.load_datasets' in run.settings:
        raise ValueError('--workdir must be a training on images')


def read_image(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Reads a picture the way training does, and resizes it.

    Returns:
        The pixels in the range 0..255, float32 [height, width, channels]. Those
        of 16-bit files are divided by 257.

    Raises:
        ValueError: If the file cannot be read or is no picture.
    """
    *size, channels = image_shape
    try:
        contents = tf.io.read_file(path)
        image = folders.decode_image(contents, channels, tf.uint16)
    except (tf.errors.OpError, OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a picture') from error
    return tf.image.resize(image, size, antialias=True).numpy() / 257


def output_folder(default: str) -> pathlib.Path:
    """Makes and returns the folder of --output, or the default in --workdir."""
    folder = pathlib.Path(OUTPUT.value or f'{_WORKDIR.value}/{default}')
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_table(path: pathlib.Path, rows: Iterable) -> None:
    """Writes a table, whose first row is the header, as CSV."""
    with checkpoints.unfinished(path) as temporary:
        with temporary.open('w', newline='') as file:
            csv.writer(file).writerows(rows)
    print(f'Wrote {path}')


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Runs a command on the arguments of the process.

    Errors that its user can correct end it with one line and exit code 1.
    """

    def main(argv):
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)
        with checkpoints.one_line_errors((ImportError, OSError, ValueError)):
            command(argv[1:])

    app.run(main)


def no_arguments(arguments: Sequence[str]) -> None:
    """Raises a ValueError if a command has arguments that are no flags."""
    if arguments:
        raise ValueError(f'Unknown arguments: {arguments}')
