r"""Trains an image classifier as gin files and bindings say.

    python3 -m diffstride.examples.main --gin_config=cifar10.gin \
      --gin_bindings="train.workdir = '/tmp/exp/diffstride/resnet18/'"

A gin file is looked up as it is written, then among the packaged ones.
"""

import pathlib
import sys

import gin
from absl import app, flags, logging

from diffstride.examples import external_configurables, train  # noqa: F401

_CONFIG = flags.DEFINE_multi_string(
    'gin_config', [], 'A gin file: a path, or the name of a packaged one.'
)
_BINDINGS = flags.DEFINE_multi_string(
    'gin_bindings', [], 'Gin bindings, which override those of the files.'
)


@gin.configurable(module='main')
def run(job=train.train):
    """Runs what the gin file asks for: `@train.train` or `@train.compare`."""
    return job()


def main(argv):
    """Parses gin, runs, and ends with code 1 if something is set wrong."""
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
            gin.parse_config_files_and_bindings(files, _BINDINGS.value)
        run()
    except train.SetupError as error:
        sys.exit(f'error: {train.first_line(error)}')


if __name__ == '__main__':
    app.run(main)
