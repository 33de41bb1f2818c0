"""Makes one table of all finished runs in a folder.

    python3 -m diffstride.examples.report /tmp/exp/diffstride/grid

It reads */results.json, prints a table, and writes runs.csv, one line per run,
table.md and accuracy_macs.png.
"""

import collections
import csv
import io
import pathlib
import statistics
import sys

from absl import app

from diffstride import plots
from diffstride.examples import checkpoints

_COLUMNS = (
    'run', 'variant', 'strides', 'seed', 'test_accuracy',
    'validation_accuracy', 'epoch', 'epochs', 'macs', 'seconds',
    'learned_strides',
)  # fmt: skip


def read_runs(folder: pathlib.Path) -> list[dict]:
    """Returns the results of all finished runs, the variants together."""
    runs = []
    for path in folder.glob('*/results.json'):
        results = checkpoints.read(path)
        if results is not None:
            name = path.parent.name
            run = {'run': name, 'variant': name, 'strides': '', **results}
            runs.append({**run, 'strides': run['strides'] or ''})
    return sorted(runs, key=lambda x: (x['variant'], x['strides'], x['seed']))


def _groups(runs):
    """Returns the runs that differ in the seed alone, by (variant, strides)."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run['variant'], run['strides']].append(run)
    return groups


def _table(runs):
    """Returns means and standard deviations over seeds as Markdown."""
    lines = [
        '| pooling | initial strides | n | test accuracy (%) | MMAC per image '
        '| seconds | learned strides (height, width) |',
        '| --- ' * 7 + '|',
    ]
    for (variant, start), group in _groups(runs).items():
        cells = [
            variant,
            start or '-',
            str(len(group)),
            _spread(group, 'test_accuracy', 100, 1),
            _spread(group, 'macs', 1e-6, 2),
            _spread(group, 'seconds', 1, 0),
            mean_strides(group),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def _spread(runs, key, factor, digits):
    """Returns the mean of a value and its deviation, in units of 1 / factor."""
    if any(run[key] is None for run in runs):
        return '-'
    values = [factor * run[key] for run in runs]
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{digits}f}'
    return text


def mean_strides(runs: list[dict]) -> str:
    """Returns the strides of each layer, averaged over runs, as text."""
    # Layers are matched by their order, since their names may differ.
    layers = zip(*(run['layers'].values() for run in runs))
    means = [
        [statistics.mean(s) for s in zip(*(x['strides'] for x in layer))]
        for layer in layers
    ]
    texts = (', '.join(f'{stride:.2f}' for stride in mean) for mean in means)
    return ', '.join(f'({text})' for text in texts) or '-'


def write(folder: pathlib.Path) -> None:
    """Prints the table of the runs in a folder, and writes all files.

    The figure has a point for each variant and start, the mean over seeds.
    """
    runs = read_runs(folder)
    if not runs:
        return
    text = _table(runs)
    print(f'\n{text}')
    checkpoints.write(folder / 'table.md', text + '\n')
    rows = io.StringIO()
    writer = csv.DictWriter(rows, _COLUMNS, extrasaction='ignore')
    writer.writeheader()
    for run in runs:
        writer.writerow({**run, 'learned_strides': mean_strides([run])})
    checkpoints.write(folder / 'runs.csv', rows.getvalue())
    points = collections.defaultdict(list)
    for (variant, _), group in _groups(x for x in runs if x['macs']).items():
        macs = statistics.mean(run['macs'] for run in group)
        accuracies = [run['test_accuracy'] for run in group]
        deviation = statistics.stdev(accuracies) if len(group) > 1 else 0.0
        points[variant].append((macs, statistics.mean(accuracies), deviation))
    path = folder / 'accuracy_macs.png'
    checkpoints.write_figure(path, plots.accuracy_macs(points))


def main(argv: list[str]) -> None:
    """Reports on the folder that the argument names."""
    folder = pathlib.Path(argv[1] if len(argv) == 2 else '')
    if len(argv) != 2 or not read_runs(folder):
        sys.exit(
            'error: name a folder of finished runs, as in python3 -m '
            f'diffstride.examples.report /tmp/exp/grid. Received: {argv[1:]}'
        )
    write(folder)


if __name__ == '__main__':
    app.run(main)
