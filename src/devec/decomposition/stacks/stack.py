"""What is common to all stacks: modules of one shape, read from the adapters of a pool.

Factors are read again whenever they are needed, unless those of the whole pool are small. So memory
does not grow with the pool.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from devec.deltas.delta import Delta
from devec.lazy import outlines
from devec.linalg.dtypes import working_dtype

V = TypeVar("V")

Pool = Mapping[str, Mapping[str, Delta]]  # adapter → module → delta

# Factors of all adapters in the modules of a stack are kept after reading if they are smaller.
_KEPT_BYTES = 1 << 24


class UnsoundError(Exception):
    """Some modules of a stack are too ill-conditioned to be computed together.

    Attributes:
        modules: Their names.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        """Name the modules."""
        super().__init__(*modules)
        self.modules = frozenset(modules)


class Projected(NamedTuple):
    """The parts of one adapter inside and outside of the span of Z, module by module.

    Attributes:
        shared: Z·Zᵀ·ΔW; None where Z has no columns.
        unique: ΔW - Z·Zᵀ·ΔW; the delta as it was read where Z has no columns.
        coordinates: Zᵀ·ΔW·2^-e.
        exponents: e of each module; 0 unless the norm is above 2^60 or below 2^-60.
        norms: ‖Z·Zᵀ·ΔW‖_F.
    """

    shared: list[Delta | None]
    unique: list[Delta]
    coordinates: Float[Tensor, "batch k in"]
    exponents: list[int]
    norms: list[float]


class Measured(NamedTuple):
    """Ranks and norms of an adapter's ΔW, and A·Aᵀ, which are kept once its bases are computed."""

    rank: int
    norms: list[float]
    gram: Tensor


class Stack(ABC):
    """Modules of one shape, as the adapters of a pool change them.

    Args:
        modules: Names of the modules.
        pool: The adapters that have them.
        device: Where to compute; by default where the factors are.

    Attributes:
        modules: Names of the modules.
        names: Names of the adapters.
        rows: Dimension of the column spaces.
        dtype: Working precision.
        device: Where to compute.
        home: Device of the first adapter's factors, to which results return.
    """

    def __init__(
        self, modules: Sequence[str], pool: Pool, device: torch.device | str | None
    ) -> None:
        """Look at outlines only; nothing is read."""
        self.modules, self.names, self.pool = tuple(modules), tuple(pool), pool
        self.outlines = {name: outlines(pool[name])[self.modules[0]] for name in pool}
        first, *_ = known = list(self.outlines.values())
        self.rows = first.shape[0]
        self.dtype = working_dtype(*(factor for d in known for factor in (d.B, d.A)))
        home = first.B.device
        self.home = torch.device("cpu") if home.type == "meta" else home
        self.device = torch.device(device) if device is not None else self.home
        self._measured: dict[str, Measured] = {}
        size = len(self.modules) * sum(stored_bytes(delta) for delta in known)
        self._kept_bytes = size if size <= _KEPT_BYTES else 0
        self._kept: dict[str, list[Delta]] | None = {} if self._kept_bytes else None
        self._bases: dict[str, Tensor] | None = None

    @abstractmethod
    def computed_basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """Compute the bases of an adapter, and keep its ranks and norms.

        Raises:
            UnsoundError: If some of the modules have to be computed one by one.
        """

    @abstractmethod
    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's modules."""

    @abstractmethod
    def projected(
        self, name: str, Z: Float[Tensor, "batch out k"], counts: Sequence[int]
    ) -> Projected:
        """The parts of an adapter inside and outside of the span of Z (Eq. 12 and 13).

        Args:
            name: The adapter, whose bases were computed.
            Z: Orthonormal columns, zero beyond the count of each module.
            counts: How many columns each module has.
        """

    def result(self, delta: Delta) -> Delta:
        """A delta on the device to which results return."""
        return delta if delta.B.device == delta.A.device == self.home else delta.to(self.home)

    def located(self) -> AbstractContextManager[None]:
        """A context that adds the module to error messages where reading does not."""
        return nullcontext()

    def deltas(self, name: str) -> list[Delta]:
        """The deltas of an adapter as they are read."""
        if self._kept is None:
            return [self.pool[name][module] for module in self.modules]
        if name not in self._kept:
            self._kept[name] = [self.pool[name][module] for module in self.modules]
        return self._kept[name]

    def unchanged(self, name: str) -> list[Delta]:
        """The deltas of an adapter as they are read, on the device to which results return."""
        return [Stack.result(self, delta) for delta in self.deltas(name)]

    def basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """Orthonormal bases of the column spaces of an adapter.

        Raises:
            UnsoundError: If some of the modules have to be computed one by one.
        """
        return self.computed_basis(name) if self._bases is None else self._bases[name]

    def keep_bases(self) -> None:
        """Compute the bases of all adapters once, for scopes that need each of them repeatedly."""
        self._bases = {name: self.computed_basis(name) for name in self.names}

    def rank(self, name: str) -> int:
        """Dimension of the column spaces of an adapter, whose bases were computed."""
        return self._measured[name].rank

    def has_bias(self, name: str) -> bool:
        """Whether an adapter changes the bias of these modules."""
        return self.outlines[name].bias is not None

    def bias_norms(self, name: str) -> list[float]:
        """‖Δb‖ of an adapter's modules."""
        return [delta.bias_norm() for delta in self.deltas(name)]

    def named(self, values: Sequence[V]) -> dict[str, V]:
        """Values in the order of the modules, by module."""
        return dict(zip(self.modules, values, strict=True))

    @property
    def working_bytes(self) -> int:
        """About how much memory is needed at a time."""
        known = self.outlines.values()
        factor = max(max(delta.shape) * delta.rank for delta in known)
        whole = math.prod(self.outlines[self.names[0]].shape)
        whole = whole if any(delta.gain is not None for delta in known) else 0
        numbers = 8 * len(self.modules) * factor + 2 * whole
        return self.itemsize * numbers + self._kept_bytes

    @property
    def itemsize(self) -> int:
        """Bytes of a number while computing."""
        return self.dtype.itemsize

    def release(self) -> None:
        """Drop all that was read and computed."""
        self._measured.clear()
        self._bases = None
        if self._kept is not None:
            self._kept.clear()


def stored_bytes(delta: Delta) -> int:
    """Bytes of a delta's factors as they are stored."""
    return sum(math.prod(f.shape) * f.element_size() for f in (delta.B, delta.A))
