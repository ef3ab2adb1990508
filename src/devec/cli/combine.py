"""``devec combine``."""

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
    Sources,
)
from devec.cli.shared.results import storage_dtype, write_combination
from devec.cli.shared.sources import read_sources
from devec.errors import IncompatibleError


def combine_command(
    sources: Sources,
    weights: Annotated[
        str, typer.Option(metavar="W,...", help="A weight for each adapter, e.g. 1.0,-0.4.")
    ],
    out: OutPath,
    carried_from: CarriedFrom = None,
    as_lora: AsLora = None,
    format: Format = None,
    base: Base = None,
    dtype: Dtype = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the weighted sum of adapters as one adapter, exactly; ranks add up."""
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        raise IncompatibleError(
            f"--weights are numbers separated by commas, e.g. 1.0,-0.4, got {weights!r}"
        ) from None
    storage = storage_dtype(dtype)
    adapters = read_sources(sources, base, max_rank, allow_pickle=allow_pickle)
    write_combination(
        adapters, numbers, out, carried_from, as_lora, format, storage, overwrite=overwrite
    )
