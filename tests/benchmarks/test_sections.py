"""Every section runs at a tiny size and finds finite numbers."""

import contextlib
import io
import json
import math
import shutil
import time
from numbers import Real

import pytest
import torch
from benchmarks import __main__ as program
from benchmarks import decompose, floor, gpu, jobs, llama, startup, timing
from benchmarks.settings import Settings
from benchmarks.timing import Run

from devec.cli import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "error::devec.DevecWarning"),
]

ELSEWHERE = ("decompose-files", "ablation")  # in processes of their own
HERE = (
    "decompose-gpu",  # on the CPU where there is no GPU
    "decompose-dense",
    "profile",
    "combine",
    "compress",
    "memory",
    "products",
    "dora",
    "live",
)
STAND_IN = ("decompose-llama", "scaling", "startup")


def in_this_process(*arguments, threads):
    """What `python` does for a module, without a process: importing torch takes a second each."""
    mark, module, *words = map(str, arguments)
    if mark == "-c":
        return Run(1e-3, 1_000_000, "")
    assert mark == "-m"
    output = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(output):
        if module == "devec":
            app(words, standalone_mode=False)
        else:
            floor.main(words)
    return Run(time.perf_counter() - start, 1_000_000 * threads, output.getvalue())


def run(folder, names):
    words = [word for name in names for word in ("--only", name)]
    program.main([*words, "--quick", "--out", str(folder / "RESULTS.md"), "--folder", str(folder)])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All sections, in three runs, each of which keeps what was there."""
    folder = tmp_path_factory.mktemp("benchmarks")
    threads = torch.get_num_threads()
    run(folder, ELSEWHERE)
    run(folder, HERE)
    with pytest.MonkeyPatch.context() as patch:
        for module in (jobs, startup, timing):
            patch.setattr(module, "python", in_this_process)
        found = run(folder, STAND_IN)
    torch.set_num_threads(threads)
    assert sorted(p.name for p in folder.iterdir()) == ["RESULTS.md", "results.json"]
    return found, (folder / "RESULTS.md").read_text(encoding="utf-8")


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, Real) and not isinstance(value, bool) else []


def rows(results, section, table=0):
    return results[0][section]["section"]["tables"][table]["rows"]


def test_there_are_three_groups_of_all_sections():
    assert sorted([*ELSEWHERE, *HERE, *STAND_IN]) == sorted(program.SECTIONS)


@pytest.mark.parametrize("section", program.SECTIONS)
def test_every_number_is_finite(results, section):
    tables = results[0][section]["section"]["tables"]
    found = numbers([table["rows"] for table in tables] + [table["bars"] for table in tables])
    assert len(found) >= 3
    assert all(map(math.isfinite, found))
    times = [
        row[column]
        for table in tables
        for column, unit in table["units"].items()
        for row in table["rows"]
        if unit == "seconds"
        and row.get(column) is not None
        # differences of two processes at a tiny size can have any sign
        and "without start-up" not in f"{table['title']} {column}".lower()
    ]
    assert min(times) > 0


@pytest.mark.parametrize("table", [0, 1])
def test_every_merge_has_the_optimal_error(results, table):
    *methods, optimal = rows(results, "combine", table)
    assert methods[0]["method"] == "devec"
    assert len(methods) == 5
    assert [row["error"] for row in methods] == pytest.approx(5 * [optimal["error"]], rel=1e-5)
    assert optimal["error"] > 0.01


def test_every_compression_has_the_optimal_error(results):
    *methods, optimal = rows(results, "compress")
    assert [row["error"] for row in methods] == pytest.approx(3 * [optimal["error"]], rel=1e-5)


def test_the_floor_writes_what_devec_writes(results):
    (row,) = rows(results, "decompose-files")
    (wanted,) = decompose.jobs_with_bars(Settings(quick=True))
    assert row["read"] == wanted.job.input_bytes()
    assert row["written"] > 2 * row["read"]
    assert row["memory of devec"] > 50_000_000


def test_the_page_states_commands_ratios_and_bars(results):
    page = results[1]
    top = page[: page.index("## ")]
    for names in (ELSEWHERE, HERE, STAND_IN):
        assert "python -m benchmarks " + " ".join(f"--only {name}" for name in names) in top
    assert "--folder" not in page
    assert page.count("## ") == len(program.SECTIONS)
    assert page.count("Tiny sizes: these figures mean nothing.") == len(program.SECTIONS)
    assert "devec / floor, fsync" in page
    bars = [line for line in page.splitlines() if line.startswith(("- **met**", "- **not met**"))]
    assert len(bars) == 2 + 2 + 2 * 3 + 3
    assert all(", bar " in line for line in bars)
    assert "extrapolated" in page


def test_too_small_a_disk_is_no_silence(monkeypatch, tmp_path):
    monkeypatch.setattr(llama.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    run(tmp_path, ["decompose-llama"])
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "Left out: it needs 0 GB of disk, 0 GB are free." in page


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (table,) = gpu.section(Settings()).tables
    assert table.notes == ["Left out: the machine has no GPU that torch can use."]


def test_a_quick_run_writes_nothing_unasked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "RESULTS", tmp_path / "RESULTS.md")
    program.main(["--only", "products", "--quick"])
    assert "Kronecker" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_groups_and_names():
    assert program.chosen(None) == list(program.SECTIONS)
    of_group = ["decompose-files", "decompose-llama", "decompose-gpu", "decompose-dense"]
    assert program.chosen(["decompose"]) == of_group
    assert program.chosen(["scaling", "combine"]) == ["combine", "scaling"]
    with pytest.raises(SystemExit):
        program.parse(["--only", "everything"])
