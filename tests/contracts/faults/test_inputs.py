"""Input files that change while they are read: one message, or the bytes that were there."""

import dataclasses
import os
import sys

import pytest
from safetensors.torch import save_file

from devec import Adapter
from devec.errors import FormatError
from devec.files.digest import sha256
from devec.lazy import LazyMapping, outlines
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions
from support.adapters.cases import WithHead, save_adapter, save_kohya
from support.checks.leftovers import assert_nothing_but, before_reading, module_of
from support.checks.streamed import contents, from_files, from_files_to_files
from support.processes.children import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="open files are not replaced there"),
]

WEIGHTS = "adapter_model.safetensors"


def weights(path):
    """The file of tensors of an adapter."""
    return path / WEIGHTS if path.is_dir() else path


def later(path):
    """Make a file younger than the clock of the file system may miss."""
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    path.write_bytes(b"")


def grown(path):
    with path.open("ab") as file:
        file.write(b"more")


def rewritten(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    later(path)


def touched(path):
    later(path)


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"something else")
    other.rename(path)


def deleted(path):
    path.unlink(missing_ok=True)


WRITTEN_TO = [truncated, emptied, grown, rewritten, touched]

MOVED = [replaced, deleted]


@pytest.mark.parametrize("change", WRITTEN_TO)
def test_a_file_that_is_written_to_is_not_read_on(pool, change):
    adapter = Adapter.from_pretrained(pool[0], lazy=True)
    change(weights(pool[0]))
    with pytest.raises(FormatError, match="was changed while it was being read") as error:
        adapter.modules[module_of(adapter)]
    assert str(weights(pool[0])) in str(error.value)


@pytest.mark.parametrize("change", MOVED)
def test_a_file_that_is_replaced_or_deleted_is_read_as_it_was(pool, change):
    want = Adapter.from_pretrained(pool[0])
    adapter = Adapter.from_pretrained(pool[0], lazy=True)
    change(weights(pool[0]))
    for module, delta in adapter.modules.items():
        assert delta.same_as(want.modules[module])


@pytest.mark.parametrize("change", [later, replaced])
def test_a_digest_is_not_that_of_another_file(pool, monkeypatch, change):
    def meanwhile(path):
        change(path)
        return sha256(path)

    monkeypatch.setattr("devec.files.safetensors_reader.sha256", meanwhile)
    with pytest.raises(FormatError, match="was replaced while it was being opened; run again"):
        Adapter.from_pretrained(pool[0], lazy=True)


@pytest.mark.parametrize("change", WRITTEN_TO)
@pytest.mark.parametrize(
    "form", [OutputOptions(), OutputOptions(compact=True)], ids=["direct", "spooled"]
)
def test_nothing_is_written_of_inputs_that_change(tmp_path, plain, change, form):
    original = weights(plain[1]).read_bytes()
    adapters = from_files(plain)
    change(weights(plain[1]))
    with pytest.raises(FormatError, match="was changed while it was being read") as error:
        decompose_to(tmp_path / "out", adapters, **vars(form))
    assert str(weights(plain[1])) in str(error.value)
    assert_nothing_but(tmp_path, "in")
    weights(plain[1]).write_bytes(original)
    assert from_files_to_files(tmp_path / "out", plain, form).written.keys() >= {"a-unique"}


@pytest.mark.parametrize("change", MOVED)
def test_inputs_that_are_moved_away_are_decomposed_as_they_were(tmp_path, pool, change):
    from_files_to_files(tmp_path / "want", pool)
    adapters = from_files(pool)
    change(weights(pool[1]))
    decompose_to(tmp_path / "out", adapters)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_change_in_the_middle_of_the_work_is_seen(tmp_path, pool):
    first, second = from_files(pool)
    spoiled = before_reading(second, module_of(second), lambda: truncated(weights(pool[1])))
    with pytest.raises(FormatError, match="was changed while it was being read"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("change", [truncated, deleted])
def test_a_carried_tensor_that_cannot_be_read_is_an_error_too(tmp_path, change):
    """It is read last, when all modules are written."""
    fields = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    pool = [
        save_adapter(tmp_path / "in" / name, "linear", "plain", index, WithHead(), **fields)
        for index, name in enumerate("ab")
    ]
    first, second = from_files(pool)
    assert second.carried

    class Carried(LazyMapping):
        def __getitem__(self, key):
            change(weights(pool[1]))
            return super().__getitem__(key)

    carried = Carried(outlines(second.carried), second.carried.__getitem__)
    spoiled = dataclasses.replace(second, carried=carried)
    if change is deleted:
        decompose_to(tmp_path / "out", [first, spoiled])
        got = Adapter.from_pretrained(tmp_path / "out" / "b-unique")
        assert got.carried.keys() == second.carried.keys()
        return
    with pytest.raises(FormatError, match="was changed while it was being read"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_when_they_are_read(tmp_path, value):
    pool = [save_kohya(tmp_path / "in" / f"{n}.safetensors", i) for i, n in enumerate("ab")]
    adapter = Adapter.from_pretrained(pool[1])
    module = module_of(adapter)
    adapter.modules[module].A[0, 0] = value
    tensors = {}
    for name, delta in adapter.modules.items():
        tensors[f"{name}.lora_up.weight"] = delta.B
        tensors[f"{name}.lora_down.weight"] = delta.A
    save_file(tensors, pool[1])
    adapters = from_files(pool)
    with pytest.raises(FormatError, match=r"holds NaN or infinity in 1 of its values") as error:
        decompose_to(tmp_path / "out", adapters)
    assert module in str(error.value)
    assert str(pool[1]) in str(error.value)
    assert_nothing_but(tmp_path, "in")


@pytest.mark.slow
def test_an_input_that_is_not_there_any_more_is_an_error_of_one_line(tmp_path, plain):
    weights(plain[1]).unlink()
    code, printed = run(tmp_path / "log", "decompose", *plain, "--out", tmp_path / "out")
    assert code == 2
    [message] = printed.splitlines()
    assert message.startswith(f"error: {plain[1]} has adapter_config.json but no {WEIGHTS}")
    assert_nothing_but(tmp_path, "in", "log")
