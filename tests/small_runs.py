"""A small training for tests: its settings and its command."""

import json

import gin
from absl import flags
from absl.testing import flagsaver
from backends import environment, run_apart

from diffstride.examples import main, settings, train

SMALL = """
import small_data
train.load_data_fn = @small_data.images
train.model_cls = @resnet.Resnet
train.optimizer_cls = @keras.optimizers.SGD
train.num_epochs = 2
optimizers.SGD.learning_rate = 0.05
optimizers.SGD.momentum = 0.9
resnet.Resnet.filters = [2, 2]
resnet.Resnet.strides = '1, 3'
resnet.Resnet.num_layers = 1
resnet.Resnet.output_activation = 'softmax'
resnet.Resnet.pooling_cls = @pooling.DiffStride
pooling.DiffStride.smoothness_factor = 1.0
"""
LINEAR = 'train.model_cls = @small_data.linear'
GO_ON = "train.on_changed_settings = 'continue'"


def command(*bindings, workdir, gin_config=()):
    """Returns the arguments of a command after `python -m`."""
    return [
        'diffstride.examples.main',
        *(f'--gin_config={path}' for path in gin_config),
        f"--gin_bindings=train.workdir = '{workdir}'",
        *(f'--gin_bindings={binding}' for binding in bindings),
    ]


def run_here(*bindings, **kwargs):
    """Runs a command within this process."""
    run_flags(command(*bindings, **kwargs))


def run_flags(arguments):
    """Runs a command within this process; its first argument is its name."""
    gin.clear_config()
    with flagsaver.flagsaver():
        for name in ('gin_config', 'gin_bindings'):
            flags.FLAGS[name].unparse()
        flags.FLAGS(arguments)
        main.main(['main'])


def run_apart_in_turn(commands, **variables):
    """Runs commands in one other process; returns what it prints."""
    code = 'import json, sys, small_runs; '
    code += 'print(*map(small_runs.run_flags, json.loads(sys.argv[1])))'
    env = environment(**variables)
    done = run_apart('-c', code, json.dumps(commands), env=env)
    assert done.returncode == 0, done.stderr
    assert 'UpdateSizes' not in done.stderr  # No advice is needed.
    return done.stdout


def prepared(*bindings, gin_config=()):
    """Returns a `train.Training` that is prepared and not run."""
    gin.clear_config()
    bindings = ["train.workdir = 'never_made'", *bindings]
    settings.parse(list(map(str, gin_config)), bindings)
    return train.train()


def read(path):
    return json.loads(path.read_text())


def files(folder):
    """Returns the contents of all files of a folder, and its folders."""
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*')}


def history_of(workdir):
    """Returns the rows of a history, without the time that each took."""
    rows = read(workdir / 'results.json')['history']
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]
