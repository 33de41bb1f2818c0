"""The state of learned strides: which strides hold, and which sizes.

Sizes travel with the weights: whatever restores weights restores them.
"""

import keras
import numpy as np
import pytest
import reference
from backends import array, error_of, gradients, image, only, sequential, traced
from keras import ops

from diffstride import DiffStride, DiffStride1D
from diffstride.pooling import FixedSpectralPooling, SpatialPooling

# The state as numbers after a change: the strides, those of the sizes, and if
# they are held.
AFTER = {
    'release': lambda s, sizes, held: (s, None, False),
    'make_sizes_static': lambda s, sizes, held: (s, s, held),
    'hold': lambda s, sizes, held: (s, s, True),
    'assign': lambda s, sizes, held: (3.3 if s == 2.0 else 2.0, sizes, held),
    # Strides that are learned are in the weights alone.
    'from_config': lambda s, sizes, held: (s if sizes else 2.0, sizes, held),
    'copy': lambda *state: state,
}
START = (2.0, None, False)
STATES = [*AFTER][:3]


def output_of(state, x):
    strides, size_strides, _ = state
    size = reference.diffstride_size(
        x.shape[1], size_strides or strides, 2.0, 'outside'
    )
    return reference.diffstride(x, (strides,), 2.0, sizes=(size,))


def changed(layer, state, change):
    """Returns the layer and its state after a change, if it is allowed."""
    if state[2] and change in ('assign', 'make_sizes_static'):
        with pytest.raises(ValueError, match=r'`release\(\)`.*held=True'):
            changed_by(layer, change)
        return layer, state
    return changed_by(layer, change), AFTER[change](*state)


def changed_by(layer, change):
    if change in STATES:
        getattr(layer, change)()
    elif change == 'assign':
        layer.strides = 3.3 if layer.stride_values[0] < 3 else 2.0
    else:
        weights = layer.get_weights()
        layer = type(layer).from_config(layer.get_config())
        if change == 'copy':
            layer.set_weights(weights)
    return layer


def test_every_change_of_every_state_works_or_is_refused():
    x, seen, ways = image((24,), batch=1), [], [()]
    for way in ways:  # They become more.
        layer, state = DiffStride1D(2.0, 2.0), START
        for change in way:
            layer, state = changed(layer, state, change)
        strides, size_strides, held = state
        expected = output_of(state, x)
        assert layer.held == held
        assert layer.state.has_static_sizes == (size_strides is not None)
        assert layer.stride_values == pytest.approx((strides,))
        assert layer.output_size(24) == expected.shape[1]
        symbolic = expected.shape[1] if size_strides else None
        assert layer.compute_output_shape(x.shape)[1] == symbolic
        assert error_of(layer(x), expected) <= 2e-5
        if state not in seen:
            seen.append(state)
            ways += [(*way, change) for change in AFTER]
    assert len(seen) == 8


def test_compiled_functions_follow_every_change(tmp_path):
    """A model predicts by the present state, also one that is restored."""
    x = image((24,))
    layer, state = DiffStride1D(2.0, 2.0, method='matmul'), START
    model = sequential((24, 2), layer)
    stored = []
    # Each of the first four follows each, in a static state if it can. The
    # graph of held strides, which is the first one, is good for no others.
    for index in map(int, '2201001133230312102'):
        layer, state = changed(layer, state, [*AFTER][index])
        y = output_of(state, x)
        assert error_of(model.predict(x, verbose=0), y) <= 2e-5
        path = tmp_path / f'{len(stored)}.weights.h5'
        model.save_weights(path)
        stored.append((model.set_weights, model.get_weights(), y))
        stored.append((model.load_weights, path, y))
    for restore, values, y in stored[::3]:
        restore(values)
        assert error_of(model.predict(x, verbose=0), y) <= 2e-5


def test_compiled_masks_follow_a_release():
    x = image((24,))
    layer = DiffStride1D(2.0, 2.0, cropping=False)
    layer.hold()
    model = sequential((24, 2), layer)
    for change in layer.release, lambda: layer.strides.assign([3.3]):
        model.predict(x, verbose=0)
        change()
    assert error_of(model.predict(x, verbose=0), layer(x)) <= 2e-5


