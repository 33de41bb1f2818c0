r"""Measures a trained classifier, class by class.

    python3 -m diffstride.examples.evaluate --workdir=/tmp/run --split=test

--split is a split of the data that the training had, by default its test
split. --folder=PATH takes other images, one folder per class: PATH/cat/1.jpg.

It prints the accuracy and the classes with the lowest recall. The folder of
--output, WORKDIR/evaluation unless it is set, receives

    classes.csv      images, recall and precision of each class
    confusion.csv    the number of images of each class (row) that were taken
                     for each class (column)
    confusion.png    the same as a picture
"""

import re
from collections.abc import Sequence

import gin
import keras
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from diffstride.examples import checkpoints, classifier, data, folders

_SPLIT = flags.DEFINE_string(
    'split',
    None,
    'A split of the data; the test split of the training if unset.',
)
_FOLDER = flags.DEFINE_string(
    'folder', None, 'A folder of images, one folder per class, to measure on.'
)
_BATCH = 250
_PRINTED_CLASSES = 20


def evaluate(arguments: Sequence[str]) -> None:
    """Measures the model of a training; there are no arguments but flags."""
    classifier.no_arguments(arguments)
    run = classifier.load_run()
    names = run.class_names
    class_names, batches = (_of_folder if _FOLDER.value else _of_data)(run)
    unknown = sorted(set(class_names) - set(names))
    if unknown:
        raise ValueError(
            f'The classes must be among {list(names)}. Received: {unknown}'
        )
    indices = np.array([names.index(name) for name in class_names])
    counts = np.zeros((len(names), len(names)), int)
    for outputs, labels in batches:
        outputs = keras.ops.convert_to_numpy(outputs)
        np.add.at(counts, (indices[labels], outputs.argmax(-1)), 1)
    images, taken, right = counts.sum(1), counts.sum(0), np.diag(counts)
    recall = right / np.maximum(images, 1)
    precision = right / np.maximum(taken, 1)
    _print(names, counts, recall, precision)
    folder = classifier.output_folder('evaluation')
    classifier.write_table(
        folder / 'classes.csv',
        [
            ['class', 'images', 'recall', 'precision'],
            *zip(names, images, recall.round(4), precision.round(4)),
        ],
    )
    classifier.write_table(
        folder / 'confusion.csv',
        [['class', *names], *([x, *row] for x, row in zip(names, counts))],
    )
    path = folder / 'confusion.png'
    checkpoints.write_figure(path, _figure(counts, names))
    print(f'Wrote {path}')


def _of_data(run):
    """Returns class names and pairs (outputs, labels) of its data."""
    gin.parse_config(run.settings)
    loader = re.search(r'load_data_fn = \\?\s*@([\w./]+)', run.settings)
    load = gin.get_configurable(loader[1] if loader else data.load_datasets)
    split = {'test_split': _SPLIT.value} if _SPLIT.value else {}
    datasets = load(seed=0, **split)
    return datasets.class_names, (
        (run.model.predict_on_batch(images), labels.argmax(-1))
        for images, labels in datasets.test.as_numpy_iterator()
    )


def _of_folder(run):
    """Returns class names and pairs (outputs, labels) of a folder."""
    classifier.require_images(run)
    folder = folders.ImageFolder(_FOLDER.value)
    for note in folder.notes:
        print(note)
    names = [_SPLIT.value] if _SPLIT.value else list(folder.examples)
    if not names or not set(names) <= set(folder.examples):
        raise ValueError(
            '--folder must hold images, one folder per class, and --split must '
            f'be one of its splits, {list(folder.examples)}. '
            f'Received: {_FOLDER.value}, {_SPLIT.value}'
        )
    paths, labels = map(np.concatenate, zip(*map(folder.examples.get, names)))
    model = classifier.classifier(run)

    def batches():
        for start in range(0, len(paths), _BATCH):
            part = slice(start, start + _BATCH)
            images = np.stack(
                [classifier.read_image(x, run.image_shape) for x in paths[part]]
            )
            yield model.predict_on_batch(images), labels[part]

    return folder.class_names, batches()


def _print(names, counts, recall, precision):
    """Prints the accuracy and a table of the classes with the lowest recall."""
    images, right = counts.sum(1), np.diag(counts)
    print(f'{counts.sum()} images, accuracy {right.sum() / counts.sum():.1%}\n')
    print('| class | images | recall | precision | most often taken for |')
    print('| --- ' * 5 + '|')
    wrong = counts - np.diag(right)
    shown = [i for i in np.argsort(recall, kind='stable') if images[i]]
    for i in shown[:_PRINTED_CLASSES]:
        mistake = names[wrong[i].argmax()] if wrong[i].any() else '-'
        print(
            f'| {names[i]} | {images[i]} | {recall[i]:.1%} '
            f'| {precision[i]:.1%} | {mistake} |'
        )
    more = len(shown) - _PRINTED_CLASSES
    print(f'({more} classes have a higher recall.)\n' if more > 0 else '')


def _figure(counts, names):
    """Returns the confusion matrix in shares of each class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2 + 0.3 * min(len(names), 60)
    figure = Figure(figsize=(size + 1, size), layout='constrained')
    axes = figure.add_subplot(xlabel='taken for', ylabel='class')
    shown = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    figure.colorbar(shown, label='share of the images of the class')
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        style = {'ha': 'center', 'va': 'center', 'fontsize': 7}
        for (row, column), count in np.ndenumerate(counts):
            color = 'white' if shares[row, column] > 0.5 else 'black'
            axes.text(column, row, count or '', color=color, **style)
    return figure


if __name__ == '__main__':
    classifier.run_command(evaluate)
