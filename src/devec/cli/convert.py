"""``devec convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.shared.options import (
    AllowPickle,
    AsLora,
    Base,
    Dtype,
    MaxRank,
    OutPath,
    Overwrite,
    Source,
)
from devec.cli.shared.results import as_plain, norm_phrase, storage_dtype, write_result
from devec.cli.shared.sources import read_source


def convert_command(
    source: Source,
    format: Annotated[str, typer.Option("--format", metavar="F", help="kohya, diffusers or peft.")],
    out: OutPath,
    component: Annotated[
        str | None,
        typer.Option(
            metavar="C",
            help="Keep the adapter of one model only: denoiser, denoiser_2, clip_l, clip_g or t5.",
        ),
    ] = None,
    as_lora: AsLora = None,
    base: Base = None,
    dtype: Dtype = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another format, exactly."""
    from devec import convert

    storage = storage_dtype(dtype)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    result = convert(as_plain(adapter, as_lora), format, component=component)
    typer.echo(write_result(result, out, storage, norm_phrase, overwrite=overwrite))
