"""What the commands share: sources in, tables and reports out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from devec.errors import IncompatibleError, OutputError
from devec.lazy import outlines
from devec.streaming.processes import is_first

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from devec.adapters.adapter import Adapter
    from devec.files.staging import Writer
    from devec.operations.compress import Compression

_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def begin_reading(sources: Sequence[str]) -> None:
    """Begin to digest the files of sources while libraries are being loaded.

    Args:
        sources: As on the command line.
    """
    from devec.files.digest import begin

    for source in sources:
        path = Path(_name_and_path(source)[1])
        with suppress(OSError, ValueError):  # what is wrong with a path is said when it is read
            usual = path / "adapter_model.safetensors"
            files = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
            if len(files) == 1 or not path.is_dir():  # of several the user has to choose
                begin(files[0] if files else path)


def read_sources(
    sources: Sequence[str],
    base: str | None = None,
    max_rank: int | None = None,
    *,
    allow_pickle: bool = False,
) -> list[Adapter]:
    """Read several sources, as `read_source` does one.

    Args:
        sources: As on the command line.
        base: As in `read_source`.
        max_rank: As in `read_source`.
        allow_pickle: As in `read_source`.

    Returns:
        The adapters, in order.
    """
    return [read_source(source, base, max_rank, allow_pickle=allow_pickle) for source in sources]


def read_source(
    source: str,
    base: str | None = None,
    max_rank: int | None = None,
    *,
    allow_pickle: bool = False,
) -> Adapter:
    """Read ``PATH`` or ``NAME=PATH``, whose tensors are read when they are asked for.

    Args:
        source: As on the command line.
        base: Base model to read weights from where they are needed, and to put on record unless it
            is a path and there is another on record.
        max_rank: Largest rank that a LoHa or LoKr is rewritten to.
        allow_pickle: Whether pickled files are read.

    Returns:
        The adapter, under its name.

    Raises:
        IncompatibleError: If the name cannot be part of a file name.
    """
    import dataclasses

    from devec import Adapter
    from devec.adapters.layout import MAX_RANK
    from devec.files.locate import exists

    name, path = _name_and_path(source)
    adapter = Adapter.from_pretrained(
        path,
        name,
        max_rank=MAX_RANK if max_rank is None else max_rank,
        allow_pickle=allow_pickle,
        base=base,
        lazy=True,
    )
    if base is None or adapter.layout is None:
        return adapter
    if exists(base) and adapter.layout.describe().get("base_model"):
        return adapter  # where the weights lie is no better name than the one on record
    return dataclasses.replace(adapter, layout=adapter.layout.rebased(base))


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
    from devec.operations.as_lora import recorded

    if rank is None or all(delta.gain is None for delta in outlines(adapter.modules).values()):
        return adapter
    result = as_lora(adapter, rank)
    print_nearest(adapter.name, adapter, result)
    return recorded(adapter, result, rank)


def print_nearest(name: str, adapter: Adapter, result: Compression) -> None:
    """Print how near a plain LoRA is to the DoRA it stands for.

    Args:
        name: What the result is called.
        adapter: The DoRA.
        result: The LoRA.
    """
    print_errors(adapter, result)
    typer.echo(f"{name} as plain LoRA: relative error {result.error:.3g}\n")


def print_errors(adapter: Adapter, result: Compression) -> None:
    """Print ranks and errors by type of module.

    Args:
        adapter: The adapter before.
        result: What became of it.
    """
    table = new_table("module", "modules", "rank", "now", "error")
    kinds: dict[str, list[str]] = {}
    for module in adapter.modules:
        kinds.setdefault(module_type(module), []).append(module)
    before, kept = outlines(adapter.modules), outlines(result.adapter.modules)
    for kind, modules in kinds.items():
        table.add_row(
            kind,
            str(len(modules)),
            ranged([before[m].rank for m in modules]),
            ranged([kept[m].rank if m in kept else 0 for m in modules]),
            f"{max(result.errors[m] for m in modules):.3g}",
        )
    show("Ranks, by type of module", table)


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


def _name_and_path(source: str) -> tuple[str | None, str]:
    """Split ``NAME=PATH``, where that is not itself a path that exists."""
    name, equals, path = source.partition("=")
    if not equals or Path(source).exists():
        return None, source
    if not name or name.startswith(".") or set(name) & set("/\\"):
        raise IncompatibleError(
            f"no such file or directory: {source!r}; and read as NAME=PATH, {name!r} cannot be a "
            "name, since names become part of file names"
        )
    return name, path


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
    paths = [Path(_name_and_path(source)[1]) for source in sources]
    if any(json.resolve() in (path.resolve(), *path.resolve().parents) for path in paths):
        raise IncompatibleError(f"the report {json} (--json) is a source; choose another path")
    require_new([json], overwrite=overwrite)


def module_type(module: str) -> str:
    """A module's name with its indices replaced, e.g. ``layers.*.self_attn.q_proj``.

    Where dots are written as underscores, a number behind a plural is an index.

    Returns:
        The name.
    """
    dotted = r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)|(?<=\[)\d+(?=\])"
    return re.sub(dotted if "." in module else r"(?<=s_)\d+(?=_|$)", "*", module)


def new_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def show(title: str, table: Table) -> None:
    """Print a table under its title, as wide as it needs to be where the output is no terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=160)
    typer.echo(f"{title}:")
    console.print(table)
    typer.echo()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar on standard error.

    Args:
        what: What is being done.
        total: Number of steps.

    Yields:
        A function to call after every step.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    unseen = not (console.is_terminal and is_first())
    with Progress(console=console, transient=True, disable=unseen) as progress:
        task = progress.add_task(what, total=total)
        yield lambda *_: progress.advance(task)


def ranged(values: Sequence[int]) -> str:
    """The range of integers, as ``4`` or ``2-8``."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
