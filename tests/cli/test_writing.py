"""`devec combine`, `negate` and `compress` write what the functions return."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import devec
from support.checks.command_line import (
    CONFIG,
    WARNINGS_ARE_LINES,
    WEIGHTS,
    WRITING,
    ranks,
    read,
    strict_json,
    table,
)

pytestmark = WARNINGS_ARE_LINES


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
