"""The files of a run, each of which is whole or absent.

workdir/
  checkpoints/epoch_0007/   the last two epochs:
    model.keras               the model to evaluate and export
    training.keras            the model to train on, if weights are averaged
    state.json                the history and the state of callbacks
  best.keras                the best epoch on validation data
  config.gin                all settings that were in effect
  data.json                 class names, image shape, mean and scale
  results.json              at the end
"""

import collections
import contextlib
import dataclasses
import filecmp
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import filelock
import keras
from absl import logging

IN_USE = 'is in use by another training'


class Stop(Exception):
    """Ends the command with its message, one line, and exit code 1."""


@contextlib.contextmanager
def one_line_errors(
    kinds: tuple = (), interrupted: str = 'interrupted'
) -> Iterator[None]:
    """Ends the process with one line at `Stop`, errors of kinds, or Ctrl-C."""
    try:
        yield
    except (Stop, *kinds) as error:
        logging.debug('The command failed', exc_info=True)  # --verbosity=1
        sys.exit(f'error: {first_line(error)}')
    except KeyboardInterrupt:
        print(f'\n{interrupted}', file=sys.stderr)
        sys.exit(130)


def first_line(error: BaseException | str) -> str:
    """Returns the first line of a message, to which gin and Keras add more."""
    text = re.sub(r'\x1b\[\d*m', '', str(error))  # This removes colors.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while lines[1:] and lines[0].startswith('Exception encountered when'):
        del lines[0]  # Keras says where it happened before the cause.
    return lines[0] if lines else type(error).__name__


