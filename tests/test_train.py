"""Training through the command line's own entry points."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import gin
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from PIL import Image

from diffstride import complexity, pooling, resnet
from diffstride.examples import main

SMALL = """
train.num_epochs = 2
train.optimizer_cls = @tf.keras.optimizers.SGD
tf.keras.optimizers.SGD.learning_rate = 0.05
tf.keras.optimizers.SGD.momentum = 0.9
data.load_datasets.batch_size = 8
data.load_datasets.crop_padding = 1
data.load_datasets.mixup_alpha = 0.2
train.model_cls = @resnet.Resnet
compare.model_cls = @resnet.Resnet
resnet.Resnet.filters = [2, 2]
resnet.Resnet.strides = '1, 3'
resnet.Resnet.num_layers = 1
resnet.Resnet.output_activation = 'softmax'
resnet.Resnet.pooling_cls = @pooling.DiffStride
pooling.DiffStride.smoothness_factor = 1.0
"""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of 32 training and 10 test images of 2 classes, 12 x 16."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('test', 5)):
        for label in ('dark', 'light'):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                low = 0 if label == 'dark' else 128
                pixels = rng.integers(low, low + 128, (12, 16, 3), np.uint8)
                Image.fromarray(pixels).save(
                    folder / split / label / f'{i}.png'
                )
    return folder


@pytest.fixture
def run(images, tmp_path):
    """Runs the command line with a small configuration; returns its workdir."""
    config = tmp_path / 'small.gin'
    config.write_text(SMALL + f"data.load_datasets.name = '{images}'\n")

    def run_main(*bindings, workdir='run', gin_config=config):
        gin.clear_config()
        flags.FLAGS.unparse_flags()
        workdir = tmp_path / workdir
        flags.FLAGS(
            ['main', f'--gin_config={gin_config}']
            + [f"--gin_bindings=train.workdir = '{workdir}'"]
            + [f'--gin_bindings={binding}' for binding in bindings]
        )
        try:
            main.main(['main'])
        finally:
            for name in ('gin_config', 'gin_bindings'):
                flags.FLAGS[name].unparse()
        return workdir

    return run_main


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_all_its_outputs(run):
    workdir = run()
    assert {path.name for path in workdir.iterdir()} == {
        'best.keras',
        'config.gin',
        'history.json',
        'last.keras',
        'logs',
        'previous.keras',
        'results.json',
        'strides.png',
    }
    results = read(workdir / 'results.json')
    history = read(workdir / 'history.json')
    assert [row['epoch'] for row in history] == [1, 2]
    assert results['epochs'] == 2
    assert results['steps'] == 8
    assert results['test_accuracy'] == history[-1]['val_accuracy']
    assert results['best_test_accuracy'] == max(
        row['val_accuracy'] for row in history
    )
    assert len(results['layers']) == 1
    for layer in results['layers'].values():
        assert len(layer['strides']) == len(layer['sizes']) == 2
    assert results['versions']['keras'] == keras.__version__
    assert 'mixup_alpha = 0.2' in (workdir / 'config.gin').read_text()


def test_the_last_checkpoint_gives_the_reported_strides(run):
    workdir = run()
    model = keras.models.load_model(workdir / 'last.keras')
    results = read(workdir / 'results.json')
    strides = [
        layer.stride_values for layer in pooling.diffstride_layers(model)
    ]
    reported = [layer['strides'] for layer in results['layers'].values()]
    np.testing.assert_allclose(strides, reported, rtol=1e-6)
    sizes = [
        list(row.output_shape[:2])
        for row in complexity(model, (12, 16, 3)).layers
        if row.class_name == 'DiffStride'
    ]
    assert sizes == [layer['sizes'] for layer in results['layers'].values()]


def test_a_continued_run_equals_an_uninterrupted_one(run):
    whole = read(run('train.num_epochs = 3', workdir='whole') / 'history.json')
    run('train.num_epochs = 1', workdir='parts')
    parts = read(run('train.num_epochs = 3', workdir='parts') / 'history.json')
    assert len(whole) == len(parts) == 3
    for a, b in zip(whole, parts):
        assert a.keys() == b.keys()
        for key in a.keys() - {'seconds'}:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, err_msg=key)


def test_a_finished_run_is_not_repeated(run, capsys):
    before = (run('train.num_epochs = 2') / 'results.json').read_text()
    capsys.readouterr()
    workdir = run('train.num_epochs = 2')
    assert capsys.readouterr().out == f'2 epochs of 2 are done in {workdir}\n'
    assert (workdir / 'results.json').read_text() == before


def test_tensorboard_receives_losses_accuracies_strides_and_sizes(run):
    workdir = run('train.num_epochs = 1')
    tags = set()
    for path in (workdir / 'logs').rglob('events*'):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            tags |= {(path.parent.name, v.tag) for v in event.summary.value}
    assert {('train', 'epoch_loss'), ('train', 'epoch_accuracy')} <= tags
    assert {
        ('validation', 'epoch_loss'),
        ('validation', 'epoch_accuracy'),
    } <= tags
    for kind in ('stride', 'size'):
        for axis in ('height', 'width'):
            pattern = f'epoch_{kind}/diff_stride.*/{axis}'
            assert sum(bool(re.fullmatch(pattern, t)) for _, t in tags) == 1


@pytest.mark.parametrize(
    'bindings',
    [
        [
            'tf.keras.losses.CategoricalCrossentropy.label_smoothing = 0.2',
            'data.load_datasets.mixup_alpha = 0.0',
            'data.load_datasets.flip = False',
            'data.load_datasets.crop_padding = 0',
            'data.load_datasets.normalization = None',
            'tf.keras.optimizers.SGD.momentum = 0.0',
            'resnet.Resnet.weight_decay = 0.0',
            'batch_norm.epsilon = 0.1',
            "train.dtype_policy = 'mixed_bfloat16'",
            'train.seed = 1',
        ],
        [
            'pooling.DiffStride.smoothness_factor = 2.0',
            "pooling.DiffStride.ramp = 'inside'",
        ],
    ],
    ids=['strided', 'learned'],
)
def test_every_binding_has_its_effect(run, bindings):
    """Each changes the loss of an epoch; no binding leaves it as it was."""
    common = ['train.num_epochs = 1', "data.load_datasets.test_split = 'test'"]
    if 'pooling' not in ''.join(bindings):
        common.append('resnet.Resnet.pooling_cls = None')

    def loss(*extra, workdir):
        history = run(*common, *extra, workdir=workdir) / 'history.json'
        return read(history)[0]['loss']

    losses = [
        loss(binding, workdir=str(i)) for i, binding in enumerate(bindings)
    ]
    plain = loss(workdir='plain')
    np.testing.assert_allclose(loss(workdir='again'), plain, rtol=1e-6)
    assert not np.isclose(losses, plain, rtol=1e-6, atol=0).any()


@pytest.mark.parametrize(
    'pooling_cls, expected',
    [
        ('None', ()),
        ('@pooling.FixedSpectralPooling', ()),
        ('@pooling.DiffStride', ('diff_stride',)),
    ],
)
def test_pooling_is_one_binding(run, pooling_cls, expected):
    workdir = run(
        f'resnet.Resnet.pooling_cls = {pooling_cls}', 'train.num_epochs = 1'
    )
    layers = read(workdir / 'results.json')['layers']
    assert tuple(re.sub(r'_\d+$', '', name) for name in layers) == expected
    assert (workdir / 'strides.png').exists() == bool(expected)


def test_training_under_xla_pins_the_sizes(run):
    workdir = run('train.jit_compile = True', 'train.num_epochs = 1')
    model = keras.models.load_model(workdir / 'last.keras')
    pinned = [p.pinned_strides for p in pooling.diffstride_layers(model)]
    assert pinned == [(3.0, 3.0)]


def test_strides_settle_when_a_callback_says_so(run):
    workdir = run(
        'train.num_epochs = 3',
        'train.callbacks = [@callbacks.SettleStrides()]',
        'callbacks.SettleStrides.epoch = 1',
    )
    history = read(workdir / 'history.json')
    for key in history[0]:
        if key.startswith('stride/'):
            assert history[0][key] != 3.0
            assert history[0][key] == history[1][key] == history[2][key]
        if key.startswith('size/') or key == 'macs':
            assert history[1][key] == history[2][key]
    assert read(workdir / 'results.json')['macs'] == history[2]['macs']


def test_a_cost_of_strides_makes_them_larger(run):
    strides = [
        read(run(f'resnet.Resnet.stride_cost = {cost}', workdir=f'cost{cost}')
             / 'history.json')[-1]
        for cost in (0, 100)
    ]  # fmt: skip
    keys = [key for key in strides[0] if key.startswith('stride/')]
    assert len(keys) == 2
    assert all(strides[1][key] > strides[0][key] for key in keys)


@pytest.mark.parametrize(
    'bindings',
    [
        ['train.optimizer_cls = @tf.keras.optimizers.AdamW'],
        [
            'train.optimizer_cls = @tf.keras.optimizers.LossScaleOptimizer',
            'tf.keras.optimizers.LossScaleOptimizer.inner_optimizer = '
            '@tf.keras.optimizers.AdamW()',
        ],
    ],
    ids=['plain', 'within another'],
)
def test_weight_decay_does_not_reach_strides(run, bindings):
    """AdamW that takes a tenth of a weight and hardly moves it otherwise."""
    workdir = run(
        *bindings,
        'train.num_epochs = 1',
        'tf.keras.optimizers.AdamW.learning_rate = 1e-6',
        'tf.keras.optimizers.AdamW.weight_decay = 1e5',
    )
    history = read(workdir / 'history.json')
    strides = [v for k, v in history[0].items() if k.startswith('stride/')]
    np.testing.assert_allclose(strides, 3, rtol=1e-4)


def test_compare_trains_the_three_poolings(run, tmp_path, capsys):
    run(
        'run.job = @train.compare',
        f"compare.workdir = '{tmp_path / 'three'}'",
        'train.num_epochs = 1',
    )
    output = capsys.readouterr().out
    assert output.endswith(
        f'{tmp_path / "three" / "DiffStride" / "strides.png"}\n'
    )
    table = output.split('| pooling ')[1]
    for name in ('StridedConvolution', 'FixedSpectralPooling', 'DiffStride'):
        assert f'| {name} | ' in table
        assert (tmp_path / 'three' / name / 'results.json').exists()


def test_a_workdir_of_another_model_is_left_alone(run):
    workdir = run('train.num_epochs = 1')
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    with pytest.raises(SystemExit, match='cannot be continued'):
        run('resnet.Resnet.filters = [2, 4]')
    with pytest.raises(SystemExit, match='of epochs of 4 steps, and not of 3'):
        run('train.steps_per_epoch = 3')
    assert before == {p: p.read_bytes() for p in before}


def test_a_damaged_checkpoint_is_named_and_left_alone(run):
    workdir = run('train.num_epochs = 1')
    checkpoint = workdir / 'last.keras'
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r'last\.keras cannot be continued'):
        run()
    assert len(checkpoint.read_bytes()) == 1000


def test_two_replicas_train_as_one_device_does():
    """Two logical CPUs, in a process of their own, on the same batches."""
    code = """
