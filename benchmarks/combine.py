"""A weighted sum of adapters at a lower rank: devec, PEFT, and direct methods on factors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.merges import (
    MODULE,
    ByPeft,
    Factors,
    by_core_space,
    by_devec,
    by_qr,
    optimal_error,
    relative_error,
)
from benchmarks.pools import in_memory
from benchmarks.results import Bar, Row, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import ratio, times_in_turn
from devec import Adapter

TEXT = """\
Σ w_i·ΔW_i of adapters in memory, float32, one module, truncated to a lower rank. The error is
relative to the dense sum in float64, ‖Σ w_i·ΔW_i - ΔW‖/‖Σ w_i·ΔW_i‖; the optimal error is that of
Eckart and Young. "devec" is `devec.compress(devec.combine(adapters, weights), rank=…)`. "PEFT svd"
is `add_weighted_adapter(combination_type="svd")` with its defaults, a full SVD of the dense sum;
"thin" is the same with `svd_full_matrices=False`. These two are not run in turn with the others.
Core Space (Panariello et al. 2025, in float64) and a QR with an SVD of the core (in float32) are
straightforward implementations with `torch.linalg`."""
WEIGHTS = (1.0, 0.7, -0.4)
DEVEC, QR, CORE = "devec", "QR + SVD of the core", "Core Space, float64"
PEFT, THIN = "PEFT svd", "PEFT svd, thin"
FASTER, PARITY, EQUAL = 1000.0, 1.0, 1 + 1e-6  # EQUAL allows for rounding of float32
CHEAP = 10.0  # seconds
UNITS = {"method": "", "time": "seconds", "time / devec": "times", "error": "error"}


def factor_rows(
    calls: Mapping[str, Callable[[], Factors]],
    errors: Callable[[Factors], float],
    repeats: int,
) -> list[Row]:
    """Times, measured in turn, and errors of calls, one of which is devec's."""
    times = times_in_turn(calls, repeats)
    return [
        {
            "method": name,
            "time": statistics.median(times[name]),
            "time / devec": ratio(times[name], times[DEVEC]),
            "error": errors(call()),
        }
        for name, call in calls.items()
    ]


def dense_row(
    method: str,
    call: Callable[[], Factors],
    errors: Callable[[Factors], float],
    fast: float,
    settings: Settings,
) -> Row:
    """Time and error of a dense method, run once, or three times if it is cheap."""
    times: list[float] = []
    while len(times) < (settings.times(3) if times and times[0] < CHEAP else 1):
        start = time.perf_counter()
        factors = call()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "method": method,
        "time": median,
        "time / devec": median / fast,
        "error": errors(factors),
    }


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Far faster than PEFT's method with no larger error, and as fast as the QR."""
    by_method = {row["method"]: row for row in rows}
    limits = [
        Bar("PEFT svd / devec", by_method[PEFT]["time / devec"], FASTER, "times", at_least=True),
        Bar(
            "error of devec / error of PEFT svd",
            by_method[DEVEC]["error"] / by_method[PEFT]["error"],
            EQUAL,
            "times, exactly",
        ),
    ]
    if QR in by_method:
        limits.append(
            Bar("devec / QR + SVD of the core", 1 / by_method[QR]["time / devec"], PARITY, "times")
        )
    return limits


def table(shape: tuple[int, int], rank: int, settings: Settings) -> Table:
    """All methods on one module."""
    adapters = in_memory(len(WEIGHTS), {MODULE: shape})
    peft = ByPeft(adapters)

    def errors(factors: Factors) -> float:
        return relative_error(adapters, WEIGHTS, factors)

    ways = {DEVEC: by_devec, QR: by_qr, CORE: by_core_space}
    calls = {name: partial(way, adapters, WEIGHTS, rank) for name, way in ways.items()}
    rows = factor_rows(calls, errors, settings.times(201))
    fast = rows[0]["time"]
    for method, full in ((PEFT, True), (THIN, False)):
        call = partial(peft, peft.names, WEIGHTS, rank, full=full)
        rows.append(dense_row(method, call, errors, fast, settings))
    return Table(
        f"{shape[0]} × {shape[1]}, k = {len(adapters)}, rank 16 each, to rank {rank}",
        UNITS,
        [*rows, _optimal(adapters, WEIGHTS, rank)],
        bars(rows),
    )


def _optimal(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Row:
    """The row of the optimal error."""
    return {"method": "optimal", "error": optimal_error(adapters, weights, rank)}


def section(settings: Settings) -> Section:
    """Two shapes of modules."""
    torch.set_num_threads(settings.threads)
    shapes = ((64, 64), (48, 192)) if settings.quick else ((4096, 4096), (3072, 12288))
    return Section(
        "Combine at a lower rank", TEXT, [table(shape, 16, settings) for shape in shapes]
    )
