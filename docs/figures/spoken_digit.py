"""Draws the accuracy of chosen and learned strides on spoken digits.

    python docs/figures/spoken_digit.py [folder]

Each column is a speaker who was not trained on, and the last one is the mean
over speakers. A point is the mean over the runs of one choice or of one start.
All have equal MACs.
"""

import collections
import csv
import pathlib
import statistics
import sys

import matplotlib.figure

FOLDER = pathlib.Path(__file__).parent
RUNS = FOLDER.parents[1] / 'results' / 'spoken_digit' / 'runs.csv'
# (variant, share of the epochs that learn strides): label, color.
KINDS = {
    ('FixedSpectralPooling', ''): ('fixed choices', 'C0'),
    ('DiffStride', '0.25'): ('learned, from four starts', 'C3'),
}


def main(folder=FOLDER):
    with RUNS.open(newline='') as file:
        rows = list(csv.DictReader(file))
    speakers = sorted({row['speaker'] for row in rows})
    columns = [*speakers, 'mean']
    figure = matplotlib.figure.Figure((6.4, 3.4), layout='constrained')
    axes = figure.subplots()
    for shift, (kind, (label, color)) in zip((-0.1, 0.1), KINDS.items()):
        runs = collections.defaultdict(list)
        for row in rows:
            if (row['variant'], row['learn']) == kind:
                accuracy = 100 * float(row['test_accuracy'])
                runs[row['start'], row['speaker']].append(accuracy)
        points = []
        for start in sorted({start for start, _ in runs}):
            means = [statistics.mean(runs[start, x]) for x in speakers]
            points += enumerate([*means, statistics.mean(means)])
        axes.plot(
            [x + shift for x, _ in points],
            [y for _, y in points],
            'o',
            color=color,
            alpha=0.6,
            markersize=5,
            label=label,
        )
    axes.axvline(len(speakers) - 0.5, color='0.8')
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel('speaker of the test')
    axes.set_ylabel('test accuracy in %')
    figure.legend(loc='outside upper center', ncols=2)
    figure.savefig(pathlib.Path(folder, 'spoken_digit.png'), dpi=100)


if __name__ == '__main__':
    main(*sys.argv[1:])
