"""What the README shows runs."""

import pathlib
import re

import gin

from diffstride.examples import main  # noqa: F401, registers configurables

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```$', README, re.M | re.S)


def test_python_blocks_run_one_after_the_other(capsys):
    namespace, models = {}, []
    for block in blocks('python'):
        exec(block, namespace)
        models.append(namespace['model'])
    first, compiled, network, with_cost, _ = models
    assert first is compiled and compiled.jit_compile
    assert compiled.output_shape == (None, 10)
    assert 'total' in capsys.readouterr().out  # The table of complexity.
    assert with_cost.model is network


def test_bindings_are_understood():
    for bindings in blocks('gin'):
        gin.parse_config(bindings)
    assert gin.query_parameter('data.load_datasets.name') == 'cifar100'
    assert gin.query_parameter('callbacks.SettleStrides.epoch') == 2
