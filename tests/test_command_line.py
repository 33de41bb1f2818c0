"""Tests that a wrong command ends with one line, before any work."""

import gc
import math
import os
import sys

import gin
import keras
import pytest
from absl import app
from small_runs import LINEAR, command, files, prepared, run_apart, run_here

from diffstride.examples import main, rules, train


@pytest.fixture(scope='module', autouse=True)
def little_garbage():
    """Keras collects garbage each time that a command clears its session."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def error_of(config, tmp_path, capfd, monkeypatch):
    """Runs a command that is wrong; returns its line on stderr.

    It must leave the workdir as it was, and not have begun to train.
    """

    def begin(*unused, **also_unused):
        pytest.fail('training began')

    monkeypatch.setattr(keras.Model, 'fit', begin)

    def found():
        return sorted(tmp_path.rglob('*')), files(tmp_path)

    def error_of(*bindings, workdir=tmp_path / 'run', gin_config=config, **k):
        before = found()
        with pytest.raises(SystemExit) as stop:
            run_here(*bindings, workdir=workdir, gin_config=[gin_config], **k)
        message = stop.value.code
        assert message.startswith('error: ')
        assert '\n' not in message
        assert 'Epoch' not in capfd.readouterr().out
        assert found() == before
        return message

    return error_of


# Values out of their range.


@pytest.mark.parametrize(
    'rule, right, wrong',
    [
        (rules.COUNT, [1, 10**9], ['x', 0, -1, 2.0, True, [1], math.inf, None]),
        (rules.COUNT_OR_ZERO, [0, 1], ['x', -1, 1.5, False, None]),
        (rules.SEED, [0, 2**63 - 1], [-1, 2**63, None]),
        (rules.choice(True, 'auto'), [True, 'auto'], [1, 'x', None, ['auto']]),
        (rules.CALLABLE, [len], ['x', None, 3, [], True]),
        (rules.SIZE, [None, [3, 4]], [32, (32,), (32, 0), (32.0, 32.0)]),
        (rules.DATASETS['data_dir'], [None, 'x'], [3, '', True]),
        (rules.DATASETS['train_split'], ['x'], [None, 0.5, '']),
        (rules.DATASETS['validation_split'], [None, 0.5], ['', 0, 1.0, True]),
        (rules.DATASETS['test_split'], ['x', 0.5], [None, '', 0, 1.0]),
    ],
)
def test_rules(rule, right, wrong):
    text, _ = rule
    for value in right:
        rules.check({'x': value}, {'x': rule})
    for value in wrong:
        with pytest.raises(ValueError) as error:
            rules.check({'x': value}, {'x': rule})
        assert str(error.value) == f'`x` must be {text}. Received: x={value!r}'


@pytest.mark.parametrize(
    'name, values, rule',
    [
        ('workdir', (3, None, '', ['a'], True, 'a\0b'), 'must be a folder'),
        ('load_data_fn', [None], 'must be a class or another callable'),
        ('model_cls', [3], 'must be a class or another callable'),
        ('optimizer_cls', ['x'], 'must be a class or another callable'),
        ('loss_cls', [{}], 'must be a class or another callable'),
        ('num_epochs', [None], 'must be an integer, at least 1'),
        ('steps_per_epoch', [0, 1.5], 'must be an integer, at least 1, or N'),
        ('data_format', ['x', None], 'must be one of'),
        (
            'dtype_policy',
            ('x', None, 3, '', 'int32', 'bool', 'complex64', {}),
            'must be a policy of floats',
        ),
        ('jit_compile', [None], 'must be one of'),
        ('distribution', ['x', None], 'must be one of'),
        (
            'callbacks',
            ('x', None, [3], [keras.callbacks.History]),
            'must be a list of Keras callbacks',
        ),
        ('seed', [-1], 'must be an integer'),
        ('deterministic', [3], 'must be one of'),
        ('on_changed_settings', [None], 'must be one of'),
        ('labels', ['x', []], 'must be a dict or None'),
    ],
)
def test_wrong_values_of_training(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f'`{name}` {rule}'):
            train.train(**{'workdir': 'never_made', name: value})


@pytest.mark.parametrize(
    'bindings, holds',
    [
        (['train.num_epochs = 0'], '`num_epochs` must be an integer'),
        (['train.train.workdir = None'], '--gin_bindings="train.workdir = '),
        (['train.load_data_fn = @resnet.Resnet'], 'in Resnet'),
        (['train.model_cls = @resnet.batch_norm'], 'batch_norm'),
        (
            ['train.optimizer_cls = @keras.losses.Poisson'],
            '`optimizer_cls` must return an instance of Optimizer',
        ),
        (
            ['train.loss_cls = @keras.optimizers.SGD'],
            '`loss_cls` must return an instance of Loss',
        ),
        (
            ['train.loss_cls = @keras.losses.SparseCategoricalCrossentropy'],
            '`loss_cls` must return a loss of one-hot labels',
        ),
        (
            ['train.callbacks = [@callbacks.EarlyStopping]'],
            '`callbacks` must be a list of Keras callbacks',
        ),
        (
            [
                'train.callbacks = [@callbacks.StrideBudget()]',
                'callbacks.StrideBudget.macs = -1',
            ],
            '`macs` must be',
        ),
        (
            [
                'train.callbacks = [@callbacks.StrideBudget()]',
                'callbacks.StrideBudget.macs = 1',
            ],
            'The budget must be at least ',
        ),
        (
            [
                'train.callbacks = [@callbacks.StrideBudget()]',
                'callbacks.StrideBudget.share = 0.9',
                'callbacks.StrideBudget.learn = 0.6',
            ],
            '`learn` must leave an epoch',
        ),
        (['run.job = 3'], 'run.job must be a function'),
        (['run.job = @resnet.batch_norm'], 'run.job must return an object'),
        (
            ['resnet.Resnet.output_activation = None'],
            "set resnet.Resnet.output_activation = 'softmax'",
        ),
        (['resnet.Resnet.filters = [2, 0]'], '`filters` must be'),
        (["resnet.Resnet.strides = '1, 0'"], '`strides` must be'),
        (["resnet.Resnet.pooling_cls = 'x'"], '`pooling_cls` must be'),
        (["resnet.Resnet.weight_decay = 'x'"], '(in Resnet)'),
        (['resnet.Resnet.nonsense = 1'], 'nonsense'),
        (['batch_norm.nonsense = 1'], "a parameter named 'nonsense'"),
        (["pooling.DiffStride.ramp = 'x'"], '`ramp` must be one of'),
        (['pooling.DiffStride.nonsense = 3'], 'nonsense'),
        (
            [
                'resnet.Resnet.filters = [2, 2, 2]',
                "resnet.Resnet.strides = '1, 2, 2'",
                "pooling.DiffStride.name = 'pool'",
            ],
            'must differ in `name` to be logged',
        ),
        (
            [
                'train.load_data_fn = @data.load_datasets',
                "data.load_datasets.name = '/nowhere'",
            ],
            '`name` must be an existing folder',
        ),
        (
            [
                'keras.optimizers.SGD.learning_rate = '
                '@schedules.warmup_cosine()',
                'schedules.warmup_cosine.peak = 0.1',
                'schedules.warmup_cosine.warmup_epochs = 2',
            ],
            '`warmup_epochs` must be at least 0 and below the 2 epochs',
        ),
    ],
)
def test_a_wrong_setting_is_one_line(error_of, bindings, holds):
    message = error_of(*bindings)
    assert holds in message


def test_errors_of_code_keep_their_traceback(run):
    @gin.register(module='broken')
    def model(**unused):
        raise KeyError('fault')

    with pytest.raises(KeyError, match='fault'):
        run(model=['train.model_cls = @broken.model'])


# Bindings that reach nothing.


@pytest.mark.parametrize(
    'bindings, holds',
    [
        (
            [
                'train.model_cls = @resnet.resnet18',
                'resnet.resnet18.width = 1',
                "resnet.Resnet.strides = '1, 1, 2, 2, 2'",
            ],
            'resnet.Resnet.strides has no effect, since strides is set by what '
            'calls resnet.Resnet: did you mean resnet.resnet18.strides?',
        ),
        (
            ['pooling.DiffStride.strides = 3'],
            'pooling.DiffStride.strides has no effect, since strides is set by '
            'what calls pooling.DiffStride: did you mean resnet.Resnet.strides',
        ),
        (
            ['resnet.resnet56.weight_decay = 0.1'],
            'resnet.resnet56.weight_decay has no effect, since resnet.resnet56 '
            'is not used in this job: did you mean resnet.Resnet.weight_decay?',
        ),
        (
            ['resnet.ResidualLayer.pooling_cls = None'],
            'did you mean resnet.Resnet.pooling_cls?',
        ),
        (['WIDTH = 3'], 'WIDTH has no effect'),
        (['grid.seeds = [1]'], 'grid.seeds has no effect'),
        (
            ['inner/resnet.Resnet.weight_decay = 0.1'],
            'inner/resnet.Resnet.weight_decay has no effect',
        ),
    ],
)
def test_a_binding_without_effect_is_named(error_of, bindings, holds):
    assert holds in error_of(*bindings)


def test_bindings_without_effect_in_files_are_let_be(tmp_path, capsys):
    """Those of the user's own files are told."""
    path = tmp_path / 'own.gin'
    path.write_text(
        "include 'diffstride/examples/cifar10_thin.gin'\n"
        'import small_data\n'
        'train.load_data_fn = @small_data.images\n'
        'train.model_cls = @small_data.linear\n'
        'resnet.resnet18.width = 2\n'
    )
    prepared(gin_config=[path])
    assert capsys.readouterr().out == (
        'note: settings without effect in this job: resnet.resnet18.width\n'
    )


