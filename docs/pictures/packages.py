"""Draw the packages of devec and their imports: docs/pictures/packages.svg.

    python docs/pictures/packages.py

The rows are the layers of `.importlinter`, and the arrows are the imports that grimp finds. An
arrow that follows from others (a imports b, b imports c, so a may import c) is left out, and so are
the exceptions that the contract declares.
"""

from __future__ import annotations

import configparser
import math
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_name("packages.svg")

ROLES = {  # package → its horizontal position, and its purpose
    "cli": (300, "one file a command"),
    "demo": (420, "a small pool to try"),
    "streaming": (160, "files in, files out"),
    "hosts": (640, "live models"),
    "plots": (850, "pictures"),
    "decomposition": (190, "shared, unique, common"),
    "operations": (150, "combine, compress, …"),
    "formats": (560, "PEFT, single files"),
    "adapters": (320, "values and their algebra"),
    "base_model": (740, "base weights"),
    "deltas": (230, "the ΔW of one module"),
    "files": (660, "bytes on disk and Hub"),
    "arguments": (116, "numbers from users"),
    "linalg": (370, "plain tensors"),
    "naming": (810, "names of modules"),
    "lazy": (230, "read on access"),
    "errors": (520, "errors and warnings"),
}
WIDTH, STEP, BOX = 960, 84, (172, 46)
COLOURS = {"paper": "#fbfaf7", "edge": "#d8d4ca", "box": "#ffffff", "line": "#8a8578"}
INK, MUTED, BAND = "#22303c", "#5f6b75", "#f1eee6"


def layers() -> list[list[str]]:
    """The layers of the contract from top to bottom, without `__main__`, which is a script."""
    rows = [[name.strip() for name in line.split("|")] for line in contract("layers")]
    return [row for row in rows if row != ["__main__"]]


def contract(option: str) -> list[str]:
    """The lines of an option of the contract of packages."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    lines = contracts["importlinter:contract:packages"].get(option, "").split("\n")
    return [line.strip() for line in lines if line.strip()]


def imports() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports the second."""
    exceptions = contract("ignore_imports")
    graph = grimp.build_graph("devec", cache_dir=None)
    found = set()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = tuple(f"{name}.".split(".")[1] for name in (module, other))
            if f"{module} -> {other}" in exceptions:
                continue
            if pair[0] != pair[1] and set(pair) <= set(ROLES):
                found.add(pair)
    return found


def needed(arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""
    after = {name: {b for a, b in arrows if a == name} for name in ROLES}

    def below(name: str) -> set[str]:
        return after[name].union(*map(below, after[name]))

    return sorted(
        (a, b) for a, b in arrows if not any(b in below(other) for other in after[a] - {b})
    )


def draw() -> str:
    """The picture as SVG."""
    rows = layers()
    y = {name: 40 + STEP * layer for layer, row in enumerate(rows) for name in row}
    if y.keys() != ROLES.keys():
        raise ValueError(f"the picture and the layers differ in {sorted(y.keys() ^ ROLES.keys())}")
    height = 40 + STEP * len(rows) - 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        'role="img" aria-label="The packages of devec, and which imports which">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{COLOURS["line"]}"/>'
        "</marker></defs>",
        f'<rect width="{WIDTH}" height="{height}" rx="14" fill="{COLOURS["paper"]}" '
        f'stroke="{COLOURS["edge"]}"/>',
    ]
    parts += [
        f'<rect x="14" y="{28 + STEP * layer}" width="{WIDTH - 28}" height="70" rx="8" '
        f'fill="{BAND}"/>'
        for layer in range(len(rows))
    ]
    parts += [arrow(ROLES[a][0], y[a], ROLES[b][0], y[b]) for a, b in needed(imports())]
    parts += [box(name, x, y[name], role) for name, (x, role) in ROLES.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A line from the lower side of a box to the upper side of another."""
    start = x0 + 0.25 * max(-BOX[0], min(BOX[0], x1 - x0)), y0 + BOX[1]
    end = x1 + 0.25 * max(-BOX[0], min(BOX[0], x0 - x1)), y1
    length = math.hypot(end[0] - start[0], end[1] - start[1])
    end = end[0] - 2 * (end[0] - start[0]) / length, end[1] - 2 * (end[1] - start[1]) / length
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
        f'stroke="{COLOURS["line"]}" stroke-width="1.4" marker-end="url(#tip)"/>'
    )


def box(name: str, x: float, y: float, role: str) -> str:
    """A package with its name and its purpose."""
    return (
        f'<rect x="{x - BOX[0] / 2}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="7" '
        f'fill="{COLOURS["box"]}" stroke="{COLOURS["edge"]}"/>'
        f'<text x="{x}" y="{y + 20}" text-anchor="middle" font-size="15" font-weight="bold" '
        f'fill="{INK}">{escape(name)}</text>'
        f'<text x="{x}" y="{y + 37}" text-anchor="middle" font-size="12.5" fill="{MUTED}">'
        f"{escape(role)}</text>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
