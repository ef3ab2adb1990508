"""Whether a file or directory is one that devec wrote."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from devec.formats.card import RECORD_NAME
from devec.formats.metadata import RECORD_KEY


def made_by_devec(path: Path) -> bool:
    """Whether an output bears the record of an operation.

    Args:
        path: A directory or a file, which need not exist.

    Returns:
        Whether it does.
    """
    if not path.is_file():
        return (path / RECORD_NAME).exists()
    try:
        with safe_open(path, framework="pt") as file:
            return RECORD_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
