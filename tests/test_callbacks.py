"""What the logs receive, images of masks, and strides that come to rest."""

import glob

import keras
import numpy as np
import pytest
from backends import BACKEND, only

from diffstride import (
    DiffStride,
    DiffStride1D,
    DiffStride3D,
    complexity,
    pooling,
)
from diffstride.callbacks import RepinStrides, SettleStrides, StrideLogger


def small_model(**kwargs):
    model = keras.Sequential(
        [
            keras.Input((16, 12, 3)),
            DiffStride((2.0, 1.5), 1.0, name='first', **kwargs),
            keras.layers.ReLU(),
            DiffStride(2.0, 1.0, shared_stride=True, name='second', **kwargs),
            keras.layers.ReLU(),  # After which the mean tells strides apart.
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0, momentum=0.9), 'mse')
    return model


def data(count=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 16, 12, 3)), rng.normal(size=(count, 3))


def test_stride_logger_logs_each_stride_and_size_and_the_macs(tmp_path):
    model = small_model()
    x, y = np.zeros((4, 16, 12, 3)), np.zeros((4, 3))
    csv = tmp_path / 'log.csv'
    logs = model.fit(
        x,
        y,
        verbose=0,
        callbacks=[StrideLogger(), keras.callbacks.CSVLogger(csv)],
    ).history
    expected = {
        'stride/first/height': 2.0,
        'stride/first/width': 1.5,
        'stride/second/height': 2.0,
        'stride/second/width': 2.0,
        'size/first/height': 10,
        'size/first/width': 10,
        'size/second/height': 8,
        'size/second/width': 8,
        'macs': complexity(model, (16, 12, 3)).macs,
    }
    assert {k: v[0] for k, v in logs.items() if k != 'loss'} == expected
    assert set(expected) < set(csv.read_text().split('\n')[0].split(','))


@pytest.mark.parametrize(
    'layer, axes',
    [
        (DiffStride1D((2.5,), 1.0, name='p'), ['time']),
        (
            DiffStride3D((1.5, 2, 3), 1.0, name='p'),
            ['depth', 'height', 'width'],
        ),
    ],
)
def test_stride_logger_names_the_axes_of_each_rank(layer, axes, tmp_path):
    shape = (*[12] * layer.rank, 1)
    model = keras.Sequential([keras.Input(shape), layer])
    has_images = BACKEND == 'tensorflow'
    logger = StrideLogger(log_dir=tmp_path if has_images else None)
    logger.set_model(model)
    logs = {}
    logger.on_epoch_end(0, logs)
    logger.on_train_end()
    sizes = complexity(model, shape).layers[0].output_shape[:-1]
    assert logs.pop('macs') == complexity(model, shape).macs
    assert logs == {
        **{f'stride/p/{a}': s for a, s in zip(axes, layer.stride_values)},
        **{f'size/p/{axis}': size for axis, size in zip(axes, sizes)},
    }
    assert has_images == bool(glob.glob(str(tmp_path / 'masks' / '*')))


def test_stride_logger_without_known_sizes_logs_strides_alone():
    model = keras.Sequential(
        [keras.Input((None, None, 1)), DiffStride(2.0, name='pool')]
    )
    model.compile('sgd', lambda y, p: keras.ops.sum(p, axis=(1, 2, 3)))
    x = np.ones((2, 8, 8, 1))
    logs = model.fit(x, x, verbose=0, callbacks=[StrideLogger()]).history
    assert set(logs) == {'loss', 'stride/pool/height', 'stride/pool/width'}


