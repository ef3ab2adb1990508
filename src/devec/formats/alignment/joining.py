"""Putting the pieces of a module together, in factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.formats.alignment.dora import common_gain, one_axis, stacked_magnitude, with_magnitudes


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

    def joined(self, modules: Mapping[str, Delta], base: BaseWeight) -> Delta:
        """The delta of the whole.

        Args:
            modules: The modules of the adapter, one of the pieces at least.
            base: The base weight of the whole, read for pieces that are plain LoRAs where others
                are DoRAs.

        Returns:
            The delta, exact.

        Raises:
            UnsupportedError: If pieces are DoRAs of which no single DoRA is the whole.
        """
        held = {name: modules[name] for name, _ in self.pieces if name in modules}
        first = next(iter(held.values()))
        if len(self.pieces) == 1:
            return first
        B, A, scaling = first.B, first.A[:0], first.scaling
        pieces = [
            held.get(name) or Delta(B.new_zeros(rows, 0), A, scaling) for name, rows in self.pieces
        ]
        axis = one_axis(pieces)
        if axis == "out":
            pieces = with_magnitudes(pieces, base)
            return dataclasses.replace(_product(pieces), gain=stacked_magnitude(pieces))
        if axis == "in":
            pieces = [piece.resolved() for piece in pieces]
            product = _product(pieces)
            return dataclasses.replace(product, gain=common_gain(pieces, product))
        return _product(pieces)


def _product(pieces: Sequence[Delta]) -> Delta:
    """Deltas one under the other, without their gains; those of rank 0 are zero."""
    if len({piece.scaling for piece in pieces}) > 1:
        pieces = [piece.folded() for piece in pieces]
    held = [piece for piece in pieces if piece.rank] or pieces
    return _beside(pieces, held[0]) if _share_input_side(held) else _stacked(pieces)


def _share_input_side(held: Sequence[Delta]) -> bool:
    """Whether all deltas have the same A."""
    A = held[0].A
    return all(piece.A is A or torch.equal(piece.A, A) for piece in held)


def _beside(pieces: Sequence[Delta], first: Delta) -> Delta:
    """Deltas one under the other that share A; those of rank 0 are zero."""
    rows = [p.B if p.rank else first.B.new_zeros(len(p.B), first.rank) for p in pieces]
    return Delta(torch.cat(rows), first.A, first.scaling, _one_bias(pieces))


def _stacked(pieces: Sequence[Delta]) -> Delta:
    """Deltas of one scaling one under the other: As stacked, Bs on the diagonal."""
    dtype = max((piece.dtype for piece in pieces), key=lambda dtype: dtype.itemsize)
    blocks = [piece.B.to(dtype) for piece in pieces]
    B: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    A = torch.cat([piece.A.to(dtype) for piece in pieces])
    return Delta(B, A, pieces[0].scaling, _one_bias(pieces))


def _one_bias(pieces: Sequence[Delta]) -> Tensor | None:
    """Changes of the bias one under the other, None if there are none."""
    if all(piece.bias is None for piece in pieces):
        return None
    rows = [p.B.new_zeros(len(p.B)) if p.bias is None else p.bias for p in pieces]
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.cat([row.to(dtype) for row in rows])
