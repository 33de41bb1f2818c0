"""Draws accuracy against MACs of all runs of two studies in results/.

    python docs/figures/accuracy_macs.py [folder]

One color shows learned strides. Other colors show strides that were chosen.
"""

import csv
import pathlib
import sys

import matplotlib.figure

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER.parents[1] / 'results'
STUDIES = ('cifar10_short', 'quickstart')
KINDS = {
    'max pooling': 'C2',
    'average pooling': 'C4',
    'strided convolution': 'C7',
    'FixedSpectralPooling': 'C0',
    'DiffStride': 'C3',
}


def points(path):
    """Returns million MACs and accuracies in % of each kind of pooling."""
    found = {kind: [] for kind in KINDS}
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            variant = row['variant']
            for kind in KINDS:
                is_learned = kind == 'DiffStride' == variant[: len(kind)]
                if variant == kind or is_learned:
                    mmacs = row.get('mmacs') or float(row['macs']) / 1e6
                    accuracy = 100 * float(row['test_accuracy'])
                    found[kind].append((float(mmacs), accuracy))
    return found


def main(folder=FOLDER):
    for study in STUDIES:
        path = RESULTS / study / 'runs.csv'
        figure = matplotlib.figure.Figure((6, 3.6), layout='constrained')
        axes = figure.subplots()
        for kind, found in points(path).items():
            if found:
                is_learned = kind == 'DiffStride'
                axes.scatter(
                    *zip(*found),
                    s=40 if is_learned else 25,
                    marker='o' if is_learned else 's',
                    color=KINDS[kind],
                    alpha=0.7,
                    label=f'{kind} ({len(found)})',
                )
        axes.set_xscale('log')
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_formatter('{x:g}')
        axes.xaxis.get_minor_locator().set_params(subs=(2, 3, 5))
        axes.set_xlabel('million multiply-accumulates per image')
        axes.set_ylabel('test accuracy (%)')
        axes.legend(fontsize=8)
        name = f'accuracy_macs_{study}.png'
        figure.savefig(pathlib.Path(folder, name), dpi=110)


if __name__ == '__main__':
    main(*sys.argv[1:])
