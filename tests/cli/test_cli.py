"""The command line does what the functions do, says what it found, and refuses cleanly."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import devec
from devec import Adapter
from devec.cli import app
from devec.cli.shared.tables import module_type

# The command line turns warnings into lines of its own, so here none may become an exception.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("always::devec.DevecWarning"),
]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PARTS = ["a-shared", "a-unique", "b-shared", "b-unique", "common"]
NOTHING_SHARED = ("--threshold", "1")

OPTIONS = {
    "decompose": "out threshold method scope target base compact dtype device json overwrite",
    "combine": "weights out base dtype overwrite",
    "negate": "scale out base dtype overwrite",
    "compress": "rank energy out base dtype device overwrite",
    "overlap": "device json overwrite",
    "inspect": "json overwrite",
}
# What makes each writing command write `out`, or for `decompose` into `out`.
WRITING = {
    "decompose": ["decompose", "a", "b", "--out", "out"],
    "combine": ["combine", "a", "b", "--weights", "1,-0.4", "--out", "out"],
    "negate": ["negate", "a", "--out", "out"],
    "compress": ["compress", "a", "--rank", "3", "--out", "out"],
}
REPORTING = {
    "decompose": ["decompose", "a", "b", "--out", "out"],
    "overlap": ["overlap", "a", "b"],
    "inspect": ["inspect", "a"],
}


def read(path):
    return Adapter.from_pretrained(path)


def strict_json(path):
    """The content of a JSON file, without the literals that JSON has not."""

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def names(directory):
    return sorted(p.name for p in Path(directory).iterdir())


def snapshot(directory):
    """All files with their contents and times, and all directories."""
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None
        for p in Path(directory).rglob("*")
    }


def table(out):
    """The first table printed: first column → the other cells; columns are two spaces apart."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    end = next((i for i, line in enumerate(lines[start:], start) if not line.strip()), len(lines))
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start:end]]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def ranks(adapter):
    return {module: delta.rank for module, delta in adapter.modules.items()}


# --- what there is ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_says_what_it_does(command):
    text = CliRunner().invoke(app, [command, "--help"]).output
    described = dict(re.findall(r"^  --([a-z-]+)(?: [A-Z.,]+)? +(\S.*)$", text, re.M))
    assert set(OPTIONS[command].split()) <= described.keys()
    assert "SOURCE" in text.splitlines()[0] + text.splitlines()[1]


@pytest.mark.parametrize("default", ["0.85", "chain", "all"])
def test_help_names_the_defaults_of_decompose(default):
    text = CliRunner().invoke(app, ["decompose", "--help"]).output
    assert f"[default: {default}]" in " ".join(text.split())


def test_help_lists_every_command(run):
    text = run("--help").wrote().out
    assert set(OPTIONS) <= set(re.findall(r"^  ([a-z]+)  ", text, re.M))


def test_version(run):
    assert run("--version").wrote().out == f"devec {devec.__version__}\n"


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("layers.12.self_attn.q_proj", "layers.*.self_attn.q_proj"),
        ("0.block.1", "*.block.*"),
        ("experts.up[2]", "experts.up[*]"),
        ("conv1.fc2", "conv1.fc2"),
    ],
)
def test_types_of_modules(module, kind):
    assert module_type(module) == kind


# --- a process of its own -----------------------------------------------------------------------


def process(*arguments, command=(sys.executable, "-m", "devec"), **options):
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_answers_at_once():
    start = time.monotonic()
    result = process("--help")
    assert time.monotonic() - start < 2
    assert (result.returncode, result.stderr) == (0, "")
    assert "decompose" in result.stdout


def test_a_process_writes_and_warns(here):
    result = process("decompose", "based0", "based1", "--out", "out", cwd=here)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert re.search(r"^warning: .*'org/base0', 'org/base1'", result.stderr, re.M)
    assert "largest cos²" in result.stdout
    assert len(names("out")) == 5


