"""Putting the pieces of a module together, in factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.delta import Delta


@dataclass(frozen=True)
class Target:
    """A module as it is to be written.

    Attributes:
        pieces: The modules of the adapter that make up its rows, in their order, with the number
            of rows of each. A piece that no adapter has is zero.
        shape: Shape (out, in) of the weight.
        unnamed: Why it cannot be written: the convention has no name for it. Empty if it has.
    """

    pieces: tuple[tuple[str, int], ...]
    shape: tuple[int, int]
    unnamed: str = ""

    def joined(self, modules: Mapping[str, Delta]) -> Delta | None:
        """The delta of the whole, None if the adapter changes no piece of it."""
        found = [modules.get(name) for name, _ in self.pieces]
        held = [delta for delta in found if delta is not None]
        if not held:
            return None
        if len(self.pieces) == 1:
            return held[0]
        if len({delta.scaling for delta in held}) > 1:
            found = [delta and delta.folded() for delta in found]
            held = [delta for delta in found if delta is not None]
        filled = [
            delta or Delta(held[0].B.new_zeros(rows, 0), held[0].A[:0], held[0].scaling)
            for delta, (_, rows) in zip(found, self.pieces, strict=True)
        ]
        return _beside(filled) if _share_input_side(held) else _stacked(filled)


def _share_input_side(held: Sequence[Delta]) -> bool:
    """Whether all deltas have the same A and scaling."""
    return all(
        delta.scaling == held[0].scaling
        and (delta.A is held[0].A or torch.equal(delta.A, held[0].A))
        for delta in held
    )


def _beside(deltas: Sequence[Delta]) -> Delta:
    """Deltas one under the other that share A; those of rank 0 are zero."""
    first = next((delta for delta in deltas if delta.rank), deltas[0])
    rows = [d.B if d.rank else first.B.new_zeros(len(d.B), first.rank) for d in deltas]
    return Delta(torch.cat(rows), first.A, first.scaling, _one_bias(deltas))


def _stacked(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one scaling one under the other: As stacked, Bs on the diagonal."""
    dtype = max((delta.dtype for delta in deltas), key=lambda dtype: dtype.itemsize)
    blocks = [delta.B.to(dtype) for delta in deltas]
    B: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    A = torch.cat([delta.A.to(dtype) for delta in deltas])
    return Delta(B, A, deltas[0].scaling, _one_bias(deltas))


def _one_bias(deltas: Sequence[Delta]) -> Tensor | None:
    """Changes of the bias one under the other, None if there are none."""
    if all(delta.bias is None for delta in deltas):
        return None
    rows = [d.B.new_zeros(len(d.B)) if d.bias is None else d.bias for d in deltas]
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.cat([row.to(dtype) for row in rows])
