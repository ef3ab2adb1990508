"""Pools to decompose from files to files."""

from functools import cache

import pytest

from support.adapters.cases import make_pool
from support.pools.golden_pool import golden, sibling
from support.threads import torch_threads as torch_threads


@pytest.fixture(scope="module")
def peft_pool(tmp_path_factory):
    """Directories of adapters that PEFT made."""
    return cache(
        lambda kind="linear", variant="plain", k=2: make_pool(
            tmp_path_factory.mktemp(kind), kind, variant, k
        )
    )


@pytest.fixture(scope="module")
def golden_pool(tmp_path_factory):
    """A golden file and one that shares directions with it."""
    return cache(
        lambda name: {
            "a": golden(name),
            "b": sibling(name, tmp_path_factory.mktemp(name) / "b.safetensors"),
        }
    )
