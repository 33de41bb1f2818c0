"""Tests that a wrong command ends with one line, before any work."""

import gc
import math
import os
import sys

import gin
import keras
import pytest
from absl import app
from small_runs import LINEAR, files, prepared, run_here

from diffstride.examples import audio, data, grid, main, train


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
    monkeypatch.setattr(keras.Model, 'fit', None)

    def error_of(*bindings, workdir=tmp_path / 'run', gin_config=config, **k):
        before = files(tmp_path)
        with pytest.raises(SystemExit) as stop:
            run_here(*bindings, workdir=workdir, gin_config=[gin_config], **k)
        message = stop.value.code
        assert message.startswith('error: ') and '\n' not in message
        assert 'Epoch' not in capfd.readouterr().out
        assert files(tmp_path) == before
        return message

    return error_of


NO_COUNT = 'x', 0, -1, 2.0, True, [1], math.inf, None
NO_COUNT_OR_ZERO = 'x', -1, 1.5, False, None
NO_NUMBER = 'x', -1, math.nan, math.inf, True, None
NO_FACTORY = 'x', None, 3, [], True
NO_TEXT = '', None, 3
WRONG = {
    data.load_datasets: {
        'name': NO_TEXT, 'data_dir': (3, '', True), 'batch_size': NO_COUNT,
        'mixup_alpha': NO_NUMBER, 'flip': ('yes', 1, None),
        'crop_padding': NO_COUNT_OR_ZERO, 'normalization': ('imagenet',),
        'image_size': (32, (32,), (32, 0), (32.0, 32.0)),
        'channels': (4, True), 'train_split': (None, 0.5, ''),
        'validation_split': ('', 0, 1.0, True),
        'test_split': (None, '', 0, 1.0), 'class_weights': ('equal',),
        'seed': (-1, 2**32, None), 'cache': (1, 'x', None),
    },
    audio.load_datasets: {
        'name': NO_TEXT, 'batch_size': NO_COUNT, 'features': ('mfcc', None),
        'duration': (0, 'x'), 'num_mel_bins': NO_COUNT, 'num_frames': NO_COUNT,
        'time_shift': (*NO_NUMBER, 1.0), 'time_mask': (*NO_NUMBER, 1.0),
        'frequency_shift': (*NO_COUNT_OR_ZERO, 64),
        'frequency_mask': (*NO_COUNT_OR_ZERO, 64),
        'test_filter': ('(', ''), 'class_weights': ('equal',),
    },
    train.train: {
        'workdir': (3, None, '', ['a'], True, 'a\0b'),
        'load_data_fn': NO_FACTORY, 'model_cls': NO_FACTORY,
        'optimizer_cls': NO_FACTORY, 'loss_cls': NO_FACTORY,
        'num_epochs': NO_COUNT, 'data_format': ('x', None),
        'dtype_policy': ('x', None, 3, '', 'int32', 'bool', 'complex64', {}),
        'jit_compile': (None, 1), 'distribution': ('x', None),
        'callbacks': ('x', None, [3], [keras.callbacks.History]),
        'seed': (*NO_COUNT_OR_ZERO, 2**32), 'deterministic': (3, None),
        'on_changed_settings': (None, 'x'), 'labels': ('x', []),
    },
    grid.grid: {
        'variants': ({}, {'a': [3]}, {'a': 'b = 1'}, [], {3: []}),
        'strides': (['2', '2'], '1, 2', [[1, 2]], []),
        'seeds': (3, [True], [0, 0], [], [-1], [2**32]),
        'strides_parameter': NO_TEXT,
    },
}  # fmt: skip


@pytest.mark.parametrize('function', WRONG, ids=lambda x: x.__module__)
def test_a_wrong_argument_is_named_before_any_work(function):
    others = {'workdir': 'never_made'} if function is train.train else {}
    for name, values in WRONG[function].items():
        for value in values:
            with pytest.raises(ValueError) as error:
                function(**others | {name: value})
            message = str(error.value)
            assert message.startswith(f'`{name}` must be '), message
            assert f'. Received: {name}={value!r}' in message


