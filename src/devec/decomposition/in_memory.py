"""`decompose`: split a pool of adapters into what they share and what is unique to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.decomposition.engine import run
from devec.decomposition.question import Threshold
from devec.decomposition.request import validated
from devec.decomposition.result import Decomposition, assemble, zero_part
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

    In every module ``shared_i = Z·Zᵀ·ΔW_i`` and ``unique_i = ΔW_i - shared_i``. The columns of Z
    are an orthonormal basis of the subspace that the column spaces of all ΔW_i share. An adapter
    and its parts differ in B (and in the change of the bias) only: parts keep its rank, alpha and
    layout. The low-rank part of a DoRA decides what is shared, and all of its ΔW is split: the
    shared part is a plain LoRA, the unique part a DoRA whose rank is that of the original plus that
    of the shared part. A module that an adapter of the pool lacks is unique as a whole.

    Args:
        adapters: Two or more adapters of one base model, with different names.
        threshold: Smallest squared cosine at which directions count as shared, in (0, 1], or
            ``"auto"``: in each module the 99th percentile of the largest squared cosine between
            random subspaces of the same ranks, for three or more adapters an upper bound of it;
            then every adapter must also contain the direction beyond chance.
        method: ``"chain"`` (the paper), ``"mean"`` (does not depend on the order of the adapters,
            nor shrink with their number) or ``"principal"`` (two adapters).
        scope: ``"all"``: one shared subspace for the pool. ``"pairwise"``: one for every pair.
            ``"iterative"``: the target loses what it shares with each of the others in turn. Each
            step compares two subspaces, for which all methods select the same pairs of directions;
            the target's direction of each pair is removed.
        target: Name of the adapter to split, for scope ``"iterative"``.
        device: Where to compute; by default where the tensors are. Results return to the device of
            the first adapter's tensors.
        progress: Called with the name of each module when it is done.

    Returns:
        The parts. shared + unique = original, exact to rounding of the working precision.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.

    Cost: O(Σ_i (out + in)·r_i²) per module; linear in the number of adapters for ``"chain"``. With
    DoRAs O(out·in·Σ_i r_i), and the base weights of the modules that are computed at a time.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.

    Example:
        >>> import devec
        >>> from devec.demo.evaluate import POOL
        >>> pool = [devec.Adapter.from_pretrained(POOL / name) for name in ("ink", "chalk")]
        >>> parts = devec.decompose(pool, threshold=0.5)
        >>> devec.distance(parts.unique["ink"] + parts.shared["ink"], pool[0]) < 1e-5
        True
    """
    request = validated(adapters, threshold, method, scope, target)
    if device is not None:
        require_device(device)
    sinks = {name: MemorySink() for name in request.parts}
    findings = run(request, sinks, device=device, progress=progress)
    parts = {
        name: sink.modules(request.pool.get(name.adapter or "", {}), request.modules)
        for name, sink in sinks.items()
    }
    return assemble(request, parts, findings)


class MemorySink:
    """A part in memory."""

    def __init__(self) -> None:
        """Start without modules."""
        self._deltas: dict[str, Delta | None] = {}

    def accept(self, deltas: Mapping[str, Delta | None]) -> None:
        """Store some modules, in memory that no other part shares."""
        self._deltas.update({m: None if d is None else _owned(d) for m, d in deltas.items()})

    def modules(self, originals: Mapping[str, Delta], order: Sequence[str]) -> dict[str, Delta]:
        """The modules in order; zeros are made from originals, or left out where there is none."""
        result: dict[str, Delta] = {}
        for module in order:
            delta = self._deltas.get(module)
            if delta is not None:
                _use_here(delta)
                result[module] = delta
            elif module in self._deltas and module in originals:
                result[module] = zero_part(originals[module])
        return result


def _owned(delta: Delta) -> Delta:
    """A delta whose B neither keeps those of a whole stack in memory, nor pinned memory."""
    B = delta.B
    owned = B.untyped_storage().nbytes() == B.nbytes and not _is_pinned(B)
    return delta if owned else dataclasses.replace(delta, B=B.clone())


def _is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in pinned memory; asks the driver only where there can be any."""
    made = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return made and tensor.device.type == "cpu" and tensor.is_pinned()


def _use_here(delta: Delta) -> None:
    """Keep the memory of a delta on a GPU for as long as the caller's stream uses it."""
    for tensor in (delta.B, delta.A, delta.bias):
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
