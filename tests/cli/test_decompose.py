"""`devec decompose` writes what the function returns, and says what it found."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import devec
from support.checks.command_line import (
    CONFIG,
    PARTS,
    WARNINGS_ARE_LINES,
    WEIGHTS,
    WRITING,
    names,
    ranks,
    read,
    strict_json,
    table,
)

pytestmark = WARNINGS_ARE_LINES

NOTHING_SHARED = ("--threshold", "1")


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


def test_parts_that_are_no_more_are_removed(run):
    run(*WRITING["decompose"]).wrote()
    shutil.copytree("c", "out/kept")
    run(*WRITING["decompose"], *NOTHING_SHARED).refused("out/a-unique")
    run(*WRITING["decompose"], *NOTHING_SHARED, "--overwrite").wrote()
    assert names("out") == ["a-unique", "b-unique", "kept"]
    assert read("out/a-unique") == read("a")


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


def test_the_threshold_proposed_for_a_faint_overlap_works(run, faint):
    pair = faint(4096, 0.0064)
    text = run("decompose", *pair, "--out", "out").wrote().out
    lower = re.search(r"threshold of ([0-9.e-]+)", sentence(text))[1]
    run("decompose", *pair, "--out", "again", "--threshold", lower).wrote()
    assert "common" in names("again")


def test_auto_is_not_proposed_to_who_used_it(run, faint):
    text = run("decompose", *faint(100, 0.05), "--out", "out", "--threshold", "auto").wrote().out
    assert "auto" not in sentence(text).partition("Try")[2]


def test_full_ranks_are_reported_as_meaningless(run):
    text = run("decompose", "full0", "full1", "--out", "out", "--threshold", "auto").wrote().out
    assert "inf" not in sentence(text)
    assert "no more than chance" not in sentence(text)


def test_an_overlap_within_chance_is_called_so(run, faint):
    text = run("decompose", *faint(100, 0.001), "--out", "out").wrote().out
    assert "That is no more than chance" in sentence(text)
    assert "Try" not in sentence(text)


def test_modules_that_an_adapter_lacks_are_counted(run):
    text = run("decompose", "a", "deep0", "--out", "out").wrote().out
    modules = len(read("a").modules) + len(read("deep0").modules)
    assert f"{modules} modules are missing from some adapters; they are unique" in text


def test_a_zero_adapter_is_named(run):
    text = run("decompose", "a", "zero", "--out", "out").wrote().out
    assert "zero" in text.replace("zero-", "")


def test_an_adapter_that_devec_did_not_make_is_left_where_a_part_is_zero(here, run):
    shutil.copytree("a", here / "out" / "common")
    text = run("decompose", "a", "b", "--out", "out", "--overwrite", *NOTHING_SHARED).wrote().out
    assert "left as it was: out/common" in text
    assert read("out/common") == read("a")