def test_the_installed_script_refuses(here):
    script = Path(sys.executable).with_name("devec")
    if not script.exists():
        pytest.skip("devec is not installed as a script here")
    result = process("negate", "missing", "--out", "out", command=[script], cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no such file or directory: 'missing'; ")
    assert not Path("out").exists()


def test_output_is_read_to_its_first_line_only(here):
    shell = f"'{sys.executable}' -m devec inspect a | head -n 1"
    result = process(shell, command=["sh", "-c"], cwd=here)
    assert result.stdout.startswith("a: ")
    assert "Traceback" not in result.stderr


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["a", "b"], PARTS),
        (["a", "b", "--scope", "pairwise"], ["a+b-shared"]),
        (
            ["a", "b", "c", "--scope", "pairwise"],
            ["a+b-shared", "a+c-shared", "b+c-shared"],
        ),
        (["c", "a", "b", "--scope", "iterative", "--target", "a"], ["a-shared", "a-unique"]),
        (["anime=a", "b"], ["anime-shared", "anime-unique", "b-shared", "b-unique", "common"]),
        (["x=a", "y=b", "--scope", "pairwise"], ["x+y-shared"]),
        (["x=a", "y=b", "--scope", "iterative", "--target", "y"], ["y-shared", "y-unique"]),
        (["a/", "./b//"], PARTS),
        (["k=1/a", "b"], PARTS),
        (["x=k=1/a", "b"], ["b-shared", "b-unique", "common", "x-shared", "x-unique"]),
        (["k=v", "b"], ["b-shared", "b-unique", "common", "k=v-shared", "k=v-unique"]),
        (["a b=a", "ü=b"], ["a b-shared", "a b-unique", "common", "ü-shared", "ü-unique"]),
    ],
    ids=lambda value: " ".join(value) if "-" not in value[-1] else "",
)
def test_names_of_outputs(run, arguments, written):
    shutil.copytree("a", "k=1/a")
    shutil.copytree("a", "k=v")
    text = run("decompose", *arguments, "--out", "deep/out").wrote().out
    assert names("deep/out") == sorted(written)
    for name in written:
        assert read(f"deep/out/{name}").norm() > 0
        assert f"deep/out/{name}" in text.splitlines()[-1]


def test_the_working_directory_is_a_source(here, run):
    run("decompose", ".", "../b", "--out", "../out", cwd=here / "a").wrote()
    assert names(here / "out") == PARTS


# --- effects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ((), {}),
        (("--threshold", "0.99"), {"threshold": 0.99}),
        (("--threshold", "auto"), {"threshold": "auto"}),
        (("--method", "mean"), {"method": "mean"}),
        (("--method", "principal"), {"method": "principal"}),
        (("--method", "mean", "--threshold", "1e-9"), {"method": "mean", "threshold": 1e-9}),
        (("--scope", "pairwise"), {"scope": "pairwise"}),
        (("--scope", "iterative", "--target", "b"), {"scope": "iterative", "target": "b"}),
        (("--device", "cpu"), {"device": "cpu"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_decompose_writes_what_the_function_returns(run, options, keywords):
    run("decompose", "a", "b", "--out", "out", *options).wrote()
    outputs = devec.decompose([read("a"), read("b")], **keywords).outputs()
    assert names("out") == sorted(outputs)
    for name, want in outputs.items():
        got = read(f"out/{name}")
        assert got == want
        assert got.provenance["parameters"] == want.provenance["parameters"]


@pytest.mark.parametrize("options", [("--threshold", "0.99"), ("--method", "mean")])
def test_options_of_decompose_make_a_difference(run, options):
    run("decompose", "a", "b", "--out", "default").wrote()
    run("decompose", "a", "b", "--out", "other", *options).wrote()
    assert read("default/a-shared") != read("other/a-shared")
    assert read("default/common") != read("other/common")


@pytest.mark.parametrize("name", ["a", "b"])
def test_parts_add_up(run, name):
    run("decompose", "a", "b", "--out", "out").wrote()
    assert read(f"out/{name}-shared") + read(f"out/{name}-unique") == read(name)


def test_compact_parts_have_their_true_ranks(run):
    run("decompose", "a", "b", "--out", "plain").wrote()
    run("decompose", "a", "b", "--out", "compact", "--compact").wrote()
    assert names("compact") == PARTS
    for name in PARTS:
        assert devec.distance(read(f"compact/{name}"), read(f"plain/{name}")) < 1e-5
    assert set(ranks(read("plain/a-shared")).values()) == {6}
    assert set(ranks(read("compact/a-shared")).values()) == {2}
    assert set(ranks(read("compact/a-unique")).values()) == {4}


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        (["--weights", "1.0,-0.4"], [1.0, -0.4]),
        (["--weights", "-1,0.5"], [-1, 0.5]),
        (["--weights=-1,0.5"], [-1, 0.5]),
        (["--weights", "-.5, 2e-1"], [-0.5, 0.2]),
        (["--weights", "0,1"], [0, 1]),
    ],
    ids=str,
)
def test_combine(run, weights, numbers):
    text = run("combine", "a", "b", *weights, "--out", "out").wrote().out
    want = devec.combine([read("a"), read("b")], numbers)
    assert read("out") == want
    assert f"norm {want.norm():.4g}" in text
    assert ranks(read("out")) == {"first.layer": 10, "second.layer": 10}


