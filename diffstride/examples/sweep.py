r"""Trains a network by every pooling, from every start, with every seed.

    python3 -m diffstride.examples.sweep --gin_config=cifar10_sweep.gin \
      --gin_bindings="sweep.workdir = '/tmp/exp/diffstride/sweep'"

A run that is finished is not repeated, so the same command continues a sweep
that was stopped at any point. Several processes that are started with the same
command share its runs.
"""

import collections
import contextlib
import fcntl  # Not on Windows.
import functools
import itertools
import re
import statistics
import subprocess
import sys
import time

import gin
from absl import app

from diffstride import plots
from diffstride.examples import checkpoints, data, main, train

_POLL_SECONDS = 5


@gin.configurable(module='sweep')
def sweep(
    workdir=None,
    variants=None,
    strides=('1, 1, 2, 2, 2', '1, 1, 3, 2, 3'),
    seeds=(0, 1, 2),
    only=None,
    strides_parameter='resnet.resnet18.strides',
):
    """Trains by all variants from all strides with all seeds; makes a table.

    Each run is a process of its own, with the gin files and bindings of this
    one and those of its variant, its strides and its seed on top.

    The workdir receives runs/<run>.json, as soon as a run is finished;
    work/<run>/, what `train` writes, and log.txt; and, whenever this function
    comes to an end, table.md and, with matplotlib, accuracy_macs.png and
    strides.png of all runs that are finished in it.

    Args:
        workdir: Folder of all outputs, made if there is none.
        variants: Dict from a name to a list of gin bindings, strings; None for
            the three poolings: DiffStride, FixedSpectralPooling and strided
            convolution.
        strides: Values of `strides_parameter`, each a string.
        seeds: Of `train`.
        only: Names of the variants to be trained; None for all.
        strides_parameter: The gin parameter that takes initial strides.

    Raises:
        train.SetupError: If something is set wrong, if the folder holds one of
            these runs by other settings, or, after all others, if a run failed.
    """
    with train.setup_errors():
        workdir = train.checked_workdir(workdir, 'sweep.workdir')
        data.check_arguments(
            _RULES, 'sweep.', strides=strides, seeds=seeds, only=only,
            variants=variants, strides_parameter=strides_parameter,
        )  # fmt: skip
        variants = _chosen(variants or _POOLINGS, only)
        config = config_without_sweep()
        runs = [
            _Run(
                workdir,
                {'variant': name, 'strides': start, 'seed': seed},
                [*bindings, f'{strides_parameter} = {start!r}'],
                config,
            )
            for seed, start, (name, bindings) in itertools.product(
                seeds, strides, variants.items()
            )
        ]
        names = [run.name for run in runs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f'Two runs of the sweep have the same name, {name}: '
                    'variants must differ in more than signs'
                )
        for run in runs:
            run.check()
    failed = _run_all(runs)
    _report(workdir, [run.path for run in runs])
    if failed:
        raise train.SetupError(f'{len(failed)} runs failed: {failed[0]}')


_POOLINGS = {
    'DiffStride': ['resnet.Resnet.pooling_cls = @pooling.DiffStride'],
    'FixedSpectralPooling': [
        'resnet.Resnet.pooling_cls = @pooling.FixedSpectralPooling'
    ],
    'strided convolution': ['resnet.Resnet.pooling_cls = None'],
}


