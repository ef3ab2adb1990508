"""The modules of a pool in stacks of equal shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from devec.decomposition.stack import Measured, Pool, Projected, Stack
from devec.deltas.delta import Delta
from devec.deltas.sums import first_base_weight, resolve_together
from devec.errors import located
from devec.lazy import outlines
from devec.linalg.dtypes import basis_dtype, to_float64
from devec.linalg.factors import norm
from devec.linalg.precision import full_precision


class ExactStack(Stack):
    """One module by itself: of any condition and rank, and of DoRAs.

    Of DoRAs all that is needed is held, the base weight too, which is read once. Parts no longer
    hold it.

    Args:
        modules: Name of the module.
        pool: The adapters that have it.
        device: Where to compute; the CPU in the place of devices without float64.
    """

    def __init__(
        self, modules: Sequence[str], pool: Pool, device: torch.device | str | None
    ) -> None:
        """Remember where the factors are."""
        super().__init__(modules, pool, device)
        if self.device.type == "mps":
            self.device = torch.device("cpu")
        known = (outlines(pool[name])[self.modules[0]] for name in self.names)
        self._base = first_base_weight(known)
        self._resolved: dict[str, Delta] = {}

    @property
    def _itemsize(self) -> int:
        return 8

    def _basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """An orthonormal basis of the column space of an adapter's low-rank part."""
        delta = self._delta(name)
        A = delta.A.to(basis_dtype(delta.A.device))
        with located(f"module {self.modules[0]!r} of {name!r}"):
            U, S = delta.column_space()
        norm = delta.weight_norm(abs(delta.scaling) * float(S.norm()))
        self._measured[name] = Measured(len(S), [norm], to_float64(A @ A.mT)[None])
        return U[None]

    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's module."""
        if name not in self._measured:
            self._measured[name] = Measured(0, [self._delta(name).weight_norm()], torch.empty(0))
        return self._measured[name].norms

    @full_precision
    def projected(
        self, name: str, Z: Float[Tensor, "batch out k"], counts: Sequence[int]
    ) -> Projected:
        """The parts of an adapter; of a DoRA the shared one is a LoRA with the factors Z, ZᵀΔW."""
        delta = self._delta(name)
        if delta.gain is None:
            return super().projected(name, Z, counts)
        part = delta.projected(Z[0])
        shared, unique = (self.released(d) for d in (part, delta.without(part)))
        return Projected([shared], [unique], part.A[None], [0], [norm(part.A)])

    def located(self) -> AbstractContextManager[None]:
        """What says in messages which module this is, where its base weight is read."""
        return nullcontext() if self._base is None else located(f"module {self.modules[0]!r}")

    def released(self, delta: Delta) -> Delta:
        """A result without the base weight that is held here."""
        return super().released(delta if self._base is None else delta.on(self._base))

    def release(self) -> None:
        """Let go of all that was read and found."""
        super().release()
        self._resolved.clear()

    def _delta(self, name: str) -> Delta:
        """What is computed with; DoRAs all together, so that their base weight is read once."""
        if self._base is None:
            return self.deltas(name)[0].to(self.device)
        if not self._resolved:
            self._read = {}
            held = {n: self.deltas(n)[0].to(self.device) for n in self.names}
            self._resolved.update(resolve_together(held))
        return self._resolved[name]


def stacks(pool: Pool, device: torch.device | str | None, *, together: bool) -> Iterator[Stack]:
    """All modules of a pool, those that are alike in stacks.

    Args:
        pool: The adapters.
        device: Where to compute.
        together: Whether there are stacks of more than one module.

    Yields:
        The stacks. Those of modules that are no plain LoRAs are exact.
    """
    known = {name: outlines(modules) for name, modules in pool.items()}
    alike: dict[object, list[str]] = {}
    for module in dict.fromkeys(module for modules in known.values() for module in modules):
        held = {name: modules[module] for name, modules in known.items() if module in modules}
        alike.setdefault(_likeness(module, held), []).append(module)
    for likeness, modules in alike.items():
        holders = {name: pool[name] for name in known if modules[0] in known[name]}
        if likeness == modules[0]:
            yield ExactStack(modules, holders, device)
            continue
        deltas = [known[name][modules[0]] for name in holders]
        size = _stack_size(deltas, torch.device(device or deltas[0].B.device)) if together else 1
        for start in range(0, len(modules), size):
            yield Stack(modules[start : start + size], holders, device)


def _likeness(module: str, held: Mapping[str, Delta]) -> object:
    """What modules of a stack have in common; the name of a module that is in none."""
    if any(d.gain is not None or not d.scaling or not d.rank for d in held.values()):
        return module
    return tuple(
        (name, d.shape, d.rank, d.B.dtype, d.A.dtype, d.B.device, d.bias is None)
        for name, d in held.items()
    )


def _stack_size(deltas: Sequence[Delta], device: torch.device) -> int:
    """How many modules are split together."""
    factor = max(4 * delta.rank * max(delta.shape) for delta in deltas)
    limit = _STACKED_BYTES if device.type in ("cpu", "meta") else _STACKED_BYTES_ELSEWHERE
    return max(1, min(_MOST_MODULES, limit // max(factor, 1)))


# A stacked factor of this many bytes stays in a core's cache from one product to the next; a GPU
# wants enough work in every call. Factors of a whole pool that fit are read once.
_STACKED_BYTES = 1 << 21


_STACKED_BYTES_ELSEWHERE = 1 << 27


_MOST_MODULES = 64


def sound(stack: Stack, unsound: Collection[str]) -> list[Stack]:
    """The modules of a stack in sound stacks: the unsound ones one by one, then the rest."""
    rest = [module for module in stack.modules if module not in unsound]
    exact = [ExactStack([m], stack.pool, stack.device) for m in stack.modules if m in unsound]
    return [*exact, *([Stack(rest, stack.pool, stack.device)] if rest else [])]
