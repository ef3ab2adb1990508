"""What the commands share: sources in, tables and reports out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devec.cli.sources import name_and_path
from devec.cli.tables import print_nearest
from devec.errors import IncompatibleError, OutputError
from devec.lazy import outlines

if TYPE_CHECKING:
    import torch

    from devec.adapters.adapter import Adapter
    from devec.files.staging import Writer

_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def in_format(adapter: Adapter, wanted: str | None) -> Adapter:
    """A result in the format asked for, under the record of the operation that made it.

    Args:
        adapter: The result.
        wanted: As on the command line; None for the format it has.

    Returns:
        The adapter.
    """
    import dataclasses

    from devec import convert

    if wanted is None:
        return adapter
    return dataclasses.replace(convert(adapter, wanted), provenance=adapter.provenance)


def to_plain(adapter: Adapter, rank: int | None) -> Adapter:
    """A result as the nearest plain LoRA, if that is asked for; prints how near it is.

    Args:
        adapter: The result.
        rank: As on the command line; None for the result as it is.

    Returns:
        The adapter, under the record of the operation that made it.
    """
    from devec import as_lora
    from devec.operations.as_lora import with_lora_record

    if rank is None or all(delta.gain is None for delta in outlines(adapter.modules).values()):
        return adapter
    result = as_lora(adapter, rank)
    print_nearest(adapter.name, adapter, result)
    return with_lora_record(adapter, result, rank)


def said_norm(adapter: Adapter) -> str:
    """The norm of a result for a message; nothing where a DoRA was only passed on.

    Its norm would need the base weights, which nothing else did.

    Returns:
        The words.
    """
    from devec.deltas.gains import Magnitude

    known = outlines(adapter.modules).values()
    passed_on = any(isinstance(delta.gain, Magnitude) for delta in known)
    return "" if passed_on else f", norm {adapter.norm():.4g}"


def save(adapter: Adapter, out: Path, dtype: torch.dtype | None, *, overwrite: bool) -> Path:
    """Write a result under the name that its path gives it.

    Args:
        adapter: The result.
        out: As on the command line.
        dtype: Storage type.
        overwrite: Whether an output that exists may be replaced.

    Returns:
        The path written.
    """
    import dataclasses

    path = adapter.output_path(out)
    suffix = adapter.layout.suffix if adapter.layout is not None else ""
    named = dataclasses.replace(adapter, name=path.name.removesuffix(suffix))
    return named.save_pretrained(path, dtype=dtype, overwrite=overwrite)


def storage_dtype(name: str | None) -> torch.dtype | None:
    """The storage type of a ``--dtype`` option.

    Args:
        name: As on the command line, or None.

    Returns:
        The type, None for that of the input.

    Raises:
        IncompatibleError: If there is no such type.
    """
    from devec.files.safetensors_reader import STORAGE_DTYPES

    if name is None:
        return None
    dtype = STORAGE_DTYPES.get(_DTYPE_ALIASES.get(name, name))
    if dtype is None:
        raise IncompatibleError(f"--dtype is one of {', '.join(STORAGE_DTYPES)}, got {name!r}")
    return dtype


def json_writer(report: Any) -> Writer:  # noqa: ANN401
    """A function that writes a report as JSON; numbers that JSON has not become null."""

    def write(path: Path) -> None:
        text = json.dumps(_json_values(report), indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

    return write


def _json_values(value: Any) -> Any:  # noqa: ANN401
    """Replace tensors by lists, and infinities and NaN by None."""
    if isinstance(value, dict):
        return {str(k): _json_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _json_values(value.tolist()) if hasattr(value, "tolist") else value


def require_new(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse outputs that exist before any work is done.

    Args:
        paths: What may be written.
        overwrite: Whether it may be replaced.

    Raises:
        OutputError: If any exists and may not be.
    """
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"output exists: {', '.join(existing[:5])}; allow it with --overwrite")


def require_report(json: Path | None, sources: Sequence[str], *, overwrite: bool) -> None:
    """Refuse a report that cannot be written or would take the place of an input.

    Args:
        json: As on the command line.
        sources: As on the command line.
        overwrite: Whether a report that exists may be replaced.

    Raises:
        IncompatibleError: If it is a source, or no path.
        OutputError: If it exists and may not be replaced.
    """
    if json is None:
        return
    if str(json) == "-":
        raise IncompatibleError("--json writes a file, not to standard output; name one")
    paths = [Path(name_and_path(source)[1]) for source in sources]
    if any(json.resolve() in (path.resolve(), *path.resolve().parents) for path in paths):
        raise IncompatibleError(f"the report {json} (--json) is a source; choose another path")
    require_new([json], overwrite=overwrite)