@only('tensorflow', 'XLA is optional there')
@pytest.mark.parametrize('size', [24, None])
def test_xla_follows_every_change_of_static_sizes(size):
    import tensorflow as tf

    x = image((24,))
    batches = tf.data.Dataset.from_generator(
        lambda: [x], output_signature=tf.TensorSpec((len(x), size, 2))
    ).repeat()
    layer = DiffStride1D(2.0, 2.0)
    layer.make_sizes_static()
    model = sequential((size, 2), layer)
    model.compile(jit_compile=True)
    first = model.get_weights()
    for change in (
        lambda: None,
        lambda: (layer.strides.assign([3.3]), layer.make_sizes_static()),
        layer.hold,
        lambda: model.set_weights(first),
    ):
        change()
        outputs = model.predict(batches, steps=1, verbose=0)
        assert error_of(outputs, layer(x)) <= 2e-5
    layer.release()
    with pytest.raises(ValueError, match='must be static for XLA'):
        model.predict(batches, steps=1, verbose=0)


@pytest.mark.parametrize(
    'values, limits, expected',
    [
        ((-0.3, 0.2), {}, (1.0, 1.0)),
        ((0.2, 2.0), {'lower_limit_stride': 1.5}, (1.5, 2.0)),
        ((100.0, 2.0), {'upper_limit_stride': 3.0}, (3.0, 2.0)),
    ],
)
def test_strides_are_used_within_limits(values, limits, expected):
    layer = DiffStride(2.0, 1.0, **limits)
    layer.strides.assign(values)
    x = image((16, 12))
    y = reference.diffstride(x, expected, 1.0)
    for change in (*STATES, 'hold'):
        getattr(layer, change)()
        for pool in (layer, changed_by(layer, 'copy')):
            np.testing.assert_allclose(pool.stride_values, expected, rtol=1e-6)
            assert error_of(pool(x), y) <= 2e-5


@only('torch', 'its own optimizer')
def test_a_loop_of_pytorch_leaves_a_usable_layer():
    import torch

    pool, x = DiffStride(2.0, 2.0), image((16, 16))
    optimizer = torch.optim.SGD(pool.parameters(), lr=100.0)
    (-ops.mean(pool(x) ** 2)).backward()
    optimizer.step()
    assert np.all(array(pool.strides) < 1)
    assert error_of(pool(x), reference.diffstride(x, (1, 1), 2.0)) <= 2e-5


def test_a_stateless_call_uses_the_state_that_it_is_given():
    pool, x = DiffStride(4.0, 2.0), image((16, 16))
    pool(x)
    pool.hold()
    weights = [ops.convert_to_tensor([-0.3, 2.0])]
    y, _ = pool.stateless_call(weights, [ops.zeros(3)], x)
    assert error_of(y, reference.diffstride(x, (1, 2), 2.0)) <= 2e-5
    y, _ = pool.stateless_call(weights, [ops.array([1.0, 3, 3])], x)
    assert error_of(y, reference.diffstride(x, (3, 3), 2.0)) <= 2e-5


def test_bad_numbers_are_not_assigned():
    layer = DiffStride(2.0, shared_stride=True, upper_limit_stride=3.0)
    for values, rule in [
        ((3.0, 0.5), 'be a number or a sequence of 2'),
        ((3.0, 2.0), 'be equal on all axes'),
        (3.5, 'lie between'),
    ]:
        with pytest.raises(ValueError, match=f'`strides` must {rule}'):
            layer.strides = values
        assert layer.stride_values == (2.0, 2.0)


def test_a_forward_pass_writes_to_no_variable():
    layer = DiffStride(4.0)
    layer.strides.assign([0.25, 50])
    model = sequential((None, None, 2), layer)
    before = [array(weight).tobytes() for weight in model.weights]
    x = ops.array(image((32, 33)))
    expected = model(x, training=False)
    for function in (model, traced(model)):
        assert error_of(function(x, training=True), expected) <= 1e-5
    assert [array(weight).tobytes() for weight in model.weights] == before


def fit_energy(pool, epochs=10):
    """Trains strides to keep all of the energy; returns the losses."""
    inputs = keras.Input((32, 1))
    model = keras.Model(inputs, ops.mean(ops.square(pool(inputs)), axis=1))
    x = image((32,), batch=16, channels=1)
    model.compile(keras.optimizers.SGD(4.0), 'mse')
    y = np.mean(x**2, axis=1)
    history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0)
    return history.history['loss']


