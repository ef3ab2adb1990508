"""The parts of a pool of adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import provenance
from devec.adapters.layout import Layout
from devec.decomposition.findings import EMPTY_RTOL, ModuleSplit, Norms, is_rounding
from devec.decomposition.question import Question
from devec.deltas.delta import Delta
from devec.operations.compress import truncate_adapter


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition:
    """The parts of a pool of adapters.

    Attributes:
        unique: Adapter name → what is unique to it (Eq. 13). Empty for scope ``"pairwise"``.
        shared: Adapter name → its part in the shared subspace (Eq. 12); for scope ``"pairwise"``,
            ``"A+B"`` → the common vector of the pair (Eq. 14).
        common: The common vector of the pool (Eq. 14) for scope ``"all"``, else None. Modules in
            which nothing is shared are left out.
        splits: What was found, a row per module and group.
        record: Inputs, operation and parameters, as the outputs keep them.
        norms: Adapter name → module → ‖ΔW‖_F of the original, of the adapters that were split.
        bias_norms: Adapter name → module → ‖Δb‖ of the original, where it changes biases.
    """

    unique: Mapping[str, Adapter]
    shared: Mapping[str, Adapter]
    common: Adapter | None
    splits: Sequence[ModuleSplit]
    record: Mapping[str, Any]
    norms: Mapping[str, Mapping[str, float]]
    bias_norms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        shared = sum(split.shared_rank for split in self.splits)
        names = f"unique={list(self.unique)}, shared={list(self.shared)}"
        return f"Decomposition({names}, {shared} shared directions)"

    @property
    def spectrum(self) -> dict[str, Tensor]:
        """Module → spectrum; ``"A+B/module"`` where several groups were compared."""
        several = len({split.group for split in self.splits}) > 1
        return {
            f"{'+'.join(s.group)}/{s.module}" if several else s.module: s.spectrum
            for s in self.splits
        }

    @property
    def nothing_shared(self) -> bool:
        """Whether no direction exceeded the threshold anywhere."""
        return not any(split.shared_rank for split in self.splits)

    def outputs(self, *, compact: bool = False) -> dict[str, Adapter]:
        """The parts that hold anything, by the names they are written under.

        Args:
            compact: Cut every module of the shared and unique parts to its true rank and leave
                out those of rank 0, where what is cut is below 1e-6 of the original module.

        Returns:
            ``"NAME-unique"``, ``"NAME-shared"`` (``"A+B-shared"``) and ``"common"``; a part that is
            zero to rounding is not among them.
        """
        return dict(self.each_output(compact=compact))

    def each_output(self, *, compact: bool = False) -> Iterator[tuple[str, Adapter]]:
        """The same, one output at a time, so that no more than one compact part is held."""
        parts = {f"{name}-unique": adapter for name, adapter in self.unique.items()}
        parts |= {f"{name}-shared": adapter for name, adapter in self.shared.items()}
        for key, adapter in parts.items():
            of = key.rpartition("-")[0]
            scales = self._scale(of)
            original = Norms(math.hypot(*scales.values()), math.hypot(*self._bias_scale(of)))
            if adapter.carried or not is_rounding(adapter.modules, original):
                named = dataclasses.replace(adapter, name=key)
                yield key, _compacted(named, scales) if compact else named
        if self.common is not None:
            weights = (norm for split in self.splits for norm in split.norms)
            biases = (norm for name in self.bias_norms for norm in self._bias_scale(name))
            if not is_rounding(
                self.common.modules, Norms(math.hypot(*weights), math.hypot(*biases))
            ):
                yield "common", self.common

    def _scale(self, name: str) -> Mapping[str, float]:
        """Module → ‖ΔW‖ of what a part was made of."""
        if name in self.norms:
            return self.norms[name]
        pair = [s for s in self.splits if "+".join(s.group) == name]
        return {split.module: math.hypot(*split.norms) for split in pair}

    def _bias_scale(self, name: str) -> list[float]:
        """‖Δb‖ of all modules of what a part was made of: an adapter, or a pair of them."""
        groups = [split.group for split in self.splits if "+".join(split.group) == name]
        names = groups[0] if groups else [name]
        return [norm for name in names for norm in self.bias_norms.get(name, {}).values()]


def record_of(question: Question, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The record of the operation that outputs keep."""
    return provenance(
        "decompose",
        adapters,
        threshold=question.threshold,
        method=question.method,
        scope=question.scope,
        target=question.target or None,
    )


def part_of(
    original: Adapter, modules: Mapping[str, Delta], record: Mapping[str, Any], part: str
) -> Adapter:
    """A part of one adapter; what is not a delta goes with the unique part, never the shared."""
    return dataclasses.replace(
        original,
        modules=modules,
        carried=original.carried if part == "unique" else {},
        provenance={**record, "part": part, "of": original.name},
        source="",
        sha256="",
    )


def common_part(
    group: Sequence[Adapter],
    layout: Layout | None,
    modules: Mapping[str, Delta],
    record: Mapping[str, Any],
    name: str = "common",
) -> Adapter:
    """The common vector of a group, stored like its first adapter."""
    return Adapter(
        name=name,
        modules=modules,
        layout=layout,
        provenance={**record, "part": "common", "of": [a.name for a in group]},
    )


def not_zero(deltas: Mapping[str, Delta | None]) -> dict[str, Delta]:
    """The modules in which there is anything."""
    return {module: delta for module, delta in deltas.items() if delta is not None}


def names_of(adapters: Sequence[Adapter]) -> list[str]:
    """The names of adapters, in order."""
    return [adapter.name for adapter in adapters]


def _compacted(adapter: Adapter, scales: Mapping[str, float]) -> Adapter:
    """Every module at its true rank: what is cut is rounding beside the original module."""
    cut = truncate_adapter(
        adapter, lambda module, S, _: int((S > EMPTY_RTOL * scales[module]).sum())
    ).adapter
    return cut if cut.modules else adapter  # kept for its carried tensors alone
