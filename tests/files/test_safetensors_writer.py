"""Files of tensors written one tensor at a time are files like any other."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from devec.errors import OutputError
from devec.files import safetensors_writer
from devec.files.safetensors_writer import TensorWriter

TENSORS = {
    "b.half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.full": torch.arange(4, dtype=torch.float32),
    "c.wide": torch.arange(3, dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
MORE = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "brain": torch.ones(3, 1, 2, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "turned": torch.arange(6.0).reshape(2, 3).mT,
    "ключ": torch.ones(1),
}
STRINGS = {"z": "last", "a": "first", "text": 'quoted "ü"'}


def outlines(tensors):
    return {key: tensor.to("meta") for key, tensor in tensors.items()}


def written(path, tensors, strings=STRINGS, order=None):
    writer = TensorWriter(path, outlines(tensors), strings, create=True)
    for key in tensors if order is None else order:
        writer.put(key, tensors[key])
    writer.finish(strings)
    return path


def assert_holds(path, tensors, strings=STRINGS):
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == strings


@pytest.mark.parametrize("order", permutations(TENSORS))
def test_in_whatever_order_tensors_come_the_file_is_the_same(tmp_path, order):
    first = written(tmp_path / "first", TENSORS)
    assert_holds(first, TENSORS)
    assert written(tmp_path / "second", TENSORS, order=order).read_bytes() == first.read_bytes()


def test_the_order_in_which_they_are_announced_does_not_matter(tmp_path):
    first = written(tmp_path / "first", TENSORS)
    turned = dict(reversed(TENSORS.items()))
    strings = dict(reversed(STRINGS.items()))
    assert written(tmp_path / "second", turned, strings).read_bytes() == first.read_bytes()


def test_every_type_and_shape_can_be_read(tmp_path):
    assert_holds(written(tmp_path / "file", {**TENSORS, **MORE}), {**TENSORS, **MORE})


def test_without_strings_it_can_be_read(tmp_path):
    assert_holds(written(tmp_path / "file", TENSORS, {}), TENSORS, {})


def test_every_tensor_is_aligned(tmp_path):
    raw = written(tmp_path / "file", {**TENSORS, **MORE}).read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for key, tensor in {**TENSORS, **MORE}.items():
        assert header[key]["data_offsets"][0] % tensor.element_size() == 0


def test_the_layout_is_that_of_the_library(tmp_path):
    """All of a file but its header's order, which the library does not keep."""
    save_file(TENSORS, tmp_path / "library", STRINGS)
    own = written(tmp_path / "own", TENSORS)
    headers, data = [], []
    for path in (own, tmp_path / "library"):
        raw = path.read_bytes()
        [length] = struct.unpack("<Q", raw[:8])
        headers.append(json.loads(raw[8 : 8 + length]))
        data.append(raw[8 + length :])
    assert headers[0] == headers[1]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(5), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float16), torch.tensor(0.0)],
    ids=["longer", "shape", "type", "scalar"],
)
def test_another_type_or_shape_than_announced_is_refused(tmp_path, wrong):
    writer = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True)
    with pytest.raises(
        OutputError, match=r"tensor 'a.full' is .*announced was torch.float32 \(4,\)"
    ):
        writer.put("a.full", wrong)
    writer.close()


def test_a_tensor_that_was_never_announced_is_refused(tmp_path):
    writer = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True)
    with pytest.raises(KeyError, match="other"):
        writer.put("other", torch.zeros(1))
    writer.close()


def test_missing_tensors_are_named(tmp_path):
    writer = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True)
    writer.put("a.full", TENSORS["a.full"])
    writer.put("c.wide", TENSORS["c.wide"])
    with pytest.raises(OutputError, match=r"tensors were not written: 'b.half', 'bytes'"):
        writer.finish(STRINGS)
    writer.close()


