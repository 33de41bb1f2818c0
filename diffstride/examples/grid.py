r"""Trains every variant from every start with every seed.

    python3 -m diffstride.examples.main --gin_config=cifar10_grid.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/grid'"

A gin file asks for it by `run.job = @grid.grid`. Each run is one command with a
workdir of its own. A run that is finished is not repeated, so the same command
continues a grid that was stopped at any point. Several processes with the same
command share the runs.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import filelock
import gin

from diffstride.examples import checkpoints, report, rules, settings
from diffstride.examples.checkpoints import Stop
from diffstride.examples.train import checked_workdir
from diffstride.validation import require

_POLL_SECONDS = 5


def _are_texts(values):
    return rules.are(values, rules.is_text)


def _are_variants(values):
    return (
        isinstance(values, dict)
        and _are_texts(list(values))
        and all(value == [] or _are_texts(value) for value in values.values())
    )


def _are_seeds(values):
    return rules.are(values, rules.is_seed)


Variants = Annotated[
    dict[str, list[str]],
    rules.Rule('a dict from a name to a list of bindings', _are_variants),
]
Texts = Annotated[
    list[str], rules.Rule('a list of strings, each once', _are_texts)
]
Seeds = Annotated[
    Sequence[int],
    rules.Rule('a list of integers in [0, 2**32), each once', _are_seeds),
]


@gin.configurable(module='grid')
def grid(
    variants: Variants | None = None,
    strides: Texts | None = None,
    seeds: Seeds = (0,),
    strides_parameter: rules.Text = 'resnet.resnet18.strides',
) -> 'Grid':
    """Prepares the commands of all runs; writes nothing yet.

    The workdir, `train.workdir`, receives a folder for each run, with the files
    of `train` and log.txt, and the files of `report`.

    Args:
        variants: Maps a name to a list of gin bindings, strings; None for one
            variant, with the other settings alone.
        strides: Values of `strides_parameter`, each a string; None to leave it
            as it is.
        seeds: Seeds of the runs, see `train`.
        strides_parameter: The gin parameter that takes initial strides.

    Raises:
        ValueError: If something is set wrong.
    """
    rules.check(grid, locals())
    variants = variants or {'network': []}
    starts = strides or ['']
    workdir = None
    with contextlib.suppress(ValueError):  # It is not bound.
        workdir = gin.query_parameter('train.train.workdir')
    workdir = checked_workdir(workdir)
    # The runs have all settings in common but those of the grid itself.
    own = r'# Parameters for (grid\.grid|grid|main\.run|run):\n(.+\n)*'
    config = re.sub(own, '', gin.config_str())
    with gin.unlock_config():  # Gin must know all bindings of the variants.
        for name, bindings in variants.items():
            text = '\n'.join(bindings)
            with settings.naming(f'grid.variants[{name!r}]', text):
                gin.parse_config(text)
        if strides:
            text = f'{strides_parameter} = {strides[0]!r}'
            with settings.naming('grid.strides_parameter', text):
                gin.parse_config(text)
    runs: dict[str, list[str]] = {}
    for seed, start, name in itertools.product(seeds, starts, variants):
        words = re.findall(r'[\w.]+', f'{name} {start} seed {seed}')
        run = '-'.join(words)
        require(
            run not in runs,
            '`variants` and `strides` must differ in more than signs',
            run=run,
        )
        labels = {'variant': name, 'strides': start or None, 'seed': seed}
        runs[run] = [
            *variants[name],
            *([f'{strides_parameter} = {start!r}'] if start else []),
            f'train.seed = {seed}',
            f'train.labels = {labels!r}',
            f'train.workdir = {str(workdir / run)!r}',
        ]
    return Grid(workdir, config, runs)


@dataclasses.dataclass
class Grid:
    """A grid that is prepared; see `grid`.

    `config` is the gin text that the runs have in common; `runs` has the
    bindings of each run by its name.
    """

    workdir: pathlib.Path
    config: str
    runs: dict[str, list[str]]

    def run(self) -> None:
        """Trains unfinished runs, then reports on all runs in the workdir.

        Raises:
            checkpoints.Stop: If the folder holds a grid of other settings, or,
                after all others, if a run failed.
        """
        # Without this, SIGTERM would leave the training of the moment running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
        failed: dict[str, str] = {}
        while left := [
            run
            for run in self.runs
            if run not in failed and not self._is_finished(run)
        ]:
            if not any([self._try(run, failed) for run in left]):
                time.sleep(_POLL_SECONDS)  # Other processes have the rest.
        with filelock.FileLock(self.workdir / 'lock'):
            report.write(self.workdir)
        if failed:
            run, reason = next(iter(failed.items()))
            count = f'{len(failed)} of {len(self.runs)}'
            raise Stop(f'{count} runs failed: {run}: {reason}')

    def _try(self, run, failed):
        """Trains a run. Returns False if another process has it."""
        folder = self.workdir / run
        folder.mkdir(exist_ok=True)
        lock = filelock.FileLock(folder / 'grid.lock', timeout=0)
        with contextlib.suppress(filelock.Timeout), lock:
            if self._is_finished(run):
                return True
            if checkpoints.is_locked(folder):
                return False  # The grid that began it was killed.
            done = sum(map(self._is_finished, self.runs))
            print(f'{run} ({done} of {len(self.runs)} are done)', flush=True)
            line, succeeded = self._train(run)
            if checkpoints.IN_USE in line and not succeeded:
                return False
            print(line if succeeded else f'failed: {line}', flush=True)
            if succeeded:
                checkpoints.write(folder / 'command.txt', self._text(run))
            else:
                failed[run] = line
            return True
        return False

    def _text(self, run):
        return '\n'.join([self.config, *self.runs[run]])

    def _is_finished(self, run):
        path = self.workdir / run / 'command.txt'
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
        path = self.workdir / run / 'log.txt'
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
