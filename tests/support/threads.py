"""Tests with a number of torch threads of their own.

On a CPU devec splits two stacks at a time only if torch has two threads, but the tests otherwise
run with one (see `conftest`). Folders whose subject is decompositions import `torch_threads`, which
gives every test of theirs two.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def torch_threads(request):
    """The number of threads that torch has in a test: two, unless a parameter says otherwise."""
    before, count = torch.get_num_threads(), getattr(request, "param", 2)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


# For tests whose result must not depend on how many stacks are split at a time.
one_and_two_threads = pytest.mark.parametrize(
    "torch_threads", [1, 2], indirect=True, ids=["1 thread", "2 threads"]
)
