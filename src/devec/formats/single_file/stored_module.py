"""The tensors of a module of a single-file adapter, as one pair of factors.

LoRA factors are used unchanged. LoHa and LoKr, with or without Tucker cores, are rewritten to
factors, exactly if the rank allows it. Any of them may have the magnitudes of a DoRA.

Reference: Yeh et al. 2024, arXiv 2309.14859 (LyCORIS: LoHa, LoKr, Tucker form).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.gains import Axis, Magnitude
from devec.errors import FormatError, UnsupportedError
from devec.formats.magnitudes import MAGNITUDE_PARTS, find_magnitudes
from devec.linalg.hadamard_kronecker import FactorPair, hadamard_product, kronecker_product
from devec.linalg.precision import full_precision

ModuleTensors = Mapping[str, Tensor]  # part → tensor

_WITH_CORE = " with a Tucker core"

# No adapter in use has a larger rank; such a file is broken, or meant to exhaust memory.
_LARGEST_RANK = 16384
_LARGEST_ALPHA = 1e15

# Limits for the factors of one module: numbers in all, more than any layer of any model needs, and
# numbers relative to those stored, which is about 300 for the smallest LoKr of a large layer.
# Products of stored factors grow with the product of their sizes, so without limits a small file
# could exhaust memory.
_LARGEST_EXPANSION = 1 << 26
_MOST_GROWTH = 1000
_ANY_MODULE = 1 << 16


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module as it is stored.

    Attributes:
        delta: Its delta; for a DoRA, without the magnitudes.
        kind: ``"LoRA"``, ``"LoHa"`` or ``"LoKr"``, and whether it has a Tucker core.
        kernel: Shape of a convolution's kernel, if the tensors tell it.
        error: Relative error of the factors; 0 unless they were truncated.
        magnitudes: The magnitudes of a DoRA as stored, and their axis.
    """

    delta: Delta
    kind: str
    kernel: tuple[int, ...]
    error: float = 0.0
    magnitudes: tuple[Tensor, Axis] | None = None

    @property
    def axis(self) -> Axis | None:
        """The axis of the magnitudes, None if there are none."""
        return self.magnitudes[1] if self.magnitudes else None

    def on(self, base: BaseWeight) -> Delta:
        """The delta, for a DoRA with magnitudes that refer to a base weight, which is not read."""
        if self.magnitudes is None:
            return self.delta
        stored, axis = self.magnitudes
        return dataclasses.replace(self.delta, gain=Magnitude(stored.flatten(), axis, base))


def read_module(parts: ModuleTensors, scaling: float | None, max_rank: int) -> StoredModule:
    """A module from its tensors.

    Args:
        parts: Part (``"up"``, ``"hada_w1_a"``, …) → tensor, finite.
        scaling: The scaling in the file's metadata, if any; ``.scale`` and ``.alpha`` take
            precedence.
        max_rank: Largest rank of factors that LoHa and LoKr are rewritten to.

    Returns:
        The module.

    Raises:
        FormatError: If tensors are missing or contradict each other.
        UnsupportedError: If the module has no plain delta.
    """
    for part, tensor in parts.items():
        if part not in ("alpha", "scale") and 0 in tensor.shape:
            raise FormatError(f"{part} has shape {tuple(tensor.shape)}, so it has no values")
    for own, read in _KIND_READERS.items():
        if any(part.startswith(own) for part in parts):
            allowed = (*own, "alpha", "scale", *MAGNITUDE_PARTS)
            others = [part for part in parts if not part.startswith(allowed)]
            if others:
                raise FormatError(
                    f"there are {', '.join(others)} beside {', '.join(own)}…, two kinds of "
                    "change of one module; remove one of them"
                )
            stored = read(parts, scaling, max_rank)
            magnitudes = find_magnitudes(parts, stored.delta.shape, stored.kernel)
            return dataclasses.replace(stored, magnitudes=magnitudes)
    raise FormatError(f"there are {', '.join(sorted(parts))}, but no factors")


