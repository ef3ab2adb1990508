"""The paper's toy experiments: planted shared directions, with and without noise.

`agreement` is Figure 7 (`chain` against `principal`), `clusters` is Figure 8a (the eigenvalues of
P_AB), `recovery` is Figure 8b (error against noise); ``python -m benchmarks.toy`` prints all three.

The matrices are those of `planted.py`. Recovery is the mean of the s principal angles between
span(S) and the s leading directions found.

Reference: arXiv 2512.22511, appendices 6 and 7.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.planted import FIGURE_7, FIGURE_8, Setup, generator, planted, principal_angles
from devec.linalg import subspaces
from devec.linalg.chance import random_edge
from devec.linalg.subspaces import SharedSubspace

TAU = 0.85
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4)
AGREEMENT_CASES = ((True, 0.0), (True, 0.05), (True, 0.1), (False, 0.05), (False, 0.1))


def leading(
    method: Callable[[Sequence[Tensor], float], SharedSubspace], bases: Sequence[Tensor], count: int
) -> SharedSubspace:
    """The leading shared directions of a method, however low their eigenvalues are.

    The threshold is put halfway between the spectrum's values number `count` and `count` + 1. Where
    these two are a complex pair of `chain`, both are taken: a pair spans one plane.
    """
    spectrum = method(bases, math.inf).spectrum
    return method(bases, float(spectrum[count - 1 : count + 1].mean()))


def leading_real_parts(bases: Sequence[Tensor], count: int) -> SharedSubspace:
    """What is left of `chain` if the imaginary parts of its eigenvectors are dropped.

    The two vectors of a complex pair have one real part, so the real parts of `count` eigenvectors
    span less than `count` directions, and QR fills up the rest with rounding noise. This is no
    method of this package: it is measured since ``eig(P).real`` is so easily written.
    """
    M = bases[0].mT
    for basis in bases[1:]:
        M = (M @ basis) @ basis.mT
    values, vectors = torch.linalg.eig(M @ bases[0])
    order = values.real.argsort(descending=True)
    Z = torch.linalg.qr(bases[0] @ vectors[:, order[:count]].real).Q
    return SharedSubspace(Z, values.real[order], torch.tensor(Z.shape[1]))


ESTIMATORS: dict[str, Callable[[Sequence[Tensor], int], SharedSubspace]] = {
    "chain": partial(leading, subspaces.chain),
    "mean": partial(leading, subspaces.mean),
    "chain, real parts": leading_real_parts,
}


@dataclass(frozen=True)
class Recovery:
    """Error of the recovered subspace at one noise level.

    Attributes:
        mixed: As in `Setup`.
        k: Number of matrices.
        sigma: Noise level.
        method: One of `ESTIMATORS`.
        degrees: Mean principal angle to the planted subspace, over directions and runs.
        spread: Standard deviation of a run's mean angle over runs.
        above: Mean number of values of the method's spectrum above `TAU`.
    """

    mixed: bool
    k: int
    sigma: float
    method: str
    degrees: float
    spread: float
    above: float


def recovery(setup: Setup, k: int, sigma: float, runs: int = 3, seed: int = 0) -> list[Recovery]:
    """Figure 8b: how far the s leading directions are from the planted ones, over several pools.

    Calls that differ in `sigma` alone draw the same matrices and the same noise, scaled.

    Returns:
        One row for each estimator; the real parts only for k > 2, where eigenvalues are complex.
    """
    pools = [planted(setup, k, sigma, generator(run, seed)) for run in range(runs)]
    rows = []
    for name, estimate in ESTIMATORS.items():
        if k == 2 and name not in subspaces.METHODS:
            continue
        found = [(estimate(bases, setup.shared), S) for bases, S in pools]
        degrees = torch.stack([principal_angles(z.basis, S).rad2deg().mean() for z, S in found])
        above = sum(int((z.spectrum > TAU).sum()) for z, _ in found) / runs
        spread = float(degrees.std(correction=0))
        rows.append(Recovery(setup.mixed, k, sigma, name, float(degrees.mean()), spread, above))
    return rows


@dataclass(frozen=True)
class Clusters:
    """The nonzero eigenvalues of P_AB and where chance puts them.

    Attributes:
        eigenvalues: Descending, r of them.
        shared: Number of planted directions.
        edge: `random_edge` of what is not shared, r - s directions each in n - s dimensions.
        unrelated_edge: `random_edge` of two matrices of rank r that share nothing.
    """

    eigenvalues: Tensor
    shared: int
    edge: float
    unrelated_edge: float

    def row(self) -> dict[str, object]:
        """The ends of both clusters and the edges of chance."""
        ones, rest = self.eigenvalues[: self.shared], self.eigenvalues[self.shared :]
        return {
            "shared": len(ones),
            "shared_min": float(ones.min()),
            "shared_max": float(ones.max()),
            "rest": len(rest),
            "rest_min": float(rest.min()),
            "rest_max": float(rest.max()),
            "edge": self.edge,
            "unrelated_edge": self.unrelated_edge,
        }


def clusters(setup: Setup = FIGURE_8, seed: int = 0) -> Clusters:
    """Figure 8a: the eigenvalues of P_AB for two matrices without noise.

    The other n - r eigenvalues of the n × n matrix are zeros and are left out.
    """
    n, r, s = setup.n, setup.rank, setup.shared
    bases, _ = planted(setup, 2, 0.0, generator(0, seed))
    edge, unrelated_edge = (
        random_edge(n - s, r - s, r - s),
        random_edge(n, r, r),
    )
    return Clusters(subspaces.chain(bases, TAU).spectrum, s, edge, unrelated_edge)


def dense_chain(bases: Sequence[Tensor], threshold: float) -> Tensor:
    """`chain` as the paper writes it: eigenvectors of the n × n product by a general eigensolver.

    Only those whose eigenvalues exceed the threshold, orthonormalised.
    """
    values, vectors = torch.linalg.eig(_product(bases))
    chosen = vectors[:, values.real > threshold]
    parts = torch.cat([chosen.real, chosen.imag], dim=1)
    span: Tensor = torch.linalg.svd(parts, full_matrices=False).U
    return span[:, : chosen.shape[1]]


def symmetric_chain(bases: Sequence[Tensor], threshold: float) -> Tensor:
    """The same product given to a symmetric eigensolver, as ZΛZᵀ in the paper's Eq. 9 suggests.

    The product is not symmetric. The solver reads its lower triangle and answers for another
    matrix, which depends on the basis of R^n.
    """
    values, vectors = torch.linalg.eigh(_product(bases))
    chosen: Tensor = vectors[:, values > threshold]
    return chosen


def _product(bases: Sequence[Tensor]) -> Tensor:
    """P1·P2···Pk, n × n."""
    return reduce(torch.matmul, [U @ U.mT for U in bases])


@dataclass(frozen=True)
class Agreement:
    """Principal angles in radians, of all runs, between what two routes call shared.

    Attributes:
        mixed: As in `Setup`.
        sigma: Noise level.
        directions: Mean number of directions above the threshold.
        first: Dense `chain` against the principal vectors f of the first matrix.
        second: Dense `chain` against the principal vectors g of the second matrix.
        symmetric: The symmetric eigensolver's answer against f.
    """

    mixed: bool
    sigma: float
    directions: float
    first: Tensor
    second: Tensor
    symmetric: Tensor

    def row(self) -> dict[str, object]:
        """Medians and maxima, in degrees but for what is rounding."""
        second, symmetric = self.second.rad2deg(), self.symmetric.rad2deg()
        return {
            "mixed": self.mixed,
            "sigma": self.sigma,
            "directions": self.directions,
            "first_max_radians": float(self.first.max()),
            "second_median": float(second.median()),
            "second_max": float(second.max()),
            "symmetric_median": float(symmetric.median()),
            "symmetric_max": float(symmetric.max()),
        }


def agreement(setup: Setup, sigma: float, runs: int = 100, seed: int = 0) -> Agreement:
    """Figure 7: `chain` by its dense route against `principal`, both cut at `TAU`.

    Where two answers differ in dimension, the angles are those of the smaller to the larger.
    """
    kept = 0
    first, second, symmetric = [], [], []
    for run in range(runs):
        bases, _ = planted(setup, 2, sigma, generator(run, seed))
        f, cosines, g = subspaces.principal_vectors(*bases)
        shared = cosines.square() > TAU
        kept += int(shared.sum())
        Z = dense_chain(bases, TAU)
        first.append(principal_angles(Z, f[:, shared]))
        second.append(principal_angles(Z, g[:, shared]))
        symmetric.append(principal_angles(symmetric_chain(bases, TAU), f[:, shared]))
    return Agreement(
        setup.mixed, sigma, kept / runs, torch.cat(first), torch.cat(second), torch.cat(symmetric)
    )


def recovery_rows(setup: Setup, runs: int = 3, seed: int = 0) -> list[Recovery]:
    """The table of Figure 8b for one kind of matrices: k = 2 and 4, all noise levels."""
    return [
        row for k in (2, 4) for sigma in SIGMAS for row in recovery(setup, k, sigma, runs, seed)
    ]


def measure(runs: int = 100, pools: int = 3, seed: int = 0) -> dict[str, list[dict[str, object]]]:
    """The rows of all three figures, from `runs` pairs for Figure 7 and `pools` for Figure 8b."""
    figure_7 = [
        agreement(replace(FIGURE_7, mixed=mixed), sigma, runs, seed)
        for mixed, sigma in AGREEMENT_CASES
    ]
    figure_8b = [
        row for mixed in (True, False) for row in recovery_rows(Setup(mixed=mixed), pools, seed)
    ]
    return {
        "figure_7": [result.row() for result in figure_7],
        "figure_8a": [clusters(seed=seed).row()],
        "figure_8b": [asdict(row) for row in figure_8b],
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Plain text, one line a row, columns aligned to the right."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: object) -> str:
    """A number with the digits that mean something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}"
    return str(value)


TITLES = {
    "figure_7": (
        "Figure 7: principal angles between dense `chain` and `principal`, two matrices, cut at\n"
        f"τ = {TAU}; first/second: the principal vectors f/g of the first/second matrix;\n"
        "symmetric: f against a symmetric eigensolver on the same product. Degrees, or as named."
    ),
    "figure_8a": "Figure 8a: eigenvalues of P_AB without noise, and where chance puts them.",
    "figure_8b": (
        "Figure 8b: mean principal angle in degrees between the planted subspace and as many\n"
        f"leading directions; spread over runs; how many values of the spectrum exceed τ = {TAU}."
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; with ``--json FILE`` also write them."""
    parser = argparse.ArgumentParser(prog="benchmarks.toy", description="The paper's toy problems.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON")
    arguments = parser.parse_args(argv)
    tables = measure()
    for name, rows in tables.items():
        print(f"{TITLES[name]}\n\n{table(rows)}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
