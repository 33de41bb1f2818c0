"""A finished training as a classifier of images.

The commands evaluate, predict and export share it:

    python3 -m diffstride.examples.evaluate --workdir=/tmp/run
    python3 -m diffstride.examples.predict --workdir=/tmp/run cat.jpg dog.png
    python3 -m diffstride.examples.export --workdir=/tmp/run --format=onnx
"""

import contextlib
import csv
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from diffstride.examples import checkpoints, folders

_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder of a training that has finished an epoch.',
    allow_override=True,  # `main` has a flag of this name, for a hint alone.
)
OUTPUT = flags.DEFINE_string(
    'output', None, 'The folder to write files to; it is made if need be.'
)


def classifier(run: checkpoints.Run) -> keras.Model:
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
    if not _puts_out_probabilities(run.model, run.image_shape):
        outputs = keras.layers.Softmax(dtype='float32')(outputs)
    return keras.Model(images, outputs, name='classifier')


def _puts_out_probabilities(model, image_shape):
    """Returns whether the outputs are probabilities and not logits."""
    noise = np.random.default_rng(0).normal(size=(8, *image_shape))
    outputs = keras.ops.convert_to_numpy(model(noise.astype('float32')))
    return outputs.min() >= 0 and np.allclose(outputs.sum(-1), 1, atol=1e-2)


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


def percent(share: float) -> str:
    """Returns a share of 1 as text, such as '97.1%'."""
    return f'{100 * share:.1f}%'


def loaded_run() -> checkpoints.Run:
    """Returns the training that the flag --workdir names.

    Raises:
        ValueError: If the flag is not set, or names no such folder.
    """
    if not _WORKDIR.value:
        raise ValueError('--workdir must be the folder of a finished training')
    return checkpoints.load_run(_WORKDIR.value)


def output_folder(default: str) -> pathlib.Path:
    """Makes and returns the folder of --output, or the default in --workdir."""
    folder = pathlib.Path(OUTPUT.value or f'{_WORKDIR.value}/{default}')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, and says afterwards that it is."""
    with checkpoints.unfinished(path) as temporary:
        yield temporary
    print(f'Wrote {path}')


def write_table(path: pathlib.Path, rows: Iterable) -> None:
    """Writes a table, whose first row is the header, as CSV."""
    with written(path) as temporary, temporary.open('w', newline='') as file:
        csv.writer(file).writerows(rows)


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
