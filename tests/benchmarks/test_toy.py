"""The toy experiments, at a size that takes no time."""

import math

import pytest
import torch
from benchmarks import toy

from devec.linalg import subspaces

TINY = toy.Setup(n=60, rank=12, shared=6)


def errors(k, sigma, runs=8):
    return {row.method: row.degrees for row in toy.recovery(TINY, k, sigma, runs)}


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("mixed", [True, False])
def test_without_noise_the_planted_directions_are_found_exactly(mixed, k, method):
    setup = toy.Setup(TINY.n, TINY.rank, TINY.shared, mixed)
    bases, S = toy.planted(setup, k, 0.0, toy.generator(1))
    found = toy.leading(subspaces.METHODS[method], bases, setup.shared)
    assert found.rank == setup.shared
    assert toy.principal_angles(found.basis, S).max() < 1e-9


def test_with_noise_the_planted_directions_are_not_found_exactly():
    bases, S = toy.planted(TINY, 2, 0.2, toy.generator(1))
    found = toy.leading(subspaces.chain, bases, TINY.shared)
    assert toy.principal_angles(found.basis, S).max() > 0.05


def test_mean_is_at_least_as_good_as_chain_for_four():
    error = errors(4, 0.2)
    assert error["mean"] <= error["chain"]


def test_dropping_imaginary_parts_loses_directions():
    error = errors(4, 0.2)
    assert error["chain, real parts"] > error["chain"] + 1


def test_a_run_is_the_same_whenever_it_is_drawn():
    first = toy.recovery(TINY, 2, 0.2, runs=2)
    assert toy.recovery(TINY, 2, 0.2, runs=2) == first
    assert toy.recovery(TINY, 2, 0.2, runs=2, seed=1) != first


def test_leading_does_not_depend_on_the_paper_threshold():
    bases, _ = toy.planted(TINY, 2, 1.0, toy.generator(2))
    found = toy.leading(subspaces.chain, bases, TINY.shared)
    assert found.spectrum[TINY.shared - 1] < toy.TAU
    assert found.rank == TINY.shared


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-3, 1.0, math.pi / 2])
def test_principal_angles_are_accurate_at_both_ends(angle):
    Z1 = torch.eye(5, 2, dtype=torch.float64)
    Z2 = Z1.clone()
    Z2[1, 1], Z2[2, 1] = math.cos(angle), math.sin(angle)
    expected = torch.tensor([0.0, angle], dtype=torch.float64)
    torch.testing.assert_close(toy.principal_angles(Z1, Z2), expected, rtol=1e-9, atol=1e-16)


def test_dense_chain_is_the_first_principal_vectors_and_the_symmetric_solver_is_not():
    result = toy.agreement(TINY, 0.0, runs=3)
    assert result.first.max() < 1e-9
    assert result.symmetric.max() > 0.01


def test_eigenvalues_without_noise_are_ones_and_chance():
    setup = toy.Setup(n=300, rank=60, shared=30)
    result = toy.clusters(setup)
    torch.testing.assert_close(result.eigenvalues[:30], torch.ones(30, dtype=torch.float64))
    assert result.eigenvalues[30] < 1.1 * result.edge < result.unrelated_edge


def test_json_holds_what_is_printed(tmp_path, monkeypatch, capsys):
    rows = [{"sigma": 0.25, "directions": 3}]
    monkeypatch.setattr(toy, "measure", lambda: dict.fromkeys(toy.TITLES, rows))
    toy.main(["--json", str(tmp_path / "toy.json")])
    assert '"sigma": 0.25' in (tmp_path / "toy.json").read_text()
    assert capsys.readouterr().out.count("0.25") == len(toy.TITLES)
