"""Draw what devec does: docs/pictures/parts.png.

    python docs/pictures/parts.py

Left: two column spaces, as planes, and the line that they share. Right: images of the pipeline of
notebook 03, made here, and the shares of good images that the notebook measured.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "notebooks")]

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import styles
import torch
from generate import printed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

import devec

PICTURE = Path(__file__).with_name("parts.png")
PAPER, EDGE, INK, MUTED = "#fbfaf7", "#d8d4ca", "#22303c", "#5f6b75"
ONE, OTHER, BOTH = "#2a6fbb", "#d9700f", "#1a8f6a"
COLUMNS = 10
CAPTION = """parts: what is unique to each style, and the common vector
(the mean of the shared parts) once"""

# A picture of space: where its three axes point on the paper.
SHARED, FIRST, SECOND = np.array([1.0, 0.36]), np.array([0.92, -0.42]), np.array([-0.12, 1.0])


def plane(ax: Axes, along: np.ndarray, colour: str) -> None:
    """The part of a plane through the shared line, seen from the side."""
    corners = [-0.75 * SHARED - 0.28 * along, 1.25 * SHARED - 0.28 * along]
    corners += [1.25 * SHARED + 1.05 * along, -0.75 * SHARED + 1.05 * along]
    ax.fill(*np.transpose(corners), color=colour, alpha=0.16, lw=0)
    ax.plot(*np.transpose([*corners, corners[0]]), color=colour, alpha=0.55, lw=0.9)


def arrow(ax: Axes, start: np.ndarray, end: np.ndarray, colour: str, width: float = 1.8) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**style, "mutation_scale": 12}, zorder=4)


def vector(ax: Axes, along: np.ndarray, shared: float, own: float, colour: str) -> np.ndarray:
    """An adapter in its plane with its two parts; returns its tip."""
    origin, foot = np.zeros(2), shared * SHARED
    tip = foot + own * along
    arrow(ax, origin, tip, INK, 2.2)
    arrow(ax, foot, tip, colour)
    return tip


def draw_spaces(ax: Axes) -> None:
    """Two planes, the line that they share, and the parts of two adapters."""
    plane(ax, FIRST, ONE)
    plane(ax, SECOND, OTHER)
    ax.plot(*np.transpose([-0.75 * SHARED, 1.25 * SHARED]), color=BOTH, lw=1.2)
    arrow(ax, np.zeros(2), 0.72 * SHARED, BOTH, 3.2)
    one = vector(ax, FIRST, 0.72, 0.72, ONE)
    other = vector(ax, SECOND, 0.72, 0.78, OTHER)
    text = {"fontsize": 11, "zorder": 5}
    ax.text(*(one / 2 + [-0.02, -0.16]), "adapter A", color=INK, ha="center", rotation=4, **text)
    ax.text(*(other / 2 + [-0.1, 0.07]), "adapter B", color=INK, ha="center", rotation=53, **text)
    ax.text(*(0.72 * SHARED + 0.72 * FIRST + [0.05, -0.03]), "unique to A", color=ONE, **text)
    ax.text(*(0.72 * SHARED + 0.42 * SECOND + [0.05, 0]), "unique to B", color=OTHER, **text)
    ax.text(*(1.28 * SHARED), "shared", color=BOTH, va="center", weight="bold", **text)
    ax.text(0.0, -0.86, "column space of A", color=ONE, **text)
    ax.text(-0.62, 1.2, "column space of B", color=OTHER, ha="center", **text)
    ax.set(xlim=(-1.1, 2.3), ylim=(-0.95, 1.6), aspect="equal")
    ax.axis("off")


def images() -> dict[str, Tensor]:
    """Images of every row, from the same noise: each style alone, then two sums at weight 1."""
    torch.set_num_threads(1)
    pipe, names = styles.load_pipeline(), list(styles.STYLES)
    for name in names:
        pipe.load_lora_weights(styles.ASSETS / name, adapter_name=name)
    devec.decompose_adapters(pipe, names, method="mean", threshold="auto")
    rows = {f"style “{name}”": [name] for name in names}
    rows["sum of\noriginals"] = names
    rows["sum of\nparts"] = [*(f"{name}_unique" for name in names), "common"]
    made = {}
    for label, active in rows.items():
        pipe.set_adapters(active, [1.0] * len(active))
        made[label] = styles.generate(pipe, COLUMNS)[0]
    return made


def measured() -> list[float]:
    """Shares of images with the right digit and every ingredient: originals, parts."""
    rows = [line.split() for line in printed("03-style-mixing-diffusers")]
    chosen = {tuple(row[1:-5]): float(row[-1]) for row in rows if row and row[0] == "3"}
    return [chosen["originals", "1.00"], chosen["uniques", "+", "common", "1.00"]]


def draw_images(figure: Figure) -> None:
    """Rows of images with their names, and a share beside each sum."""
    left, top, size, gap = 0.524, 0.85, 0.036, 0.003
    right = left + COLUMNS * (size + gap) + 0.012
    width, height = figure.get_size_inches()
    tall = size * width / height
    shares = [None, None, None, *measured()]
    label_style = {"color": INK, "fontsize": 11, "ha": "right", "va": "center"}
    share_style = {"color": INK, "fontsize": 14, "weight": "bold", "va": "center"}
    note_style = {"color": MUTED, "fontsize": 9}
    for number, ((label, made), share) in enumerate(zip(images().items(), shares, strict=True)):
        bottom = top - (number + 1) * tall - number * 0.022 - (0.035 if share is not None else 0)
        middle = bottom + tall / 2
        figure.text(left - 0.012, middle, label, **label_style)
        for column, image in enumerate(made):
            ax = figure.add_axes((left + column * (size + gap), bottom, size, tall))
            ax.imshow(image.permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        if share is not None:
            figure.text(right, middle, f"{share:.0%}", **share_style)
    note = "right digit,\nall three\nstyles"
    figure.text(right, top - 3 * tall - 0.049, note, va="bottom", **note_style)
    figure.text(left, 0.085, CAPTION, **note_style)


def draw() -> Figure:
    """The whole picture, on paper of its own, so that it reads on any background."""
    plt.rcParams.update({"font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(11, 3.8), dpi=150)
    figure.patch.set_alpha(0)
    paper = figure.add_axes((0, 0, 1, 1))
    paper.set(xlim=(0, 11), ylim=(0, 3.8))
    paper.axis("off")
    rounded = {"boxstyle": "round,pad=0,rounding_size=0.16", "fc": PAPER, "ec": EDGE, "lw": 1}
    paper.add_patch(FancyBboxPatch((0.02, 0.02), 10.96, 3.76, **rounded))
    draw_spaces(figure.add_axes((0.006, 0.02, 0.425, 0.86)))
    draw_images(figure)
    heading = {"color": INK, "fontsize": 13, "weight": "bold"}
    figure.text(0.03, 0.905, "adapter = shared + unique, exactly", **heading)
    figure.text(0.524, 0.905, "three styles, added at weight 1", **heading)
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE)
