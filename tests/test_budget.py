"""MACs of strides against `complexity`; sizes within a budget; recalibration.

`complexity` is checked against counts by hand in test_counting.py.
"""

import re

import keras
import numpy as np
import pytest
from backends import array, central_differences, random, refusals, sequential
from keras import layers

from diffstride import SpectralResizing, complexity, diffstride_layers
from diffstride.budget import SizesNear, recalibrate, set_budget, strides_within
from diffstride.macs import MacsOfStrides
from diffstride.pooling import DiffStride, DiffStride1D, FixedSpectralPooling

SHAPE = (32, 24, 3)


def conv(filters=4):
    return layers.Conv2D(filters, 3, padding='same')


def chain(**kwargs):
    """Three pooling layers, of which the last one shares its stride."""
    a = DiffStride((1.5, 2.0), 1.0, name='a', **kwargs)
    b = DiffStride(2.0, 1.0, name='b', **kwargs)
    c = DiffStride(2.0, 1.0, shared_stride=True, name='c', **kwargs)
    fixed = FixedSpectralPooling((1.0, 1.5))
    padded = layers.ZeroPadding2D((1, 2)), layers.Conv2D(8, 3)
    head = layers.GlobalAveragePooling2D(), layers.Dense(10)
    pooled = conv(), a, conv(8), fixed, b, *padded, c, conv(8)
    return sequential(SHAPE, *pooled, *head)


def residual():
    """Both branches of a block share a pooling layer, which gets a list."""
    inputs = keras.Input(SHAPE)
    x = DiffStride((1.5, 2.0), 1.0)(conv()(inputs))
    shortcut, x = DiffStride((2.0, 1.5), 1.0)([x, conv(8)(x)])
    x = layers.Add()([conv(8)(shortcut), conv(8)(x)])
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def unet():
    inputs = keras.Input(SHAPE)
    skip = DiffStride((1.5, 2.0), 1.0, ramp='inside')(conv()(inputs))
    x = conv(8)(DiffStride((2.0, 3.0), 1.0, ramp='inside')(skip))
    x = conv(4)(SpectralResizing()([x, skip]))
    return keras.Model(inputs, conv(2)(SpectralResizing()([x, inputs])))


def branches():
    """Two branches with sizes of their own, and a vector beside the image."""
    image = keras.Input(SHAPE, name='image')
    vector = keras.Input((5,), name='vector')
    pools = DiffStride(2.0, 1.0)(image), DiffStride((3.0, 1.5), 1.0)(image)
    means = [layers.GlobalAveragePooling2D()(conv()(x)) for x in pools]
    y = layers.Dense(2)(layers.Concatenate()([*means, vector]))
    return keras.Model({'image': image, 'vector': vector}, y)


def sound():
    a, b, c = layers.Conv1D(4, 9), layers.Conv1D(8, 5), layers.Conv1D(8, 3)
    first, second = DiffStride1D(2.5), DiffStride1D(3.0)
    mean = layers.GlobalAveragePooling1D()
    return sequential((400, 2), a, first, b, second, c, mean)


def macs_of(model):
    return MacsOfStrides(model, None, diffstride_layers(model))


@pytest.mark.parametrize('make', [chain, residual, unet, branches, sound])
def test_macs_at_all_strides_are_those_of_complexity(make):
    model = make()
    function = macs_of(model)
    rng = np.random.default_rng(0)
    start = function.strides()
    for factors in (1.0, rng.uniform(0.7, 1.4, len(start))):
        strides = np.maximum(factors * start, 1)
        function.assign(strides)
        sizes = function.integer_sizes(strides)[1]
        expected = complexity(model).macs
        assert function.total(sizes) == pytest.approx(expected, abs=0.5)
        assert function.count(strides) == expected


def test_the_ramp_outside_adds_its_width_to_a_size():
    model = sequential((64, 1), DiffStride1D(2.0, 3.0), layers.Conv1D(8, 1))
    # 64 / 2.5 + 2 3 samples; the least stride that changes a size is 64 / 58.
    function = macs_of(model)
    size = 64 / 2.5 + 6
    assert function([2.5]) == pytest.approx(size * (64 + 8))
    assert function([1.1]) == function([1.0]) == 64 * (64 + 8)
    assert function([1e6]) == pytest.approx(8 * (64 + 8))


def test_projection_is_the_nearest_point_of_the_budget():
    """The way in logarithms is along the gradient: Lagrange's condition."""
    function = macs_of(chain(ramp='inside'))
    start = function.strides() + 0.1
    slopes = central_differences(function, start)
    np.testing.assert_allclose(function.gradient(start), slopes, rtol=1e-5)
    for budget in (0.5 * function(start), 1.2 * function(start)):
        found = function.project(start, budget)
        assert function(found) == pytest.approx(budget)
        way, normal = np.log(found / start), found * function.gradient(found)
        along = way @ normal / (normal @ normal) * normal
        np.testing.assert_allclose(way, along, atol=0.1 * max(abs(way)))


