r"""Trains an image classifier as gin files and bindings say.

    python3 -m diffstride.examples.main --gin_config=cifar10.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/resnet18/'"

A gin file is looked up as it is written, then among the packaged ones.
"""

import contextlib
import inspect
import pathlib
import sys
import tokenize
import traceback

import gin
from absl import app, flags, logging

from diffstride import resnet
from diffstride.examples import (
    checkpoints,
    external_configurables,  # noqa: F401
    train,
)

_CONFIG = flags.DEFINE_multi_string(
    'gin_config', [], 'A gin file: a path, or the name of a packaged one.'
)
_BINDINGS = flags.DEFINE_multi_string(
    'gin_bindings', [], 'Gin bindings, which override those of the files.'
)


@gin.configurable(module='main')
def run(job=None):
    """Returns what the gin file asks for, such as `@train.compare`, or None."""
    return job


def main(argv, default_job=train.train):
    """Parses gin and runs; ends with code 1 and one line if that fails."""
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments: {argv[1:]}')
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)
    packaged = pathlib.Path(__file__).parent
    gin.add_config_file_search_path(str(packaged))  # For include statements.
    files = [
        name if pathlib.Path(name).exists() else str(packaged / name)
        for name in _CONFIG.value
    ]
    try:
        with train.setup_errors():
            _parse(files, _BINDINGS.value)
            job = run()
            job = resnet.configured(default_job) if job is None else job
            if not callable(job):
                raise ValueError(
                    'run.job must be a function, such as @train.compare. '
                    f'Received: {job!r}'
                )
        with _errors_before(job):
            job()
    except (train.SetupError, checkpoints.WriteError) as error:
        sys.exit(f'error: {checkpoints.first_line(error)}')


def _parse(files, bindings):
    """Parses gin; errors name the file, or the binding, and its line."""
    bindings = '\n'.join(bindings)
    for name in files:
        with _naming(name):
            gin.parse_config_file(name)
    with _naming('--gin_bindings', bindings):
        gin.parse_config(bindings)
    gin.finalize()


@contextlib.contextmanager
def _naming(source, text=''):
    try:
        yield
    except SyntaxError as error:
        lines = error.text or text.splitlines()[error.lineno - 1]
        raise ValueError(
            f'{error.filename or source}, line {error.lineno}: '
            f'{checkpoints.first_line(error.msg)} Received: {lines.strip()}'
        ) from error
    except tokenize.TokenError as error:
        raise ValueError(
            f'{source}: {error.args[0]}. Received: {text.splitlines()[-1:]}'
        ) from error
    except Exception as error:
        words = ' '.join(str(error).split()).removesuffix(' ^')
        raise ValueError(f'{source}: {words}') from error


@contextlib.contextmanager
def _errors_before(job):
    """Turns what goes wrong before the job itself begins into a SetupError.

    That is in the making of its arguments by gin.
    """
    code = inspect.unwrap(job).__code__
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code is code for frame, _ in frames):
            raise
        with train.setup_errors():
            raise


def flags_with(*bindings):
    """The flags of this command, with more bindings, for another one."""
    bindings = [*_BINDINGS.value, *bindings]
    return [
        *(f'--gin_config={name}' for name in _CONFIG.value),
        *(f'--gin_bindings={binding}' for binding in bindings),
    ]


if __name__ == '__main__':
    app.run(main)