def test_combine_takes_one_or_many(run):
    run("combine", "a", "--weights", "2", "--out", "one").wrote()
    assert read("one") == 2 * read("a")
    run("combine", "a", "b", "c", "--weights", "1,2,-3", "--out", "three").wrote()
    assert read("three") == read("a") + 2 * read("b") - 3 * read("c")


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0, 0.0])
def test_negate(run, scale):
    options = [] if scale is None else ["--scale", scale]
    run("negate", "a", "--out", "out", *options).wrote()
    assert read("out") == -(1.0 if scale is None else scale) * read("a")
    assert ranks(read("out")) == ranks(read("a"))


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 1), ("rank", 3), ("rank", 99), ("energy", 0.8), ("energy", 1.0)]
)
def test_compress(run, option, value):
    text = run("compress", "a", f"--{option}", value, "--out", "out").wrote().out
    want = devec.compress(read("a"), **{option: value})
    assert read("out") == want.adapter
    assert ranks(read("out")) == ranks(want.adapter)
    assert f"relative error {want.error:.3g}" in text
    rows = table(text)
    assert {kind: row["now"] for kind, row in rows.items()} == {
        module: str(rank) for module, rank in ranks(want.adapter).items()
    }
    assert rows["first.layer"]["error"] == f"{want.errors['first.layer']:.3g}"


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize(
    ("name", "dtype", "rtol"),
    [
        ("float16", torch.float16, 1e-3),
        ("fp16", torch.float16, 1e-3),
        ("bfloat16", torch.bfloat16, 8e-3),
        ("bf16", torch.bfloat16, 8e-3),
        ("float64", torch.float64, 1e-6),
        ("fp32", torch.float32, 1e-6),
    ],
)
def test_dtype(run, command, name, dtype, rtol):
    run(*WRITING[command], "--dtype", name).wrote()
    stored = Path("out/common" if command == "decompose" else "out")
    assert {t.dtype for t in load_file(stored / WEIGHTS).values()} == {dtype}
    shutil.move("out", "narrow")
    run(*WRITING[command]).wrote()
    exact = read(stored)
    assert devec.distance(read("narrow" / stored.relative_to("out")), exact) < rtol * exact.norm()


@pytest.mark.parametrize("command", WRITING)
def test_base_is_put_on_record(run, command):
    run(*WRITING[command], "--base", "org/model").wrote()
    written = sorted(Path("out").rglob(CONFIG))
    assert len(written) == (5 if command == "decompose" else 1)
    for config in written:
        assert strict_json(config)["base_model_name_or_path"] == "org/model"


def test_tensors_that_are_no_deltas_are_named(run):
    head = "base_model.model.head.weight"
    text = run("decompose", "head0", "head1", "--out", "out").wrote().out
    for name in ("head0", "head1"):
        assert re.search(rf"{name}-unique.*not a delta.*{head}", text)
        assert head in load_file(f"out/{name}-unique/{WEIGHTS}")
        assert head not in load_file(f"out/{name}-shared/{WEIGHTS}")
    run("negate", "head0", "--out", "negated").refused("head0", head, "--carried-from")
    run("negate", "head0", "--out", "negated", "--carried-from", "none").wrote()
    assert head not in load_file(f"negated/{WEIGHTS}")
    pair = ["combine", "head0", "head1", "--weights", "1,1", "--out", "sum"]
    run(*pair).refused("head0", head, "--carried-from")
    run(*pair, "--carried-from", "head1").wrote()
    assert torch.equal(load_file(f"sum/{WEIGHTS}")[head], read("head1").carried[head])


# --- what is said --------------------------------------------------------------------------------


def test_decompose_prints_a_row_for_each_type_of_module(run):
    parts = devec.decompose([read("deep0"), read("deep1")])
    rows = table(run("decompose", "deep0", "deep1", "--out", "out").wrote().out)
    best = max(parts.splits, key=lambda s: s.largest)
    shared = sum(n**2 for s in parts.splits for n in s.shared_norms)
    energy = shared / sum(n**2 for s in parts.splits for n in s.norms)
    assert rows == {
        "layers.*": {
            "modules": "3",
            "rank": "4-6",
            "shared rank": "2",
            "shared energy": f"{100 * energy:.1f} %",
            "largest cos²": f"{best.largest:.3f}",
            "random edge": f"{best.edge:.3f}",
            "threshold": "0.850",
        }
    }


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        (["--scope", "pairwise"], [("a", "b"), ("a", "c"), ("b", "c")]),
        (["--scope", "iterative", "--target", "b"], [("b", "a"), ("b", "c")]),
    ],
    ids=["pairwise", "iterative"],
)
def test_decompose_prints_and_reports_every_group(run, arguments, groups):
    text = run("decompose", "a", "b", "c", "--out", "out", "--json", "r.json", *arguments).out
    modules = ("first.layer", "second.layer")
    assert set(table(text)) == {f"{x} + {y}: {m}" for x, y in groups for m in modules}
    reported = [(tuple(row["group"]), row["module"]) for row in strict_json("r.json")["modules"]]
    assert sorted(reported) == sorted((group, m) for group in groups for m in modules)


