"""What the logs receive, sizes that follow by epochs, strides in a budget."""

import glob

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    EAGER,
    central_differences,
    error_of,
    only,
    random,
    refusals,
    sequential,
)
from keras import layers, ops

from diffstride import complexity, diffstride_layers, replace_strides
from diffstride.callbacks import StrideBudget, StrideLogger, UpdateSizes
from diffstride.pooling import DiffStride, DiffStride1D, DiffStride3D


def small_model(**kwargs):
    first = DiffStride((2.0, 1.5), 1.0, name='first', **kwargs)
    second = DiffStride(2.0, 1.0, shared_stride=True, name='second', **kwargs)
    # Without the last ReLU the mean would not depend on strides.
    head = layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(3)
    model = sequential((16, 12, 3), first, layers.ReLU(), second, *head)
    model.compile(keras.optimizers.SGD(0.3, 0.9), 'mse', run_eagerly=EAGER)
    return model


def data():
    return random(8, 16, 12, 3), random(8, 3)


def logs_of(model, **kwargs):
    """Returns what a StrideLogger adds to the logs of an epoch."""
    logger, logs = StrideLogger(**kwargs), {}
    logger.set_model(model)
    logger.on_epoch_end(5, logs)
    logger.on_train_end()
    return logs


AXES = {
    DiffStride1D: ['time'],
    DiffStride: ['height', 'width'],
    DiffStride3D: ['depth', 'height', 'width'],
}


@pytest.mark.parametrize('cls', AXES)
def test_stride_logger_logs_each_stride_and_size_and_the_macs(cls, tmp_path):
    strides, sizes = [2.5, 2.0, 1.5][: cls.rank], [(8, 6), (8, 6), (10, 8)]
    first = cls(strides, 1.0, name='first')
    second = cls(2.0, 1.0, shared_stride=True, name='second')
    image, vector = keras.Input((*[12] * cls.rank, 1)), keras.Input((4,))
    outputs = [second(first(image)), layers.ReLU()(vector)]
    model = keras.Model([image, vector], outputs)
    has_images = BACKEND == 'tensorflow'
    logs = logs_of(model, log_dir=tmp_path if has_images else None)
    expected = {'macs': complexity(model).macs}
    for axis, stride, (size, smaller) in zip(AXES[cls], strides, sizes):
        expected[f'stride/first/{axis}'] = stride
        expected[f'stride/second/{axis}'] = 2.0
        expected[f'size/first/{axis}'] = size
        expected[f'size/second/{axis}'] = smaller
    assert logs == expected
    assert has_images == bool(glob.glob(str(tmp_path / 'masks' / '*')))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.pool = DiffStride(2.0, name='pool')
        self(np.ones((2, 8, 8, 1)))

    def call(self, x):
        return self.pool(x)


def test_stride_logger_without_known_sizes_logs_strides_alone():
    unsized = sequential((None, None, 1), DiffStride(2.0, name='pool'))
    for model in (Subclassed(), unsized):
        assert [*logs_of(model)] == ['stride/pool/height', 'stride/pool/width']


def test_masks_are_images_for_tensorboard(tmp_path):
    tf = pytest.importorskip('tensorflow', reason='It writes the images')
    model = small_model()
    logs_of(model, log_dir=tmp_path)
    (path,) = glob.glob(f'{tmp_path}/masks/*')
    images = [
        (event.step, value.tag, value.tensor.string_val)
        for event in tf.compat.v1.train.summary_iterator(path)
        for value in event.summary.value
    ]
    tags_by_step = [(step, tag) for step, tag, _ in images]
    assert tags_by_step == [(5, 'mask/first'), (5, 'mask/second')]
    width, height, png = images[0][2]
    assert (int(width), int(height)) == (12, 16)
    pixels = tf.io.decode_png(png).numpy()[..., 0] / 255
    mask = model.get_layer('first').mask((16, 12))
    np.testing.assert_allclose(pixels, mask, atol=1 / 255)


