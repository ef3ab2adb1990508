"""The examples in docstrings run, and print what they show."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import devec

ROOT = Path(devec.__file__).parent
WITH_EXAMPLES = [
    ".".join(("devec", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_docstrings_run(module):
    result = doctest.testmod(import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_these_public_names_have_examples():
    shown = {name for name in devec.__all__ if ">>> " in (getattr(devec, name).__doc__ or "")}
    assert shown >= {
        "Adapter", "Compression", "Delta", "DevecError", "DevecWarning", "ModuleOverlap", "Overlap",
        "as_lora", "combine", "compress", "convert", "cosine", "distance", "inner", "overlap",
        "save_adapters",
    }  # fmt: skip
