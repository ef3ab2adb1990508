"""Results of a split, module by module: spectra, shared bases, parts and norms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from devec.decomposition.question import PartName, Threshold
from devec.decomposition.stacks.stack import Stack
from devec.deltas.delta import Delta

# A part below this fraction of its original is rounding: nothing is left of it.
EMPTY_RTOL = 1e-6


@dataclass(frozen=True, eq=False)
class ModuleSplit:
    """The shared subspace of one group of adapters in one module.

    Attributes:
        module: Name of the module.
        group: Names of the adapters whose column spaces were compared, in order.
        ranks: Dimension of each adapter's column space (for scope ``"iterative"``, of the part of
            the target's that earlier steps have left).
        threshold: Smallest squared cosine that counted as shared; infinity where no overlap can
            exceed chance (``threshold="auto"`` and ranks that fill the space).
        edge: Asymptotic upper edge of the spectrum for random subspaces of these dimensions.
        spectrum: The values that were compared with the threshold, descending.
        quantity: Their name: ``"cos²"``, or ``"eigenvalue"`` for a chain of three or more.
        basis: Z, orthonormal basis of the shared subspace, shape (out, shared rank); without
            values (on the device ``"meta"``) where results were written to files.
        norms: For each adapter of the group, ‖ΔW‖_F.
        shared_norms: For each adapter of the group, ‖Z Zᵀ ΔW‖_F.

    Example:
        >>> import torch, devec
        >>> B, A = torch.eye(4)[:, :2], torch.ones(2, 3)
        >>> pool = [devec.Adapter(name, {"layer": devec.Delta(B, A)}) for name in ("a", "b")]
        >>> (split,) = devec.decompose(pool).splits
        >>> split.module, split.group, split.ranks, split.shared_rank
        ('layer', ('a', 'b'), (1, 1), 1)
    """

    module: str
    group: tuple[str, ...]
    ranks: tuple[int, ...]
    threshold: float
    edge: float
    spectrum: Float[Tensor, " k"]
    quantity: str
    basis: Float[Tensor, "out shared"]
    norms: tuple[float, ...]
    shared_norms: tuple[float, ...]

    @property
    def shared_rank(self) -> int:
        """The number of shared directions."""
        return self.basis.shape[1]

    @property
    def largest(self) -> float:
        """The largest value of the spectrum; 0 if the spectrum is empty."""
        return float(self.spectrum[0]) if self.spectrum.numel() else 0.0


class Part(NamedTuple):
    """Some modules of a part.

    Attributes:
        name: Which part it is.
        deltas: Module → delta; None where the part is zero.
        norms: ‖ΔW‖_F of each module, for unique and shared parts of one adapter.
    """

    name: PartName
    deltas: Mapping[str, Delta | None]
    norms: Sequence[float] = ()


class Norms(NamedTuple):
    """Norms over all modules, of weights and of biases apart, since a part may have either alone.

    Attributes:
        weights: Frobenius norm of ΔW.
        biases: Norm of the changes of biases.
    """

    weights: float = 0.0
    biases: float = 0.0

    def are_rounding_beside(self, original: Norms) -> bool:
        """Whether both are zero to rounding beside an original; NaN is not."""
        return (
            self.weights <= EMPTY_RTOL * original.weights
            and self.biases <= EMPTY_RTOL * original.biases
        )


def is_rounding(modules: Mapping[str, Delta], original: Norms) -> bool:
    """Whether a part is zero to rounding beside the original; stops at the first that is not."""
    norms = Norms()
    for delta in modules.values():
        delta = delta.resolved()
        norms = Norms(
            math.hypot(norms.weights, delta.weight_norm()),
            math.hypot(norms.biases, delta.bias_norm()),
        )
        if not norms.are_rounding_beside(original):
            return False
    return True


@dataclass
class Findings:
    """What a split has measured so far.

    Attributes:
        rows: A row for every module and group.
        norms: Adapter → module → ‖ΔW‖_F of the originals that were split.
        bias_norms: Adapter → module → ‖Δb‖ of originals that change the bias.
        parts: Norms of the parts, over the modules that were measured.
    """

    rows: list[ModuleSplit] = field(default_factory=list)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    bias_norms: dict[str, dict[str, float]] = field(default_factory=dict)
    parts: dict[PartName, Norms] = field(default_factory=dict)

    def add(self, other: Findings) -> None:
        """Add the findings of other modules."""
        self.rows += other.rows
        for mine, others in ((self.norms, other.norms), (self.bias_norms, other.bias_norms)):
            for name, norms in others.items():
                mine.setdefault(name, {}).update(norms)
        for part, of_part in other.parts.items():
            self._add_to(part, of_part)

    def add_part(self, part: Part) -> None:
        """Add the norms of some modules of a part."""
        biases = (delta.bias_norm() for delta in part.deltas.values() if delta is not None)
        norms = Norms(math.hypot(*part.norms), math.hypot(*biases))
        self._add_to(part.name, norms)

    def _add_to(self, name: PartName, norms: Norms) -> None:
        """Add the norms of other modules of a part."""
        before = self.parts.get(name, Norms())
        self.parts[name] = Norms(*map(math.hypot, before, norms))

    def of_original(self, name: str) -> Norms:
        """The norms of an adapter that was split."""
        both = (self.norms, self.bias_norms)
        return Norms(*(math.hypot(*norms.get(name, {}).values()) for norms in both))

    def outlined(self) -> Findings:
        """The same findings, with shapes in the place of the shared bases."""
        rows = [dataclasses.replace(row, basis=row.basis.to("meta")) for row in self.rows]
        return dataclasses.replace(self, rows=rows)

    def add_norms(self, name: str, stack: Stack) -> None:
        """Add the norms of an adapter."""
        self.norms.setdefault(name, {}).update(stack.named(stack.norms(name)))
        self.add_bias_norms(name, stack)

    def add_bias_norms(self, name: str, stack: Stack) -> None:
        """Add the norms of an adapter's changes of biases, if it has any."""
        if stack.has_bias(name):
            self.bias_norms.setdefault(name, {}).update(stack.named(stack.bias_norms(name)))


