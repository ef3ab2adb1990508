"""Settings of all tests; shapes in devec's signatures are checked in every one of them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for each process of the tests, and for those that they start: as many of them run as
# there are cores. What is about several threads sets their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support import shape_checks

# Before anything imports devec. pytest resolves the filters of its configuration even earlier, so
# those that name a class of devec are added below.
shape_checks.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

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
