"""The README and the documentation: snippets run, names and links exist."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import runpy
import unittest

import gin
import pytest
import sybil
from sybil.parsers import markdown

import diffstride
from diffstride import callbacks, costs
from diffstride.examples import main  # noqa: F401, registers configurables

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / 'diffstride/examples'
NAMES = 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'
FILES = [*map(ROOT.joinpath, NAMES), *sorted((ROOT / 'docs').glob('*.md'))]
PATHS = {path.name: path for path in FILES}
PAGES = {name: path.read_text() for name, path in PATHS.items()}


def check_commands(example):
    """Checks that modules, files, flags, extras and settings exist."""
    for command in example.parsed.replace('\\\n', '').splitlines():
        for module in re.findall(r'-m (diffstride[\w.]+)', command):
            source = inspect.getsource(importlib.import_module(module))
            source += (EXAMPLES / 'main.py').read_text()
            source += (EXAMPLES / 'classifier.py').read_text()
            for flag in re.findall(r'--(\w+)=', command):
                assert f"'{flag}'" in source
        for path in re.findall(r'python3? ([\w/]+\.py)', command):
            assert (ROOT / path).exists()
        for extras in re.findall(r"install .*'\.\[(.+?)\]'", command):
            for extra in extras.split(','):
                assert re.search(f'^{extra} = \\[', PYPROJECT, re.M)
        for name in re.findall(r'--gin_config=(\S+)', command):
            assert (EXAMPLES / name).exists()
        for text in re.findall(r'--gin_bindings="(.+?)"', command):
            gin.parse_config(text)


def check_settings(example):
    """Checks that gin knows what is set."""
    gin.parse_config(example.parsed)


# A comment in a page leaves out the block below it and says why:
# <!-- skip: next "It needs a trained network." -->
SYBIL = sybil.Sybil(
    [
        markdown.SkipParser(),
        markdown.PythonCodeBlockParser(),
        markdown.CodeBlockParser('gin', check_settings),
        markdown.CodeBlockParser('bash', check_commands),
    ]
)
PYPROJECT = (ROOT / 'pyproject.toml').read_text()
CODE = re.compile(r'^```.*?^```$', re.M | re.S)


@pytest.mark.parametrize('page', PAGES)
def test_code_blocks_run_in_order_and_print_what_they_say(
    page, monkeypatch, tmp_path, capsys, request
):
    if page != 'README.md':  # Its code runs as a user runs it.
        request.getfixturevalue('without_tracing')
    expected = []
    document = SYBIL.parse(PATHS[page])
    monkeypatch.chdir(tmp_path)
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            assert str(reason)
            compile(example.parsed, page, 'exec')
        else:
            code = str(example.parsed)
            expected += re.findall(r'^print\(.+\)  # (.+)$', code, re.M)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in expected] == expected


def anchors(text):
    """Returns what Markdown makes of the headings."""
    headings = re.findall(r'^#+ (.+)$', CODE.sub('', text), re.M)
    texts = [re.sub(r'[^\w\s-]', '', heading) for heading in headings]
    return {re.sub(r'\s', '-', text.strip().lower()) for text in texts}


@pytest.mark.parametrize('page', PAGES)
def test_languages_run_and_links_lead_to_files_and_headings(page):
    text = PAGES[page]
    languages = set(re.findall(r'^```(\w+)', text, re.M))
    assert languages <= {'python', 'gin', 'bash', 'text', 'bibtex'}
    folders = '(?:benchmarks|diffstride|docs|images|results|tests)'
    for name in re.findall(rf'(?<![\w/.]){folders}/[\w/.-]+\.\w+', text):
        assert (ROOT / name).exists()
    for name in re.findall(r'\b(?:cifar10|quickstart|spoken)\w*\.gin', text):
        assert (EXAMPLES / name).exists()
    for link in re.findall(r'\]\(([^)\s]+)\)', CODE.sub('', text)):
        if not link.startswith('https://'):
            name, _, anchor = link.partition('#')
            path = PATHS[page].parent / (name or page)
            assert path.exists(), link
            assert not anchor or anchor in anchors(path.read_text()), link


def test_reference_has_all_public_names():
    reference = re.findall(r'^::: (\S+)$', PAGES['api.md'], re.M)
    for name in reference:
        pkgutil.resolve_name(name)
    public = {f'diffstride.{name}' for name in diffstride.__all__}
    public |= {
        f'{module.__name__}.{name}'
        for module in (callbacks, costs)
        for name, value in vars(module).items()
        if getattr(value, '__module__', None) == module.__name__
        and not name.startswith('_')
    }
    for name in public - set(reference):
        assert inspect.ismodule(pkgutil.resolve_name(name)), name
        assert any(other.startswith(name) for other in reference)


FIGURES = ROOT / 'docs/figures'
COMMITTED = {path.name for path in FIGURES.glob('*.*') if path.suffix != '.py'}


@pytest.mark.slow
def test_commands_draw_the_committed_figures(tmp_path):
    scripts = list(FIGURES.glob('*.py'))
    for path in scripts:
        runpy.run_path(str(path))['main'](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == COMMITTED
    assert len(drawn) >= len(scripts) > 0


def test_figures_are_small():
    for name in COMMITTED:
        assert (FIGURES / name).stat().st_size < 150_000, name
