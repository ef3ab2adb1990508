"""Fill in what the pages take from elsewhere: results, outputs of notebooks, the command line.

    python docs/generate.py

rewrites, in README.md and in every page of docs, the text between a mark and its end:

    <!-- results: SECTION / TABLE / COLUMN, COLUMN -->   a table of benchmarks/results.json
    <!-- dora: TABLE -->                                 a table of benchmarks/dora_demo.json
    <!-- output: NOTEBOOK / PATTERN -->                  lines that a notebook printed
    <!-- run: COMMAND => PATTERN -->                     a command and what it prints
    <!-- help: COMMAND -->                               a command's arguments and options
    <!-- end -->

Columns are optional, and so is the pattern of the lines to show. `tests/contracts/test_docs.py`
compares every block with what this program would write.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(DOCS)]  # for benchmarks and pool

import pool
import typer
from benchmarks import results
from typer.testing import CliRunner

from devec.cli import app

BLOCK = re.compile(
    r"(?P<mark><!-- (?P<kind>results|dora|output|run|help): (?P<what>.+?) -->\n)"
    r"(?P<text>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)
BUILT = {"_build", "notebooks"}


def pages() -> list[Path]:
    """README.md and the pages of docs that are kept in the repository."""
    found = [path for path in DOCS.rglob("*.md") if not BUILT & set(path.relative_to(DOCS).parts)]
    return [ROOT / "README.md", *sorted(found)]


def fenced(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def results_table(what: str) -> str:
    """A table of the benchmarks, or some of its columns."""
    section, title, *columns = (part.strip() for part in what.split(" / "))
    measured = results.load(ROOT / "benchmarks" / "results.json")[section].section
    (table,) = [table for table in measured.tables if table.title == title]
    names = [name.strip() for name in columns[0].split(",")] if columns else list(table.units)
    units = {name: table.units[name] for name in names}
    lines = results.render_table(results.Table(title, units, table.rows)).splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def dora_table(what: str) -> str:
    """A table of the benchmark of trained DoRAs."""
    from benchmarks import dora_demo

    stored = ROOT / "benchmarks" / "dora_demo.json"
    tables = json.loads(stored.read_text(encoding="utf-8"))
    if what == "errors":
        header = ["loaded", "weights", "error of ΔW", "largest error of logits", "other answers"]
        rows = list(dora_demo.error_cells(tables["errors"]))
    elif what == "own":
        header = ["domain", *(kinds := ("base", "original", "shared", "unique"))]
        own = [*tables["own"], {"domain": "mean", **dora_demo.means(tables["own"], kinds)}]
        rows = [[row["domain"], *(dora_demo.share(row[kind]) for kind in kinds)] for row in own]
    elif what == "negations":
        header = ["part", "weight", "own domain", "other domains"]
        rows = [
            [r["part"], f"{r['weight']:g}", dora_demo.share(r["own"]), dora_demo.share(r["others"])]
            for r in dora_demo.mean_negations(tables["negations"])
        ]
    else:
        raise ValueError(f"expected errors, own or negations, got {what!r}")
    rule = "---|" + "---:|" * (len(header) - 1)
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def printed(notebook: str) -> list[str]:
    """All lines that the cells of a notebook printed, in order."""
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    streams = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in streams).splitlines()


def notebook_output(what: str) -> str:
    """The lines that a notebook printed and that a pattern is found in, each once."""
    notebook, pattern = what.split(" / ", 1)
    lines = dict.fromkeys(line for line in printed(notebook) if re.search(pattern, line))
    if not lines:
        raise ValueError(f"notebook {notebook!r} printed no line with {pattern!r}")
    return fenced("text", "\n".join(lines))


def command_run(what: str) -> str:
    """A command, run where the adapters of the guides are, and what it prints."""
    command, _, pattern = what.partition(" => ")
    program, *words = shlex.split(command)
    if program != "devec":
        raise ValueError(f"expected a command of devec, got {command!r}")
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    if ran.exit_code:
        raise ValueError(f"{command!r} ended with {ran.exit_code}: {ran.output}")
    lines: list[str] = []
    for line in map(str.rstrip, ran.stdout.strip("\n").splitlines()):
        if re.search(pattern, line):
            lines.append(line)
        elif lines[-1:] != ["…"]:
            lines.append("…")
    shown = "\n".join(narrowed(lines) if pattern else lines)
    return f"{fenced('sh', command)}\n\n{fenced('text', shown)}"


def narrowed(lines: Sequence[str]) -> list[str]:
    """A printed table with columns no wider than the rows that are left of it need."""
    rows = [re.split(r" {2,}", line) for line in lines]
    wide = max(map(len, rows))
    if wide == 1:
        return list(lines)
    widths = [max(len(row[i]) for row in rows if len(row) == wide) for i in range(wide)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))])
        if len(row) == wide
        else line
        for row, line in zip(rows, lines, strict=True)
    ]


def command_help(name: str) -> str:
    """Usage, arguments and options of a command, from typer."""
    group = typer.main.get_command(app)
    command = group.commands[name]
    context = command.make_context(name, [], resilient_parsing=True)
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "").strip()
    rows = [
        (_spelled(option), _meaning(option))
        for option in command.get_params(context)
        if option.name != "help"
    ]
    table = ["| | |", "|---|---|", *(f"| `{spelled}` | {meaning} |" for spelled, meaning in rows)]
    usage = " ".join(["devec", name, *command.collect_usage_pieces(context)])
    usage = re.sub(r"\{(\w+)\}", r"\1", usage)
    return "\n\n".join([fenced("text", usage), text.replace("  ", " "), "\n".join(table)])


def _spelled(option: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    """An option as it is typed, with its value."""
    if option.param_type_name == "argument":
        return f"{option.metavar}..." if option.nargs != 1 else str(option.metavar)
    flag = "" if option.is_flag else f" {option.metavar}"
    return f"{option.opts[-1]}{flag}".replace("|", "\\|")


def _meaning(option: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    """What an option is for, and its default."""
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    text = re.sub(r"(--[a-z-]+)", r"`\1`", text)
    if option.required:
        return f"{text} Required."
    shown = option.default if isinstance(option.default, str | float) else None
    text = re.sub(r"\[default: (.+?)\]", r"Default: \1.", text)
    return f"{text} Default: `{shown}`." if shown and not option.is_flag else text


KINDS: dict[str, Callable[[str], str]] = {
    "results": results_table,
    "dora": dora_table,
    "output": notebook_output,
    "run": command_run,
    "help": command_help,
}


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, subject and present text of every generated block of a page."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found["kind"], found["what"], found["text"].strip("\n")


def generated(kind: str, what: str) -> str:
    """What belongs between a mark and its end."""
    return KINDS[kind](what)


def fill(page: Path) -> bool:
    """Write a page again if one of its blocks has changed; return whether one has."""
    before = page.read_text(encoding="utf-8")
    after = BLOCK.sub(
        lambda m: f"{m['mark']}\n{generated(m['kind'], m['what'])}\n\n{m['end']}", before
    )
    if after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def main(names: Sequence[str]) -> None:
    """Fill in every page, or those that are named; each has a fresh copy of the adapters."""
    chosen = [Path(name).resolve() for name in names] or pages()
    for page in chosen:
        with tempfile.TemporaryDirectory() as directory:
            pool.collect(Path(directory))
            here = Path.cwd()
            os.chdir(directory)
            try:
                if fill(page):
                    print(f"changed: {page.relative_to(ROOT)}")
            finally:
                os.chdir(here)


if __name__ == "__main__":
    main(sys.argv[1:])
