"""Shapes in the algebra's signatures are checked in every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

with install_import_hook(
    ["devec.linalg", "devec.subspace", "devec.findings", "devec.split"], "beartype.beartype"
):
    import devec.split  # noqa: F401

import pytest
import torch
from hypothesis import settings

# Examples are drawn the same way each time; the first calls into torch can be slow.
settings.register_profile("devec", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("devec")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
