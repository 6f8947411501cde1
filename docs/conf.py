"""Sphinx: `make docs`."""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages that are files elsewhere in the repository, and included: links to those files lead to these pages.
INCLUDED = {
    ROOT / "README.md": DOCS / "overview.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
    ROOT / "kernels" / "README.md": DOCS / "kernels.md",
}
LINK = re.compile(r"\]\(([^)#:]+)(?=[)#])")

project = "gptq_ao"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "gptq_ao"
myst_heading_anchors = 4

# Docstrings are written for terminals: `this` is code, and types of other libraries are no links.
default_role = "code"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpick_ignore_regex = [("py:.*", ".*")]


def lead_to_pages(text: str, file: Path, page: Path) -> str:
    """`text` of `file`, with links as they have to be in `page`."""

    def target(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(file.parent / link[1]))
        return "](" + os.path.relpath(INCLUDED.get(path, path), page.parent)

    return LINK.sub(target, text)


def setup(app: Sphinx) -> None:
    def read(app: Sphinx, name: str, source: list[str]) -> None:
        page = DOCS / f"{name}.md"
        source[0] = lead_to_pages(source[0], page, page)

    def include(app: Sphinx, file: Path, name: str, source: list[str]) -> None:
        source[0] = lead_to_pages(source[0], (DOCS / file).resolve(), DOCS / f"{name}.md")

    app.connect("source-read", read)
    app.connect("include-read", include)
