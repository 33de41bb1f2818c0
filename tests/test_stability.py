"""What strides do when training goes wrong around them."""

import keras
import numpy as np
import pytest
from keras import ops

from diffstride import DiffStride

RAMPS = ('outside', 'inside', 'straight_through')


def meter(pool, shape=(16, 12, 2), **kwargs):
    """A model whose loss pulls the strides down, towards all of the image."""
    model = keras.Sequential(
        [
            keras.Input(shape),
            pool,
            keras.layers.Activation(ops.square),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    # Eagerly: there is less to wait for than in tracing.
    model.compile(loss='mse', run_eagerly=True, **kwargs)
    return model


def noise(shape, scale=1.0):
    return scale * np.random.default_rng(0).normal(size=shape)


def fit(model, x, **kwargs):
    return model.fit(
        x, np.ones((len(x), 2)), batch_size=len(x), verbose=0, **kwargs
    )


def strides_of(layer):
    return ops.convert_to_numpy(layer.strides)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('method', ['matmul', 'fft'])
@pytest.mark.parametrize('ramp', RAMPS)
def test_an_input_that_is_not_finite_does_not_move_strides(ramp, method, bad):
    pool = DiffStride(2.0, 2.0, ramp=ramp, method=method)
    x = noise((4, 16, 12, 2))
    x[1, 3, 4, 0] = bad
    fit(meter(pool, optimizer=keras.optimizers.Adam(0.1)), x)
    assert pool.stride_values == (2.0, 2.0)


def test_strides_go_on_after_an_input_that_was_not_finite():
    """The optimizer's averages of the gradient have not seen it."""
    pool = DiffStride(2.0, 2.0)
    model = meter(pool, optimizer=keras.optimizers.Adam(0.1))
    weights = model.layers[-1].get_weights()
    fit(model, np.full((4, 16, 12, 2), np.nan))
    model.layers[-1].set_weights(weights)
    fit(model, noise((4, 16, 12, 2)))
    assert np.all(np.isfinite(strides_of(pool)))
    assert np.all(strides_of(pool) != 2)


@pytest.mark.parametrize('method', ['matmul', 'fft'])
@pytest.mark.parametrize('ramp', RAMPS)
def test_strides_that_are_not_numbers_give_the_least_sizes(ramp, method):
    """It is told by the values, not by a crash; new strides mend the layer."""
    pool = DiffStride(2.0, 2.0, ramp=ramp, method=method)
    model = meter(pool)
    x = noise((2, 16, 12, 2))
    before = ops.convert_to_numpy(pool(x))
    pool.strides.assign([np.nan, 2.0])
    assert pool.present_size(0, 16) == 2
    pool.pin()
    pool.unpin()
    y = ops.convert_to_numpy(pool(x))
    assert y.shape == (2, 2, *before.shape[2:])
    if ramp != 'straight_through':  # There sizes alone depend on the stride.
        assert np.all(np.isnan(y))
    assert np.all(np.isnan(ops.convert_to_numpy(model(x)))) == (
        ramp != 'straight_through'
    )
    pool.strides.assign([2.0, 2.0])
    pool.pin()
    pool.unpin()
    np.testing.assert_allclose(ops.convert_to_numpy(pool(x)), before, atol=1e-6)


@pytest.mark.parametrize(
    'optimizer, scale',
    [
        (lambda: keras.optimizers.SGD(10.0), 1),
        (lambda: keras.optimizers.Adam(10.0), 1),
        (lambda: keras.optimizers.SGD(1.0), 1e4),
        (lambda: keras.optimizers.SGD(10.0, momentum=0.9, clipnorm=1), 1e4),
        (lambda: keras.optimizers.Adam(10.0, clipvalue=0.1), 1e4),
        (lambda: keras.optimizers.SGD(10.0, global_clipnorm=1.0), 1e4),
        (lambda: keras.optimizers.AdamW(0.1, weight_decay=1.0), 1),
    ],
)
@pytest.mark.parametrize('limits', [(None, None), (1.5, 4.0)])
def test_strides_stay_finite_and_within_their_limits(limits, optimizer, scale):
    lower, upper = limits
    pool = DiffStride(
        2.0, 2.0, lower_limit_stride=lower, upper_limit_stride=upper
    )
    # The weights behind it are left as they are: theirs is not in question.
    model = meter(pool, optimizer=optimizer())
    model.layers[-1].trainable = False
    model.compile(optimizer(), 'mse', run_eagerly=True)
    fit(model, noise((4, 16, 12, 2), scale), epochs=5)
    strides = strides_of(pool)
    assert np.all(np.isfinite(strides))
    assert np.all(strides >= (lower or 1))
    assert np.all(strides <= (upper or np.inf))
    y = ops.convert_to_numpy(pool(noise((1, 16, 12, 2))))
    assert np.all(np.isfinite(y)) and min(y.shape) >= 1


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_strides_stay_finite_under_loss_scaling(scale):
    """The scale falls where float16 overflows, and such steps are left out."""
    keras.config.set_dtype_policy('mixed_float16')
    pool = DiffStride(2.0, 2.0)
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-3), initial_scale=2.0**15
    )
    model = meter(pool, optimizer=optimizer)
    fit(model, noise((4, 16, 12, 2), scale), epochs=4)
    assert np.all(np.isfinite(strides_of(pool)))
    if scale == 1:
        assert np.all(strides_of(pool) != 2)


@pytest.mark.parametrize(
    'start, share, arguments',
    [
        (1.5, 1, {'lower_limit_stride': 1.5}),
        (1.0, 1, {'ramp': 'inside'}),
        (4.0, 0, {'upper_limit_stride': 4.0}),
        (4.0, 0, {'upper_limit_stride': 4.0, 'ramp': 'inside'}),
    ],
)
def test_a_stride_held_at_a_limit_for_100_steps_comes_back(
    start, share, arguments
):
    pool = DiffStride(start, 2.0, **arguments)
    x = noise((8, 16, 12, 1))
    energy = np.mean(x**2, axis=(1, 2))
    model = keras.Sequential(
        [
            keras.Input((16, 12, 1)),
            pool,
            keras.layers.Activation(ops.square),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), 'mse')

    def fit(share, steps):
        many = np.tile(x, (steps, 1, 1, 1)), np.tile(share * energy, (steps, 1))
        model.fit(*many, batch_size=8, shuffle=False, verbose=0)

    fit(share, steps=100)
    assert pool.stride_values == (start, start)
    fit(1 - share, steps=30)
    assert np.all(strides_of(pool) != start)


@pytest.mark.parametrize('ramp', RAMPS)
@pytest.mark.parametrize('sizes', [(1, 1), (1, 9), (2, 2), (1, 4096), (3, 999)])
def test_tiny_and_very_long_maps_are_trained_on(sizes, ramp):
    pool = DiffStride(2.0, 2.0, ramp=ramp)
    model = meter(pool, (*sizes, 1), optimizer=keras.optimizers.SGD(0.1))
    losses = fit(model, noise((2, *sizes, 1)), epochs=2).history['loss']
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(strides_of(pool)))
    assert pool(noise((2, *sizes, 1))).shape[1] <= sizes[0]
