"""``devec decompose``."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devec._version import __version__
from devec.cli.common import json_writer, require_report, storage_dtype
from devec.cli.options import (
    AllowPickle,
    AsLora,
    Base,
    Device,
    Dtype,
    Format,
    JsonFile,
    MaxRank,
    Overwrite,
    Sources,
)
from devec.cli.sources import begin_reading, read_sources
from devec.cli.tables import module_type, new_table, print_nearest, progress_bar, ranged, show
from devec.errors import IncompatibleError

if TYPE_CHECKING:
    from devec.decomposition.findings import ModuleSplit
    from devec.decomposition.question import Threshold
    from devec.decomposition.result import Decomposition
    from devec.streaming.written import WrittenDecomposition


def decompose(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to.")],
    threshold: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="Squared cosine above which directions count as shared, in (0, 1], or 'auto': "
            "more than chance would give.",
        ),
    ] = "0.85",
    method: Annotated[
        str, typer.Option(metavar="M", help="chain (the paper), mean or principal.")
    ] = "chain",
    scope: Annotated[
        str,
        typer.Option(metavar="S", help="all, pairwise, or iterative (with --target)."),
    ] = "all",
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Adapter to split, for --scope iterative.")
    ] = None,
    as_lora: AsLora = None,
    format: Format = None,
    base: Base = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Write true ranks; leave out modules of rank 0.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    json: JsonFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Split adapters into what they share and what is unique to each.

    Writes DIR/NAME-unique, DIR/NAME-shared and DIR/common (scope pairwise: DIR/A+B-shared; scope
    iterative: DIR/TARGET-unique and DIR/TARGET-shared), directories for PEFT and .safetensors files
    otherwise. Parts that are zero are not written.
    """
    require_report(json, sources, overwrite=overwrite)
    begin_reading(sources)
    from devec.streaming.decompose_to import decompose_to
    from devec.streaming.processes import Team, launched

    gc.freeze()  # of what libraries have made so far nothing will ever be garbage

    storage_type, level = storage_dtype(dtype), parse_threshold(threshold)
    adapters = read_sources(sources, base, max_rank, allow_pickle=allow_pickle)
    modules = {m for a in adapters for m in a.modules}
    bar = progress_bar("decomposing", -(-len(modules) // launched()))
    with Team(launched()) as team, bar as step:
        written = decompose_to(
            out,
            adapters,
            threshold=level,
            method=method,
            scope=scope,
            target=target,
            dtype=storage_type,
            compact=compact,
            as_lora=as_lora,
            format=format,
            device=device,
            overwrite=overwrite,
            report=(json, lambda written: json_writer(_report(written))) if json else None,
            progress=step,
            team=team,
        )
    if written is None:  # another process speaks for this one
        return
    for label, (part, result) in written.nearest.items():
        print_nearest(label, part, result)
    print_parts(written)
    if written.processes > 1:
        typer.echo(f"{written.processes} processes shared the work.")
    _tell(written, json)
    if written.doras:
        typer.echo("Activate unique parts first: a DoRA rescales what is listed before it.")


def _tell(written: WrittenDecomposition, json: Path | None) -> None:
    """Say what became of all outputs."""
    paths = [*written.written.values(), *([json] if json else [])]
    if not paths:
        typer.echo("Nothing was written.")
    there = {*written.removed, *written.left}
    fates = {
        "Written": sorted(paths),
        "Zero, not written": [path for path in written.zero if path not in there],
        "Zero, not written; an older one was removed": written.removed,
        "Zero, not written; left as it was": written.left,
    }
    for fate, held in fates.items():
        if held:
            typer.echo(f"{fate}: {', '.join(map(str, held))}")


def parse_threshold(text: str) -> Threshold:
    """The threshold of the command line.

    Args:
        text: As on the command line.

    Returns:
        The threshold.

    Raises:
        IncompatibleError: If it is neither a number nor ``"auto"``.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise IncompatibleError(
            f"--threshold is a number in (0, 1] or 'auto', got {text!r}"
        ) from None


def print_parts(parts: Decomposition | WrittenDecomposition) -> None:
    """Print what was found, by group and type of module.

    Args:
        parts: The decomposition, in memory or in files.
    """
    table = new_table(
        "module",
        "modules",
        "rank",
        "shared rank",
        "shared energy",
        f"largest {parts.splits[0].quantity if parts.splits else 'cos²'}",
        "random edge",
        "threshold",
    )
    rows: dict[tuple[str, str], list[ModuleSplit]] = {}
    several = len({split.group for split in parts.splits}) > 1
    for split in parts.splits:
        group = f"{' + '.join(split.group)}: " if several else ""
        rows.setdefault((group, module_type(split.module)), []).append(split)
    order = list(dict.fromkeys(group for group, _ in rows))
    for (group, kind), splits in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        best = max(splits, key=lambda s: s.largest)
        table.add_row(
            group + kind,
            str(len(splits)),
            ranged([rank for s in splits for rank in s.ranks]),
            ranged([s.shared_rank for s in splits]),
            _percent(_energy(splits)),
            f"{best.largest:.3f}",
            f"{best.edge:.3f}",
            f"{best.threshold:.3f}",
        )
    show("Shared subspaces, by type of module", table)
    _print_partial(parts)
    _print_carried(parts)
    if parts.nothing_shared:
        from devec.decomposition.findings import nothing_shared

        typer.echo(nothing_shared(parts.splits, parts.record["parameters"]["threshold"]))


def _print_partial(parts: Decomposition | WrittenDecomposition) -> None:
    """Say how many modules were not compared, since not all adapters have them."""
    modules = {module for adapter in parts.unique.values() for module in adapter.modules}
    partial = len(modules - {split.module for split in parts.splits})
    if partial:
        typer.echo(f"{partial} modules are not in all adapters; all of those is unique.")


def _energy(splits: Sequence[ModuleSplit]) -> float:
    """Share of the squared norm of the adapters that lies in the shared subspaces."""
    total = math.fsum(norm**2 for s in splits for norm in s.norms)
    shared = math.fsum(norm**2 for s in splits for norm in s.shared_norms)
    return min(1.0, shared / total) if total else 0.0


def _percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.1f} %"


def _print_carried(parts: Decomposition | WrittenDecomposition) -> None:
    """Name what is not a delta and went with the unique part."""
    for name, adapter in parts.unique.items():
        if adapter.carried:
            keys = ", ".join(sorted(adapter.carried))
            typer.echo(f"Carried over whole to {name}-unique (not a delta): {keys}")


def _report(parts: WrittenDecomposition) -> dict[str, Any]:
    """Where it came from and all that was found, a row per module and group."""
    records = parts.provenance
    return {
        "devec_version": __version__,
        **parts.record,
        "written": list(parts.written),
        "as_lora": {name: r["as_lora"] for name, r in records.items() if "as_lora" in r},
        "modules": [
            {
                "module": s.module,
                "group": s.group,
                "ranks": s.ranks,
                "threshold": s.threshold,
                "random_edge": s.edge,
                "quantity": s.quantity,
                "largest": s.largest,
                "spectrum": s.spectrum,
                "shared_rank": s.shared_rank,
                "norms": s.norms,
                "shared_norms": s.shared_norms,
                "shared_energy": _energy([s]),
            }
            for s in parts.splits
        ],
    }
