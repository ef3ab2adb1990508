"""``devec negate``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.combine import write_sum
from devec.cli.common import Base, CarriedFrom, Dtype, OutPath, Overwrite, Source


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
    write_sum([source], [-scale], out, carried_from, base, dtype, overwrite=overwrite)