def _is_list(value, is_allowed):
    """Whether it is a list of what is allowed, not empty, each once."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(map(is_allowed, value))
        and len(set(value)) == len(value)
    )


def _is_text(value):
    return isinstance(value, str) and value != ''


def _is_dict_of_bindings(value):
    return (
        isinstance(value, dict)
        and _is_list(list(value), _is_text)
        and all(
            isinstance(bindings, (list, tuple)) and all(map(_is_text, bindings))
            for bindings in value.values()
        )
    )


_RULES = {
    'strides': (
        lambda x: _is_list(x, _is_text),
        'a list of strings, each once',
    ),
    'seeds': (
        lambda x: _is_list(x, lambda seed: data.is_int(seed, 0, 2**32)),
        'a list of integers in [0, 2**32), each once',
    ),
    'only': (
        lambda x: x is None or _is_list(x, _is_text),
        'a list of names of variants, each once, or None',
    ),
    'variants': (
        lambda x: x is None or _is_dict_of_bindings(x),
        'a dict from a name to a list of bindings, strings, or None',
    ),
    'strides_parameter': (_is_text, 'the name of a gin parameter'),
}


def _chosen(variants, only):
    for name in only or ():
        if name not in variants:
            raise ValueError(
                f'sweep.only must be names of {list(variants)}. '
                f'Received: {name!r}'
            )
    return {k: v for k, v in variants.items() if only is None or k in only}


def config_without_sweep():
    """The settings that decide the result of a run, beside its own bindings."""
    macros, *sections = gin.config_str().split('# Parameters for ')
    sections = [
        section.split('\n', 2)[-1]
        for section in sections
        if not section.startswith('sweep')
    ]
    return '\n'.join(section.strip() for section in [macros, *sections])


class _Run:
    """One training: its settings, its files and its result."""

    def __init__(self, workdir, labels, bindings, config):
        self.labels = labels
        self.settings = {
            'bindings': [*bindings, f'train.seed = {labels["seed"]}'],
            'config': config,
        }
        label = '{variant} {strides} seed {seed}'.format(**labels)
        self.name = '-'.join(re.findall(r'[\w.]+', label))
        self.folder = workdir / 'work' / self.name
        self.path = workdir / 'runs' / f'{self.name}.json'

    @property
    def is_finished(self):
        return self.path.exists()

    @property
    def result(self):
        return _read(self.path)

    def check(self):
        """Raises SetupError if it was finished or begun by other settings."""
        paths = [self.path]
        if any(self.folder.glob('*.keras')):  # Else nothing was trained by it.
            paths.append(self.folder / 'settings.json')
        for path in paths:
            if path.exists():
                found = _read(path)
                for key, value in self.settings.items():
                    if found.get(key) != value:
                        raise train.SetupError(
                            f'{path} is of other settings ({key}): set '
                            'sweep.workdir to another folder'
                        )

    @contextlib.contextmanager
    def locked(self):
        """Yields an open lock, or None if another process has it.

        The lock is gone when all processes are that hold it, however they end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / 'lock').open('w') as lock:
            yield lock if checkpoints.try_lock(lock) else None

    def execute(self, lock):
        """Trains, in a process that holds the lock too; returns an error."""
        self.check()  # Another process may have begun it.
        checkpoints.write(
            self.folder / 'settings.json', checkpoints.to_json(self.settings)
        )
        flags = main.flags_with(
            *self.settings['bindings'],
            f'train.workdir = {str(self.folder)!r}',
            'run.job = @train.train',
        )
        with (self.folder / 'log.txt').open('a') as log:
            ended = subprocess.run(
                [sys.executable, '-m', 'diffstride.examples.sweep', *flags],
                pass_fds=[lock.fileno()],
                stdout=log,
                stderr=log,
            )
        if ended.returncode == 1:
            return f'{self.name}: {_last_line(self.folder / "log.txt")}'
        if ended.returncode:
            return f'{self.name}: ended by code {ended.returncode}'
        results = _read(self.folder / 'results.json')
        history = checkpoints.read(self.folder / 'history.json')
        self.path.parent.mkdir(exist_ok=True)
        checkpoints.write(
            self.path,
            checkpoints.to_json(
                {**self.labels, **results, 'history': history, **self.settings}
            ),
        )
        return None


def _read(path):
    """The content of a file of JSON that was written as a whole."""
    content = checkpoints.read(path)
    if not isinstance(content, dict):
        raise train.SetupError(f'{path} is damaged: move it away')
    return content


def _last_line(path):
    lines = path.read_text().strip().splitlines()
    return lines[-1] if lines else ''


def _run_all(runs):
    """Trains what is not finished; returns the errors of runs that failed."""
    errors = {}
    while True:
        open_runs = [
            run for run in runs if not run.is_finished and run not in errors
        ]
        if not open_runs:
            return list(errors.values())
        is_idle = True
        for run in open_runs:
            with run.locked() as lock:
                if lock is None or run.is_finished:
                    continue
                is_idle = False
                print(f'{run.name}: {_progress(runs)}', flush=True)
                error = run.execute(lock)
            if error:
                print(f'failed: {error}', flush=True)
                errors[run] = error
            else:
                accuracy = run.result['test_accuracy']
                print(f'{run.name}: {100 * accuracy:.1f}%', flush=True)
        if is_idle:  # Other processes have the rest.
            time.sleep(_POLL_SECONDS)


def _progress(runs):
    """How many runs are finished, and how long the others should take.

    Called while one of the runs is locked for this process.
    """
    seconds, busy = collections.defaultdict(list), 0
    unfinished = []
    for run in runs:
        if run.is_finished:
            seconds[run.labels['variant']].append(run.result['seconds'])
        else:
            unfinished.append(run)
            with run.locked() as lock:
                busy += lock is None
    text = f'{len(runs) - len(unfinished)} of {len(runs)} runs are finished'
    if not seconds:
        return text
    every = statistics.mean(itertools.chain(*seconds.values()))
    left = sum(
        statistics.mean(seconds.get(run.labels['variant'], [every]))
        for run in unfinished
    )
    return f'{text}, about {left / busy / 60:.0f} minutes are left'


