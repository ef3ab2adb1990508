"""What a decomposition computes: which directions count as shared, and which parts follow."""

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
    def owner(self) -> str:
        """The adapter, or ``"A+B"`` for a pair."""
        return "+".join(self.of)

    @property
    def label(self) -> str:
        """Name of the output: ``"NAME-unique"``, ``"A+B-shared"``, ``"common"``."""
        return "common" if self.kind == "common" else f"{self.owner}-{self.kind}"


@dataclass(frozen=True)
class Question:
    """Which directions count as shared in a module, and which parts are made of a pool.

    Attributes:
        names: Names of the adapters of the pool, in order.
        threshold: Smallest squared cosine that counts as shared, or ``"auto"``.
        method: The method that finds shared subspaces.
        scope: A key of `devec.decomposition.scopes.SCOPES`.
        target: Name of the adapter to split; empty for scopes that split no single adapter.
        parts: The parts that may result. Which of them are not zero is known in the end only.
    """

    names: tuple[str, ...]
    threshold: Threshold
    method: Method
    scope: str
    target: str
    parts: tuple[PartName, ...]

    def threshold_for(self, n: int, ranks: Sequence[int]) -> float:
        """The threshold for subspaces of R^n of these dimensions."""
        if self.threshold != "auto":
            return self.threshold
        return self.method.bound(n, ranks, chance_level) if all(ranks) else math.inf

    @property
    def split_adapters(self) -> list[str]:
        """Names of the adapters that have a unique and a shared part."""
        return [part.owner for part in self.parts if part.kind == "unique"]
