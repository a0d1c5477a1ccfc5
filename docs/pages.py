"""What `make docs` does beside mkdocs: pages from files elsewhere, and docstrings as coda has them.

mkdocs reads Markdown in `docs/` alone. README.md, CONTRIBUTING.md and CHANGELOG.md are at the root
of the repository, where GitHub and PyPI look for them; here each becomes a page, with its links as
they are seen from `docs/`.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+): ((?:.*\n?)(?:\1 +.*\n?)*)", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages (an event of mkdocs)."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, name in PAGES.items():
            text = text.replace(f"]({other}", f"]({name}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let the other pages link to these (an event of mkdocs)."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


class OneParameterALine(griffe.Extension):
    """`a, b: text` in a docstring's sections -> an entry for each of a and b."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = ENTRY.sub(_apart, obj.docstring.value)


def _apart(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    text = text if text.endswith("\n") else f"{text}\n"
    return "".join(f"{indent}{name}: {text}" for name in names.split(", "))
