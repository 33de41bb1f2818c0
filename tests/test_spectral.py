"""Resampling and responses, against the reference and by hand."""

import itertools

import numpy as np
import pytest
import reference
from backends import BACKEND, gradients, jacobian, of_unknown_sizes, some
from keras import ops

from diffstride import spectral

has_float64 = pytest.mark.skipif(
    BACKEND == 'jax', reason='JAX has no float64 unless its x64 mode is set'
)
METHODS = ('fft', 'matmul')
NORMS = ('forward', 'backward', 'ortho')
RAMPS = ('outside', 'inside')
SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 31, 32)
STRIDES = (1, 1.1, 1.25, 1.5, 1.6, 2, 2.2, 3, 3.3, 4, 5, 7, 10, 16, 100)
SMOOTHNESSES = (0.5, 1, 2.5, 4, 100)


def random(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype('float32')


def assert_close(actual, expected, tolerance):
    actual = np.asarray(actual, 'float64')
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance


def resample(x, axis, size, response=None, norm='forward', method='auto'):
    """Resamples one tensor."""
    return spectral.resample([x], axis, size, norm, method, response)[0]


def tensors_of(size, stride):
    return (
        ops.convert_to_tensor(size, 'int32'),
        ops.convert_to_tensor(stride, 'float32'),
    )


@pytest.mark.parametrize('with_response', [False, True])
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('method', METHODS)
def test_resample_agrees_with_reference_down_and_up(
    method, norm, with_response
):
    for i, (size, output_size) in some(
        enumerate(itertools.product(SIZES, SIZES))
    ):
        axis = i % 4
        x = random(*(size if a == axis else 2 for a in range(4)), seed=i)
        response = np.ones(output_size // 2 + 1, 'float32')
        if with_response:
            response = 0.1 + np.abs(random(len(response), seed=i))
        kept = min(size, output_size) // 2 + 1
        y = resample(
            ops.convert_to_tensor(x),
            axis,
            output_size,
            ops.convert_to_tensor(response[:kept]) if with_response else None,
            norm,
            method,
        )
        expected = reference.resample(x, axis, output_size, response, norm)
        assert_close(y, expected, 2e-6)


@pytest.mark.parametrize('method', METHODS)
def test_resample_of_unknown_sizes_agrees_with_reference(method):
    resample_unknown = of_unknown_sizes(
        lambda x, size, response: resample(x, 1, size, response, method=method),
        ([None, None, 2], 'float32'),
        ([], 'int32'),
        ([None], 'float32'),
    )

    for size, output_size in some(itertools.product(SIZES, SIZES)):
        x = random(2, size, 2, seed=size)
        response = 0.1 + np.abs(random(output_size // 2 + 1, seed=output_size))
        kept = response[: min(size, output_size) // 2 + 1]
        y = resample_unknown(
            ops.convert_to_tensor(x), output_size, ops.convert_to_tensor(kept)
        )
        expected = reference.resample(x, 1, output_size, response, 'forward')
        assert_close(y, expected, 2e-6)


@has_float64
@pytest.mark.parametrize('method', METHODS)
def test_resample_in_float64_is_exact_to_float64(method):
    for size, output_size in [(33, 12), (32, 13), (224, 150), (9, 30)]:
        x = random(2, size).astype('float64')
        y = resample(ops.convert_to_tensor(x), 1, output_size, method=method)
        response = np.ones(output_size // 2 + 1)
        expected = reference.resample(x, 1, output_size, response, 'forward')
        assert np.asarray(y).dtype == 'float64'
        assert_close(y, expected, 1e-13)


@pytest.mark.parametrize(
    'method, size, output_size',
    [
        ('fft', 4096, 2050),
        ('fft', 4095, 1366),
        ('matmul', 4096, 600),
        ('matmul', 4095, 514),
        ('auto', 4096, 1241),
    ],
)
def test_resample_is_accurate_for_long_axes(method, size, output_size):
    x = random(2, size)
    response = np.linspace(1, 0.1, output_size // 2 + 1).astype('float32')
    y = resample(
        ops.convert_to_tensor(x),
        1,
        output_size,
        ops.convert_to_tensor(response),
        method=method,
    )
    expected = reference.resample(x, 1, output_size, response, 'forward')
    assert_close(y, expected, 1e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('size, output_size', [(20, 9), (21, 8), (9, 50)])
def test_resample_samples_a_cosine_anew(size, output_size, method):
    def cosine(count):
        positions = np.arange(count)[None] / count
        return 2 + np.cos(2 * np.pi * 3 * positions + 0.7)

    x = ops.convert_to_tensor(cosine(size), 'float32')
    y = resample(x, 1, output_size, method=method)
    assert_close(y, cosine(output_size), 1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_resampling_up_halves_the_nyquist_of_an_even_size(method):
    x = ops.convert_to_tensor([[1.0, -1.0, 1.0, -1.0]])
    y = resample(x, 1, 8, method=method)
    assert_close(y, np.array([[1.0, 0, -1, 0, 1, 0, -1, 0]]), 1e-6)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('size', [1, 3, 9, 31])
def test_resampling_up_and_down_again_returns_an_odd_signal(size, method):
    x = random(2, size)
    y = resample(ops.convert_to_tensor(x), 1, 40, method=method)
    y = resample(y, 1, size, method=method)
    assert_close(y, x, 2e-6)


@pytest.mark.parametrize('method', ['auto', *METHODS])
@pytest.mark.parametrize('size', range(1, 10))
def test_resample_to_the_same_size_returns_its_input(size, method):
    x = ops.convert_to_tensor(random(2, size))
    y = resample(x, 1, size, method=method)
    assert np.array_equal(y, x)


def test_norms_differ_by_powers_of_the_ratio_of_sizes():
    x = ops.convert_to_tensor(random(2, 24))
    forward, backward, ortho = (
        np.asarray(resample(x, 1, 10, norm=norm)) for norm in NORMS
    )
    assert_close(backward, forward * 2.4, 1e-6)
    assert_close(ortho, forward * 2.4**0.5, 1e-6)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('output_size', [4, 9, 10, 30])
def test_resample_keeps_a_constant_under_forward(output_size, method):
    x = ops.convert_to_tensor(np.full((2, 13), 3, 'float32'))
    y = resample(x, 1, output_size, method=method)
    assert_close(y, np.full((2, output_size), 3.0), 1e-6)


@pytest.mark.parametrize(
    'dtype',
    [
        *('float16', 'bfloat16', 'float32'),
        pytest.param('float64', marks=has_float64),
    ],
)
@pytest.mark.parametrize('method', METHODS)
def test_resample_returns_the_dtype_of_its_input(dtype, method):
    x = ops.cast(random(2, 3, 12), dtype)
    y = resample(x, 2, 7, ops.ones((4,)), method=method)
    assert y.dtype == x.dtype


@pytest.mark.parametrize('method', METHODS)
def test_resample_accepts_an_empty_batch(method):
    x = ops.zeros((0, 12, 3))
    y = resample(x, 1, 6, ops.ones((4,)), method=method)
    assert tuple(y.shape) == (0, 6, 3)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('size, output_size', [(7, 4), (8, 5), (8, 8), (5, 12)])
def test_resampling_matrix_is_the_formula(size, output_size, norm):
    least = min(size, output_size)
    f = np.arange(least // 2 + 1)
    pairs = np.where((f == 0) | (2 * f == least), 1, 2)
    gain = {'forward': output_size / size, 'backward': 1}.get(
        norm, (output_size / size) ** 0.5
    )
    time = (
        np.arange(output_size)[:, None] / output_size - np.arange(size) / size
    )
    waves = np.cos(2 * np.pi * f[:, None, None] * time)
    response = 1 / (1 + f)
    tensor = ops.convert_to_tensor(response)
    dtype = 'float32' if BACKEND == 'jax' else 'float64'
    for r, given in [(np.ones(len(f)), None), (response, tensor)]:
        matrix = spectral.resampling_matrix(
            size, output_size, given, norm, dtype
        )
        expected = gain / output_size * np.tensordot(pairs * r, waves, axes=1)
        exact = given is None or BACKEND != 'jax'  # That has no float64.
        assert_close(matrix, expected, 1e-13 if exact else 1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_gradient_of_resample_is_its_transpose(method):
    x = ops.convert_to_tensor(random(2, 15, 3))
    weights = ops.convert_to_tensor(random(2, 8, 3, seed=1))
    response = ops.ones((5,))

    def loss(x):
        return ops.sum(weights * resample(x, 1, 8, response, 'ortho', method))

    matrix = reference.resample(np.eye(15), 0, 8, np.ones(5), 'ortho')
    expected = np.einsum('pn,bpc->bnc', matrix, weights)
    assert_close(gradients(loss, [x])[0], expected, 2e-6)


# Sizes


@pytest.mark.parametrize('ramp', RAMPS)
def test_sizes_and_clipped_strides_are_the_exact_ones(ramp):
    for size, smoothness, stride in itertools.product(
        [*range(1, 66), 224, 1000], SMOOTHNESSES, STRIDES
    ):
        case = size, smoothness, stride
        exact = reference.clip_stride(stride, size, smoothness, ramp)
        clipped = spectral.clip_stride(stride, size, smoothness, ramp)
        assert clipped == pytest.approx(float(exact), rel=1e-12), case
        expected = reference.diffstride_size(size, exact, smoothness, ramp)
        for value in (clipped, float(np.float32(clipped))):
            actual = spectral.diffstride_size(size, value, smoothness, ramp)
            assert isinstance(actual, int)
            assert actual == expected, case
        actual = spectral.fixed_size(size, stride)
        assert isinstance(actual, int)
        assert actual == reference.fixed_size(size, stride), case


@pytest.mark.parametrize('ramp', RAMPS)
@pytest.mark.parametrize('smoothness', SMOOTHNESSES)
def test_sizes_of_tensors_are_those_of_numbers(smoothness, ramp):
    def size_of(size, stride):
        stride = spectral.clip_stride(stride, size, smoothness, ramp)
        return spectral.diffstride_size(size, stride, smoothness, ramp)

    size_of = of_unknown_sizes(size_of, ([], 'int32'), ([], 'float32'))

    cases = itertools.product([*range(1, 66, 7), 224], STRIDES)
    for size, stride in some(cases):
        exact = reference.clip_stride(stride, size, smoothness, ramp)
        expected = reference.diffstride_size(size, exact, smoothness, ramp)
        actual = size_of(*tensors_of(size, stride))
        assert int(actual) == expected, (size, stride)


def test_fixed_sizes_of_tensors_are_those_of_numbers():
    for stride in STRIDES:
        size_of = of_unknown_sizes(
            lambda size, stride=stride: spectral.fixed_size(size, stride),
            ([], 'int32'),
        )
        for size in some((*range(1, 66, 3), 224)):
            expected = reference.fixed_size(size, stride)
            actual = size_of(ops.convert_to_tensor(size, 'int32'))
            assert int(actual) == expected, (size, stride)


@pytest.mark.parametrize(
    'ramp, strides_and_sizes',
    [
        ('outside', {1.5: 30, 2: 24, 3: 20, 4: 16}),
        ('inside', {1.5: 22, 2: 16, 3: 12, 4: 8}),
    ],
)
def test_sizes_of_32_pixels_are_those_of_the_design(ramp, strides_and_sizes):
    for stride, size in strides_and_sizes.items():
        assert spectral.diffstride_size(32, stride, 4.0, ramp) == size


@pytest.mark.parametrize(
    'stride, arguments, expected',
    [
        (2.0, {}, 2.0),
        (1.0, {}, 32 / 28),
        (99.0, {}, 16.0),
        (1.0, {'ramp': 'inside'}, 1.0),
        (0.0, {'ramp': 'inside'}, 1.0),
        (99.0, {'ramp': 'inside'}, 16.0),
        (2.0, {'lower': 3}, 3.0),
        (2.0, {'upper': 1.5}, 1.5),
        (1.0, {'upper': 1.0}, 1.0),
        (99.0, {'lower': 20}, 20.0),
    ],
)
def test_clip_stride_clips_with_a_gradient_of_one(stride, arguments, expected):
    clipped = spectral.clip_stride(stride, 32, 4.0, **arguments)
    assert clipped == pytest.approx(expected, rel=1e-12)
    tensor = ops.convert_to_tensor(stride, 'float32')

    def clip(stride):
        return spectral.clip_stride(stride, 32, 4.0, **arguments)

    assert float(clip(tensor)) == pytest.approx(expected, rel=1e-6)
    assert gradients(clip, [tensor])[0] == 1


# Responses


@pytest.mark.parametrize('ramp', RAMPS)
def test_response_agrees_with_reference(ramp):
    for size, smoothness, stride in some(
        itertools.product((1, 2, 3, 8, 15, 32, 224), SMOOTHNESSES, STRIDES[::2])
    ):
        exact = reference.clip_stride(stride, size, smoothness, ramp)
        output_size = reference.diffstride_size(size, exact, smoothness, ramp)
        response = spectral.diffstride_response(
            size,
            output_size,
            ops.convert_to_tensor(float(exact), 'float32'),
            smoothness,
            ramp,
        )
        expected = reference.diffstride_response(
            size, output_size, exact, smoothness, ramp
        )
        # b has a relative error of 1e-7, in units of the ramp's width.
        width = min(smoothness, size / (2 * exact))
        tolerance = 2e-7 * max(1, size / float(width))
        np.testing.assert_allclose(response, expected, rtol=0, atol=tolerance)
        assert response[0] == 1


def response_and_jacobian(size, output_size, stride, smoothness, ramp):
    def response(stride):
        return spectral.diffstride_response(
            size, output_size, stride, smoothness, ramp
        )

    stride = ops.convert_to_tensor(float(stride), 'float32')
    return response(stride), jacobian(response, stride)


@pytest.mark.parametrize(
    'ramp, size, stride, smoothness, response, jacobian',
    [
        # b = 2, db/dS = -1: corners at 2 (start) and 6 (end, cropped off).
        (
            'outside', 8, 2, 4,
            [1, 1, 1, 0.75, 0.5], [0, 0, -1 / 8, -1 / 4, -1 / 4],
        ),
        # b = 2.5, db/dS = -1.25: a corner at the end of the ramp alone.
        (
            'outside', 10, 2, 1.5,
            [1, 1, 1, 2 / 3, 0], [0, 0, 0, -5 / 6, -5 / 12],
        ),
        # b = 4, db/dS = -2: ramp from 2 to 4, corners at both ends.
        (
            'inside', 16, 2, 2,
            [1, 1, 1, 0.5, 0], [0, 0, -1 / 2, -1, -1 / 2],
        ),
        # b = 2 = R: the ramp fills the band and is as wide as the smaller.
        (
            'inside', 8, 2, 2,
            [1, 0.5, 0], [0, -0.5 * (1 + 0.5) / 2, -0.5 * (1 / 2)],
        ),
        # R > b = 2: the ramp is b wide, m = 1 - f / b.
        (
            'inside', 8, 2, 9,
            [1, 0.5, 0], [0, -1 / 4, -1 / 4],
        ),
    ],
)  # fmt: skip
def test_response_and_its_gradient_by_hand(
    ramp, size, stride, smoothness, response, jacobian
):
    output_size = 2 * (len(response) - 1)
    actual = response_and_jacobian(size, output_size, stride, smoothness, ramp)
    np.testing.assert_allclose(actual[0], response, atol=1e-6)
    np.testing.assert_allclose(actual[1], jacobian, atol=1e-6)


@pytest.mark.parametrize('ramp', RAMPS)
@pytest.mark.parametrize('smoothness', [0.5, 4, 100])
def test_gradient_of_response_is_the_central_difference(smoothness, ramp):
    size, output_size, step = 32, 32, 1e-6
    for stride in (2, 4, 5.1):
        _, jacobian = response_and_jacobian(
            size, output_size, stride, smoothness, ramp
        )
        after, before = (
            reference.diffstride_response(
                size, output_size, s, smoothness, ramp
            )
            for s in (stride + step, stride - step)
        )
        expected = (after - before) / (2 * step)
        np.testing.assert_allclose(jacobian, expected, atol=1e-4)


@pytest.mark.parametrize('ramp', RAMPS)
def test_ramp_frequencies_hold_every_slope(ramp):
    for size, smoothness, stride in some(
        itertools.product((1, 2, 3, 8, 15, 32), SMOOTHNESSES, STRIDES[::3])
    ):
        case = size, smoothness, stride
        stride = spectral.clip_stride(stride, size, smoothness, ramp)
        output_size = spectral.diffstride_size(size, stride, smoothness, ramp)
        stride = ops.convert_to_tensor(float(stride), 'float32')
        about = size, output_size, stride, smoothness, ramp
        frequencies = np.asarray(spectral.ramp_frequencies(*about))
        assert len(set(frequencies)) == len(frequencies), case
        assert frequencies.max() <= output_size // 2, case
        response, slopes = response_and_jacobian(*about)
        assert set(np.flatnonzero(slopes)) <= set(frequencies), case
        chosen = spectral.diffstride_response(
            *about, ops.convert_to_tensor(frequencies)
        )
        expected = np.asarray(response)[np.maximum(frequencies, 0)]
        np.testing.assert_array_equal(chosen, expected)


# Gradients


def reference_gradient_of_response(x, axis, output_size, gradient, norm):
    """Inner products of the output's gradient and each frequency's share."""
    count = output_size // 2 + 1
    shares = [
        reference.resample(x, axis, output_size, one, norm)
        for one in np.eye(count)
    ]
    return np.array([np.sum(share * gradient) for share in shares])


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('axis', [1, 3])
@pytest.mark.parametrize('size, output_size', [(9, 6), (30, 17), (48, 48)])
@pytest.mark.parametrize('method', METHODS)
def test_gradient_of_a_response_is_the_product_of_the_spectra(
    method, size, output_size, axis, norm
):
    shape = [2, 3, 4, 5]
    shape[axis] = size
    x = random(*shape)
    shape[axis] = output_size
    gradient = random(*shape, seed=1)
    response = np.linspace(1, 0.2, output_size // 2 + 1, dtype='float32')
    expected = reference_gradient_of_response(
        x, axis, output_size, gradient, norm
    )

    x, gradient, response = map(ops.convert_to_tensor, (x, gradient, response))

    def value_and_gradient(varying):
        def value(response):
            chosen = varying
            if varying is not None:
                chosen = varying, ops.take(response, varying)
            return spectral.resample(
                [x], axis, output_size, norm, method, response, chosen
            )[0]

        of_response = gradients(
            lambda response: ops.sum(gradient * value(response)), [response]
        )
        return value(response), of_response[0]

    y, actual = value_and_gradient(None)
    assert_close(actual, expected, 1e-5)
    few = ops.convert_to_tensor([1, output_size // 2], 'int32')
    y_of_few, actual = value_and_gradient(few)
    np.testing.assert_array_equal(y_of_few, y)
    expected[np.isin(range(len(expected)), np.asarray(few), invert=True)] = 0
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize('size', [7, 40])
@pytest.mark.parametrize('method', METHODS)
def test_gradient_of_a_gradient_is_the_central_difference(method, size):
    x = random(2, size, 3)
    output_size = size // 2 + 1

    def penalty(response):
        def loss(x):
            y = resample(x, 1, output_size, response, method=method)
            return ops.sum(y**2)

        return ops.sum(gradients(loss, [x])[0] ** 2)

    response = np.linspace(1, 0.5, output_size // 2 + 1, dtype='float32')
    actual = np.asarray(gradients(penalty, [response])[0])
    response = ops.convert_to_tensor(response)
    for index in range(len(actual)):
        step = 1e-2 * ops.eye(len(actual))[index]
        after, before = penalty(response + step), penalty(response - step)
        expected = float(after - before) / 2e-2
        assert actual[index] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize('method', METHODS)
def test_a_list_is_resampled_as_its_tensors_are(method):
    tensors = [ops.array(random(2, 12, c, seed=c)) for c in (1, 3)]
    response = ops.ones((4,))
    together = spectral.resample(
        tensors, 1, 6, method=method, response=response
    )
    for x, y in zip(tensors, together):
        alone = resample(x, 1, 6, response, method=method)
        np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize(
    'shape, axis, output_size, method',
    [
        ((32, 32, 32, 64), 1, 24, 'matmul'),
        ((32, 32, 32, 64), 2, 24, 'matmul'),
        ((4, 512, 512, 64), 2, 264, 'matmul'),
        # The product with few columns is slow, that along the last axis not.
        ((4, 512, 512, 3), 2, 264, 'fft'),
        ((4, 3, 512, 512), 3, 264, 'matmul'),
        ((2, 1024, 1024, 8), 1, 520, 'fft'),
        ((2, 1024, 1024, 8), 1, 264, 'matmul'),
        ((2, 1024, None, 8), 1, 520, 'matmul'),
        ((2, 1024, 1024, 8), 1, None, 'matmul'),
    ],
)
def test_the_fastest_method_follows_the_model_of_time(
    shape, axis, output_size, method
):
    assert spectral.fastest_method(shape, axis, output_size) == method
