"""README.md and the pages of docs, and what is found in them."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402
import pool  # noqa: E402, F401

PAGES = {str(page.relative_to(ROOT)): page for page in generate.pages()}
FURNITURE = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read(page):
    return PAGES[page].read_text(encoding="utf-8")


def written_by_hand(page):
    """The text of a page without its generated blocks."""
    return generate.BLOCK.sub("", read(page))


def blocks(page, *languages):
    """Language and text of the blocks of code that are not generated, in order."""
    found = FENCE.findall(written_by_hand(page))
    return [(language, text) for language, text in found if language in languages]


def every_block(page):
    """Language and text of all blocks of code, generated ones as well, in order."""
    return [(language, text) for language, text in FENCE.findall(read(page)) if language != "text"]


def in_order():
    """README.md, then the pages in the order of the index."""
    listed = re.findall(r"^[\w/-]+$", read("docs/index.md"), re.MULTILINE)
    return ["README.md", *(page for name in listed if (page := f"docs/{name}.md") in PAGES)]


def prose(text):
    """The lines of a page that are neither code nor tables nor comments."""
    lines = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("|")]


def example(page, mark):
    """The one Python example of a page that has a mark."""
    (found,) = [text for _, text in blocks(page, "python") if mark in text]
    return found


def execute(page, mark, **names):
    """Run the one example that has a mark, as it is written; returns the names it leaves."""
    exec(compile(example(page, mark), page, "exec"), names)
    return names
