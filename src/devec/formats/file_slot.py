"""Where and how the factors of one module are stored in a file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.delta import Delta
from devec.formats.conventions import WHOLE_BIAS
from devec.formats.tensors import storable


@dataclass(frozen=True)
class FileSlot:
    """Where the factors of one module are stored.

    Attributes:
        id: The module's id in the file.
        shape: Shape (out, in) of the weight.
        kernel: Shape of a convolution's kernel.
        down: Key of the factor on the input side.
        up: Key of the factor on the output side.
        alpha: Key of alpha; empty where scalings are folded into B.
        bias: Key of the change of the bias.
        dtypes: Storage types of down, up and alpha.
        rank: The rank it was read with; 0 if it was not.
        scaling: The scaling it was read with.
        read_as: Type of the stored factors, where another one is written.
    """

    id: str
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    down: str
    up: str
    alpha: str
    bias: str
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    rank: int = 0
    scaling: float = 1.0
    read_as: torch.dtype | None = None

    def as_read(self, delta: Delta) -> bool:
        """Whether a delta has the rank and scaling that the module was read with."""
        return (delta.rank, delta.scaling) == (self.rank, self.scaling)

    def write(self, delta: Delta, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Stored tensors of a delta.

        Args:
            delta: The delta of the module, its scaling one that the file can express.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            Key → tensor.

        Raises:
            OutputError: If a value is too large for the storage type.
        """
        tensors: dict[str, Tensor] = {}
        if self.alpha:
            alpha = exact_alpha(delta, self.dtypes[2])
            exact = exact_alpha(delta, torch.float32) if alpha is None else alpha
            tensors[self.alpha] = torch.as_tensor(exact)
        A, B = delta.A, delta.B
        if self.kernel:
            A = A.reshape(len(A), -1, *self.kernel)
            B = B.reshape(*B.shape, *(1 for _ in self.kernel))
        tensors[self.down] = storable(self.down, A, dtype or self.dtypes[0])
        tensors[self.up] = storable(self.up, B, dtype or self.dtypes[1])
        if delta.bias is not None:
            whole = self.bias.endswith(WHOLE_BIAS)
            bias = delta.folded().bias if whole else delta.bias
            tensors[self.bias] = storable(self.bias, torch.as_tensor(bias), dtype or self.dtypes[1])
        return tensors


def exact_alpha(delta: Delta, dtype: torch.dtype) -> Tensor | None:
    """Alpha = scaling · rank in a storage type, if a reader gets the same scaling from it."""
    alpha = torch.tensor(delta.scaling * delta.rank, dtype=dtype)
    return alpha if float(alpha) / delta.rank == delta.scaling else None


def one_alpha(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The same deltas with one alpha for all of them.

    diffusers mixes up the alphas of attention layers in UNets.

    Args:
        deltas: Module → delta.

    Returns:
        Module → delta, the most frequent alpha in all of them, what it lacks multiplied into B.
    """
    alphas = Counter(delta.scaling * delta.rank for delta in deltas.values() if delta.scaling)
    if len(alphas) < 2:
        return dict(deltas)
    alpha = alphas.most_common(1)[0][0]
    return {
        module: dataclasses.replace(
            delta * (delta.scaling * delta.rank / alpha), scaling=alpha / delta.rank
        )
        if delta.scaling * delta.rank != alpha
        else delta
        for module, delta in deltas.items()
    }