def test_static_sizes_follow_by_epochs():
    pool = DiffStride1D(2.0, ramp='inside', method='matmul')
    pool.make_sizes_static()
    model = sequential((16, 3), pool, layers.GlobalAveragePooling1D())
    compiles = keras.backend.backend() != 'torch'
    model.compile(keras.optimizers.SGD(1e-6), 'mse', jit_compile=compiles)
    sizes = []

    def note_and_assign(epoch, logs):
        sizes.append(pool.output_size(16))
        pool.strides.assign([(3.0, 1.2)[epoch]])

    by_epoch = keras.callbacks.LambdaCallback(on_epoch_end=note_and_assign)
    x, y = np.zeros((4, 16, 3), 'float32'), np.zeros((4, 3))
    pool.strides.assign([1.0])
    model.fit(x, y, epochs=2, verbose=0, callbacks=[by_epoch, UpdateSizes()])
    # An epoch has the sizes of 1 and 3. The last ones stay.
    assert [*sizes, pool.output_size(16)] == [16, 6, 6]
    x = random(*x.shape)
    assert error_of(model.predict(x, verbose=0), model(x)) <= 1e-5


TARGET = np.float32([[1.2, 2.0], [1.5, 1.1]])
SCALE = np.float32([[1.0, 2.0], [0.5, 3.0]])
CHANNELS = 2
STARTS = [((4, 1), (2, 2)), ((1, 1), (1, 1)), ((5, 5), (5, 5))]
BEST = [2.725, 2.371, 2.061, 1.209]


class AddedLoss(layers.Layer):
    """Adds a function of the inputs and of all strides to the loss."""

    def __init__(self, function, pools):
        super().__init__()
        self.function, self.pools = function, pools

    def call(self, inputs):
        strides = [pool.state.strides_tensor() for pool in self.pools]
        self.add_loss(self.function(inputs, ops.stack(strides)))
        return inputs


def quadratic(inputs, strides):
    distance = ops.square(ops.subtract(strides, TARGET))
    return ops.sum(ops.multiply(distance, SCALE)) / 2


def quadratic_model(optimizer, function=quadratic):
    kwargs = {'ramp': 'straight_through', 'method': 'matmul'}
    pools = [DiffStride(strides, 1.0, **kwargs) for strides in STARTS[0]]
    conv = layers.Conv2D(CHANNELS, 3, padding='same', trainable=False)
    head = conv, layers.GlobalAveragePooling2D(), AddedLoss(function, pools)
    model = sequential((32, 32, 1), *pools, *head)
    model.compile(optimizer, lambda y, p: 0 * ops.sum(p, -1))
    return model


def smooth_macs(a, b, c, d):
    h, w = 32 / a, 32 / b
    i, j = h / c, w / d
    pools = 32 * 32 * h + 32 * h * w + h * w * i + w * i * j
    return pools + i * j * 9 * CHANNELS


def assert_best(strides, atol):
    """Checks that no exchange of MACs lowers the loss: Lagrange's condition."""
    slopes = central_differences(lambda x: smooth_macs(*x), strides)
    slopes /= np.linalg.norm(slopes)
    pull = SCALE.ravel() * (strides - TARGET.ravel())
    np.testing.assert_allclose(pull, slopes * (pull @ slopes), atol=atol)
    assert smooth_macs(*strides) == pytest.approx(2e4, rel=1e-4)


def rest(model, start, steps, spread=0.0):
    """Returns where strides come to rest in a training from a start."""
    pools = diffstride_layers(model)
    for layer, strides in zip(pools, start):
        layer.release()
        layer.strides = strides
    x, y = np.zeros((steps, 32, 32, 1)), np.zeros((steps, CHANNELS))
    budget = StrideBudget(macs=2e4, learn=1.0, spread=spread)
    logs = model.fit(x, y, batch_size=1, verbose=0, callbacks=[budget]).history
    assert all(x.held for x in pools)
    assert 1.9e4 < complexity(model, (32, 32, 1)).macs <= 2e4
    return np.ravel([logs[key] for key in logs if key.startswith('stride/')])


def test_learned_strides_are_the_best_ones_of_the_budget():
    model = quadratic_model(keras.optimizers.SGD(0.1))
    found = [rest(model, start, 120) for start in STARTS]
    np.testing.assert_allclose(found, [BEST] * len(found), atol=1e-2)
    assert_best(found[0], atol=3e-2)
    # Steps of Adam are not along the gradient, so neither is the way back.
    rate = keras.optimizers.schedules.CosineDecay(0.05, 150)
    model = quadratic_model(keras.optimizers.Adam(rate))
    assert_best(rest(model, STARTS[0], 150), atol=5e-2)


