"""Time of converting products of low-rank matrices to one pair of factors.

    python -m benchmarks.products

The products are those of LoHa and LoKr adapters, at the sizes of SDXL (1280) and Flux (3072). The
dense method forms the product and computes its SVD in float32; at 3072 × 3072 it runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.results import Section, Table, render_section
from benchmarks.settings import Settings
from benchmarks.timing import seconds
from devec.linalg.hadamard_kronecker import FactorPair, hadamard_product, kronecker_product

MAX_RANK = 256

TEXT = f"""\
Products of LoHa and LoKr adapters are converted to one pair of factors of rank at most {MAX_RANK}.
The dense method forms the product and computes its SVD. All are in float32. Random factors are the
worst case for a truncation, since their singular values decay slowly."""

Row = tuple[str, int, float, float]


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    """Gaussian matrices in float32, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def hadamard_factors(n: int, r: int) -> list[torch.Tensor]:
    """Factors of two n × n matrices of rank r."""
    return matrices((n, r), (r, n), (n, r), (r, n))


def dense_hadamard(
    B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor
) -> torch.Tensor:
    """Form the entrywise product and compute its SVD."""
    return torch.linalg.svd((B1 @ A1) * (B2 @ A2), full_matrices=False).S


def dense_kronecker(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Form the Kronecker product and compute its SVD."""
    return torch.linalg.svd(torch.kron(left, right), full_matrices=False).S


class Sizes(NamedTuple):
    """The sizes of the products.

    Attributes:
        n: Size of the entrywise products.
        ranks: Ranks of their factors, each with the number of measurements.
        kronecker: Sizes of the two factors of each Kronecker product.
    """

    n: int
    ranks: Sequence[tuple[int, int]]
    kronecker: Sequence[tuple[int, int]]


def measure(settings: Settings) -> Iterator[Row]:
    """Measure all products.

    Args:
        settings: Settings of the benchmarks.

    Yields:
        Name, rank, error and median time in seconds. The dense method is exact; its rank is the
        size.
    """
    sizes = Sizes(1280, ((8, 201), (32, 11)), ((8, 384), (48, 64)))
    if settings.quick:
        sizes = Sizes(64, ((2, 1),), ((4, 8),))
    for r, repeats in sizes.ranks:
        B1, A1, B2, A2 = hadamard_factors(sizes.n, r)
        name = f"Hadamard, two of rank {r}, {sizes.n} × {sizes.n}"
        product = partial(hadamard_product, B1, A1, B2, A2, max_rank=MAX_RANK)
        yield timed(name, product, settings.times(repeats))
        dense = seconds(partial(dense_hadamard, B1, A1, B2, A2), settings.times(3))
        yield f"{name}, dense", sizes.n, 0.0, dense
    for small, large in sizes.kronecker:
        left, right = matrices((small, small), (large, large))
        n = small * large
        name = f"Kronecker, {small}² ⊗ {large}², {n} × {n}"
        product = partial(kronecker_product, left, right, max_rank=MAX_RANK)
        yield timed(name, product, settings.times(21))
    yield f"{name}, dense", n, 0.0, seconds(lambda: dense_kronecker(left, right), 1)


def timed(name: str, call: Callable[[], FactorPair], repeats: int) -> Row:
    """Rank and error of the factors of one product, and the median time."""
    result = call()
    return name, result.B.shape[1], result.error, seconds(call, repeats)


def section(settings: Settings) -> Section:
    """Measure all products."""
    torch.set_num_threads(settings.threads)
    units = {"product": "", "rank": "count", "relative error": "error", "time": "seconds"}
    rows = [dict(zip(units, row, strict=True)) for row in measure(settings)]
    return Section("Products: LoHa and LoKr", TEXT, [Table("To factors", units, rows)])


if __name__ == "__main__":
    print(render_section(section(Settings())))
