"""Settings of Sphinx; the notebooks are copied beside the pages and rendered as stored."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from docutils.nodes import Element, SkipNode, image
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.writers.html5 import HTML5Translator

import devec

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/devec/devec/blob/main"

project = "devec"
author = "The devec authors"
copyright = "The devec authors, Apache License 2.0"
release = version = devec.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "devec"
html_static_path = ["static"]
html_css_files = ["devec.css"]
html_theme_options = {
    "source_repository": "https://github.com/devec/devec/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

html_math_renderer = "mathml"

nitpicky = True
# Types of other packages, shapes (which are no names at all), and types that are not public.
nitpick_ignore_regex = [("py:.*", r"(?!devec\.).*"), ("py:.*", r"devec\.[a-z_]+\..*")]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def copied_notebooks() -> None:
    """Copy the notebooks into the source of the pages, where they have changed."""
    target = Path(__file__).parent / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        copy = target / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, copy)


def outward(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links that leave docs into links to the notebooks here, or to the repository."""
    folder = (Path(__file__).parent / page).parent

    def replaced(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        target = (folder / path).resolve()
        if not path or "://" in path or Path(__file__).parent in target.parents:
            return match[0]
        inside = target.relative_to(ROOT)
        if inside.parts[0] == "notebooks" and inside.suffix == ".ipynb":
            return f"](/{inside})"
        return f"]({REPOSITORY}/{inside}{'#' + anchor if anchor else ''})"

    if not page.startswith("notebooks/"):
        source[0] = re.sub(r"\]\(([^)\s]+)\)", replaced, source[0])


def marked_examples(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Mark what a docstring indents after a blank line as a literal block."""
    marked: list[str] = []
    for line in lines:
        indented = line.startswith("    ") and marked and not marked[-1].strip()
        before = next((text for text in reversed(marked) if text.strip()), "")
        if indented and not before.startswith(" ") and not before.endswith("::"):
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def readable(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """A signature that can be parsed although a default is made for each object."""
    return None if signature is None else (signature.replace("<factory>", "{}"), returns)


def mathml(node: Element, *, block: bool = False) -> str:
    """A formula as MathML, which needs neither a network nor a script."""
    formula = node.astext().replace(r"\dots", r"\ldots")  # which docutils knows
    try:
        return tex2mathml(formula, as_block=block)
    except MathError as error:
        raise SphinxError(f"{node.source}: {error} in {formula!r}") from error


def inline_math(writer: HTML5Translator, node: Element) -> None:
    """Write a formula in a line."""
    writer.body.append(mathml(node))
    raise SkipNode


def block_math(writer: HTML5Translator, node: Element) -> None:
    """Write a formula of its own."""
    writer.body.append(f'<div class="math">{mathml(node, block=True)}</div>')
    raise SkipNode


def public(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """Link a type that a signature names by its module, `devec.adapters.adapter.Adapter`."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in devec.__all__:
        return None
    domain = env.get_domain("py")
    page = node.get("refdoc", "")
    return domain.resolve_xref(env, page, app.builder, "obj", f"devec.{name}", node, text)


def linked_pictures(app: Sphinx, page: Element) -> None:
    """Give pictures of pages a width, so that Sphinx links them to their full size."""
    if not app.env.docname.startswith("notebooks/"):
        for picture in page.findall(image):
            picture["width"] = "100%"


copied_notebooks()


def setup(app: Sphinx) -> None:
    """Connect the functions above; examples are marked before napoleon reads the docstrings."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", outward)
    app.connect("autodoc-process-docstring", marked_examples, priority=400)
    app.connect("autodoc-process-signature", readable)
    app.connect("missing-reference", public)
    app.connect("doctree-read", linked_pictures)
