"""``devec negate``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.common import (
    Base,
    CarriedFrom,
    Dtype,
    OutPath,
    Overwrite,
    Source,
    read_source,
    require_new,
    storage_dtype,
)


def negate(
    source: Source,
    out: OutPath,
    scale: Annotated[float, typer.Option(metavar="S", help="Multiply by -S.")] = 1.0,
    carried_from: CarriedFrom = None,
    base: Base = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn an adapter around: what it adds, the result takes away."""
    from devec import combine

    storage = storage_dtype(dtype)
    require_new([out], overwrite=overwrite)
    adapter = read_source(source, base)
    result = combine([adapter], [-scale], name=out.name, carried_from=carried_from)
    result.save_pretrained(out, dtype=storage, overwrite=overwrite)
    typer.echo(f"Written: {out} = -{scale:g}·{adapter.name}, norm {result.norm():.4g}")
