"""What holds for every allowed argument and every input."""

import numpy as np
import reference
from backends import DIFFSTRIDES, FIXED, FORMATS, array, dtype_of, image
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from diffstride.ramps import RAMPS
from diffstride.resampling import METHODS, NORMS

# Tensors are made and traced anew in each example; their time says nothing.
settings.register_profile('properties', deadline=None, derandomize=True)
settings.load_profile('properties')

LARGEST = {1: 70, 2: 70, 3: 12}  # The largest sizes, so that inputs are small.
TOLERANCES = {'float32': 1e-5, 'float16': 3e-3, 'bfloat16': 3e-2}

strides = st.one_of(
    st.floats(1, 8, width=32), st.floats(1, 100, width=32), st.just(1.0)
)


@st.composite
def cases(draw):
    """A layer of any rank and an input that it must take."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    learned, fixed = DIFFSTRIDES[rank], FIXED[rank]
    cls = draw(st.sampled_from([learned, learned, fixed]))
    values = draw(st.lists(strides, min_size=rank, max_size=rank))
    choices = {'data_format': FORMATS, 'method': METHODS, 'norm': NORMS}
    choices['dtype'] = list(TOLERANCES)
    if cls is learned:
        choices['ramp'] = RAMPS
        choices |= dict.fromkeys(('shared_stride', 'cropping'), (True, False))
    arguments = {k: draw(st.sampled_from(v)) for k, v in choices.items()}
    if cls is learned:
        values = values[:1] * rank if arguments['shared_stride'] else values
        arguments['cropping'] |= arguments['ramp'] == 'straight_through'
        arguments |= {
            'smoothness_factor': draw(st.floats(0.01, 50)),
            'lower_limit_stride': draw(st.none() | st.floats(1, min(values))),
            'upper_limit_stride': draw(st.none() | st.floats(max(values), 200)),
        }
    layer = cls(values, **arguments)
    size = st.integers(1, LARGEST[rank])
    sizes = draw(st.lists(size, min_size=rank, max_size=rank))
    x = image(sizes, layer.data_format, channels=draw(st.integers(1, 5)))
    return layer, ops.convert_to_tensor(x, layer.compute_dtype)


@settings(max_examples=100)
@given(cases())
def test_allowed_inputs_are_pooled_as_by_the_reference(case):
    layer, x = case
    y = layer(x)
    expected = reference.of_layer(layer, array(x))
    assert dtype_of(y) == layer.compute_dtype
    assert tuple(y.shape) == expected.shape
    # The band edge has a relative error of 1e-7; a steep ramp multiplies it.
    tolerance = TOLERANCES[layer.compute_dtype]
    width = getattr(layer, 'smoothness_factor', 1.0)
    tolerance += 2e-7 * max(x.shape) / width
    scale = max(1e-3, np.abs(expected).max())
    assert np.abs(array(y) - expected).max() <= tolerance * scale
