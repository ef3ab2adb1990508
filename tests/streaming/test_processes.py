"""Several processes share a decomposition and write the one result; if one dies, nothing."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file

from devec.errors import FormatError
from devec.streaming.processes import Team
from support.adapters.cases import make_base, save_kohya
from support.adapters.peft_doras import save_dora
from support.checks.streamed import contents, from_files_to_files, tree
from support.paths import TESTS
from support.patience import patience
from support.processes.children import at_work, die, fail, free_port, run, start_calls, start_team

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
]


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Kohya's files, of modules of two shapes."""
    root = tmp_path_factory.mktemp("pool")
    return [save_kohya(root / f"{name}.safetensors", index) for index, name in enumerate("abc")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, pool):
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    from_files_to_files(out, pool, threshold=0.5)
    return contents(out)


def decompose(pool, out, *options):
    return "decompose", *pool, "--out", out, "--threshold", "0.5", *options


# --- they write what one writes ------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_write_every_byte_as_one_does(tmp_path, pool, alone, size):
    """Three are more than there are shapes of modules."""
    team = start_team(tmp_path / "logs", size, *decompose(pool, tmp_path / "out"))
    assert [child.ends() for child in team] == [0] * size
    first, *others = (child.printed for child in team)
    assert f"{size} processes shared the work." in first
    assert "Written: " in first
    assert others == [""] * (size - 1)
    assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("options", [("--compact",), ("--scope", "pairwise")], ids=str)
