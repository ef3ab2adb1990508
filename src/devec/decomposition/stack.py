"""Modules of one shape, of all adapters of a pool: their factors, stacked, and what follows.

What is asked for is computed from factors that are read again each time, unless the whole pool's
factors of these modules take little memory. So the memory does not grow with the pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from devec.deltas.delta import Delta
from devec.deltas.sums import base_of, resolved_together
from devec.errors import located
from devec.lazy import outlines
from devec.linalg.batched import column_bases
from devec.linalg.buffers import empty, product
from devec.linalg.exponents import extreme_exponent, times_powers
from devec.linalg.factors import RANK_RTOL, basis_dtype, norm, small, working_dtype
from devec.linalg.precision import full_precision

V = TypeVar("V")

Pool = Mapping[str, Mapping[str, Delta]]  # adapter → module → delta

# A stacked factor of this many bytes stays in a core's cache from one product to the next; a GPU
# wants enough work in every call. Factors of a whole pool that fit are read once.
_STACKED_BYTES = 1 << 21
_STACKED_BYTES_ELSEWHERE = 1 << 27
_HELD_BYTES = 1 << 24
_MOST_MODULES = 64


class UnsoundError(Exception):
    """Some modules of a stack are not sound to be split together.

    Attributes:
        modules: Their names.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        """Name the modules."""
        super().__init__(*modules)
        self.modules = frozenset(modules)


class Projected(NamedTuple):
    """The parts of one adapter in the span of Z and beside it, module by module.

    Attributes:
        shared: Z·Zᵀ·ΔW; None where Z has no columns.
        unique: ΔW - Z·Zᵀ·ΔW, where Z has none the delta as it was read.
        coordinates: Zᵀ·ΔW·2^-e.
        exponents: e, of each module; 0 unless the norm is above 2^60 or below 2^-60.
        norms: ‖Z·Zᵀ·ΔW‖_F.
    """

    shared: list[Delta | None]
    unique: list[Delta]
    coordinates: Float[Tensor, "batch k in"]
    exponents: list[int]
    norms: list[float]


class _Measured(NamedTuple):
    """What is kept of an adapter: ranks and norms of its ΔW, and A·Aᵀ."""

    rank: int
    norms: list[float]
    gram: Tensor


