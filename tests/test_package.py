"""The package as a whole: imports, names, words, examples, saved models."""

import ast
import doctest
import importlib
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize
import zipfile

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    array,
    environment,
    error_of,
    image,
    output_of,
    sequential,
)
from keras import layers

import diffstride
from diffstride import costs, freeze, pooling, replace_strides, resnet

PACKAGE = pathlib.Path(diffstride.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(path.stem for path in PACKAGE.glob('*.py'))
# The examples of other modules are about a model that the reader has.
WITH_EXAMPLES = (
    'blurring costs freezing pooling replacing resizing resnet'.split()
)


def test_import_needs_no_datasets_and_no_example():
    code = 'import sys, diffstride; print(*sys.modules)'
    env = environment(KERAS_BACKEND=BACKEND)
    names = output_of('-c', code, env=env, cwd='/').split()
    assert 'diffstride.pooling' in names
    for unwanted in ('tensorflow_datasets', 'diffstride.examples'):
        assert unwanted not in names
    assert BACKEND == 'tensorflow' or 'tensorflow' not in names


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The names of the files in a wheel, and its metadata."""
    copy = tmp_path_factory.mktemp('sources')
    for name in ('LICENSE', 'README.md', 'pyproject.toml'):
        shutil.copy(ROOT / name, copy)
    for name in ('diffstride', 'tests'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    command = 'pip wheel --quiet --no-deps --no-build-isolation .'
    subprocess.run(
        [sys.executable, '-m', *command.split()], cwd=copy, check=True
    )
    (path,) = copy.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = [x for x in names if x.endswith('/METADATA')]
        return names, archive.read(metadata).decode()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'diffstride').rglob('*')
        if path.suffix in ('.py', '.gin') or path.name == 'py.typed'
    }
    folder = f'diffstride-{diffstride.__version__}.dist-info'
    found = {name for name in wheel[0] if not name.startswith(folder)}
    assert found == expected
    assert f'{folder}/licenses/LICENSE' in wheel[0]
    assert 'diffstride/py.typed' in found
    assert any(name.endswith('quickstart.gin') for name in found)


def test_wheel_asks_for_no_backend_of_keras(wheel):
    needed = re.findall(r'^Requires-Dist: ([\w-]+)(?!.*extra)', wheel[1], re.M)
    assert needed == ['gin-config', 'keras', 'numpy']
    extras = re.findall('^Provides-Extra: (.+)$', wheel[1], re.M)
    assert {'tensorflow', 'jax', 'torch', 'train', 'export'} <= set(extras)


def imported_at_once(tree):
    """Yields the names of the modules that importing this one imports."""
    nodes = list(ast.iter_child_nodes(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)


def test_library_modules_import_no_backend_at_once():
    allowed = {'diffstride', 'gin', 'keras', 'numpy', *sys.stdlib_module_names}
    for name in MODULES:
        tree = ast.parse((PACKAGE / f'{name}.py').read_text())
        imported = {each.split('.')[0] for each in imported_at_once(tree)}
        assert imported <= allowed, name


def test_the_version_is_three_integers():
    assert re.fullmatch(r'\d+\.\d+\.\d+', diffstride.__version__)


def comments(path):
    """Yields the comments of a file, each with the number of its line."""
    with tokenize.open(path) as file:
        if path.suffix == '.py':
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.string
        else:
            for number, line in enumerate(file, 1):
                yield number, line[line.find('#') :] if '#' in line else ''


def test_comments_begin_like_sentences():
    riddle = re.compile(r'#+ *(As|Not|Of|What|Which|Whose) ')
    paths = [
        path
        for folder in ('benchmarks', 'diffstride', 'docs', 'tests')
        for path in (ROOT / folder).rglob('*')
        if path.suffix in ('.py', '.gin')
    ]
    assert len(paths) > 60
    for path in paths:
        for number, text in comments(path):
            assert not riddle.match(text), f'{path}:{number}: {text}'


def signatures(name, value):
    """Yields the public callables of a name, by their qualified names."""
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if isinstance(member, (classmethod, staticmethod)):
                member = member.__func__
            member = getattr(member, 'fget', member)
            is_public = key == '__init__' or not key.startswith('_')
            if inspect.isfunction(member) and is_public:
                yield f'{name}.{key}', member
    elif inspect.isfunction(value):
        yield name, value


def public_values():
    """Yields the public names with their values, also those of modules."""
    for name in diffstride.__all__:
        value = getattr(diffstride, name)
        if inspect.ismodule(value):
            for key, member in vars(value).items():
                if getattr(member, '__module__', '') == value.__name__:
                    if not key.startswith('_'):
                        yield f'{name}.{key}', member
        else:
            yield name, value


def test_public_functions_have_type_hints():
    found = 0
    for name, value in public_values():
        for label, function in signatures(name, value):
            found += 1
            signature = inspect.signature(inspect.unwrap(function))
            hinted = [
                parameter.annotation is not inspect.Parameter.empty
                for key, parameter in signature.parameters.items()
                if key not in ('self', 'cls')
            ]
            assert all(hinted), label
            returns = signature.return_annotation
            is_constructor = label.endswith('.__init__')
            assert is_constructor or returns is not signature.empty, label
    assert found > 60


def documented():
    """Yields the public classes and functions of some modules, by name."""
    for name in WITH_EXAMPLES:
        module = importlib.import_module(f'diffstride.{name}')
        for name, value in vars(module).items():
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if is_code and value.__module__ == module.__name__:
                if not name.startswith('_'):
                    yield name, value


DOCUMENTED = dict(documented())


@pytest.mark.parametrize(
    'name', [name for name in DOCUMENTED if '>>> ' in DOCUMENTED[name].__doc__]
)
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


def test_public_layers_have_an_example_and_all_sections():
    found = 0
    for name in diffstride.__all__:
        value = getattr(diffstride, name)
        if inspect.isclass(value) and issubclass(value, layers.Layer):
            found += 1
            assert '>>> ' in value.__doc__, name
            if name[-2:] in ('1D', '3D'):  # They refer to the layer of 2-D.
                continue
            for section in ('Args', 'Input shape', 'Output shape', 'Raises'):
                assert f'{section}:\n' in value.__doc__, name
    assert found >= 8


# Models are loaded in safe mode, which is Keras's default.


SHAPE = (12, 12, 2)


def network():
    model = resnet.Resnet(
        [2, 3], [1, 2], 3, pooling_cls=pooling.DiffStride, stride_cost=0.1
    )
    model.build((None, 12, 12, 2))
    return model


def strided():
    convolution = layers.Conv2D(3, 3, 2, padding='same')
    return sequential(SHAPE, convolution, layers.GlobalAveragePooling2D())


# Other tests save each pooling layer and each of its states.
SAVED = {
    'DiffStride': lambda: sequential(
        SHAPE,
        pooling.DiffStride(2.0, 1.0, strides_regularizer=costs.StrideCost(0.1)),
    ),
    'Resnet': network,
    'freeze': lambda: freeze(network()),
    'replace_strides': lambda: freeze(replace_strides(strided())),
}


@pytest.mark.parametrize('name', SAVED)
def test_models_are_saved_without_code_and_load_in_safe_mode(name, tmp_path):
    model = SAVED[name]()
    x = image((12, 12))
    path = tmp_path / 'model.keras'
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        kinds = {'metadata.json', 'config.json', 'model.weights.h5'}
        assert set(archive.namelist()) == kinds
        config = archive.read('config.json').decode()
    assert '__lambda__' not in config and 'Lambda' not in config
    loaded = keras.models.load_model(path, safe_mode=True)
    assert error_of(loaded(x), array(model(x))) <= 1e-6


LAMBDA = {
    'class_name': '__lambda__',
    'config': {'code': '4wAA', 'defaults': None, 'closure': None},
}


def object_config(module, class_name, config, registered_name=None):
    return {
        'module': module,
        'class_name': class_name,
        'config': config,
        'registered_name': registered_name,
    }


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


@pytest.fixture(scope='module')
def members(tmp_path_factory):
    """The members of a saved model that has objects in its configuration."""
    path = tmp_path_factory.mktemp('saved') / 'model.keras'
    sequential(
        SHAPE,
        resnet.ResidualLayer(
            2, strides=2, pooling_cls=pooling.DiffStride, project=True
        ),
        pooling.DiffStride(2.0, strides_regularizer='l1'),
    ).save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edit(config, owner, key, value):
    """Sets an entry in the configurations of all objects of a class."""
    if isinstance(config, dict):
        if config.get('class_name') == owner:
            config['config'][key] = value
        config = list(config.values())
    if isinstance(config, list):
        for inner in config:
            edit(inner, owner, key, value)


@pytest.mark.parametrize('strange', STRANGE)
@pytest.mark.parametrize(
    'owner, key',
    [('ResidualLayer', 'pooling_cls'), ('DiffStride', 'strides_regularizer')],
)
def test_no_configuration_calls_what_a_stranger_names(
    tmp_path, monkeypatch, members, owner, key, strange
):
    """Nor imports it: the module leaves a file where it is imported."""
    (tmp_path / 'stranger.py').write_text(
        f'open({str(tmp_path / "imported")!r}, "w")\n'
        f'def called(*args, **kwargs): open({str(tmp_path / "called")!r}, "w")'
        '\nclass Called: __init__ = from_config = called\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads(members['config.json'])
    edit(config, owner, key, STRANGE[strange])
    assert config != json.loads(members['config.json'])
    with zipfile.ZipFile(tmp_path / 'model.keras', 'w') as archive:
        edited = {**members, 'config.json': json.dumps(config)}
        for name, content in edited.items():
            archive.writestr(name, content)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        keras.models.load_model(tmp_path / 'model.keras')
    assert 'stranger' not in sys.modules
    assert not (tmp_path / 'imported').exists()
    assert not (tmp_path / 'called').exists()
