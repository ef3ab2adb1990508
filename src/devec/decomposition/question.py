"""What is asked of a pool: which directions count as shared, and among which adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from devec.linalg.chance import chance_level, pool_level

Threshold = float | Literal["auto"]

Kind = Literal["unique", "shared", "common"]


@dataclass(frozen=True)
class Question:
    """What is asked of every module: which directions count as shared, and among whom.

    Attributes:
        names: Names of the adapters of the pool, in order.
        threshold: Smallest squared cosine that counts as shared, or ``"auto"``.
        method: A key of `METHODS`.
        scope: A key of `SCOPES`.
        target: Name of the adapter to split, for scope ``"iterative"``.
    """

    names: tuple[str, ...]
    threshold: Threshold
    method: str
    scope: str
    target: str = ""

    def level(self, n: int, ranks: Sequence[int]) -> float:
        """The threshold for subspaces of these dimensions."""
        if self.threshold != "auto":
            return self.threshold
        return pool_level(n, ranks, self.method, chance_level) if all(ranks) else math.inf


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


def names_of_split(question: Question) -> list[str]:
    """The adapters that have unique and shared parts."""
    if question.scope == "pairwise":
        return []
    return [question.target] if question.scope == "iterative" else list(question.names)
