"""What devec does to torch's number of threads stays in the threads of devec."""

import os
import threading

import pytest
import torch

from devec import Adapter, Delta, decompose
from devec.linalg.threads import shared_executor, use_threads
from support.patience import patience


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads for each thread, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def of_a_new_thread(call=torch.get_num_threads):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def pool(modules):
    g = torch.Generator().manual_seed(0)
    return [
        Adapter(
            name,
            {
                f"m{i}": Delta(torch.randn(128, 8, generator=g), torch.randn(8, 96, generator=g))
                for i in range(modules)
            },
        )
        for name in "abc"
    ]


def test_threads_that_begin_during_a_call_are_as_they_would_be():
    """Once the threads of devec are there, which begin one at a time."""
    decompose(pool(120))
    found = []
    decompose(pool(120), progress=lambda _: found.append(of_a_new_thread()))
    assert found == [2] * 120


def test_crews_are_shared_and_have_their_number():
    executor = shared_executor("test", 2, 1)
    assert shared_executor("test", 2, 1) is executor
    assert executor.submit(torch.get_num_threads).result() == 1
    assert (torch.get_num_threads(), of_a_new_thread()) == (2, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    """Its parent's are not there, and work that waited for them would wait for ever."""
    shared_executor("test", 1, 1).submit(torch.get_num_threads).result()
    child = os.fork()
    if child == 0:
        os._exit(shared_executor("test", 1, 1).submit(torch.get_num_threads).result(patience()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_it_is_set_in_one_thread_alone():
    def inside():
        use_threads(1)
        return torch.get_num_threads(), of_a_new_thread()

    assert of_a_new_thread(inside) == (1, 2)
    assert (torch.get_num_threads(), of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize("method", ["mean", "chain"])
def test_calls_at_the_same_time_leave_new_threads_as_they_were(method):
    adapters = pool(120)
    for _ in range(4):
        calls = [
            threading.Thread(target=decompose, args=(adapters,), kwargs={"method": method})
            for _ in range(4)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert (torch.get_num_threads(), of_a_new_thread()) == (2, 2)
