"""Training through the command line's own entry points."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re

import gin
import keras
import numpy as np
import pytest
import small_data
import small_runs
import tensorflow as tf
from backends import output_of
from keras import ops
from small_data import take
from small_runs import GO_ON, files, history_of, prepared, read

from diffstride import diffstride_layers
from diffstride.counting import complexity
from diffstride.examples import checkpoints, classifier, schedules, settings

ROOT = pathlib.Path(__file__).parents[1]
GIN_FILES = [*ROOT.glob('diffstride/*/*.gin'), *ROOT.glob('results/*/*.gin')]
SGD = 'keras.optimizers.SGD'


def model_of(workdir, epoch, name='model'):
    folder = workdir / f'checkpoints/epoch_{epoch:04}'
    return keras.models.load_model(folder / f'{name}.keras')


def test_a_run_leaves_all_its_outputs(config, tmp_path, capsys):
    workdir = tmp_path / 'run'
    small_runs.run_here(workdir=workdir, gin_config=[config])
    output = capsys.readouterr().out
    names = 'best.keras checkpoints config.gin data.json lock logs results.json'
    found = {path.name for path in workdir.iterdir()}
    assert found == {*names.split(), 'strides.png'}
    found = sorted(path.name for path in workdir.glob('checkpoints/*/*'))
    assert found == ['model.keras'] * 2 + ['state.json'] * 2
    results = read(workdir / 'results.json')
    assert [row['epoch'] for row in results['history']] == [1, 2]
    assert results['epochs'] == 2 and results['steps'] == 8
    accuracies = [row['val_accuracy'] for row in results['history']]
    assert results['validation_accuracy'] == max(accuracies)
    assert results['epoch'] == 1 + accuracies.index(max(accuracies))
    assert results['versions']['keras'] == keras.__version__
    assert '32 images of 2 classes\n' in output
    assert f'Epochs 1 to 2, of 4 steps, in {workdir}\n' in output
    assert re.search(r'Test accuracy of epoch \d: [\d.]+%, [\d.]+ MMAC', output)

    # The saved model gives the reported numbers.
    run = classifier.load_run(workdir)
    assert run.class_names == ('dark', 'light')
    assert run.image_shape == (12, 16, 3)
    np.testing.assert_array_equal([run.mean, run.scale], [[0] * 3, [1] * 3])
    x, y = take(small_data.images().test)
    accuracy = np.mean(run.model.predict(x, verbose=0).argmax(1) == y.argmax(1))
    assert results['test_accuracy'] == pytest.approx(accuracy)
    (layer,) = diffstride_layers(run.model)
    (reported,) = results['layers'].values()
    np.testing.assert_allclose(layer.stride_values, reported['strides'])
    assert reported['strides'] != [3, 3] == reported['initial_strides']
    counted = complexity(run.model, (12, 16, 3))
    (row,) = (r for r in counted.layers if r.class_name == 'DiffStride')
    assert list(row.output_shape[:2]) == reported['sizes']
    assert counted.macs == results['macs']

    tags = {
        value.tag
        for path in workdir.glob('logs/*/events*')
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    for axis in 'height', 'width':
        assert f'epoch_stride/{layer.name}/{axis}' in tags
        assert f'epoch_size/{layer.name}/{axis}' in tags


def test_test_data_are_touched_once_and_at_the_end(run, capsys):
    """Results that are lost are made again."""
    touched = tf.Variable(0)

    def count(x, y):
        touched.assign_add(1)
        return x, y

    @gin.register
    def counted(**kwargs):
        datasets = small_data.images(**kwargs, validation=False)
        return dataclasses.replace(datasets, test=datasets.test.map(count))

    workdir = run('train.load_data_fn = @counted')
    assert touched == 2  # There are two batches.
    path = workdir / 'results.json'
    results = read(path)
    assert results['epoch'] == 2 and results['validation_accuracy'] is None
    assert not (workdir / 'best.keras').exists()
    assert not [key for key in results['history'][0] if 'val' in key]
    run('train.load_data_fn = @counted')
    assert touched == 2
    assert 'Test accuracy of epoch 2: ' in capsys.readouterr().out
    for content in '{"epochs": 2, "ste', '[]', None:
        path.unlink() if content is None else path.write_text(content)
        run('train.load_data_fn = @counted')
        assert read(path) == results


def test_strides_of_another_run_are_held(run, tmp_path):
    results = {'layers': {'of_another_name': {'strides': [3.5, 2.75]}}}
    (tmp_path / 'results.json').write_text(json.dumps(results))
    workdir = run(f"train.strides_from = '{tmp_path}'", model=(), epochs=1)
    (layer,) = read(workdir / 'results.json')['layers'].values()
    assert layer['strides'] == [3.5, 2.75]
    assert layer['initial_strides'] == [3, 3]


def test_a_continued_run_equals_an_uninterrupted_one(run, capsys):
    """So do the averages of weights and what callbacks remember."""
    weights = []

    @gin.register
    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.append(self.model.get_weights()[0])

    bindings = (
        f'{SGD}.use_ema = True',
        f'{SGD}.ema_momentum = 0.7',
        'train.callbacks = [@Watch(), @callbacks.ReduceLROnPlateau(), '
        '@callbacks.EarlyStopping()]',
        'callbacks.ReduceLROnPlateau.min_delta = 10.0',
        'callbacks.ReduceLROnPlateau.patience = 2',
        'callbacks.EarlyStopping.min_delta = 10.0',
        'callbacks.EarlyStopping.patience = 4',
    )
    whole = run(*bindings, name='whole', epochs=9)
    history = history_of(whole)
    rates = [row['learning_rate'] for row in history]
    np.testing.assert_allclose(rates[2:5], [0.05, 0.005, 0.005])

    # The average, from the first step on, is validated and kept.
    average = functools.reduce(lambda a, w: 0.7 * a + 0.3 * w, weights)
    done = len(history)
    model, raw = (model_of(whole, done, x) for x in ('model', 'training'))
    np.testing.assert_allclose(model.get_weights()[0], average, rtol=1e-5)
    np.testing.assert_allclose(raw.get_weights()[0], weights[-1], rtol=1e-6)
    data = small_data.images()
    loss = model.evaluate(data.validation, return_dict=True, verbose=0)['loss']
    assert history[-1]['val_loss'] == pytest.approx(loss, rel=1e-5)

    for epochs in (2, 3, 9):
        parts = run(*bindings, name='parts', epochs=epochs)
    assert history_of(parts) == history
    before = files(parts)
    capsys.readouterr()
    run(*bindings, name='parts', epochs=9)  # It ended early.
    assert files(parts) == before
    told = f'{done} epochs of 9 are done in {parts}. Test accuracy'
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)


def test_other_settings_are_refused_or_explicitly_continued(run, monkeypatch):
    workdir = run()
    before = files(workdir)
    for setting, value, can_go_on in (
        (f'{SGD}.learning_rate', 0.01, True),
        ('small_data.images.brightness', 2.0, True),
        ('train.optimizer_cls', '@keras.optimizers.Adam', False),
    ):
        go_on = [] if can_go_on else [GO_ON]
        with pytest.raises(SystemExit, match=f'{setting} was ') as error:
            run(f'{setting} = {value}', *go_on, epochs=3)
        assert f' and is {value!r}' in error.value.code
        assert (GO_ON in error.value.code) == can_go_on
    with pytest.raises(SystemExit, match='is damaged, or of another model'):
        run('small_data.linear.units = 2', GO_ON, epochs=3)
    with pytest.raises(SystemExit, match=r'2 epochs are done in .*, more than'):
        run(epochs=1)
    monkeypatch.setattr(small_data, 'CLASSES', ('dark', 'bright'))
    with pytest.raises(SystemExit, match=r"'light'.* are .*'bright'"):
        run(epochs=3)
    assert files(workdir) == before


def test_settings_change_with_the_first_checkpoint_under_them(run, monkeypatch):
    """A process that ends before has changed nothing.

    A schedule has no variable of the rate; without momentum there is none.
    Averages of weights cannot begin later.
    """
    still = (
        f'{SGD}.learning_rate = @schedules.warmup_cosine()',
        'schedules.warmup_cosine.peak = 1e-9',
        f'{SGD}.momentum = 0.9999',
    )
    before = model_of(run(epochs=1), 1).optimizer
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(checkpoints, 'save', None)
        run(*still, GO_ON)
    with pytest.raises(SystemExit, match=r'learning_rate was 0\.05 and is '):
        run(*still)
    workdir = run(*still, GO_ON)
    assert 'momentum = 0.9999' in (workdir / 'config.gin').read_text()
    run(*still)
    after = model_of(workdir, 2).optimizer
    assert after.iterations == 8
    for x, y in zip(after.momentums, before.momentums):
        np.testing.assert_allclose(x, y, rtol=1e-3)
    plain = f'{SGD}.momentum = 0.0'
    for epochs, rate in (3, 0.05), (4, 0.01):
        run(plain, f'{SGD}.learning_rate = {rate}', GO_ON, epochs=epochs)
        after = model_of(workdir, epochs).optimizer
        assert after.iterations == 4 * epochs
        assert float(after.learning_rate) == pytest.approx(rate)
    with pytest.raises(SystemExit, match='use_ema was False and is True'):
        run(plain, f'{SGD}.use_ema = True', GO_ON, epochs=5)


def test_other_callbacks_do_not_get_the_values_of_those_before(run):
    """Both have a `best` and a `wait`."""
    seen = []

    @gin.register
    class Rate(keras.callbacks.ReduceLROnPlateau):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(self.best)

    early = '@callbacks.EarlyStopping()'
    run(f'train.callbacks = [{early}]', epochs=1)
    run('train.callbacks = [@Rate()]', GO_ON, epochs=2)
    assert seen in ([None], [np.inf])  # It depends on the version of Keras.
    # In another place among callbacks it has its own values.
    run(f'train.callbacks = [{early}, @Rate()]', GO_ON, epochs=3)
    assert np.isfinite(seen[-1])


def test_a_loss_that_is_not_finite_ends_the_training(run):
    """Steps on very bright images lead to weights whose outputs overflow."""
    workdir = run(epochs=1)
    with pytest.raises(SystemExit, match=r'loss of epoch 2 is (nan|inf)\. The'):
        run('small_data.images.brightness = 1e30', GO_ON, epochs=3)
    (folder,) = checkpoints.epoch_folders(workdir)
    assert folder.name == 'epoch_0001'
    assert np.isfinite(read(folder / 'state.json')['history'][0]['loss'])
    model = keras.models.load_model(workdir / 'best.keras')
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.slow
def test_the_result_is_within_the_budget(run, config):
    """Strides are learned in two epochs of four; a run in parts is the same."""
    bindings = (
        'train.callbacks = [@callbacks.StrideBudget()]',
        'callbacks.StrideBudget.share = 0.9',
        'callbacks.StrideBudget.learn = 2',
        f'{SGD}.learning_rate = 1.0',
    )
    initial = prepared(gin_config=[config]).model
    macs = complexity(initial, (12, 16, 3)).macs
    for epochs in (3, 4):
        parts = run(*bindings, model=(), epochs=epochs)
    whole = run(*bindings, name='whole', model=(), epochs=4)
    history = history_of(whole)
    assert history == history_of(parts)
    assert [row['strides_held'] for row in history] == [0, 0, 1, 1]
    results = read(whole / 'results.json')
    assert results['epoch'] in (3, 4)
    assert results['macs'] <= 0.9 * macs
    model = classifier.load_run(whole).model
    assert complexity(model, (12, 16, 3)).macs == results['macs']


def first_loss(training):
    """The loss of the first batch, without a step."""
    x, y = next(iter(training.datasets.train()))
    outputs = training.model(x, training=True)
    return float(training.model.compute_loss(x, y, outputs, training=True))


def test_every_binding_changes_the_loss_of_the_first_batch(config):
    plain = first_loss(prepared(gin_config=[config]))
    for binding in (
        'keras.losses.CategoricalCrossentropy.label_smoothing = 0.2',
        'resnet.Resnet.weight_decay = 0.0',
        "train.dtype_policy = 'mixed_bfloat16'",
        'train.seed = 1',
        'resnet.Resnet.pooling_cls = @keras.layers.AvgPool2D',  # An alias.
    ):
        other = first_loss(prepared(binding, gin_config=[config]))
        assert np.isfinite(other)
        assert abs(other - plain) > 1e-6 * plain, binding


def test_class_weights_reach_the_loss(run):
    """In an epoch without steps the loss is that of the model at its end."""
    weights = f'small_data.images.class_weights = {(3.0, 0.5)}'
    workdir = run(weights, f'{SGD}.learning_rate = 0.0', epochs=1)
    x, y = take(small_data.images().train(), small_data.EPOCH)
    losses = -np.log(np.sum(y * model_of(workdir, 1).predict(x, verbose=0), 1))
    expected = np.mean(losses * np.array([3.0, 0.5])[y.argmax(1)])
    assert history_of(workdir)[0]['loss'] == pytest.approx(expected, rel=1e-5)


def test_weight_decay_does_not_reach_strides(config):
    """A step without a gradient takes a tenth of all other weights."""
    model = prepared(
        'train.optimizer_cls = @optimizers.LossScaleOptimizer',
        'optimizers.LossScaleOptimizer.inner_optimizer = @optimizers.AdamW()',
        'optimizers.AdamW.learning_rate = 1e-6',
        'optimizers.AdamW.weight_decay = 1e5',
        gin_config=[config],
    ).model
    variables = model.trainable_variables
    before = [ops.convert_to_numpy(x) for x in variables]
    model.optimizer.apply([ops.zeros_like(x) for x in variables], variables)
    (layer,) = diffstride_layers(model)
    assert len(variables) > 4
    for x, values in zip(variables, before):
        expected = values if x is layer.strides else 0.9 * values
        np.testing.assert_allclose(x, expected, rtol=1e-5)


@pytest.mark.parametrize('steps, epochs, warmup', [(4, 5, 1.5), (7, 2, 0)])
def test_a_schedule_in_epochs(steps, epochs, warmup):
    with schedules.training_of(steps, epochs):
        schedule = schedules.warmup_cosine(0.2, warmup, final=0.01)
    first, last = round(warmup * steps), steps * epochs
    for step in range(last + 3):
        share = min(1, (step - first) / (last - first))
        expected = 0.01 + 0.19 * (1 + np.cos(np.pi * share)) / 2
        if step < first:
            expected = 0.2 * step / first
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    'arguments', [(0.0,), (-1.0,), (0.1, -1), (0.1, 2), (0.1, 1, -0.1), ('x',)]
)
def test_a_schedule_is_checked(arguments):
    with schedules.training_of(4, 2), pytest.raises(ValueError, match=' must '):
        schedules.warmup_cosine(*arguments)
    with pytest.raises(ValueError, match='must be made by train'):
        schedules.warmup_cosine(0.1)


@pytest.mark.slow
def test_two_replicas_train_as_one_device_does():
    """Two logical CPUs, in a process of their own, on the same batches."""
    code = """
