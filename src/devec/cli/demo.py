"""``devec demo``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from devec.cli.shared.parts import parse_threshold, print_parts
from devec.cli.shared.tables import new_table, show

if TYPE_CHECKING:
    from devec.demo.run import Demo


def demo_command(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Directory to keep the parts in. [default: a temporary one]"
        ),
    ] = None,
    threshold: Annotated[str, typer.Option(metavar="T", help="As for decompose.")] = "auto",
    method: Annotated[str, typer.Option(metavar="M", help="As for decompose.")] = "mean",
) -> None:
    """Decompose a small pool of adapters and measure it.

    The pool is part of devec: adapters of a vision transformer, five for the same digits in
    different visual domains and one for an unrelated task.
    """
    from devec.demo.run import run

    level = parse_threshold(threshold)
    with tempfile.TemporaryDirectory() as temporary:
        measured = run(
            out or Path(temporary),
            threshold=level,
            method=method,
            progress=lambda step: typer.echo(f"{step} ...", err=True),
        )
    _print_overlap(measured)
    print_parts(measured.parts)
    _print_accuracy(measured)
    if out is not None:
        typer.echo(f"The parts are in {out}")


def _print_overlap(measured: Demo) -> None:
    """Print the overlap of every pair of the pool, over all modules."""
    table = new_table(
        "pair",
        "largest cos²",
        "mean of largest",
        "mean random edge",
        "cosine of the adapters",
    )
    for pair, cosine in measured.overlap.cosines.items():
        rows = [row for row in measured.overlap.modules if row.pair == pair]
        table.add_row(
            " + ".join(pair),
            f"{max(row.largest for row in rows):.3f}",
            f"{sum(row.largest for row in rows) / len(rows):.3f}",
            f"{sum(row.edge for row in rows) / len(rows):.3f}",
            f"{cosine:.3f}",
        )
    show("Overlap of column spaces, by pair of adapters (20 modules each)", table)


def _print_accuracy(measured: Demo) -> None:
    """Print the held-out accuracies."""
    kinds = ("base", "original", "shared", "unique")
    table = new_table(
        "domain",
        *(f"{kind} only" if kind in ("shared", "unique") else kind for kind in kinds),
    )
    for domain, own in measured.own.items():
        cells = (f"{own[kind]:.3f}" if kind in own else "-" for kind in kinds)
        table.add_row(domain, *cells)
    means = [[m[kind] for m in measured.own.values() if kind in m] for kind in kinds]
    table.add_row("mean", *(f"{sum(m) / len(m):.3f}" if m else "-" for m in means))
    show("Accuracy on held-out digits of the adapter's own domain", table)
    table = new_table(
        "coefficient",
        "originals",
        "unique",
    )
    for coefficient, sums in measured.sums.items():
        table.add_row(f"{coefficient:g}", f"{sums['original']:.3f}", f"{sums['unique']:.3f}")
    show("All adapters added up: mean accuracy over the domains", table)
