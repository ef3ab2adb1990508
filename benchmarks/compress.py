"""One adapter at a lower rank: devec, PEFT, and a direct method on factors."""

from __future__ import annotations

import torch

from benchmarks.combine import DEVEC, PEFT, QR, UNITS, dense_row, factor_rows
from benchmarks.merges import (
    MODULE,
    ByPeft,
    Factors,
    by_qr,
    compressed_by_devec,
    optimal_error,
    relative_error,
)
from benchmarks.pools import in_memory
from benchmarks.results import Section, Table
from benchmarks.settings import Settings

TEXT = """\
One adapter in memory, float32, one module, measured as in the section before. PEFT has no call for
this: `add_weighted_adapter` copies a single adapter at its own rank and ignores `svd_rank`, so it
is given the adapter twice with weight ½."""


def section(settings: Settings) -> Section:
    """A module of rank 32 at rank 8."""
    torch.set_num_threads(settings.threads)
    n, full, rank = (64, 8, 2) if settings.quick else (4096, 32, 8)
    (adapter,) = in_memory(1, {MODULE: (n, n)}, rank=full)
    peft = ByPeft([adapter])

    def errors(factors: Factors) -> float:
        return relative_error([adapter], [1.0], factors)

    calls = {
        DEVEC: lambda: compressed_by_devec(adapter, rank),
        QR: lambda: by_qr([adapter], [1.0], rank),
    }
    rows = factor_rows(calls, errors, settings.times(201))
    twice = 2 * peft.names
    rows.append(
        dense_row(PEFT, lambda: peft(twice, [0.5, 0.5], rank), errors, rows[0]["time"], settings)
    )
    optimal = {"method": "optimal", "error": optimal_error([adapter], [1.0], rank)}
    title = f"{n} × {n}, rank {full} to {rank}"
    return Section("Compress", TEXT, [Table(title, UNITS, [*rows, optimal])])
