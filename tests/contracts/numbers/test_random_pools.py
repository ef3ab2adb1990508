"""Random pools of adapters: all that is computed of them is the dense truth.

The long form, by hand, in this folder: ``DEVEC_RANDOM_POOLS=1000 pytest test_random_pools.py``.
Each test has the seed of its pool for a parameter; a failure tells how the pool was drawn.
"""

import os
from itertools import product

import numpy as np
import pytest
import torch

from support.checks.algebra_checks import (
    check_combinations,
    check_compressions,
    check_identities,
    check_measures,
    check_nearest,
    check_overlaps,
)
from support.checks.faults import Faults
from support.checks.file_checks import check_saved, check_streamed
from support.checks.pool_checks import (
    ALL_METHODS,
    Truth,
    check_pool,
    check_target,
    drawn_threshold,
)
from support.pools.pool_files import base_model, write_pool
from support.pools.random_pools import draw_pool

SEEDS = range(int(os.environ.get("DEVEC_RANDOM_POOLS", "25")))


def values(adapters):
    """All tensors of adapters, copied."""
    held = []
    for adapter in adapters:
        for delta in adapter.modules.values():
            delta.each(lambda tensor: held.append(tensor.clone()) or tensor)
    return held


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*magnitudes are negative:devec.DevecWarning"),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_decompositions_are_the_dense_truth(seed):
    pool, rng = draw_pool(seed), np.random.default_rng([seed, 1])
    faults, truth = Faults(pool), Truth(pool)
    before = values(pool.adapters)
    methods = ALL_METHODS if len(truth.names) == 2 else ("chain", "mean")
    fixed = drawn_threshold(rng, truth, "all", methods)
    for method, threshold in product(methods, (fixed, 1.0, "auto")):
        if threshold is not None:
            check_pool(faults, truth, method, "all", threshold)
    fixed = drawn_threshold(rng, truth, "pairwise", ALL_METHODS)
    for threshold in (fixed, 1.0, "auto"):
        if threshold is not None:
            check_pool(faults, truth, str(rng.choice(ALL_METHODS)), "pairwise", threshold)
    for target in truth.names:
        fixed = round(float(rng.uniform(0.02, 0.98)), 6)
        threshold = (fixed, fixed, 1.0, "auto")[rng.integers(4)]
        check_target(faults, truth, str(rng.choice(ALL_METHODS)), target, threshold)
    same = all(torch.equal(x, y) for x, y in zip(before, values(pool.adapters), strict=True))
    faults.holds("the adapters given are left as they were", same)
    faults.settle()


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_and_measures_are_the_dense_truth(seed):
    pool, rng = draw_pool(seed), np.random.default_rng([seed, 2])
    faults, truth = Faults(pool), Truth(pool)
    check_combinations(faults, truth, rng)
    check_identities(faults, truth, rng)
    check_measures(faults, truth)
    check_overlaps(faults, truth)
    faults.settle()


@pytest.mark.parametrize("seed", SEEDS)
def test_lower_ranks_have_the_least_error_and_say_it(seed):
    pool, rng = draw_pool(seed), np.random.default_rng([seed, 3])
    faults, truth = Faults(pool), Truth(pool)
    check_compressions(faults, truth, rng)
    check_nearest(faults, truth, rng)
    faults.settle()


@pytest.mark.parametrize("seed", SEEDS)
def test_files_hold_what_is_in_memory_and_nothing_is_lost(seed, tmp_path):
    drawn, rng = draw_pool(seed, stored=True), np.random.default_rng([seed, 4])
    paths, pool = write_pool(drawn, tmp_path / "pool")
    faults, truth, base = Faults(pool), Truth(pool), base_model(pool)
    for number in range(2):
        check_streamed(faults, truth, paths, base, rng, tmp_path / f"parts {number}")
    check_saved(faults, truth, paths, base, rng, tmp_path / "saved")
    faults.settle()
