"""Draws the accuracy of chosen and of learned strides in two studies.

    python docs/figures/chosen_and_learned.py [folder]

On the left are enlarged photographs, one point for each run. On the right are
spoken digits. Each column there is a speaker who was not trained on, and the
last one is the mean over speakers. A point is the mean over the runs of one
choice or of one start. All points of a study have about equal MACs.
"""

import collections
import csv
import pathlib
import statistics
import sys

import matplotlib.figure

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER.parents[1] / 'results'
STYLE = {
    'other': {'color': '0.5', 'label': 'other poolings, strides of 2'},
    'chosen': {'color': 'C0', 'label': 'chosen strides'},
    'learned': {'color': 'C1', 'label': 'learned, from four starts'},
    'searched': {'color': 'C3', 'label': 'searched from them, trained anew'},
}
POINTS = {'linestyle': '', 'marker': 'o', 'alpha': 0.6, 'markersize': 5}


def read(study, kinds):
    """Yields (kind, row) for the runs whose variant and `learn` have a kind."""
    with (RESULTS / study / 'runs.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            kind = kinds.get((row['variant'], row.get('learn', '')))
            if kind is not None:
                yield kind, row


def draw_photographs(axes):
    points = collections.defaultdict(list)
    kinds = {
        ('FixedSpectralPooling', ''): 'chosen',
        ('DiffStride', ''): 'learned',
        ('DiffStride, trained anew after search', ''): 'searched',
    }
    for kind, row in read('cifar10_64', kinds):
        size = int(row['sizes'].split()[1])
        points[kind].append((size, 100 * float(row['test_accuracy'])))
    for kind in points:
        color = STYLE[kind]['color']
        axes.plot(*zip(*points[kind]), **POINTS, color=color)
    axes.set_xlabel('pixels of the map behind the first block')
    axes.set_ylabel('test accuracy in %')
    axes.set_title('CIFAR-10, 64 x 64 pixels')


def draw_digits(axes):
    kinds = {
        ('FixedSpectralPooling', ''): 'chosen',
        ('DiffStride', '0.25'): 'learned',
        ('DiffStride, trained anew after search', ''): 'searched',
        ('strided convolution, 13 to 52 filters', ''): 'other',
        ('max pooling, 10 to 38 filters', ''): 'other',
        ('blurred stride, 10 to 38 filters', ''): 'other',
        ('average pooling, 10 to 38 filters', ''): 'other',
    }
    runs = collections.defaultdict(list)
    for kind, row in read('spoken_digit', kinds):
        accuracy = 100 * float(row['test_accuracy'])
        choice = row['variant'], row['start']
        runs[kind, choice, row['speaker']].append(accuracy)
    speakers = sorted({speaker for _, _, speaker in runs})
    columns = [*speakers, 'mean']
    for shift, (kind, style) in zip((-0.24, -0.08, 0.08, 0.24), STYLE.items()):
        points = []
        for choice in sorted({x for each, x, _ in runs if each == kind}):
            means = [statistics.mean(runs[kind, choice, x]) for x in speakers]
            points += enumerate([*means, statistics.mean(means)])
        axes.plot(
            [x + shift for x, _ in points],
            [y for _, y in points],
            **POINTS,
            **style,
        )
    axes.axvline(len(speakers) - 0.5, color='0.8')
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel('speaker of the test')
    axes.set_title('spoken digits')


def main(folder=FOLDER):
    figure = matplotlib.figure.Figure((8.4, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    draw_photographs(left)
    draw_digits(right)
    figure.legend(loc='outside upper center', ncols=2)
    figure.savefig(pathlib.Path(folder, 'chosen_and_learned.png'), dpi=100)


if __name__ == '__main__':
    main(*sys.argv[1:])
