"""Trainings that are stopped, damaged, doubled or out of disk."""

import contextlib
import errno
import functools
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time
import zipfile

import keras
import numpy as np
import pytest
import small_runs
from backends import run_apart, start
from small_runs import files, history_of, read

from diffstride.examples import checkpoints
from diffstride.examples.checkpoints import State, Stop

STEPS = 5
UP, DOWN = (0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1)


def newest(workdir):
    return checkpoints.epoch_folders(workdir)[0]


def epochs_of(workdir):
    folders = checkpoints.epoch_folders(workdir)
    return int(folders[0].name[-4:]) if folders else 0


def check_files(workdir):
    """Each file must be whole under its name."""
    for path in workdir.rglob('*'):
        if 'unfinished' in str(path.relative_to(workdir)):
            continue
        if path.suffix == '.keras':
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
        if path.suffix == '.json':
            json.loads(path.read_text())


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Killer:
    """Ends all operations on files from the n-th on.

    If `halfway`, it is the n-th of those that can be cut off half-way, and it
    is. An fsync is no operation, since it does not change what is read.
    """

    def __init__(self, monkeypatch, halfway):
        self.halfway = halfway
        self.begin(0)
        for owner, name in (
            (os, 'replace'),
            (os, 'mkdir'),
            (shutil, 'copyfile'),
            (shutil, 'rmtree'),
            (pathlib.Path, 'write_text'),
            (pathlib.Path, 'unlink'),
            (keras.Model, 'save'),
        ):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def begin(self, fatal):
        """Counts from now on; 0 lets all operations be."""
        self.left, self.killed = fatal, False

    def guard(self, function):
        @functools.wraps(function)
        def guarded(*args, **kwargs):
            if self.killed:
                raise Killed
            name = function.__name__
            target = {'copyfile': 1, 'rmtree': 0, 'save': 1, 'write_text': 0}
            is_counted = not self.halfway or name in target
            self.left -= is_counted
            self.killed = is_counted and self.left == 0
            if not self.killed:
                return function(*args, **kwargs)
            path = pathlib.Path(args[target.get(name, 0)])
            if self.halfway and name == 'rmtree':
                os.remove(next(p for p in path.rglob('*') if p.is_file()))
            elif self.halfway:
                path.write_bytes(b'PK half')
            raise Killed

        return guarded


@functools.cache
def only_model():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(momentum=0.9), 'mse')
    model.optimizer.build(model.trainable_variables)
    return model


def model_after(epoch):
    """Returns the model after some epochs; its weights are their number."""
    model = only_model()
    model.set_weights([np.full((1, 1), epoch), np.full(1, epoch)])
    model.optimizer.iterations.assign(epoch * STEPS)
    return model


def epoch_in(path):
    model = model_after(0)
    model.load_weights(path)
    return int(model.get_weights()[0][0, 0])


def save(workdir, history, accuracies, epochs=1, **others):
    for _ in range(epochs):
        epoch = len(history) + 1
        row = {'epoch': epoch, 'steps': STEPS, **others}
        history.append({**row, 'val_accuracy': accuracies[epoch - 1]})
        checkpoints.save(model_after(epoch), workdir, State(history))
    return history


