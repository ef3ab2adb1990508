"""``devec combine``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from devec.cli.common import (
    Base,
    CarriedFrom,
    Dtype,
    OutPath,
    Overwrite,
    Sources,
    read_source,
    require_new,
    storage_dtype,
)
from devec.errors import IncompatibleError


def combine(
    sources: Sources,
    weights: Annotated[
        str, typer.Option(metavar="W,...", help="A weight for each adapter, e.g. 1.0,-0.4.")
    ],
    out: OutPath,
    carried_from: CarriedFrom = None,
    base: Base = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Add adapters with weights, exactly, into one; ranks add."""
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        raise IncompatibleError(
            f"--weights are numbers separated by commas, e.g. 1.0,-0.4, got {weights!r}"
        ) from None
    write_sum(sources, numbers, out, carried_from, base, dtype, overwrite=overwrite)


def write_sum(
    sources: Sequence[str],
    weights: Sequence[float],
    out: Path,
    carried_from: str | None,
    base: str | None,
    dtype: str | None,
    *,
    overwrite: bool,
) -> None:
    """Read adapters, add them with weights, write the sum and say so.

    Args:
        sources: As on the command line.
        weights: One for each.
        out: Where to write.
        carried_from: As of `devec.combine`.
        base: Base model to put on record.
        dtype: Storage type, as on the command line.
        overwrite: Whether an output that exists may be replaced.
    """
    from devec import combine as add

    storage = storage_dtype(dtype)
    require_new([out], overwrite=overwrite)
    adapters = [read_source(source, base) for source in sources]
    result = add(adapters, weights, name=out.name, carried_from=carried_from)
    result.save_pretrained(out, dtype=storage, overwrite=overwrite)
    terms = " ".join(f"{w:+g}·{a.name}" for a, w in zip(adapters, weights, strict=True))
    typer.echo(f"Written: {out} = {terms}, norm {result.norm():.4g}")