def test_what_is_put_twice_is_what_came_last(tmp_path):
    changed = {**TENSORS, "a.full": -TENSORS["a.full"]}
    writer = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True)
    for key in TENSORS:
        writer.put(key, changed[key])
        writer.put(key, TENSORS[key])
    writer.finish(STRINGS)
    assert_holds(tmp_path / "file", TENSORS)


def test_several_writers_of_one_file(tmp_path):
    """As of several processes: one makes the file, the others open it, one completes it."""
    keys = list(TENSORS)
    first = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True)
    second = TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=False)
    for index, key in enumerate(keys):
        (first, second)[index % 2].put(key, TENSORS[key])
    second.flush()
    second.close()
    with pytest.raises(OutputError, match="were not written"):
        first.finish(STRINGS)
    first.mark_written(set(keys[1::2]))
    first.finish(STRINGS)
    assert (tmp_path / "file").read_bytes() == written(tmp_path / "one", TENSORS).read_bytes()


def test_a_further_writer_needs_the_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "strings", [{**STRINGS, "more": "x"}, dict.fromkeys(STRINGS, "?")], ids=len
)
def test_a_further_writer_that_plans_another_file_is_refused(tmp_path, strings):
    TensorWriter(tmp_path / "file", outlines(TENSORS), STRINGS, create=True).close()
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(OutputError, match="another process plans this output otherwise"):
        TensorWriter(tmp_path / "file", outlines(TENSORS), strings, create=False)
    assert (tmp_path / "file").read_bytes() == before


def test_threads_may_write_at_the_same_time(tmp_path):
    tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(80)}
    writer = TensorWriter(tmp_path / "file", outlines(tensors), STRINGS, create=True)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda item: writer.put(*item), tensors.items()))
    writer.finish(STRINGS)
    assert_holds(tmp_path / "file", tensors)


@pytest.mark.parametrize("supported", [True, False])
def test_what_has_left_the_cache_is_on_the_disk(tmp_path, monkeypatch, supported):
    """Large tensors leave it, whatever stands beside them and has not been written yet."""
    if not supported:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate((5, 1 << 19, 7, 1 << 18, 3))}
    writer = TensorWriter(tmp_path / "file", outlines(tensors), STRINGS, create=True)
    for key in ("t1", "t0", "t3", "t4", "t2"):
        writer.put(key, tensors[key])
        writer.flush()
    writer.finish(STRINGS)
    assert_holds(tmp_path / "file", tensors)


def test_large_tensors_leave_the_cache_once(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(
        safetensors_writer, "uncache", lambda _, start, size: left.append((start, size))
    )
    tensors = {"a": torch.randn(1 << 18), "b": torch.randn(1 << 10), "c": torch.randn(1 << 19)}
    writer = TensorWriter(tmp_path / "file", outlines(tensors), {}, create=True)
    for key in ("a", "b"):
        writer.put(key, tensors[key])
    writer.flush()
    writer.put("c", tensors["c"])
    writer.flush()
    writer.flush()
    writer.finish({})
    start = (tmp_path / "file").stat().st_size - sum(t.nbytes for t in tensors.values())
    assert left == [(start, 1 << 20), (start + (1 << 20) + (1 << 12), 1 << 21)]


def test_strings_may_change_but_not_in_length(tmp_path):
    """As a digest of the data, which is known once all of it is written."""
    writer = TensorWriter(tmp_path / "file", outlines(TENSORS), {"digest": "0" * 64}, create=True)
    for key, tensor in TENSORS.items():
        writer.put(key, tensor)
    digest = writer.data_sha256()
    assert digest != "0" * 64
    with pytest.raises(OutputError, match="header is not as long"):
        writer.finish({"digest": "0" * 80})
    writer.finish({"digest": digest})
    assert_holds(tmp_path / "file", TENSORS, {"digest": digest})


def test_an_older_file_is_replaced_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    assert_holds(written(tmp_path / "file", TENSORS), TENSORS)
