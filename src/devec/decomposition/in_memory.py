"""The main job: split a pool of adapters into what they share and what is unique to each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout, on_common_modules, provenance
from devec.adapters.layout import Layout
from devec.adapters.pool import require_distinct_names, warn_of_strangers
from devec.arguments import number
from devec.decomposition.findings import (
    EMPTY_RTOL,
    Findings,
    Kind,
    ModuleSplit,
    Norms,
    Part,
    Question,
    Threshold,
    is_rounding,
)
from devec.decomposition.scopes import SCOPES, nothing_of, split
from devec.decomposition.stack import Stack, stacks
from devec.decomposition.workers import in_parallel
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed
from devec.linalg.device import require_device
from devec.linalg.precision import full_precision
from devec.linalg.subspaces import METHODS
from devec.operations.compress import truncate


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


@full_precision
def decompose(
    adapters: Sequence[Adapter],
    *,
    threshold: Threshold = 0.85,
    method: str = "chain",
    scope: str = "all",
    target: str | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Decomposition:
    """Split a pool of adapters into shared and unique parts.

    In every module ``shared_i = Z·Zᵀ·ΔW_i`` and ``unique_i = ΔW_i - shared_i``, where the columns
    of Z are an orthonormal basis of the subspace that the column spaces of all ΔW_i share. Only B
    (and a bias change) differs between an adapter and its parts: they keep its rank, alpha and
    layout. Of a DoRA the low-rank part decides what is shared, and all of ΔW is split: the shared
    part is a plain LoRA, the unique part a DoRA, whose rank grows by that of the shared part.
    A module that an adapter of the pool lacks has nothing common to all: all of it is unique.

    Args:
        adapters: Two or more adapters of one base model, with different names.
        threshold: Squared cosine above which directions count as shared, in (0, 1], or ``"auto"``:
            the value that two random subspaces of the same ranks exceed once in a hundred cases,
            for more than two a bound of it; then every adapter must hold the direction, too.
        method: ``"chain"`` (the paper), ``"mean"`` (independent of order, does not shrink with the
            number of adapters) or ``"principal"`` (two adapters).
        scope: ``"all"``: one shared subspace for the pool. ``"pairwise"``: one for every pair.
            ``"iterative"``: the target loses what it shares with each of the others in turn. There
            a step compares two subspaces, on which all methods select the same pairs, and the
            target's member of each pair is removed.
        target: Name of the adapter to split, for scope ``"iterative"``.
        device: Where to compute; by default where the tensors are. Results return to where the
            first adapter's tensors are.
        progress: Called with the name of each module when it is done.

    Returns:
        The parts; shared + unique = original to rounding of the working precision.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.

    Cost: O(Σ_i (out + in)·r_i²) per module; linear in the number of adapters for ``"chain"``. With
    DoRAs O(out·in·Σ_i r_i) and the base weights of the modules that are worked on at a time.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.
    """
    question, adapters, layout = asked(adapters, threshold, method, scope, target)
    if device is not None:
        require_device(device)
    found = Findings()
    parts: dict[tuple[str, str], dict[str, Delta | None]] = {}
    pool = {a.name: a.modules for a in adapters}

    def parts_of(stack: Stack) -> tuple[Findings, list[Part], Sequence[str]]:
        one, staged = Findings(), stack.device.type == "cuda"
        try:
            made = [_owned(part, staged=staged) for part in split(question, stack, one)]
        finally:
            stack.release()  # what stays is found, and the parts
        return one, made, stack.modules

    work = list(stacks(pool, device, together=scope != "iterative"))
    for one, made, modules in in_parallel(parts_of, work):
        found.add(one)
        for part in made:
            _use_here(part)
            parts.setdefault((part.kind, part.name), {}).update(part.deltas)
        for module in modules if progress is not None else ():
            progress(module)  # type: ignore[misc]
    return _decomposition(question, adapters, layout, parts, found)


def _use_here(part: Part) -> None:
    """Keep memory of a part on a GPU from its stream for as long as the caller's stream uses it."""
    for delta in part.deltas.values():
        for tensor in () if delta is None else (delta.B, delta.A, delta.bias):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _owned(part: Part, *, staged: bool) -> Part:
    """A part whose B do not keep those of a whole stack in memory, nor memory that is pinned.

    Args:
        part: The part.
        staged: Whether it may lie in pinned memory, as what comes from a GPU.

    Returns:
        The part.
    """

    def owned(delta: Delta) -> Delta:
        B = delta.B
        kept = B.untyped_storage().nbytes() == B.nbytes and not (staged and B.is_pinned())
        return delta if kept else dataclasses.replace(delta, B=B.clone())

    return part._replace(
        deltas={m: None if delta is None else owned(delta) for m, delta in part.deltas.items()}
    )


