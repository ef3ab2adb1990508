"""The result of a decomposition: parts that are adapters, and what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout
from devec.decomposition.findings import EMPTY_RTOL, Findings, ModuleSplit, Norms, is_rounding
from devec.decomposition.question import Kind, PartName
from devec.decomposition.request import Request
from devec.deltas.delta import Delta
from devec.operations.compress import truncate_adapter


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition:
    """The parts of a pool of adapters.

    Attributes:
        unique: Adapter name → its unique part (Eq. 13). Empty for scope ``"pairwise"``.
        shared: Adapter name → its part in the shared subspace (Eq. 12); for scope ``"pairwise"``,
            ``"A+B"`` → the common vector of the pair (Eq. 14).
        common: The common vector of the pool (Eq. 14) for scope ``"all"``, else None. It has the
            modules in which something is shared.
        splits: Spectra, thresholds, shared bases and norms, a row for each module and group.
        record: Inputs, operation and parameters, as outputs keep them.
        norms: Adapter name → module → ‖ΔW‖_F of the original, for adapters that were split.
        bias_norms: Adapter name → module → ‖Δb‖ of the original, where it changes biases.

    Example:
        >>> import devec
        >>> from devec.demo.evaluate import POOL
        >>> pool = [devec.Adapter.from_pretrained(POOL / name) for name in ("ink", "chalk")]
        >>> parts = devec.decompose(pool, threshold=0.5)
        >>> sorted(parts.unique), sorted(parts.shared), parts.common.name
        (['chalk', 'ink'], ['chalk', 'ink'], 'common')
        >>> any(split.shared_rank for split in parts.splits)
        True
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
        """Whether no direction reached the threshold anywhere."""
        return not any(split.shared_rank for split in self.splits)

    def outputs(self, *, compact: bool = False) -> dict[str, Adapter]:
        """The parts that are not zero, by the names that their files have.

        Args:
            compact: Whether to cut every module of the shared and unique parts to its numerical
                rank, and to leave out modules of rank 0. What is cut is below 1e-6 of the original
                module.

        Returns:
            ``"NAME-unique"``, ``"NAME-shared"`` (``"A+B-shared"``) and ``"common"``, without parts
            that are zero to rounding.

        Example:
            >>> import devec
            >>> from devec.demo.evaluate import POOL
            >>> pool = [devec.Adapter.from_pretrained(POOL / name) for name in ("ink", "chalk")]
            >>> parts = devec.decompose(pool, threshold=0.5)
            >>> sorted(parts.outputs())
            ['chalk-shared', 'chalk-unique', 'common', 'ink-shared', 'ink-unique']
        """
        return dict(self.each_output(compact=compact))

    def each_output(self, *, compact: bool = False) -> Iterator[tuple[str, Adapter]]:
        """The outputs of `outputs`, one at a time, so that one compact part is in memory.

        Args:
            compact: Whether to cut every module to its numerical rank (see `outputs`).

        Yields:
            Name and adapter of each output.

        Example:
            >>> import devec
            >>> from devec.demo.evaluate import POOL
            >>> pool = [devec.Adapter.from_pretrained(POOL / name) for name in ("ink", "chalk")]
            >>> outputs = devec.decompose(pool, threshold=0.5).each_output(compact=True)
            >>> next(outputs)[0]
            'ink-unique'
        """
        parts = {f"{name}-unique": (name, adapter) for name, adapter in self.unique.items()}
        parts |= {f"{name}-shared": (name, adapter) for name, adapter in self.shared.items()}
        for label, (owner, adapter) in parts.items():
            scales = self._scale(owner)
            original = Norms(math.hypot(*scales.values()), math.hypot(*self._bias_scale(owner)))
            if adapter.carried or not is_rounding(adapter.modules, original):
                named = dataclasses.replace(adapter, name=label)
                yield label, _compacted(named, scales) if compact else named
        if self.common is not None:
            weights = (norm for split in self.splits for norm in split.norms)
            biases = (norm for name in self.bias_norms for norm in self._bias_scale(name))
            if not is_rounding(
                self.common.modules, Norms(math.hypot(*weights), math.hypot(*biases))
            ):
                yield "common", self.common

    def _scale(self, owner: str) -> Mapping[str, float]:
        """Module → ‖ΔW‖ of the adapter, or of the pair together, that a part is part of."""
        if owner in self.norms:
            return self.norms[owner]
        pair = [s for s in self.splits if "+".join(s.group) == owner]
        return {split.module: math.hypot(*split.norms) for split in pair}

    def _bias_scale(self, owner: str) -> list[float]:
        """‖Δb‖ of all modules of the adapter, or of the pair, that a part is part of."""
        groups = [split.group for split in self.splits if "+".join(split.group) == owner]
        names = groups[0] if groups else [owner]
        return [norm for name in names for norm in self.bias_norms.get(name, {}).values()]


def assemble(
    request: Request, parts: Mapping[PartName, Mapping[str, Delta]], findings: Findings
) -> Decomposition:
    """The decomposition that parts make up.

    Args:
        request: The request.
        parts: Modules of the parts, in the order of the pool; those of a common vector or of a pair
            without the modules in which nothing is shared. Parts may be missing.
        findings: The findings of all stacks.
    """
    unique: dict[str, Adapter] = {}
    shared: dict[str, Adapter] = {}
    common = None
    for name, modules in parts.items():
        if name.adapter is not None:
            home = unique if name.kind == "unique" else shared
            original = request.originals[name.adapter]
            home[name.adapter] = part_of(original, modules, request.record, name.kind)
        elif name.kind == "common":
            common = _common_vector(request, name, modules, "common")
        elif modules:
            shared[name.owner] = _common_vector(request, name, modules, name.owner)
    order = {module: index for index, module in enumerate(request.modules)}
    rows = sorted(findings.rows, key=lambda row: order[row.module])
    return Decomposition(
        unique, shared, common, rows, request.record, findings.norms, findings.bias_norms
    )


def part_of(
    original: Adapter, modules: Mapping[str, Delta], record: Mapping[str, Any], kind: Kind
) -> Adapter:
    """A part of one adapter; carried tensors go with the unique part."""
    return dataclasses.replace(
        original,
        modules=modules,
        carried=original.carried if kind == "unique" else {},
        provenance={**record, "part": kind, "of": original.name},
        source="",
        sha256="",
    )


def zero_part(delta: Delta) -> Delta:
    """The shared part of a delta with which nothing is shared."""
    if delta.gain is not None:
        return Delta(delta.B[:, :0], delta.A[:0])
    bias = None if delta.bias is None else torch.zeros_like(delta.bias)
    return dataclasses.replace(delta, B=torch.zeros_like(delta.B), bias=bias)


def _common_vector(
    request: Request, part: PartName, modules: Mapping[str, Delta], name: str
) -> Adapter:
    """The common vector of several adapters, stored like the first of them."""
    layout = merged_layout([request.originals[one] for one in part.of])
    provenance = {**request.record, "part": "common", "of": list(part.of)}
    return Adapter(name, modules, layout=layout, provenance=provenance)


def _compacted(adapter: Adapter, scales: Mapping[str, float]) -> Adapter:
    """Every module at its numerical rank; what is cut is rounding beside the original module."""
    cut = truncate_adapter(
        adapter, lambda module, S, _: int((S > EMPTY_RTOL * scales[module]).sum())
    ).adapter
    return cut if cut.modules else adapter  # kept for its carried tensors alone