@pytest.mark.parametrize(
    'epoch, accuracies, halfway',
    [(1, UP, False), (3, UP, False), (3, UP, True), (3, DOWN, False)],
)
def test_a_kill_at_any_operation_loses_no_finished_epoch(
    tmp_path, monkeypatch, epoch, halfway, accuracies
):
    """The epoch that is repeated is worse the second time, as it may be."""
    killer = Killer(monkeypatch, halfway)
    before = tmp_path / 'before'
    before.mkdir()
    history = save(before, [], accuracies, epoch - 1)
    for fatal in itertools.count(1):
        workdir = tmp_path / str(fatal)
        shutil.copytree(before, workdir)
        killer.begin(fatal)
        with contextlib.suppress(Killed):
            save(workdir, list(history), accuracies)
        killed = killer.killed
        killer.begin(0)
        check_files(workdir)

        model = model_after(0)
        restored = checkpoints.restore(model, workdir, STEPS).history
        assert len(restored) in (epoch - 1, epoch)
        assert len(restored) == int(model.get_weights()[0][0, 0])
        assert model.optimizer.iterations == len(restored) * STEPS
        check_best(workdir, restored)
        if len(restored) < epoch:
            save(workdir, restored, [x - 0.15 for x in accuracies])
            check_best(workdir, restored)
        check_files(workdir)
        folders = checkpoints.epoch_folders(workdir)
        kept = ['epoch_0003', 'epoch_0002'] if epoch == 3 else ['epoch_0001']
        assert [folder.name for folder in folders] == kept
        assert epoch_in(folders[0] / 'model.keras') == epoch
        assert read(folders[0] / 'state.json')['history'] == restored
        assert not list(workdir.rglob('unfinished*'))
        if not killed:
            break
    assert fatal >= (5 if halfway else 8)


def check_best(workdir, history):
    """The best checkpoint is of an epoch that is in the history."""
    path = workdir / 'best.keras'
    assert path.exists() == bool(history)
    if history:
        best = max(history, key=lambda row: row['val_accuracy'])
        assert epoch_in(path) == best['epoch']


def test_only_epochs_within_the_budget_are_the_best(tmp_path):
    accuracies = 0.9, 0.5, 0.7, 0.6
    history = save(tmp_path, [], accuracies, strides_held=0)
    assert not (tmp_path / 'best.keras').exists()
    save(tmp_path, history, accuracies, epochs=3, strides_held=1)
    assert checkpoints.best_epoch(history) == 3
    assert epoch_in(checkpoints.result_file(tmp_path)) == 3


@pytest.mark.parametrize('name', ['model.keras', 'state.json'])
@pytest.mark.parametrize('how', ['missing', 'cut', 'changed'])
def test_a_damaged_checkpoint_is_not_continued(tmp_path, capsys, name, how):
    history = save(tmp_path, [], DOWN, 3)
    path = newest(tmp_path) / name
    content = path.read_bytes()
    half = len(content) // 2
    path.unlink()
    if how != 'missing':
        rest = b'' if how == 'cut' else b'\0\xff' + content[half + 2 :]
        path.write_bytes(content[:half] + rest)
    state = checkpoints.restore(model_after(0), tmp_path, STEPS)
    assert state.history == history[:2]
    assert 'epoch_0003 is damaged' in capsys.readouterr().out
    (damaged,) = tmp_path.glob('checkpoints/damaged_*_epoch_0003')
    assert len(list(damaged.iterdir())) == (1 if how == 'missing' else 2)
    save(tmp_path, state.history, DOWN)
    assert epoch_in(newest(tmp_path) / 'model.keras') == 3


def test_what_cannot_be_continued_is_left_alone(tmp_path):
    """Epochs have another length, or no file is whole."""
    save(tmp_path, [], UP, 2)
    (tmp_path / 'checkpoints' / 'epoch_0003.old').touch()  # It is the user's.
    before = files(tmp_path)
    with pytest.raises(Stop, match='of epochs of 5 steps, and not of 4'):
        checkpoints.restore(model_after(0), tmp_path, STEPS - 1)
    assert files(tmp_path) == before
    for folder in checkpoints.epoch_folders(tmp_path):
        (folder / 'model.keras').write_bytes(b'PK')
    before = files(tmp_path)
    with pytest.raises(Stop, match='epoch_0002 cannot be continued'):
        checkpoints.restore(model_after(0), tmp_path, STEPS)
    assert files(tmp_path) == before


def test_ctrl_c_in_a_checkpoint_takes_effect_after_it(tmp_path, monkeypatch):
    """Keras and h5py ignore a KeyboardInterrupt at some moments of saving."""
    whole_save = keras.Model.save

    def interrupted(model, path):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        whole_save(model, path)

    monkeypatch.setattr(keras.Model, 'save', interrupted)
    # A process in the background of a script is started to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, [], UP)
    assert epochs_of(tmp_path) == 1
    check_files(tmp_path)
    with pytest.raises(KeyboardInterrupt):  # The handler is the one before.
        signal.raise_signal(signal.SIGINT)


