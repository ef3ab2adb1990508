"""``devec combine``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from devec.cli.common import in_format, require_new, said_norm, save, storage_dtype, to_plain
from devec.cli.options import (
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
from devec.cli.sources import read_sources
from devec.errors import IncompatibleError

if TYPE_CHECKING:
    import torch

    from devec.adapters.adapter import Adapter


def combine(
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
    """Add adapters with weights, exactly, into one; ranks add."""
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        raise IncompatibleError(
            f"--weights are numbers separated by commas, e.g. 1.0,-0.4, got {weights!r}"
        ) from None
    storage = storage_dtype(dtype)
    adapters = read_sources(sources, base, max_rank, allow_pickle=allow_pickle)
    write_sum(adapters, numbers, out, carried_from, as_lora, format, storage, overwrite=overwrite)


def write_sum(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    out: Path,
    carried_from: str | None,
    as_lora: int | None,
    format: str | None,
    dtype: torch.dtype | None,
    *,
    overwrite: bool,
) -> None:
    """Add adapters with weights, write the sum and say so.

    Args:
        adapters: The adapters.
        weights: One for each.
        out: Where to write.
        carried_from: As of `devec.combine`.
        as_lora: Rank of the nearest plain LoRA, if that is to be written.
        format: As on the command line.
        dtype: Storage type.
        overwrite: Whether an output that exists may be replaced.
    """
    from devec import combine as add

    total = add(adapters, weights, name=out.stem, carried_from=carried_from)
    total = to_plain(total, as_lora)
    result = in_format(total, format)
    require_new([result.output_path(out)], overwrite=overwrite)
    norm = said_norm(result)  # before inputs may be replaced
    path = save(result, out, dtype, overwrite=overwrite)
    terms = " ".join(f"{w:+g}·{a.name}" for a, w in zip(adapters, weights, strict=True))
    typer.echo(f"Written: {path} = {terms}{norm}")