import sys, numpy as np, keras, tensorflow as tf
cpu = tf.config.list_physical_devices('CPU')[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from diffstride import DiffStride
from diffstride.examples import train
keras.utils.set_random_seed(0)
with train._distributed(sys.argv[1]):
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    assert replicas == 1 + (sys.argv[1] == 'mirrored')
    # Without batch normalization, whose batch is that of a replica.
    model = keras.Sequential([
        keras.Input((8, 8, 1)), DiffStride(2.0, 1.0),
        keras.layers.Conv2D(2, 3, activation='relu'),
        keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), 'mse')
x = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
y = np.eye(2)[np.arange(16) % 2]
model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
print(*np.concatenate([np.ravel(w) for w in model.get_weights()]))
"""
    weights = []
    for distribution in ('none', 'mirrored'):
        done = subprocess.run(
            [sys.executable, '-c', code, distribution],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        weights.append(np.array(done.stdout.split(), 'float64'))
    assert weights[0][:2].tolist() != [2, 2]  # The strides.
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'backend',
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(name) is None,
                reason=f'{name} is not installed',
            ),
        )
        for name in ('jax', 'torch')
    ],
)
def test_other_backends_train_and_continue(backend, images, tmp_path):
    config = tmp_path / 'small.gin'
    config.write_text(SMALL + f"data.load_datasets.name = '{images}'\n")

    def run_main(epochs):
        done = subprocess.run(
            [
                *(sys.executable, '-m', 'diffstride.examples.main'),
                f'--gin_config={config}',
                f"--gin_bindings=train.workdir = '{tmp_path}/{backend}'",
                f'--gin_bindings=train.num_epochs = {epochs}',
                '--gin_bindings=tf.keras.optimizers.SGD.learning_rate = 5.0',
            ],
            env={
                **os.environ,
                'KERAS_BACKEND': backend,
                'PYTHONPATH': os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert 'RepinStrides' not in done.stderr  # No advice is needed.
        return read(tmp_path / backend / 'history.json')

    first, rows = run_main(1), run_main(2)
    assert rows[:1] == first and len(rows) == 2
    results = read(tmp_path / backend / 'results.json')
    assert results['versions']['backend'] == backend
    assert results['steps'] == 8
    (layer,) = results['layers'].values()
    assert layer['strides'] != [3.0, 3.0]
    assert (tmp_path / backend / 'strides.png').exists()


def test_the_documented_command_works_from_any_folder(images, tmp_path):
    """The README's command, its dataset and size replaced by small ones."""
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'diffstride.examples.main'),
            '--gin_config=cifar10.gin',
            f"--gin_bindings=train.workdir = '{tmp_path}/exp/resnet18/'",
            f"--gin_bindings=data.load_datasets.name = '{images}'",
            '--gin_bindings=data.load_datasets.batch_size = 16',
            '--gin_bindings=resnet.resnet18.width = 2',
            '--gin_bindings=train.num_epochs = 1',
        ],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    config = (tmp_path / 'exp/resnet18/config.gin').read_text()
    assert 'label_smoothing = 0.2' in config
    results = read(tmp_path / 'exp/resnet18/results.json')
    assert results['steps'] == 2


