"""Results of benchmarks: stored as JSON with date, machine and versions, and rendered as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A bar that a figure should meet.

    Attributes:
        what: Description of the figure.
        value: The figure.
        limit: The largest value that meets the bar, or the smallest.
        unit: Unit of both, one of `UNITS`.
        at_least: Whether the limit is the smallest value.
    """

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure meets the bar."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """The bar as an item of a list in Markdown."""
        value, limit = (cell(number, self.unit) for number in (self.value, self.limit))
        sign = "≥" if self.at_least else "≤"
        return f"- **{'met' if self.met else 'not met'}**: {self.what}: {value}, bar {sign} {limit}"


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Attributes:
        title: The title.
        units: Column → unit, one of `UNITS`, in order.
        rows: For each row, column → figure; None for an empty cell.
        bars: The bars that figures should meet.
        notes: Paragraphs below the table.
    """

    title: str
    units: Mapping[str, str]
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: The heading.
        text: How the figures are measured.
        tables: The figures.
    """

    title: str
    text: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Measured:
    """A measured section and its origin.

    Attributes:
        section: The section.
        command: The command that was run.
        date: The day.
        machine: Property of the machine → value.
        versions: Package → version.
        quick: Whether sizes were tiny, so that the figures mean nothing.
    """

    section: Section
    command: str
    date: str
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False


def load(path: Path) -> dict[str, Measured]:
    """Section name → earlier result; empty if the file does not exist."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {name: _measured(**result) for name, result in stored.items()}


def _measured(section: Row, **rest: Any) -> Measured:  # noqa: ANN401
    """A result from its JSON."""
    tables = [
        Table(**{**table, "bars": [Bar(**bar) for bar in table["bars"]]})
        for table in section["tables"]
    ]
    return Measured(Section(**{**section, "tables": tables}), **rest)


def save(path: Path, results: Mapping[str, Measured]) -> None:
    """Write all sections as JSON."""
    stored = {name: asdict(measured) for name, measured in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _seconds(value: float) -> str:
    """A time in ms or s, with three significant digits or so."""
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _size(value: float) -> str:
    """A number of bytes in B, kB, MB or GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}" if name == "GB" else f"{value / unit:.0f} {name}"
    return f"{value:.0f} B"


def _times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f} ×" if value < 100 else f"{value:,.0f} ×"


UNITS: dict[str, Callable[[Any], str]] = {
    "": str,
    "count": lambda value: f"{value:,}",
    "seconds": _seconds,
    "bytes": _size,
    "times": _times,
    "times, exactly": lambda value: f"{value:.7f} ×",
    "error": lambda value: f"{value:.6g}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "GFLOP/s": lambda value: f"{value / 1e9:.1f} GFLOP/s",
    "TFLOP": lambda value: f"{value / 1e12:.3g} TFLOP",
}


def cell(value: Any, unit: str) -> str:  # noqa: ANN401
    """A figure as text."""
    return "–" if value is None else UNITS[unit](value)


def render_table(table: Table) -> str:
    """A table with its bars and notes, in Markdown."""
    aligned = ["---" if unit == "" else "---:" for unit in table.units.values()]
    lines = [f"**{table.title}**", ""]
    if table.rows:
        lines += [f"| {' | '.join(table.units)} |", f"|{'|'.join(aligned)}|"]
    for row in table.rows:
        cells = (cell(row.get(column), unit) for column, unit in table.units.items())
        lines.append(f"| {' | '.join(cells)} |")
    for group in ([bar.line() for bar in table.bars], table.notes):
        lines += ["", *group] if group else []
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def render_section(section: Section, origin: str = "") -> str:
    """A section in Markdown."""
    parts = [f"## {section.title}", origin, section.text, *map(render_table, section.tables)]
    return "\n\n".join(part for part in parts if part)


def render(results: Mapping[str, Measured]) -> str:
    """The page: commands and machines, then all sections."""
    commands = dict.fromkeys(measured.command for measured in results.values())
    places = list(dict.fromkeys(map(_place, results.values())))
    listed = ", ".join(f"`{command}`" for command in commands)
    parts = [
        "# Results",
        f"Generated by {listed}.",
        "Figures are medians. Programs that are compared ran in turn (A B A B) in one run, and "
        "ratios are medians of pairwise ratios. MB and GB are powers of ten.",
        *(f"{_label(index, places)}{place}" for index, place in enumerate(places)),
    ]
    for measured in results.values():
        where = _label(places.index(_place(measured)), places)
        quick = " Tiny sizes: these figures mean nothing." if measured.quick else ""
        origin = f"{where}{measured.date}, `{measured.command}`.{quick}"
        parts.append(render_section(measured.section, origin))
    return "\n\n".join(parts) + "\n"


def _place(measured: Measured) -> str:
    """Machine and versions as a paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in measured.versions.items())
    parts = [f"{name}: {value}" for name, value in measured.machine.items()]
    return "; ".join([*parts, f"versions: {versions}"]) + "."


def _label(index: int, places: Sequence[str]) -> str:
    """The number of a machine, empty if there is only one."""
    return f"Machine {index + 1}: " if len(places) > 1 else ""
