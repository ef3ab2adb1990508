"""Processes are measured from outside, and their failures are loud."""

import sys

import pytest
from benchmarks.timing import in_turn, process, python, ratio, rivals

HEAP = 300_000_000


def test_a_process_is_timed_and_its_memory_is_its_own():
    ballast = bytearray(HEAP)  # of this process; touched, so that it counts
    ballast[:: 1 << 12] = b"\1" * len(ballast[:: 1 << 12])
    small = python("-S", "-c", "print('hello')", threads=1)
    assert small.output == "hello\n"
    assert 0 < small.seconds < 30
    assert 1_000_000 < small.peak < 100_000_000
    large = python("-S", "-c", f"b = b'1' * {HEAP}", threads=1)
    assert large.peak > HEAP


def test_no_network_and_so_many_threads():
    code = "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['OMP_NUM_THREADS'])"
    assert python("-S", "-c", code, threads=3).output == "1 3\n"


def test_a_failure_is_loud():
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*no such luck"):
        python("-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)", threads=1)
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        process("/no/such/program", threads=1)
    with pytest.raises(RuntimeError, match="exit code -9"):
        process(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)", threads=1)


def test_rivals_run_in_turn():
    calls = []
    times = rivals({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("ababab")
    assert [len(found) for found in times.values()] == [2, 2]
    assert in_turn({"a": lambda: 1, "b": lambda: 2}, 2) == {"a": [1, 1], "b": [2, 2]}


def test_ratios_are_of_pairs():
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
