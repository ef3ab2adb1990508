"""What commands print: tables, progress, errors by type of module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from devec.lazy import outlines
from devec.streaming.processes import is_first

if TYPE_CHECKING:
    from rich.table import Table

    from devec.adapters.adapter import Adapter
    from devec.operations.compress import Compression


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
    if not (console.is_terminal and is_first()):
        yield lambda *_: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda *_: progress.advance(task)


def ranged(values: Sequence[int]) -> str:
    """The range of integers, as ``4`` or ``2-8``."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
