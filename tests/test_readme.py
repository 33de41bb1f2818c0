"""What the README shows runs."""

import pathlib
import re

import gin
import numpy as np
import pytest

from diffstride import pooling
from diffstride.examples import main  # noqa: F401, registers configurables

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
EXPORT = (ROOT / 'diffstride/examples/export.py').read_text()


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```$', README, re.M | re.S)


def test_python_blocks_run_one_after_the_other(capsys):
    namespace, after = {}, []
    for block in blocks('python'):
        if block in EXPORT:  # Run by its own test, as it takes long.
            continue
        exec(block, namespace)
        after.append(dict(namespace))
    first, compiled, ranks, resized, replaced, network, with_cost, _ = after
    assert first['model'] is compiled['model']
    assert compiled['model'].jit_compile
    assert compiled['model'].output_shape == (None, 10)
    assert ranks['pooled'].shape == (2, 16, 32, 32, 3)
    assert resized['back'].shape == (None, 32, 32, 8)
    assert resized['enlarged'].shape == (1, 48, 20, 8)
    assert pooling.diffstride_layers(replaced['learned'])
    assert 'total' in capsys.readouterr().out  # The table of complexity.
    assert with_cost['model'].model is network['model']
    assert len(blocks('python')) == len(after) + 1


def test_bindings_are_understood():
    for bindings in blocks('gin'):
        gin.parse_config(bindings)
    assert gin.query_parameter('data.load_datasets.name') == 'cifar100'
    assert gin.query_parameter('callbacks.SettleStrides.epoch') == 1


@pytest.mark.slow
@pytest.mark.filterwarnings(
    # `np.object`, which Keras looks for on behalf of tf2onnx.
    'ignore:In the future `np.object` will be defined:FutureWarning'
)
def test_lines_that_export_resnet18_to_onnx_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(EXPORT, namespace)
    assert (tmp_path / 'resnet18.onnx').stat().st_size > 4 * 11e6
    assert namespace['logits'].shape == (5, 10)
    images = np.random.default_rng(0).normal(size=(5, 32, 32, 3))
    (actual,) = namespace['session'].run(
        None, {namespace['name']: images.astype('float32')}
    )
    expected = np.asarray(namespace['model'](images))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
