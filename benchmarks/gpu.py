"""Time of `devec.decompose` on a GPU, compared with transferring the same factors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.pools import BLOCK, NOISE, Shapes, llama_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import clocked, in_turn, ratio
from devec import Adapter, Delta, decompose

TITLE = "LLaMA-2-7B, r = 256, k = 8"
TEXT = """\
`devec.decompose(adapters, device=…)` of bfloat16 adapters in pinned host memory; the parts are
returned in newly allocated host memory. It is compared with the transfers alone, through pinned
memory, which is the fastest way: the same factors to the GPU once, and as many float32 values back
into one buffer as the factors B of all unique and shared parts have. Both are measured in turn. The
first call, which loads libraries and pins memory, is listed separately."""
LIMIT = 5.0


def pinned_pool(k: int, shapes: Shapes, rank: int, *, pinned: bool) -> list[Adapter]:
    """Adapters that share a quarter of their directions, in pinned memory if there is a GPU."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()

    def drawn(start: int, rows: int, columns: int) -> Tensor:
        memory = torch.empty(rows, columns, dtype=torch.bfloat16, pin_memory=pinned)
        start %= BLOCK - rows * columns
        return memory.copy_(block[start : start + rows * columns].view(rows, columns))

    adapters = []
    for i in range(k):
        deltas = {}
        for index, (module, (rows, columns)) in enumerate(shapes.items()):
            B = drawn(7919 * (k * index + i + 1), rows, rank)
            common = drawn(104_729 * (index + 1), rows, rank // 4)
            B[:, : rank // 4] = common + NOISE * B[:, : rank // 4]
            A = drawn(15_485_863 * (k * index + i + 1), rank, columns)
            deltas[module] = Delta(B, A, scaling=0.5)
        adapters.append(Adapter(f"adapter{i}", deltas))
    return adapters


def transfers(adapters: list[Adapter], device: torch.device) -> Callable[[], None]:
    """The function that copies all factors to a device, and as much as their parts back."""
    factors = [f for a in adapters for d in a.modules.values() for f in (d.B, d.A)]
    sizes = [d.B.numel() for a in adapters for d in a.modules.values()]
    on_device = torch.ones(max(sizes), device=device)
    on_host = torch.empty(max(sizes), pin_memory=device.type == "cuda")

    def transfer() -> None:
        for factor in factors:
            factor.to(device, non_blocking=True)
        for size in sizes:
            for _ in ("unique", "shared"):
                on_host[:size].copy_(on_device[:size], non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return transfer


def nbytes(adapters: list[Adapter]) -> int:
    """The number of bytes that `transfers` copies."""
    deltas = [delta for adapter in adapters for delta in adapter.modules.values()]
    return sum(d.B.nbytes + d.A.nbytes + 2 * 4 * d.B.numel() for d in deltas)


def section(settings: Settings) -> Section:
    """Measure eight adapters of all linear layers of LLaMA-2-7B, rank 256."""
    title = "Decompose on a GPU"
    if not (torch.cuda.is_available() or settings.quick):
        reason = "Left out: the machine has no GPU that torch can use."
        return Section(title, TEXT, [Table(TITLE, {}, [], notes=[reason])])
    shapes, rank = (llama_shapes(1, 64, 96), 8) if settings.quick else (llama_shapes(), 256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapters = pinned_pool(8, shapes, rank, pinned=device.type == "cuda")
    calls = {
        "devec": clocked(lambda: decompose(adapters, device=device)),
        "transfers": clocked(transfers(adapters, device)),
    }
    first = {name: one for name, (one,) in in_turn(calls, 1).items()}
    runs = in_turn(calls, settings.times(5))
    times = {name: statistics.median(all_of_one) for name, all_of_one in runs.items()}
    row = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "devec": times["devec"],
        "transfers": times["transfers"],
        "transfers / devec": ratio(runs["transfers"], runs["devec"]),
        "first call of devec": first["devec"],
        "moved": nbytes(adapters),
    }
    units = {"device": "", "moved": "bytes", "devec": "seconds", "first call of devec": "seconds"}
    units |= {"transfers": "seconds", "transfers / devec": "percent"}
    if settings.quick:
        return Section(title, TEXT, [Table("Tiny", units, [row])])
    bars = [Bar(f"{TITLE}, from pinned memory", times["devec"], LIMIT, "seconds")]
    return Section(title, TEXT, [Table(TITLE, units, [row], bars)])
