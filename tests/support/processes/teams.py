"""What each of several processes does that a launcher has started; run by test_processes."""

import atexit
import os
import sys
from pathlib import Path

import torch

from devec.cli import main
from devec.streaming.processes import Team


def say(out, text):
    """Leave a line for the test."""
    with (Path(out) / f"{os.environ['RANK']}.txt").open("a") as file:
        file.write(f"{text}\n")


def threads():
    """How many threads this process has, those of libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


def run(out, *arguments):
    """Decompose, twice in one process, and gather again."""
    # what is registered first runs last
    atexit.register(lambda: say(out, f"groups at the end: {torch.distributed.is_initialized()}"))
    size = int(os.environ["WORLD_SIZE"])
    for number in range(2):
        sys.argv = ["devec", "decompose", *arguments, "--out", f"{out}/out{number}"]
        try:
            main()
        except SystemExit as ended:
            say(out, f"ended with {ended.code}")
    before = threads()
    with Team(size) as team:
        say(out, f"gathered: {team.gather(lambda: team.rank)}")
        during = threads()
    say(out, f"threads of the group end with it: {before == threads() < during}")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    say(out, f"the default group sums {int(total)}")
    globals()["unclosed"] = Team(size)  # which the interpreter closes


def guest(out):
    """Use a default group that the caller has made, who goes on with it."""
    torch.distributed.init_process_group("gloo")
    with Team(int(os.environ["WORLD_SIZE"])) as team:
        say(out, f"gathered: {team.gather(lambda: team.rank)}")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    say(out, f"the caller's group sums {int(total)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    (guest if len(sys.argv) == 2 else run)(*sys.argv[1:])
