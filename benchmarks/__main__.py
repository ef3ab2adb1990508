"""Measure speed and memory of devec, and of the alternatives it is compared with.

    python -m benchmarks [--only SECTION]... [--quick] [--out PATH] [--repeats N] [--folder DIR]

Each section is written as soon as it is measured: to ``RESULTS.md`` and, as numbers, to
``results.json`` beside it. Sections that were not run keep their earlier results. `--quick` checks
in seconds that all benchmarks run; it writes nothing unless `--out` is given.
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
    """The requested sections in order; all if none was requested."""
    return [name for name in SECTIONS if not only or _groups(name) & set(only)]


def _groups(name: str) -> set[str]:
    """The names by which a section can be requested: its own, and the part before the hyphen."""
    return {name, name.partition("-")[0]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    names = sorted(set().union(*map(_groups, SECTIONS)))
    parser.add_argument("--only", action="append", choices=names, help="section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that all runs")
    parser.add_argument("--out", type=Path, help="page to write; default: benchmarks/RESULTS.md")
    parser.add_argument("--repeats", type=int, help="number of measurements of each figure")
    parser.add_argument("--folder", type=Path, help="folder for generated files, removed after use")
    parser.add_argument("--threads", type=int, help="threads of torch; default: one per core")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    """The command line as recorded in the results, without paths."""
    words = ["python", "-m", "benchmarks"]
    for name in options.only or ():
        words += ["--only", name]
    words += ["--quick"] if options.quick else []
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value else []
    return shlex.join(words)


def measured(name: str, settings: Settings, command: str) -> Measured:
    """Measure one section."""
    result = importlib.import_module(f"benchmarks.{SECTIONS[name]}").section(settings)
    today = datetime.date.today().isoformat()
    host = machine(settings.threads)
    return Measured(result, command, today, host, versions(), settings.quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write all requested sections; arguments default to `sys.argv[1:]`."""
    options = parse(arguments)
    threads = {"threads": options.threads} if options.threads else {}
    settings = Settings(options.folder, options.quick, options.repeats, **threads)
    out = options.out or (None if options.quick else RESULTS)
    for name in chosen(options.only):
        print(f"{name} …", file=sys.stderr, flush=True)
        result = measured(name, settings, command(options))
        print(render_section(result.section), end="\n\n", flush=True)
        if out is not None:
            numbers = out.with_name("results.json")
            results = {**load(numbers), name: result}
            results = {section: results[section] for section in SECTIONS if section in results}
            save(numbers, results)
            out.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
