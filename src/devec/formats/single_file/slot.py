"""Slots: where and how the factors of a module are stored in a single file."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from devec.deltas.delta import Delta
from devec.deltas.dora import axes_of
from devec.deltas.gains import Axis, Magnitude
from devec.files.safetensors_reader import storable
from devec.formats.magnitudes import MagnitudeSlot
from devec.formats.rewrites import Rewrite
from devec.naming.conventions import WHOLE_BIAS


@dataclass(frozen=True, slots=True)
class FileSlot:
    """Where and how the factors of a module are stored.

    Attributes:
        id: The module's id in the file.
        shape: Shape (out, in) of the weight.
        kernel: Shape of a convolution's kernel.
        down: Key of the factor on the input side.
        up: Key of the factor on the output side.
        alpha: Key of alpha; empty if scalings are folded into B.
        bias: Key of the change of the bias.
        magnitude: Slot of the magnitudes of a DoRA.
        dtypes: Storage types of down, up and alpha.
        rank: The rank in the file that was read; 0 if it was in none.
        scaling: The scaling in that file.
        read_as: Type of the factors in that file, if another one is written.
    """

    id: str
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    down: str
    up: str
    alpha: str
    bias: str
    magnitude: MagnitudeSlot
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    rank: int = 0
    scaling: float = 1.0
    read_as: torch.dtype | None = None

    def group(self, axis: Axis) -> int:
        """Number of rows or columns of the weight that share a magnitude, as in a kernel."""
        if axis == "out":
            return 1
        if self.magnitude.axis == axis and self.magnitude.shape:
            return self.shape[1] // math.prod(self.magnitude.shape)
        return math.prod(self.kernel)

    def as_read(self, delta: Delta) -> bool:
        """Whether a delta has the rank, scaling and axis of the file that was read."""
        axis = next(iter(axes_of(delta)), None)
        read = self.rank, self.scaling, self.magnitude.axis
        return (delta.rank, delta.scaling, axis) == read

    def write(self, delta: Delta, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The stored tensors of a delta.

        Args:
            delta: The delta of the module, with a scaling that the file can express, and with
                magnitudes or without gains.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            Key → tensor.

        Raises:
            OutputError: If a value is too large for the storage type.
            UnsupportedError: If magnitudes on their axis cannot be stored.
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
        if isinstance(delta.gain, Magnitude):
            stored = self.magnitude.write(delta.gain, self.kernel, dtype)
            tensors[self.magnitude.key] = stored
        return tensors


def result_slot(slot: FileSlot) -> FileSlot:
    """The slot for a result, with keys that all hosts load."""
    magnitude = slot.magnitude.for_result()
    return slot if magnitude is slot.magnitude else dataclasses.replace(slot, magnitude=magnitude)


def exact_alpha(delta: Delta, dtype: torch.dtype) -> Tensor | None:
    """Alpha = scaling · rank in a storage type; None if readers would get another scaling."""
    alpha = torch.tensor(delta.scaling * delta.rank, dtype=dtype)
    return alpha if float(alpha) / delta.rank == delta.scaling else None


def one_alpha(deltas: Mapping[str, Delta]) -> dict[str, Rewrite]:
    """Module → rewrite to the most frequent alpha, for the modules that have another."""
    # diffusers mixes up different alphas of attention layers in UNets
    alphas = Counter(delta.scaling * delta.rank for delta in deltas.values() if delta.scaling)
    if len(alphas) < 2:
        return {}
    alpha = alphas.most_common(1)[0][0]
    return {
        module: partial(_with_alpha, alpha)
        for module, delta in deltas.items()
        if delta.scaling * delta.rank != alpha
    }


def _with_alpha(alpha: float, delta: Delta) -> Delta:
    """The same delta with another alpha; the remaining factor goes into B and the bias."""
    # s·B does not change, and neither does W0 + s·B·A, which magnitudes of a DoRA refer to
    factor = delta.scaling * delta.rank / alpha
    bias = None if delta.bias is None else factor * delta.bias.to(delta.dtype)
    B = factor * delta.B.to(delta.dtype)
    return dataclasses.replace(delta, B=B, bias=bias, scaling=alpha / delta.rank)
