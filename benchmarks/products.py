"""How fast products of low-rank matrices become one pair of factors, beside the dense method.

    python -m benchmarks.products [--dense N] [--json FILE]

The products that LoHa and LoKr adapters hold, at the sizes of SDXL (1280) and Flux (3072). The
dense method forms the product and takes its SVD in float32; at 3072 × 3072 it is run once.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.speed import seconds
from devec import __version__
from devec.products import Factors, hadamard_product, kronecker_product

MAX_RANK = 256

Row = tuple[str, int, float, float]


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    """Gaussian matrices in float32, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def hadamard_factors(n: int, r: int) -> list[torch.Tensor]:
    """Factors of two n × n matrices of rank r."""
    return matrices((n, r), (r, n), (n, r), (r, n))


def dense_hadamard(
    B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor
) -> torch.Tensor:
    """The entrywise product, formed and decomposed."""
    return torch.linalg.svd((B1 @ A1) * (B2 @ A2), full_matrices=False).S


def dense_kronecker(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The Kronecker product, formed and decomposed."""
    return torch.linalg.svd(torch.kron(left, right), full_matrices=False).S


def measure(dense: int) -> Iterator[Row]:
    """All measurements, one after the other.

    Args:
        dense: Largest size for the dense method; 0 leaves it out.

    Yields:
        What was measured, its rank and error, and the median in seconds; or the dense method's
        time, with its rank and error 0.
    """
    for r, repeats in ((8, 201), (32, 11)):
        factors = hadamard_factors(1280, r)
        name = f"Hadamard, two of rank {r}, 1280 × 1280"
        yield timed(name, lambda f=factors: hadamard_product(*f, max_rank=MAX_RANK), repeats)
        if dense >= 1280:
            yield f"{name}, dense", 1280, 0.0, seconds(lambda f=factors: dense_hadamard(*f), 3)
    for small, large in ((8, 384), (48, 64)):
        left, right = matrices((small, small), (large, large))
        name = f"Kronecker, {small}² ⊗ {large}², 3072 × 3072"
        yield timed(name, lambda a=left, b=right: kronecker_product(a, b, max_rank=MAX_RANK), 21)
    if dense >= 3072:
        yield f"{name}, dense", 3072, 0.0, seconds(lambda: dense_kronecker(left, right), 1)


def timed(name: str, call: Callable[[], Factors], repeats: int) -> Row:
    """One product: rank and error of its result, and the median time."""
    result = call()
    return name, result.B.shape[1], result.error, seconds(call, repeats)


def main() -> None:
    """Print the measurements as a table, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products")
    parser.add_argument(
        "--dense", type=int, default=3072, help="largest size for the dense method, 0: none"
    )
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"devec {__version__}, torch {torch.__version__}, {machine}, max_rank {MAX_RANK}\n")
    print("| product | rank | relative error | median |")
    print("|---|---:|---:|---:|")
    results = {}
    for name, rank, error, median in measure(arguments.dense):
        results[name] = median
        print(f"| {name} | {rank} | {error:.4f} | {1e3 * median:.1f} ms |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