def test_parts_that_are_put_by_are_gathered(tmp_path, pool, options):
    team = start_team(tmp_path / "logs", 2, *decompose(pool, tmp_path / "two", *options))
    assert [child.ends() for child in team] == [0, 0]
    code, printed = run(tmp_path / "log", *decompose(pool, tmp_path / "one", *options))
    assert code == 0, printed
    assert "processes shared" not in printed
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_doras_are_divided_too(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(make_base("linear").state_dict(), tmp_path / "base" / "model.safetensors")
    pool = [save_dora(tmp_path / name, "linear", index=i) for i, name in enumerate("ab")]
    options = ("--base", tmp_path / "base")
    team = start_team(tmp_path / "logs", 2, *decompose(pool, tmp_path / "two", *options))
    assert [child.ends() for child in team] == [0, 0], [child.printed for child in team]
    assert run(tmp_path / "log", *decompose(pool, tmp_path / "one", *options))[0] == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert any("unique" in name for name in tree(tmp_path / "two"))


def test_accelerate_launches_them(tmp_path, pool, alone):
    arguments = map(str, decompose(pool, tmp_path / "out"))
    options = {
        "num_machines": 1,
        "num_processes": 2,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": free_port(),
    }
    launch = [f"--{option}={value}" for option, value in options.items()]
    ran = subprocess.run(  # of CPUs alone accelerate starts one process, unless asked like this
        [*LAUNCH, "--multi_gpu", *launch, "-m", "devec", *arguments],
        capture_output=True,
        text=True,
        timeout=patience(),
        check=False,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("2 processes shared the work.") == 1
    assert contents(tmp_path / "out") == alone


def launched(out, *arguments):
    """Run teams.py in three processes; returns what each of them left."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
    script = TESTS / "support" / "processes" / "teams.py"
    ran = subprocess.run(
        [*launch, f"--master-port={free_port()}", script, out, *arguments],
        capture_output=True,
        text=True,
        timeout=patience(),
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return [(out / f"{rank}.txt").read_text().splitlines() for rank in range(3)]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_process_groups_end_before_the_processes_do(tmp_path, pool, alone):
    """Threads of a group that are left when the interpreter has ended abort the process."""
    said = launched(tmp_path, *pool, "--threshold", "0.5")
    assert said == 3 * [
        [
            "ended with 0",
            "ended with 0",
            "gathered: [0, 1, 2]",
            "threads of the group end with it: True",
            "the default group sums 3",
            "groups at the end: False",
        ]
    ]
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == alone


def test_a_group_that_the_caller_has_made_is_left_to_the_caller(tmp_path):
    said = launched(tmp_path)
    assert said == 3 * [["gathered: [0, 1, 2]", "the caller's group sums 3"]]


# --- faults -------------------------------------------------------------------------------------


def visible(directory):
    return [path for path in Path(directory).iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("dead", [0, 1])
def test_if_one_is_killed_nothing_is_written_and_a_rerun_works(tmp_path, pool, alone, dead):
    here = tmp_path / "here"
    here.mkdir()
    team = start_team(
        tmp_path / "logs", 2, *decompose(pool, here / "out"), before=partial(at_work, die, dead)
    )
    codes = [child.ends() for child in team]
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 2
    [message] = [line for line in team[1 - dead].printed.splitlines() if "error: " in line]
    assert "another of the 2 processes ended before its work was done" in message
    assert "nothing was written" in message
    assert "Traceback" not in team[1 - dead].printed
    assert not visible(here)
    from_files_to_files(here / "out", pool, threshold=0.5)
    assert contents(here / "out") == alone
    assert [path.name for path in here.iterdir()] == ["out"]


def test_if_one_fails_the_others_say_what_failed(tmp_path, pool):
    here = tmp_path / "here"
    here.mkdir()
    team = start_team(
        tmp_path / "logs", 2, *decompose(pool, here / "out"), before=partial(at_work, fail, 1)
    )
    assert [child.ends() for child in team] == [2, 2]
    assert "error: process 1 of 2 failed: adapter.safetensors was changed" in team[0].printed
    assert not any("Traceback" in child.printed for child in team)
    assert not list(here.iterdir())


def test_outputs_that_exist_are_refused_by_all(tmp_path, pool):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "common.safetensors").write_text("mine")
    team = start_team(tmp_path / "logs", 2, *decompose(pool, tmp_path / "out"))
    assert [child.ends() for child in team] == [2, 2]
    assert "output exists" in team[0].printed
    assert (tmp_path / "out" / "common.safetensors").read_text() == "mine"


@pytest.mark.parametrize("other", ["threshold", "order", "file"])
def test_processes_that_were_asked_different_things_are_refused(tmp_path, pool, other):
    """By the one process that knows what all were asked."""
    twin = save_kohya(tmp_path / "twin" / "c.safetensors", 7)
    asked = {
        "threshold": decompose(pool, tmp_path / "out", "--threshold", "0.6"),
        "order": decompose([pool[1], pool[0], pool[2]], tmp_path / "out"),
        "file": decompose([*pool[:2], twin], tmp_path / "out"),
    }
    calls = [decompose(pool, tmp_path / "out"), asked[other]]
    team = start_calls(tmp_path / "logs", calls)
    assert [child.ends() for child in team] == [2, 2]
    assert "the processes were not given the same sources and options" in team[0].printed
    assert not (tmp_path / "out").exists()


# --- what is not divided ------------------------------------------------------------------------


def test_other_commands_are_not_divided(tmp_path, pool):
    code, printed = run(tmp_path / "log", "inspect", pool[0], WORLD_SIZE="2", RANK="0")
    assert code == 2
    assert printed == (
        "error: 2 processes were launched, which only 'decompose' divides its work among; "
        "run 'devec inspect' by itself\n"
    )


def test_one_process_is_a_team_of_its_own():
    team = Team()
    assert (team.rank, team.size, team.is_first) == (0, 1, True)
    assert team.share([1, 2, 3]) == [1, 2, 3]
    assert team.device("cuda") == "cuda"
    assert team.gather(lambda: "value") == ["value"]
    with pytest.raises(FormatError, match="broken"):
        team.gather(_raise)


def _raise():
    raise FormatError("broken")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_item_is_one_process_s(size):
    teams = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        teams.append(team)
    items = list(range(7))
    assert sorted(item for team in teams for item in team.share(items)) == items