import numpy as np, keras, tensorflow as tf
cpu = tf.config.list_physical_devices('CPU')[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from diffstride import DiffStride
from diffstride.examples import devices
weights = []
for distribution, replicas in ('none', 1), ('mirrored', 2):
    keras.utils.set_random_seed(0)
    with devices.scope(distribution):
        assert tf.distribute.get_strategy().num_replicas_in_sync == replicas
        # Without batch normalization, whose batch is that of a replica.
        model = keras.Sequential([
            keras.Input((8, 8, 1)), DiffStride(2.0, 1.0),
            keras.layers.Conv2D(2, 3, activation='relu'),
            keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), 'mse')
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
    y = np.eye(2)[np.arange(16) % 2]
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    weights.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
assert weights[0][:2].tolist() != [2, 2]  # The strides.
np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-6)
"""
    output_of('-c', code)


@pytest.mark.slow
@pytest.mark.parametrize(
    'backend, jit_compile',
    [
        ('tensorflow', 'True'),
        ('jax', 'True'),
        ('jax', "'auto'"),
        ('torch', "'auto'"),  # It needs a compiler of C++ for True.
    ],
)
def test_backends_train_and_continue(backend, jit_compile, config, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f'{backend} is not installed')
    workdir = tmp_path / 'run'
    commands = [
        small_runs.command(
            f'train.num_epochs = {epochs}',
            f'{SGD}.learning_rate = 5.0',
            'resnet.Resnet.filters = [2]',
            "resnet.Resnet.strides = '3'",
            f'train.jit_compile = {jit_compile}',
            workdir=workdir,
            gin_config=[config],
        )
        for epochs in (1, 2)
    ]
    if backend == 'tensorflow':
        for each in commands:
            small_runs.run_flags(each)  # A warning would be an error.
    else:
        output = small_runs.run_apart_in_turn(commands, KERAS_BACKEND=backend)
        assert 'Epochs 2 to 2' in output
    before = read(workdir / 'checkpoints/epoch_0001/state.json')['history']
    results = read(workdir / 'results.json')
    assert results['history'][:1] == before and results['epochs'] == 2
    assert results['versions']['backend'] == backend
    assert results['steps'] == 8
    (layer,) = results['layers'].values()
    assert layer['strides'] != [3.0, 3.0]


def test_imports_of_the_2022_release_are_understood():
    for name in 'examples.data', 'examples.train', 'resnet', 'pooling':
        gin.parse_config(f'import diffstride.{name} as {name.split(".")[-1]}')


@pytest.mark.parametrize('path', sorted(GIN_FILES), ids=lambda path: path.name)
def test_every_gin_file_is_understood(path):
    settings.parse([str(path)], [])
    if 'grid.variants' in path.read_text():
        variants = gin.query_parameter('grid.variants')
        with gin.unlock_config():
            for bindings in variants.values():
                gin.parse_config(bindings)
