"""Sweeps through the real command, killed and continued."""

import json
import re
import signal
import subprocess
import sys
import time

import gin
import pytest
from absl import flags
from test_train import SMALL, images  # noqa: F401

from diffstride.examples import main, sweep, train

SWEEP = """
train.model_cls = @resnet.resnet18
train.num_epochs = 1
train.steps_per_epoch = 1
resnet.resnet18.width = 1
sweep.strides = ['1, 1, 1, 1, 2', '1, 1, 1, 1, 3']
sweep.seeds = [0]
sweep.variants = {
    'learned': [],
    'fixed': ['resnet.Resnet.pooling_cls = @pooling.FixedSpectralPooling'],
}
"""


@pytest.fixture
def config(images, tmp_path):  # noqa: F811
    path = tmp_path / 'sweep.gin'
    replaced = (
        r'(resnet\.Resnet\.(filters|strides|num_layers)|'
        r'train\.(num_epochs|model_cls)) = .*'
    )
    small = re.sub(replaced, '', SMALL)
    path.write_text(
        f"{small}{SWEEP}data.load_datasets.name = '{images}'\n"
        f"sweep.workdir = '{tmp_path / 'out'}'\n"
    )
    return path


def command(config, *bindings):
    return [
        sys.executable,
        '-m',
        'diffstride.examples.sweep',
        f'--gin_config={config}',
        *(f'--gin_bindings={binding}' for binding in bindings),
    ]


def run(config, *bindings):
    return subprocess.run(
        command(config, *bindings), capture_output=True, text=True
    )


def start(config):
    return subprocess.Popen(command(config), stdout=subprocess.PIPE, text=True)


def read_runs(folder):
    return {
        path.name: (path.stat().st_mtime_ns, json.loads(path.read_text()))
        for path in folder.glob('runs/*.json')
    }


@pytest.mark.slow
def test_a_killed_sweep_continues_and_gives_the_same_table(config, tmp_path):
    out = tmp_path / 'out'
    begun = out / 'work' / 'learned-1-1-1-1-3-seed-0' / 'settings.json'
    with start(config) as killed:
        for line in killed.stdout:
            if line.startswith('learned-1-1-1-1-3'):
                break
        while not begun.exists():
            assert killed.poll() is None
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
    finished = read_runs(out)
    assert len(finished) == 2
    other = run(config, 'resnet.resnet18.width = 2', "sweep.only = ['learned']")
    assert other.returncode == 1
    assert 'is of other settings (config)' in other.stderr
    # The run that was cut off may live on; none is done twice.
    with start(config) as one, start(config) as other:
        texts = [process.communicate()[0] for process in (one, other)]
    assert one.returncode == other.returncode == 0
    runs = read_runs(out)
    assert len(runs) == 4
    for name, run_before in finished.items():
        assert runs[name] == run_before
    results = re.findall(r'^(\S+): \d+\.\d%$', ''.join(texts), re.MULTILINE)
    assert len(results) == len(set(results)) == 4 - len(finished)

    table = (out / 'table.md').read_text()
    assert table.strip() in texts[0] and table.strip() in texts[1]
    assert '| learned | 1, 1, 1, 1, 2 | 1 | ' in table
    learned = json.loads(
        (out / 'runs' / 'learned-1-1-1-1-3-seed-0.json').read_text()
    )
    assert learned['layers'] and learned['macs'] > 0
    assert f'{100 * learned["test_accuracy"]:.1f} (1)' in table
    assert (out / 'accuracy_macs.png').exists()
    assert (out / 'strides.png').exists()

    for path in (out / 'table.md', out / 'accuracy_macs.png'):
        path.unlink()
    again = run(config)
    assert again.returncode == 0
    assert (out / 'table.md').read_text() == table
    assert read_runs(out) == runs


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_are_made(config, tmp_path):
    ended = run(
        config,
        "sweep.strides = ['1, 1, 1, 1, 2.5']",
        "sweep.variants = {'strided': ['resnet.Resnet.pooling_cls = None'], "
        "'learned': []}",
    )
    assert ended.returncode == 1
    assert 'error: 1 runs failed: strided-1-1-1-1-2.5-seed-0' in ended.stderr
    assert '`strides` of a strided convolution' in ended.stderr
    assert len(read_runs(tmp_path / 'out')) == 1
    other = run(
        config,
        "sweep.strides = ['1, 1, 1, 1, 2.5']",
        "sweep.only = ['learned']",
        'resnet.resnet18.width = 2',
    )
    assert other.returncode == 1
    assert 'is of other settings (config)' in other.stderr