# Locks.


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it.

    The lock ends with the process, however it ends.

    Raises:
        Stop: If another process has the lock, or the folder cannot be made.
    """
    # `is_locked` of other processes holds the lock for a moment.
    lock = filelock.FileLock(workdir / 'lock', timeout=1)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise Stop(
            f'{workdir} {IN_USE}: wait for its end, or '
            'set train.workdir to another folder'
        ) from None
    except OSError as error:
        raise Stop(
            f'train.workdir cannot be written: {workdir} ({error.strerror})'
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(workdir: pathlib.Path) -> bool:
    """Returns whether a process is training in the folder."""
    try:
        with filelock.FileLock(workdir / 'lock', timeout=0):
            return False
    except filelock.Timeout:
        return True


# Files that are whole or absent.


@contextlib.contextmanager
def unfinished(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields another path, for a file or folder that is renamed at the end.

    Raises:
        Stop: If it cannot be written.
    """
    temporary = path.with_name(f'unfinished_{path.name}')
    try:
        _remove(temporary)  # A process that was killed may have left it.
        path.parent.mkdir(exist_ok=True)
        yield temporary
        for written in (*temporary.glob('*'), temporary):
            descriptor = os.open(written, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        raise Stop(
            f'{path} cannot be written ({error.strerror or error}). Earlier '
            'files are whole: make room, and the same command continues'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(path: pathlib.Path, content: Any) -> None:
    """Writes text, or any other content as JSON. NaN becomes null."""
    if not isinstance(content, str):
        content = json.dumps(content, default=lambda x: x.tolist())
        content = json.loads(content, parse_constant=lambda name: None)
        content = json.dumps(content, indent=1)
    with unfinished(path) as temporary:
        temporary.write_text(content)


def read(path: pathlib.Path) -> Any:
    """Returns the content of a file of JSON, or None if it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_figure(path: pathlib.Path, figure: Any) -> None:
    """Writes a figure of Matplotlib."""
    with unfinished(path) as temporary:
        figure.savefig(temporary, dpi=120)


# Checkpoints.


@dataclasses.dataclass
class State:
    """The progress of a training.

    It has one dict per epoch; for each callback the name of its class and the
    values that it remembers; whether a callback has ended the training early;
    and the settings under which the last epoch ran.
    """

    history: list[dict] = dataclasses.field(default_factory=list)
    callbacks: list[tuple] = dataclasses.field(default_factory=list)
    ended: bool = False
    settings: str = ''


def epoch_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints, the newest first."""
    folders = [
        path
        for path in workdir.glob('checkpoints/epoch_*')
        if path.name.removeprefix('epoch_').isdecimal()
    ]
    return sorted(folders, key=_epoch, reverse=True)


def _epoch(folder):
    return int(folder.name.removeprefix('epoch_'))


def result_file(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the path of the best model, or else of the last one."""
    best = workdir / 'best.keras'
    return best if best.exists() else epoch_folders(workdir)[0] / 'model.keras'


def best_epoch(history: list[dict]) -> int | None:
    """Returns the epoch with the best accuracy on validation data, from 1.

    While `StrideBudget` learns strides, an epoch may be beyond the budget, so
    only those count in which strides are held.

    Returns:
        The first of the best epochs, or None if none counts.
    """
    accuracies = {
        epoch: row['val_accuracy']
        for epoch, row in enumerate(history, 1)
        if row.get('val_accuracy') is not None and row.get('strides_held', True)
    }
    return max(accuracies, key=accuracies.__getitem__, default=None)


def save(
    model: keras.Model,
    workdir: pathlib.Path,
    state: State,
    averaged: contextlib.AbstractContextManager | None = None,
) -> None:
    """Writes the checkpoint of an epoch, the last one of the state.

    Within the context `averaged`, the model holds its averaged weights; None
    if weights are not averaged. Ctrl-C takes effect at the end.
    """
    path = workdir / 'checkpoints' / f'epoch_{len(state.history):04}'
    with _later_interrupts(), unfinished(path) as folder:
        folder.mkdir()
        if averaged is not None:
            model.save(folder / 'training.keras')
        with averaged or contextlib.nullcontext():
            model.save(folder / 'model.keras')
        write(folder / 'state.json', dataclasses.asdict(state))
    _tidy(workdir, state.history)


@contextlib.contextmanager
def _later_interrupts():
    """Lets Ctrl-C take effect at the end: within, Keras and h5py ignore some.

    Python allows this in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        signal.raise_signal(signal.SIGINT)


def _tidy(workdir, history):
    """Keeps the two last epochs, and the last one if it is the best."""
    for old in epoch_folders(workdir)[2:]:
        shutil.rmtree(old)
    path = epoch_folders(workdir)[0] / 'model.keras'
    best = workdir / 'best.keras'
    if best_epoch(history) == len(history) and not (
        best.exists() and filecmp.cmp(path, best, shallow=False)
    ):
        with unfinished(best) as temporary:
            shutil.copyfile(path, temporary)


def restore(
    model: keras.Model, workdir: pathlib.Path, steps_per_epoch: int
) -> State:
    """Loads the last whole checkpoint of a workdir, if it holds any.

    The weights of the model and of its optimizer are loaded. A damaged
    checkpoint is renamed if the one before it is whole, and left alone
    otherwise.

    Raises:
        Stop: If there are checkpoints and none can be continued.
    """
    folders = epoch_folders(workdir)
    if not folders:
        return State()
    model.optimizer.build(model.trainable_variables)
    damaged = {}
    for folder in folders:
        try:
            state = _load(model, folder)
            break
        except Exception as error:  # Keras raises errors of many kinds.
            damaged[folder] = error
    else:
        reason = damaged[folders[0]]
        raise Stop(
            f'{folders[0]} cannot be continued: it is damaged, or of another '
            'model. Set train.workdir to another folder, or the model as it is '
            f'in {workdir / "config.gin"}. ({first_line(reason)})'
        ) from reason
    before = state.history[-1]['steps']
    if before != steps_per_epoch:
        raise Stop(
            f'{folder} is of epochs of {before} steps, and not of '
            f'{steps_per_epoch}: set the data and the batch size as before, or '
            'another train.workdir'
        )
    for old, reason in damaged.items():
        name = f'damaged_{time.strftime("%Y%m%d_%H%M%S")}_{old.name}'
        os.replace(old, old.with_name(name))
        print(
            f'{old} is damaged ({first_line(reason)}): it is kept as {name}, '
            f'and {folder.name} is continued instead',
            flush=True,
        )
    _tidy(workdir, state.history)
    return state


def _load(model, folder):
    state = State(**json.loads((folder / 'state.json').read_text()))
    if len(state.history) != _epoch(folder):
        raise ValueError('state.json is of another epoch')
    path = folder / 'training.keras'
    if not path.exists():
        path = folder / 'model.keras'
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError(f'{path.name} is damaged')
    load_weights(model, path)
    return state


def load_weights(model: keras.Model, path: pathlib.Path) -> None:
    """Loads the weights of a model and the state of its optimizer.

    After a change of settings the optimizer may have other variables than the
    one that was saved. It gets the values of those that both have.
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read('config.json'))
    optimizer = model.optimizer
    saved = keras.saving.deserialize_keras_object(
        config['compile_config']['optimizer'],
        custom_objects={type(optimizer).__name__: type(optimizer)},
    )
    saved.build(model.trainable_variables)
    model.optimizer = saved
    try:
        model.load_weights(path)
    finally:
        model.optimizer = optimizer
    values = collections.defaultdict(list)
    for variable in saved.variables:
        values[variable.name].append(variable.value)
    for variable in optimizer.variables:
        if values[variable.name]:
            variable.assign(values[variable.name].pop(0))
