"""Grids of trainings, stopped and continued, and their reports."""

import contextlib
import csv
import json
import re
import signal
import subprocess
import types

import filelock
import pytest
from backends import start
from small_runs import SMALL, command, read, run_flags

from diffstride.examples import grid, report

GRID = """
run.job = @grid.grid
train.model_cls = @small_data.linear
train.num_epochs = 1
grid.seeds = [0, 1]
grid.strides = ['0', '2']
grid.strides_parameter = 'small_data.linear.units'
grid.variants = {
    'plain': [],
    'averaged': ['keras.optimizers.SGD.use_ema = True'],
}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'grid.gin'
    small = re.sub('.*(resnet|pooling|num_epochs|model_cls).*', '', SMALL)
    path.write_text(small + GRID)
    return path


@pytest.fixture
def commands(monkeypatch):
    """Runs the commands of a grid within this process; lists them."""
    started = []

    def run(arguments, stdout, stderr, text):
        started.append(arguments)
        code, message = 0, ''
        with contextlib.redirect_stdout(stdout):
            try:
                run_flags(arguments[2:])
            except SystemExit as stop:
                code, message = 1, stop.code
        return types.SimpleNamespace(returncode=code, stderr=message)

    monkeypatch.setattr(grid.subprocess, 'run', run)
    return started


def folders(tmp_path):
    return sorted(
        path.parent.name for path in tmp_path.glob('run/*/results.json')
    )


def test_a_grid_is_a_list_of_commands_that_continues(
    run, commands, tmp_path, capsys
):
    only = "grid.variants = {'plain': []}"
    one = only, 'grid.seeds = [0]', "grid.strides = ['2']"
    two = only, 'grid.seeds = [0]'
    run(*one)
    assert folders(tmp_path) == ['plain-2-seed-0']
    results = read(tmp_path / 'run' / 'plain-2-seed-0' / 'results.json')
    assert results['variant'] == 'plain' and results['strides'] == '2'
    capsys.readouterr()
    # Finished runs are not repeated, and new ones are added.
    run(*two)
    assert len(commands) == 2
    text = capsys.readouterr().out
    assert 'plain-0-seed-0 (1 of 2 are done)' in text
    assert 'Test accuracy' in text
    table = (tmp_path / 'run' / 'table.md').read_text()
    assert table in text and table.count('| plain |') == 2
    with open(tmp_path / 'run' / 'runs.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['plain-0-seed-0', 'plain-2-seed-0']
    assert float(rows[1]['test_accuracy']) == results['test_accuracy']
    assert (tmp_path / 'run' / 'accuracy_macs.png').exists()
    run(*two)
    assert len(commands) == 2
    # More epochs continue every run; other settings are refused.
    run(*one, 'train.num_epochs = 2')
    assert len(commands) == 3
    history = tmp_path / 'run' / 'plain-2-seed-0' / 'results.json'
    assert len(read(history)['history']) == 2
    with pytest.raises(SystemExit, match='is a grid of other settings'):
        run(only, 'keras.optimizers.SGD.learning_rate = 0.1')
    with pytest.raises(SystemExit, match='brightness was None and is 2'):
        run(only, 'small_data.images.brightness = 2.0')


def test_runs_that_fail_are_told_and_the_others_are_made(
    run, commands, tmp_path, capsys
):
    """A binding of a variant must have an effect in it."""
    variants = (
        "grid.variants = {'dead': ['resnet.resnet18.width = 1'], 'plain': []}"
    )
    seeds = "grid.strides = ['2']", 'grid.seeds = [0]'
    with pytest.raises(SystemExit, match='1 of 2 runs failed: dead-2-seed-0'):
        run(variants, *seeds)
    assert 'failed: error: resnet.resnet18.width has no' in (
        capsys.readouterr().out
    )
    assert folders(tmp_path) == ['plain-2-seed-0']
    # Another variant of this name makes its runs; finished ones stay.
    run(variants.replace("['resnet.resnet18.width = 1']", '[]'), *seeds)
    assert len(commands) == 3 and len(folders(tmp_path)) == 2
    other = variants.replace('resnet.resnet18.width', 'train.steps_per_epoch')
    with pytest.raises(SystemExit, match='steps_per_epoch was None and is 1'):
        run(other, *seeds)


def test_processes_share_the_runs(run, commands, tmp_path, monkeypatch):
    """A run that another process has is left to it."""
    busy = tmp_path / 'run' / 'plain-0-seed-0'
    busy.mkdir(parents=True)
    lock = filelock.FileLock(busy / 'lock')
    lock.acquire()
    slept = []

    def sleep(seconds):
        assert folders(tmp_path) == ['plain-2-seed-0']
        slept.append(seconds)
        lock.release()

    monkeypatch.setattr(grid.time, 'sleep', sleep)
    run('grid.seeds = [0]', "grid.variants = {'plain': []}")
    assert len(slept) == 1
    assert folders(tmp_path) == ['plain-0-seed-0', 'plain-2-seed-0']


@pytest.mark.parametrize(
    'binding, message',
    [
        ("grid.strides = ['2,', '2']", 'must differ in more than signs'),
        ('train.workdir = None', '--gin_bindings="train.workdir = '),
        ('grid.seeds = 3', '`seeds` must be a list of integers'),
        (
            "grid.variants = {'a': ['nowhere.x = 1']}",
            "grid.variants['a']: No configurable matching 'nowhere'",
        ),
    ],
)
def test_wrong_settings(run, tmp_path, binding, message):
    with pytest.raises(SystemExit) as error:
        run(binding)
    assert message in error.value.code
    assert not (tmp_path / 'run').exists()


def results_of(variant, strides, seed, accuracy, macs, learned):
    return {
        'variant': variant,
        'strides': strides,
        'seed': seed,
        'test_accuracy': accuracy,
        'macs': macs,
        'seconds': 10.0,
        'layers': {f'pool_{i}_{seed}': {'strides': s} for i, s in learned},
    }


def test_report(tmp_path, capsys):
    for i, results in enumerate(
        [
            results_of('A', '2', 0, 0.70, 2e6, [(0, (2.0, 3.0))]),
            results_of('A', '2', 1, 0.72, 4e6, [(0, (3.0, 3.5))]),
            results_of('A', '3', 0, 0.68, 3e6, [(0, (2.0, 2.0))]),
            results_of('B', None, 0, 0.5, None, []),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / 'results.json').write_text(json.dumps(results))
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / 'results.json').write_text('{"varia')
    report.main(['report', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert (
        '| A | 2 | 2 | 71.0 +- 1.4 | 3.00 +- 1.41 | 10 +- 0 | (2.50, 3.25) |'
        in lines
    )
    assert '| A | 3 | 1 | 68.0 | 3.00 | 10 | (2.00, 2.00) |' in lines
    assert '| B | - | 1 | 50.0 | - | 10 | - |' in lines
    assert len((tmp_path / 'runs.csv').read_text().splitlines()) == 5
    for arguments in [], [str(tmp_path / 'nowhere')], ['a', 'b']:
        with pytest.raises(SystemExit, match='error: name a folder of finishe'):
            report.main(['report', *arguments])


@pytest.mark.slow
def test_a_killed_grid_continues(config, tmp_path):
    arguments = command(
        'grid.seeds = [0]',
        "grid.strides = ['0', '2', '3']",
        "grid.variants = {'plain': []}",
        workdir=tmp_path / 'run',
        gin_config=[config],
    )
    with start('-m', *arguments, stdout=subprocess.PIPE) as killed:
        for line in killed.stdout:
            if line.startswith('plain-2-seed-0'):
                break
        killed.send_signal(signal.SIGKILL)
    finished = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.glob('run/*/command.txt')
    }
    assert finished
    # The run that was cut off may live on; none is done twice.
    with start('-m', *arguments, stdout=subprocess.PIPE) as continued:
        text, _ = continued.communicate()
    assert continued.returncode == 0
    assert len(folders(tmp_path)) == 3
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time
    table = (tmp_path / 'run' / 'table.md').read_text()
    assert table in text
