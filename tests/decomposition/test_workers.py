"""Work in threads: results and errors in order, little memory at a time."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from devec import Delta, DevecError
from devec.decomposition import cpu_workers
from devec.decomposition.memory import memory_for
from devec.decomposition.stacks.build import stacks_of
from devec.decomposition.workers import in_parallel


def work(count=6):
    """Stacks of one module each."""
    deltas = {f"m{i}": Delta(torch.ones(4, 1), torch.ones(1, 4)) for i in range(count)}
    return list(stacks_of({"a": deltas}, None, batched=False))


def test_results_come_in_the_order_of_the_work():
    stacks = work()
    assert list(in_parallel(lambda stack: stack.modules, stacks)) == [s.modules for s in stacks]


def test_the_first_error_in_order_is_raised():
    def call(stack):
        raise ValueError(stack.modules[0])

    with pytest.raises(ValueError, match="m0"):
        list(in_parallel(call, work()))


def test_calls_within_a_call_run_in_its_thread():
    def inner(_):
        return threading.current_thread().name

    def outer(_):
        return {threading.current_thread().name, *in_parallel(inner, work(2))}

    assert all(len(names) == 1 for names in in_parallel(outer, work(3)))


def test_no_work_begins_after_an_error(monkeypatch):
    """Not even work whose future an interruption has kept from being remembered."""
    submitted, begun = [], []

    class Interrupted(BaseException):
        pass

    class Executor:
        def submit(self, function, stack):
            submitted.append((function, stack))
            raise Interrupted

    monkeypatch.setattr(cpu_workers, "shared_executor", lambda *_: Executor())
    with pytest.raises(Interrupted):
        list(in_parallel(begun.append, work()))
    ((function, stack),) = submitted
    with pytest.raises(CancelledError):
        function(stack)
    assert not begun


def test_stacks_that_need_much_memory_are_worked_on_one_by_one(monkeypatch):
    monkeypatch.setattr(cpu_workers, "_WORKING_BYTES", 1)
    running, most = set(), []

    def call(stack):
        running.add(stack)
        most.append(len(running))
        running.discard(stack)

    list(in_parallel(call, work()))
    assert max(most) == 1


def test_gradients_are_not_tracked_in_any_thread():
    assert not any(in_parallel(lambda _: torch.is_grad_enabled(), work()))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] not enough memory: you tried to allocate")],
)
def test_lack_of_memory_says_for_what(error):
    message = r"too little memory for module 'x' .*OMP_NUM_THREADS=1"
    with pytest.raises(DevecError, match=message), memory_for("module 'x'"):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_for("module 'x'"):
        raise RuntimeError("shapes do not fit")
