"""The command line in processes of its own, forked from one in which libraries are loaded."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from support.patience import patience

_LOADED = [
    "torch",
    "accelerate",
    "devec",
    "devec.cli",
    "devec.streaming.decompose_to",
    "devec.formats",
]


@dataclass
class Child:
    """A process that runs the command line, and the directory with what it says."""

    process: multiprocessing.Process
    log: Path

    @property
    def printed(self):
        return (self.log / "printed").read_text()

    @property
    def peak(self):
        """The most memory that it had, in bytes; on Linux, once it has ended by itself."""
        return int((self.log / "peak").read_text())

    def until(self, text):
        """Wait until it has printed a text."""
        deadline = time.monotonic() + patience()
        while text not in self.printed:
            assert self.process.is_alive(), self.printed
            assert time.monotonic() < deadline, f"{text!r} was not printed: {self.printed}"
            time.sleep(0.01)
        return self

    def send(self, sign):
        os.kill(self.process.pid, sign)
        (self.log / "signalled").touch()
        return self

    def ends(self):
        """Wait until it has ended; returns its exit code, for a signal minus its number."""
        self.process.join(patience())
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGABRT)  # faulthandler prints what each thread does
            self.process.join(10)
            self.process.kill()
            raise AssertionError(f"it does not end: {self.printed}")
        return self.process.exitcode


def start(log, *arguments, before=None, **environment):
    """Start the command line, with a directory for what it says.

    `before` is called in the process first; it is a function of a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    log.mkdir(parents=True, exist_ok=True)
    (log / "printed").touch()
    arguments = [str(argument) for argument in arguments]
    process = context.Process(target=_run, args=(log, arguments, environment, before))
    process.start()
    return Child(process, log)


def run(log, *arguments, **options):
    """Run the command line to its end; returns exit code and what it printed."""
    child = start(log, *arguments, **options)
    return child.ends(), child.printed


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_team(directory, size, *arguments, before=None):
    """Start as many processes as a launcher would, in one job."""
    return start_calls(directory, [arguments] * size, before=before)


def start_calls(directory, calls, before=None):
    """Start the processes of one job, each with arguments of its own."""
    size = len(calls)
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        start(
            directory / str(rank),
            *arguments,
            before=before,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **job,
        )
        for rank, arguments in enumerate(calls)
    ]


def _run(log, arguments, environment, before):
    with (log / "printed").open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(all_threads=True)
    os.environ.update(environment, DEVEC_SIGNALLED=str(log / "signalled"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    from devec.cli import main

    sys.argv = ["devec", *arguments]
    try:
        main()
    finally:
        (log / "peak").write_text(str(_status("VmHWM")))


def _status(field):
    """A figure of the memory of this process in bytes, 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


# What may happen to a process; here, so that it is there without the modules of tests.


def at_work(act, rank=0):
    """Do something in the process of a rank whenever it computes a basis."""
    from devec.decomposition.stacks.stack import Stack

    if os.environ.get("RANK", "0") != str(rank):
        return
    basis = Stack.basis

    def acting(self, name):
        act()
        return basis(self, name)

    Stack.basis = acting


def die():
    """End at once, as if out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    """Fail as a file that was changed meanwhile makes it."""
    from devec.errors import FormatError

    raise FormatError("adapter.safetensors was changed while it was being read")


def linger():
    """Say that the outputs have their names, and take long for the rest."""
    from devec.files.staging import Staging

    commit = Staging.commit

    def committing(self, *arguments):
        commit(self, *arguments)
        print("all is written", flush=True)
        time.sleep(patience())

    Staging.commit = committing


def dawdle():
    """Say that the work has begun, and go on with it only after a signal was sent, and slowly."""
    print("at work", flush=True)
    while not Path(os.environ["DEVEC_SIGNALLED"]).exists():
        time.sleep(0.01)
    time.sleep(0.5)  # a signal interrupts the main thread, whichever thread this is


def two_threads():
    """Work on two cores, however many there are."""
    import torch

    torch.set_num_threads(2)


def little_memory(room):
    """Leave so many bytes beside what the process has once it has done a little work."""
    import resource

    import torch

    import devec.streaming.job

    torch.set_num_threads(1)
    original = devec.streaming.job.run_job

    def limited(*arguments, **options):
        X = torch.randn(64, 8)
        torch.linalg.svd(X), torch.linalg.eigh(X.T @ X), torch.linalg.qr(X)
        limit = _status("VmSize") + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return original(*arguments, **options)

    devec.streaming.job.run_job = limited
