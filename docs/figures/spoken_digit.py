"""Draws the accuracy of hand-picked and learned strides on spoken digits.

    python docs/figures/spoken_digit.py [folder]

Each column is a speaker who was not trained on. All runs have equal MACs.
"""

import csv
import pathlib
import sys

import matplotlib.figure

FOLDER = pathlib.Path(__file__).parent
RUNS = FOLDER.parents[1] / 'results' / 'spoken_digit' / 'runs.csv'
KINDS = {'FixedSpectralPooling': 'C0', 'DiffStride': 'C3'}
LABELS = {
    'FixedSpectralPooling': 'chosen by hand',
    'DiffStride': 'learned, from four starts',
}


def main(folder=FOLDER):
    with RUNS.open(newline='') as file:
        rows = list(csv.DictReader(file))
    speakers = sorted({row['speaker'] for row in rows})
    figure = matplotlib.figure.Figure((5, 3.2), layout='constrained')
    axes = figure.subplots()
    for shift, (kind, color) in zip((-0.1, 0.1), KINDS.items()):
        chosen = [row for row in rows if row['variant'] == kind]
        axes.plot(
            [speakers.index(row['speaker']) + shift for row in chosen],
            [100 * float(row['test_accuracy']) for row in chosen],
            'o',
            color=color,
            alpha=0.6,
            label=LABELS[kind],
        )
    axes.set_xticks(range(len(speakers)), speakers)
    axes.set_xlim(-0.5, len(speakers) - 0.5)
    axes.set_xlabel('speaker of the test')
    axes.set_ylabel('test accuracy in %')
    figure.legend(loc='outside upper center', ncols=2)
    figure.savefig(pathlib.Path(folder, 'spoken_digit.png'), dpi=100)


if __name__ == '__main__':
    main(*sys.argv[1:])
