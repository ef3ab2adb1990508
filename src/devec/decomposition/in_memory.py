"""The main job: split a pool of adapters into what they share and what is unique to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout
from devec.adapters.layout import Layout
from devec.decomposition.findings import Findings, Part
from devec.decomposition.question import Kind, Question, Threshold, names_of_split
from devec.decomposition.request import asked
from devec.decomposition.result import (
    Decomposition,
    common_part,
    names_of,
    not_zero,
    part_of,
    record_of,
)
from devec.decomposition.scopes import nothing_of, split
from devec.decomposition.stack import Stack
from devec.decomposition.stacks import stacks
from devec.decomposition.workers import in_parallel
from devec.deltas.delta import Delta
from devec.linalg.dtypes import require_device
from devec.linalg.precision import full_precision


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
        name = "+".join(names_of(pair))
        if deltas := not_zero(held("shared", name)):
            shared[name] = common_part(pair, merged_layout(pair), deltas, record, name)
    common = common_part(adapters, layout, not_zero(held("common", "")), record)
    return Decomposition(
        unique={a.name: part(a, "unique") for a in split_up},
        shared=shared,
        common=common if question.scope == "all" else None,
        splits=sorted(found.rows, key=lambda row: order[row.module]),
        record=record,
        norms=found.norms,
        bias_norms=found.bias_norms,
    )