def _report(workdir, paths):
    """Tells of the runs at these paths, then of others in the workdir."""
    others = sorted(set((workdir / 'runs').glob('*.json')) - set(paths))
    found = [
        path
        for path in [*paths, *others]
        if path.exists() and not path.name.startswith('unfinished_')
    ]
    if not found:
        return
    groups = grouped(map(_read, found))
    with (workdir / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_report(workdir, groups)


def _write_report(workdir, groups):
    text = table(groups)
    checkpoints.write(workdir / 'table.md', text + '\n')
    print(text)
    with contextlib.suppress(ImportError):  # Of matplotlib, an extra.
        for name, figure in (
            ('accuracy_macs.png', accuracy_macs(groups)),
            ('strides.png', _strides(groups)),
        ):
            if figure is not None:
                checkpoints.write_figure(workdir / name, figure)


def grouped(results):
    """Returns {variant: {initial strides: [result of a run]}}."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        groups[result['variant']][result['strides']].append(result)
    return groups


def table(groups):
    """Returns the results as Markdown."""
    starts = list(dict.fromkeys(s for group in groups.values() for s in group))
    lines = [
        'Test accuracy (%), mean +- standard deviation (n runs), by initial '
        'strides; and the difference of the means from the best and the worst '
        'start.',
        '',
        f'| pooling | {" | ".join(starts)} | difference |',
        '| --- ' * (len(starts) + 2) + '|',
    ]
    for name, group in groups.items():
        means = [
            statistics.mean(x['test_accuracy'] for x in runs)
            for runs in group.values()
        ]
        cells = [
            f'{_spread(group[s], "test_accuracy", 100, 1)} ({len(group[s])})'
            if s in group
            else '-'
            for s in starts
        ]
        difference = f'{100 * (max(means) - min(means)):.1f}'
        cells.append(difference if len(means) > 1 else '-')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    lines += [
        '',
        '| pooling | start | n | test accuracy (%) | MMAC per image | seconds '
        '| learned strides (height, width), mean |',
        '| --- ' * 7 + '|',
    ]
    for name, group in groups.items():
        for start, runs in group.items():
            lines.append(
                f'| {name} | {start} | {len(runs)} '
                f'| {_spread(runs, "test_accuracy", 100, 1)} '
                f'| {_spread(runs, "macs", 1e-6, 1)} '
                f'| {_spread(runs, "seconds", 1, 0)} '
                f'| {_mean_strides(runs)} |'
            )
    configs = {
        run.get('config')
        for group in groups.values()
        for runs in group.values()
        for run in runs
    }
    if len(configs) > 1:
        lines += ['', f'Of {len(configs)} settings: see `config` of each run.']
    return '\n'.join(lines)


def _spread(runs, key, factor, digits):
    values = [factor * run[key] for run in runs]
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{digits}f}'
    return text


def _mean_strides(runs):
    # Layers by their order, since names may differ.
    layers = zip(*(run['layers'].values() for run in runs))
    means = [
        [statistics.mean(s) for s in zip(*(x['strides'] for x in layer))]
        for layer in layers
    ]
    return ', '.join(f'({h:.2f}, {w:.2f})' for h, w in means) or '-'


def accuracy_macs(groups):
    """Returns a figure of the means of what `grouped` returns."""
    points = {}
    for name, group in groups.items():
        points[name] = []
        for runs in group.values():
            accuracies = [run['test_accuracy'] for run in runs]
            points[name].append(
                (
                    statistics.mean(run['macs'] for run in runs),
                    statistics.mean(accuracies),
                    statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
                )
            )
    return plots.accuracy_macs(points)


def _strides(groups):
    learned = {
        name: [run for runs in group.values() for run in runs if run['layers']]
        for name, group in groups.items()
    }
    learned = {name: runs for name, runs in learned.items() if runs}
    if not learned:
        return None
    return plots.strides_of_runs(
        {
            name: [
                (
                    {k: [x[k] for x in run['history']] for k in keys},
                    {k: x['initial_strides'] for k, x in run['layers'].items()},
                )
                for run in runs
                for keys in [run['history'][0]]
            ]
            for name, runs in learned.items()
        }
    )


if __name__ == '__main__':
    app.run(functools.partial(main.main, default_job=sweep))
