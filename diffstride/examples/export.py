r"""Exports a trained classifier to a file that needs none of this package.

    python3 -m diffstride.examples.export --workdir=/tmp/run --format=onnx

The folder of --output, WORKDIR/export unless it is set, receives

    model.onnx, model.tflite or saved_model/    by --format
    labels.txt                                  one class name per line

The model takes the pixels of pictures in the range 0..255, float32 [batch,
height, width, channels], and puts out the probabilities of the classes, float32
[batch, classes]. The batch size is free. The mean and the scale of the training
are part of the model; resizing is not: pictures must come in the height and
width of the training, as Pillow's `image.resize((width, height),
Image.BILINEAR)` makes them. A model that was trained in bfloat16 is exported in
float32.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from absl import flags

from diffstride import freeze
from diffstride.examples import checkpoints, classifier

# The names that Keras gives to the formats, and the files that they become.
_FILES = {
    'onnx': 'model.onnx',
    'litert': 'model.tflite',
    'tf_saved_model': 'saved_model',
}
_FORMAT = flags.DEFINE_enum(
    'format', 'onnx', list(_FILES), 'The format of the exported model.'
)


def export(arguments: Sequence[str]) -> None:
    """Exports the model of a training; there are no arguments but flags."""
    classifier.no_arguments(arguments)
    run = classifier.load_run()
    model = freeze(classifier.classifier(run))
    folder = classifier.output_folder('export')
    target = folder / _FILES[_FORMAT.value]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = pathlib.Path(temporary) / target.name
        model.export(str(path), format=_FORMAT.value, verbose=False)
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    labels = folder / 'labels.txt'
    checkpoints.write(labels, '\n'.join(run.class_names) + '\n')
    shape = ', '.join(map(str, run.image_shape))
    print(
        f'Wrote {target}\nWrote {labels}\n'
        f'It takes float32 [batch, {shape}] in the range 0..255 and puts out '
        f'the probabilities of {len(run.class_names)} classes.'
    )


if __name__ == '__main__':
    classifier.run_command(export)
