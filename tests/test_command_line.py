"""What is wrong with a command ends it with one line, before any work."""

import gc
import os
import pathlib
import socket
import subprocess
import sys

import gin
import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import app, flags
from PIL import Image
from test_data import TinyPair, TinyUnlabelled  # noqa: F401
from test_train import SMALL

from diffstride.examples import main, train


class TinyImageless(tfds.core.GeneratorBasedBuilder):
    """A dataset of labels alone."""

    VERSION = tfds.core.Version('1.0.0')
    code_path = None

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=2)
        features = tfds.features.FeaturesDict({'label': label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        yield from ()


def write_images(folder, names=('0.png', '1.png'), size=(12, 16)):
    """Writes images of noise in both splits of one class each of two."""
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for label in 'dark', 'light':
            (folder / split / label).mkdir(parents=True)
            for name in names:
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / name)
    return folder


def copied(content):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in content.rglob('*')
    }


@pytest.fixture(scope='module', autouse=True)
def little_garbage():
    """Keras collects garbage each time that a command clears its session."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('small') / 'images')


@pytest.fixture
def error_of(images, tmp_path, capfd, monkeypatch):
    """Runs a command that is wrong; returns its line on stderr.

    It must leave the workdir as it was, and not have begun to train.
    """
    config = tmp_path / 'small.gin'
    config.write_text(
        SMALL
        + f"""
