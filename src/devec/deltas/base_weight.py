"""The weight that an adapter changes, where a delta cannot do without it."""

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
    """A base weight W0 that is read when it is needed, as the map from inputs to outputs.

    A convolution is flattened to (out, in·kh·kw), a layer that stores its weight transposed is
    turned around, a quantised weight is dequantised.
    """

    @property
    def source(self) -> str:
        """The model it belongs to; weights of other models are not the same space."""

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The weight, in a precision and at a place; `DevecError` if it cannot be had."""


@dataclass(frozen=True, eq=False)
class InMemoryWeight:
    """A base weight in memory.

    Attributes:
        tensor: The weight, shape (out, in).
        source: The model it belongs to; one of its own, unless it is said.
    """

    tensor: Float[Tensor, "out in"]
    source: str = field(default_factory=lambda: f"memory {next(_NUMBERS)}")

    @cached_property
    def row_squares(self) -> Float[Tensor, " out"]:
        """‖w_i‖² of every row, in the basis precision."""
        # in blocks, so that no more is lost than rounding of one block's norm
        blocks = torch.split(self.tensor, _BLOCK_COLUMNS, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks])
        return norms.to(basis_dtype(norms.device)).square().sum(dim=0)

    @cached_property
    def transpose(self) -> InMemoryWeight:
        """The weight as the map from outputs to inputs."""
        return InMemoryWeight(self.tensor.mT, self.source)

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The weight itself, copied only where precision or place differ."""
        return self.tensor.to(device, dtype)


@dataclass(frozen=True)
class WeightRows:
    """Some rows of a base weight.

    Attributes:
        whole: The weight.
        start: First row.
        stop: Row after the last.
    """

    whole: BaseWeight
    start: int
    stop: int

    @property
    def source(self) -> str:
        """The model it belongs to."""
        return self.whole.source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """The rows."""
        return self.whole.read(dtype, device)[self.start : self.stop]


@dataclass(frozen=True)
class ConcatenatedWeight:
    """Base weights one under the other.

    Attributes:
        parts: The weights, one at least.
    """

    parts: Sequence[BaseWeight]

    @property
    def source(self) -> str:
        """The model they belong to."""
        return self.parts[0].source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
        """All rows."""
        return torch.cat([part.read(dtype, device) for part in self.parts])


def transposed(weight: BaseWeight) -> BaseWeight:
    """The weight as the map from outputs to inputs."""
    if isinstance(weight, InMemoryWeight):
        return weight.transpose
    return weight.weight if isinstance(weight, _TransposedWeight) else _TransposedWeight(weight)


@dataclass(frozen=True)
class _TransposedWeight:
    weight: BaseWeight

    @property
    def source(self) -> str:
        return self.weight.source

    def read(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "in out"]:
        return self.weight.read(dtype, device).mT
