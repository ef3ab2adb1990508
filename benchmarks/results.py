"""Sections of figures: as JSON, each with where and when it was measured, and as one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What a figure should reach.

    Attributes:
        what: What the figure is.
        value: The figure.
        limit: The most it may be, or the least.
        unit: Unit of both, one of `UNITS`.
        at_least: Whether the limit is the least.
    """

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """The bar as a line of a list."""
        value, limit = (cell(number, self.unit) for number in (self.value, self.limit))
        sign = "≥" if self.at_least else "≤"
        return f"- **{'met' if self.met else 'not met'}**: {self.what}: {value}, bar {sign} {limit}"


@dataclass(frozen=True)
class Table:
    """Figures, a row each.

    Attributes:
        title: What they are.
        units: Column → unit, one of `UNITS`, in order.
        rows: Column → figure, for every row; None where there is none.
        bars: What the figures should reach.
        notes: What else there is to say, a paragraph each.
    """

    title: str
    units: Mapping[str, str]
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """All figures on one question.

    Attributes:
        title: The heading.
        text: How they are measured.
        tables: The figures.
    """

    title: str
    text: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Measured:
    """A section and where it comes from.

    Attributes:
        section: The figures.
        command: The command that was run.
        date: The day.
        machine: What it ran on.
        versions: Package → version.
        quick: Whether the sizes are tiny, so that figures mean nothing.
    """

    section: Section
    command: str
    date: str
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False


def load(path: Path) -> dict[str, Measured]:
    """Section name → what was measured before; nothing if there is no such file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {name: _measured(**found) for name, found in stored.items()}


def _measured(section: Row, **rest: Any) -> Measured:  # noqa: ANN401
    """A section as it was stored."""
    tables = [
        Table(**{**table, "bars": [Bar(**bar) for bar in table["bars"]]})
        for table in section["tables"]
    ]
    return Measured(Section(**{**section, "tables": tables}), **rest)


def save(path: Path, found: Mapping[str, Measured]) -> None:
    """Write all sections as JSON."""
    stored = {name: asdict(measured) for name, measured in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _seconds(value: float) -> str:
    """A time with the digits that mean something."""
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _size(value: float) -> str:
    """A number of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}" if name == "GB" else f"{value / unit:.0f} {name}"
    return f"{value:.0f} B"


def _times(value: float) -> str:
    """A multiple."""
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
    """A figure as it is printed."""
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


def render(found: Mapping[str, Measured]) -> str:
    """The whole page: commands and machines first, then every section."""
    commands = dict.fromkeys(measured.command for measured in found.values())
    places = list(dict.fromkeys(map(_place, found.values())))
    listed = ", ".join(f"`{command}`" for command in commands)
    parts = [
        "# Results",
        f"Made by {listed}.",
        "Figures are medians. What is compared ran in turn, A B A B, in one run, and ratios are "
        "medians of the ratios pair by pair. MB and GB are powers of ten.",
        *(f"{_label(index, places)}{place}" for index, place in enumerate(places)),
    ]
    for measured in found.values():
        where = _label(places.index(_place(measured)), places)
        quick = " Tiny sizes: these figures mean nothing." if measured.quick else ""
        origin = f"{where}{measured.date}, `{measured.command}`.{quick}"
        parts.append(render_section(measured.section, origin))
    return "\n\n".join(parts) + "\n"


def _place(measured: Measured) -> str:
    """Machine and versions in one paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in measured.versions.items())
    parts = [f"{name}: {value}" for name, value in measured.machine.items()]
    return "; ".join([*parts, f"versions: {versions}"]) + "."


def _label(index: int, places: Sequence[str]) -> str:
    """Which of several machines; nothing where there is one."""
    return f"Machine {index + 1}: " if len(places) > 1 else ""