@pytest.mark.parametrize("threshold", ["0.85", "auto"])
def test_json_of_decompose_has_all_that_was_found(run, threshold):
    sources = [read(name) for name in ("a", "b", "c")]
    level = threshold if threshold == "auto" else float(threshold)
    want = devec.decompose(sources, threshold=level, method="mean").splits
    options = ["--threshold", threshold, "--method", "mean", "--json", "sub/r.json"]
    run("decompose", "a", "b", "c", "--out", "out", *options).wrote()
    report = strict_json("sub/r.json")
    assert sorted(report["written"]) == names("out")
    assert len(report["modules"]) == len(want)
    for row, split in zip(report["modules"], want, strict=True):
        assert (row["module"], row["group"]) == (split.module, list(split.group))
        assert (row["ranks"], row["shared_rank"]) == (list(split.ranks), split.shared_rank)
        assert row["threshold"] == pytest.approx(split.threshold)
        assert row["random_edge"] == pytest.approx(split.edge)
        assert row["spectrum"] == pytest.approx(split.spectrum.tolist())
        assert row["norms"] == pytest.approx(list(split.norms))
        assert row["shared_norms"] == pytest.approx(list(split.shared_norms))
        energy = sum(n**2 for n in split.shared_norms) / sum(n**2 for n in split.norms)
        assert row["shared_energy"] == pytest.approx(energy)


def test_a_threshold_without_bound_is_valid_json(run):
    options = ["--threshold", "auto", "--json", "r.json"]
    run("decompose", "full0", "full1", "--out", "out", *options).wrote()
    rows = strict_json("r.json")["modules"]
    assert [row["threshold"] for row in rows] == [None, None]
    assert [row["random_edge"] for row in rows] == [1.0, 1.0]


def test_nothing_shared_says_how_much_there_is_and_what_to_try(run):
    text = run("decompose", "a", "b", "--out", "out", *NOTHING_SHARED).wrote().out
    assert names("out") == ["a-unique", "b-unique"]
    assert read("out/a-unique") == read("a")
    splits = devec.decompose([read("a"), read("b")], threshold=1.0).splits
    best = max(splits, key=lambda s: s.largest)
    [sentence] = [line for line in text.splitlines() if line.startswith("Nothing is shared")]
    assert "(1)" in sentence
    assert f"{best.largest:.3f}" in sentence
    assert best.module in sentence
    assert f"{best.edge:.3f}" in sentence
    lower = re.search(r"threshold of ([0-9.]+)", sentence)[1]
    run("decompose", "a", "b", "--out", "again", "--threshold", lower).wrote()
    assert "common" in names("again")


def test_nothing_shared_by_pairs_writes_nothing(run):
    text = run("decompose", "a", "b", "--out", "out", "--scope", "pairwise", *NOTHING_SHARED).out
    assert "Nothing was written" in text
    assert not Path("out").exists()


def test_identical_adapters_have_nothing_unique(run):
    run("decompose", "a", "twin", "--out", "out").wrote()
    assert names("out") == ["a-shared", "common", "twin-shared"]
    assert read("out/a-shared") == read("a")
    assert read("out/common") == read("a")


def test_an_adapter_that_does_nothing(run):
    run("decompose", "a", "zero", "--out", "out", "--json", "r.json").wrote()
    assert names("out") == ["a-unique"]
    assert [row["ranks"] for row in strict_json("r.json")["modules"]] == [[6, 0], [6, 0]]
    text = run("overlap", "a", "zero", "--json", "o.json").wrote().out
    assert "a + zero" in text
    assert [row["cosine"] for row in strict_json("o.json")["modules"]] == [None, None]


