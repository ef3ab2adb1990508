"""The base weight of a module, for deltas that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from devec.linalg.dtypes import basis_dtype

_BLOCK_COLUMNS = 1024
_NUMBERS = count(1)


@runtime_checkable
class BaseWeight(Protocol):
    """A base weight W0 of shape (out, in) that is read on access.

    A convolution is flattened to (out, in·kh·kw), a weight that is stored transposed is transposed
    back, and a quantised weight is dequantised.
    """

    @property
    def source(self) -> str:
        """The base model; deltas on weights of different base models cannot be added."""

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The weight with this dtype and device; `DevecError` if it is not available."""


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """A base weight in memory.

    Attributes:
        tensor: The weight, shape (out, in).
        source: The base model; by default an identifier of its own.
    """

    tensor: Float[Tensor, "out in"]
    source: str = field(default_factory=lambda: f"memory {next(_NUMBERS)}")

    @cached_property
    def row_squares(self) -> Float[Tensor, " out"]:
        """‖w_i‖² of every row, in the basis precision."""
        # in blocks, so that the error is at most the rounding of one block's norm
        blocks = torch.split(self.tensor, _BLOCK_COLUMNS, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks])
        return norms.to(basis_dtype(norms.device)).square().sum(dim=0)

    @cached_property
    def transpose(self) -> HeldWeight:
        """The transposed weight, shape (in, out)."""
        return HeldWeight(self.tensor.mT, self.source)

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The weight; copied only if dtype or device differ."""
        return self.tensor.to(device, dtype)


@dataclass(frozen=True)
class WeightRows:
    """Consecutive rows of a base weight.

    Attributes:
        whole: The base weight.
        start: First row.
        stop: One past the last row.
    """

    whole: BaseWeight
    start: int
    stop: int

    @property
    def source(self) -> str:
        """The base model."""
        return self.whole.source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The rows."""
        return self.whole.read(dtype, device)[self.start : self.stop]


@dataclass(frozen=True)
class ConcatenatedWeight:
    """Base weights concatenated along the rows.

    Attributes:
        weights: One or more base weights of one model.
    """

    weights: Sequence[BaseWeight]

    @property
    def source(self) -> str:
        """The base model."""
        return self.weights[0].source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The rows of all weights."""
        return torch.cat([weight.read(dtype, device) for weight in self.weights])


def transposed(weight: BaseWeight) -> BaseWeight:
    """The transposed weight, shape (in, out)."""
    if isinstance(weight, HeldWeight):
        return weight.transpose
    return weight.weight if isinstance(weight, _TransposedWeight) else _TransposedWeight(weight)


@dataclass(frozen=True)
class _TransposedWeight:
    """A base weight that is transposed after reading."""

    weight: BaseWeight

    @property
    def source(self) -> str:
        return self.weight.source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "in out"]:
        return self.weight.read(dtype, device).mT
