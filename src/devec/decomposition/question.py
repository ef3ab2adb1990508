"""What a decomposition asks of every module, and the names of the parts that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from devec.linalg.chance import chance_level
from devec.linalg.subspaces import Method

Threshold = float | Literal["auto"]

Kind = Literal["unique", "shared", "common"]


class PartName(NamedTuple):
    """Which part of a pool: unique or shared part of an adapter, common vector of several.

    Attributes:
        kind: ``"unique"``, ``"shared"`` or ``"common"``.
        of: Names of the adapters that it is part of: one, a pair, or all.
    """

    kind: Kind
    of: tuple[str, ...]

    @property
    def adapter(self) -> str | None:
        """The adapter that it is part of; None for parts of several."""
        return self.of[0] if len(self.of) == 1 else None

    @property
    def owner(self) -> str:
        """The adapter, or ``"A+B"`` for a pair."""
        return "+".join(self.of)

    @property
    def label(self) -> str:
        """Name of the output: ``"NAME-unique"``, ``"A+B-shared"``, ``"common"``."""
        return "common" if self.kind == "common" else f"{self.owner}-{self.kind}"


@dataclass(frozen=True)
class Question:
    """Which directions count as shared in a module.

    Attributes:
        names: Names of the adapters of the pool, in order.
        threshold: Smallest squared cosine that counts as shared, or ``"auto"``.
        method: The method that finds shared subspaces.
        target: Name of the adapter to split; empty for scopes that split no single adapter.
    """

    names: tuple[str, ...]
    threshold: Threshold
    method: Method
    target: str = ""

    def threshold_for(self, n: int, ranks: Sequence[int]) -> float:
        """The threshold for subspaces of R^n of these dimensions."""
        if self.threshold != "auto":
            return self.threshold
        return self.method.bound(n, ranks, chance_level) if all(ranks) else math.inf
