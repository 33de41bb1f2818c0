"""The package as a whole: what importing it costs, its names, its examples."""

import ast
import doctest
import functools
import inspect
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import diffstride
from diffstride import (
    freezing,
    pooling,
    regularizers,
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


# Models that are loaded in safe mode, which is Keras's default.


def small(*layers, shape=(12, 12, 2)):
    return keras.Sequential([keras.Input(shape), *layers])


def network(pooling_cls, **kwargs):
    model = resnet.Resnet([2, 3], [1, 2], 3, pooling_cls=pooling_cls, **kwargs)
    model.build((None, 12, 12, 2))
    return model


def resized():
    inputs = keras.Input((12, 12, 2))
    pooled = diffstride.DiffStride((2.0, 3.0), 1.0)(inputs)
    outputs = diffstride.SpectralResizing()([pooled, inputs])
    return keras.Model(inputs, outputs)


def settled():
    layer = diffstride.DiffStride(2.0, 1.0)
    layer.settle()
    return small(layer)


def strided():
    convolution = keras.layers.Conv2D(3, 3, 2, padding='same')
    return small(convolution, keras.layers.GlobalAveragePooling2D())


SAVED = {
    'DiffStride': lambda: small(
        diffstride.DiffStride(
            2.0,
            1.0,
            shared_stride=True,
            lower_limit_stride=1.5,
            upper_limit_stride=3.0,
            strides_regularizer=regularizers.StrideCost(0.1),
        )
    ),
    'DiffStride, settled': settled,
    'DiffStride, L2': lambda: small(
        diffstride.DiffStride(2.0, strides_regularizer='l2')
    ),
    'DiffStride1D': lambda: small(pooling.DiffStride1D(2.0), shape=(12, 2)),
    'DiffStride3D': lambda: small(
        pooling.DiffStride3D(2.0, 1.0), shape=(4, 6, 6, 2)
    ),
    'FixedSpectralPooling': lambda: small(
        pooling.FixedSpectralPooling((2.0, 1.5))
    ),
    'FixedSpectralPooling1D': lambda: small(
        pooling.FixedSpectralPooling1D(1.5), shape=(12, 2)
    ),
    'FixedSpectralPooling3D': lambda: small(
        pooling.FixedSpectralPooling3D(1.5), shape=(4, 6, 6, 2)
    ),
    'SpatialPooling': lambda: small(pooling.SpatialPooling(2, 3)),
    'SpectralResizing': lambda: small(resizing.SpectralResizing((20, 7))),
    'SpectralResizing of two': resized,
    'ResidualLayer': lambda: small(
        resnet.ResidualLayer(
            3, strides=2, pooling_cls=diffstride.DiffStride, project=True
        )
    ),
    **{
        f'Resnet of {getattr(cls, "__name__", cls)}': functools.partial(
            network, cls
        )
        for cls in (
            None,
            pooling.DiffStride,
            pooling.FixedSpectralPooling,
            pooling.SpatialPooling,
            keras.layers.AveragePooling2D,
        )
    },
    'ActivationCost': lambda: network(pooling.DiffStride, stride_cost=0.1),
    'MacsCost': lambda: network(
        pooling.DiffStride,
        stride_cost=regularizers.MacsCost(1e3, input_shape=(12, 12, 2)),
    ),
    'freeze': lambda: freezing.freeze(network(pooling.DiffStride)),
    'freeze, fixed': lambda: freezing.freeze(
        network(pooling.FixedSpectralPooling)
    ),
    'replace_strides': lambda: replacing.replace_strides(strided()),
    'replace_strides, frozen': lambda: freezing.freeze(
        replacing.replace_strides(strided())
    ),
}


@pytest.mark.parametrize('name', SAVED)
def test_models_are_saved_without_code_and_load_in_safe_mode(name, tmp_path):
    model = SAVED[name]()
    shape = getattr(model, 'input_shape', None) or (None, 12, 12, 2)
    images = np.random.default_rng(0).normal(size=(2, *shape[1:]))
    images = images.astype('float32')
    before = keras.ops.convert_to_numpy(model(images))
    path = tmp_path / 'model.keras'
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        kinds = {'metadata.json', 'config.json', 'model.weights.h5'}
        assert set(archive.namelist()) == kinds
        config = archive.read('config.json').decode()
    assert '__lambda__' not in config and 'Lambda' not in config
    loaded = keras.models.load_model(path, safe_mode=True)
    after = keras.ops.convert_to_numpy(loaded(images))
    np.testing.assert_allclose(before, after, rtol=1e-6, atol=1e-6)


def edited(model, path, edit):
    """Saves a model in whose configuration a stranger edited some objects."""
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def visit(config):
        if isinstance(config, dict):
            edit(config)
            config = list(config.values())
        if isinstance(config, list):
            for value in config:
                visit(value)

    config = json.loads(members['config.json'])
    visit(config)
    members['config.json'] = json.dumps(config)
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_lambda_beside_our_layers_is_refused(tmp_path):
    model = small(
        diffstride.DiffStride(2.0),
        keras.layers.Lambda(lambda x: x, output_shape=(None, None, 2)),
    )
    model.save(tmp_path / 'model.keras')
    with pytest.raises(ValueError, match='arbitrary code execution'):
        keras.models.load_model(tmp_path / 'model.keras')


LAMBDA = {
    'class_name': '__lambda__',
    'config': {'code': '4wAA', 'defaults': None, 'closure': None},
}
STRANGE = {
    'lambda': LAMBDA,
    'Lambda': {
        'module': 'keras.layers',
        'class_name': 'Lambda',
        'config': {'function': LAMBDA},
        'registered_name': None,
    },
    **{
        f'{module}.{name}': {
            'module': module,
            'class_name': 'function',
            'config': name,
            'registered_name': 'function',
        }
        for module, name in (
            ('builtins', 'eval'),
            ('os', 'system'),
            ('stranger', 'called'),
            ('keras.utils', 'get_file'),
            ('keras.src.utils.file_utils', 'get_file'),
            ('diffstride.freezing', 'freeze'),
        )
    },
    'stranger': {
        'module': 'stranger',
        'class_name': 'Called',
        'config': {},
        'registered_name': None,
    },
    'Popen': {
        'module': 'subprocess',
        'class_name': 'Popen',
        'config': {'args': ['false']},
        'registered_name': None,
    },
    'SGD': {
        'module': 'keras.optimizers',
        'class_name': 'SGD',
        'config': {},
        'registered_name': None,
    },
    'a string': 'eval',
    'a number': 3,
}


@pytest.mark.parametrize('strange', STRANGE)
@pytest.mark.parametrize(
    'owner, key',
    [
        ('ResidualLayer', 'pooling_cls'),
        ('StrideCostModel', 'model'),
        ('StrideCostModel', 'stride_cost'),
        ('DiffStride', 'strides_regularizer'),
    ],
)
def test_no_configuration_calls_what_a_stranger_names(
    tmp_path, monkeypatch, owner, key, strange
):
    """Nor imports it: the module leaves a file where it is imported."""
    (tmp_path / 'stranger.py').write_text(
        f'open({str(tmp_path / "imported")!r}, "w")\n'
        f'def called(*args, **kwargs): open({str(tmp_path / "called")!r}, "w")'
        '\nclass Called: __init__ = from_config = called\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = network(pooling.DiffStride, stride_cost=0.1)

    def edit(config):
        if config.get('class_name') == owner:
            config['config'][key] = STRANGE[strange]

    edited(model, tmp_path / 'model.keras', edit)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        keras.models.load_model(tmp_path / 'model.keras')
    assert 'stranger' not in sys.modules
    assert not (tmp_path / 'imported').exists()
    assert not (tmp_path / 'called').exists()