def asked(
    adapters: Sequence[Adapter],
    threshold: Threshold,
    method: str,
    scope: str,
    target: str | None,
) -> tuple[Question, Sequence[Adapter], Layout | None]:
    """What is asked of a pool, checked; the pool on common modules; the layout of its results.

    Args:
        adapters: As in `decompose`.
        threshold: As in `decompose`.
        method: As in `decompose`.
        scope: As in `decompose`.
        target: As in `decompose`.

    Returns:
        All three.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
    """
    _check_arguments(adapters, threshold, method, scope, target)
    adapters = on_common_modules(adapters)
    warn_of_strangers(adapters)
    layout = merged_layout(adapters)  # refuses adapters that do not compose
    names = tuple(a.name for a in adapters)
    return Question(names, _level(threshold), method, scope, target or ""), adapters, layout


def _decomposition(
    question: Question,
    adapters: Sequence[Adapter],
    layout: Layout | None,
    parts: Mapping[tuple[str, str], Mapping[str, Delta | None]],
    found: Findings,
) -> Decomposition:
    """The parts of a pool as adapters, in the order of its modules."""
    record = record_of(question, adapters)
    order = {m: i for i, m in enumerate(dict.fromkeys(m for a in adapters for m in a.modules))}

    def held(kind: Kind, name: str) -> dict[str, Delta | None]:
        return dict(sorted(parts.get((kind, name), {}).items(), key=lambda item: order[item[0]]))

    def part(original: Adapter, kind: Kind) -> Adapter:
        deltas = {
            module: nothing_of(original.modules[module]) if delta is None else delta
            for module, delta in held(kind, original.name).items()
        }
        return part_of(original, deltas, record, kind)

    split_up = [a for a in adapters if a.name in names_of_split(question)]
    shared = {a.name: part(a, "shared") for a in split_up}
    for pair in combinations(adapters, 2) if question.scope == "pairwise" else ():
        name = "+".join(_names(pair))
        if deltas := _not_zero(held("shared", name)):
            shared[name] = common_part(pair, merged_layout(pair), deltas, record, name)
    common = common_part(adapters, layout, _not_zero(held("common", "")), record)
    return Decomposition(
        unique={a.name: part(a, "unique") for a in split_up},
        shared=shared,
        common=common if question.scope == "all" else None,
        splits=sorted(found.rows, key=lambda row: order[row.module]),
        record=record,
        norms=found.norms,
        bias_norms=found.bias_norms,
    )


def _not_zero(deltas: Mapping[str, Delta | None]) -> dict[str, Delta]:
    """The modules in which there is anything."""
    return {module: delta for module, delta in deltas.items() if delta is not None}


def names_of_split(question: Question) -> list[str]:
    """The adapters that have unique and shared parts."""
    if question.scope == "pairwise":
        return []
    return [question.target] if question.scope == "iterative" else list(question.names)


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


def _check_arguments(
    adapters: Sequence[Adapter], threshold: Threshold, method: str, scope: str, target: str | None
) -> None:
    """Refuse arguments that are out of range, before any work is done."""
    require_distinct_names(adapters)
    names = [a.name for a in adapters]
    if len(names) < 2:
        raise IncompatibleError(f"decompose needs at least two adapters, got {len(names)}")
    _level(threshold)
    for value, table, what in ((method, METHODS, "method"), (scope, SCOPES, "scope")):
        if value not in table:
            raise IncompatibleError(f"{what} must be one of {listed(list(table))}, got {value!r}")
    if scope == "iterative" and target not in names:
        raise IncompatibleError(
            "scope 'iterative' splits one adapter: give a target (--target NAME), one of "
            f"{listed(names)}; got {target!r}"
        )
    if scope != "iterative" and target is not None:
        raise IncompatibleError(f"a target is for scope 'iterative' only, got {target!r}")
    if method == "principal" and scope == "all" and len(names) > 2:
        raise IncompatibleError(
            f"method 'principal' compares two adapters, got {len(names)}; "
            "use method 'mean' or 'chain', or scope 'pairwise'"
        )
    pairs = ["+".join(pair) for pair in combinations(names, 2)]
    if scope == "pairwise" and len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise IncompatibleError(f"two pairs of adapters are both named {twice!r}; rename one")


def _level(threshold: object) -> Threshold:
    """The threshold as a float of Python, or ``"auto"``; refused if it is neither."""
    if isinstance(threshold, str) and threshold == "auto":
        return "auto"
    level = math.nan
    if isinstance(threshold, float):  # of NumPy, too; NaN is refused as out of range
        level = float(threshold)
    elif not isinstance(threshold, str):
        level = float(number(threshold, "threshold"))
    if not 0 < level <= 1:
        raise IncompatibleError(f"threshold must be in (0, 1] or 'auto', got {threshold!r}")
    return level


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


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """The names of adapters, in order."""
    return [adapter.name for adapter in adapters]


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


def _compacted(adapter: Adapter, scales: Mapping[str, float]) -> Adapter:
    """Every module at its true rank: what is cut is rounding beside the original module."""
    cut = truncate(
        adapter, lambda module, S, _: int((S > EMPTY_RTOL * scales[module]).sum())
    ).adapter
    return cut if cut.modules else adapter  # kept for its carried tensors alone