@pytest.mark.parametrize(
    'arguments, holds',
    [
        ({'bindings': ['data.load_datasets.augment_fn = 1']}, 'crop_padding'),
        ({'workdir_flag': '/tmp/x'}, "train.workdir = '/tmp/x'"),
    ],
)
def test_what_the_2022_release_had_gets_a_hint(error_of, arguments, holds):
    bindings = arguments.pop('bindings', [])
    assert holds in error_of(*bindings, **arguments)


# Gin refuses these.

UNKNOWN = [
    ('nowhere.x = 1', "No configurable matching 'nowhere'"),
    ('train.nonsense = 1', "a parameter named 'nonsense'"),
    ('train.num_epochs = @nowhere', 'decorate it with @gin.register in a mod'),
    ('train.num_epochs = %nowhere', "No bindings specified for 'nowhere"),
    ('import nowhere', "No module named 'nowhere'"),
    ("include 'nowhere.gin'", 'Unable to open file: nowhere.gin'),
]
SYNTAX = [
    ('train.num_epochs = ', 'Unable to parse value'),
    ('train.num_epochs', "expected ':' or '='"),
    ('= 3', 'Unexpected token'),
    ('train.num_epochs = [1', 'EOF in multi-line statement'),
    ('train.num_epochs = 1 2', 'Expected newline'),
    ('train.num_epochs = word', 'train.num_epochs = word'),
]


