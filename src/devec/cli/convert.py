"""``devec convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.common import require_new, said_norm, save, storage_dtype, to_plain
from devec.cli.options import AllowPickle, AsLora, Base, Dtype, MaxRank, OutPath, Overwrite, Source
from devec.cli.sources import read_source


def convert(
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
    from devec import convert as rewrite

    storage = storage_dtype(dtype)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    result = rewrite(to_plain(adapter, as_lora), format, component=component)
    require_new([result.output_path(out)], overwrite=overwrite)
    norm = said_norm(result)  # before the input may be replaced
    path = save(result, out, storage, overwrite=overwrite)
    typer.echo(f"Written: {path}{norm}")