def test_overlap_prints_and_reports_every_pair(run):
    pool = [read(name) for name in ("a", "b", "c")]
    want = devec.overlap(pool)
    text = run("overlap", "a", "b", "c", "--json", "r.json").wrote().out
    rows, report = table(text), strict_json("r.json")
    assert len(rows) == len(report["modules"]) == len(want.modules) == 6
    for row, found in zip(report["modules"], want.modules, strict=True):
        printed = rows[f"{' + '.join(found.pair)}: {found.module}"]
        assert (row["module"], tuple(row["pair"])) == (found.module, found.pair)
        assert row["squared_cosines"] == pytest.approx(found.squared_cosines.tolist())
        assert row["random_edge"] == pytest.approx(found.edge)
        assert row["cosine"] == pytest.approx(found.cosine)
        assert printed["largest cos²"] == f"{found.largest:.3f}"
        assert printed["random edge"] == f"{found.edge:.3f}"
        assert printed["above edge"] == f"2 of {len(found.squared_cosines)}"
        assert printed["cosine"] == f"{found.cosine:.3f}"
    assert [tuple(row["pair"]) for row in report["cosines"]] == list(combinations("abc", 2))
    for x, y in combinations(pool, 2):
        assert f"{x.name} + {y.name}: cosine of the whole adapters {devec.cosine(x, y):.3f}" in text


def test_inspect_says_what_is_in_an_adapter(run):
    adapter = read("head0")
    text = run("inspect", "anime=head0", "--json", "r.json").wrote().out
    report = strict_json("r.json")
    assert (report["name"], report["format"]) == ("anime", "peft")
    assert report["sha256"] == adapter.sha256
    assert adapter.sha256 in text
    assert report["norm"] == pytest.approx(adapter.norm())
    assert report["carried"].keys() == adapter.carried.keys()
    assert "base_model.model.head.weight" in text
    assert [row["module"] for row in report["modules"]] == list(adapter.modules)
    for row, delta in zip(report["modules"], adapter.modules.values(), strict=True):
        assert row["shape"] == [30, 24]
        assert (row["rank"], row["dtype"], row["bias"]) == (6, "float32", False)
        assert row["scaling"] == pytest.approx(13 / 6)
        assert row["norm"] == pytest.approx(delta.norm())
    assert table(text)["first"]["scaling"] == "2.167"
    assert table(text)["first"]["shape"] == "30×24"


def test_inspect_says_where_an_output_came_from(run):
    run("negate", "a", "--out", "out").wrote()
    assert "combine" in run("inspect", "out", "--json", "r.json").wrote().out
    [origin] = strict_json("r.json")["provenance"]["inputs"]
    assert origin == {"name": "a", "sha256": read("a").sha256}


@pytest.mark.parametrize(
    "arguments",
    [
        ["decompose", "based0", "based1", "--out", "out"],
        ["combine", "based0", "based1", "--weights", "1,1", "--out", "out"],
    ],
    ids=["decompose", "combine"],
)
def test_different_base_models_are_warned_of(run, arguments):
    warned = run(*arguments).wrote().err.strip().splitlines()
    assert all(line.startswith("warning: ") for line in warned)
    assert "'org/base0', 'org/base1'" in warned[0]
    shutil.rmtree("out")
    assert "warning: " not in run(*arguments, "--base", "org/base").wrote().err


# --- overwriting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITING)
def test_outputs_are_replaced_only_if_asked(here, run, command):
    run(*WRITING[command]).wrote()
    before = snapshot(here)
    run(*WRITING[command]).refused("output exists", "out", "--overwrite")
    assert snapshot(here) == before
    run(*WRITING[command], "--dtype", "float16", "--overwrite").wrote()
    stored = next(Path("out").rglob(WEIGHTS))
    assert {t.dtype for t in load_file(stored).values()} == {torch.float16}
    assert snapshot(here).keys() == before.keys()


@pytest.mark.parametrize("part", PARTS)
def test_any_of_the_planned_outputs_stops_decompose(here, run, part):
    shutil.copytree("c", Path("out") / part)
    before = snapshot(here)
    run(*WRITING["decompose"]).refused(f"out/{part}", "--overwrite")
    assert snapshot(here) == before


@pytest.mark.parametrize("command", REPORTING)
def test_a_report_is_replaced_only_if_asked(here, run, command):
    Path("r.json").write_text("mine")
    before = snapshot(here)
    run(*REPORTING[command], "--json", "r.json").refused("r.json", "--overwrite")
    assert snapshot(here) == before
    run(*REPORTING[command], "--json", "r.json", "--overwrite").wrote()
    assert strict_json("r.json")["modules"]


