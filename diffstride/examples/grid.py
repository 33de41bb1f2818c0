r"""Trains every variant from every start with every seed.

    python3 -m diffstride.examples.grid --gin_config=cifar10_grid.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/grid'"

Each run is one command of `main` with a workdir of its own. A run that is
finished is not repeated, so the same command continues a grid that was stopped
at any point. Several processes with the same command share the runs.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import filelock
import gin
from absl import app

from diffstride.examples import checkpoints, report, rules, settings
from diffstride.examples.checkpoints import Stop
from diffstride.examples.train import checked_workdir
from diffstride.validation import is_integer, require

_POLL_SECONDS = 5
_POOLINGS = {
    'DiffStride': ['resnet.Resnet.pooling_cls = @pooling.DiffStride'],
    'FixedSpectralPooling': [
        'resnet.Resnet.pooling_cls = @pooling.FixedSpectralPooling'
    ],
    'strided convolution': ['resnet.Resnet.pooling_cls = None'],
}


def _is_bindings(value):
    return value == [] or rules.are(value, rules.is_text)


_RULES = {
    'variants': (
        'a dict from a name to a list of bindings, or None',
        lambda x: (
            x is None
            or (
                isinstance(x, dict)
                and rules.are(list(x), rules.is_text)
                and all(map(_is_bindings, x.values()))
            )
        ),
    ),
    'strides': (
        'a list of strings, each once, or None',
        lambda x: x is None or rules.are(x, rules.is_text),
    ),
    'seeds': (
        'a list of integers in [0, 2**32), each once',
        lambda values: rules.are(
            values, lambda x: is_integer(x, least=0) and x < 2**32
        ),
    ),
    'strides_parameter': ('the name of a gin parameter', rules.is_text),
}


def grid(
    variants: dict[str, list[str]] | None = None,
    strides: list[str] | None = None,
    seeds: Sequence[int] = (0,),
    only: list[str] | None = None,
    strides_parameter: str = 'resnet.resnet18.strides',
    note: str = '',
) -> 'Grid':
    """Prepares the commands of all runs; writes nothing yet.

    The workdir, `train.workdir`, receives a folder for each run, with the files
    of `train` and log.txt, and the files of `report`.

    Args:
        variants: Maps a name to a list of gin bindings, strings; None for
            DiffStride, FixedSpectralPooling and strided convolution.
        strides: Values of `strides_parameter`, each a string; None to leave it
            as it is.
        seeds: Seeds of the runs, see `train`.
        only: Names of the variants to be trained; None for all.
        strides_parameter: The gin parameter that takes initial strides.
        note: Text to print above the table, such as what to look at.

    Raises:
        ValueError: If something is set wrong.
    """
    rules.check(locals(), _RULES)
    variants = _POOLINGS if variants is None else variants
    require(
        only is None
        or (rules.are(only, rules.is_text) and set(only) <= set(variants)),
        f'`only` must be a list of some of {list(variants)}, or None',
        only=only,
    )
    workdir = None
    with contextlib.suppress(ValueError):  # It is not bound.
        workdir = gin.query_parameter('train.train.workdir')
    workdir = checked_workdir(workdir)
    config = _without_grid(gin.config_str())
    with gin.unlock_config():  # Gin must know all bindings of the variants.
        for name, bindings in variants.items():
            text = '\n'.join(bindings)
            with settings.naming(f'grid.variants[{name!r}]', text):
                gin.parse_config(text)
    runs: dict[str, list[str]] = {}
    starts: list[str | None] = [*strides] if strides else [None]
    for seed, start, name in itertools.product(seeds, starts, only or variants):
        words = re.findall(r'[\w.]+', f'{name} {start or ""} seed {seed}')
        run = '-'.join(words)
        require(
            run not in runs,
            '`variants` and `strides` must differ in more than signs',
            run=run,
        )
        labels = {'variant': name, 'strides': start, 'seed': seed}
        runs[run] = [
            *variants[name],
            *([f'{strides_parameter} = {start!r}'] if start else []),
            f'train.seed = {seed}',
            f'train.labels = {labels!r}',
            f'train.workdir = {str(workdir / run)!r}',
        ]
    return Grid(workdir, config, runs, note)


def _without_grid(text):
    """Returns a gin text without the settings of the grid itself."""
    before, *sections = text.split('# Parameters for ')
    own = re.compile(r'((grid\.)?grid|(main\.)?run):')
    sections = [x.split('\n', 2)[2] for x in sections if not own.match(x)]
    return '\n'.join([before, *sections])


@dataclasses.dataclass
class Grid:
    """A grid that is prepared; see `grid`.

    `config` is the gin text that the runs have in common; `runs` has the
    bindings of each run by its name.
    """

    workdir: pathlib.Path
    config: str
    runs: dict[str, list[str]]
    note: str = ''

    def run(self) -> None:
        """Trains unfinished runs, then reports on all runs in the workdir.

        Raises:
            checkpoints.Stop: If the folder holds a grid of other settings, or,
                after all others, if a run failed.
        """
        path = self.workdir / 'grid.gin'
        self.workdir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.workdir / 'lock'):
            before = path.read_text() if path.exists() else self.config
            changes, _ = settings.changes(before, self.config)
            if changes:
                raise Stop(
                    f'{self.workdir} is a grid of other settings: '
                    f'{"; ".join(changes)}. Set train.workdir to another folder'
                )
            checkpoints.write(path, self.config)
        failed = self._run_all()
        if self.note:
            print(f'\n{self.note}')
        with filelock.FileLock(self.workdir / 'lock'):
            report.write(self.workdir)
        if failed:
            raise Stop(
                f'{len(failed)} of {len(self.runs)} runs failed: '
                f'{next(iter(failed.values()))}'
            )

    def _run_all(self):
        """Trains runs until all are done; returns {run: why it failed}."""
        failed = {}
        while True:
            left = [
                run
                for run in self.runs
                if run not in failed and not self._is_finished(run)
            ]
            if not left:
                return failed
            if not any([self._try(run, failed) for run in left]):
                time.sleep(_POLL_SECONDS)  # Other processes have the rest.

    def _try(self, run, failed):
        """Trains a run unless another process has it; returns whether."""
        self._of(run).mkdir(exist_ok=True)
        lock = filelock.FileLock(self._of(run) / 'grid.lock', timeout=0)
        with contextlib.suppress(filelock.Timeout), lock:
            if self._is_finished(run):
                return True
            if checkpoints.is_locked(self._of(run)):
                return False  # The grid that began it was killed.
            done = sum(map(self._is_finished, self.runs))
            print(f'{run} ({done} of {len(self.runs)} are done)', flush=True)
            line, succeeded = self._train(run)
            if checkpoints.IN_USE in line and not succeeded:
                return False
            print(line if succeeded else f'failed: {line}', flush=True)
            if succeeded:
                path = self._of(run) / 'command.txt'
                checkpoints.write(path, self._text(run))
            else:
                failed[run] = f'{run}: {line}'
            return True
        return False

    def _of(self, run):
        return self.workdir / run

    def _text(self, run):
        return '\n'.join([self.config, *self.runs[run]])

    def _is_finished(self, run):
        path = self._of(run) / 'command.txt'
        return path.exists() and path.read_text() == self._text(run)

    def _train(self, run):
        """Returns the last line of the command, and whether it succeeded."""
        command = [
            sys.executable,
            '-m',
            'diffstride.examples.main',
            f'--gin_config={self.workdir / "grid.gin"}',
            *(f'--gin_bindings={binding}' for binding in self.runs[run]),
        ]
        path = self._of(run) / 'log.txt'
        with path.open('a') as log:
            ended = subprocess.run(
                command, stdout=log, stderr=subprocess.PIPE, text=True
            )
        text = ended.stderr if ended.returncode else path.read_text()
        with path.open('a') as log:
            log.write(ended.stderr)
        if ended.returncode == 130:
            raise KeyboardInterrupt
        lines = text.strip().splitlines()
        line = lines[-1] if lines else f'it ended with {ended.returncode}'
        return line, ended.returncode == 0


if __name__ == '__main__':
    from diffstride.examples import main

    app.run(functools.partial(main.main, default_job='grid.grid'))
