"""Grids of trainings, stopped and continued, and their reports."""

import contextlib
import csv
import json
import subprocess
import types

import filelock
import pytest
from backends import start
from small_runs import command, files, read, run_flags

from diffstride.examples import checkpoints, grid, report

GRID = """
run.job = @grid.grid
train.model_cls = @small_data.linear
train.num_epochs = 1
grid.strides = ['0', '2']
grid.strides_parameter = 'small_data.linear.units'
grid.variants = {'plain': []}
"""


@pytest.fixture
def config(config):
    """A gin file of a grid of small trainings."""
    config.write_text(config.read_text() + GRID)
    return config


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
    return sorted(x.parent.name for x in tmp_path.glob('run/*/results.json'))


def test_a_grid_makes_its_runs_and_goes_on(run, commands, tmp_path, capsys):
    one = "grid.strides = ['2']", 'grid.seeds = [1]'
    workdir = run(*one)
    assert folders(tmp_path) == ['plain-2-seed-1']
    path = workdir / 'plain-2-seed-1/results.json'
    results = read(path)
    labels = results['variant'], results['strides'], results['seed']
    assert labels == ('plain', '2', 1)
    capsys.readouterr()
    # Finished runs are not repeated, and new ones are added.
    run('grid.seeds = [1]')
    assert len(commands) == 2
    text = capsys.readouterr().out
    assert 'plain-0-seed-1 (1 of 2 are done)' in text
    assert 'Test accuracy' in text
    table = (workdir / 'table.md').read_text()
    assert table in text and table.count('| plain |') == 2
    with open(workdir / 'runs.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['plain-0-seed-1', 'plain-2-seed-1']
    assert float(rows[1]['test_accuracy']) == results['test_accuracy']
    assert (workdir / 'accuracy_macs.png').exists()
    run('grid.seeds = [1]')
    assert len(commands) == 2
    # More epochs continue every run; other settings are refused.
    run(*one, epochs=2)
    assert len(commands) == 3 and read(path)['epochs'] == 2
    with pytest.raises(SystemExit, match='is a grid of other settings'):
        run('keras.optimizers.SGD.learning_rate = 0.1')
    with pytest.raises(SystemExit, match='brightness was None and is 2'):
        run('small_data.images.brightness = 2.0')


def test_runs_that_fail_are_told_at_the_end(run, commands, tmp_path, capsys):
    """A binding of a variant must have an effect in it."""

    def run_with(bindings):
        variants = {'dead': bindings, 'plain': []}
        run(f'grid.variants = {variants}', "grid.strides = ['2']")

    with pytest.raises(SystemExit, match='1 of 2 runs failed: dead-2-seed-0'):
        run_with(['resnet.resnet18.width = 1'])
    text = capsys.readouterr().out
    assert 'failed: error: resnet.resnet18.width has no' in text
    assert folders(tmp_path) == ['plain-2-seed-0']
    # Another variant of this name makes its runs; finished ones stay.
    run_with([])
    assert len(commands) == 3 and len(folders(tmp_path)) == 2
    with pytest.raises(SystemExit, match='jit_compile was'):
        run_with(['train.jit_compile = False'])


@pytest.mark.parametrize('late', [False, True])
def test_processes_share_the_runs(run, commands, tmp_path, monkeypatch, late):
    """A run that another process has, or takes just now, is left to it."""
    if late:
        monkeypatch.setattr(checkpoints, 'is_locked', lambda folder: False)
    busy = tmp_path / 'run' / 'plain-0-seed-0'
    busy.mkdir(parents=True)
    lock = filelock.FileLock(busy / 'lock')
    lock.acquire()
    slept = []

    def sleep(seconds):
        assert folders(tmp_path) == ['plain-2-seed-0']
        slept.append(seconds)
        lock.release()

    monkeypatch.setattr(grid, 'time', types.SimpleNamespace(sleep=sleep))
    run()
    assert len(slept) == 1 and len(commands) == 2 + 2 * late
    assert folders(tmp_path) == ['plain-0-seed-0', 'plain-2-seed-0']


def test_report(tmp_path, capsys):
    keys = 'variant', 'strides', 'seed', 'test_accuracy', 'macs', 'layers'
    runs = [
        ('A', '2', 0, 0.70, 2e6, {'pool_1': {'strides': (2.0, 3.0)}}),
        ('A', '2', 1, 0.72, 4e6, {'pool_2': {'strides': (3.0, 3.5)}}),
        ('A', '3', 0, 0.68, 3e6, {'pool': {'strides': (2.0, 2.0)}}),
        ('B', None, 0, 0.5, None, {}),
    ]
    texts = [json.dumps(dict(zip(keys, run), seconds=10.0)) for run in runs]
    for i, text in enumerate([*texts, '{"varia']):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / 'results.json').write_text(text)
    report.main(['report', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    for line in (
        '| A | 2 | 2 | 71.0 +- 1.4 | 3.00 +- 1.41 | 10 +- 0 | (2.50, 3.25) |',
        '| A | 3 | 1 | 68.0 | 3.00 | 10 | (2.00, 2.00) |',
        '| B | - | 1 | 50.0 | - | 10 | - |',
    ):
        assert line in lines
    assert len((tmp_path / 'runs.csv').read_text().splitlines()) == 5
    for arguments in [], [str(tmp_path / 'nowhere')], ['a', 'b']:
        with pytest.raises(SystemExit, match='error: name a folder of finishe'):
            report.main(['report', *arguments])


@pytest.mark.slow
def test_a_killed_grid_continues(config, commands, tmp_path, capsys):
    """The run that was cut off is made, and the one before is left alone."""
    arguments = command(workdir=tmp_path / 'run', gin_config=[config])
    with start('-m', *arguments, stdout=subprocess.PIPE) as killed:
        for line in killed.stdout:
            if line.startswith('plain-2-seed-0'):
                break
        killed.terminate()
    assert killed.returncode == 143  # It has ended its training before.
    assert folders(tmp_path) == ['plain-0-seed-0']
    before = files(tmp_path / 'run/plain-0-seed-0')
    run_flags(arguments)
    assert files(tmp_path / 'run/plain-0-seed-0') == before
    table = (tmp_path / 'run' / 'table.md').read_text()
    assert table in capsys.readouterr().out and table.count('| plain |') == 2
