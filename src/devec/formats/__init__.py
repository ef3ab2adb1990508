"""File formats of adapters: detecting, reading, writing, converting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter
    from devec.adapters.layout import ReadOptions

Reader = Callable[[Path, str, "ReadOptions"], "Adapter | None"]


def readers() -> list[Reader]:
    """The readers of all formats, in order of precedence.

    A reader returns None for files that are not of its format.
    """
    from devec.formats.peft.read import read_peft
    from devec.formats.single_file.read import read_file

    return [read_peft, read_file]
