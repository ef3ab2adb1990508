"""Damages adapters in thousands of ways; all must be read well or refused with a `DevecError`.

In the folder tests:

python -m support.fuzzing.fuzz --cases 100000 --seed 1
python -m support.fuzzing.fuzz --only 4711 --keep DIR     # one case again, its files kept
"""

import argparse
import contextlib
import faulthandler
import io
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from devec import Adapter, DevecError, convert, decompose
from devec.base_model.model import BaseModel
from devec.cli.inspect import inspect_command
from devec.errors import IncompatibleError
from support.fuzzing.damage import directories, make_case, originals

SECONDS = 5  # of the processor, so that what else it does is not held against a case
MEMORY = 64 << 20  # beyond what is in use, for files of a few KB: pages of torch and the allocator


class TooSlowError(Exception):
    """A case took longer than `SECONDS`."""


class AnyModel(BaseModel):
    """A base model that has every small module there is, with random weights."""

    source = "any"

    def weight(self, module, shape, **_):  # noqa: ARG002
        return AnyWeight(shape)


@dataclass(frozen=True)
class AnyWeight:
    """A random weight of a shape."""

    shape: tuple[int, int]
    source = "any"

    def read(self, dtype, device):
        if math.prod(self.shape) > 1 << 20:
            raise IncompatibleError(f"no model has a module of shape {self.shape}")
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def exercise(case, folder):
    """Read the files of a case and do with them what users do; what is written must be readable."""
    rng = random.Random(str(case.path) + case.original)
    path = folder / case.path
    base = AnyModel("any")
    adapter = Adapter.from_pretrained(
        path, "damaged", allow_pickle=case.allow_pickle, base=base if rng.random() < 0.8 else None
    )
    with contextlib.redirect_stdout(io.StringIO()):
        inspect_command(
            str(path), modules=True, json=folder / "report", allow_pickle=case.allow_pickle
        )
    again = Adapter.from_pretrained(adapter.save_pretrained(folder / "again"), "damaged")
    assert len(again.modules) == len(adapter.modules), "modules are lost when they are saved"
    with contextlib.suppress(DevecError):
        wanted = rng.choice(["kohya", "diffusers", "peft"])
        Adapter.from_pretrained(convert(adapter, wanted).save_pretrained(folder / "converted"))
    adapter.norm()
    original = folder / "original.safetensors"
    original.write_bytes(originals()[case.original or "kohya_sd15"])
    parts = decompose([Adapter.from_pretrained(original, base=base), adapter])
    for name, part in parts.outputs(compact=rng.random() < 0.5).items():
        part.save_pretrained(folder / f"part-{name}")


def peak_memory():
    """The most memory that this process ever had in use, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    """Raises `TooSlowError` in what takes longer."""

    def stop(*_):
        raise TooSlowError

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def run_case(number, keep=None):
    """Outcome of a case: its kind, and the traceback if it went wrong."""
    case = make_case(number)
    memory = Path("/dev/shm")  # where flushing costs nothing
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    if keep:
        shutil.copytree(folder, keep, dirs_exist_ok=True)
    used = peak_memory()
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exercise(case, folder)
    except DevecError as error:
        outcome = type(error).__name__, ""
    except Exception:  # whatever else it is, it is what is looked for
        outcome = "failed", traceback.format_exc()
    else:
        outcome = "read", ""
    finally:
        shutil.rmtree(folder)
    grown = peak_memory() - used
    if grown > MEMORY and outcome[0] != "failed":
        return "failed", f"{grown >> 20} MiB for {sum(map(len, case.files.values()))} bytes"
    return outcome


@contextlib.contextmanager
def limited(space=4 << 30):
    """No more address space than this beyond what is in use: then allocations fail."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + space, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(numbers):
    """Counts of outcomes, and by its traceback each failure with the numbers of its cases."""
    directories(), run_case(-1)
    counts, failures = Counter(), {}
    with limited():
        for number in numbers:
            kind, text = run_case(number)
            counts[kind] += 1
            if text:
                lines = [line.strip() for line in text.splitlines() if 'File "' in line]
                last = text.strip().splitlines()[-1].split(":")[0]
                failures.setdefault((last, *lines[-4:]), (text, []))[1].append(number)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        print(*run_case(options.only, options.keep), sep="\n")
        return
    faulthandler.enable()
    first = options.seed * 10_000_000
    counts, failures = run(range(first, first + options.cases))
    for text, numbers in failures.values():
        print(f"{len(numbers)} times, first in --only {numbers[:3]}:\n{text}")
    print(dict(counts), f"{len(failures)} different failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