@pytest.mark.skipif(BACKEND == 'jax', reason='Its sizes are constants')
def test_strides_that_are_drawn_leave_a_poor_start():
    def with_a_dip(inputs, strides):
        """The gradient inside the dip leads back to its middle, the start."""
        distance = ops.log(ops.divide(strides, np.float32(STARTS[0])))
        depth = ops.exp(-10 * ops.sum(ops.square(distance)))
        return quadratic(inputs, strides) - 4 * depth

    model = quadratic_model(keras.optimizers.SGD(0.1), with_a_dip)
    stuck, found = (rest(model, STARTS[0], 80, x) for x in (0.0, 0.8))
    np.testing.assert_allclose(stuck, np.ravel(STARTS[0]), rtol=0.3)
    np.testing.assert_allclose(found, BEST, rtol=0.2)


@pytest.mark.parametrize(
    'optimizer',
    [
        lambda: keras.optimizers.SGD(1e-4, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.RMSprop(1e-4, momentum=0.9),
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(1e-4), initial_scale=2.0
        ),
    ],
    ids=['nesterov', 'rmsprop', 'adam'],
)
def test_each_batch_has_one_vote_on_the_strides(optimizer):
    """Two votes against one, however large the one is."""
    pool = DiffStride(2.0, 1.0, ramp='straight_through', method='matmul')
    ones = {'kernel_initializer': 'ones', 'trainable': False}
    first, last = (layers.Conv2D(4, 3, padding='same', **ones) for _ in 'ab')
    slope = AddedLoss(lambda x, strides: ops.mean(x) * strides[0, 0], [pool])
    model = sequential((32, 32, 1), first, pool, slope, last)
    model.compile(optimizer(), lambda y, p: 0 * ops.sum(p, (1, 2, 3)))
    x = np.ones((42, 32, 32, 1)) * np.reshape([1, 1, -100] * 14, (-1, 1, 1, 1))
    callbacks = [StrideBudget(share=1.0, learn=1.0)]
    kwargs = {'batch_size': 1, 'shuffle': False, 'verbose': 0}
    model.fit(x, np.zeros(42), callbacks=callbacks, **kwargs)
    # The start is square, and the gradient is along the height alone. Were all
    # agreed, the width would be e^2.6 times the height.
    height, width = pool.stride_values
    assert 1.2 < np.log(width / height) < 1.6


@only('tensorflow', 'the number of batches of other data is known')
@pytest.mark.filterwarnings('ignore:Your input ran out of data')
def test_the_first_epoch_counts_batches_of_unknown_number():
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices(data()).batch(2)
    batches = batches.filter(lambda x, y: True)
    model = small_model(ramp='inside')
    kwargs = {'epochs': 3, 'shuffle': False, 'verbose': 0}
    with pytest.raises(ValueError, match='`learn` must be more than one epoch'):
        callbacks = [StrideBudget(share=0.5, learn=1)]
        model.fit(batches, callbacks=callbacks, **kwargs)
    callbacks = [StrideBudget(share=0.5, learn=2)]
    logs = model.fit(batches, callbacks=callbacks, **kwargs).history
    assert logs['strides_held'] == [0, 0, 1]
    first, second, _ = logs['stride/first/height']
    assert first != second


@pytest.mark.parametrize('jit', [False, True])
def test_strides_are_learned_then_held_within_the_budget(jit, capsys):
    if jit and BACKEND == 'torch':
        pytest.skip('PyTorch does not compile the layer')
    model = small_model(ramp='inside', method='matmul' if jit else 'auto')
    if jit:
        for layer in diffstride_layers(model):
            layer.make_sizes_static()
        model.compile(keras.optimizers.SGD(0.3), 'mse', jit_compile=True)
    budget = 0.6 * complexity(model, (16, 12, 3)).macs
    callbacks = [StrideBudget(share=0.6)]
    logs = model.fit(
        *data(), epochs=4, batch_size=2, verbose=2, callbacks=callbacks
    ).history
    assert logs['strides_held'] == [0, 0, 1, 1]
    for key, values in logs.items():
        if key.startswith(('stride/', 'size/')):
            assert values[2] == values[3]
        if key.startswith('stride/'):
            assert values[0] != values[1]
    assert len(set(logs['loss'])) == 4  # The weights go on learning.
    macs = complexity(model, (16, 12, 3)).macs
    assert 0.8 * budget < macs == logs['macs'][-1] <= budget
    text = capsys.readouterr().out
    assert text.count('Strides are held at first [') == 1
    assert f'{macs:,} of {budget:,.0f} MACs' in text
    x, _ = data()
    assert error_of(model.predict(x, verbose=0), model(x)) <= 1e-5