def test_steps_along_the_budget_keep_the_macs():
    """To first order; what is stopped by a limit or a least size stays."""
    function = macs_of(chain(ramp='inside'))
    start = function.strides()
    direction = np.random.default_rng(0).normal(size=len(start))
    tangent = function.tangent(start, direction)
    for length in (1e-2, 1e-3):
        moved = function.along(start, length * direction)
        np.testing.assert_allclose(np.log(moved / start), length * tangent)
        change = function(moved) / function(start) - 1
        assert abs(change) < 5 * length**2
    steps = 0.1 * np.eye(len(start))
    assert function.along(np.ones(len(start)), -steps[0])[0] == 1
    assert function.along(np.append(start[:-1], 100.0), steps[-1])[-1] == 100


def test_projection_starts_anywhere_and_stays_within_limits():
    function = macs_of(chain(ramp='inside'))
    start = function.strides()
    found = function.project(np.full(len(start), 1e3), function(start))
    assert function(found) == pytest.approx(function(start))
    limits = {'lower_limit_stride': 1.3, 'upper_limit_stride': 2.1}
    function = macs_of(chain(ramp='inside', **limits))
    found = function.project(start, 0.75 * function(start))
    assert function(found) == pytest.approx(0.75 * function(start))
    assert max(found) == 2.1
    np.testing.assert_allclose(function.project(start, 1e9), 1.3)


@pytest.mark.parametrize(
    'make, share',
    [
        *((chain, 0.6), (chain, 1.3), (residual, 0.5)),
        *((unet, 0.4), (branches, 0.7), (sound, 0.3)),
    ],
)
def test_a_budget_is_used_up_by_sizes_that_cannot_grow(make, share):
    model = make()
    budget = share * complexity(model).macs
    macs = set_budget(model, macs=budget)
    assert all(pool.held for pool in diffstride_layers(model))
    assert 0.8 * budget < macs == complexity(model).macs <= budget
    # The next size of each map, while those after it keep their sizes.
    function = macs_of(model)
    strides = function.strides()
    sizes = function.integer_sizes(strides)[1]
    near = SizesNear(function, strides)
    for _, larger in near.larger(sizes):
        grown = near.strides_for(larger)
        assert not macs < function.count(grown) <= budget


def test_a_budget_of_long_axes_is_used_up_at_once(monkeypatch):
    """An FFT has MACs that are not linear in a size; a step is 2 of 8000."""
    a, b, c = (layers.Conv1D(n, 9, padding='same') for n in (4, 8, 8))
    pools = [DiffStride1D(8.0, ramp='inside', method='fft') for _ in 'ab']
    model = sequential((8000, 2), a, pools[0], b, pools[1], c)
    counted, total = [], MacsOfStrides.total
    monkeypatch.setattr(
        MacsOfStrides, 'total', lambda *x: counted.append(x) or total(*x)
    )
    before = complexity(model).macs
    macs = set_budget(model, macs=2 * before)
    assert macs == complexity(model).macs
    assert 0.999 * 2 * before <= macs <= 2 * before
    assert len(counted) < 3000


def test_sizes_that_just_fit_are_found():
    """Where 32 became 14, 8 and 4, 16, 8 and 4 fit, too."""
    kwargs = {'shared_stride': True, 'ramp': 'straight_through'}
    pools = [DiffStride(2.0, 1.0, **kwargs) for _ in range(3)]
    model = sequential(SHAPE, *(x for pool in pools for x in (pool, conv(8))))
    budget = complexity(model).macs
    for pool, stride in zip(pools, (2.4, 1.8, 2.1)):
        pool.strides = stride
    assert set_budget(model, macs=budget) == budget
    sizes = [row.output_shape[:2] for row in complexity(model).layers[::2]]
    assert sizes == [(16, 12), (8, 6), (4, 4)]


def test_no_map_is_halved_for_one_that_was_rounded_up():
    """Where a height of 2.7 became 4, a width had gone from 17 to 8."""
    a, b = (DiffStride(2.0, 4.0, ramp='straight_through') for _ in range(2))
    model = sequential((32, 32, 1), conv(2), a, conv(12), b, conv(12))
    function = macs_of(model)
    wanted = np.array([11.94, 1.83, 1.56, 1.01])
    found = strides_within(function, wanted, function(wanted))
    for layer, strides in zip(function.layers, np.reshape(found, (2, 2))):
        layer.strides = strides
    height, width = model(np.ones((1, 32, 32, 1))).shape[1:3]
    assert height == 2
    assert 1 / 1.6 < width / (32 / 1.83 / 1.01) < 1.6


def test_strides_that_are_not_trainable_stay():
    fixed = DiffStride(2.0, trainable=False), DiffStride(2.0, cropping=False)
    model = sequential(SHAPE, *fixed, DiffStride(2.0), conv(8))
    set_budget(model, share=0.9)
    *fixed, learned = (x.stride_values for x in diffstride_layers(model))
    assert fixed == [(2.0, 2.0), (2.0, 2.0)]
    assert max(learned) > 2


