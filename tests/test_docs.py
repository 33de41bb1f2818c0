"""The README and the documentation: snippets run, names and links exist."""

import importlib.util
import inspect
import pathlib
import pkgutil
import re

import gin
import pytest

import diffstride
from diffstride import callbacks, costs
from diffstride.examples import main  # noqa: F401, registers configurables

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / 'diffstride/examples'
SETUP = (ROOT / 'setup.py').read_text()
PAGES = {
    path.name: path.read_text()
    for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
}
FENCE = re.compile(
    r'(?:<!-- not run: (?P<reason>.+?) -->\n)?'
    r'^```(?P<language>\w+)\n(?P<code>.*?)^```$',
    re.M | re.S,
)


def blocks(page, language):
    """Returns (code, the reason why it is not run or None) of each block."""
    return [
        (block['code'], block['reason'])
        for block in FENCE.finditer(PAGES[page])
        if block['language'] == language
    ]


def pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize('page', pages_with('python'))
def test_snippets_run_and_print_what_they_say(
    page, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    namespace, expected = {}, []
    for code, reason in blocks(page, 'python'):
        compiled = compile(code, page, 'exec')
        if reason is None:
            exec(compiled, namespace)
            expected += re.findall(r'^print\(.+\)  # (.+)$', code, re.M)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in expected] == expected


@pytest.mark.parametrize('page', pages_with('gin'))
def test_settings_are_known(page):
    for code, _ in blocks(page, 'gin'):
        gin.parse_config(code)


@pytest.mark.parametrize('page', pages_with('bash'))
def test_commands_name_modules_files_flags_and_settings(page):
    for code, _ in blocks(page, 'bash'):
        for command in code.replace('\\\n', '').splitlines():
            for module in re.findall(r'-m (diffstride[\w.]+)', command):
                source = inspect.getsource(importlib.import_module(module))
                source += (EXAMPLES / 'main.py').read_text()
                source += (EXAMPLES / 'classifier.py').read_text()
                for flag in re.findall(r'--(\w+)=', command):
                    assert f"'{flag}'" in source
            for extras in re.findall(r"install '\.\[(.+?)\]'", command):
                for extra in extras.split(','):
                    assert f"'{extra}': [" in SETUP or f"'{extra}': _" in SETUP
            for name in re.findall(r'--gin_config=(\S+)', command):
                assert (EXAMPLES / name).exists()
            for text in re.findall(r'--gin_bindings="(.+?)"', command):
                gin.parse_config(text)


@pytest.mark.parametrize('page', PAGES)
def test_files_exist(page):
    folders = 'benchmarks|diffstride|docs|images|results|tests'
    for name in re.findall(
        rf'(?<![\w/.])(?:{folders})/[\w/.-]+\.\w+', PAGES[page]
    ):
        assert (ROOT / name).exists()
    for name in re.findall(
        r'\b(?:cifar10|quickstart|spoken)\w*\.gin', PAGES[page]
    ):
        assert (EXAMPLES / name).exists()


def anchors(text):
    """Returns what Markdown makes of the headings."""
    headings = re.findall(r'^#+ (.+)$', FENCE.sub('', text), re.M)
    texts = [re.sub(r'[^\w\s-]', '', heading) for heading in headings]
    return {re.sub(r'\s', '-', text.strip().lower()) for text in texts}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_files_and_headings(page):
    folder = ROOT if page == 'README.md' else ROOT / 'docs'
    for link in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', PAGES[page])):
        if not link.startswith('https://'):
            name, _, anchor = link.partition('#')
            path = folder / (name or page)
            assert path.exists(), link
            assert not anchor or anchor in anchors(path.read_text()), link


def test_reference_has_all_public_names():
    reference = re.findall(r'^::: (\S+)$', PAGES['api.md'], re.M)
    for name in reference:
        pkgutil.resolve_name(name)
    public = {f'diffstride.{name}' for name in diffstride.__all__}
    for module in (callbacks, costs):
        public |= {
            f'{module.__name__}.{name}'
            for name, value in vars(module).items()
            if getattr(value, '__module__', None) == module.__name__
            and not name.startswith('_')
        }
    modules = {
        name for name in public if inspect.ismodule(pkgutil.resolve_name(name))
    }
    assert public - modules <= set(reference)
    for module in modules:
        assert any(name.startswith(module) for name in reference)