def test_strides_and_sizes_move_and_the_loss_falls():
    """On TensorFlow a function of the model is traced once for all sizes."""
    pool = DiffStride1D(4.0, 2.0)
    x = image((32,), channels=1)
    model = sequential((32, 1), pool)
    before = model.predict(x, verbose=0)
    function = model.predict_function
    losses = fit_energy(pool)
    after = model.predict(x, verbose=0)
    assert losses[-1] < 0.8 * losses[0]
    assert pool.stride_values < (3.5,)
    assert before.shape[1] < after.shape[1] == pool(x).shape[1]
    pool.strides = 8.0
    assert model.predict(x, verbose=0).shape[1] < before.shape[1]
    if keras.backend.backend() == 'tensorflow':
        assert model.predict_function is function


@only('tensorflow', 'elsewhere every layer can be compiled')
def test_layers_tell_whether_xla_can_compile_them():
    pool = DiffStride(3.0)
    for state in (*STATES, 'release'):
        getattr(pool, state)()
        assert pool.supports_jit == (state != 'release')
    assert DiffStride(3.0, cropping=False).supports_jit
    assert FixedSpectralPooling(3.0).supports_jit
    assert SpatialPooling().supports_jit
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model = sequential((32, 32, 1), pool)
        model.compile('sgd', 'mse', jit_compile=True)
    assert model.jit_compile is False
    model.compile('sgd', 'mse')  # Without a warning.


def test_held_strides_stay_while_other_weights_learn():
    """The optimizer moves the variable, which has no effect."""
    pool = DiffStride1D(3.0, 2.0)
    model = sequential((32, 2), keras.layers.Conv1D(2, 3), pool)
    pool.hold()
    x = image((32,))
    y = 3 * array(pool(x[:, :30]))
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.1), 'mse')
    losses = model.fit(x, y, epochs=5, verbose=0).history['loss']
    assert losses[-1] < losses[0]
    assert np.all(array(pool.strides) != 3)  # The weight decays.
    assert pool.stride_values == (3.0,)
    assert error_of(pool(x), reference.diffstride(x, (3,), 2.0)) <= 2e-5
    gradient = gradients(lambda x: ops.sum(pool(x)), [x], [pool.strides])[1]
    assert array(gradient) == 0
    pool.release()
    assert pool.stride_values == (3.0,)


def test_a_layer_is_trained_in_a_scope_that_saves_memory():
    expected = DiffStride1D(3.0, 2.0)
    expected_losses = fit_energy(expected, epochs=2)
    assert expected.stride_values < (3.0,)
    with keras.RematScope(mode='full'):
        pool = DiffStride1D(3.0, 2.0)
    losses = fit_energy(pool, epochs=2)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert pool.stride_values == pytest.approx(expected.stride_values)


def network(pool):
    """Returns a model that must know its sizes if they are static."""
    head = keras.layers.GlobalMaxPooling2D()
    if pool.state.has_static_sizes:
        head = keras.layers.Flatten()
    return sequential((12, 17, 2), pool, head, keras.layers.Dense(3))


@pytest.mark.parametrize(
    'state, arguments',
    [
        ('release', {'lower_limit_stride': 1.5, 'ramp': 'inside'}),
        ('make_sizes_static', {'shared_stride': True}),
        ('make_sizes_static', {'strides_regularizer': 'l1'}),
        ('hold', {}),
        ('hold', {'ramp': 'straight_through'}),
    ],
)
def test_copies_of_a_model_are_alike(state, arguments, tmp_path):
    """Strides have moved since the sizes were made static."""
    pool = DiffStride(2.5, name='pool', **arguments)
    getattr(pool, state)()
    model = network(pool)
    for weight in model.trainable_weights:
        weight.assign(weight + 0.1)
    x = image((12, 17))
    model.save(tmp_path / 'model.keras')
    model.save_weights(tmp_path / 'model.weights.h5')
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    other = network(DiffStride.from_config(pool.get_config()))
    other.load_weights(tmp_path / 'model.weights.h5')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    for copy in (loaded, clone, other):
        assert np.array_equal(array(copy(x)), array(model(x)))
        copied = copy.get_layer('pool')
        assert copied is not pool
        assert copied.get_config() == pool.get_config()
        assert copied.stride_values == pool.stride_values
        assert copied.supports_jit == pool.supports_jit
