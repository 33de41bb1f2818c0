r"""Trains an image classifier as gin files and bindings say.

    python3 -m diffstride.examples.main --gin_config=cifar10.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/resnet18/'"

A gin file is looked up as it is written, then among the packaged ones. The same
command continues a training that was stopped at any point.
"""

import re

from absl import app, flags, logging

from diffstride.examples import (
    checkpoints,
    external_configurables,  # noqa: F401
    settings,
)

_CONFIG = flags.DEFINE_multi_string(
    'gin_config', [], 'A gin file: a path, or the name of a packaged one.'
)
_BINDINGS = flags.DEFINE_multi_string(
    'gin_bindings', [], 'Gin bindings, which override those of the files.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Not in use: bind train.workdir instead.'
)
# Wrong settings raise these. Other errors are faults of the code.
_OF_SETTINGS = (ImportError, OSError, RuntimeError, TypeError, ValueError)


def main(argv: list[str]) -> None:
    """Prepares a job and runs it; an error is one line that says what is wrong.

    A job is a function that gin knows, by default `train.train`. It checks all
    settings and makes all objects, writes nothing, and returns an object whose
    `run` does the work.
    """
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments: {argv[1:]}')
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)
    ctrl_c = 'interrupted; the same command continues'
    with checkpoints.one_line_errors(interrupted=ctrl_c):
        try:
            prepared = _prepared()
        except _OF_SETTINGS as error:
            line = checkpoints.first_line(error)
            where = re.search(r"In call to configurable '(\w+)'", str(error))
            if where and where[1] != 'train':
                line += f' (in {where[1]})'
            raise checkpoints.Stop(line) from error
        prepared.run()


def _prepared():
    if _WORKDIR.value is not None:
        raise ValueError(
            '--workdir is now the setting train.workdir: '
            f'--gin_bindings="train.workdir = {_WORKDIR.value!r}"'
        )
    settings.parse(_CONFIG.value, _BINDINGS.value)
    job = settings.run()
    if not callable(job):
        raise ValueError(
            f'run.job must be a function, such as @grid.grid. Received: {job!r}'
        )
    prepared = job()
    if not hasattr(prepared, 'run'):
        raise ValueError(
            'run.job must return an object with a method `run`. '
            f'Received: {prepared!r}'
        )
    return prepared


if __name__ == '__main__':
    app.run(main)