def test_stride_logger_of_several_inputs_and_of_a_subclass():
    inputs = [keras.Input((8, 8, 1)), keras.Input((4,))]
    pooled = DiffStride(2.0, 1.0, name='pool')(inputs[0])
    mean = keras.layers.GlobalAveragePooling2D()(pooled)
    functional = keras.Model(inputs, keras.layers.Add()([mean, inputs[1]]))
    x = [np.ones((2, 8, 8, 1)), np.ones((2, 4))]
    functional.compile('sgd', 'mse')
    logs = functional.fit(
        x, np.ones((2, 4)), verbose=0, callbacks=[StrideLogger()]
    ).history
    assert logs['size/pool/height'] == [6]
    assert logs['macs'] == [complexity(functional, [(8, 8, 1), (4,)]).macs]

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.pool = DiffStride(2.0, name='pool')

        def call(self, x):
            return self.pool(x)

    model = Subclassed()
    model.compile('sgd', lambda y, p: keras.ops.sum(p, axis=(1, 2, 3)))
    logs = model.fit(x[0], x[0], verbose=0, callbacks=[StrideLogger()]).history
    assert set(logs) == {'loss', 'stride/pool/height', 'stride/pool/width'}


def test_masks_are_images_for_tensorboard(tmp_path):
    tf = pytest.importorskip('tensorflow', reason='It writes the images')
    model = small_model()
    model.fit(
        *data(),
        epochs=2,
        verbose=0,
        callbacks=[StrideLogger(log_dir=tmp_path)],
    )
    (path,) = glob.glob(f'{tmp_path}/masks/*')
    images = [
        (event.step, value.tag, value.tensor.string_val)
        for event in tf.compat.v1.train.summary_iterator(path)
        for value in event.summary.value
    ]
    tags = ['mask/first', 'mask/second']
    assert [tag for _, tag, _ in images] == tags * 2
    assert [step for step, _, _ in images] == [0, 0, 1, 1]
    width, height, png = images[-2][2]
    assert (int(width), int(height)) == (12, 16)
    pixels = tf.io.decode_png(png).numpy()[..., 0] / 255
    np.testing.assert_allclose(
        pixels, model.get_layer('first').mask((16, 12)), atol=1 / 255
    )


def test_mask_is_the_product_of_both_responses():
    layer = DiffStride((2.0, 4.0), smoothness_factor=2.0)
    # b = 4 and 2; the ramps reach 2 further.
    np.testing.assert_allclose(
        layer.response(16, 0), [1, 1, 1, 1, 1, 0.5, 0, 0, 0]
    )
    np.testing.assert_allclose(
        layer.response(16, 1), [1, 1, 1, 0.5, 0, 0, 0, 0, 0]
    )
    mask = layer.mask((16, 16))
    assert mask[8, 8] == 1 and mask[8 - 5, 8 + 3] == 0.25
    np.testing.assert_array_equal(mask[1:], mask[1:][::-1])


def test_response_of_what_straight_through_keeps():
    layer = DiffStride(2.0, ramp='straight_through')
    np.testing.assert_array_equal(layer.response(8), [1, 1, 1, 0, 0])


@pytest.mark.parametrize(
    'optimizer_cls, arguments',
    [
        (keras.optimizers.SGD, {'learning_rate': 0.3, 'momentum': 0.9}),
        (keras.optimizers.AdamW, {'learning_rate': 0.1, 'weight_decay': 0.1}),
    ],
)
def test_strides_and_sizes_settle(optimizer_cls, arguments):
    model = small_model(ramp='inside')
    model = keras.Sequential([*model.layers, keras.layers.Dense(3)])
    model.compile(optimizer_cls(**arguments), 'mse')
    logs = model.fit(
        *data(),
        epochs=6,
        batch_size=4,
        verbose=0,
        callbacks=[SettleStrides(epoch=2), RepinStrides(), StrideLogger()],
    ).history
    for key, values in logs.items():
        if key.startswith('stride/'):
            assert values[0] != values[1]
        if key.startswith(('stride/', 'size/')):
            assert len(set(values[1:])) == 1
    assert len(set(logs['loss'])) == 6  # The weights go on learning.


def test_settled_strides_are_settled_when_loaded_and_until_unsettled(tmp_path):
    model = small_model(ramp='inside')
    model.fit(*data(), verbose=0, callbacks=[SettleStrides(epoch=0)])
    strides = [(2.0, 1.5), (2.0, 2.0)]
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    for each in (model, loaded, keras.models.clone_model(model)):
        found = pooling.diffstride_layers(each)
        assert [layer.settled for layer in found] == [True, True]
    loaded.fit(*data(), verbose=0)
    found = pooling.diffstride_layers(loaded)
    assert [layer.stride_values for layer in found] == strides
    for layer in found:
        layer.unsettle()
    loaded.compile(keras.optimizers.SGD(1.0), 'mse')
    loaded.fit(*data(), verbose=0)
    assert [layer.stride_values for layer in found] != strides


