"""The documentation site (`make site`): the guides, the executed lessons as they are, a page for each public name.

Everything is written beside the page: no script, font or picture comes from elsewhere. Run from the top folder:
``sphinx-build -c docs . build/site``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "notebooks")]

project, author = "effkit", "the effkit authors"
master_doc = "docs/index"
include_patterns = ["docs/**.md", "docs/reference/**.rst", "notebooks/0*.ipynb", "README.md", "CHANGELOG.md",
                    "CONTRIBUTING.md", "data/README.md", "notebooks/glossary.md"]  # fmt: skip
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = [str(HERE / "templates")]
html_static_path, html_css_files = ["static"], ["wide.css"]
html_theme = "furo"
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}  # a page has no kernel: a slider that cannot predict would be a picture of one
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
suppress_warnings = ["mystnb.mime_priority"]  # a bar of progress has no picture
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
autodoc_typehints = "none"  # the signature has them in short; docstrings say what they mean
autosummary_imported_members = False
napoleon_use_rtype = False
nitpicky = False

MODULES = ("effkit", "effkit.padding", "effkit.activations", "effkit.moe", "effkit.decoder", "effkit.models",
           "effkit.advice", "effkit.claims", "effkit.view")  # fmt: skip


def _reference() -> None:
    """A list of each module's public names, from which autosummary makes a page per name."""
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    for name in MODULES:
        module = import_module(name)
        names = "\n".join(f"   {public}" for public in sorted(module.__all__) if f"{name}.{public}" not in MODULES)
        summary = (module.__doc__ or "").strip().splitlines()[0]
        text = f"{name}\n{'=' * len(name)}\n\n{summary}\n\n.. currentmodule:: {name}\n\n"
        page = folder / f"{name}.rst"
        text += f".. autosummary::\n   :toctree: names\n\n{names}\n"
        if not page.exists() or page.read_text() != text:  # an unchanged page need not be built again
            page.write_text(text)


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _say_what_pictures_show(app: Any, doctree: nodes.document) -> None:
    """Alternative text for a cell's pictures: the line that drew it; the words around the cell say what it shows."""
    for image in doctree.findall(nodes.image):
        if image.get("alt"):
            continue
        cell = image.parent
        while cell is not None and "cell" not in cell.get("classes", ()):
            cell = cell.parent
        code = next(iter(cell.findall(nodes.literal_block)), None) if cell is not None else None
        line = code.astext().strip().splitlines()[-1].strip() if code is not None else "a picture"
        image["alt"] = f"What this line of the cell above draws: {line}"


def _no_docstring_of_the_type(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A constant has no docstring; Python then gives that of ``dict`` or ``tuple``."""
    if what == "data":
        lines[:] = [f"A {type(thing).__name__}."]


def _first_page(app: Any, exception: Exception | None) -> None:
    """The folder opens on the site's first page."""
    if exception is None:
        page = '<!doctype html><title>effkit</title><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(page + '<a href="docs/index.html">effkit</a>\n')


def setup(app: Any) -> None:
    _reference()
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _no_docstring_of_the_type)
    app.connect("build-finished", _first_page)
    app.connect("doctree-read", _say_what_pictures_show)