def _lora(parts: ModuleTensors, scaling: float | None, _: int) -> StoredModule:
    """s·U·D, or with a Tucker core M: s·U·[Σ_n M[m,n,h,w] D[n,i]]."""
    up, down = _required(parts, "up", "down")
    if up.ndim < 2 or down.ndim < 2:
        raise FormatError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} should be matrices or kernels"
        )
    mid = parts.get("mid")
    groups = down.shape[0] // up.shape[1] if mid is None and up.shape[1] else 0
    if down.ndim > 2 and groups > 1 and up.shape[1] * groups == down.shape[0]:
        raise UnsupportedError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} are factors of a convolution with "
            "groups, whose product is no plain delta"
        )
    rank = _common_rank({"down": down.shape[0], "up": up.shape[1]})
    if math.prod(up.shape[2:]) != 1:
        raise FormatError(f"up {tuple(up.shape)} should have a kernel of ones behind its rank")
    kernel = tuple(down.shape[2:])
    if mid is not None:
        if mid.shape[:2] != (rank, rank) or math.prod(kernel) != 1 or mid.ndim < 3:
            raise FormatError(
                f"mid {tuple(mid.shape)} should be ({rank}, {rank}, kernel) with a down of 1 × 1"
            )
        kernel = tuple(mid.shape[2:])
        down = _tucker_side(mid, down.flatten(1))
    bias = parts.get("bias")
    if bias is not None and bias.shape != up.shape[:1]:
        raise FormatError(f"bias {tuple(bias.shape)} should have {up.shape[0]} values")
    delta = Delta(up.flatten(1), down.flatten(1), _scale(parts, rank, scaling), bias)
    return StoredModule(delta, "LoRA" if mid is None else f"LoRA{_WITH_CORE}", kernel)


