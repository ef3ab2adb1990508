"""The provenance record that every output contains: its key and file name, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from devec.errors import FormatError
from devec.files.json_text import json_object

RECORD_KEY = "devec"
RECORD_NAME = "devec.json"


def parse_record(text: str, where: str) -> dict[str, Any]:
    """The provenance record in a JSON text, with its structure checked."""
    try:
        record = json_object(text, where)
    except FormatError as error:
        raise FormatError(f"{error}; remove it") from error
    inputs, of = record.get("inputs", []), record.get("of", "")
    names = [of] if isinstance(of, str) else of
    fits = (
        isinstance(record.get("operation"), str)
        and isinstance(record.get("part", ""), str)
        and isinstance(record.get("parameters", {}), dict)
        and isinstance(inputs, list)
        and all(isinstance(i, dict) and isinstance(i.get("name"), str) for i in inputs)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    )
    if not fits:
        raise FormatError(f"{where} is not a record of origin as devec writes it; remove it")
    return record


def made_by_devec(path: Path) -> bool:
    """Whether the file or directory at a path, if any, contains a provenance record."""
    if not path.is_file():
        return (path / RECORD_NAME).exists()
    try:
        with safe_open(path, framework="pt") as file:
            return RECORD_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
