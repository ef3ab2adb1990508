"""How fast products of low-rank matrices become one pair of factors, beside the dense method.

    python -m benchmarks.products

The products that LoHa and LoKr adapters hold, at the sizes of SDXL (1280) and Flux (3072). The
dense method forms the product and takes its SVD in float32; at 3072 × 3072 it is run once.
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
Products that LoHa and LoKr adapters hold, as one pair of factors of rank {MAX_RANK} at most, beside
forming the product and taking its SVD, in float32. Random factors are the worst case of a
truncation: their singular values hardly fall."""

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


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        n: Size of the entrywise products.
        ranks: Rank of their factors and how often to measure, each.
        kronecker: Sizes of the two factors of Kronecker products, each.
    """

    n: int
    ranks: Sequence[tuple[int, int]]
    kronecker: Sequence[tuple[int, int]]


def measure(settings: Settings) -> Iterator[Row]:
    """All measurements, one after the other.

    Args:
        settings: How to run.

    Yields:
        What was measured, its rank and error, and the median in seconds; of the dense method, which
        is exact, the rank is the size.
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
    """One product: rank and error of its result, and the median time."""
    result = call()
    return name, result.B.shape[1], result.error, seconds(call, repeats)


def section(settings: Settings) -> Section:
    """All products."""
    torch.set_num_threads(settings.threads)
    units = {"product": "", "rank": "count", "relative error": "error", "time": "seconds"}
    rows = [dict(zip(units, row, strict=True)) for row in measure(settings)]
    return Section("Products: LoHa and LoKr", TEXT, [Table("To factors", units, rows)])


if __name__ == "__main__":
    print(render_section(section(Settings())))
