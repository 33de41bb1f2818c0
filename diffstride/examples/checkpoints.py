"""The files of a training: each is whole under its name, or absent.

A checkpoint that is written takes its name when it is finished; the one before
it stays as previous.keras until then, and is used should the last be damaged.
"""

import contextlib
import filecmp
import itertools
import json
import os
import re
import shutil
import warnings
import zipfile

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None


class WriteError(Exception):
    """A file could not be written; those before it are whole."""

    def __init__(self, path, reason):
        super().__init__(
            f'{path} cannot be written ({reason}). What was written before is '
            'whole: make room, and the same command continues'
        )


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes from training in a folder.

    The lock ends with the process, however it ends.

    Raises:
        ValueError: If another process has the lock.
    """
    if fcntl is None:
        warnings.warn(
            f'{folder} is not locked, as this system has no flock: do not '
            'start a second training in it',
            stacklevel=4,
        )
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise ValueError(
                f'{folder} is in use by another training, which is still '
                'running: wait for its end, or set train.workdir to another '
                'folder'
            )
        yield
    finally:
        os.close(descriptor)


def try_lock(file):
    """Locks an open file if no other process has; returns whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def unfinished(path):
    """Yields a path for a file that becomes this one at the end.

    Raises:
        WriteError: If it cannot be written.
    """
    temporary = path.with_stem(f'unfinished_{path.stem}')
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(path, error.strerror or error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path, text):
    """Writes a file of text."""
    with unfinished(path) as temporary:
        temporary.write_text(text)


def write_figure(path, figure):
    """Writes a figure of matplotlib."""
    with unfinished(path) as temporary:
        figure.savefig(temporary, dpi=120)


def to_json(content):
    """Text of plain values and of NumPy's."""
    return json.dumps(content, indent=2, default=float)


def read(path):
    """Returns the content of a file of JSON, or None if it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def save(model, workdir, history, results):
    """Writes the checkpoints, the history and the results of an epoch.

    History and results come before the checkpoint: they may be of one epoch
    more, and are cut when the training is restored. The best checkpoint comes
    after it, so that no kill makes it one of an epoch that is cut; restoring
    makes up for it.
    """
    last = workdir / 'last.keras'
    with unfinished(last) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, 'a') as archive:
            archive.comment = b'epoch %d' % len(history)
        write_results(workdir, history, results)
        if last.exists():
            os.replace(last, workdir / 'previous.keras')
    _keep_if_best(last, history)


def write_results(workdir, history, results):
    """Writes the history and the results, without a checkpoint."""
    write(workdir / 'history.json', to_json(history))
    write(workdir / 'results.json', to_json(results))


def _keep_if_best(path, history):
    accuracies = [row['val_accuracy'] for row in history]
    best = path.with_stem('best')
    if accuracies[-1] < max(accuracies) or (
        best.exists() and filecmp.cmp(path, best, shallow=False)
    ):
        return
    with unfinished(best) as temporary:
        shutil.copyfile(path, temporary)


def restore(model, workdir, steps_per_epoch):
    """Loads the last whole checkpoint of a workdir, if it holds any.

    A damaged one is renamed if the one before it is whole, else left alone.

    Args:
        model: A compiled model; its weights and its optimizer's are loaded.
        workdir: Path of the folder.
        steps_per_epoch: Batches of an epoch, those done before too.

    Returns:
        The history, a list of one dict per epoch.

    Raises:
        ValueError: If there are checkpoints and none can be continued.
    """
    last, previous = workdir / 'last.keras', workdir / 'previous.keras'
    found = [path for path in (last, previous) if path.exists()]
    if not found:
        return []
    rows = read(workdir / 'history.json')
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {'epoch', 'val_accuracy'} <= row.keys()
        for row in rows
    ):
        raise ValueError(
            f'{workdir / "history.json"} is damaged or missing, without which '
            f'{found[0].name} cannot be continued: set train.workdir to '
            'another folder'
        )
    errors = []
    model.optimizer.build(model.trainable_variables)
    for path in found:
        try:
            epoch = _load(model, path)
            break
        except Exception as error:
            errors.append(error)
    else:
        raise ValueError(
            f'{found[0]} cannot be continued: it is damaged, or of another '
            'model. Set train.workdir to another folder, or the model as it is '
            f'in {workdir / "config.gin"}. ({first_line(errors[0])})'
        ) from errors[0]
    if epoch is None:  # It was written before checkpoints said it.
        epoch = int(model.optimizer.iterations) / steps_per_epoch
    history = rows[: int(epoch)]
    if not history or len(history) != epoch:
        raise ValueError(
            f'{path} is of epoch {epoch:g}, and history.json of {len(rows)} '
            'epochs: set train.workdir to another folder'
        )
    before = history[-1].get('steps_per_epoch', steps_per_epoch)
    if before != steps_per_epoch:
        raise ValueError(
            f'{path} is of epochs of {before} steps, and not of '
            f'{steps_per_epoch}: set batch_size and train.steps_per_epoch as '
            'before, or another train.workdir'
        )
    if errors:
        names = (workdir / f'damaged_{i}.keras' for i in itertools.count(1))
        damaged = next(name for name in names if not name.exists())
        os.replace(last, damaged)
        print(
            f'{last} is damaged ({first_line(errors[0])}): it is kept as '
            f'{damaged.name}, and {path.name} is continued instead',
            flush=True,
        )
    _keep_if_best(path, history)
    return history


def _load(model, path):
    """Returns the epoch that the checkpoint says it is of, or None."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f'{damaged} in it is damaged')
        epoch = re.fullmatch(rb'epoch (\d+)', archive.comment)
    model.load_weights(path)
    return epoch and int(epoch[1])


def first_line(error):
    """The first line of an error's message; gin and Keras add more."""
    text = re.sub(r'\x1b\[\d*m', '', str(error))  # Colours.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while lines[1:] and lines[0].startswith('Exception encountered when'):
        del lines[0]  # What Keras says where it was is not the cause.
    return lines[0] if lines else type(error).__name__
