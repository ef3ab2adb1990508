"""Reading the sources on the command line: ``PATH`` or ``NAME=PATH``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from devec.errors import IncompatibleError

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter


def begin_reading(sources: Sequence[str]) -> None:
    """Start to compute digests of the sources' files while libraries are being loaded."""
    from devec.files.digest import begin

    for source in sources:
        path = Path(name_and_path(source)[1])
        with suppress(OSError, ValueError):  # errors are reported when the path is read
            usual = path / "adapter_model.safetensors"
            files = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
            if len(files) == 1 or not path.is_dir():  # of several, the user has to choose one
                begin(files[0] if files else path)


def read_sources(
    sources: Sequence[str],
    base: str | None = None,
    max_rank: int | None = None,
    *,
    allow_pickle: bool = False,
) -> list[Adapter]:
    """Read several sources with `read_source`, in order."""
    return [read_source(source, base, max_rank, allow_pickle=allow_pickle) for source in sources]


def read_source(
    source: str,
    base: str | None = None,
    max_rank: int | None = None,
    *,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a source lazily.

    Args:
        source: ``PATH`` or ``NAME=PATH``.
        base: Base model to read weights from. It is recorded as the adapter's base model unless it
            is a path and another one is on record.
        max_rank: Largest rank that a LoHa or LoKr is rewritten to.
        allow_pickle: Whether pickled files may be read.

    Returns:
        The adapter, under its name.

    Raises:
        IncompatibleError: If the name cannot be part of a file name.
    """
    import dataclasses

    from devec import Adapter
    from devec.adapters.data import layout_of
    from devec.adapters.layout import MAX_RANK
    from devec.files.locate import exists

    name, path = name_and_path(source)
    adapter = Adapter.from_pretrained(
        path,
        name,
        max_rank=MAX_RANK if max_rank is None else max_rank,
        allow_pickle=allow_pickle,
        base=base,
        lazy=True,
    )
    layout = layout_of(adapter)
    if base is None or (exists(base) and layout.about.base_model):
        return adapter  # a path is no better name than the one on record
    return dataclasses.replace(adapter, layout=layout.rebased(base))


def name_and_path(source: str) -> tuple[str | None, str]:
    """Split ``NAME=PATH``, unless it is itself a path that exists."""
    name, equals, path = source.partition("=")
    if not equals or Path(source).exists():
        return None, source
    if not name or name.startswith(".") or set(name) & set("/\\"):
        raise IncompatibleError(
            f"no such file or directory: {source!r}; and read as NAME=PATH, {name!r} cannot be a "
            "name, since names become part of file names"
        )
    return name, path
