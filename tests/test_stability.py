"""What strides do when training goes wrong around them."""

import keras
import numpy as np
import pytest
from backends import array, error_of, image
from keras import ops

from diffstride import DiffStride
from diffstride.ramps import RAMPS


def meter(pool, optimizer='sgd'):
    """Returns a model whose loss pulls the strides down."""
    inputs = keras.Input((16, 12, 2))
    x = ops.mean(ops.square(pool(inputs)), axis=(1, 2))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    # Without a graph there is less to wait for.
    model.compile(optimizer, 'mse', run_eagerly=True)
    return model


def fit(model, x, **kwargs):
    y = np.ones((len(x), 2))
    return model.fit(x, y, batch_size=len(x), verbose=0, **kwargs)


def test_a_cost_whose_gradient_is_infinite_does_not_move_strides():
    pool = DiffStride(
        1.0, strides_regularizer=lambda s: ops.sum((s - 1) ** 0.5)
    )
    fit(meter(pool, keras.optimizers.Adam(0.1)), np.zeros((4, 16, 12, 2)))
    assert pool.stride_values == (1.0, 1.0)


@pytest.mark.parametrize(
    'ramp, method, bad',
    [
        ('outside', 'matmul', np.nan),
        ('outside', 'fft', np.inf),
        ('inside', 'matmul', -np.inf),
        ('straight_through', 'fft', np.nan),
    ],
)
def test_an_input_that_is_not_finite_does_not_move_strides(ramp, method, bad):
    """Nor does it stay in the optimizer's averages of the gradient."""
    pool = DiffStride(2.0, 2.0, ramp=ramp, method=method)
    model = meter(pool, keras.optimizers.Adam(0.1))
    weights = model.layers[-1].get_weights()
    good = image((16, 12), batch=4)
    x = good.copy()
    x[1, 3, 4, 0] = bad
    fit(model, x)
    assert pool.stride_values == (2.0, 2.0)
    model.layers[-1].set_weights(weights)
    fit(model, good)
    strides = array(pool.strides)
    assert np.all(np.isfinite(strides) & (strides != 2))


@pytest.mark.parametrize(
    'ramp, method',
    [*zip(RAMPS, ('matmul', 'fft', 'matmul')), (RAMPS[1], 'fft')],
)
def test_strides_that_are_not_numbers_give_the_least_sizes(ramp, method):
    """The values tell it without a crash; new strides mend the layer."""
    pool = DiffStride(2.0, 2.0, ramp=ramp, method=method)
    model = meter(pool)
    x = image((16, 12))
    before = array(pool(x))
    pool.strides.assign([np.nan, 2.0])
    assert pool.output_size(16) == 2
    y = array(pool(x))
    assert y.shape == (2, 2, *before.shape[2:])
    # With a straight-through ramp only the sizes depend on the stride.
    is_lost = ramp != 'straight_through'
    assert np.all(np.isnan(y)) == is_lost
    assert np.all(np.isnan(array(model(x)))) == is_lost
    for fix_sizes in pool.make_sizes_static, pool.hold:
        with pytest.raises(ValueError, match='must be finite for static sizes'):
            fix_sizes()
    pool.strides = 2.0
    assert error_of(pool(x), before) <= 1e-6


@pytest.mark.parametrize(
    'optimizer, scale, limits',
    [
        (keras.optimizers.SGD(1e6), 1, (1.5, 4.0)),
        (keras.optimizers.Adam(10.0), 1, (None, 2.5)),
        (keras.optimizers.SGD(1.0), 1e4, (None, None)),
        (keras.optimizers.Adam(10.0, clipvalue=0.1), 1e4, (None, None)),
        (keras.optimizers.AdamW(0.1, weight_decay=1.0), 1, (1.5, 4.0)),
    ],
)
def test_strides_stay_finite_and_within_their_limits(limits, optimizer, scale):
    lower, upper = limits
    kwargs = {'lower_limit_stride': lower, 'upper_limit_stride': upper}
    pool = DiffStride(2.0, 2.0, **kwargs)
    model = meter(pool, optimizer)
    model.layers[-1].trainable = False  # Its weights are not in question.
    fit(model, scale * image((16, 12), batch=4), epochs=5)
    strides = array(pool.strides)
    assert np.all(np.isfinite(strides) & (strides != 2))
    assert np.all(strides >= (lower or 1))
    assert np.all(strides <= (upper or np.inf))
    y = array(pool(image((16, 12))))
    assert np.all(np.isfinite(y)) and min(y.shape) >= 1


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_strides_stay_finite_under_loss_scaling(scale):
    """The scale falls where float16 overflows, and such steps are left out."""
    keras.config.set_dtype_policy('mixed_float16')
    pool = DiffStride(2.0, 2.0)
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-3), initial_scale=2.0**15
    )
    model = meter(pool, optimizer)
    fit(model, scale * image((16, 12), batch=4), epochs=4)
    strides = array(pool.strides)
    assert np.all(np.isfinite(strides))
    assert scale != 1 or np.all(strides != 2)