@pytest.mark.parametrize(
    'text',
    [
        """
data.load_datasets:
  name = 'cifar100'
  mixup_alpha = 0.0
resnet.Resnet:
  pooling_cls = @pooling.FixedSpectralPooling
resnet.resnet18.strides = '1, 1, 3, 2, 3'
""",
        """
import diffstride.examples.external_configurables
import diffstride.examples.data as data
import diffstride.examples.train as train
import diffstride.resnet as resnet
import diffstride.pooling as pooling
train.train:
  load_data_fn = @data.load_datasets
  model_cls = @resnet.resnet18
  optimizer_cls = @tf.keras.optimizers.SGD
tf.keras.optimizers.SGD:
  learning_rate = @tf.keras.optimizers.schedules.PiecewiseConstantDecay()
resnet.resnet18.strides = [1, 1, 3, 2, 3]
resnet.Resnet.pooling_cls = @pooling.FixedSpectralPooling
batch_norm.momentum = 0.9
""",
    ],
)
def test_bindings_of_the_2022_release_are_understood(text):
    packaged = pathlib.Path(main.__file__).parent / 'cifar10.gin'
    gin.parse_config_files_and_bindings([str(packaged)], [text])
    model = resnet.resnet18(num_output_classes=100, width=2)
    model.build((None, 32, 32, 3))
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, pooling.FixedSpectralPooling)
    ]
    assert [layer.strides for layer in layers] == [
        (3.0, 3.0),
        (2.0, 2.0),
        (3.0, 3.0),
    ]


EXAMPLES = pathlib.Path(main.__file__).parent


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.gin')), ids=str)
def test_every_packaged_gin_file_is_understood(path):
    if path.stem == 'cifar10_sweep':
        importlib.import_module('diffstride.examples.sweep')
    main._parse([str(path)], [])
    if path.stem == 'cifar10_sweep':
        for bindings in gin.query_parameter('sweep.variants').values():
            with gin.unlock_config():
                gin.parse_config(bindings)


def test_the_packaged_budget_is_that_of_the_usual_strides():
    main._parse([str(EXAMPLES / 'cifar10_budget.gin')], [])
    shape = (32, 32, 3)
    network = resnet.configured(resnet.resnet18)(num_output_classes=10)
    network.build((None, *shape))
    usual = resnet.resnet18(
        strides=(1, 1, 2, 2, 2),
        width=16,
        num_output_classes=10,
        stride_cost=None,
        pooling_cls=pooling.FixedSpectralPooling,
    )
    budget = network.stride_cost.budget
    assert complexity(network, shape).macs < budget
    assert network.stride_cost.meet_budget(network)
    assert complexity(network, shape).macs == budget
    assert complexity(usual, shape).macs == budget
