"""Plots of overlaps and spectra; they need the extra ``devec[plot]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from devec.decomposition.findings import ModuleSplit
from devec.operations.overlap import Overlap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_overlap(found: Overlap, axes: Axes | None = None) -> Axes:
    """Plot the largest squared cosine between the column spaces of every pair of adapters.

    A cell shows the mean over modules of the largest squared cosine, and in brackets the mean of
    the random edge.

    Args:
        found: Result of `devec.overlap`.
        axes: Axes to draw into; by default new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch, devec
        >>> from devec.plots import plot_overlap
        >>> delta = devec.Delta(torch.ones(8, 1), torch.ones(1, 6))
        >>> pool = [devec.Adapter(name, {"q_proj": delta}) for name in ("a", "b")]
        >>> axes = plot_overlap(devec.overlap(pool))
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['a', 'b']
    """
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for pair in found.cosines for name in pair))
    values = torch.full((len(names), len(names)), float("nan"))
    axes = axes or plt.subplots(figsize=(1.1 * len(names) + 1, 1.1 * len(names)))[1]
    for a, b in found.cosines:
        rows = [row for row in found.modules if row.pair == (a, b)]
        largest = sum(row.largest for row in rows) / max(len(rows), 1)
        edge = sum(row.edge for row in rows) / max(len(rows), 1)
        i, j = names.index(a), names.index(b)
        for row, column in ((i, j), (j, i)):
            values[row, column] = largest
            axes.text(column, row, f"{largest:.2f}\n({edge:.2f})", ha="center", va="center")
    image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="YlGnBu", alpha=0.8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.figure.colorbar(image, ax=axes, label="largest cos², mean over modules (by chance)")
    return axes


def plot_spectra(splits: Sequence[ModuleSplit], axes: Axes | None = None) -> Axes:
    """Plot the spectrum of the shared subspace of every module, with threshold and random edge.

    Args:
        splits: Modules of a decomposition: `Decomposition.splits`.
        axes: Axes to draw into; by default new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch, devec
        >>> from devec.plots import plot_spectra
        >>> delta = devec.Delta(torch.ones(8, 1), torch.ones(1, 6))
        >>> pool = [devec.Adapter(name, {"q_proj": delta}) for name in ("a", "b")]
        >>> axes = plot_spectra(devec.decompose(pool).splits)
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['q_proj']
    """
    from matplotlib import pyplot as plt

    axes = axes or plt.subplots(figsize=(8, 3.5))[1]
    for position, split in enumerate(splits):
        spectrum = split.spectrum.tolist()
        shared = split.shared_rank
        axes.scatter([position] * shared, spectrum[:shared], color="tab:red", s=18, zorder=3)
        rest = spectrum[shared:]
        axes.scatter([position] * len(rest), rest, color="tab:gray", s=8, zorder=2)
        for height, style in ((split.threshold, "-"), (split.edge, ":")):
            if height <= 1:
                axes.hlines(height, position - 0.4, position + 0.4, color="black", linestyle=style)
    axes.scatter([], [], color="tab:red", s=18, label="shared")
    axes.scatter([], [], color="tab:gray", s=8, label="not shared")
    axes.plot([], [], color="black", label="threshold")
    axes.plot([], [], color="black", linestyle=":", label="random edge")
    axes.set_xticks(range(len(splits)), [s.module for s in splits], rotation=90, fontsize=7)
    axes.set_ylabel("squared cosine")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", fontsize=8)
    return axes
