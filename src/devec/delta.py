"""What an adapter does to one module: an element of an exact vector space, kept in factors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from devec import linalg
from devec.errors import IncompatibleError
from devec.linalg import ProductSVD, working_dtype


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """The change an adapter makes to one module: ``ΔW = scaling · B · A`` and ``Δb = scaling · b``.

    W is the weight as a linear map from inputs to outputs, shape (out, in): a convolution is
    flattened to (out, in·kh·kw), a layer that stores its weight transposed is taken untransposed.
    Deltas of one module are a vector space under ``+`` and ``*``: sums concatenate factors, so all
    of it is exact, and ΔW itself is never formed.

    Attributes:
        B: Output-side factor, shape (out, rank), as stored or in the working precision.
        A: Input-side factor, shape (rank, in).
        scaling: The effective scaling (alpha/r, or alpha/√r for rank-stabilised LoRA).
        bias: Change of the bias before scaling, shape (out,), or None.

    Raises:
        IncompatibleError: If the shapes do not fit together.
    """

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    scaling: float = 1.0
    bias: Float[Tensor, " out"] | None = None

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise IncompatibleError(
                f"factors disagree: B {tuple(self.B.shape)} should be (out, rank) and "
                f"A {tuple(self.A.shape)} should be (rank, in) with one rank"
            )
        if self.bias is not None and self.bias.shape != self.B.shape[:1]:
            raise IncompatibleError(
                f"bias has shape {tuple(self.bias.shape)}, expected ({self.B.shape[0]},)"
            )

    def __repr__(self) -> str:
        biased = ", with bias" if self.bias is not None else ""
        return f"Delta({self.shape[0]}×{self.shape[1]}, rank {self.rank}{biased})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the rank of ΔW."""
        return self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The precision this delta is combined in."""
        return working_dtype(self.B, self.A)

    def to(self, device: torch.device | str) -> Delta:
        """The same delta on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, B=self.B.to(device), A=self.A.to(device), bias=bias)

    def folded(self) -> Delta:
        """The same delta with the scaling multiplied into B and the bias."""
        return dataclasses.replace(self * self.scaling, scaling=1.0)

    def __mul__(self, weight: float) -> Delta:
        bias = None if self.bias is None else weight * self.bias.to(self.dtype)
        return dataclasses.replace(self, B=weight * self.B.to(self.dtype), bias=bias)

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Delta:
        return self * (1 / weight)

    def __neg__(self) -> Delta:
        return self * -1.0

    def __add__(self, other: Delta) -> Delta:
        self._require_same_shape(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        left, right = self.folded(), other.folded()
        return Delta(
            B=torch.cat([left.B.to(dtype), right.B.to(dtype)], dim=1),
            A=torch.cat([left.A.to(dtype), right.A.to(dtype)], dim=0),
            bias=_sum(left.bias, right.bias),
        )

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    def inner(self, other: Delta) -> float:
        """⟨ΔW1, ΔW2⟩_F + ⟨Δb1, Δb2⟩.

        Args:
            other: A delta of the same module.

        Returns:
            The inner product, exact to rounding; O((out + in)·r1·r2).

        Raises:
            IncompatibleError: If the weights have different shapes.
        """
        self._require_same_shape(other)
        weights = linalg.product_inner(self.B, self.A, other.B, other.A)
        if self.bias is not None and other.bias is not None:
            dtype = linalg.basis_dtype(self.B.device)
            weights += float(self.bias.to(dtype) @ other.bias.to(dtype))
        return self.scaling * other.scaling * weights

    def norm(self) -> float:
        """Frobenius norm of (ΔW, Δb), accurate also where factors cancel; O((out + in)·r²)."""
        norm = linalg.product_norm(self.B, self.A)
        if self.bias is not None:
            norm = math.hypot(norm, float(self.bias.to(linalg.basis_dtype(self.B.device)).norm()))
        return abs(self.scaling) * norm

    def factor_norm(self) -> float:
        """|s|·‖B‖_F·‖A‖_F, to which rounding in products of the factors is relative."""
        return abs(self.scaling) * float(self.B.float().norm() * self.A.float().norm())

    def projected(self, Z: Float[Tensor, "out k"]) -> Delta:
        """The part of this delta in the span of Z: ``Z·Zᵀ·ΔW`` (Eq. 12), bias alike.

        Only B and the bias change, so rank, scaling and A stay what they are.

        Args:
            Z: Orthonormal columns, shape (out, k).

        Returns:
            The projection, B in the working precision; O(out·k·r).
        """
        Z = Z.to(self.dtype)
        bias = None if self.bias is None else Z @ (Z.mT @ self.bias.to(self.dtype))
        return dataclasses.replace(self, B=Z @ (Z.mT @ self.B.to(self.dtype)), bias=bias)

    def without(self, part: Delta) -> Delta:
        """``ΔW - part`` for a part with the same A and scaling: subtracts B, keeps the rank."""
        bias = _sum(self.bias, None if part.bias is None else -part.bias)
        return dataclasses.replace(self, B=self.B.to(part.dtype) - part.B, bias=bias)

    def svd(self) -> ProductSVD:
        """Singular value decomposition of ΔW, scaling included, in the basis precision."""
        U, S, Vh = linalg.product_svd(self.B, self.A)
        return ProductSVD(U if self.scaling >= 0 else -U, abs(self.scaling) * S, Vh)

    def _require_same_shape(self, other: Delta) -> None:
        if self.shape != other.shape:
            raise IncompatibleError(f"weights of shapes {self.shape} and {other.shape}")


def require_device(device: torch.device | str) -> None:
    """Check that tensors can be put on a device.

    Args:
        device: The device.

    Raises:
        IncompatibleError: If they cannot.
    """
    try:
        torch.zeros(1, device=device).item()
    # torch asserts that it was built for a device before it raises anything of its own
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise IncompatibleError(
            f"device {str(device)!r} cannot be used ({reason}); leave it out to compute on the CPU"
        ) from error


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of two bias changes, None standing for zero."""
    if left is None or right is None:
        return left if right is None else right
    return left + right
