r"""Says what is on pictures.

    python3 -m diffstride.examples.predict --workdir=/tmp/run cat.jpg dog.png

Each picture gets a line with its most likely classes:

    cat.jpg: cat 97.1%, dog 2.0%, deer 0.4%

Pictures of another size than the training's are resized, as in training. With
--output=FOLDER the probabilities of all classes are written to
FOLDER/predictions.csv too.
"""

from collections.abc import Sequence

import keras
import numpy as np
from absl import flags

from diffstride.examples import classifier

_TOP = flags.DEFINE_integer(
    'top', 3, 'How many classes are printed for a picture.', lower_bound=1
)


def predict(paths: Sequence[str]) -> None:
    """Prints the most likely classes of the pictures in these files."""
    if not paths:
        raise ValueError('Name the pictures after the flags, as in: cat.jpg')
    run = classifier.load_run()
    classifier.require_images(run)
    images = [classifier.read_image(path, run.image_shape) for path in paths]
    model = classifier.classifier(run)
    probabilities = keras.ops.convert_to_numpy(
        model.predict(np.stack(images), verbose=0)
    )
    for path, row in zip(paths, probabilities):
        likely = np.argsort(-row, kind='stable')[: _TOP.value]
        texts = [f'{run.class_names[i]} {row[i]:.1%}' for i in likely]
        print(f'{path}: {", ".join(texts)}')
    if classifier.OUTPUT.value:
        rows = [
            [path, *map('{:.6f}'.format, row)]
            for path, row in zip(paths, probabilities)
        ]
        classifier.write_table(
            classifier.output_folder('predictions') / 'predictions.csv',
            [['file', *run.class_names], *rows],
        )


if __name__ == '__main__':
    classifier.run_command(predict)
