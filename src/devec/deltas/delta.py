"""What an adapter does to one module: an element of an exact vector space, kept in factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from devec.arguments import inverse, number
from devec.deltas.base_weight import BaseWeight
from devec.deltas.biases import bias_inner, sum_of_biases
from devec.deltas.gain_sums import gain_inner, sum_of_gains
from devec.deltas.gains import (
    AXES,
    Gain,
    Magnitude,
    gain_from_magnitude,
    is_same_gain,
    is_same_tensor,
    oriented,
)
from devec.deltas.matrix import DeltaMatrix
from devec.errors import IncompatibleError
from devec.linalg.dtypes import CANCELLATION, working_dtype
from devec.linalg.factors import ColumnSpace, column_space, norm, product_inner, product_norm
from devec.linalg.precision import full_precision


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Delta:
    """The change ΔW that an adapter makes to the weight of one module, and Δb to its bias.

        ΔW = scaling · B · A  +  diag(g) · W0  +  W0 · diag(h),    Δb = scaling · bias

    W maps inputs to outputs and has shape (out, in): a convolution is flattened to
    (out, in·kh·kw), and a weight that is stored transposed is transposed back. A LoRA has
    g = h = 0, a DoRA with magnitudes of the outputs has g, one with magnitudes of the inputs h.
    Deltas of one module form a vector space under ``+`` and ``*``: sums concatenate factors and add
    gains, exactly, and ΔW itself is never formed.

    Args:
        B: Output-side factor, shape (out, rank), any floating dtype.
        A: Input-side factor, shape (rank, in), any floating dtype.
        scaling: Effective scaling: alpha/rank, or alpha/√rank for rank-stabilised LoRA. Finite.
        bias: Change of the bias before scaling, shape (out,), or None.
        gain: What a DoRA does to the base weight: the stored magnitudes, which belong to these B, A
            and scaling, or the gains g and h. None for a LoRA.

    Raises:
        IncompatibleError: If the shapes do not fit together or `scaling` is not a finite number.

    Reference: Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353.

    Example:
        >>> import torch, devec
        >>> one = devec.Delta(torch.ones(3, 1), torch.ones(1, 2), scaling=2.0)
        >>> one - 0.5 * one
        Delta(3×2, rank 2)
        >>> (one - one).norm() < 1e-12
        True
        >>> one.to("cpu").same_as(one), one.each(torch.Tensor.double).dtype
        (True, torch.float64)
    """

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    scaling: float = 1.0
    bias: Float[Tensor, " out"] | None = None
    gain: Gain | Magnitude | None = None

    def __post_init__(self) -> None:
        if type(self.scaling) is not float or not math.isfinite(self.scaling):
            object.__setattr__(self, "scaling", float(number(self.scaling, "scaling")))
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
        gained = ", with gains" if self.gain is not None else ""
        return f"Delta({self.shape[0]}×{self.shape[1]}, rank {self.rank}{gained}{biased})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B, an upper bound of the rank of B·A."""
        return self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The working precision: float64 if a factor has it, else float32."""
        return working_dtype(self.B, self.A)

    def to(self, device: torch.device | str) -> Delta:
        """The same delta on another device."""
        return self.each(lambda tensor: tensor.to(device))

    @property
    def outline(self) -> Delta:
        """The shapes and dtypes of the delta without its values: a delta of meta tensors."""
        return self if self.B.is_meta else self.to("meta")

    def each(self, change: Callable[[Tensor], Tensor]) -> Delta:
        """The delta with `change` applied to each of its tensors, always in the same order."""
        bias = None if self.bias is None else change(self.bias)
        gain = None if self.gain is None else self.gain.each(change)
        return dataclasses.replace(self, B=change(self.B), A=change(self.A), bias=bias, gain=gain)

    def same_as(self, other: Delta) -> bool:
        """Whether all tensors and the scaling equal those of another delta, as stored."""
        return (
            self.scaling == other.scaling
            and is_same_tensor(self.B, other.B)
            and is_same_tensor(self.A, other.A)
            and is_same_tensor(self.bias, other.bias)
            and is_same_gain(self.gain, other.gain)
        )

    def on(self, base: BaseWeight) -> Delta:
        """The same delta with its base weight read from `base`; a LoRA is returned unchanged."""
        if self.gain is None:
            return self
        return dataclasses.replace(self, gain=dataclasses.replace(self.gain, base=base))

    def folded(self) -> Delta:
        """The same delta with the scaling multiplied into B and the bias.

        Returns:
            The delta with scaling 1, exact to rounding.

        Example:
            >>> Delta(torch.ones(3, 1), torch.ones(1, 2), scaling=2.0).folded().B[0, 0].item()
            2.0
        """
        dtype, s = self.dtype, self.scaling
        if s == 1 and self.B.dtype == dtype and (self.bias is None or self.bias.dtype == dtype):
            return self
        if self.B.is_meta:  # an outline has no values to multiply
            return dataclasses.replace(self, B=self.B.to(dtype), scaling=1.0)
        bias = None if self.bias is None else s * self.bias.to(dtype)
        gain = self.gain.scaled(1.0, s) if isinstance(self.gain, Gain) else self.gain
        return Delta(B=s * self.B.to(dtype), A=self.A, bias=bias, gain=gain)

    @full_precision
    def resolved(self) -> Delta:
        """The same delta with gains in place of magnitudes.

        On the output axis W' = D·(W0 + s·B·A) with D = diag(m/‖W0 + s·B·A‖_row), so g = D - 1 and
        the low-rank part is D·s·B·A. The input axis is the transpose of this.

        Returns:
            The delta, exact to rounding; a LoRA is returned unchanged.

        Raises:
            DevecError: If the base weight cannot be read, or is not the one of training.

        Cost: O(out·in·rank) and one pass over the base weight for a DoRA.

        Reference: Liu et al. 2024, arXiv 2402.09353, Eq. 5.

        Example:
            >>> from devec.deltas.base_weight import HeldWeight
            >>> gain = Magnitude(torch.full((4,), 2.0), "out", HeldWeight(torch.eye(4)))
            >>> delta = Delta(torch.zeros(4, 1), torch.zeros(1, 4), gain=gain).resolved()
            >>> delta.gain.axes["out"].values.tolist(), delta.change().norm()
            ([1.0, 1.0, 1.0, 1.0], 2.0)
            >>> delta.on(HeldWeight(3 * torch.eye(4))).change().norm()
            6.0
        """
        if not isinstance(self.gain, Magnitude):
            return self
        m, delta = self.gain, self.folded()
        factors = delta.B.to(self.dtype), delta.A.to(self.dtype)
        D, gain = gain_from_magnitude(m.values, *oriented(*factors, m.base, m.axis))
        D = D.to(self.dtype)
        B, A = (D[:, None] * delta.B, delta.A) if m.axis == "out" else (delta.B, delta.A * D)
        return Delta(B, A, bias=delta.bias, gain=Gain(m.base, {m.axis: gain}))

    @property
    def low_rank(self) -> Delta:
        """The low-rank part ``scaling · B · A`` of the resolved delta; a LoRA is all low-rank."""
        return dataclasses.replace(self.resolved(), gain=None)

    @full_precision
    def __mul__(self, weight: float) -> Delta:
        delta, weight = self.resolved(), float(number(weight, "weight"))
        bias = None if delta.bias is None else weight * delta.bias.to(delta.dtype)
        gain = delta.gain.scaled(weight, weight) if isinstance(delta.gain, Gain) else None
        return dataclasses.replace(delta, B=weight * delta.B.to(delta.dtype), bias=bias, gain=gain)

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Delta:
        return self * inverse(weight, "weight")

    def __neg__(self) -> Delta:
        return self * -1.0

    @full_precision
    def __add__(self, other: Delta) -> Delta:
        self._require_same_shape(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        left, right = self.resolved().folded(), other.resolved().folded()
        return Delta(
            B=torch.cat([left.B.to(dtype), right.B.to(dtype)], dim=1),
            A=torch.cat([left.A.to(dtype), right.A.to(dtype)], dim=0),
            bias=sum_of_biases(left.bias, right.bias),
            gain=sum_of_gains(left, right),
        )

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    @full_precision
    def inner(self, other: Delta) -> float:
        """Inner product ⟨ΔW1, ΔW2⟩_F + ⟨Δb1, Δb2⟩.

        Args:
            other: A delta of the same module.

        Returns:
            The inner product, exact to rounding.

        Raises:
            IncompatibleError: If the weights have different shapes or base models.

        Cost: O((out + in)·r1·r2); O(out·in·r) if the gains of a DoRA meet factors of another delta.

        Example:
            >>> one = Delta(torch.ones(3, 1), torch.ones(1, 2), scaling=2.0)
            >>> one.inner(0.5 * one)
            12.0
        """
        self._require_same_shape(other)
        left, right = self.resolved(), other.resolved()
        low = product_inner(left.B, left.A, right.B, right.A)
        bias = bias_inner(left.bias, right.bias)
        total = left.scaling * (right.scaling * low + right.scaling * bias)
        return total + gain_inner(left, right)

    @full_precision
    def norm(self) -> float:
        """Norm √(‖ΔW‖_F² + ‖Δb‖²), accurate even if terms cancel.

        Returns:
            The norm, exact to rounding.

        Cost: O((out + in)·rank²); a DoRA reads its base weight if terms cancel.

        Example:
            >>> delta = Delta(torch.ones(3, 1), torch.ones(1, 2), 2.0, torch.ones(3))
            >>> round(delta.norm(), 4), round(delta.weight_norm(), 4), round(delta.bias_norm(), 4)
            (6.0, 4.899, 3.4641)
            >>> round((delta - delta).factor_norm(), 4)
            9.798
        """
        delta = self.resolved()
        return math.hypot(delta.weight_norm(), delta.bias_norm())

    @full_precision
    def weight_norm(self, low_rank: float | None = None) -> float:
        """‖ΔW‖_F of a resolved delta; `low_rank` is ‖s·B·A‖_F, if it is known."""
        if low_rank is None:
            low_rank = abs(self.scaling) * product_norm(self.B, self.A)
        if not isinstance(self.gain, Gain):
            return low_rank
        gained = (float(g.values.square() @ g.squares) for g in self.gain.axes.values())
        squared = low_rank**2 + gain_inner(self, self)
        if squared > CANCELLATION * (low_rank**2 + sum(gained)):
            return math.sqrt(squared)
        matrix = self.folded().change()  # the terms cancel: sum the entries in blocks of rows
        return 0.0 if matrix is None else matrix.norm()

    def change(self) -> DeltaMatrix | None:
        """ΔW of a resolved, folded DoRA as an operator that contains W0; None for a LoRA."""
        if not isinstance(self.gain, Gain):
            return None
        W = self.gain.base.read(self.dtype, self.B.device)
        axes = self.gain.axes
        g, h = (axes[axis].values.to(W) if axis in axes else None for axis in AXES)
        return DeltaMatrix(self.B.to(W), self.A.to(W), W, g, h)

    def bias_norm(self) -> float:
        """Euclidean norm ‖Δb‖, exact to rounding."""
        return 0.0 if self.bias is None else abs(self.scaling) * norm(self.bias)

    @full_precision
    def factor_norm(self) -> float:
        """|s|·‖B‖_F·‖A‖_F + ‖diag(g)·W0‖_F + ‖W0·diag(h)‖_F: rounding in sums is relative to it."""
        delta = self.resolved()
        low_rank = abs(delta.scaling) * norm(delta.B) * norm(delta.A)
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        return low_rank + sum(math.sqrt(g.values.square() @ g.squares) for g in axes.values())

    @full_precision
    def column_space(self) -> ColumnSpace:
        """Column space of the low-rank part B·A of a resolved delta.

        Returns:
            An orthonormal basis U of shape (out, ρ) and the singular values S of B·A without
            scaling, shape (ρ,), exact to rounding, as `devec.linalg.factors.column_space` gives
            them; ρ = 0 if the scaling is 0.

        Raises:
            IncompatibleError: If a factor holds NaN or infinity.

        Cost: O((out + in)·rank²).

        Example:
            >>> Delta(torch.ones(3, 2), torch.ones(2, 4)).column_space().U.shape
            torch.Size([3, 1])
        """
        return column_space(self.B if self.scaling else 0 * self.B, self.A)

    @full_precision
    def projected(self, Z: Float[Tensor, "out k"]) -> Delta:
        """The part ``Z·Zᵀ·ΔW``, ``Z·Zᵀ·Δb`` of this delta in the span of Z.

        For a LoRA only B and the bias change; rank, scaling and A stay. For a DoRA the part is a
        LoRA of rank k with the factors Z and Zᵀ·ΔW.

        Args:
            Z: Orthonormal columns, shape (out, k), any floating dtype.

        Returns:
            The projection, exact to rounding, with B in the working precision.

        Cost: O(out·k·rank); O(out·in·k) for a DoRA.

        Reference: arXiv 2512.22511, Eq. 12.

        Example:
            >>> delta, Z = Delta(torch.ones(3, 1), torch.ones(1, 2)), torch.eye(3, 1)
            >>> delta.projected(Z).B.tolist(), delta.coordinates(Z)
            ([[1.0], [0.0], [0.0]], tensor([[1., 1.]]))
        """
        delta = self.resolved()
        Z = Z.to(delta.dtype)
        bias = None if delta.bias is None else Z @ (Z.mT @ delta.bias.to(delta.dtype))
        if not isinstance(delta.gain, Gain):
            B = Z @ (Z.mT @ delta.B.to(delta.dtype))
            return dataclasses.replace(delta, B=B, bias=bias)
        bias = None if bias is None else delta.scaling * bias
        return Delta(Z, delta.coordinates(Z), bias=bias)

    @full_precision
    def coordinates(self, Z: Float[Tensor, "out k"]) -> Float[Tensor, "k in"]:
        """``Zᵀ·ΔW``, by one thin product with each term; O(out·in·k) for a DoRA."""
        delta = self.resolved()
        Z = Z.to(delta.dtype)
        C = (delta.scaling * (Z.mT @ delta.B.to(delta.dtype))) @ delta.A.to(delta.dtype)
        if isinstance(delta.gain, Gain):
            W = delta.gain.base.read(delta.dtype, Z.device)
            if "out" in delta.gain.axes:
                C.addmm_((delta.gain.axes["out"].values.to(Z)[:, None] * Z).mT, W)
            if "in" in delta.gain.axes:
                C += (Z.mT @ W) * delta.gain.axes["in"].values.to(Z)
        return C

    def without(self, part: Delta) -> Delta:
        """The remainder ``ΔW - part``, for a projection `part` of this delta.

        Args:
            part: A result of `projected`.

        Returns:
            The remainder, exact to rounding. A LoRA keeps rank, A and scaling, which equal those of
            `part`; the ranks of a DoRA and `part` add.

        Example:
            >>> delta = Delta(torch.ones(3, 1), torch.ones(1, 2))
            >>> delta.without(delta.projected(torch.eye(3, 1))).B.tolist()
            [[0.0], [1.0], [1.0]]
        """
        if self.gain is not None:
            return self - part
        bias = sum_of_biases(self.bias, None if part.bias is None else -part.bias)
        return dataclasses.replace(self, B=self.B.to(part.dtype) - part.B, bias=bias)

    def _require_same_shape(self, other: Delta) -> None:
        if self.shape != other.shape:
            raise IncompatibleError(
                f"deltas of one module need one shape, got {self.shape} and {other.shape}"
            )