@pytest.mark.parametrize(
    'bindings, message',
    [
        (["sweep.only = ['no']"], "sweep.only must be names of ['learned'"),
        (["sweep.only = 'learned'"], 'sweep.only must be a list of names'),
        (['sweep.only = 3'], 'sweep.only must be a list of names'),
        (['sweep.only = []'], 'sweep.only must be a list of names'),
        (["sweep.strides = ['2', '2']"], 'must be a list of strings, each onc'),
        (["sweep.strides = ['2,', '2']"], 'have the same name'),
        (['sweep.workdir = None'], '--gin_bindings="sweep.workdir = '),
        (['sweep.seeds = 3'], 'sweep.seeds must be a list'),
        (["sweep.seeds = ['0']"], 'sweep.seeds must be a list of int'),
        (['sweep.seeds = [True]'], 'sweep.seeds must be a list of int'),
        (['sweep.seeds = [-1]'], 'sweep.seeds must be a list of int'),
        (['sweep.seeds = [0, 0]'], 'sweep.seeds must be a list of int'),
        (['sweep.seeds = []'], 'sweep.seeds must be a list of int'),
        (['sweep.strides = [[1, 2]]'], 'sweep.strides must be a list of str'),
        (['sweep.strides_parameter = 3'], 'strides_parameter must be the name'),
        (['sweep.variants = {}'], 'sweep.variants must be a dict'),
        (["sweep.variants = {'a': [3]}"], 'sweep.variants must be a dict'),
        (["sweep.strides = '1, 2'"], 'sweep.strides must be a list'),
        (["sweep.variants = ['a']"], 'sweep.variants must be a dict'),
        (["sweep.variants = {'a': 'b = 1'}"], 'sweep.variants must be a dict'),
    ],
)
def test_wrong_settings(config, tmp_path, bindings, message):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(command(config, *bindings)[2:])
    try:
        with pytest.raises(SystemExit) as error:
            main.main(['sweep'], default_job=sweep.sweep)
    finally:
        for name in ('gin_config', 'gin_bindings'):
            flags.FLAGS[name].unparse()
    assert message in str(error.value)
    assert not (tmp_path / 'out').exists()


def result(variant, strides, seed, accuracy, macs, learned):
    return {
        'variant': variant,
        'strides': strides,
        'seed': seed,
        'test_accuracy': accuracy,
        'macs': macs,
        'seconds': 10.0,
        'layers': {
            f'pool_{seed}': {'strides': s, 'initial_strides': (2.0, 2.0)}
            for s in learned
        },
        'history': [{f'stride/pool_{seed}/height': 2.5}] if learned else [{}],
    }


def test_table():
    results = [
        result('A', '2', 0, 0.70, 2e6, [(2.0, 3.0)]),
        result('A', '2', 1, 0.72, 4e6, [(3.0, 3.5)]),
        result('A', '3', 0, 0.68, 3e6, [(2.0, 2.0)]),
        result('B', '2', 0, 0.5, 1e6, []),
    ]
    lines = sweep.table(sweep.grouped(results)).splitlines()
    assert '| A | 71.0 +- 1.4 (2) | 68.0 (1) | 3.0 |' in lines
    assert '| B | 50.0 (1) | - | - |' in lines
    assert (
        '| A | 2 | 2 | 71.0 +- 1.4 | 3.0 +- 1.4 | 10 +- 0 | (2.50, 3.25) |'
        in lines
    )
    assert '| B | 2 | 1 | 50.0 | 1.0 | 10 | - |' in lines


def test_report_is_of_all_runs_in_the_workdir(tmp_path, capsys):
    (tmp_path / 'runs').mkdir()
    for name in ('A', 'B'):
        path = tmp_path / 'runs' / f'{name}.json'
        path.write_text(json.dumps(result(name, '2', 0, 0.5, 1e6, [])))
    sweep._report(tmp_path, [tmp_path / 'runs' / 'B.json'])
    table = (tmp_path / 'table.md').read_text()
    assert table.index('| B |') < table.index('| A |')
    assert table in capsys.readouterr().out
    # What another process is writing, or left at its end, is no run yet.
    half = tmp_path / 'runs' / 'unfinished_C.json'
    for content in ('{"varia', json.dumps(result('A', '2', 0, 1, 1e6, []))):
        half.write_text(content)
        sweep._report(tmp_path, [tmp_path / 'runs' / 'B.json'])
        assert (tmp_path / 'table.md').read_text() == table
    sweep._report(tmp_path / 'nowhere', [])
    (tmp_path / 'runs' / 'D.json').write_text('')
    with pytest.raises(train.SetupError, match=r'D\.json is damaged: move it'):
        sweep._report(tmp_path, [])
    assert (tmp_path / 'table.md').read_text() == table


def test_table_tells_of_several_settings():
    results = [result('A', '2', seed, 0.7, 2e6, []) for seed in (0, 1)]
    for run, config in zip(results, ('x = 1', 'x = 2')):
        run['config'] = config
    table = sweep.table(sweep.grouped(results))
    assert table.endswith('Of 2 settings: see `config` of each run.')
    assert 'settings' not in sweep.table(sweep.grouped(results[:1]))


def test_settings_that_trained_nothing_bind_nothing(tmp_path):
    """As those of a misspelled variant, which failed."""
    labels = {'variant': 'A', 'strides': '2', 'seed': 0}
    run = sweep._Run(tmp_path, labels, ['x = 1'], 'config')
    other = sweep._Run(tmp_path, labels, ['y = 1'], 'config')
    run.folder.mkdir(parents=True)
    (run.folder / 'settings.json').write_text(json.dumps(other.settings))
    run.check()
    (run.folder / 'last.keras').touch()
    with pytest.raises(train.SetupError, match=r'of other settings \(bindings'):
        run.check()
    other.check()


def test_config_of_a_run_leaves_out_the_sweep(config):
    gin.parse_config_file(str(config))
    text = sweep.config_without_sweep()
    assert 'resnet18.width = 1' in text and 'sweep' not in text
    gin.parse_config('WIDTH = 3')
    assert sweep.config_without_sweep() != text
