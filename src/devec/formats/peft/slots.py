"""Slots: how PEFT stores the factors of each kind of layer.

A slot is one pair of stored tensors. For every kind of layer the delta is ``scaling · B · A`` with
B on the output side: layers that store their weight transposed (GPT-2's Conv1D, embeddings) apply
(B·A)ᵀ to it, a convolution flattens its kernel into the input side, and the parameter of E experts
stacks E pairs of factors, A by expert and B by rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.gains import Magnitude
from devec.errors import FormatError, IncompatibleError, UnsupportedError, listed
from devec.files.safetensors_reader import storable
from devec.formats.magnitudes import magnitude_dtype
from devec.formats.peft.names import unwrapped

# Projections of experts as transformers 4 names them. With transformers 5, PEFT makes one parameter
# of them when it loads an adapter, and gives it the rank that the configuration names first.
EXPERTS = "*.experts.*"
_EXPERT = re.compile(r"\.experts\.\d+\.(?:w1|w2|w3|gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class PeftSlot:
    """One pair of stored factors.

    Attributes:
        path: Key of a factor without its suffix.
        name: Name of the module in the base model.
        kind: ``"linear"``, ``"conv"``, ``"embedding"`` or ``"experts"``.
        shape: Shape (out, in) of the weight, of one expert.
        rank: Rank of each pair of factors.
        scaling: Effective scaling.
        dtypes: Storage types of A and B.
        kernel: Shape of a convolution's kernel.
        experts: Number of experts.
        parameters: Full names of the parameters the slot may belong to, if it is not a module.
        attention: Name of the nn.MultiheadAttention that the slot is a projection of, if any.
        fan_in_fan_out: Whether linear layers are stored transposed, by the configuration.
    """

    path: str
    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtypes: tuple[torch.dtype, torch.dtype]
    kernel: tuple[int, ...] = ()
    experts: int = 1
    parameters: tuple[str, ...] = ()
    attention: str = ""
    fan_in_fan_out: bool = False

    @property
    def keys(self) -> tuple[str, str, str]:
        """Keys of A, B and the bias of B."""
        if self.kind == "embedding":
            return f"{self.path}.lora_embedding_A", f"{self.path}.lora_embedding_B", ""
        return (
            f"{self.path}.lora_A.weight",
            f"{self.path}.lora_B.weight",
            f"{self.path}.lora_B.bias",
        )

    @property
    def magnitude_key(self) -> str:
        """Key of the magnitudes of a DoRA; without the suffix transformers would not load them."""
        return f"{self.path}.lora_magnitude_vector.weight"

    @property
    def base_name(self) -> str:
        """Name of the layer in the base model, without PEFT's wrappers."""
        return unwrapped(self.name)

    @property
    def target(self) -> str:
        """Name by which PEFT targets the layer and looks up its rank and alpha."""
        return unwrapped(self.attention or self.name)

    @property
    def unit(self) -> str:
        """Name of the unit of slots that PEFT creates with one rank; the path if it is alone.

        Units are the projections of an nn.MultiheadAttention, the parameters of a module, and the
        experts of transformers 4, of which transformers 5 makes one parameter.
        """
        if self.attention or self.parameters:
            return self.target
        return EXPERTS if _EXPERT.search(self.name) else self.path

    @property
    def modules(self) -> list[str]:
        """Names of the deltas that the slot stores: one for each expert."""
        if self.kind == "experts":
            return [f"{self.name}[{expert}]" for expert in range(self.experts)]
        return [self.name]

    def deltas(self, modules: Mapping[str, Delta], *, always: bool = False) -> list[Delta]:
        """The deltas of the slot among those of an adapter.

        Args:
            modules: Name → delta of the adapter.
            always: Whether missing deltas are zeros.

        Returns:
            One delta for each name in `modules`; none if the adapter lacks some, unless `always` is
            set or the slot is a parameter: PEFT requires that all adapters of a model target the
            same parameters.
        """
        if all(name in modules for name in self.modules):
            return [modules[name] for name in self.modules]
        if not self.parameters and not always:
            return []
        device = next((modules[n].B.device for n in self.modules if n in modules), None)
        B, A = (torch.zeros(s, device=device) for s in ((self.shape[0], 0), (0, self.shape[1])))
        return [modules.get(name) or Delta(B, A) for name in self.modules]

    def read(self, tensors: Mapping[str, Tensor], base: BaseWeight) -> dict[str, Delta]:
        """The deltas of the slot from its stored tensors.

        Args:
            tensors: ``"A"`` (input side), ``"B"`` (output side) and, if stored, ``"bias"`` and
                ``"magnitude"``, shape (out,), or (1, out, 1, …) for a convolution.
            base: The base weight, for a DoRA.

        Returns:
            Name → delta.

        Raises:
            FormatError: If the number of magnitudes is not the number of outputs.
        """
        A, B, E = tensors["A"], tensors["B"], self.experts
        if self.kind == "experts":
            return {
                name: Delta(B[:, e::E], A[e * self.rank : (e + 1) * self.rank], self.scaling)
                for e, name in enumerate(self.modules)
            }
        gain = None
        if "magnitude" in tensors:
            gain = Magnitude(self._magnitudes(tensors["magnitude"]), "out", base)
        bias = tensors.get("bias")
        return {self.name: Delta(B.flatten(1), A.flatten(1), self.scaling, bias, gain)}

    def _magnitudes(self, stored: Tensor) -> Tensor:
        """Stored magnitudes, one for each output along one dimension, flattened."""
        out = self.shape[0]
        if stored.numel() != out or out not in stored.shape:
            raise FormatError(
                f"the magnitudes have shape {tuple(stored.shape)}, expected one for each of {out} "
                "outputs"
            )
        return stored.flatten()

    def write(
        self, deltas: Sequence[Delta], *, with_bias: bool, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The stored tensors of the slot's deltas, which have one rank and scaling.

        Args:
            deltas: The deltas, in the order of `modules`, without gains or with magnitudes.
            with_bias: Whether the file stores changes of biases.
            dtype: Storage type; by default that of the input.

        Returns:
            Key → tensor.

        Raises:
            OutputError: If a value is too large for the storage type.
        """
        A = deltas[0].A if len(deltas) == 1 else torch.cat([delta.A for delta in deltas])
        if self.kind == "experts":
            # rank-major: column r·E + e of the stored B is column r of expert e
            B = torch.stack([delta.B for delta in deltas], dim=2).flatten(1)
        else:
            B = deltas[0].B
        if self.kind == "conv":
            A = A.reshape(len(A), -1, *self.kernel)
            B = B.reshape(*B.shape, *(1 for _ in self.kernel))
        of_A, of_B = self.dtypes if dtype is None else (dtype, dtype)
        key_A, key_B, key_bias = self.keys
        stored = {key_A: storable(key_A, A, of_A), key_B: storable(key_B, B, of_B)}
        if with_bias:
            bias = deltas[0].bias
            bias = torch.zeros(len(B)) if bias is None else bias
            stored[key_bias] = storable(key_bias, bias, of_B)
        if isinstance(deltas[0].gain, Magnitude):
            m, key = deltas[0].gain.values, self.magnitude_key
            shape = (1, -1, *(1 for _ in self.kernel)) if self.kernel else (-1,)
            stored[key] = storable(key, m.reshape(shape), magnitude_dtype(m, dtype))
        return stored


def padded(deltas: Sequence[Delta], rank: int) -> list[Delta]:
    """Deltas padded with zeros to one rank, at least that of each, with scalings folded into B."""
    result = []
    for delta in (d.folded() for d in deltas):
        short = rank - delta.rank
        if not short:
            result.append(delta)
            continue
        B = torch.nn.functional.pad(delta.B, (0, short))
        A = torch.nn.functional.pad(delta.A, (0, 0, 0, short))
        result.append(dataclasses.replace(delta, B=B, A=A))
    return result


def require_shapes(A: Tensor, B: Tensor) -> None:
    """Check that two tensors are the factors of a layer that PEFT can merge.

    Args:
        A: The factor on the input side.
        B: The factor on the output side.

    Raises:
        FormatError: If their shapes do not fit together.
        UnsupportedError: If PEFT itself cannot form the delta of the layer.
    """
    if A.ndim != B.ndim or not 2 <= A.ndim <= 5 or 0 in (*A.shape, *B.shape):
        raise FormatError(
            f"factors have shapes A {tuple(A.shape)} and B {tuple(B.shape)}; expected two "
            "non-empty matrices or two convolution kernels"
        )
    if A.ndim > 2 and B.shape[1] != A.shape[0] and A.shape[0] % B.shape[1] == 0:
        raise UnsupportedError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are factors of a convolution with groups, "
            "whose product is no plain delta; PEFT cannot merge it either. Leave the layer out"
        )
    if B.shape[1] != A.shape[0] or any(size != 1 for size in B.shape[2:]):
        raise FormatError(
            f"ranks disagree: A {tuple(A.shape)} has {A.shape[0]} rows, B {tuple(B.shape)} has "
            f"{B.shape[1]} columns"
        )


def has_biases(deltas: Mapping[PeftSlot, Sequence[Delta]]) -> bool:
    """Whether any delta changes a bias; refused beside embeddings and parameters, as in PEFT."""
    with_bias = any(d.bias is not None for own in deltas.values() for d in own)
    without = [s.name for s, d in deltas.items() if d and (s.kind == "embedding" or s.parameters)]
    if with_bias and without:
        raise IncompatibleError(
            f"PEFT cannot hold changes of biases (lora_bias) beside {listed(without)}, which "
            "are embeddings or parameters; leave one kind out"
        )
    return with_bias
