"""Modules of one shape, of all adapters of a pool: their factors, stacked, and what follows.

What is asked for is computed from factors that are read again each time, unless the whole pool's
factors of these modules take little memory. So the memory does not grow with the pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from devec.deltas.delta import Delta
from devec.lazy import outlines
from devec.linalg.batched import column_bases
from devec.linalg.buffers import empty, matmul
from devec.linalg.dtypes import RANK_RTOL, to_float64, working_dtype
from devec.linalg.exponents import extreme_exponent, times_powers
from devec.linalg.precision import full_precision

V = TypeVar("V")


Pool = Mapping[str, Mapping[str, Delta]]  # adapter → module → delta


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


class Measured(NamedTuple):
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
        self.pool = pool
        known = [outlines(pool[name])[self.modules[0]] for name in pool]
        self.rows = known[0].shape[0]
        self.dtype = working_dtype(*(factor for d in known for factor in (d.B, d.A)))
        home = known[0].B.device
        self._home = torch.device("cpu") if home.type == "meta" else home
        self.device = torch.device(device) if device is not None else self._home
        self._measured: dict[str, Measured] = {}
        held = len(self.modules) * sum(_stored_bytes(delta) for delta in known)
        self._held_bytes = held if held <= _HELD_BYTES else 0
        self._read: dict[str, list[Delta]] | None = {} if self._held_bytes else None
        self._bases: dict[str, Tensor] | None = None

    def deltas(self, name: str) -> list[Delta]:
        """The deltas of an adapter as they are read."""
        if self._read is None:
            return [self.pool[name][module] for module in self.modules]
        if name not in self._read:
            self._read[name] = [self.pool[name][module] for module in self.modules]
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
        self._measured[name] = Measured(found.U.shape[-1], norms.tolist(), found.gram)
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
        return outlines(self.pool[name])[self.modules[0]].bias is not None

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
        shared_B = matmul(Z, C)
        squares = (to_float64(C) @ self._measured[name].gram * to_float64(C)).sum(dim=(-2, -1))
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
        known = [outlines(self.pool[name])[self.modules[0]] for name in self.names]
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


_HELD_BYTES = 1 << 24


def _stored_bytes(delta: Delta) -> int:
    """Bytes of a delta's factors as they are stored."""
    return sum(math.prod(f.shape) * f.element_size() for f in (delta.B, delta.A))
