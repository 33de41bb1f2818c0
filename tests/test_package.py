"""The package as a whole: what importing it costs, its names, its examples."""

import ast
import doctest
import inspect
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import diffstride
from diffstride import (
    freezing,
    pooling,
    replacing,
    resizing,
    resnet,
    spectral,
)

PACKAGE = pathlib.Path(diffstride.__file__).parent
MODULES = sorted(PACKAGE.glob('*.py'))


def run(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': str(PACKAGE.parent), **environment},
        cwd='/',
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_import_needs_no_datasets_and_no_example():
    names = run(
        'import sys, diffstride; print(*sys.modules)',
        KERAS_BACKEND=keras.backend.backend(),
    ).split()
    assert 'diffstride.pooling' in names
    for unwanted in ('tensorflow_datasets', 'diffstride.examples'):
        assert unwanted not in names


def imported_at_once(tree):
    """Names of the modules that importing this one imports."""
    nodes = list(ast.iter_child_nodes(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.name)
def test_library_modules_do_not_import_tensorflow(path):
    imported = {
        name.split('.')[0]
        for name in imported_at_once(ast.parse(path.read_text()))
    }
    allowed = {'diffstride', 'gin', 'keras', 'numpy'}
    assert imported <= allowed | set(sys.stdlib_module_names)


def test_public_names_exist():
    for name in diffstride.__all__:
        assert getattr(diffstride, name) is not None
    assert len(set(diffstride.__all__)) == len(diffstride.__all__)


def test_version_is_a_number_of_three_parts():
    assert len([int(part) for part in diffstride.__version__.split('.')]) == 3


def documented(*modules):
    """Public classes and functions of these modules, by name."""
    for module in modules:
        for name, value in vars(module).items():
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if is_code and value.__module__ == module.__name__:
                if not name.startswith('_'):
                    yield name, value


DOCUMENTED = dict(
    documented(freezing, pooling, replacing, resizing, resnet, spectral)
)


@pytest.mark.parametrize('name', DOCUMENTED)
def test_examples_of_docstrings_give_what_they_say(name):
    names = {**DOCUMENTED, 'keras': keras, 'np': np, 'diffstride': diffstride}
    tests = doctest.DocTestFinder(recurse=False).find(
        DOCUMENTED[name], name, globs=names
    )
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, ''.join(report)


@pytest.mark.parametrize('name', diffstride.__all__)
def test_public_layers_have_an_example(name):
    value = getattr(diffstride, name)
    if inspect.isclass(value) and issubclass(value, keras.layers.Layer):
        assert '>>> ' in value.__doc__
        for section in ('Args:', 'Input shape:', 'Output shape:', 'Raises:'):
            assert section in value.__doc__
