"""Printing: tables, progress, errors by type of module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from devec.lazy import outlines
from devec.streaming.processes import is_first

if TYPE_CHECKING:
    from rich.table import Table

    from devec.adapters.adapter import Adapter
    from devec.operations.compress import Compression


def print_nearest(name: str, adapter: Adapter, result: Compression) -> None:
    """Print the errors of the plain LoRA that approximates a DoRA, under the result's name."""
    print_errors(adapter, result)
    typer.echo(f"{name} as plain LoRA: relative error {result.error:.3g}\n")


def print_errors(adapter: Adapter, result: Compression) -> None:
    """Print the ranks of an adapter and of its approximation, and the errors, by type of module."""
    table = new_table("module", "modules", "rank", "now", "error")
    kinds: dict[str, list[str]] = {}
    for module in adapter.modules:
        kinds.setdefault(module_type(module), []).append(module)
    before, after = outlines(adapter.modules), outlines(result.adapter.modules)
    for kind, modules in kinds.items():
        table.add_row(
            kind,
            str(len(modules)),
            ranged([before[m].rank for m in modules]),
            ranged([after[m].rank if m in after else 0 for m in modules]),
            f"{max(result.errors[m] for m in modules):.3g}",
        )
    show("Ranks, by type of module", table)


def module_type(module: str) -> str:
    """A module's name with its indices replaced, e.g. ``layers.*.self_attn.q_proj``."""
    # in names with underscores for dots, a number after a plural is an index
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
    """Print a table under its title, up to 160 characters wide if the output is no terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=160)
    typer.echo(f"{title}:")
    console.print(table)
    typer.echo()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error.

    Args:
        what: Name of the work.
        total: Number of steps.

    Yields:
        A function to call after every step, with any arguments.
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