def _loha(parts: ModuleTensors, scaling: float | None, max_rank: int) -> StoredModule:
    """s·(W1a·W1b) ⊙ (W2a·W2b), each with an optional Tucker core."""
    a1, b1, a2, b2 = _required(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _require_matrices(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    rank = b1.shape[0]
    kernel: tuple[int, ...] = ()
    if "hada_t1" in parts or "hada_t2" in parts:
        t1, t2 = _required(parts, "hada_t1", "hada_t2")
        if t1.shape[2:] != t2.shape[2:] or t1.ndim < 3:
            raise FormatError(
                f"the kernels of cores {tuple(t1.shape)} and {tuple(t2.shape)} differ"
            )
        kernel = tuple(t1.shape[2:])
        a1, b1 = a1.mT, _tucker_side(t1, b1)
        a2, b2 = a2.mT, _tucker_side(t2, b2)
    _common_rank({"w1_a": a1.shape[1], "w1_b": b1.shape[0]})
    inner = rank * _common_rank({"w2_a": a2.shape[1], "w2_b": b2.shape[0]})
    _require_modest((a1.shape[0] + b1.shape[1]) * min(inner, max_rank), a1, b1, a2, b2)
    product = hadamard_product(a1, b1, a2, b2, max_rank)
    return _from_product(
        f"LoHa{_WITH_CORE if kernel else ''}", product, _scale(parts, rank, scaling), kernel
    )


def _lokr(parts: ModuleTensors, scaling: float | None, max_rank: int) -> StoredModule:
    """s·(C ⊗ M), where C and M are each whole or a product; s = 1 if both are whole."""
    left, rank = _lokr_half(parts, "lokr_w1")
    right, right_rank = _lokr_half(parts, "lokr_w2")
    rank = right_rank or rank
    kernel: tuple[int, ...] = ()
    if "lokr_t2" in parts:
        kernel = tuple(parts["lokr_t2"].shape[2:])
    elif isinstance(right, Tensor) and right.ndim > 2:
        kernel = tuple(right.shape[2:])
        right = right.flatten(1)
    if isinstance(left, Tensor) and left.ndim > 2:
        left = left.flatten(1)
    m, n = (a * b for a, b in zip(_operand_shape(left), _operand_shape(right), strict=True))
    _require_modest((m + n) * min(m, n, max_rank), *parts.values())
    scale = _scale(parts, rank, scaling) if rank else 1.0
    kind = f"LoKr{_WITH_CORE if 'lokr_t2' in parts else ''}"
    return _from_product(kind, kronecker_product(left, right, max_rank), scale, kernel)


def _lokr_half(parts: ModuleTensors, name: str) -> tuple[Tensor | tuple[Tensor, Tensor], int]:
    """One operand of the Kronecker product, and its rank if it is a product; else 0."""
    core = parts.get("lokr_t2") if name == "lokr_w2" else None
    if name in parts:
        if core is not None or f"{name}_a" in parts or f"{name}_b" in parts:
            raise FormatError(f"there are both {name} and factors of it")
        if parts[name].ndim < 2:
            raise FormatError(f"{name} {tuple(parts[name].shape)} should be a matrix")
        return parts[name], 0
    a, b = _required(parts, f"{name}_a", f"{name}_b")
    _require_matrices(parts, f"{name}_b")
    rank = b.shape[0]
    if core is not None:
        _require_matrices(parts, f"{name}_a", f"{name}_b")
        a, b = a.mT, _tucker_side(core, b)
    _require_matrices({"a": a, "b": b}, "a", "b")
    _common_rank({f"{name}_a": a.shape[1], f"{name}_b": b.shape[0]})
    return (a, b), rank


# Prefixes of the parts of a kind → function that reads them.
_KIND_READERS: dict[tuple[str, ...], Callable[[ModuleTensors, float | None, int], StoredModule]] = {
    ("hada_",): _loha,
    ("lokr_",): _lokr,
    ("up", "down", "mid", "bias"): _lora,
}


def _from_product(
    kind: str, product: FactorPair, scaling: float, kernel: tuple[int, ...]
) -> StoredModule:
    """A module whose product of several factors was rewritten to a pair."""
    return StoredModule(Delta(product.B, product.A, scaling), kind, kernel, product.error)


@full_precision
def _tucker_side(core: Tensor, b: Tensor) -> Tensor:
    """Σ_j T[i,j,…]·b[j,n] as a matrix (i, n·…): the input side of a product in Tucker form."""
    if core.ndim < 3 or core.shape[1] != b.shape[0]:
        raise FormatError(
            f"core {tuple(core.shape)} should be (rank, rank, kernel) with factors {tuple(b.shape)}"
        )
    _require_modest(math.prod(core.shape) // core.shape[1] * b.shape[1], core, b)
    dtype = torch.promote_types(torch.float32, torch.promote_types(core.dtype, b.dtype))
    return torch.einsum("ij...,jn->in...", core.to(dtype), b.to(dtype)).flatten(1)


def _operand_shape(operand: Tensor | tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Shape of an operand of a Kronecker product."""
    left, right = (operand, operand) if isinstance(operand, Tensor) else operand
    return left.shape[0], right.shape[1]


def _require_modest(numbers: int, *stored: Tensor) -> None:
    """Refuse products whose factors would be far larger than the stored tensors."""
    limit = min(_LARGEST_EXPANSION, _MOST_GROWTH * sum(tensor.numel() for tensor in stored))
    if numbers > max(limit, _ANY_MODULE):
        raise UnsupportedError(
            f"the factors of this module would hold {numbers} numbers, more than {limit}; lower "
            "--max-rank (max_rank=)"
        )


def _scale(parts: ModuleTensors, rank: int, scaling: float | None) -> float:
    """The effective scaling: ``.scale``, else alpha/r, else that of the metadata, else 1."""
    if "scale" in parts:
        return _number(parts["scale"], "scale")
    if "alpha" in parts:
        return _number(parts["alpha"], "alpha") / rank
    return 1.0 if scaling is None else scaling


def _number(tensor: Tensor, part: str) -> float:
    """The value of a scalar stored as a tensor."""
    if tensor.numel() != 1 or tensor.is_complex():
        raise FormatError(
            f"{part} should be a single number, has shape {tuple(tensor.shape)} and type "
            f"{tensor.dtype}"
        )
    value = float(tensor)
    if not math.isfinite(value) or abs(value) > _LARGEST_ALPHA:
        raise FormatError(f"{part} is {value}, expected a finite number up to {_LARGEST_ALPHA:.0e}")
    return value


def _common_rank(ranks: Mapping[str, int]) -> int:
    """The common rank of factors."""
    if len(set(ranks.values())) > 1:
        each = ", ".join(f"{part} has rank {rank}" for part, rank in ranks.items())
        raise FormatError(f"ranks disagree: {each}")
    rank = next(iter(ranks.values()))
    if not 1 <= rank <= _LARGEST_RANK:
        raise FormatError(f"rank {rank} is not between 1 and {_LARGEST_RANK}")
    return rank


def _required(parts: ModuleTensors, *names: str) -> tuple[Tensor, ...]:
    """The tensors of required parts."""
    missing = [name for name in names if name not in parts]
    if missing:
        raise FormatError(
            f"there is no {' and no '.join(missing)} beside {', '.join(sorted(parts))}"
        )
    return tuple(parts[name] for name in names)


def _require_matrices(parts: ModuleTensors, *names: str) -> None:
    """Check that parts are matrices."""
    for name in names:
        if parts[name].ndim != 2:
            raise FormatError(f"{name} {tuple(parts[name].shape)} should be a matrix")
