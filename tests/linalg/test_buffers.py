"""Memory that is used again is never that of a tensor that lives."""

import errno
import mmap
import threading

import pytest
import torch

from devec.linalg import buffers
from devec.linalg.buffers import MemoryBlocks, empty, matmul, reuse_memory

BLOCKS = MemoryBlocks()

LARGE = (1 << 20,)


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch):
    monkeypatch.setattr(buffers, "_memory", buffers._ThreadMemory())
    BLOCKS.clear()


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_tensor_takes_the_memory_that_one_of_its_size_has_left():
    with reuse_memory(BLOCKS):
        first = empty(LARGE, torch.float32)
        before = place(first)
        del first
        assert place(empty((1 << 10, 1 << 10), torch.float32)) == before
    with reuse_memory(BLOCKS):
        assert place(empty((1 << 21,), torch.bfloat16)) == before


def test_what_lives_keeps_its_memory_and_so_do_views_of_it():
    with reuse_memory(BLOCKS):
        whole = empty(LARGE, torch.float32).fill_(1)
        part = whole[1000:2000]
        del whole
        others = [empty(LARGE, torch.float32).fill_(2) for _ in range(3)]
        assert len({place(part), *map(place, others)}) == 4
    with reuse_memory(BLOCKS):
        empty(LARGE, torch.float32).fill_(3)
    assert (part == 1).all()
    assert all((other == 2).all() for other in others)


def test_each_thread_has_memory_of_its_own():
    places = []

    def work():
        with reuse_memory(BLOCKS):
            places.append(place(empty(LARGE, torch.float32)))
            barrier.wait()  # nothing is unmapped before both have looked

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places)) == 2


def test_memory_of_sizes_that_are_not_asked_for_any_more_is_let_go():
    with reuse_memory(BLOCKS):
        empty((1 << 20,), torch.float32)
        empty((1 << 19,), torch.float32)
    with reuse_memory(BLOCKS):
        empty((1 << 19,), torch.float32)
        assert sum(map(len, BLOCKS.of_this_thread().values())) == 2  # nothing was missing yet
        empty((1 << 21,), torch.float32)
        assert {size for size, blocks in BLOCKS.of_this_thread().items() if blocks} == {
            1 << 21,
            1 << 23,
        }


def test_small_tensors_and_those_made_outside_have_memory_of_the_allocator():
    with reuse_memory(BLOCKS):
        empty((1000,), torch.float32)
    empty(LARGE, torch.float32)
    assert not any(BLOCKS.of_this_thread().values())


def test_a_failure_ends_it():
    with pytest.raises(KeyError), reuse_memory(BLOCKS):
        raise KeyError
    empty(LARGE, torch.float32)
    assert not BLOCKS.of_this_thread()


@pytest.mark.parametrize("shape", [(300, 40, 50), (600, 500)])
def test_products_are_those_of_torch(shape):
    X, Y = torch.randn(*shape[:-1], 700), torch.randn(*shape[:-2], 700, shape[-1])
    want = X @ Y
    assert torch.equal(matmul(X, Y), want)
    with reuse_memory(BLOCKS):
        assert torch.equal(matmul(X, Y), want)


def test_too_little_memory_is_torchs_and_pythons_error(monkeypatch):
    def lacking(*_, **__):
        raise OSError(errno.EINVAL, "The paging file is too small")

    monkeypatch.setattr(mmap, "mmap", lacking)
    with reuse_memory(BLOCKS), pytest.raises(MemoryError, match="4194304"):
        empty(LARGE, torch.float32)