def test_weights_restored_from_the_first_phase_are_held_within_the_budget():
    model = small_model(ramp='inside')
    budget = 0.6 * complexity(model, (16, 12, 3)).macs
    early = keras.callbacks.EarlyStopping(
        'loss', mode='max', patience=2, restore_best_weights=True
    )
    callbacks = [early, StrideBudget(share=0.6, learn=2)]
    model.fit(*data(), epochs=9, verbose=0, callbacks=callbacks)
    assert early.best_epoch == 0
    assert all(layer.held for layer in diffstride_layers(model))
    assert 0.8 * budget < complexity(model, (16, 12, 3)).macs <= budget


def test_a_training_that_was_interrupted_goes_on_alike(tmp_path):
    """From the end of each epoch: while strides are learned, and held."""
    spread = 0.0 if BACKEND == 'jax' else 0.5  # Its sizes are constants.
    path = str(tmp_path / '{epoch}.keras')
    kwargs = {'batch_size': 4, 'epochs': 4, 'shuffle': False, 'verbose': 0}

    def fit(model, first):
        budget = StrideBudget(share=0.6, spread=spread)
        callbacks = [budget, keras.callbacks.ModelCheckpoint(path)]
        model.fit(*data(), initial_epoch=first, callbacks=callbacks, **kwargs)
        return [*map(np.array, model.get_weights())]

    expected = fit(small_model(ramp='inside'), 0)
    for epoch in (1, 2, 3):
        saved = keras.models.load_model(tmp_path / f'{epoch}.keras')
        saved.run_eagerly = EAGER
        for first, second in zip(expected, fit(saved, epoch)):
            np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == 'jax', reason='JAX compiles for a minute')
def test_mobilenet_within_a_budget():
    shape = (32, 32, 3)  # The last maps have one pixel.
    net = keras.applications.MobileNetV2(shape, 0.35, weights=None, classes=2)
    model = replace_strides(net, smoothness_factor=1.0)
    before = complexity(model, shape).macs
    model.compile('adam', 'sparse_categorical_crossentropy', run_eagerly=EAGER)
    x = random(2, *shape)
    budget = StrideBudget(share=0.65)
    model.fit(x, np.array([0, 1]), verbose=0, callbacks=[budget])
    macs = complexity(model, shape).macs
    assert 0.6 * before < macs <= 0.65 * before


def begin(model, jit_compile=False, **kwargs):
    model.jit_compile = jit_compile
    callback = StrideBudget(**kwargs)
    callback.set_model(model)
    callback.on_train_begin()


test_wrong_arguments = refusals(
    (lambda: StrideLogger(input_shape=(32.5, 32)), '`input_shape` must be'),
    (lambda: StrideLogger(log_dir=3), '`log_dir` must be the path'),
    (lambda: StrideLogger().set_model(
        keras.Sequential([keras.Sequential([DiffStride(name='a')])] * 2
                         + [DiffStride(name='a')])),
     "must differ in `name` to be logged.*'a', 'a'"),
    (lambda: StrideBudget(), 'Either `macs` or `share` must be given'),
    (lambda: StrideBudget(-1), '`macs` must be a finite number, above 0'),
    (lambda: StrideBudget(1e6, learn=0), '`learn` must be a share'),
    (lambda: StrideBudget(1e6, learn=1.5), '`learn` must be a share'),
    (lambda: StrideBudget(1e6, spread=-1), '`spread` must be'),
    # On TensorFlow XLA takes no layers that crop.
    (lambda: begin(
        small_model(cropping=False), jit_compile=True, share=0.6, spread=0.5),
     '`spread` must be 0 in a model that'),
    (lambda: begin(sequential((8, 8, 1), layers.ReLU()), macs=1.0),
     '`model` must have DiffStride layers'),
)  # fmt: skip
