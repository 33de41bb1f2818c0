r"""Trains an image classifier as gin files and bindings say.

    python3 -m diffstride.examples.main --gin_config=cifar10.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/resnet18/'"

A gin file is looked up as it is written, then among the packaged ones. The same
command continues a training that was stopped at any point.
"""

import re
from typing import Any

import gin
from absl import app, flags, logging

from diffstride.examples import (
    checkpoints,
    external_configurables,  # noqa: F401
    rules,
    settings,
    train,
)
from diffstride.validation import require

_CONFIG = flags.DEFINE_multi_string(
    'gin_config', [], 'A gin file: a path, or the name of a packaged one.'
)
_BINDINGS = flags.DEFINE_multi_string(
    'gin_bindings', [], 'Gin bindings, which override those of the files.'
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
            settings.parse(_CONFIG.value, _BINDINGS.value)
            prepared = run()
        except _OF_SETTINGS as error:
            line = checkpoints.first_line(error)
            where = re.search(r"In call to configurable '(\w+)'", str(error))
            if where and where[1] != 'train':
                line += f' (in {where[1]})'
            raise checkpoints.Stop(line) from error
        prepared.run()


@gin.configurable(module='main')
def run(job: rules.Factory = train.train) -> Any:
    """Prepares the job that gin binds, such as `@grid.grid`, or a training."""
    rules.check(run, locals())
    prepared = job()
    require(
        hasattr(prepared, 'run'),
        '`job` must return an object with a method `run`',
        job=job,
    )
    return prepared


if __name__ == '__main__':
    app.run(main)