def test_a_share_is_one_of_the_initial_strides_and_what_fits_stays():
    model = chain(ramp='inside')
    initial = complexity(model).macs
    for _ in range(2):
        assert 0.45 * initial < set_budget(model, share=0.5) <= 0.5 * initial
    strides = [x.stride_values for x in diffstride_layers(model)]
    set_budget(model, macs=complexity(model).macs)
    assert [x.stride_values for x in diffstride_layers(model)] == strides


def apart():
    inputs = keras.Input(SHAPE)
    x = [DiffStride(2.0, name=name)(inputs) for name in 'ab']
    return keras.Model(inputs, layers.Add()(x))


def shared():
    pool, inputs = DiffStride(2.0, 1.0, name='pool'), keras.Input(SHAPE)
    return keras.Model(inputs, pool(pool(inputs)))


test_budgets_that_are_refused = refusals(
    (lambda: set_budget(chain()), 'Either `macs` or `share` must be given'),
    (lambda: set_budget(chain(), 1e6, 0.5), 'Either `macs` or `share`'),
    (lambda: set_budget(chain(), 0), '`macs` must be a finite number, above 0'),
    (lambda: set_budget(chain(), share='1'), '`share` must be a finite number'),
    (lambda: set_budget(chain(), 1e3), 'at least 121,552 MACs'),
    (lambda: set_budget(keras.Sequential(), 1),
     'must have trainable DiffStride'),
    (lambda: set_budget(keras.Sequential([DiffStride()]), 1),
     '`input_shape` must be given'),
    (lambda: set_budget(
        sequential((8, 3), DiffStride1D(), layers.LSTM(2)), share=0.5),
     'lstm.*" must be known'),
    (lambda: set_budget(apart(), share=0.5), '"a" must take maps of any size'),
    (lambda: set_budget(shared(), share=0.5),
     '"pool" must pool maps of one size'),
)  # fmt: skip


def test_recalibration_averages_over_batches():
    """Against NumPy, for batches of unequal sizes, in two layers in turn."""
    x = 3 * random(10, 4) + 2
    batches = [x[:6], x[6:]]
    frozen = layers.BatchNormalization(momentum=0.9, trainable=False)
    dense = layers.Dense(3, kernel_initializer='ones')
    norm = layers.BatchNormalization()
    model = sequential((4,), frozen, layers.Dropout(0.5), dense, norm)
    kernel = array(dense.kernel)
    recalibrate(model, [batches[0], (batches[1], None)])
    normalized = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) for x in batches]
    inner = [x @ kernel for x in normalized]
    for layer, values in ((frozen, batches), (norm, inner)):
        mean = (6 * values[0].mean(0) + 4 * values[1].mean(0)) / 10
        var = (6 * values[0].var(0) + 4 * values[1].var(0)) / 10
        np.testing.assert_allclose(array(layer.moving_mean), mean, atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_variance), var, rtol=1e-4)
    assert frozen.momentum == 0.9 and not frozen.trainable
    np.testing.assert_array_equal(array(dense.kernel), kernel)
    with pytest.raises(ValueError, match='at least one example'):
        recalibrate(model, [x[:0]])


def test_recalibration_averages_over_calls_of_a_shared_layer():
    norm, inputs = layers.BatchNormalization(), keras.Input((3,))
    model = keras.Model(inputs, norm(2.0 * norm(inputs) + 6.0))
    x = random(8, 3) + 50
    recalibrate(model, [x[:0], x, x[:0]])
    # The layer sees x, and then values around 6.
    mean = (x.mean(0) + 6) / 2
    np.testing.assert_allclose(array(norm.moving_mean), mean, rtol=1e-4)


@pytest.mark.parametrize('ramp', ['inside', 'outside'])
def test_no_budget_leaves_an_empty_map(ramp):
    first = DiffStride(1.5, 0.5, ramp=ramp, shared_stride=True)
    second, third = (DiffStride(1.0, 0.5, ramp=ramp) for _ in range(2))
    a, b = layers.Conv2D(2, 5), layers.Conv2D(2, 3)  # The padding is 'valid'.
    shape, mean = (20, 16, 1), layers.GlobalAveragePooling2D()
    model = sequential(shape, first, a, second, b, third, conv(), mean)
    with pytest.raises(ValueError, match='at least') as error:
        set_budget(model, macs=1)
    least = re.search(r'least ([\d,]+)', str(error.value))[1].replace(',', '')
    set_budget(model, macs=int(least))
    assert complexity(model, shape).macs == int(least)
    # The convolutions leave one sample of seven, so a map of eight comes first.
    assert first.output_size(16) == 8
    assert np.isfinite(array(model(np.ones((1, *shape), 'float32')))).all()
