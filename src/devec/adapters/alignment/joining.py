"""Joining the slices of a module, in factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.adapters.alignment.dora import (
    common_gain,
    one_axis,
    stacked_magnitude,
    with_magnitudes,
)
from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta


@dataclass(frozen=True)
class Target:
    """A module of the output.

    Attributes:
        slices: Names of the slices that make up its rows, in order, with the number of rows of
            each. A slice that no adapter has is zero.
        shape: Shape (out, in) of the weight.
        unnamed: Why the convention has no name for the module; empty if it has one.
    """

    slices: tuple[tuple[str, int], ...]
    shape: tuple[int, int]
    unnamed: str = ""

    def joined(self, modules: Mapping[str, Delta], base: BaseWeight) -> Delta:
        """The delta of the whole module.

        Args:
            modules: Slice → delta, with at least one slice of the module.
            base: The base weight of the module, read only if some slices are DoRAs of outputs and
                others are plain LoRAs.

        Returns:
            The delta, exact.

        Raises:
            UnsupportedError: If the slices are DoRAs that no single DoRA represents.
        """
        present = {name: modules[name] for name, _ in self.slices if name in modules}
        first = next(iter(present.values()))
        if len(self.slices) == 1:
            return first
        B, A, scaling = first.B, first.A[:0], first.scaling
        deltas = [
            present.get(name) or Delta(B.new_zeros(rows, 0), A, scaling)
            for name, rows in self.slices
        ]
        axis = one_axis(deltas)
        if axis == "out":
            deltas = with_magnitudes(deltas, base)
            return dataclasses.replace(_stacked_product(deltas), gain=stacked_magnitude(deltas))
        if axis == "in":
            deltas = [delta.resolved() for delta in deltas]
            product = _stacked_product(deltas)
            return dataclasses.replace(product, gain=common_gain(deltas, product))
        return _stacked_product(deltas)


def _stacked_product(deltas: Sequence[Delta]) -> Delta:
    """Deltas stacked along the rows, without their gains; those of rank 0 are zero."""
    if len({delta.scaling for delta in deltas}) > 1:
        deltas = [delta.folded() for delta in deltas]
    present = [delta for delta in deltas if delta.rank] or deltas
    if _share_input_side(present):
        return _with_common_input_side(deltas, present[0])
    return _block_diagonal(deltas)


def _share_input_side(deltas: Sequence[Delta]) -> bool:
    """Whether all deltas have the same A."""
    A = deltas[0].A
    return all(delta.A is A or torch.equal(delta.A, A) for delta in deltas)


def _with_common_input_side(deltas: Sequence[Delta], first: Delta) -> Delta:
    """Deltas that share A, stacked along the rows; those of rank 0 are zero."""
    rows = [d.B if d.rank else first.B.new_zeros(len(d.B), first.rank) for d in deltas]
    return Delta(torch.cat(rows), first.A, first.scaling, _stacked_bias(deltas))


def _block_diagonal(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one scaling stacked along the rows: block-diagonal B, stacked A."""
    dtype = max((delta.dtype for delta in deltas), key=lambda dtype: dtype.itemsize)
    blocks = [delta.B.to(dtype) for delta in deltas]
    B: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    A = torch.cat([delta.A.to(dtype) for delta in deltas])
    return Delta(B, A, deltas[0].scaling, _stacked_bias(deltas))


def _stacked_bias(deltas: Sequence[Delta]) -> Tensor | None:
    """Changes of the bias, stacked; None if there are none."""
    if all(delta.bias is None for delta in deltas):
        return None
    rows = [d.B.new_zeros(len(d.B)) if d.bias is None else d.bias for d in deltas]
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.cat([row.to(dtype) for row in rows])
