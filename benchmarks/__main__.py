"""All figures on speed and memory, side by side with what they should be measured against.

    python -m benchmarks [--only SECTION]... [--quick] [--out PATH] [--repeats N] [--folder DIR]

Every section is written as soon as it is measured, to ``RESULTS.md`` and, as numbers, to
``results.json`` beside it. Sections that were not run keep what was measured before. `--quick`
shows in seconds that everything works; it writes nothing unless told where to.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine, versions
from benchmarks.results import Measured, load, render, render_section, save
from benchmarks.settings import Settings

SECTIONS = {
    "decompose-files": "decompose",
    "decompose-llama": "llama",
    "decompose-gpu": "gpu",
    "decompose-dense": "dense",
    "profile": "profile",
    "ablation": "ablation",
    "combine": "combine",
    "compress": "compress",
    "scaling": "scaling",
    "startup": "startup",
    "memory": "speed",
    "products": "products",
    "dora": "dora",
    "live": "live",
}  # name → module of this package with a function `section`
RESULTS = Path(__file__).with_name("RESULTS.md")


def chosen(only: Sequence[str] | None) -> list[str]:
    """The sections that were asked for, in order; all if none was."""
    return [name for name in SECTIONS if not only or _groups(name) & set(only)]


def _groups(name: str) -> set[str]:
    """What a section can be called: its name, and what stands before the hyphen."""
    return {name, name.partition("-")[0]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    names = sorted(set().union(*map(_groups, SECTIONS)))
    parser.add_argument("--only", action="append", choices=names, help="section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--out", type=Path, help="page to write, RESULTS.md beside this program")
    parser.add_argument("--repeats", type=int, help="how often to measure everything")
    parser.add_argument("--folder", type=Path, help="where files are generated, and removed again")
    parser.add_argument("--threads", type=int, help="threads of torch, one a core if not given")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    """The command again, without places."""
    words = ["python", "-m", "benchmarks"]
    for name in options.only or ():
        words += ["--only", name]
    words += ["--quick"] if options.quick else []
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value else []
    return shlex.join(words)


def measured(name: str, settings: Settings, command: str) -> Measured:
    """One section, measured now."""
    found = importlib.import_module(f"benchmarks.{SECTIONS[name]}").section(settings)
    today = datetime.date.today().isoformat()
    place = machine(settings.threads)
    return Measured(found, command, today, place, versions(), settings.quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        arguments: Command line, without the program's name; the process's own if None.
    """
    options = parse(arguments)
    threads = {"threads": options.threads} if options.threads else {}
    settings = Settings(options.folder, options.quick, options.repeats, **threads)
    out = options.out or (None if options.quick else RESULTS)
    for name in chosen(options.only):
        print(f"{name} …", file=sys.stderr, flush=True)
        found = measured(name, settings, command(options))
        print(render_section(found.section), end="\n\n", flush=True)
        if out is not None:
            numbers = out.with_name("results.json")
            kept = {**load(numbers), name: found}
            kept = {section: kept[section] for section in SECTIONS if section in kept}
            save(numbers, kept)
            out.write_text(render(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
