"""What commands read, wrote and printed."""

import json
import re
from pathlib import Path

import pytest

from devec import Adapter

# The command line turns warnings into lines of its own, so none may become an exception.
WARNINGS_ARE_LINES = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("always::devec.DevecWarning"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

PARTS = ["a-shared", "a-unique", "b-shared", "b-unique", "common"]

# What makes each writing command write `out`, or for `decompose` into `out`.
WRITING = {
    "decompose": ["decompose", "a", "b", "--out", "out"],
    "combine": ["combine", "a", "b", "--weights", "1,-0.4", "--out", "out"],
    "negate": ["negate", "a", "--out", "out"],
    "compress": ["compress", "a", "--rank", "3", "--out", "out"],
}


def read(path):
    return Adapter.from_pretrained(path)


def strict_json(path):
    """The content of a JSON file, without the literals that JSON has not."""

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def names(directory):
    return sorted(p.name for p in Path(directory).iterdir())


def snapshot(directory):
    """All files with their contents and times, and all directories."""
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None
        for p in Path(directory).rglob("*")
    }


def table(out):
    """The first table printed: first column → the other cells; columns are two spaces apart."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    end = next((i for i, line in enumerate(lines[start:], start) if not line.strip()), len(lines))
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start:end]]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def ranks(adapter):
    return {module: delta.rank for module, delta in adapter.modules.items()}


DECOMPOSE = ["decompose", "a", "b", "--out", "out"]

COMPRESS = ["compress", "a", "--out", "out"]

COMBINE = ["combine", "a", "b", "--out", "out"]
