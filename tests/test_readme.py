"""What the README shows runs."""

import pathlib
import re

import gin

from diffstride.examples import main  # noqa: F401, registers configurables

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```$', README, re.M | re.S)


def test_python_blocks_run_one_after_the_other():
    namespace = {}
    for block in blocks('python'):
        exec(block, namespace)
    model = namespace['model']
    assert model.output_shape == (None, 10)
    assert model.jit_compile


def test_bindings_are_understood():
    (bindings,) = blocks('gin')
    gin.parse_config(bindings)
    assert gin.query_parameter('data.load_datasets.name') == 'cifar100'
