"""Outputs are whole or not there at all."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from devec import Adapter, DevecError, decompose, save_adapters
from devec.files.staging import write_all
from support.adapters.cases import make_pool, save_adapter
from support.patience import patience

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def text(content):
    return lambda path: path.write_text(content)


def tree(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def test_outputs_are_written_together(tmp_path):
    write_all({tmp_path / "x" / "a": text("1"), tmp_path / "y": text("2")})
    assert tree(tmp_path) == ["x", "x/a", "y"]


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(DevecError, match=r"output exists: '.*a'.*--overwrite"):
        write_all({tmp_path / "a": text("new"), tmp_path / "b": text("new")})
    assert (tmp_path / "a").read_text() == "old"
    assert tree(tmp_path) == ["a"]
    write_all({tmp_path / "a": text("new")}, overwrite=True)
    assert (tmp_path / "a").read_text() == "new"
    assert tree(tmp_path) == ["a"]


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DevecError, match="No space left on device"):
        write_all({tmp_path / "a": text("new"), tmp_path / "new" / "b": fail}, overwrite=True)
    assert tree(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("fails", [1, 2, 3, 4, 5])
def test_a_rename_that_fails_undoes_the_others(tmp_path, monkeypatch, fails):
    for name in ("a", "b", "old"):
        (tmp_path / name).write_text(f"old {name}")
    rename, calls = type(tmp_path).rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == fails:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    outputs = {tmp_path / "a": text("new"), tmp_path / "b": text("new")}
    with pytest.raises(DevecError, match=r"Input/output error; nothing was changed"):
        write_all(outputs, overwrite=True, obsolete=[tmp_path / "old"])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: f"old {name}" for name in ("a", "b", "old")
    }


def test_what_an_earlier_run_left_goes_with_it(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "in", "linear", "plain", 0))
    save_adapters({tmp_path / "one": adapter, tmp_path / "two": adapter})
    with pytest.raises(DevecError, match="output exists"):
        write_all({tmp_path / "new": text("1")}, obsolete=[tmp_path / "two"])
    write_all({tmp_path / "new": text("1")}, obsolete=[tmp_path / "two"], overwrite=True)
    assert (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


def test_a_directory_that_is_no_adapter_is_never_replaced(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "in", "linear", "plain", 0))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(DevecError, match=r"without adapter_config.json"):
        adapter.save_pretrained(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_output_can_replace_its_own_input(tmp_path):
    path = save_adapter(tmp_path / "in", "linear", "plain", 0)
    adapter = Adapter.from_pretrained(path)
    (-adapter).save_pretrained(path, overwrite=True)
    assert Adapter.from_pretrained(path) == -adapter


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DevecError, match="Permission denied"):
        write_all({tmp_path / "a": text("1")})


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DevecError, match="cannot write"):
        write_all({tmp_path / "file" / "a": text("1")})


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file sizes makes the system refuse to write on, as a full disk does."""
    paths = make_pool(tmp_path)
    parts = decompose([Adapter.from_pretrained(p) for p in paths])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(DevecError, match=r"cannot write .*nothing was changed"):
            save_adapters({tmp_path / "out" / n: a for n, a in parts.outputs().items()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


SLOW_WRITE = """
import sys, time
from pathlib import Path
from devec.files.staging import write_all

def slow(path):
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    print("half", flush=True)
    time.sleep(3600)

write_all({Path(sys.argv[1]): slow}, overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_no_half_output_and_a_rerun_works(tmp_path, sign):
    target = tmp_path / "out" / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(sign)
    process.wait(timeout=patience())
    visible = [p for p in tmp_path.rglob("*") if not any(q.startswith(".") for q in p.parts)]
    assert not visible
    write_all({target: text("whole")})
    assert target.read_text() == "whole"


def test_cast_to_a_narrower_type_on_request(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "in", "linear", "plain", 0))
    adapter.save_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    again = Adapter.from_pretrained(tmp_path / "out")
    assert {d.B.dtype for d in again.modules.values()} == {torch.bfloat16}


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_an_interrupt_while_outputs_are_named_costs_nothing(
    tmp_path, monkeypatch, fails, interrupt
):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}")
    rename, calls = type(tmp_path).rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == fails:
            raise interrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(interrupt):
        write_all({tmp_path / "a": text("new"), tmp_path / "b": text("new")}, overwrite=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old a", "b": "old b"}


def test_the_only_copies_of_replaced_outputs_are_not_taken_for_abandoned(tmp_path):
    left = tmp_path / ".devec-killed"
    left.mkdir()
    (left / ".lock").touch()
    (left / "a.replaced").write_text("years")
    write_all({tmp_path / "b": text("new")})
    assert (left / "a.replaced").read_text() == "years"


def test_an_output_in_another_one_is_refused(tmp_path):
    with pytest.raises(DevecError, match="in the place of another output"):
        write_all({tmp_path / "a": text("1"), tmp_path / "a" / "b": text("2")})
    assert tree(tmp_path) == []
