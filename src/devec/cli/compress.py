"""``devec compress``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.shared.options import (
    AllowPickle,
    AsLora,
    Base,
    Device,
    Dtype,
    Format,
    MaxRank,
    OutPath,
    Overwrite,
    Source,
)
from devec.cli.shared.results import storage_dtype, write_result
from devec.cli.shared.sources import read_source
from devec.cli.shared.tables import print_errors
from devec.errors import IncompatibleError


def compress_command(
    source: Source,
    out: OutPath,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Largest rank of any module.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="F", help="Fraction of each module's squared norm to keep."),
    ] = None,
    as_lora: AsLora = None,
    format: Format = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Lower the ranks of an adapter at the least error."""
    from devec import as_lora as nearest_lora
    from devec import compress

    storage = storage_dtype(dtype)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    if device is not None:
        adapter = adapter.to(device)
    options = {"--rank": rank, "--energy": energy, "--as-lora": as_lora}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise IncompatibleError(f"give one of {', '.join(options)}, got {got}")
    if as_lora is None:
        result = compress(adapter, rank=rank, energy=energy)
    else:
        result = nearest_lora(adapter, as_lora)
    line = write_result(
        result.adapter,
        out,
        storage,
        lambda _: f", relative error {result.error:.3g}",
        format=format,
        overwrite=overwrite,
    )
    print_errors(adapter, result)
    typer.echo(line)
