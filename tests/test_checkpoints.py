"""Trainings that are killed, damaged, doubled or out of disk."""

import functools
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
from test_train import SMALL, images, read, run  # noqa: F401

from diffstride.examples import checkpoints


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def without_seconds(history):
    return [
        {key: value for key, value in row.items() if key != 'seconds'}
        for row in history
    ]


@pytest.fixture
def config(images, tmp_path):  # noqa: F811
    path = tmp_path / 'process.gin'
    path.write_text(f"{SMALL}data.load_datasets.name = '{images}'\n")
    return path


def command(config, workdir, *bindings):
    """The command line that trains in a process of its own."""
    return [
        *(sys.executable, '-m', 'diffstride.examples.main'),
        f'--gin_config={config}',
        f"--gin_bindings=train.workdir = '{workdir}'",
        *(f'--gin_bindings={binding}' for binding in bindings),
    ]


def ended(*arguments, **kwargs):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, **kwargs
    )


def test_equal_seeds_give_equal_numbers_and_others_do_not(run):  # noqa: F811
    first, again, other = (
        without_seconds(
            read(
                run(
                    f'train.seed = {seed}', 'train.num_epochs = 1', workdir=name
                )
                / 'history.json'
            )
        )
        for seed, name in ((0, 'first'), (0, 'again'), (1, 'other'))
    )
    assert first == again
    assert first[0]['loss'] != other[0]['loss']


