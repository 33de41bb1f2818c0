"""What holds for every allowed argument and input, and what is refused."""

import keras
import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import ops

from diffstride import pooling, spectral

RAMPS = ('outside', 'inside', 'straight_through')
DTYPES = ('float32', 'float16', 'bfloat16', 'float64')
# Tensors are made and traced anew in each example; their time says nothing.
settings.register_profile('properties', deadline=None, derandomize=True)
settings.load_profile('properties')


CLASSES = {
    1: (pooling.DiffStride1D, pooling.FixedSpectralPooling1D),
    2: (pooling.DiffStride, pooling.FixedSpectralPooling),
    3: (pooling.DiffStride3D, pooling.FixedSpectralPooling3D),
}
LARGEST = {1: 70, 2: 70, 3: 12}  # Of the sizes, so that no input is huge.

strides = st.one_of(
    st.floats(1, 8, width=32), st.floats(1, 100, width=32), st.just(1.0)
)
smoothness = st.floats(0.01, 50)
norms = st.sampled_from(spectral.NORMS)
ramps = st.sampled_from(RAMPS)


def noise(shape, dtype='float64'):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def numbers(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, 'float64'))


@st.composite
def diffstride_arguments(draw, rank, stride=strides):
    shared = draw(st.booleans())
    values = draw(st.lists(stride, min_size=rank, max_size=rank))
    values = values[:1] * rank if shared else values
    lower, upper = None, None
    if draw(st.booleans()):
        lower = draw(st.floats(1, min(values)))
    if draw(st.booleans()):
        upper = draw(st.floats(max(values), 200))
    ramp = draw(ramps)
    return {
        'strides': values,
        'shared_stride': shared,
        'smoothness_factor': draw(smoothness),
        'ramp': ramp,
        'cropping': ramp == 'straight_through' or draw(st.booleans()),
        'lower_limit_stride': lower,
        'upper_limit_stride': upper,
    }


