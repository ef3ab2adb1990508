"""``devec compress``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from devec.cli.common import (
    AllowPickle,
    Base,
    Device,
    Dtype,
    Format,
    MaxRank,
    OutPath,
    Overwrite,
    Source,
    in_format,
    module_type,
    new_table,
    ranged,
    read_source,
    require_new,
    save,
    show,
    storage_dtype,
)

if TYPE_CHECKING:
    from devec.adapter import Adapter
    from devec.compress import Compression


def compress(
    source: Source,
    out: OutPath,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Largest rank of any module.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="F", help="Fraction of each module's squared norm to keep."),
    ] = None,
    format: Format = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Lower the ranks of an adapter at the least error."""
    from devec import compress as shrink

    storage = storage_dtype(dtype)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    if device is not None:
        adapter = adapter.to(device)
    result = shrink(adapter, rank=rank, energy=energy)
    written = in_format(result.adapter, format)
    require_new([written.output_path(out)], overwrite=overwrite)
    path = save(written, out, storage, overwrite=overwrite)
    _print(adapter, result)
    typer.echo(f"Written: {path}, relative error {result.error:.3g}")


def _print(adapter: Adapter, result: Compression) -> None:
    """Print ranks and errors by type of module."""
    table = new_table("module", "modules", "rank", "now", "error")
    kinds: dict[str, list[str]] = {}
    for module in adapter.modules:
        kinds.setdefault(module_type(module), []).append(module)
    kept = result.adapter.modules
    for kind, modules in kinds.items():
        table.add_row(
            kind,
            str(len(modules)),
            ranged([adapter.modules[m].rank for m in modules]),
            ranged([kept[m].rank if m in kept else 0 for m in modules]),
            f"{max(result.errors[m] for m in modules):.3g}",
        )
    show("Ranks, by type of module", table)
