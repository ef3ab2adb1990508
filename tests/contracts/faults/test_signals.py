"""Signals, and what processes leave that end by one."""

import signal
import sys
from functools import partial

import pytest

from devec.files.staging import Staging
from support.checks.leftovers import assert_nothing_but
from support.checks.streamed import from_files_to_files, tree
from support.processes.children import at_work, dawdle, die, linger, run, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="open files are not replaced there"),
]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_nothing_to_be_seen(tmp_path, plain, sign):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    child = start(tmp_path / "log", *arguments, before=partial(at_work, dawdle)).until("at work")
    code = child.send(sign).ends()
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[sign]
    assert "Traceback" not in child.printed
    hidden = list(tmp_path.glob(".devec-*"))
    assert bool(hidden) == (sign is signal.SIGKILL)
    assert_nothing_but(tmp_path, "in", "log", *(path.name for path in hidden))
    if sign is not signal.SIGKILL:
        assert child.printed.count("error: ") == 1
        assert child.printed.endswith("ed; nothing was written\n")
    from_files_to_files(tmp_path / "out", plain)
    assert_nothing_but(tmp_path, "in", "log", "out")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_after_writing_says_what_it_has_written(tmp_path, plain, sign):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    child = start(tmp_path / "log", *arguments, before=linger).until("all is written")
    assert child.send(sign).ends() == 128 + sign
    (message,) = [line for line in child.printed.splitlines() if "error: " in line]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "nothing was written" not in message
    assert "; written: " in message
    assert any(f"{name}'" in message for name in names)
    assert_nothing_but(tmp_path, "in", "log", "out")


def test_a_process_that_dies_by_itself_is_cleaned_up_after(tmp_path, plain):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    code, _ = run(tmp_path / "log", *arguments, before=partial(at_work, die))
    assert code == -signal.SIGKILL
    assert len(list(tmp_path.glob(".devec-*"))) == 1
    code, printed = run(tmp_path / "log", *arguments)
    assert code == 0, printed
    assert_nothing_but(tmp_path, "in", "log", "out")


def test_what_another_process_works_on_is_left_alone(tmp_path, plain):
    target = tmp_path / "other" / "a"
    target.parent.mkdir()
    with Staging([tmp_path / "mine"], overwrite=False) as staging:
        staging.staged_path(tmp_path / "mine").write_text("mine")
        from_files_to_files(tmp_path / "out", plain)
        assert len(list(tmp_path.glob(".devec-*"))) == 1
        staging.commit([tmp_path / "mine"])
    assert (tmp_path / "mine").read_text() == "mine"
    assert_nothing_but(tmp_path, "in", "mine", "other", "out")


def test_abandoned_directories_are_taken_away_and_others_are_not(tmp_path):
    for name in (".devec-abandoned", ".devec-begun", ".other", "devec-visible"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
    for name in (".devec-abandoned", ".other", "devec-visible"):
        (tmp_path / name / ".lock").touch()
    (tmp_path / ".devec-file").write_text("no directory")
    with Staging([tmp_path / "a"], overwrite=False):
        assert not (tmp_path / ".devec-abandoned").exists()
    left = (".devec-begun", ".devec-file", ".other", "devec-visible")
    assert_nothing_but(tmp_path, *left)  # that without a lock may be on its way to be locked
    assert tree(tmp_path).keys() >= {".other/a", "devec-visible/a"}
