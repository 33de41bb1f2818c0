"""Settings by gin: this parses them, compares them, and finds idle ones.

The text of all settings in effect is a gin file that parses on its own.
"""

import contextlib
import difflib
import pathlib
import re
import tokenize
from collections.abc import Iterator

import gin
from gin import config, config_parser

from diffstride.examples.checkpoints import first_line

_PACKAGED = pathlib.Path(__file__).parent
# A training cannot go on with other values of these, whatever its user allows.
_FINAL = re.compile(
    r'train\.(load_data_fn|model_cls|optimizer_cls|strides_from)'
    # Averages of weights that begin later would begin at 0.
    r'|.*\.(use_ema|strides)'
)
# Keys of the bindings of the last call of `parse`, by where they stood.
_bound: dict[str, set] = {'command': set(), 'files': set()}
# These have no effect on the result of a training.
_FREE = {
    'audio.load_datasets.data_dir',
    'data.load_datasets.cache',
    'data.load_datasets.data_dir',
    'main.run.job',
    'train.labels',
    'train.num_epochs',
    'train.on_changed_settings',
    'train.workdir',
}


def parse(files: list[str], bindings: list[str]) -> None:
    """Parses gin files, then bindings, which override those of the files.

    Raises:
        ValueError: If one is wrong. The message names the file and the line.
    """
    for keys in _bound.values():
        keys.clear()
    gin.add_config_file_search_path(str(_PACKAGED))  # Includes need it.
    gin.parse_config('import diffstride.examples.external_configurables')
    for name in files:
        path = pathlib.Path(name)
        if not path.exists():
            path = _PACKAGED / name
        if not path.exists():
            known = sorted(file.name for file in _PACKAGED.glob('*.gin'))
            raise ValueError(
                f'--gin_config must be a gin file, or one of {known}. '
                f'Received: {name!r}'
            )
        with naming(name):
            gin.parse_config_file(str(path))
        if path.parent != _PACKAGED:
            _bound['files'].update(_bindings_in(path.read_text()))
    text = '\n'.join(bindings)
    with naming('--gin_bindings', text):
        gin.parse_config(text)
    gin.finalize()
    _bound['command'].update(_bindings_in(text))


@contextlib.contextmanager
def naming(source: str, text: str = '') -> Iterator[None]:
    """Turns errors of gin within into a ValueError that names the source."""
    try:
        yield
    except SyntaxError as error:
        number = error.lineno or 1
        line = error.text or text.splitlines()[number - 1]
        raise ValueError(
            f'{error.filename or source}, line {number}: '
            f'{first_line(error.msg)} Received: {line.strip()}'
        ) from error
    except tokenize.TokenError as error:
        raise ValueError(
            f'{source}: {error.args[0]}. Received: {text.splitlines()[-1:]}'
        ) from error
    except Exception as error:  # An imported module may raise any error.
        words = ' '.join(str(error).split()).removesuffix(' ^')
        if 'augment_fn' in words:  # The 2022 release had it.
            words += '; data.load_datasets.flip and crop_padding replace it'
        if 'No configurable matching' in words:
            words += (
                '; to add your own, decorate it with @gin.register in a module '
                'and `import` that module in the gin file'
            )
        raise ValueError(f'{source}: {words}') from error


class _Verbatim(config_parser.ParserDelegate):
    """Returns references and macros as they are written."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f'@{scoped_configurable_name}{"()" if evaluate else ""}'

    def macro(self, macro_name):
        return f'%{macro_name}'


def _bindings_in(text):
    """Returns {((scope, selector), parameter): value} of a gin text."""
    found = {}
    for line in config_parser.ConfigParser(text, _Verbatim()):
        if isinstance(line, config_parser.BindingStatement):
            key = line.scope, line.selector, line.arg_name
            if not line.arg_name:  # It is a macro.
                macro = '/'.join(filter(None, key[:2]))
                key = macro, 'gin.macro', 'value'
            with contextlib.suppress(ValueError):  # Nothing has this name now.
                key = config.ParsedBindingKey.parse(key)
                found[key.config_key, key.arg_name] = line.value
    return found


def _name(key):
    """Returns the name of a setting as users write it."""
    (scope, selector), parameter = key
    if selector == 'gin.macro':
        return scope
    name = f'{selector.removeprefix("tf.")}.{parameter}'
    # A module and its function may have one name: train.train, grid.grid.
    name = re.sub(r'^(\w+)\.\1\.', r'\1.', name)
    return f'{scope}/{name}' if scope else name


def check_reach() -> None:
    """Raises a ValueError if bindings of the command have no effect.

    The message names them, and those that were probably meant. It prints those
    of the user's files, and allows those of packaged files. It must be called
    after all objects that settings configure have been made.
    """
    operative = {
        ((scope, selector), parameter)
        for (scopes, selector), parameters in config._OPERATIVE_CONFIG.items()
        for scope in _outer(scopes)
        for parameter in parameters
    }
    told = sorted(_bound['files'] - _bound['command'] - operative)
    if told:
        names = ', '.join(map(_name, told))
        print(f'note: settings without effect in this job: {names}', flush=True)
    wrong = sorted(_bound['command'] - operative)
    if wrong:
        lines = [_without_effect(key, operative) for key in wrong]
        raise ValueError('; '.join(lines))


def _without_effect(key, operative):
    (_, selector), parameter = key
    line = f'{_name(key)} has no effect'
    if selector in {selector for (_, selector), _ in operative}:
        line += f', since {parameter} is set by what calls {selector}'
    elif selector != 'gin.macro':
        line += f', since {selector} is not used in this job'
    names = {_name(other) for other in operative}
    same = [name for name in names if name.endswith(f'.{parameter}')]
    for name in difflib.get_close_matches(
        _name(key), same or names, 1, cutoff=0.0 if same else 0.6
    ):
        line += f': did you mean {name}?'
    return line


def _outer(scopes):
    """Returns a scope and the outer scopes, whose bindings it inherits."""
    parts = scopes.split('/')
    return {'', *('/'.join(parts[: i + 1]) for i in range(len(parts)))}


def changes(before: str, after: str) -> tuple[list[str], bool]:
    """Returns a line for each setting that differs between two texts.

    It also returns whether a training can go on with the settings after.
    """
    old, new = _bindings_in(before), _bindings_in(after)
    changed = [
        key
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and _name(key) not in _FREE
    ]
    # Settings that come or go with those in both texts say nothing more.
    changed = [key for key in changed if key in old and key in new] or changed
    lines = [
        f'{_name(key)} was {old.get(key)!r} and is {new.get(key)!r}'
        for key in changed
    ]
    return lines, not any(_FINAL.fullmatch(_name(key)) for key in changed)
