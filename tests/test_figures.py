"""The figures of the documentation: each command draws what is committed."""

import pathlib
import runpy

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'docs/figures'
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob('*.py'))}
COMMITTED = {path.name for path in FOLDER.glob('*.*') if path.suffix != '.py'}


@pytest.mark.slow
def test_commands_draw_the_committed_figures(tmp_path):
    for path in SCRIPTS.values():
        runpy.run_path(str(path))['main'](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == COMMITTED
    assert len(drawn) >= len(SCRIPTS) > 0


def test_figures_are_small():
    for name in COMMITTED:
        assert (FOLDER / name).stat().st_size < 150_000, name