data.load_datasets.name = '{images}'
data.load_datasets.batch_size = 2
data.load_datasets.image_size = (12, 16)
data.load_datasets.normalization = 'unit'
regularizers.MacsCost.budget = 1e4
callbacks.SettleStrides.epoch = 1
"""
    )

    def begin(*unused, **also_unused):
        pytest.fail('training began')

    monkeypatch.setattr(keras.Model, 'fit', begin)

    def run(*bindings, workdir=tmp_path / 'run', gin_config=config):
        gin.clear_config()
        flags.FLAGS.unparse_flags()
        flags.FLAGS(
            ['main', f'--gin_config={gin_config}']
            + [f"--gin_bindings=train.workdir = '{workdir}'"]
            + [f'--gin_bindings={binding}' for binding in bindings]
        )
        before = copied(tmp_path)
        try:
            with pytest.raises(SystemExit) as stop:
                main.main(['main'])
        finally:
            for name in ('gin_config', 'gin_bindings'):
                flags.FLAGS[name].unparse()
        message = stop.value.code
        assert message.startswith('error: ')
        assert '\n' not in message
        assert 'Epoch' not in capfd.readouterr().out
        assert copied(tmp_path) == before
        return message

    return run


def table(*rows):
    """Cases of (parameter, wrong values, what the line must hold)."""
    return [
        pytest.param(
            f'{parameter} = {value}', holds, id=f'{parameter} = {value}'[:60]
        )
        for parameter, values, *holds in rows
        for value in values
    ]


NO_FUNCTION = ("'x'", 'None', '3', '[]', '{}', 'True')
NO_COUNT = (*("'x'", '0', '-1', '1.5', '2.0', 'True', '[1]', '1e400'), '{}')
NO_BOOL = ("'x'", 'None', '1', '0', '3', '[]')
NO_WEIGHT = (*("'x'", 'None', '-1', 'True', '[1]', '1e400'), '@train.train')
NO_NAME = ("'x'", 'None', '3', '[]', 'True')
TRAINING = table(
    ('train.train.workdir', ('3', 'None', "''", "['a']", 'True', '@train.train',
                             "'a\\x00b'"), 'workdir must be a folder'),
    ('train.load_data_fn', NO_FUNCTION, 'train.load_data_fn must be a class'),
    ('train.load_data_fn', ('@resnet.Resnet',), 'num_output_classes', 'Resnet'),
    ('train.load_data_fn', ('@resnet.batch_norm',), "'seed'", 'batch_norm'),
    ('train.model_cls', NO_FUNCTION, 'train.model_cls must be a class'),
    ('train.model_cls', ('@resnet.batch_norm',), 'batch_norm()'),
    ('train.model_cls', ('@pooling.DiffStride',), 'passed to DiffStride'),
    ('train.optimizer_cls', (*NO_FUNCTION, "'sgd'",
                             '@tf.keras.optimizers.SGD()'),
     'train.optimizer_cls must be a class'),
    ('train.optimizer_cls', ('@tf.keras.losses.Poisson', '@resnet.batch_norm'),
     'train.optimizer_cls must return an instance of Optimizer'),
    ('train.loss_cls', NO_FUNCTION, 'train.loss_cls must be a class'),
    ('train.loss_cls', ('@tf.keras.optimizers.SGD', '@resnet.batch_norm'),
     'train.loss_cls must return an instance of Loss'),
    ('train.loss_cls', ('@tf.keras.losses.SparseCategoricalCrossentropy',
                        '@tf.keras.losses.Loss'),
     'train.loss_cls must return a loss of one-hot labels'),
    ('train.num_epochs', (*NO_COUNT, 'None', '100000000000000000000'),
     'train.num_epochs must be an integer >= 1'),
    ('train.steps_per_epoch', (*NO_COUNT, "''", 'False', '0.0'),
     'train.steps_per_epoch must be an integer >= 1 or None'),
    ('train.data_format', NO_NAME, 'train.data_format must be'),
    ('train.dtype_policy', (*NO_NAME, "''", "'float31'", "'int32'", "'bool'",
                            "'complex64'", "'int8_from_float32'", '{}'),
     'train.dtype_policy must be the name of a policy'),
    ('train.jit_compile', NO_BOOL, "train.jit_compile must be True, False or"),
    ('train.distribution', (*NO_NAME, "'all'"), 'train.distribution must be'),
    ('train.distribution', ("'data_parallel'",), 'on tensorflow'),
    ('train.callbacks', ("'x'", 'None', '3', '{}', '@callbacks.SettleStrides'),
     'train.callbacks must be a list'),
    ('train.callbacks', ('[3]', '[None]', '[@resnet.batch_norm]'),
     'train.callbacks must be Keras callbacks'),
    ('train.seed', ("'x'", 'None', '-1', '1.5', 'True', '[1]', '4294967296'),
     'train.seed must be an integer in [0, 2**32)'),
    ('train.deterministic', NO_BOOL, 'train.deterministic must be True or'),
    ('run.job', ('3', "'x'", '[]'), 'run.job must be a function'),
)  # fmt: skip
LOADING = table(
    ('name', ('3', 'None', "''", 'True', '[]'), 'name must be the name of'),
    ('name', ("'cifar11'",), "name must be a TFDS dataset", "'cifar11'"),
    ('name', ("'/nowhere'", "'./x'", "'s3://x/y'"),
     'name must be an existing folder'),
    ('name', ("'a:b:c'", "'mnist/x'"), 'cannot open the dataset'),
    ('data_dir', ('3', 'True', '[]', "''"), 'data_dir must be a path or None'),
    ('batch_size', (*NO_COUNT, 'None'), 'batch_size must be an int >= 1'),
    ('batch_size', ('100',), 'batch_size must be at most 4'),
    ('mixup_alpha', (*NO_WEIGHT, '-1e400'), 'mixup_alpha must be a finite'),
    ('flip', NO_BOOL, 'flip must be True or False'),
    ('crop_padding', ("'x'", 'None', '-1', '1.5', 'True', '[1]'),
     'crop_padding must be an int >= 0'),
    ('normalization', ("'x'", '3', 'True', '[]', "''"),
     "normalization must be 'dataset'"),
    ('image_size', ("'x'", "'ab'", '3', 'True', '[]', '{}', '(1,)', '(0, 1)',
                    '(1.0, 1)', "('a', 'b')", '(True, True)'),
     'image_size must be (height, width)'),
    ('train_split', ("'x'", "'train['", "'train[:50%]'"),
     'train_split must be a folder inside'),
    ('train_split', ('None', '3', "''", '[]'), 'train_split must be a split'),
    ('test_split', ("'x'", "'test[0:0]'"), 'test_split must be a folder'),
    ('test_split', ('None', '3', "''", '[]'), 'test_split must be a split'),
    ('seed', ('1',), "denylisted kwarg 'seed'"),
    ('cache', ("'x'", 'None', '3', '1', '[]'), "cache must be True, False or"),
    ('nonsense', ('1',), "a parameter named 'nonsense'"),
)  # fmt: skip
NETWORK = table(
    ('resnet.Resnet.filters', ("'x'", 'None', '3', '[]', "[2, 'a']", '[2, 0]',
                               '[2, True]', '[2, 2.0]', '{}'),
     '`filters` must be a list of integers'),
    ('resnet.Resnet.filters', ('[2]',), '`strides` must be as many'),
    ('resnet.Resnet.strides', ('[]', '[1]', "'1'", '[1, 3, 2]', "'1, 3, 2'"),
     '`strides` must be as many as `filters`, 2'),
    ('resnet.Resnet.strides', ("'x'", 'None', '3', 'True', "'import os'"),
     '`strides` must be a list of strides'),
    ('resnet.Resnet.strides', ("[1, 'a']", '[1, True]', '[1, 0]', "'1, 0'",
                               '[1, 0.5]', '[1, -2]', '[1, [2]]', '[1, None]',
                               '[1, [2, 2, 2]]', '[1, 1e400]'),
     '`strides` must be a number or a sequence of 2'),
    ('resnet.Resnet.output_activation', ("'x'", '3', 'True', '[]'),
     'activation function', '(in Resnet)'),
    ('resnet.Resnet.output_activation', ('None',), 'output_activation'),
    ('resnet.Resnet.id_only', ("'x'", 'None', '3', 'True', '[9]', '[-1]',
                               "['a']", '[True]'),
     '`id_only` must be a list of indices of blocks'),
    ('resnet.Resnet.pooling_cls', ("'x'", '3', 'True'),
     '`pooling_cls` must be a class'),
    ('resnet.Resnet.pooling_cls', ('@train.train',), "'strides'"),
    ('resnet.Resnet.weight_decay', ("'x'", '-1', '[1]', '1e400'),
     '`weight_decay` must be a finite number', '(in Resnet)'),
    ('resnet.Resnet.stride_cost', ("'x'", '[1]', '@train.train',
                                   '@regularizers.MacsCost',
                                   '@regularizers.StrideCost()'),
     '`stride_cost` must be a cost of a model'),
    ('resnet.Resnet.stride_cost', ('-1', 'True', '1e400'),
     '`stride_cost` must be a finite number, at least 0'),
    ('resnet.Resnet.num_layers', (*NO_COUNT, 'None'),
     '`num_layers` must be an integer, at least 1'),
    ('resnet.Resnet.nonsense', ('1',), 'nonsense'),
    ('resnet.ResidualLayer.kernel_size', ("'x'", 'None', '0', '1.5', '[1]'),
     '`kernel_size` argument must be', '(in ResidualLayer)'),
    ('resnet.ResidualLayer.batch_norm_args', ('3', '{"a": 1}'),
     '(in ResidualLayer)'),
    ('batch_norm.momentum', ("'x'", 'None', '[1]'), 'float'),
    ('batch_norm.epsilon', ("'x'", 'None', '[1]'), 'float'),
    ('batch_norm.nonsense', ('1',), "a parameter named 'nonsense'"),
)  # fmt: skip
POOLING = table(
    ('smoothness_factor', (*NO_WEIGHT, '0'), '`smoothness_factor` must be'),
    ('trainable', NO_BOOL, 'Expected `trainable` to be a boolean'),
    ('lower_limit_stride', ("'x'", '0', '-1', 'True', '[1]', '1e400'),
     '`lower_limit_stride` must be None or a finite number'),
    ('upper_limit_stride', ("'x'", '0', '-1', 'True', '[1]', '1e400'),
     '`upper_limit_stride` must be None or a finite number'),
    ('lower_limit_stride', ('3.5',), '`strides` must lie between'),
    ('ramp', NO_NAME, '`ramp` must be one of'),
    ('method', NO_NAME, '`method` must be one of'),
    ('norm', NO_NAME, '`norm` must be one of'),
    ('strides_regularizer', ("'x'", '3', 'True', '[]',
                             '@regularizers.MacsCost()'),
     'interpret regularizer identifier'),
    ('name', ('3', '[]', "'a/b'"), 'Argument `name` must be a string'),
    ('dtype', ('3', "'x'"), '(in DiffStride)'),
    ('nonsense', ('3',), "passed to DiffStride: {'nonsense': 3}"),
)  # fmt: skip
MACS_COST = table(
    ('budget', (*NO_WEIGHT, '0'), '`budget` must be a finite number above 0'),
    ('weight', NO_WEIGHT, '`weight` must be a finite number, at least 0'),
    ('input_shape', ("'x'", '3', 'True', '{}', "['a']", '[0, 1, 3]',
                     '(12, 16, None)'),
     '`input_shape` must be None or [height, width, channels]'),
)  # fmt: skip


@pytest.mark.parametrize('binding, holds', [*TRAINING, *NETWORK])
def test_wrong_values_of_training_and_network(error_of, binding, holds):
    message = error_of(binding)
    assert all(text in message for text in holds), message


@pytest.mark.parametrize('binding, holds', LOADING)
def test_wrong_values_of_loading(error_of, binding, holds):
    message = error_of(f'data.load_datasets.{binding}')
    assert all(text in message for text in holds), message


@pytest.mark.parametrize('binding, holds', POOLING)
def test_wrong_values_of_learned_pooling(error_of, binding, holds):
    message = error_of(f'pooling.DiffStride.{binding}')
    assert all(text in message for text in holds), message


@pytest.mark.parametrize(
    'binding, holds',
    table(
        ('method', NO_NAME, '`method` must be one of'),
        ('norm', NO_NAME, '`norm` must be one of'),
        ('nonsense', ('1',), 'passed to FixedSpectralPooling'),
    ),
)
def test_wrong_values_of_fixed_pooling(error_of, binding, holds):
    message = error_of(
        'resnet.Resnet.pooling_cls = @pooling.FixedSpectralPooling',
        f'pooling.FixedSpectralPooling.{binding}',
    )
    assert all(text in message for text in holds), message


def test_pooling_layers_of_one_name(error_of):
    message = error_of(
        'resnet.Resnet.filters = [2, 2, 2]',
        "resnet.Resnet.strides = '1, 2, 2'",
        "pooling.DiffStride.name = 'pool'",
    )
    assert "must differ in `name` to be logged. Received: name=['pool', " in (
        message
    )


@pytest.mark.parametrize('binding, holds', MACS_COST)
def test_wrong_values_of_the_cost_of_strides(error_of, binding, holds):
    message = error_of(
        'resnet.Resnet.stride_cost = @regularizers.MacsCost()',
        f'regularizers.MacsCost.{binding}',
    )
    assert all(text in message for text in holds), message


@pytest.mark.parametrize('value', ["'x'", 'None', '-1', '1.5', 'True', '[1]'])
def test_wrong_values_of_a_callback(error_of, value):
    message = error_of(
        'train.callbacks = [@callbacks.SettleStrides()]',
        f'callbacks.SettleStrides.epoch = {value}',
    )
    assert '`epoch` must be an integer, at least 0' in message


@pytest.mark.parametrize(
    'value', ["'x'", 'None', '0', '-1', '1.5', 'True', '[1]']
)
def test_wrong_values_of_resnet18(error_of, value):
    message = error_of(
        'train.model_cls = @resnet.resnet18',
        f'resnet.resnet18.width = {value}',
    )
    assert '`width` must be an integer, at least 1' in message


# What gin refuses.

UNKNOWN = [
    ('nowhere.x = 1', "No configurable matching 'nowhere'"),
    ('train.nonsense = 1', "a parameter named 'nonsense'"),
    ('train.num_epochs = @nowhere', "reference '@nowhere'"),
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


@pytest.mark.parametrize('binding, holds', [*UNKNOWN, *SYNTAX])
def test_a_wrong_binding_is_named(error_of, binding, holds):
    message = error_of(binding)
    assert holds in message
    assert binding.strip() in message or 'nowhere' in message
    assert '--gin_bindings' in message or '%nowhere' in binding


@pytest.mark.parametrize('line, holds', [*UNKNOWN, *SYNTAX])
def test_a_wrong_gin_file_is_named(error_of, tmp_path, line, holds):
    path = tmp_path / 'wrong.gin'
    path.write_text(f'train.seed = 1\n{line}\n')
    message = error_of(gin_config=path)
    assert holds in message
    assert str(path) in message or '%nowhere' in line
    if (line, holds) in SYNTAX and 'EOF' not in holds:
        assert f'{path}, line 2' in message


@pytest.mark.parametrize('name', ['nowhere.gin', '/nowhere/x.gin'])
def test_a_missing_gin_file_is_named(error_of, name):
    assert name in error_of(gin_config=name)


@pytest.mark.parametrize('content', [None, b'\xff\xfe\x00'])
def test_what_is_no_gin_file_is_named(error_of, tmp_path, content):
    path = tmp_path / 'wrong.gin'
    path.mkdir() if content is None else path.write_bytes(content)
    assert str(path) in error_of(gin_config=path)


def test_unknown_arguments_are_refused():
    with pytest.raises(app.UsageError, match='surplus'):
        main.main(['main', 'surplus'])


# Datasets.


@pytest.mark.parametrize(
    'name, holds',
    [
        ('tiny_unlabelled', 'one ClassLabel among its features. It has: image'),
        ('tiny_imageless', 'one 8-bit Image and one ClassLabel'),
        ('tiny_pair', 'one 8-bit Image'),
    ],
)
def test_a_dataset_without_images_or_labels(error_of, name, holds):
    message = error_of(f"data.load_datasets.name = '{name}'")
    assert holds in message and f"'{name}'" in message


def test_images_of_differing_sizes(error_of, tmp_path):
    folder = write_images(tmp_path / 'images')
    Image.new('RGB', (16, 13)).save(folder / 'test' / 'dark' / '2.png')
    message = error_of(
        f"data.load_datasets.name = '{folder}'",
        'data.load_datasets.image_size = None',
    )
    assert '12 x 16 and 13 x 16: set data.load_datasets.image_size' in message


@pytest.mark.parametrize('content', ['', 'train', 'train/dark', 'train/dark/x'])
def test_a_folder_without_images(error_of, tmp_path, content):
    folder = tmp_path / 'images'
    (folder / content).mkdir(parents=True)
    (folder / content / 'notes.txt').write_text('none')
    message = error_of(f"data.load_datasets.name = '{folder}'")
    assert f'train_split must be a folder inside {folder}' in message


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('image_size', [None, (6, 6)])
@pytest.mark.parametrize('name', ['0.png', '0.jpg'])
@pytest.mark.parametrize('kept', [0, 0.5])
def test_a_damaged_image_is_named(
    error_of, tmp_path, split, image_size, name, kept
):
    folder = write_images(tmp_path / 'images', [name], size=(60, 80))
    path = folder / split / 'light' / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    message = error_of(
        f"data.load_datasets.name = '{folder}'",
        f'data.load_datasets.image_size = {image_size}',
    )
    assert f'cannot decode the image {path}' in message


@pytest.mark.parametrize('proxy', [False, True])
def test_no_network_is_told_at_once(error_of, tmp_path, monkeypatch, proxy):
    """TFDS tries for minutes; no host is asked for where a proxy is."""
    (tmp_path / 'downloads' / 'mnist').mkdir(parents=True)
    (tmp_path / 'downloads' / 'mnist' / 'archive.INFO').write_text('{}')
    asked = []

    def unknown(host, *unused):
        asked.append(host)
        raise socket.gaierror(-2, 'Name or service not known')

    def download(self, **unused):
        raise ConnectionError('the proxy is not there')

    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, 'download_and_prepare', download
    )
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if proxy:
        monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    message = error_of(
        "data.load_datasets.name = 'cifar10'",
        f"data.load_datasets.data_dir = '{tmp_path}'",
    )
    assert f"dataset 'cifar10' is not in {tmp_path}/cifar10/" in message
    assert 'copy a prepared one and set data.load_datasets.data_dir' in message
    assert ('the proxy is not there' in message) == proxy
    assert ('www.cs.toronto.edu: Name or serv' in message) == (not proxy)
    assert len(asked) == (0 if proxy else 1)


def test_what_was_downloaded_before_needs_no_network(
    error_of, tmp_path, monkeypatch
):
    folder = tmp_path / 'downloads' / 'cifar10'
    folder.mkdir(parents=True)
    (folder / 'archive.tar.gz.INFO').write_text('{}')

    def prepare(self, **unused):
        raise ValueError('it came to this')

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, 'download_and_prepare', prepare
    )
    message = error_of(
        "data.load_datasets.name = 'cifar10'",
        f"data.load_datasets.data_dir = '{tmp_path}'",
    )
    assert 'it came to this' in message


# The workdir.


@pytest.mark.parametrize('below', ['', '/below', '/below/further'])
def test_a_workdir_that_is_a_file_or_below_one(error_of, tmp_path, below):
    path = tmp_path / 'file'
    path.write_text('mine')
    message = error_of(workdir=f'{path}{below}')
    assert 'workdir must be a folder that can be made and written' in message
    assert f"'{path}{below}' ({path} is a file)" in message


@pytest.mark.skipif(sys.platform != 'linux', reason='of Linux')
@pytest.mark.parametrize('path', ['/proc', '/proc/x/y', '/sys', '/sys/x'])
def test_a_workdir_where_the_kernel_lets_nobody_write(error_of, path):
    message = error_of(workdir=path)
    assert 'workdir must be a folder that can be made and written' in message
    assert f"'{path}' (" in message


@pytest.mark.parametrize('name', ['a' * 300, '~nobody-of-this-name/x'])
def test_a_workdir_of_an_impossible_name(error_of, name):
    assert f"can be made and written. Received: '{name}'" in error_of(
        workdir=name
    )


def test_a_workdir_without_permission(error_of, tmp_path, monkeypatch):
    """Of a user who is not root, whom os.access tells."""
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    message = error_of(workdir=tmp_path / 'new')
    assert f"'{tmp_path / 'new'}' (Permission denied)" in message


@pytest.mark.parametrize('exists', [False, True])
def test_a_disk_that_refuses_the_workdir(
    error_of, tmp_path, monkeypatch, exists
):
    workdir = tmp_path / 'new'
    if exists:
        workdir.mkdir()
        monkeypatch.setattr('tempfile.TemporaryFile', refuse)
    else:
        monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
    message = error_of(workdir=workdir)
    assert f"'{workdir}' (Read-only file system)" in message


def refuse(*unused, **also_unused):
    raise OSError(30, 'Read-only file system')


@pytest.mark.parametrize(
    'wrong', ['train.seed = -1', 'resnet.Resnet.filters = [2, 4]']
)
def test_the_workdir_of_a_run_stays_as_it_is(error_of, tmp_path, wrong):
    """The model fits no checkpoint; neither is moved, nor anything written."""
    workdir = tmp_path / 'run'
    (workdir / 'logs').mkdir(parents=True)
    (workdir / 'history.json').write_text('[]')
    for name in ('last.keras', 'previous.keras'):
        (workdir / name).write_bytes(b'PK')
    message = error_of(wrong)
    assert 'train.seed' in message or 'last.keras cannot be conti' in message


# In a process of its own.


@pytest.mark.parametrize(
    'arguments, holds',
    [
        (['--gin_config=cifar10.gin'], 'workdir'),
        (['--gin_bindings=train.nonsense = 1'], 'train.nonsense = 1'),
        (['--gin_config=nowhere.gin'], 'nowhere.gin'),
    ],
)
def test_the_process_ends_with_code_1_and_the_line(tmp_path, arguments, holds):
    done = subprocess.run(
        [sys.executable, '-m', 'diffstride.examples.main', *arguments],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    *others, last = done.stderr.splitlines()
    assert last.startswith('error: ') and holds in last
    assert not [line for line in others if line.startswith('error: ')]
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_training_itself_are_not_hidden():
    """They are faults of code, of which a traceback tells more."""

    def job():
        raise KeyError('fault')

    with pytest.raises(KeyError), main._errors_before(job):
        job()
    with pytest.raises(train.SetupError), train.setup_errors():
        job()
