"""Disks that are full and places that are taken: one message and no half output."""

import dataclasses
import os
import pathlib
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from devec import Adapter
from devec.errors import OutputError
from devec.files import random_access
from devec.files.safetensors_writer import TensorWriter
from devec.streaming import sinks
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions
from support.checks.leftovers import assert_nothing_but, before_reading, module_of
from support.checks.streamed import contents, from_files, from_files_to_files, with_report
from support.patience import patience

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="open files are not replaced there"),
]

FORMS = {
    "direct": OutputOptions(),
    "spooled": OutputOptions(compact=True),
    "converted": OutputOptions(dtype=torch.float64),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [0, 100, 1024])
def test_a_limit_of_the_size_of_files_leaves_nothing(tmp_path, plain, form, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OutputError, match=r"cannot write .*File too large.*nothing was changed"
        ):
            from_files_to_files(tmp_path / "out", plain, FORMS[form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert_nothing_but(tmp_path, "in")
    assert from_files_to_files(tmp_path / "out", plain, FORMS[form]).written.keys() >= {"common"}


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "mkdir"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_leaves_nothing(tmp_path, plain, monkeypatch, call, after):
    """The system fails some of the calls that take room."""
    original, calls = getattr(os, call), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    adapters = from_files(plain)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if call == "mkdir" and sys.version_info < (3, 11):  # whose paths keep the function
            patch.setattr(pathlib._NormalAccessor, "mkdir", staticmethod(failing))
        with pytest.raises(
            OutputError, match=r"cannot write .*No space left on device.*nothing was"
        ):
            decompose_to(tmp_path / "out", adapters)
    assert_nothing_but(tmp_path, "in")
    assert decompose_to(tmp_path / "out", adapters).written.keys() >= {"common"}


def wait_until(done):
    """Wait for another thread."""
    deadline = time.monotonic() + patience()
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_that_the_system_tells_once_is_not_lost(tmp_path, plain, monkeypatch):
    """Whoever flushes first hears of it, which is the thread that does so beside the work."""
    original, told = os.fsync, []

    def failing(file):
        if not told:
            told.append(threading.current_thread().name)
            raise OSError(5, "Input/output error")
        original(file)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(sinks, "_PAUSE", 0)
    with pytest.raises(OutputError, match=r"cannot write .*Input/output error.*nothing was"):
        decompose_to(
            tmp_path / "out", from_files(plain), progress=lambda _: wait_until(lambda: told)
        )
    assert told == ["devec-flush"]
    assert_nothing_but(tmp_path, "in")


def test_a_file_that_cannot_be_enlarged_is_closed(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", failing)
    closed, close = [], os.close
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or close(file))
    with pytest.raises(OSError, match="No space left"):
        TensorWriter(tmp_path / "x", {"w": torch.zeros(3, device="meta")}, {}, create=True)
    assert len(closed) == 1


def test_what_is_not_finite_is_not_written_in_any_type(tmp_path, plain):
    """Half precision, in which nothing is computed, may have been made by anybody."""
    original = Adapter.from_pretrained(plain[0])
    module = module_of(original)
    for value in (float("inf"), float("nan")):
        A = original.modules[module].A.half()
        A[0, 0] = value
        spoiled = {**original.modules, module: dataclasses.replace(original.modules[module], A=A)}
        adapter = dataclasses.replace(original, modules=spoiled)
        with pytest.raises(OutputError, match="holds NaN or infinity in 1 of its values"):
            adapter.save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert_nothing_but(tmp_path, "in")


def test_where_files_have_one_place_only_the_same_is_written(tmp_path, pool, monkeypatch):
    """As on Windows, which has no calls that say where to read and write."""
    from_files_to_files(tmp_path / "want", pool)
    monkeypatch.setattr(random_access, "_HAS_POSITIONED_CALLS", False)
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    from_files_to_files(tmp_path / "out", pool)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_outputs_that_were_there_stay_as_they_were(tmp_path, plain, monkeypatch):
    from_files_to_files(tmp_path / "out", plain, threshold=0.3)
    before = contents(tmp_path)

    def failing(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OutputError, match="No space left"):
            from_files_to_files(tmp_path / "out", plain, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_appears_in_the_place_of_an_output_meanwhile_is_not_replaced(tmp_path, plain, kind):
    first, second = from_files(plain)
    mine = tmp_path / "out" / "common"
    text = mine / "thesis.tex" if kind == "directory" else mine

    def act():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("years")

    with pytest.raises(OutputError, match="common"):
        decompose_to(tmp_path / "out", [first, before_reading(second, module_of(second), act)])
    assert_nothing_but(tmp_path, "in", "out")
    assert_nothing_but(tmp_path / "out", "common")
    assert text.read_text() == "years"


def test_outputs_of_a_run_at_the_same_time_are_not_replaced(tmp_path, plain):
    """Both began when there was nothing; that which ends first keeps its outputs."""
    first, second = from_files(plain)
    before = {}

    def act():
        if not before:
            from_files_to_files(tmp_path / "out", plain, threshold=0.3)
            before.update(contents(tmp_path / "out"))

    with pytest.raises(OutputError, match="output exists"):
        decompose_to(tmp_path / "out", [first, before_reading(second, module_of(second), act)])
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="has no directory that none may write to"
)
@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/sys/out"])
def test_an_unwritable_output_directory_is_reported(plain, out):
    with pytest.raises(OutputError, match=f"cannot write '{out}/.*nothing was changed"):
        from_files_to_files(out, plain)
    assert not Path(out).exists()


def test_an_output_directory_that_is_a_file_is_reported(tmp_path, plain):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="it is a file, expected a directory"):
        from_files_to_files(tmp_path / "out", plain)
    assert (tmp_path / "out").read_text() == "mine"
    assert_nothing_but(tmp_path, "in", "out")


@pytest.mark.parametrize("form", ["direct", "spooled"])
def test_a_working_directory_that_vanishes_is_reported(tmp_path, plain, form):
    first, second = from_files(plain)

    def act():
        for path in tmp_path.glob(".devec-*"):
            shutil.rmtree(path)

    with pytest.raises(OutputError, match="cannot write"):
        decompose_to(
            tmp_path / "out",
            [first, before_reading(second, module_of(second), act)],
            **vars(FORMS[form]),
        )
    assert_nothing_but(tmp_path, "in")


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, plain):
    def report(_):
        def write(path):
            path.write_text("half")
            raise OSError(28, "No space left on device")

        return write

    with pytest.raises(OutputError, match="No space left"):
        with_report(tmp_path / "out", plain, (tmp_path / "r.json", report))
    assert_nothing_but(tmp_path, "in")
