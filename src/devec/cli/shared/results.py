"""Writing the adapter that a command results in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from devec.cli.shared.reports import require_new
from devec.cli.shared.tables import print_nearest
from devec.errors import IncompatibleError
from devec.lazy import outlines

if TYPE_CHECKING:
    import torch

    from devec.adapters.adapter import Adapter

_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def storage_dtype(name: str | None) -> torch.dtype | None:
    """The storage type of a ``--dtype`` option; None for that of the input."""
    from devec.files.safetensors_reader import STORAGE_DTYPES

    if name is None:
        return None
    dtype = STORAGE_DTYPES.get(_DTYPE_ALIASES.get(name, name))
    if dtype is None:
        raise IncompatibleError(f"--dtype is one of {', '.join(STORAGE_DTYPES)}, got {name!r}")
    return dtype


def as_plain(adapter: Adapter, rank: int | None) -> Adapter:
    """An adapter, or its nearest plain LoRA of a rank if one is given; prints the errors."""
    from devec import as_lora
    from devec.operations.as_lora import with_lora_record

    if rank is None or all(delta.gain is None for delta in outlines(adapter.modules).values()):
        return adapter
    result = as_lora(adapter, rank)
    print_nearest(adapter.name, adapter, result)
    return with_lora_record(adapter, result, rank)


def write_result(
    result: Adapter,
    out: Path,
    dtype: torch.dtype | None,
    summary: Callable[[Adapter], str],
    *,
    format: str | None = None,
    overwrite: bool,
) -> str:
    """Write the result of a command, named after its path.

    Args:
        result: The result.
        out: The ``--out`` option.
        dtype: Storage type; None for that of the input.
        summary: Makes the end of the line from the adapter to be written, before inputs may be
            replaced.
        format: The ``--format`` option.
        overwrite: Whether an existing output may be replaced.

    Returns:
        The line to print.
    """
    import dataclasses

    from devec import convert

    if format is not None:  # the record stays that of the operation
        converted = convert(result, format)
        result = dataclasses.replace(converted, provenance=result.provenance)
    path = result.output_path(out)
    require_new([path], overwrite=overwrite)
    text = summary(result)
    suffix = result.layout.suffix if result.layout is not None else ""
    named = dataclasses.replace(result, name=path.name.removesuffix(suffix))
    written = named.save_pretrained(path, dtype=dtype, overwrite=overwrite)
    return f"Written: {written}{text}"


def write_combination(
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
    """Write a linear combination of adapters, and print what it is.

    Args:
        adapters: The adapters.
        weights: One for each.
        out: The ``--out`` option.
        carried_from: The ``--carried-from`` option.
        as_lora: The ``--as-lora`` option.
        format: The ``--format`` option.
        dtype: Storage type; None for that of the input.
        overwrite: Whether an existing output may be replaced.
    """
    from devec import combine

    total = combine(adapters, weights, name=out.stem, carried_from=carried_from)
    terms = " ".join(f"{w:+g}·{a.name}" for a, w in zip(adapters, weights, strict=True))
    line = write_result(
        as_plain(total, as_lora),
        out,
        dtype,
        lambda result: f" = {terms}{norm_phrase(result)}",
        format=format,
        overwrite=overwrite,
    )
    typer.echo(line)


def norm_phrase(adapter: Adapter) -> str:
    """The norm of a result for a message; empty for an unchanged DoRA, which needs base weights."""
    from devec.deltas.gains import Magnitude

    known = outlines(adapter.modules).values()
    unchanged = any(isinstance(delta.gain, Magnitude) for delta in known)
    return "" if unchanged else f", norm {adapter.norm():.4g}"
