"""Settings of all tests; shapes in devec's signatures are checked in every one of them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Modules whose signatures name shapes. The hook wraps modules as they are imported, so nothing may
# import devec before it: filters of warnings that name a class of devec are added below, since
# pytest resolves those of its configuration first. An int where a float is declared is fine.
SHAPES_CHECKED = [
    "devec.linalg",
    "devec.deltas",
    "devec.decomposition.findings",
    "devec.decomposition.scopes",
    "devec.decomposition.stack",
    "devec.operations.overlap",
]


def shapes_checked(function):
    """The function, its arguments and results checked against its annotations."""
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


install_import_hook(SHAPES_CHECKED, "conftest.shapes_checked")

import pytest
import torch
from hypothesis import settings

# Examples are drawn the same way each time; the first calls into torch can be slow.
settings.register_profile("devec", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("devec")


def pytest_configure(config):
    """Warnings of devec are errors, but those of the golden files of PEFT."""
    config.addinivalue_line("filterwarnings", "error::devec.DevecWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:.*was written by PEFT, but its:devec.DevecWarning"
    )


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
