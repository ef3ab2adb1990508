"""``devec negate``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.shared.options import (
    AllowPickle,
    AsLora,
    Base,
    CarriedFrom,
    Dtype,
    Format,
    MaxRank,
    OutPath,
    Overwrite,
    Source,
)
from devec.cli.shared.results import storage_dtype, write_combination
from devec.cli.shared.sources import read_source


def negate_command(
    source: Source,
    out: OutPath,
    scale: Annotated[float, typer.Option(metavar="S", help="Multiply by -S.")] = 1.0,
    carried_from: CarriedFrom = None,
    as_lora: AsLora = None,
    format: Format = None,
    base: Base = None,
    dtype: Dtype = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Negate an adapter: the result subtracts what the adapter adds."""
    storage = storage_dtype(dtype)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    write_combination(
        [adapter], [-scale], out, carried_from, as_lora, format, storage, overwrite=overwrite
    )
