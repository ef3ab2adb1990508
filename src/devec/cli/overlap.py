"""``devec overlap``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from devec.cli.shared.options import (
    AllowPickle,
    Base,
    Device,
    JsonFile,
    MaxRank,
    Overwrite,
    Sources,
)
from devec.cli.shared.reports import json_writer, require_report
from devec.cli.shared.sources import read_sources
from devec.cli.shared.tables import module_type, new_table, show

if TYPE_CHECKING:
    from devec.operations.overlap import ModuleOverlap, Overlap


def overlap_command(
    sources: Sources,
    base: Base = None,
    device: Device = None,
    json: JsonFile = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure how much adapters overlap, and compare with chance."""
    from devec import overlap
    from devec.files.staging import write_all

    require_report(json, sources, overwrite=overwrite)
    adapters = read_sources(sources, base, max_rank, allow_pickle=allow_pickle)
    if device is not None:
        adapters = [adapter.to(device) for adapter in adapters]
    result = overlap(adapters)
    if json:
        write_all({json: json_writer(_overlap_report(result))}, overwrite=overwrite)
    _print_overlap_table(result)


def _print_overlap_table(result: Overlap) -> None:
    """Print overlaps by pair and type of module."""
    table = new_table(
        "module",
        "modules",
        "largest cos²",
        "random edge",
        "above edge",
        "cosine",
    )
    rows: dict[tuple[tuple[str, str], str], list[ModuleOverlap]] = {}
    for row in result.modules:
        rows.setdefault((row.pair, module_type(row.module)), []).append(row)
    order = list(result.cosines)
    for (pair, kind), group in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        best = max(group, key=lambda r: r.largest)
        above = sum(int((r.squared_cosines > r.edge).sum()) for r in group)
        total = sum(len(r.squared_cosines) for r in group)
        table.add_row(
            f"{' + '.join(pair)}: {kind}",
            str(len(group)),
            f"{best.largest:.3f}",
            f"{best.edge:.3f}",
            f"{above} of {total}",
            f"{sum(r.cosine for r in group) / len(group):.3f}",
        )
    show("Overlap, by pair and type of module", table)
    for pair, value in result.cosines.items():
        typer.echo(f"{' + '.join(pair)}: cosine of the whole adapters {value:.3f}")


def _overlap_report(result: Overlap) -> dict[str, Any]:
    """The full report, a row for each pair and module."""
    return {
        "cosines": [{"pair": pair, "cosine": c} for pair, c in result.cosines.items()],
        "modules": [
            {
                "module": row.module,
                "pair": row.pair,
                "ranks": row.ranks,
                "squared_cosines": row.squared_cosines,
                "random_edge": row.edge,
                "cosine": row.cosine,
            }
            for row in result.modules
        ],
    }
