"""Sphinx: `make docs`."""

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gptq_ao.version import VERSION

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.append(str(DOCS))

from messages import of  # noqa: E402

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
html_title = f"gptq_ao {VERSION}"
html_show_copyright = False
smartquotes_action = "D"  # dashes: quotation marks are code here
myst_heading_anchors = 4

# Docstrings are written for terminals: `this` is code, and types of other libraries are no links.
default_role = "code"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpick_ignore_regex = [("py:.*", ".*")]


def lead_to_pages(text: str, file: Path, page: Path) -> str:
    """`text` of `file`, with links as they have to be in `page`."""

    def target(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(file.parent / link[1]))
        return "](" + os.path.relpath(INCLUDED.get(path, path), page.parent)

    return LINK.sub(target, text)


class Messages(SphinxDirective):
    """The messages of a class of errors (the argument), as files or folders (the lines) make them."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        listed = sorted({m.text for m in of(self.arguments[0], list(self.content)) if m.text})
        return [nodes.bullet_list("", *(nodes.list_item("", nodes.paragraph(text=text)) for text in listed))]


def setup(app: Sphinx) -> None:
    def read(app: Sphinx, name: str, source: list[str]) -> None:
        page = DOCS / f"{name}.md"
        source[0] = lead_to_pages(source[0], page, page)

    def include(app: Sphinx, file: Path, name: str, source: list[str]) -> None:
        source[0] = lead_to_pages(source[0], (DOCS / file).resolve(), DOCS / f"{name}.md")

    app.add_directive("messages", Messages)
    app.connect("source-read", read)
    app.connect("include-read", include)