def test_parts_that_are_no_more_are_removed(run):
    run(*WRITING["decompose"]).wrote()
    shutil.copytree("c", "out/kept")
    run(*WRITING["decompose"], *NOTHING_SHARED).refused("out/a-unique")
    run(*WRITING["decompose"], *NOTHING_SHARED, "--overwrite").wrote()
    assert names("out") == ["a-unique", "b-unique", "kept"]
    assert read("out/a-unique") == read("a")


def test_a_directory_that_is_no_adapter_is_never_replaced(here, run):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")
    before = snapshot(here)
    run("negate", "a", "--out", "out", "--overwrite").refused("out", CONFIG, "not replaced")
    assert snapshot(here) == before


# --- bad input -----------------------------------------------------------------------------------

DECOMPOSE = ["decompose", "a", "b", "--out", "out"]
COMPRESS = ["compress", "a", "--out", "out"]
COMBINE = ["combine", "a", "b", "--out", "out"]

REFUSED = [
    (["decompose", "a", "--out", "out"], ["at least two adapters", "got 1"]),
    (["overlap", "a", "--json", "r.json"], ["at least two adapters", "got 1"]),
    (["decompose", "a", "gone", "--out", "out"], ["no such file or directory", "'gone'"]),
    (["decompose", "a", "x=gone", "--out", "out"], ["no such file or directory", "'gone'"]),
    (["negate", "", "--out", "out"], ["no such file or directory", "''"]),
    (["decompose", "a", "x=", "--out", "out"], ["no such file or directory", "''"]),
    (["decompose", "a", "=b", "--out", "out"], ["'=b'", "NAME"]),
    (["decompose", "a", "u/v=b", "--out", "out"], ["'u/v=b'", "NAME"]),
    (["decompose", "a", ".=b", "--out", "out"], ["'.=b'", "NAME"]),
    (["decompose", "a", "..=b", "--out", "out"], ["'..=b'", "NAME"]),
    (["decompose", "a", "./a", "--out", "out"], ["must differ", "'a'", "NAME=PATH"]),
    (["decompose", "a", "a=b", "--out", "out"], ["must differ", "'a'", "NAME=PATH"]),
    (["decompose", "a", "text", "--out", "out"], ["text is not an adapter", "PEFT"]),
    (["decompose", "a", "text/file.txt", "--out", "out"], ["file.txt is not an adapter"]),
    (["decompose", "a", "cut", "--out", "out"], [f"cut/{WEIGHTS}", "truncated or corrupt"]),
    (["decompose", "a", "nan", "--out", "out"], [f"nan/{WEIGHTS}", "first.layer.lora_B", "NaN"]),
    (["decompose", "a", "other", "--out", "out"], ["'first.layer'", "(31, 24)", "(30, 24)"]),
    ([*DECOMPOSE, "--threshold", "0"], ["threshold", "(0, 1]", "got 0"]),
    ([*DECOMPOSE, "--threshold", "1.5"], ["threshold", "(0, 1]", "got 1.5"]),
    ([*DECOMPOSE, "--threshold", "-0.5"], ["threshold", "(0, 1]", "got -0.5"]),
    ([*DECOMPOSE, "--threshold", "nan"], ["threshold", "(0, 1]", "got nan"]),
    ([*DECOMPOSE, "--threshold", "abc"], ["threshold", "'auto'", "got 'abc'"]),
    ([*DECOMPOSE, "--method", "median"], ["'chain', 'mean', 'principal'", "got 'median'"]),
    ([*DECOMPOSE, "c", "--method", "principal"], ["'principal'", "got 3", "'mean' or 'chain'"]),
    ([*DECOMPOSE, "--scope", "some"], ["'all', 'pairwise', 'iterative'", "got 'some'"]),
    ([*DECOMPOSE, "--dtype", "int8"], ["--dtype", "float16", "bfloat16", "got 'int8'"]),
    ([*DECOMPOSE, "--device", "abacus"], ["'abacus'", "cannot be used"]),
    ([*DECOMPOSE, "--scope", "iterative"], ["target", "'a', 'b'"]),
    ([*DECOMPOSE, "--scope", "iterative", "--target", "z"], ["target", "'a', 'b'", "'z'"]),
    ([*DECOMPOSE, "--target", "a"], ["target", "'iterative'", "'a'"]),
    ([*COMPRESS, "--rank", "2", "--energy", "0.9"], ["--as-lora", "got --rank and --energy"]),
    (COMPRESS, ["rank", "energy"]),
    ([*COMPRESS, "--rank", "0"], ["rank", "at least 1", "got 0"]),
    ([*COMPRESS, "--rank", "-1"], ["rank", "at least 1", "got -1"]),
    ([*COMPRESS, "--energy", "2"], ["energy", "(0, 1]", "got 2"]),
    ([*COMPRESS, "--energy", "0"], ["energy", "(0, 1]", "got 0"]),
    ([*COMPRESS, "--rank", "2", "--dtype", "half"], ["--dtype", "float16", "'half'"]),
    ([*COMPRESS, "--rank", "2", "--device", "abacus"], ["'abacus'", "cannot be used"]),
    ([*COMBINE, "--weights", "1"], ["one weight for each", "adapters: 2", "weights: 1"]),
    ([*COMBINE, "--weights", "1,2,3"], ["one weight for each", "adapters: 2", "weights: 3"]),
    ([*COMBINE, "--weights", "1,x"], ["--weights", "'1,x'"]),
    ([*COMBINE, "--weights", "1,"], ["--weights", "'1,'"]),
    ([*COMBINE, "--weights", "1,inf"], ["weights", "finite", "inf"]),
    (["negate", "a", "--scale", "nan", "--out", "out"], ["finite", "nan"]),
    (["negate", "a", "--carried-from", "b", "--out", "out"], ["'b'", "'a'"]),
    (["negate", "a", "--out", "text/file.txt/x"], ["text/file.txt", "cannot write"]),
    (["inspect", "gone", "--json", "r.json"], ["no such file or directory", "'gone'"]),
]


