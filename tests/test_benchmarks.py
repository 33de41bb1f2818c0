"""What the benchmarks compare is the same, and their commands run."""

import json
import pathlib
import runpy

import numpy as np
import pytest
import tensorflow as tf

from diffstride import DiffStride, resnet

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.mark.parametrize(
    'shape, data_format',
    [((2, 16, 16, 3), 'channels_last'), ((2, 2, 7, 12), 'channels_first')],
)
def test_the_textbook_computes_the_same(harness, shape, data_format):
    x = tf.constant(np.random.default_rng(0).normal(size=shape), 'float32')
    results, kwargs = [], {'smoothness_factor': 2, 'data_format': data_format}
    for cls in (DiffStride, harness.TextbookPooling):
        # A ramp that ends below the highest frequency kept, of which the
        # textbook takes one sign alone.
        layer = cls(2.2, **kwargs)
        y = harness.forward(layer)(x)
        step = harness.forward_and_backward(layer)
        again, gradients = step(x, tf.cos(y))
        np.testing.assert_array_equal(y, again)
        results.append([y, *gradients])
    for ours, textbook in zip(*results):
        np.testing.assert_allclose(ours, textbook, rtol=1e-4, atol=1e-4)
    # The sizes are all that this one has in common.
    assert harness.FreePooling(2.2, **kwargs)(x).shape == y.shape


def test_ratio_is_that_of_medians_with_quartiles(harness):
    seconds = {'a': np.array([2.0, 4.0, 6.0]), 'b': np.array([1.0, 1.0, 2.0])}
    assert harness.ratio(seconds, 'a', 'b') == (4.0, 2.5, 3.5)


def test_peak_of_live_bytes_is_measured(harness):
    x = tf.zeros((1024, 1024))
    step = tf.function(lambda: tf.sort(x + 1))
    step()
    peak = harness.peak_bytes(step)
    if peak is None:
        pytest.skip('The allocator of this processor keeps no account.')
    assert x.shape.num_elements() * 4 <= peak < 100e6


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Gradients do not exist.*free_pooling')
@pytest.mark.parametrize(
    'script, flags, rows',
    [
        ('pooling.py', '--sizes 7 --dtypes bfloat16 --formats channels_last',
         '| auto'),
        ('training.py', '--cases 2,4,12', '| DiffStride, XLA |'),
    ],
)  # fmt: skip
def test_command_tables(harness, script, flags, rows, monkeypatch, tmp_path):
    def small(width, **kwargs):
        return resnet.Resnet([width], '2', num_layers=1, **kwargs)

    monkeypatch.setattr(resnet, 'resnet18', small)
    out = tmp_path / 'results'
    options = [*flags.split(), '--rounds=1', f'--out={out}']
    monkeypatch.setattr('sys.argv', [script, *options])
    runpy.run_path(str(BENCHMARKS / script), run_name='__main__')
    results = json.loads(out.with_suffix('.json').read_text())
    assert results['rounds'] == 1 and results['rows']
    assert rows in out.with_suffix('.md').read_text()
