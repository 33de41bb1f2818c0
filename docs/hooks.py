"""What the site needs beyond Markdown: files elsewhere, and examples."""

import pathlib
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
# Pages link to files in these folders as '../results/...', which also works
# where the repository is browsed.
FOLDERS = ('images', 'results', 'benchmarks/results')
SUFFIXES = {'.csv', '.md', '.png'}
ROOT_PAGES = ('CHANGELOG.md', 'CONTRIBUTING.md')


def on_files(files, config):
    """Adds pages, figures and tables that are not in the folder docs."""
    paths = [ROOT / name for name in ROOT_PAGES]
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).rglob('*'))
    for path in paths:
        # This page would take the place of docs/results.md.
        is_page = path != ROOT / 'results/README.md'
        if path.suffix in SUFFIXES and is_page:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links between these folders and docs to where the site is."""
    outside = '|'.join((*FOLDERS, *ROOT_PAGES))
    if page.file.src_uri in ROOT_PAGES:
        return markdown.replace('](docs/', '](')
    if page.file.src_uri.startswith(FOLDERS):
        return markdown.replace('](../../docs/', '](../../')
    return re.sub(rf'\]\(\.\./(?=({outside}))', '](', markdown)


class Examples(griffe.Extension):
    """Shows the examples of docstrings as code.

    Docstrings have them as Keras does, without an indentation:

        Example:

        >>> layer = DiffStride(2.0)
    """

    def on_object(self, *, obj, **kwargs):
        """Turns 'Example:' into a section of examples."""
        if obj.docstring is not None:
            obj.docstring.value = _indented_examples(obj.docstring.value)


def _indented_examples(text):
    lines, is_example = [], False
    for line in text.splitlines():
        if re.fullmatch(r'[A-Z][\w ]*:', line):
            is_example = line == 'Example:'
            line = line.replace('Example:', 'Examples:')
        elif is_example and line:
            line = f'    {line}'
        lines.append(line)
    return '\n'.join(lines)
