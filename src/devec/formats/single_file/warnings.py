"""Warnings about single files that are read with a loss, or not as their authors expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from devec.adapters.layout import ReadOptions
from devec.deltas.delta import Delta
from devec.errors import listed, warn
from devec.formats.single_file.storage import FileStorage
from devec.lazy import outlines


def warn_of_unknown(where: str, keys: Sequence[str]) -> None:
    """Warn of keys of no known kind."""
    if keys:
        warn(
            f"{where}: {len(keys)} keys are of no known kind and are carried over whole: "
            f"{listed(list(keys), 20)}"
        )


def warn_of_truncation(where: str, layout: FileStorage, options: ReadOptions) -> None:
    """Warn of truncated factors, with their error."""
    if layout.errors:
        worst = max(layout.errors, key=lambda module: layout.errors[module])
        doras = any(slot.magnitude.axis for slot in layout.slots if slot.id in layout.errors)
        of_factors = "; for DoRAs, that of the factors before normalisation" if doras else ""
        warn(
            f"{where}: {len(layout.errors)} modules have a rank above {options.max_rank} and were "
            f"truncated to it, with a relative error of up to {layout.errors[worst]:.3g} (in "
            f"{worst!r}{of_factors}); a larger rank (--max-rank, max_rank=) reduces it"
        )


def warn_of_fused(where: str, deltas: Mapping[str, Delta]) -> None:
    """Warn of block-diagonal fused modules with the alpha of one block, too weak in all readers."""
    weak = [
        module
        for module, known in outlines(deltas).items()
        if (blocks := _possible_blocks(module, known)) and _is_stacked(deltas[module], blocks)
    ]
    if weak:
        warn(
            f"{where}: {len(weak)} fused modules hold several LoRAs side by side but the alpha of "
            f"one ({listed(weak, 2)}), so that every reader applies them too weakly; devec does "
            "as the readers do"
        )


def _possible_blocks(module: str, delta: Delta) -> list[int]:
    """Numbers of blocks in B of a fused module for which alpha may be that of one block."""
    if not module.endswith(("qkv", "linear1")):
        return []
    alpha = delta.scaling * delta.rank
    return [n for n in (3, 4) if delta.rank % n == 0 and alpha <= delta.rank // n]


def _is_stacked(delta: Delta, possible: Sequence[int]) -> bool:
    """Whether B is block-diagonal with one of these numbers of blocks."""
    for blocks in possible:
        support = torch.stack([(block != 0).any(dim=1) for block in delta.B.chunk(blocks, dim=1)])
        if int(support.sum(dim=0).max()) == 1:
            return True
    return False