BUDGET = 'train.callbacks = [@callbacks.StrideBudget()]'
WARMUP = 'keras.optimizers.SGD.learning_rate = @schedules.warmup_cosine()'
FOLDER = 'train.load_data_fn = @data.load_datasets'
GRID = 'run.job = @grid.grid'
# A part of the line, and then the bindings.
WRONG_SETTINGS = [
    ("`jit_compile` must be one of (True, False, 'auto'). Received",
     'train.jit_compile = 1'),
    ('in Resnet', 'train.load_data_fn = @resnet.Resnet'),
    ('`optimizer_cls` must return an instance of Optimizer',
     'train.optimizer_cls = @keras.losses.Poisson'),
    ('`loss_cls` must return an instance of Loss',
     'train.loss_cls = @keras.optimizers.SGD'),
    ('`loss_cls` must return a loss of one-hot labels',
     'train.loss_cls = @keras.losses.SparseCategoricalCrossentropy'),
    ('`macs` must be', BUDGET, 'callbacks.StrideBudget.macs = -1'),
    ('must be at least ', BUDGET, 'callbacks.StrideBudget.macs = 1'),
    ('`learn` must leave an epoch', BUDGET,
     'callbacks.StrideBudget.share = 0.9',
     'callbacks.StrideBudget.learn = 0.6'),
    ('`strides_from` must be the workdir of a finished training',
     "train.strides_from = '/nowhere'"),
    ('`job` must be a class or another callable', 'run.job = 3'),
    ('`job` must return an object', 'run.job = @resnet.batch_norm'),
    ("set resnet.Resnet.output_activation = 'softmax'",
     'resnet.Resnet.output_activation = None'),
    ('(in Resnet)', "resnet.Resnet.weight_decay = 'x'"),
    ('nonsense', 'pooling.DiffStride.nonsense = 3'),
    ("No bindings specified for 'nowhere", 'train.num_epochs = %nowhere'),
    ('must differ in `name` to be logged',
     'resnet.Resnet.filters = [2, 2, 2]', "resnet.Resnet.strides = '1, 2, 2'",
     "pooling.DiffStride.name = 'pool'"),
    ('`name` must be an existing folder', FOLDER,
     "data.load_datasets.name = '/nowhere'"),
    ('`warmup_epochs` must be at least 0 and below the 2 epochs', WARMUP,
     'schedules.warmup_cosine.peak = 0.1',
     'schedules.warmup_cosine.warmup_epochs = 2'),
    ('must differ in more than signs', GRID, "grid.strides = ['2,', '2']"),
    ('--gin_bindings="train.workdir = ', GRID, 'train.workdir = None'),
    ("grid.variants['a']: No configurable matching 'nowhere'", GRID,
     "grid.variants = {'a': ['nowhere.x = 1']}"),
    ("grid.strides_parameter: No configurable matching 'nowhere'", GRID,
     "grid.strides = ['2']", "grid.strides_parameter = 'nowhere.x'"),
    # The 2022 release had it.
    ('flip and crop_padding replace it', 'data.load_datasets.augment_fn = 1'),
    # Bindings that reach nothing.
    ('resnet.Resnet.strides has no effect, since strides is set by what calls '
     'resnet.Resnet: did you mean resnet.resnet18.strides?',
     'train.model_cls = @resnet.resnet18', 'resnet.resnet18.width = 1',
     "resnet.Resnet.strides = '1, 1, 2, 2, 2'"),
    ('pooling.DiffStride.strides has no effect, since strides is set by what '
     'calls pooling.DiffStride: did you mean resnet.Resnet.strides',
     'pooling.DiffStride.strides = 3'),
    ('resnet.resnet56.weight_decay has no effect, since resnet.resnet56 is not '
     'used in this job: did you mean resnet.Resnet.weight_decay?',
     'resnet.resnet56.weight_decay = 0.1'),
    ('did you mean resnet.Resnet.pooling_cls?',
     'resnet.ResidualLayer.pooling_cls = None'),
    ('WIDTH has no effect', 'WIDTH = 3'),
    ('grid.seeds has no effect', 'grid.seeds = [1]'),
    ('inner/resnet.Resnet.weight_decay has no effect',
     'inner/resnet.Resnet.weight_decay = 0.1'),
]  # fmt: skip


@pytest.mark.parametrize('row', WRONG_SETTINGS, ids=lambda row: row[-1])
def test_a_wrong_setting_is_one_line(error_of, row):
    holds, *bindings = row
    assert holds in error_of(*bindings)


def test_errors_of_code_keep_their_traceback(run):
    @gin.register(module='broken')
    def model(**unused):
        raise KeyError('fault')

    with pytest.raises(KeyError, match='fault'):
        run(model=['train.model_cls = @broken.model'])


def test_bindings_without_effect_in_files_are_let_be(tmp_path, capsys):
    """Those of the user's own files are told."""
    path = tmp_path / 'own.gin'
    path.write_text(
        "include 'diffstride/examples/cifar10.gin'\n"
        'import small_data\n'
        'train.load_data_fn = @small_data.images\n'
        'train.model_cls = @small_data.linear\n'
        'resnet.resnet18.width = 2\n'
    )
    prepared(gin_config=[path])
    told = 'note: settings without effect in this job: resnet.resnet18.width\n'
    assert capsys.readouterr().out == told


# Gin refuses these.
UNKNOWN = [
    ('nowhere.x = 1', "No configurable matching 'nowhere'"),
    ('train.nonsense = 1', "a parameter named 'nonsense'"),
    ('train.num_epochs = @nowhere', 'decorate it with @gin.register in a mod'),
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
    assert holds in message and '--gin_bindings' in message
    assert line.strip() in message or 'nowhere' in message
    path = tmp_path / 'wrong.gin'
    path.write_text(f'train.seed = 1\n{line}\n')
    message = error_of(gin_config=path)
    assert holds in message and str(path) in message
    if (line, holds) in SYNTAX and 'EOF' not in holds:
        assert f'{path}, line 2' in message


def test_what_is_no_gin_file_or_flag_is_named(error_of, tmp_path):
    for name in 'nowhere.gin', '/nowhere/x.gin':
        message = error_of(gin_config=name)
        assert f'Received: {name!r}' in message
        assert "one of ['cifar10.gin', " in message
    binary = tmp_path / 'wrong.gin'
    binary.write_bytes(b'\xff\xfe\x00')
    for path in tmp_path, binary:
        assert str(path) in error_of(gin_config=path)
    with pytest.raises(app.UsageError, match='surplus'):
        main.main(['main', 'surplus'])


def test_a_workdir_that_cannot_be_made(error_of, tmp_path, monkeypatch):
    path = tmp_path / 'file'
    path.write_text('mine')
    for workdir in path, path / 'below', path / 'below/further':
        message = error_of(workdir=workdir)
        assert f'can be made and written, and {path} cannot' in message
    assert 'File name too long' in error_of(workdir='a' * 300)
    assert 'home' in error_of(workdir='~nobody-of-this-name/x')
    if sys.platform == 'linux':  # There the kernel lets nobody write.
        for workdir in '/proc/x/y', '/sys/x':
            message = error_of(LINEAR, workdir=workdir)
            assert f'train.workdir cannot be written: {workdir} (' in message
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    message = error_of(workdir=tmp_path / 'new')
    assert f'can be made and written, and {tmp_path} cannot' in message
