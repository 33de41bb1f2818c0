"""The package as a whole: imports, names, words, examples, saved models."""

import doctest
import inspect
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from backends import BACKEND, error_of, image, only, output_of, sequential
from keras import layers

import diffstride
from diffstride import costs, freeze, pooling, replace_strides, resnet

PACKAGE = pathlib.Path(diffstride.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(path.stem for path in PACKAGE.glob('[!_]*.py'))
# The examples of other modules are about a model that the reader has.
EXAMPLES = 'blurring costs freezing pooling replacing resizing resnet'.split()


def test_import_needs_no_other_backend_no_datasets_and_no_example():
    modules = ', '.join(f'diffstride.{name}' for name in MODULES)
    code = (
        'import sys, gin, keras, numpy; before = {*sys.modules}; '
        f'import {modules}; print(*({{*sys.modules}} - before))'
    )
    names = output_of('-c', code, cwd='/').split()
    assert 'diffstride.pooling' in names
    assert 'diffstride.examples' not in names
    allowed = {'diffstride', 'keras', BACKEND, *sys.stdlib_module_names}
    assert {name.split('.')[0] for name in names} <= allowed


@only('tensorflow', 'the wheel is the same')
def test_wheel_holds_the_package_alone_and_asks_for_no_backend(tmp_path):
    for name in ('LICENSE', 'README.md', 'pyproject.toml'):
        shutil.copy(ROOT / name, tmp_path)
    for name in ('diffstride', 'tests'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    command = 'pip wheel --quiet --no-deps --no-build-isolation .'.split()
    subprocess.run([sys.executable, '-m', *command], cwd=tmp_path, check=True)
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'diffstride').rglob('*')
        if path.suffix in ('.py', '.gin') or path.name == 'py.typed'
    }
    assert re.fullmatch(r'\d+\.\d+\.\d+', diffstride.__version__)
    folder = f'diffstride-{diffstride.__version__}.dist-info'
    (path,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = archive.read(f'{folder}/METADATA').decode()
    found = {name for name in names if not name.startswith(folder)}
    assert found == expected
    assert f'{folder}/licenses/LICENSE' in names
    assert 'diffstride/py.typed' in found
    needed = re.findall(r'^Requires-Dist: ([\w-]+)(?!.*extra)', metadata, re.M)
    assert needed == ['gin-config', 'keras', 'numpy']
    extras = re.findall('^Provides-Extra: (.+)$', metadata, re.M)
    assert {'tensorflow', 'jax', 'torch', 'train', 'export'} <= set(extras)


# The public classes and functions of some modules, by name.
DOCUMENTED = {
    name: value
    for module in map(vars(diffstride).get, EXAMPLES)
    for name, value in vars(module).items()
    if (inspect.isclass(value) or inspect.isfunction(value))
    and value.__module__ == module.__name__
    and not name.startswith('_')
}


@pytest.mark.parametrize(
    'name', [name for name in DOCUMENTED if '>>> ' in DOCUMENTED[name].__doc__]
)
def test_examples_of_docstrings_give_what_they_say(name):
    names = {**DOCUMENTED, 'keras': keras, 'np': np, 'diffstride': diffstride}
    report = []
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(DOCUMENTED[name], name, globs=names):
        runner.run(test, out=report.append)
    assert not runner.failures, ''.join(report)


def test_public_layers_have_an_example_and_all_sections():
    public = [getattr(diffstride, name) for name in diffstride.__all__]
    found = [x for x in public if isinstance(x, type)]
    found = [x for x in found if issubclass(x, layers.Layer)]
    assert len(found) >= 8
    for layer in found:
        assert '>>> ' in layer.__doc__, layer
        if layer.__name__[-2:] not in ('1D', '3D'):  # They refer to 2-D.
            for section in ('Args', 'Input shape', 'Output shape', 'Raises'):
                assert f'{section}:\n' in layer.__doc__, layer


SHAPE = (12, 12, 2)


def regularized():
    cost = costs.StrideCost(0.1)
    pool = pooling.DiffStride(2.0, 1.0, strides_regularizer=cost)
    return sequential(SHAPE, pool)


def network():
    kwargs = {'pooling_cls': pooling.DiffStride, 'stride_cost': 0.1}
    model = resnet.Resnet([2, 3], [1, 2], 3, **kwargs)
    model.build((None, 12, 12, 2))
    return model


def replaced():
    convolution = layers.Conv2D(3, 3, 2, padding='same')
    mean = layers.GlobalAveragePooling2D()
    return freeze(replace_strides(sequential(SHAPE, convolution, mean)))


# Other tests save each pooling layer and each of its states.
@pytest.mark.parametrize('make', [regularized, network, replaced])
def test_models_are_saved_without_code_and_load_in_safe_mode(make, tmp_path):
    model = make()
    x = image((12, 12))
    path = tmp_path / 'model.keras'
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        kinds = {'metadata.json', 'config.json', 'model.weights.h5'}
        assert set(archive.namelist()) == kinds
        config = archive.read('config.json').decode()
    assert '__lambda__' not in config and 'Lambda' not in config
    loaded = keras.models.load_model(path, safe_mode=True)
    assert error_of(loaded(x), model(x)) <= 1e-6
    losses = [float(sum(each.losses)) for each in (loaded, model)]
    assert losses[0] == pytest.approx(losses[1])


CODE = {'code': '4wAA', 'defaults': None, 'closure': None}
LAMBDA = {'class_name': '__lambda__', 'config': CODE}


def object_config(*values):
    keys = 'module', 'class_name', 'config', 'registered_name'
    return dict(zip(keys, (*values, None)))


STRANGE = {
    'lambda': LAMBDA,
    'Lambda': object_config('keras.layers', 'Lambda', {'function': LAMBDA}),
    **{
        f'{module}.{name}': object_config(module, 'function', name, 'function')
        for module, name in (
            ('builtins', 'eval'),
            ('os', 'system'),
            ('stranger', 'called'),
            ('keras.utils', 'get_file'),
            ('keras.src.utils.file_utils', 'get_file'),
            ('diffstride.freezing', 'freeze'),
        )
    },
    'stranger': object_config('stranger', 'Called', {}),
    'Popen': object_config('subprocess', 'Popen', {'args': ['false']}),
    'SGD': object_config('keras.optimizers', 'SGD', {}),
    'a string': 'eval',
    'a number': 3,
}


OWNERS = {
    'pooling_cls': resnet.ResidualLayer(2, 3, 2, pooling.DiffStride, True),
    'strides_regularizer': pooling.DiffStride(2.0, strides_regularizer='l1'),
}


@pytest.mark.parametrize('strange', STRANGE)
@pytest.mark.parametrize('key', OWNERS)
def test_no_configuration_calls_what_a_stranger_names(
    tmp_path, monkeypatch, key, strange
):
    """Nor imports it, which would leave a file."""
    (tmp_path / 'stranger.py').write_text(
        f'open({str(tmp_path / "imported")!r}, "w")\n'
        'def called(*args, **kwargs): pass\n'
        'class Called: __init__ = from_config = called\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {**OWNERS[key].get_config(), key: STRANGE[strange]}
    with pytest.raises((ValueError, TypeError, AttributeError)):
        type(OWNERS[key]).from_config(config)
    assert 'stranger' not in sys.modules
    assert not (tmp_path / 'imported').exists()
