"""Printing the results of a decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from devec.cli.shared.tables import module_type, new_table, ranged, show
from devec.errors import IncompatibleError

if TYPE_CHECKING:
    from devec.decomposition.findings import ModuleSplit
    from devec.decomposition.question import Threshold
    from devec.decomposition.result import Decomposition
    from devec.streaming.written import WrittenDecomposition


def parse_threshold(text: str) -> Threshold:
    """The threshold of a ``--threshold`` option: a number or ``"auto"``."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise IncompatibleError(
            f"--threshold is a number in (0, 1] or 'auto', got {text!r}"
        ) from None


def print_parts(parts: Decomposition | WrittenDecomposition) -> None:
    """Print what adapters share, by group and type of module, and what was not compared."""
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
            f"{100 * shared_energy(splits):.1f} %",
            f"{best.largest:.3f}",
            f"{best.edge:.3f}",
            f"{best.threshold:.3f}",
        )
    show("Shared subspaces, by type of module", table)
    _print_not_compared(parts)
    _print_carried(parts)
    if parts.nothing_shared:
        from devec.decomposition.findings import nothing_shared

        typer.echo(nothing_shared(parts.splits, parts.record["parameters"]["threshold"]))


def shared_energy(splits: Sequence[ModuleSplit]) -> float:
    """Fraction of the adapters' squared norm that lies in the shared subspaces."""
    total = math.fsum(norm**2 for s in splits for norm in s.norms)
    shared = math.fsum(norm**2 for s in splits for norm in s.shared_norms)
    return min(1.0, shared / total) if total else 0.0


def _print_not_compared(parts: Decomposition | WrittenDecomposition) -> None:
    """Print how many modules were not compared because some adapter lacks them."""
    modules = {module for adapter in parts.unique.values() for module in adapter.modules}
    partial = len(modules - {split.module for split in parts.splits})
    if partial:
        typer.echo(f"{partial} modules are missing from some adapters; they are unique as a whole.")


def _print_carried(parts: Decomposition | WrittenDecomposition) -> None:
    """Print the carried tensors, which are written to the unique parts."""
    for name, adapter in parts.unique.items():
        if adapter.carried:
            keys = ", ".join(sorted(adapter.carried))
            typer.echo(f"Carried over whole to {name}-unique (not a delta): {keys}")