def test_the_checkpoint_before_a_damaged_one_is_continued(run, capsys):  # noqa: F811
    whole = read(run('train.num_epochs = 4', workdir='whole') / 'history.json')
    workdir = run('train.num_epochs = 3')
    damaged = bytearray((workdir / 'last.keras').read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (workdir / 'last.keras').write_bytes(damaged)
    capsys.readouterr()
    run('train.num_epochs = 4')
    printed = capsys.readouterr().out
    assert f'{workdir / "last.keras"} is damaged' in printed
    assert 'Epochs 3 to 4' in printed
    assert (workdir / 'damaged_1.keras').read_bytes() == damaged
    assert without_seconds(read(workdir / 'history.json')) == without_seconds(
        whole
    )


def test_a_kill_between_two_names_leaves_the_checkpoint_before(run, capsys):  # noqa: F811
    workdir = run('train.num_epochs = 2')
    (workdir / 'last.keras').unlink()
    run('train.num_epochs = 3')
    assert 'Epochs 2 to 3' in capsys.readouterr().out
    assert [row['epoch'] for row in read(workdir / 'history.json')] == [1, 2, 3]


def test_without_a_whole_checkpoint_all_are_left_alone(run):  # noqa: F811
    workdir = run('train.num_epochs = 2')
    for name in ('last.keras', 'previous.keras'):
        (workdir / name).write_bytes(b'PK')
    before = files(workdir)
    with pytest.raises(SystemExit, match=r'last\.keras cannot be continued'):
        run('train.num_epochs = 3')
    assert files(workdir) == before


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    holder = (
        'import pathlib, time\n'
        'from diffstride.examples.checkpoints import locked\n'
        f'with locked(pathlib.Path({str(tmp_path)!r})):\n'
        '    print("held", flush=True)\n'
        '    time.sleep(600)\n'
    )
    with subprocess.Popen(
        [sys.executable, '-c', holder], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == 'held\n'
        with (
            pytest.raises(ValueError, match='in use by another training'),
            checkpoints.locked(tmp_path),
        ):
            pass
        process.kill()
    with checkpoints.locked(tmp_path), pytest.raises(ValueError):
        with checkpoints.locked(tmp_path):
            pass
    with checkpoints.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_second_training_in_a_workdir_is_refused(run, tmp_path):  # noqa: F811
    workdir = run('train.num_epochs = 1')
    before = files(workdir)
    with checkpoints.locked(workdir):
        with pytest.raises(SystemExit, match='in use by another training'):
            run('train.num_epochs = 2')
    assert files(workdir) == before


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / 'history.json'
    checkpoints.write(path, 'before')
    with pytest.raises(checkpoints.WriteError, match='No space left'):
        with checkpoints.unfinished(path) as temporary:
            temporary.write_text('half')
            with open('/dev/full', 'w') as full:
                full.write('half')
    assert path.read_text() == 'before'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_full_disk_ends_the_training_with_its_checkpoint_whole(
    config, tmp_path
):
    """The kernel refuses to write files beyond the size of a checkpoint."""
    workdir = tmp_path / 'run'
    assert ended(config, workdir, 'train.num_epochs = 1').returncode == 0
    before = files(workdir)
    size = len(before[workdir / 'last.keras'])
    for limit in (size // 2, size - 1):
        done = ended(
            config,
            workdir,
            'train.num_epochs = 2',
            preexec_fn=lambda limit=limit: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, limit)
            ),
        )
        assert done.returncode == 1, done.stderr[-3000:]
        last_line = done.stderr.splitlines()[-1]
        assert 'last.keras cannot be written' in last_line
        assert 'the same command continues' in last_line
        after = files(workdir)
        assert not [p for p in after if 'unfinished' in p.name]
        for name in ('last.keras', 'history.json', 'results.json'):
            assert after[workdir / name] == before[workdir / name]
    assert ended(config, workdir, 'train.num_epochs = 2').returncode == 0
    assert len(read(workdir / 'history.json')) == 2


@pytest.mark.slow
def test_a_disk_that_is_full_for_tensorboard_ends_the_training_clearly(
    config, tmp_path
):
    """Its files are not ours, and the first that an epoch writes."""
    (tmp_path / 'limited.py').write_text(
        'import resource, gin, keras\n'
        '@gin.register\n'
        'class Disk(keras.callbacks.Callback):\n'
        '    def on_epoch_begin(self, epoch, logs=None):\n'
        '        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n'
    )
    limited = tmp_path / 'limited.gin'
    limited.write_text(f'import limited\n{config.read_text()}')
    workdir = tmp_path / 'run'
    assert ended(config, workdir, 'train.num_epochs = 1').returncode == 0
    before = files(workdir)
    done = ended(
        limited,
        workdir,
        'train.num_epochs = 2',
        'train.callbacks = [@limited.Disk()]',
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert 'Traceback' not in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert 'events.out.tfevents' in last_line
    assert 'cannot be written (File too large)' in last_line
    after = files(workdir)
    for name in ('last.keras', 'history.json', 'results.json'):
        assert after[workdir / name] == before[workdir / name]


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_as_an_uninterrupted_one(
    config, tmp_path
):
    """SIGKILL in an epoch, in a checkpoint's writing, before the first one."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    moments = random.Random(0)
    epochs_at_kills = []
    for _ in range(10):
        target = epochs_of(killed) + moments.randint(0, 1)
        with subprocess.Popen(
            command(config, killed, *training_of(10**6)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout.readline().startswith('Epochs ')
            while epochs_of(killed) < target:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5))
            assert process.poll() is None
            process.kill()
        check_files(killed)
        epochs_at_kills.append(epochs_of(killed))
    assert len(set(epochs_at_kills)) > 1, epochs_at_kills
    end = training_of(epochs_at_kills[-1] + 1)
    for folder in (whole, killed):
        assert ended(config, folder, *end).returncode == 0
    assert without_seconds(read(killed / 'history.json')) == without_seconds(
        read(whole / 'history.json')
    )
    results = [read(folder / 'results.json') for folder in (whole, killed)]
    for key in ('epochs', 'steps', 'layers', 'test_accuracy'):
        assert results[0][key] == results[1][key]


def training_of(epochs):
    return f'train.num_epochs = {epochs}', 'train.deterministic = True'


def epochs_of(workdir):
    path = workdir / 'history.json'
    return len(read(path)) if path.exists() else 0


def check_files(workdir):
    """Whatever has its final name is whole."""
    for path in workdir.glob('*.keras'):
        if not path.name.startswith('unfinished'):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
    for path in workdir.glob('*.json'):
        if not path.name.startswith('unfinished'):
            json.loads(path.read_text())


# A kill at every single operation on files, without any training.

STEPS = 5


class Killed(BaseException):
    """Which nothing catches, as nothing does SIGKILL."""


class Killer:
    """Ends all operations on files from the n-th on, or half-way in it."""

    def __init__(self, monkeypatch):
        self.count = self.fatal = 0
        self.halfway = False
        for owner, name in (
            (os, 'replace'),
            (os, 'fsync'),
            (os, 'link'),
            (os, 'unlink'),
            (shutil, 'copyfile'),
            (pathlib.Path, 'write_text'),
            (pathlib.Path, 'unlink'),
            (keras.Model, 'save'),
        ):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def guard(self, function):
        @functools.wraps(function)
        def guarded(*args, **kwargs):
            self.count += 1
            if self.fatal and self.count >= self.fatal:
                if self.halfway and self.count == self.fatal:
                    self.write_half(function.__name__, args, function, kwargs)
                raise Killed
            return function(*args, **kwargs)

        return guarded

    def write_half(self, name, args, function, kwargs):
        target = {'write_text': 0, 'save': 1, 'copyfile': 1}.get(name)
        if target is None:
            function(*args, **kwargs)  # Killed just after it.
        else:
            with open(args[target], 'wb') as file:
                file.write(b'PK half')


@functools.cache
def only_model():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(momentum=0.9), 'mse')
    model.optimizer.build(model.trainable_variables)
    return model


def model_after(epoch):
    """The model after some epochs, which its weights tell."""
    model = only_model()
    model.set_weights([np.full((1, 1), epoch), np.full(1, epoch)])
    model.optimizer.iterations.assign(epoch * STEPS)
    return model


def epoch_of(model):
    return int(model.get_weights()[0][0, 0])


def save(workdir, history, accuracies):
    epoch = len(history) + 1
    row = {'epoch': epoch, 'steps_per_epoch': STEPS}
    history.append({**row, 'val_accuracy': accuracies[epoch - 1]})
    checkpoints.save(model_after(epoch), workdir, history, {'epochs': epoch})


@pytest.mark.parametrize('epoch', [1, 2, 3])
@pytest.mark.parametrize('halfway', [False, True])
@pytest.mark.parametrize('accuracies', [(1, 2, 3), (3, 2, 1)], ids=str)
def test_a_kill_at_any_operation_loses_no_finished_epoch(
    tmp_path, monkeypatch, epoch, halfway, accuracies
):
    """The epoch that is repeated is worse the second time, as it may be."""
    killer = Killer(monkeypatch)
    for fatal in itertools.count(1):
        workdir = tmp_path / str(fatal)
        workdir.mkdir()
        history = []
        killer.fatal, killer.halfway = 0, halfway
        while len(history) < epoch - 1:
            save(workdir, history, accuracies)
        killer.count, killer.fatal = 0, fatal
        try:
            save(workdir, history, accuracies)
            killed = False
        except Killed:
            killed = True
        killer.fatal = 0
        check_files(workdir)

        model = model_after(0)
        history = checkpoints.restore(model, workdir, STEPS)
        assert len(history) in (epoch - 1, epoch)
        assert len(history) == epoch_of(model)
        assert model.optimizer.iterations == len(history) * STEPS
        assert [row['epoch'] for row in history] == [
            *range(1, len(history) + 1)
        ]
        check_best(workdir, history)
        repeated = [accuracy - 1.5 for accuracy in accuracies]
        repeated[: len(history)] = accuracies[: len(history)]
        while len(history) < 3:
            save(workdir, history, repeated)
        check_best(workdir, history)
        check_files(workdir)
        assert read(workdir / 'history.json') == history
        assert read(workdir / 'results.json') == {'epochs': 3}
        saved = {path.stem: epoch_in(path) for path in workdir.glob('*.keras')}
        assert saved.keys() == {'best', 'last', 'previous'}
        assert (saved['last'], saved['previous']) == (3, 2)
        assert not list(workdir.glob('unfinished*'))
        if not killed:
            break
    assert fatal >= 8


def epoch_in(path):
    model = model_after(0)
    model.load_weights(path)
    return epoch_of(model)


def check_best(workdir, history):
    """The best checkpoint is of an epoch that is in the history."""
    path = workdir / 'best.keras'
    if not history:
        assert not path.exists()
        return
    best = max(history, key=lambda row: row['val_accuracy'])
    assert epoch_in(path) == best['epoch']


@pytest.mark.parametrize(
    'content', [None, '', '[{"epoch": 1', 'null', '3', '{}', '[3]', '[{}]']
)
def test_a_damaged_history_is_named_and_all_left_alone(tmp_path, content):
    save(tmp_path, [], (1,))
    path = tmp_path / 'history.json'
    path.unlink() if content is None else path.write_text(content)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r'history\.json is damaged or miss'):
        checkpoints.restore(model_after(0), tmp_path, STEPS)
    assert files(tmp_path) == before


@pytest.mark.parametrize('steps', [1, STEPS - 1, 2 * STEPS, 3 * STEPS])
def test_epochs_of_another_length_are_not_continued(tmp_path, steps):
    history = []
    for _ in range(2):
        save(tmp_path, history, (1, 2))
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f'of 5 steps, and not of {steps}'):
        checkpoints.restore(model_after(0), tmp_path, steps)
    assert files(tmp_path) == before


def test_a_checkpoint_that_does_not_say_its_epoch_is_continued(tmp_path):
    """As they were written before they did."""
    history = []
    for _ in range(2):
        save(tmp_path, history, (1, 2))
    for row in history:
        del row['steps_per_epoch']
    extra = {'epoch': 3, 'val_accuracy': 0}  # Of no checkpoint.
    checkpoints.write(
        tmp_path / 'history.json', checkpoints.to_json([*history, extra])
    )
    with zipfile.ZipFile(tmp_path / 'last.keras', 'a') as archive:
        assert archive.comment == b'epoch 2'
        archive.comment = b''
    assert checkpoints.restore(model_after(0), tmp_path, STEPS) == history
    with pytest.raises(ValueError, match=r'is of epoch 3\.33333, and history'):
        checkpoints.restore(model_after(0), tmp_path, 3)


@pytest.mark.parametrize(
    'bindings',
    [
        ['tf.keras.optimizers.SGD.gradient_accumulation_steps = 3'],
        ["train.dtype_policy = 'mixed_float16'"],
    ],
    ids=str,
)
def test_optimizers_that_count_fewer_steps_are_continued(
    run,  # noqa: F811
    monkeypatch,
    bindings,
):
    """Some accumulate gradients over steps, some leave a step out."""
    monkeypatch.setattr(  # So that all gradients overflow at first.
        keras.optimizers.LossScaleOptimizer.__init__,
        '__defaults__',
        (
            2.0**40,
            *keras.optimizers.LossScaleOptimizer.__init__.__defaults__[1:],
        ),
    )
    whole = run(*bindings, 'train.num_epochs = 3', workdir='whole')
    assert read(whole / 'results.json')['steps'] < 12
    for epochs in (1, 2, 3, 3):
        workdir = run(*bindings, f'train.num_epochs = {epochs}')
    assert len(read(workdir / 'history.json')) == 3
    for a, b in zip(*(read(x / 'history.json') for x in (whole, workdir))):
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-3)


def test_results_that_are_lost_are_made_again(run):  # noqa: F811
    workdir = run()
    path = workdir / 'results.json'
    before = path.read_text()
    for content in '{"epochs": 2, "ste', '[]', None:
        path.unlink() if content is None else path.write_text(content)
        run()
        assert path.read_text() == before


def test_results_of_an_epoch_that_was_cut_are_cut_too(run):  # noqa: F811
    """As a kill leaves them before the checkpoint, if no epoch follows."""
    workdir = run()
    before = [
        (workdir / name).read_text()
        for name in ('history.json', 'results.json')
    ]
    history, results = map(json.loads, before)
    row = {**history[-1], 'epoch': 3}
    checkpoints.write_results(
        workdir, [*history, row], {**results, 'epochs': 3}
    )
    run()
    assert before == [
        (workdir / name).read_text()
        for name in ('history.json', 'results.json')
    ]