@st.composite
def cases(draw):
    """A layer of any rank and an input that it must take."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    learned, fixed = CLASSES[rank]
    cls = draw(st.sampled_from([learned, learned, fixed]))
    arguments = (
        draw(diffstride_arguments(rank))
        if cls is learned
        else {'strides': draw(st.lists(strides, min_size=rank, max_size=rank))}
    )
    data_format = draw(st.sampled_from(['channels_last', 'channels_first']))
    dtype = draw(st.sampled_from(DTYPES))
    layer = cls(
        **arguments,
        data_format=data_format,
        method=draw(st.sampled_from(spectral.METHODS)),
        norm=draw(norms),
        dtype=dtype,
    )
    size = st.integers(1, LARGEST[rank])
    sizes = draw(st.lists(size, min_size=rank, max_size=rank))
    channels = draw(st.integers(1, 5))
    shape = (
        (*sizes, channels)
        if data_format == 'channels_last'
        else (channels, *sizes)
    )
    return layer, noise((draw(st.sampled_from([0, 1, 2])), *shape))


def expected_size(layer, index, size):
    if not isinstance(layer, pooling.DiffStride):
        return reference.fixed_size(size, layer.strides[index])
    if not layer.cropping:
        return size
    ramp = 'outside' if layer.ramp == 'outside' else 'inside'
    stride = reference.clip_stride(
        np.float32(layer.stride_values[index]),
        size,
        layer.smoothness_factor,
        ramp,
        layer.lower_limit_stride,
        layer.upper_limit_stride,
    )
    return reference.diffstride_size(
        size, stride, layer.smoothness_factor, ramp
    )


@settings(max_examples=300)
@given(cases())
def test_allowed_inputs_have_finite_outputs_of_the_documented_sizes(case):
    layer, x = case
    y = layer(ops.convert_to_tensor(x, layer.compute_dtype))
    expected = list(x.shape)
    for index, axis in enumerate(layer.spatial_axes):
        expected[axis] = expected_size(layer, index, x.shape[axis])
    assert tuple(y.shape) == tuple(expected)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert np.isfinite(numbers(y)).all()
    if layer.norm == 'forward':
        axes = tuple(layer.spatial_axes)
        tolerance = {'float16': 0.02, 'bfloat16': 0.1}.get(
            layer.compute_dtype, 1e-5
        )
        np.testing.assert_allclose(
            numbers(y).mean(axes),
            numbers(ops.cast(x, layer.compute_dtype)).mean(axes),
            atol=tolerance,
        )


@settings(max_examples=100)
@given(st.data(), st.integers(1, 70), norms, st.sampled_from(['fft', 'matmul']))
def test_diffstride_is_linear(data, size, norm, method):
    layer = pooling.DiffStride1D(
        **data.draw(diffstride_arguments(1)), norm=norm, method=method
    )
    a, b = noise((2, 1, size, 3), 'float32')
    factor = data.draw(st.floats(-10, 10, width=32))
    np.testing.assert_allclose(
        numbers(layer(a + factor * b)),
        numbers(layer(a)) + factor * numbers(layer(b)),
        atol=1e-4 * (1 + abs(factor)) * size**0.5,
    )


@settings(max_examples=100)
@given(st.data(), st.lists(st.integers(1, 70), min_size=2, max_size=2))
def test_transposing_the_image_transposes_the_result(data, sizes):
    arguments = data.draw(diffstride_arguments(2))
    layer = pooling.DiffStride(**arguments)
    arguments['strides'] = arguments['strides'][::-1]
    transposed = pooling.DiffStride(**arguments)
    x = noise((1, *sizes, 2), 'float32')
    np.testing.assert_allclose(
        numbers(layer(x)),
        numbers(transposed(x.swapaxes(1, 2))).swapaxes(1, 2),
        atol=2e-5,
    )


@settings(max_examples=150)
@given(st.data(), st.integers(1, 70), st.booleans())
def test_energy_never_grows_under_ortho(data, size, is_learned):
    layer = (
        pooling.DiffStride1D(**data.draw(diffstride_arguments(1)), norm='ortho')
        if is_learned
        else pooling.FixedSpectralPooling1D(data.draw(strides), norm='ortho')
    )
    x = noise((4, size, 3), 'float32')
    energy = (x.astype('float64') ** 2).sum(1)
    assert ((numbers(layer(x)) ** 2).sum(1) <= energy * (1 + 1e-5)).all()


@settings(max_examples=150)
@given(st.data(), st.integers(1, 70), norms)
def test_cropping_is_masking_and_exact_resampling(data, size, norm):
    arguments = data.draw(diffstride_arguments(1))
    assume(arguments['ramp'] != 'straight_through')
    arguments['cropping'] = True
    cropped = pooling.DiffStride1D(**arguments, norm=norm)
    masked = pooling.DiffStride1D(**{**arguments, 'cropping': False})
    x = noise((1, size, 2), 'float32')
    y = numbers(cropped(x))
    ones = np.ones(size // 2 + 1)
    np.testing.assert_allclose(
        y,
        reference.resample(numbers(masked(x)), 1, y.shape[1], ones, norm),
        atol=1e-5 * max(1, abs(y).max()),
    )


@settings(max_examples=300)
@given(st.integers(1, 70), st.tuples(strides, strides), smoothness, ramps)
def test_output_sizes_never_grow_with_the_stride(size, pair, width, ramp):
    small, large = (
        pooling.DiffStride1D(stride, smoothness_factor=width, ramp=ramp)
        for stride in sorted(pair)
    )
    assert large.present_size(0, size) <= small.present_size(0, size)
    small, large = (pooling.FixedSpectralPooling1D(s) for s in sorted(pair))
    assert large.present_size(0, size) <= small.present_size(0, size)


@settings(max_examples=150)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    norms,
    st.sampled_from(['fft', 'matmul']),
)
def test_resampling_agrees_with_the_reference_up_and_down(
    size, output_size, norm, method
):
    x = noise((2, size, 3), 'float32')
    (y,) = spectral.resample([x], 1, output_size, norm, method)
    ones = np.ones(min(size, output_size) // 2 + 1)
    expected = reference.resample(x, 1, output_size, ones, norm)
    np.testing.assert_allclose(
        numbers(y), expected, atol=1e-5 * abs(expected).max()
    )


BAD_STRIDES = st.one_of(
    st.floats(max_value=1, exclude_max=True),
    st.sampled_from([float('nan'), float('inf'), 'two', None, True, (), 1j]),
    st.lists(strides, min_size=3, max_size=5),
)


@settings(max_examples=150)
@given(
    st.sampled_from(CLASSES[2]),
    st.one_of(BAD_STRIDES, st.tuples(strides, BAD_STRIDES)),
)
def test_bad_strides_are_refused_by_name(cls, value):
    with pytest.raises(ValueError, match='`strides` must be'):
        cls(value)


@settings(max_examples=150)
@given(
    st.one_of(
        st.fixed_dictionaries(
            {
                'smoothness_factor': st.one_of(
                    st.floats(max_value=0),
                    st.sampled_from([float('nan'), float('inf'), '4', None]),
                )
            }
        ),
        st.fixed_dictionaries(
            {
                'lower_limit_stride': st.one_of(
                    st.floats(max_value=1, exclude_max=True),
                    st.sampled_from([float('nan'), float('inf'), '2']),
                )
            }
        ),
        st.fixed_dictionaries(
            {'upper_limit_stride': st.floats(max_value=1, exclude_max=True)}
        ),
        *(
            st.fixed_dictionaries({name: st.text(max_size=12)})
            for name in ('ramp', 'method', 'norm', 'data_format')
        ),
    )
)
def test_bad_arguments_are_refused_by_name(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f'`{name}`.*{name}='):
        pooling.DiffStride(2.0, **arguments)


@settings(max_examples=100)
@given(
    st.sampled_from(CLASSES[2]),
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.sampled_from(['float32', 'int32', 'bool']),
)
def test_bad_inputs_are_refused_by_name(cls, shape, dtype):
    is_allowed = (
        dtype == 'float32' and len(shape) == 4 and shape[1] and shape[2]
    )
    assume(not is_allowed)
    layer = cls(2.0)
    with pytest.raises(ValueError, match=f'"{layer.name}".*Received'):
        layer(ops.zeros(shape, dtype))