def nothing_shared(splits: Sequence[ModuleSplit], threshold: Threshold) -> str:
    """The message for a pool that shares nothing: its largest overlap, and what to try."""
    compared = [split for split in splits if split.spectrum.numel()]
    if not splits:
        return "Nothing is shared: no module is in all of the adapters."
    if not compared:
        return "Nothing is shared: at least one of the adapters is zero in every module."
    best = max(compared, key=lambda s: (s.edge < 1, s.largest))
    if best.edge >= 1:
        ranks = " + ".join(str(rank) for rank in best.ranks)
        return (
            f"Nothing is shared: in {best.module} and everywhere else the ranks "
            f"({ranks} of {len(best.basis)}) fill the space, so that no overlap is beyond chance. "
            "Try a number as threshold."
        )
    found = (
        f"Nothing is shared at this threshold ({best.threshold:.3g}): the largest overlap found is "
        f"{best.quantity} = {best.largest:.3f}, in {best.module}, where chance alone reaches "
        f"{best.edge:.3f}."
    )
    if all(split.largest <= split.edge for split in compared):
        return f"{found} That is no more than chance: these adapters share nothing beyond it."
    if best.largest > best.threshold:
        return f"{found} But not every adapter contains that direction beyond chance."
    unit = 10.0 ** (math.floor(math.log10(best.largest)) - 1)
    lower = f"{math.floor(best.largest / unit) * unit:.2g}"
    if threshold == "auto":
        return (
            f"{found} With a threshold of {lower} it would count as shared, but random subspaces "
            "can overlap as much."
        )
    return f"{found} Try a threshold of {lower}, or auto."
