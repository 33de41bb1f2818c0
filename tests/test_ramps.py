"""Responses and output sizes, against exact arithmetic and by hand."""

import itertools

import numpy as np
import pytest
import reference
from backends import array, gradients, of_unknown_sizes, some
from keras import ops

from diffstride import FixedSpectralPooling
from diffstride.ramps import RAMPS, Ramp

# The size and the gradient of 'straight_through' are those of 'inside'.
KINDS = RAMPS[:2]
SIZES = (*range(1, 66), 224, 1000)
STRIDES = (1, 1.1, 1.25, 1.5, 1.6, 2, 2.2, 3, 3.3, 4, 5, 7, 10, 16, 100)
WIDTHS = (0.5, 1, 2.5, 4, 100)
every_kind = pytest.mark.parametrize('kind', KINDS)


@every_kind
def test_sizes_and_clipped_strides_are_the_exact_ones(kind):
    for case in itertools.product(SIZES, WIDTHS, STRIDES):
        size, width, stride = case
        ramp = Ramp(kind, width)
        exact = reference.clip_stride(stride, size, width, kind)
        clipped = ramp.clip(stride, size)
        assert clipped == pytest.approx(float(exact), rel=1e-12), case
        expected = reference.diffstride_size(size, exact, width, kind)
        # A stride that went through float32 has the same size.
        for value in (stride, float(np.float32(clipped))):
            actual = ramp.output_size(size, ramp.band_edge(size, value))
            assert isinstance(actual, int)
            assert actual == expected, case


def test_fixed_sizes_are_the_exact_ones_of_numbers_and_tensors():
    def sizes_of(size):
        pool = FixedSpectralPooling()
        return [pool.output_size(size, stride=stride) for stride in STRIDES]

    sizes_of_tensor = of_unknown_sizes(sizes_of, ([], 'int32'))
    for size in SIZES:
        expected = [reference.fixed_size(size, stride) for stride in STRIDES]
        assert sizes_of(size) == expected, size
        assert all(isinstance(x, int) for x in sizes_of(size))
        if size in some(SIZES[::3]):
            actual = sizes_of_tensor(ops.convert_to_tensor(size, 'int32'))
            assert list(map(int, actual)) == expected, size


@every_kind
def test_responses_of_tensors_and_numbers_agree_with_reference(kind):
    for size, width, stride in some(
        itertools.product((1, 2, 3, 8, 15, 32, 224), WIDTHS, STRIDES[::5])
    ):
        ramp = Ramp(kind, width)
        exact = reference.clip_stride(stride, size, width, kind)
        output_size = reference.diffstride_size(size, exact, width, kind)
        expected = reference.diffstride_response(
            size, output_size, exact, width, kind
        )
        frequencies = ops.arange(output_size // 2 + 1, dtype='int32')
        edge = ramp.band_edge(size, ops.convert_to_tensor(stride, 'float32'))
        response = array(ramp.weights(frequencies, edge))
        # b has a relative error of 1e-7, in units of the ramp's width.
        ramp_width = min(width, size / (2 * exact))
        tolerance = 2e-7 * max(1, size / float(ramp_width))
        np.testing.assert_allclose(response, expected, rtol=0, atol=tolerance)
        constant = ramp.constant_weights(
            output_size, ramp.band_edge(size, stride)
        )
        np.testing.assert_allclose(constant, expected, rtol=0, atol=1e-12)
        assert response[0] == constant[0] == 1


def slopes_of(ramp, size, output_size, stride):
    """Returns the derivatives of all weights in the stride."""
    frequencies = ops.arange(output_size // 2 + 1, dtype='int32')

    def total(strides):
        return ops.sum(ramp.weights(frequencies, ramp.band_edge(size, strides)))

    strides = ops.full(frequencies.shape, stride, 'float32')
    return array(gradients(total, [strides])[0])


@every_kind
def test_frequencies_hold_every_slope(kind):
    for case in some(itertools.product((1, 2, 15), WIDTHS, STRIDES[::6])):
        size, width, stride = case
        ramp = Ramp(kind, width)
        edge = ramp.band_edge(size, stride)
        output_size = ramp.output_size(size, edge)
        edge = ops.convert_to_tensor(edge, 'float32')
        frequencies = array(ramp.gradient_frequencies(size, output_size, edge))
        assert len(set(frequencies)) == len(frequencies) <= width + 2, case
        assert frequencies.max() <= output_size // 2, case
        slopes = slopes_of(ramp, size, output_size, stride)
        assert set(np.flatnonzero(slopes)) <= set(frequencies), case