@pytest.fixture
def bad(here):
    """The working directory, with broken adapters in it."""
    Path("text").mkdir()
    Path("text/file.txt").write_text("hello")
    weights = Path(shutil.copytree("b", "cut")) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    for name, change in (("nan", lambda t: t / 0), ("other", lambda t: t[[0, *range(30)]])):
        weights = Path(shutil.copytree("b", name)) / WEIGHTS
        tensors = {k: change(t) if "lora_B" in k else t for k, t in load_file(weights).items()}
        save_file(tensors, weights)
    return here


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=[" ".join(c[0]) for c in REFUSED])
def test_bad_input_is_refused_with_one_message(bad, run, arguments, parts):
    before = snapshot(bad)
    run(*arguments).refused(*parts)
    assert snapshot(bad) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["merge"], "merge"),
        (["decompose", "a", "b"], "--out"),
        (["decompose", "--out", "out"], "SOURCE"),
        ([*COMBINE], "--weights"),
        ([*COMPRESS, "--rank", "two"], "--rank"),
        ([*DECOMPOSE, "--treshold", "1"], "--treshold"),
        (["negate", "a", "b", "--out", "out"], "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_points_at_help(here, run, arguments, part):
    before = snapshot(here)
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert part in result.err.splitlines()[-1]
    assert "--help" in result.err
    assert snapshot(here) == before


# --- what went wrong once -------------------------------------------------------------------------


@pytest.fixture
def faint(here):
    """Adapters of rank 1 in R^n, at a given squared cosine to each other: faint(n, c²)."""

    def make(n, squared_cosine):
        first, second = torch.eye(n)[:, :1], torch.eye(n)[:, 1:2]
        second = squared_cosine**0.5 * first + (1 - squared_cosine) ** 0.5 * second
        for name, B in (("faint0", first), ("faint1", second)):
            directory = Path(shutil.copytree("a", here / name))
            config = strict_json(directory / CONFIG)
            (directory / CONFIG).write_text(json.dumps({**config, "r": 1}))
            prefix = "base_model.model.first.layer"
            factors = {
                f"{prefix}.lora_A.weight": torch.ones(1, 8),
                f"{prefix}.lora_B.weight": B.contiguous(),
            }
            save_file(factors, directory / WEIGHTS)
        return "faint0", "faint1"

    return make


def sentence(text):
    """What was said about nothing being shared."""
    [found] = [line for line in text.splitlines() if line.startswith("Nothing is shared")]
    return found


@pytest.mark.parametrize("options", [(), ("--threshold", "0")])
def test_standard_error_holds_messages_only(run, options):
    assert "" not in run(*DECOMPOSE, *options).err.splitlines()


def test_a_report_does_not_take_the_place_of_an_adapter(run):
    run(*DECOMPOSE, "--json", "out/common").refused("out/common")


@pytest.mark.parametrize("command", REPORTING)
def test_a_report_never_replaces_an_adapter(here, run, command):
    before = snapshot(here)
    run(*REPORTING[command], "--json", "c", "--overwrite").refused("c")
    assert snapshot(here) == before


@pytest.mark.parametrize("command", REPORTING)
@pytest.mark.parametrize("place", ["a.safetensors", "./a.safetensors", "link", "a"])
def test_a_report_never_replaces_a_source(here, run, command, place):
    """Not even where outputs may be replaced."""
    save_file({"lora_unet_x.lora_up.weight": torch.ones(3, 1)}, "a.safetensors")
    Path("link").symlink_to("a.safetensors")
    before = snapshot(here)
    source = "a" if place == "a" else "a=a.safetensors"
    arguments = [source if word == "a" else word for word in REPORTING[command]]
    run(*arguments, "--json", place, "--overwrite").refused(place.removeprefix("./"), "--json")
    assert snapshot(here) == before


@pytest.mark.parametrize("command", REPORTING)
def test_a_report_is_not_written_to_a_file_called_after_standard_output(here, run, command):
    before = snapshot(here)
    run(*REPORTING[command], "--json", "-").refused("--json", "standard output")
    assert snapshot(here) == before


def test_a_file_is_never_replaced_by_an_adapter(here, run):
    Path("thesis.tex").write_text("mine")
    before = snapshot(here)
    run("negate", "a", "--out", "thesis.tex", "--overwrite").refused("thesis.tex")
    assert snapshot(here) == before


def test_overlap_needs_different_names(run):
    run("overlap", "a", "a=b").refused("must differ", "'a'", "NAME=PATH")


def test_pairs_that_would_have_one_name(here, run):
    before = snapshot(here)
    pool = ["x+y=a", "z=b", "x=c", "y+z=twin"]
    run("decompose", *pool, "--scope", "pairwise", "--out", "out").refused("x+y+z")
    assert snapshot(here) == before


def test_names_are_printed_as_they_are(run):
    rows = table(run("overlap", "anime[v2]=a", "pixel[red]=b").wrote().out)
    assert "anime[v2] + pixel[red]: first.layer" in rows


def test_a_terminal_that_knows_ascii_only(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = process(*DECOMPOSE, cwd=here, env=environment)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)


def test_the_threshold_proposed_for_a_faint_overlap_works(run, faint):
    pair = faint(4096, 0.0064)
    text = run("decompose", *pair, "--out", "out").wrote().out
    lower = re.search(r"threshold of ([0-9.e-]+)", sentence(text))[1]
    run("decompose", *pair, "--out", "again", "--threshold", lower).wrote()
    assert "common" in names("again")


def test_auto_is_not_proposed_to_who_used_it(run, faint):
    text = run("decompose", *faint(100, 0.05), "--out", "out", "--threshold", "auto").wrote().out
    assert "auto" not in sentence(text).partition("Try")[2]


def test_full_ranks_are_said_to_tell_nothing(run):
    text = run("decompose", "full0", "full1", "--out", "out", "--threshold", "auto").wrote().out
    assert "inf" not in sentence(text)
    assert "already apart" not in sentence(text)


def test_a_zero_adapter_is_named(run):
    text = run("decompose", "a", "zero", "--out", "out").wrote().out
    assert "zero" in text.replace("zero-", "")


def test_the_weights_file_is_named_like_its_directory(run):
    assert run("inspect", f"a/{WEIGHTS}").wrote().out.startswith("a: ")
    run("decompose", f"a/{WEIGHTS}", f"b/{WEIGHTS}", "--out", "out").wrote()
    assert names("out") == PARTS


def test_a_device_without_values(run):
    run(*DECOMPOSE, "--device", "meta").refused("'meta'", "cannot be used")


def test_a_missing_path_with_an_equals_sign(run):
    run("inspect", "./k=1/gone").refused("no such file", "./k=1/gone")


def test_a_file_is_named_once(bad, run):
    assert run("inspect", "cut").err.count(f"cut/{WEIGHTS}") == 1
    assert bad.exists()


def test_overlap_warns_of_adapters_without_a_module_in_common(run):
    assert "warning: " in run("overlap", "a", "deep0").wrote().err


def test_different_base_models_are_warned_of_once(run):
    assert run("decompose", "based0", "based1", "--out", "out").err.count("warning: ") == 1


def test_an_adapter_that_devec_did_not_make_is_left_where_a_part_is_zero(here, run):
    shutil.copytree("a", here / "out" / "common")
    text = run("decompose", "a", "b", "--out", "out", "--overwrite", *NOTHING_SHARED).wrote().out
    assert "left as it was: out/common" in text
    assert read("out/common") == read("a")


@pytest.mark.parametrize("source", ["x" * 300, "a=" + "x" * 300, "=".join(["x" * 300] * 2)])
def test_paths_that_no_system_takes_are_refused(run, source):
    run("inspect", source).refused("x" * 300)