class Stack:
    """Modules of one shape, which in every adapter are LoRAs of one rank and precision.

    Args:
        modules: Names of the modules.
        pool: The adapters that have them.
        device: Where to compute; by default where the factors are.
    """

    def __init__(
        self, modules: Sequence[str], pool: Pool, device: torch.device | str | None
    ) -> None:
        """Remember where the factors are."""
        self.modules = tuple(modules)
        self.names = tuple(pool)
        self._pool = pool
        known = [outlines(pool[name])[self.modules[0]] for name in pool]
        self.rows = known[0].shape[0]
        self.dtype = working_dtype(*(factor for d in known for factor in (d.B, d.A)))
        home = known[0].B.device
        self._home = torch.device("cpu") if home.type == "meta" else home
        self.device = torch.device(device) if device is not None else self._home
        self._measured: dict[str, _Measured] = {}
        held = len(self.modules) * sum(_stored_bytes(delta) for delta in known)
        self._held_bytes = held if held <= _HELD_BYTES else 0
        self._read: dict[str, list[Delta]] | None = {} if self._held_bytes else None
        self._bases: dict[str, Tensor] | None = None

    def deltas(self, name: str) -> list[Delta]:
        """The deltas of an adapter as they are read."""
        if self._read is None:
            return [self._pool[name][module] for module in self.modules]
        if name not in self._read:
            self._read[name] = [self._pool[name][module] for module in self.modules]
        return self._read[name]

    def keep_bases(self) -> None:
        """Compute the bases of all adapters and hold them, where each is asked for many times."""
        self._bases = {name: self._basis(name) for name in self.names}

    def unchanged(self, name: str) -> list[Delta]:
        """The deltas of an adapter as they are read, where results are."""
        return [Stack.released(self, delta) for delta in self.deltas(name)]

    def basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """Orthonormal bases of the column spaces of an adapter.

        Args:
            name: The adapter.

        Returns:
            The bases.

        Raises:
            UnsoundError: If some of the modules have to be looked at one by one.
        """
        return self._basis(name) if self._bases is None else self._bases[name]

    def _basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """The bases, computed."""
        deltas = self.deltas(name)
        # ranks are those of the adapter, whatever the precision of the others
        rtol = RANK_RTOL[deltas[0].dtype]
        found = column_bases(self._stacked(deltas, "B"), self._stacked(deltas, "A"), rtol)
        sound = found.sound.tolist()
        if not all(sound):
            raise UnsoundError([m for m, fine in zip(self.modules, sound, strict=True) if not fine])
        norms = found.norms * found.norms.new_tensor([abs(delta.scaling) for delta in deltas])
        self._measured[name] = _Measured(found.U.shape[-1], norms.tolist(), found.gram)
        return found.U

    def rank(self, name: str) -> int:
        """Dimension of the column spaces of an adapter, whose bases were asked for."""
        return self._measured[name].rank

    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's modules."""
        if name not in self._measured:
            return [delta.resolved().weight_norm() for delta in self.deltas(name)]
        return self._measured[name].norms

    def has_bias(self, name: str) -> bool:
        """Whether an adapter changes the bias of these modules."""
        return outlines(self._pool[name])[self.modules[0]].bias is not None

    def bias_norms(self, name: str) -> list[float]:
        """‖Δb‖ of an adapter's modules."""
        return [delta.bias_norm() for delta in self.deltas(name)]

    @full_precision
    def projected(
        self, name: str, Z: Float[Tensor, "batch out k"], counts: Sequence[int]
    ) -> Projected:
        """The parts of an adapter in the span of Z and beside it (Eq. 12 and 13).

        Args:
            name: The adapter, whose bases were asked for.
            Z: Orthonormal columns, zero beyond the count of each module.
            counts: How many columns each module has.

        Returns:
            The parts. Only B and the change of the bias differ from what was read.
        """
        deltas = self.deltas(name)
        B, Z = self._stacked(deltas, "B"), Z.to(self.dtype)
        values = [delta.scaling for delta in deltas]
        scalings = Z.new_tensor(values)[:, None, None]
        C = Z.mT @ B
        shared_B = product(Z, C)
        squares = (small(C) @ self._measured[name].gram * small(C)).sum(dim=(-2, -1))
        factors = scalings.flatten().to(squares)
        if extreme := any(map(extreme_exponent, values)):
            factors = squares.new_tensor(values)
        norms = factors.abs() * squares.clamp(min=0).sqrt()
        shared: list[Delta | None] = []
        unique: list[Delta] = []
        rest_B, shared_B = self._returned(B.sub_(shared_B), shared_B)
        for index, (delta, part, rest) in enumerate(zip(deltas, shared_B, rest_B, strict=True)):
            bias = None if delta.bias is None else delta.bias.to(Z)
            along = None if bias is None else Z[index] @ (Z[index].mT @ bias)
            beside = None if bias is None or along is None else bias - along
            made = counts[index] > 0
            shared.append(self._part(delta, part, along) if made else None)
            unique.append(self._part(delta, rest, beside) if made else self.released(delta))
        exponents = [extreme_exponent(norm) for norm in norms.tolist()]
        left = scalings * C
        if extreme or any(exponents):
            left = times_powers(factors[:, None, None] * C, [-e for e in exponents]).to(C)
        coordinates = left @ self._stacked(deltas, "A")
        return Projected(shared, unique, coordinates, exponents, norms.tolist())

    @property
    def working_bytes(self) -> int:
        """About how much memory is needed at a time."""
        known = [outlines(self._pool[name])[self.modules[0]] for name in self.names]
        factor = max(max(delta.shape) * delta.rank for delta in known)
        whole = math.prod(known[0].shape) if any(d.gain is not None for d in known) else 0
        needed = self._itemsize * (8 * len(self.modules) * factor + 2 * whole)
        return needed + self._held_bytes

    @property
    def _itemsize(self) -> int:
        """Bytes of a number in what is computed."""
        return self.dtype.itemsize

    def release(self) -> None:
        """Let go of all that was read and found."""
        self._measured.clear()
        self._bases = None
        if self._read is not None:
            self._read.clear()

    def named(self, values: Sequence[V]) -> dict[str, V]:
        """Values in the order of the modules, by their names."""
        return dict(zip(self.modules, values, strict=True))

    def without(self, unsound: Collection[str]) -> list[Stack]:
        """The same modules in stacks that are sound: the unsound ones, one by one, and the rest."""
        rest = [module for module in self.modules if module not in unsound]
        exact = [ExactStack([m], self._pool, self.device) for m in self.modules if m in unsound]
        return [*exact, *([Stack(rest, self._pool, self.device)] if rest else [])]

    def located(self) -> AbstractContextManager[None]:
        """What says in messages which modules these are; factors say it when they are read."""
        return nullcontext()

    def released(self, delta: Delta) -> Delta:
        """A result where the first adapter's factors are."""
        return delta if delta.B.device == delta.A.device == self._home else delta.to(self._home)

    def _part(self, original: Delta, B: Tensor, bias: Tensor | None) -> Delta:
        """A delta with another B, the rest as it was read."""
        return self.released(dataclasses.replace(original, B=B, bias=bias))

    def _returned(self, *results: Tensor) -> Sequence[Tensor]:
        """Results where the first adapter's factors are, from a GPU in pinned memory."""
        if self.device.type != "cuda" or self._home.type != "cpu":
            return [result.to(self._home) for result in results]
        # copies to memory that is not pinned, the more so if it is new, take many times as long
        staged = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
        for place, result in zip(staged, results, strict=True):
            place.copy_(result, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return staged

    def _stacked(self, deltas: Sequence[Delta], factor: str) -> Float[Tensor, "batch _ _"]:
        """Factors in the working precision where it is computed; always a copy."""
        held = [getattr(delta, factor) for delta in deltas]
        # elsewhere fewer bytes are moved if they become longer there
        dtype = self.dtype if self.device.type == "cpu" else held[0].dtype
        stacked = empty((len(held), *held[0].shape), dtype, self.device)
        for place, one in zip(stacked, held, strict=True):
            if self.device.type == "cuda" and not (one.is_cuda or one.is_pinned()):
                one = one.pin_memory()  # of such memory alone, copies go on beside other work
            place.copy_(one, non_blocking=self.device.type == "cuda")
        return torch.as_tensor(stacked, dtype=self.dtype)


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
        self._base = base_of(known)
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
        self._measured[name] = _Measured(len(S), [norm], small(A @ A.mT)[None])
        return U[None]

    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's module."""
        if name not in self._measured:
            self._measured[name] = _Measured(0, [self._delta(name).weight_norm()], torch.empty(0))
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
            self._resolved.update(resolved_together(held))
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


def _stored_bytes(delta: Delta) -> int:
    """Bytes of a delta's factors as they are stored."""
    return sum(math.prod(f.shape) * f.element_size() for f in (delta.B, delta.A))