def test_loading_weights_of_before_unsettles(tmp_path):
    model = small_model()
    model.fit(*data(), verbose=0)
    model.save_weights(tmp_path / 'before.weights.h5')
    model.fit(*data(), verbose=0, callbacks=[SettleStrides(epoch=0)])
    model.load_weights(tmp_path / 'before.weights.h5')
    assert not any(x.settled for x in pooling.diffstride_layers(model))


def test_predictions_follow_strides_that_settle():
    model = small_model(ramp='inside')
    for layer in pooling.diffstride_layers(model):
        layer.pin()
    x, y = data()
    model.predict(x, verbose=0)
    model.fit(x, y, epochs=3, verbose=0, callbacks=[SettleStrides(epoch=2)])
    np.testing.assert_allclose(
        model.predict(x, verbose=0), model(x), rtol=1e-5, atol=1e-6
    )


def test_settling_at_once_keeps_the_initial_strides():
    model = small_model()
    model.fit(*data(), verbose=0, callbacks=[SettleStrides(epoch=0)])
    assert model.get_layer('first').stride_values == (2.0, 1.5)


# Sizes that are constants


class Traces(keras.layers.Layer):
    """Counts its calls, which are few where a function is compiled."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def call(self, x):
        self.count += 1
        return x


class Assigns(keras.callbacks.Callback):
    """Strides at the end of each epoch, instead of what was learned."""

    def __init__(self, layer, strides):
        super().__init__()
        self.layer, self.values = layer, strides

    def on_epoch_end(self, epoch, logs=None):
        self.layer.strides.assign([self.values[epoch]] * 2)


def compiled_model(nested, pin=True):
    """Whose sizes are constants, for which its inner model may be made."""
    pool = DiffStride(2.0, ramp='inside', name='pool')
    if pin:
        pool.pin()
    inputs = keras.Input((16, 16, 3))
    x = pool(inputs)
    traces = Traces()
    layers = [traces, keras.layers.Conv2D(2, 3, padding='same')]
    if nested == 'sequential':
        x = keras.Sequential(layers)(x)
    elif nested == 'functional':
        start = keras.Input(x.shape[1:])
        x = keras.Model(start, layers[1](layers[0](start)))(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, x)
    xla = BACKEND != 'torch'
    model.compile(keras.optimizers.SGD(1e-6), 'mse', jit_compile=xla)
    return model, pool, traces


@pytest.mark.parametrize('nested', ['sequential', 'functional'])
def test_pinned_sizes_follow_the_strides_by_epochs(nested):
    model, pool, traces = compiled_model(nested)
    # 16 / 2.1 and 16 / 2.2 are 8 samples, as 16 / 2 is; then 6 and 14.
    assigns = Assigns(pool, [2.1, 2.2, 3.0, 1.2])
    counts, sizes = [], []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (
            counts.append(traces.count),
            sizes.append(pool.compute_output_shape((1, 16, 16, 3))[1]),
        )
    )
    x = np.zeros((4, 16, 16, 3), 'float32')
    model.fit(
        x,
        np.zeros((4, 2)),
        epochs=4,
        verbose=0,
        callbacks=[assigns, RepinStrides(), note],
    )
    assert sizes == [8, 8, 6, 14]
    assert pool.pinned_strides == pool.stride_values
    if BACKEND != 'torch':
        assert counts[0] == counts[1] == counts[2] < counts[3]
    x = np.random.default_rng(0).normal(size=x.shape).astype('float32')
    np.testing.assert_allclose(
        model.predict(x, verbose=0), model(x), rtol=1e-4, atol=1e-5
    )


def test_training_begins_at_the_present_strides():
    model, pool, _ = compiled_model('sequential')
    x, y = np.zeros((4, 16, 16, 3), 'float32'), np.zeros((4, 2))
    model.predict(x, verbose=0)
    pool.strides.assign([4.0, 4.0])
    sizes = []
    model.fit(
        x,
        y,
        verbose=0,
        callbacks=[
            RepinStrides(),
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda *_: sizes.append(pool.pinned_strides)
            ),
        ],
    )
    assert sizes == [(4.0, 4.0)]


def test_repinning_leaves_sizes_that_follow_and_those_that_settled():
    model = small_model()
    for layer in pooling.diffstride_layers(model)[:1]:
        layer.settle()
    model.compile(keras.optimizers.SGD(0.1), 'mse', run_eagerly=True)
    model.fit(*data(), epochs=2, verbose=0, callbacks=[RepinStrides()])
    first, second = pooling.diffstride_layers(model)
    assert first.pinned_strides == (2.0, 1.5)
    assert second.pinned_strides is None
    assert second.stride_values != (2.0, 2.0)


@pytest.mark.parametrize('share, grows', [(1, True), (0, False)])
def test_maps_follow_what_is_learned_by_default_on_every_backend(share, grows):
    """`jit_compile='auto'` and the callback that does no harm elsewhere."""
    pool = DiffStride(3.0, 2.0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            pool,
            keras.layers.Activation(keras.ops.square),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.compile(keras.optimizers.Adam(0.1), 'mse')
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 1)).astype('float32')
    size = model.layers[0](x).shape[1]
    model.fit(
        x,
        share * np.mean(x**2, axis=(1, 2)),
        epochs=12,
        verbose=0,
        callbacks=[RepinStrides()],
    )
    after = keras.Model(model.inputs, model.layers[0].output)
    after = after.predict(x, verbose=0).shape[1]
    assert after > size if grows else after < size
    assert (pool.pinned_strides is not None) == (BACKEND == 'jax')


@pytest.fixture
def untold():
    pooling._told.clear()
    yield
    pooling._told.clear()


@only('jax', 'sizes are constants there unless one says otherwise')
def test_who_trains_constant_sizes_is_told_once(untold):
    def fit(pool, *callbacks, predict=False):
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), pool, keras.layers.Flatten()]
            if pool.pinned_strides
            else [
                keras.Input((8, 8, 1)),
                pool,
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
        model.compile('sgd', 'mse')
        x = np.zeros((2, 8, 8, 1), 'float32')
        y = model.predict(x, verbose=0)
        if not predict:
            model.fit(x, y, verbose=0, callbacks=list(callbacks))

    fit(DiffStride(2.0), predict=True)
    fit(DiffStride(2.0, trainable=False))
    fit(DiffStride(2.0, cropping=False))
    fit(DiffStride(2.0), RepinStrides())
    fit(DiffStride(2.0), SettleStrides(epoch=0))
    pinned = DiffStride(2.0)
    pinned.pin()
    fit(pinned)
    assert not pooling._told
    with pytest.warns(UserWarning, match='RepinStrides') as told:
        fit(DiffStride(2.0))
        fit(DiffStride(2.0))
    (text,) = [str(x.message) for x in told if 'RepinStrides' in str(x.message)]
    assert '\n' not in text


@pytest.mark.parametrize('epoch', [-1, 1.5, None, True])
def test_settling_at_no_epoch(epoch):
    with pytest.raises(ValueError, match='`epoch` must be an integer'):
        SettleStrides(epoch)


@pytest.mark.parametrize(
    'kwargs',
    [{'input_shape': (32.5, 32)}, {'input_shape': 'a'}, {'log_dir': 3}],
)
def test_wrong_arguments_of_the_stride_logger(kwargs):
    with pytest.raises(ValueError, match=f'`{next(iter(kwargs))}` must be'):
        StrideLogger(**kwargs)


def test_layers_of_one_name_are_refused_before_training():
    model = keras.Sequential(
        [
            keras.Sequential([DiffStride(2.0, name='pool')]),
            DiffStride(2.0, name='pool'),
        ]
    )
    model.compile('sgd', 'mse')
    x = np.zeros((1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"must differ in `name` .*'pool', 'p"):
        model.fit(x, model(x), callbacks=[StrideLogger()], verbose=0)