@pytest.mark.parametrize('line, holds', [*UNKNOWN, *SYNTAX])
def test_what_gin_refuses_is_named(error_of, tmp_path, line, holds):
    """In a binding, and in a file."""
    message = error_of(line)
    assert holds in message
    assert line.strip() in message or 'nowhere' in message
    assert '--gin_bindings' in message or '%nowhere' in line
    path = tmp_path / 'wrong.gin'
    path.write_text(f'train.seed = 1\n{line}\n')
    message = error_of(gin_config=path)
    assert holds in message
    assert str(path) in message or '%nowhere' in line
    if (line, holds) in SYNTAX and 'EOF' not in holds:
        assert f'{path}, line 2' in message


@pytest.mark.parametrize('name', ['nowhere.gin', '/nowhere/x.gin'])
def test_a_missing_gin_file_is_named(error_of, name):
    message = error_of(gin_config=name)
    assert f'Received: {name!r}' in message
    assert "one of ['cifar10.gin', " in message


@pytest.mark.parametrize('content', [None, b'\xff\xfe\x00'])
def test_what_is_no_gin_file_is_named(error_of, tmp_path, content):
    path = tmp_path / 'wrong.gin'
    path.mkdir() if content is None else path.write_bytes(content)
    assert str(path) in error_of(gin_config=path)


def test_unknown_arguments_are_refused():
    with pytest.raises(app.UsageError, match='surplus'):
        main.main(['main', 'surplus'])


# The workdir.


@pytest.mark.parametrize('below', ['', '/below', '/below/further'])
def test_a_workdir_that_is_a_file_or_below_one(error_of, tmp_path, below):
    path = tmp_path / 'file'
    path.write_text('mine')
    message = error_of(workdir=f'{path}{below}')
    assert f'can be made and written, and {path} cannot' in message


@pytest.mark.parametrize(
    'name, holds',
    [('a' * 300, 'File name too long'), ('~nobody-of-this-name/x', 'home')],
)
def test_a_workdir_of_an_impossible_name(error_of, name, holds):
    assert holds in error_of(workdir=name)


def test_a_workdir_without_permission(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    message = error_of(workdir=tmp_path / 'new')
    assert f'can be made and written, and {tmp_path} cannot' in message


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
@pytest.mark.parametrize('path', ['/proc/x/y', '/sys/x'])
def test_a_workdir_where_the_kernel_lets_nobody_write(error_of, path):
    message = error_of(LINEAR, workdir=path)
    assert f'train.workdir cannot be written: {path} (' in message


def test_the_workdir_of_another_model_stays_as_it_is(error_of, tmp_path):
    folder = tmp_path / 'run' / 'checkpoints' / 'epoch_0001'
    folder.mkdir(parents=True)
    (tmp_path / 'run' / 'lock').touch()
    (folder / 'model.keras').write_bytes(b'PK')
    assert 'epoch_0001 cannot be continued' in error_of(LINEAR)


# In a process of its own.


def test_the_process_ends_with_code_1_and_the_line(tmp_path):
    done = run_apart(
        *command('train.num_epochs = 0', workdir='run'), cwd=tmp_path
    )
    assert done.returncode == 1
    *others, last = done.stderr.splitlines()
    assert last.startswith('error: `num_epochs` must be')
    assert not [line for line in others if line.startswith('error: ')]
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())