def test_no_nan_is_written(tmp_path):
    path = tmp_path / 'x.json'
    content = {'a': [float('nan'), np.float32('inf'), np.arange(2)], 3: True}
    checkpoints.write(path, content)
    assert read(path) == {'a': [None, None, [0, 1]], '3': True}


def test_a_second_process_is_refused_until_the_first_ends(run):
    holder = (
        'import sys, time, filelock\n'
        'with filelock.FileLock(sys.argv[1]):\n'
        '    print("held", flush=True)\n'
        '    time.sleep(600)\n'
    )
    workdir = run(epochs=1)
    before = files(workdir)
    with start('-c', holder, workdir / 'lock', stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == 'held\n'
        assert checkpoints.is_locked(workdir)
        with pytest.raises(SystemExit, match='in use by another training'):
            run(epochs=2)
        other.kill()
    assert files(workdir) == before
    assert not checkpoints.is_locked(workdir)
    run(epochs=2)


def arguments(config, workdir, epochs, *bindings):
    """The arguments of a small training."""
    bindings += small_runs.LINEAR, f'train.num_epochs = {epochs}'
    return small_runs.command(*bindings, workdir=workdir, gin_config=[config])


@pytest.mark.slow
def test_a_stopped_training_ends_as_an_uninterrupted_one(config, tmp_path):
    """SIGKILL and Ctrl-C in an epoch, in its writing, before the first one."""
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    deterministic = 'train.deterministic = True'
    for kind, more_epochs, seconds in (
        (signal.SIGKILL, 0, 0.1),
        (signal.SIGINT, 1, 0.0),
        (signal.SIGKILL, 1, 0.4),
    ):
        target = epochs_of(stopped) + more_epochs
        with start(
            *('-m', *arguments(config, stopped, 999999, deterministic)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell lets what it runs in the background ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            for line in process.stdout:
                if line.startswith('Epochs '):
                    break
            while epochs_of(stopped) < target:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(seconds)
            assert process.poll() is None
            process.send_signal(kind)
            _, errors = process.communicate()
        if kind == signal.SIGINT:
            assert process.returncode == 130
            told = '\ninterrupted; the same command continues\n'
            assert errors.endswith(told) and 'Traceback' not in errors
        check_files(stopped)
        assert epochs_of(stopped) >= target
    end = epochs_of(stopped) + 1
    small_runs.run_apart_in_turn(
        [arguments(config, x, end, deterministic) for x in (whole, stopped)]
    )
    assert history_of(whole) == history_of(stopped)
    results = [read(workdir / 'results.json') for workdir in (whole, stopped)]
    for key in ('epochs', 'steps', 'test_loss', 'epoch'):
        assert results[0][key] == results[1][key]


@pytest.mark.slow
def test_a_full_disk_ends_the_training_with_its_checkpoint_whole(config, run):
    """The kernel refuses to write files beyond the size of a checkpoint."""
    workdir = run(epochs=1)
    before = files(workdir / 'checkpoints')
    limit = len(before[newest(workdir) / 'model.keras']) // 2
    limits = resource.RLIMIT_FSIZE, (limit, limit)
    done = run_apart(
        *('-m', *arguments(config, workdir, 2)),
        preexec_fn=lambda: resource.setrlimit(*limits),
    )
    assert done.returncode == 1, done.stderr[-3000:]
    *others, last_line = done.stderr.splitlines()
    assert last_line.startswith('error: ')
    assert not [line for line in others if line.startswith('error: ')]
    assert 'Traceback' not in done.stderr
    assert 'epoch_0002 cannot be written' in last_line
    assert os.strerror(errno.EFBIG) in last_line
    assert 'the same command continues' in last_line
    assert files(workdir / 'checkpoints') == before
    run(epochs=2)
    assert epochs_of(workdir) == 2
