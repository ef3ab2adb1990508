"""What there is to say of a decomposition, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from devec.decomposition.findings import Kind, ModuleSplit, Threshold


def planned_outputs(
    names: Sequence[str], scope: str, target: str | None
) -> dict[tuple[Kind, str], str]:
    """Names of all the outputs that a decomposition can have.

    Args:
        names: Names of the adapters.
        scope: The scope.
        target: The adapter to split, for scope ``"iterative"``.

    Returns:
        Kind of part, and the adapter or pair that it is of → name; which of them hold anything
        shows when it is done.
    """
    if scope == "pairwise":
        pairs = ["+".join(pair) for pair in combinations(names, 2)]
        return {("shared", pair): f"{pair}-shared" for pair in pairs}
    kinds: tuple[Kind, Kind] = ("unique", "shared")
    split = names if scope == "all" else [str(target)]
    parts: dict[tuple[Kind, str], str] = {(k, n): f"{n}-{k}" for n in split for k in kinds}
    return parts | ({("common", ""): "common"} if scope == "all" else {})


def nothing_shared(splits: Sequence[ModuleSplit], asked: Threshold) -> str:
    """A sentence on the largest overlap found and what to try, where nothing is shared.

    Args:
        splits: What was found, a row per module and group.
        asked: The threshold that was asked for.

    Returns:
        The sentence.
    """
    compared = [split for split in splits if split.spectrum.numel()]
    if not splits:
        return "Nothing is shared: no module is in all of the adapters."
    if not compared:
        return "Nothing is shared: at least one of the adapters is zero in every module."
    best = max(compared, key=lambda s: (s.edge < 1, s.largest))
    if best.edge >= 1:
        ranks = " + ".join(str(rank) for rank in best.ranks)
        return (
            f"Nothing is shared beyond chance: in {best.module} and everywhere else the ranks "
            f"({ranks} of {len(best.basis)}) fill the space, so that any two subspaces meet. "
            "Try a number as threshold."
        )
    found = (
        f"Nothing is shared at this threshold ({best.threshold:.3g}): the largest overlap found is "
        f"{best.quantity} = {best.largest:.3f}, in {best.module}, where chance alone reaches "
        f"{best.edge:.3f}."
    )
    if all(split.largest <= split.edge for split in compared):
        return f"{found} That is no more than chance: these adapters are already apart."
    if best.largest > best.threshold:
        return f"{found} But not every adapter holds that direction beyond chance."
    unit = 10.0 ** (math.floor(math.log10(best.largest)) - 1)
    lower = f"{math.floor(best.largest / unit) * unit:.2g}"
    if asked == "auto":
        return f"{found} A threshold of {lower} would take it, though chance may give as much."
    return f"{found} Try a threshold of {lower}, or auto."
