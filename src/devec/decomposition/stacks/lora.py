"""Plain LoRAs of one shape and rank, computed in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from devec.decomposition.stacks.stack import Measured, Projected, Stack, UnsoundError
from devec.deltas.delta import Delta
from devec.linalg.batched import column_bases
from devec.linalg.buffers import empty, matmul
from devec.linalg.dtypes import RANK_RTOL, to_float64
from devec.linalg.exponents import extreme_exponent, times_powers
from devec.linalg.precision import full_precision


class LoraStack(Stack):
    """Modules of one shape, which in every adapter are LoRAs of one rank and precision."""

    def computed_basis(self, name: str) -> Float[Tensor, "batch out rank"]:
        """The bases by matrix products alone; unsound where factors are too ill-conditioned."""
        deltas = self.deltas(name)
        # ranks are those of the adapter, whatever the precision of the others
        rtol = RANK_RTOL[deltas[0].dtype]
        bases = column_bases(stacked(self, deltas, "B"), stacked(self, deltas, "A"), rtol)
        sound = bases.sound.tolist()
        if not all(sound):
            raise UnsoundError([m for m, fine in zip(self.modules, sound, strict=True) if not fine])
        norms = bases.norms * bases.norms.new_tensor([abs(delta.scaling) for delta in deltas])
        self._measured[name] = Measured(bases.U.shape[-1], norms.tolist(), bases.gram)
        return bases.U

    def norms(self, name: str) -> list[float]:
        """‖ΔW‖_F of an adapter's modules."""
        if name not in self._measured:
            return [delta.resolved().weight_norm() for delta in self.deltas(name)]
        return self._measured[name].norms

    def projected(
        self, name: str, Z: Float[Tensor, "batch out k"], counts: Sequence[int]
    ) -> Projected:
        """The parts of an adapter; only B and the change of the bias differ from the original."""
        return projected_loras(self, self.deltas(name), Z, counts, self._measured[name].gram)


@full_precision
def projected_loras(
    stack: Stack,
    deltas: Sequence[Delta],
    Z: Float[Tensor, "batch out k"],
    counts: Sequence[int],
    gram: Float[Tensor, "batch rank rank"],
) -> Projected:
    """The parts of LoRAs inside and outside of the span of Z: Z·(ZᵀB)·A and (B - Z·ZᵀB)·A.

    Args:
        stack: The stack, which says where to compute and where results return.
        deltas: The LoRAs, one of each module.
        Z: Orthonormal columns, zero beyond the count of each module.
        counts: How many columns each module has.
        gram: A·Aᵀ of each module.
    """
    B, Z = stacked(stack, deltas, "B"), Z.to(stack.dtype)
    values = [delta.scaling for delta in deltas]
    scalings = Z.new_tensor(values)[:, None, None]
    C = Z.mT @ B
    shared_B = matmul(Z, C)
    squares = (to_float64(C) @ gram * to_float64(C)).sum(dim=(-2, -1))
    factors = scalings.flatten().to(squares)
    if extreme := any(map(extreme_exponent, values)):
        factors = squares.new_tensor(values)
    norms = factors.abs() * squares.clamp(min=0).sqrt()
    shared: list[Delta | None] = []
    unique: list[Delta] = []
    rest_B, shared_B = _returned(stack, B.sub_(shared_B), shared_B)
    for index, (delta, part, rest) in enumerate(zip(deltas, shared_B, rest_B, strict=True)):
        if not counts[index]:
            shared.append(None)
            unique.append(stack.result(delta))
            continue
        bias = None if delta.bias is None else delta.bias.to(Z)
        along = None if bias is None else Z[index] @ (Z[index].mT @ bias)
        beside = None if bias is None or along is None else bias - along
        shared.append(stack.result(dataclasses.replace(delta, B=part, bias=along)))
        unique.append(stack.result(dataclasses.replace(delta, B=rest, bias=beside)))
    exponents = [extreme_exponent(norm) for norm in norms.tolist()]
    left = scalings * C
    if extreme or any(exponents):
        left = times_powers(factors[:, None, None] * C, [-e for e in exponents]).to(C)
    coordinates = left @ stacked(stack, deltas, "A")
    return Projected(shared, unique, coordinates, exponents, norms.tolist())


def stacked(stack: Stack, deltas: Sequence[Delta], factor: str) -> Float[Tensor, "batch _ _"]:
    """Copies of factors B or A as one tensor, in the working precision on the computing device."""
    factors = [getattr(delta, factor) for delta in deltas]
    # fewer bytes are moved to another device if the precision is raised there
    on_cpu, on_gpu = stack.device.type == "cpu", stack.device.type == "cuda"
    dtype = stack.dtype if on_cpu else factors[0].dtype
    result = empty((len(factors), *factors[0].shape), dtype, stack.device)
    for slot, one in zip(result, factors, strict=True):
        if on_gpu and not (one.is_cuda or one.is_pinned()):
            one = one.pin_memory()  # copies run beside other work from pinned memory only
        slot.copy_(one, non_blocking=on_gpu)
    return torch.as_tensor(result, dtype=stack.dtype)


def _returned(stack: Stack, *results: Tensor) -> Sequence[Tensor]:
    """Results on the device to which they return, from a GPU in pinned memory."""
    if stack.device.type != "cuda" or stack.home.type != "cpu":
        return [result.to(stack.home) for result in results]
    # copies to memory that is not pinned, the more so if it is new, take many times as long
    pinned = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
    for target, result in zip(pinned, results, strict=True):
        target.copy_(result, non_blocking=True)
    torch.cuda.current_stream(stack.device).synchronize()
    return pinned
