"""How fast devec is, beside the dense method of the paper, in one run.

    python -m benchmarks.speed [--dense N] [--json FILE]

One module of 4096 × 4096, pools of more adapters, and the 494 modules that a Flux LoRA adapts. The
dense method forms ΔW, takes two full SVDs and the eigenvectors of a general n × n matrix; at
n = 4096 that takes about a minute, so a smaller N can be asked for.

The pool of many modules comes first. In a process that has freed nothing yet, the allocator gives
every temporary of half a megabyte back to the system at once and pays for it in page faults; no
process that has read an adapter is in that state.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from devec import Adapter, Delta, __version__, decompose

RANK = 16

Shapes = dict[str, tuple[int, int]]


def flux_shapes() -> Shapes:
    """Module → (out, in) of the 494 linear layers in the blocks of the Flux transformer."""
    d = 3072
    double = {
        **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attn.add_{name}_proj": (d, d) for name in "qkv"},
        "attn.to_add_out": (d, d),
        **{f"{ff}.net.0.proj": (4 * d, d) for ff in ("ff", "ff_context")},
        **{f"{ff}.net.2": (d, 4 * d) for ff in ("ff", "ff_context")},
        **{f"{norm}.linear": (6 * d, d) for norm in ("norm1", "norm1_context")},
    }
    single = {
        **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")},
        "norm.linear": (3 * d, d),
        "proj_mlp": (4 * d, d),
        "proj_out": (d, 5 * d),
    }
    blocks = [("transformer_blocks", 19, double), ("single_transformer_blocks", 38, single)]
    return {
        f"{name}.{i}.{module}": shape
        for name, count, modules in blocks
        for i in range(count)
        for module, shape in modules.items()
    }


def pool(k: int, shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """Adapters of rank 16 that share a quarter of their directions, nearly.

    Args:
        k: Number of adapters.
        shapes: Module → (out, in).
        dtype: Storage type of the factors.

    Returns:
        The adapters, in memory.
    """
    adapters = []
    for i in range(k):
        deltas = {}
        for index, (module, (rows, columns)) in enumerate(shapes.items()):
            common = torch.Generator().manual_seed(index)
            own = torch.Generator().manual_seed(1_000_000 + 1000 * i + index)
            B = torch.randn(rows, RANK, generator=own)
            B[:, : RANK // 4] *= 0.1
            B[:, : RANK // 4] += torch.randn(rows, RANK // 4, generator=common)
            A = torch.randn(RANK, columns, generator=own) / columns**0.5
            deltas[module] = Delta(B.to(dtype), A.to(dtype), scaling=0.5)
        adapters.append(Adapter(f"adapter{i}", deltas))
    return adapters


def dense_decompose(adapters: list[Adapter], threshold: float = 0.85) -> list[torch.Tensor]:
    """The paper's method as it is written, on one module (Eq. 6-13).

    Args:
        adapters: The adapters.
        threshold: Smallest eigenvalue that counts as shared.

    Returns:
        The unique part of every adapter, dense.
    """
    (module,) = adapters[0].modules
    deltas = [a.modules[module] for a in adapters]
    weights = [d.scaling * d.B.double() @ d.A.double() for d in deltas]
    product = torch.eye(len(weights[0]), dtype=torch.float64)
    for weight in weights:
        U, S, _ = torch.linalg.svd(weight, full_matrices=False)
        U = U[:, S > 1e-6 * S[0]]
        product = product @ (U @ U.mT)
    values, vectors = torch.linalg.eig(product)
    chosen = vectors[:, values.real > threshold]
    Z = torch.linalg.svd(torch.cat([chosen.real, chosen.imag], 1), full_matrices=False).U
    Z = Z[:, : chosen.shape[1]]
    return [weight - Z @ (Z.mT @ weight) for weight in weights]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that does not count where it is repeated."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(dense: int) -> Iterator[tuple[str, float]]:
    """All measurements, one after the other.

    Args:
        dense: Size of the square module for the dense method; 0 leaves it out.

    Yields:
        What was measured, and the median in seconds.
    """
    shapes = flux_shapes()
    for k in (2, 4):
        adapters = pool(k, shapes)
        yield (
            f"{len(shapes)} modules of Flux, r = 16, chain, k = {k}, in memory",
            seconds(lambda a=adapters: decompose(a), 3),
        )
    one = {"module": (4096, 4096)}
    for method in ("chain", "mean"):
        for k in (2, 4, 8, 16):
            adapters = pool(k, one)
            yield (
                f"one module 4096 x 4096, r = 16, {method}, k = {k}",
                seconds(lambda a=adapters, m=method: decompose(a, method=m), 201),
            )
    if dense:
        adapters = pool(2, {"module": (dense, dense)})
        fast = seconds(lambda: decompose(adapters), 201)
        slow = seconds(lambda: dense_decompose(adapters), 1)
        yield f"one module {dense} x {dense}, r = 16, k = 2, devec", fast
        yield f"one module {dense} x {dense}, r = 16, k = 2, dense method of the paper", slow


def main() -> None:
    """Print the measurements, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument(
        "--dense", type=int, default=4096, help="size for the dense method, 0: none"
    )
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"devec {__version__}, torch {torch.__version__}, {machine}")
    results = {}
    for what, median in measure(arguments.dense):
        results[what] = median
        print(f"{what:70s} {1e3 * median:12.2f} ms", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
