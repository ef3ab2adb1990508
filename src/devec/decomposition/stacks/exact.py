"""One module at a time: of any condition and rank, and of DoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from devec.decomposition.stacks.lora import projected_loras
from devec.decomposition.stacks.stack import Measured, Pool, Projected, Stack
from devec.deltas.delta import Delta
from devec.deltas.sums import first_base_weight, resolve_together
from devec.errors import located
from devec.linalg.dtypes import basis_dtype, to_float64
from devec.linalg.factors import norm
from devec.linalg.precision import full_precision


class ExactModule(Stack):
    """One module, computed in float64.

    The deltas of DoRAs are kept with their base weight, which is read once; their parts refer to
    the base weight without holding it.

    Args:
        module: Name of the module.
        pool: The adapters that have it.
        device: Where to compute; the CPU instead of devices without float64.
    """

    def __init__(self, module: str, pool: Pool, device: torch.device | str | None) -> None:
        """Look at outlines only; nothing is read."""
        super().__init__([module], pool, device)
        if self.device.type == "mps":
            self.device = torch.device("cpu")
        self._base = first_base_weight(self.outlines.values())
        self._resolved: dict[str, Delta] = {}

    @property
    def itemsize(self) -> int:
        """Bytes of a float64."""
        return 8

    @full_precision
    def computed_basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """An orthonormal basis of the column space of an adapter's low-rank part."""
        delta = self._delta(name)
        A = delta.A.to(basis_dtype(delta.A.device))
        with located(f"module {self.modules[0]!r} of {name!r}"):
            U, S = delta.column_space()
        total = delta.weight_norm(abs(delta.scaling) * float(S.norm()))
        self._measured[name] = Measured(len(S), [total], to_float64(A @ A.mT)[None])
        return U[None]

    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's module."""
        if name not in self._measured:
            self._measured[name] = Measured(0, [self._delta(name).weight_norm()], torch.empty(0))
        return self._measured[name].norms

    def projected(
        self, name: str, Z: Float[Tensor, "batch out k"], counts: Sequence[int]
    ) -> Projected:
        """The parts of an adapter; the shared part of a DoRA is a LoRA with factors Z and ZᵀΔW."""
        delta = self._delta(name)
        if delta.gain is None:
            gram = self._measured[name].gram
            return projected_loras(self, self.deltas(name), Z, counts, gram)
        part = delta.projected(Z[0])
        shared, unique = self.result(part), self.result(delta.without(part))
        return Projected([shared], [unique], part.A[None], [0], [norm(part.A)])

    def result(self, delta: Delta) -> Delta:
        """A delta on the device to which results return, without the base weight's values."""
        return super().result(delta if self._base is None else delta.on(self._base))

    def located(self) -> AbstractContextManager[None]:
        """A context that adds the module to error messages, where its base weight is read."""
        return nullcontext() if self._base is None else located(f"module {self.modules[0]!r}")

    def release(self) -> None:
        """Drop all that was read and computed."""
        super().release()
        self._resolved.clear()

    def _delta(self, name: str) -> Delta:
        """The delta of an adapter; those of DoRAs all at once, so that W0 is read once."""
        if self._base is None:
            return self.deltas(name)[0].to(self.device)
        if not self._resolved:
            self._kept = {}
            deltas = {n: self.deltas(n)[0].to(self.device) for n in self.names}
            self._resolved.update(resolve_together(deltas))
        return self._resolved[name]
