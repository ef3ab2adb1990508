"""What is said of a file that was read, where it is not quite what it seems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from devec.adapters.layout import ReadOptions
from devec.deltas.delta import Delta
from devec.errors import listed, warn
from devec.formats.single_file.storage import FileStorage
from devec.lazy import outlines


def warn_of_unknown(where: str, keys: Sequence[str]) -> None:
    """Name the keys that are of no known kind."""
    if keys:
        warn(
            f"{where}: {len(keys)} keys are of no known kind and are carried over whole: "
            f"{listed(list(keys), 20)}"
        )


def warn_of_truncation(where: str, layout: FileStorage, options: ReadOptions) -> None:
    """State the error of factors that are not exact."""
    if layout.errors:
        worst = max(layout.errors, key=lambda module: layout.errors[module])
        doras = any(slot.magnitude.axis for slot in layout.slots if slot.id in layout.errors)
        of_factors = "; of the factors, DoRAs bring the sum with W0 to its norms" if doras else ""
        warn(
            f"{where}: {len(layout.errors)} modules are of a rank above {options.max_rank} and "
            f"were cut to it, with a relative error of up to {layout.errors[worst]:.3g} (in "
            f"{worst!r}{of_factors}); a larger rank (--max-rank, max_rank=) makes it smaller"
        )


def warn_of_fused(where: str, deltas: Mapping[str, Delta]) -> None:
    """Split qkv stored as one block-diagonal module is read too weakly by all readers."""
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
    """Into how many blocks B of a fused module may be divided so that alpha is that of one."""
    if not module.endswith(("qkv", "linear1")):
        return []
    alpha = delta.scaling * delta.rank
    return [n for n in (3, 4) if delta.rank % n == 0 and alpha <= delta.rank // n]


def _is_stacked(delta: Delta, possible: Sequence[int]) -> bool:
    """Whether B is block-diagonal in one of the numbers of blocks."""
    for blocks in possible:
        support = torch.stack([(block != 0).any(dim=1) for block in delta.B.chunk(blocks, dim=1)])
        if int(support.sum(dim=0).max()) == 1:
            return True
    return False
