"""Bad input is refused with one message; what is doubtful is warned of once."""

import shutil

import pytest

from support.checks.command_line import (
    COMBINE,
    COMPRESS,
    DECOMPOSE,
    WARNINGS_ARE_LINES,
    WEIGHTS,
    snapshot,
)

pytestmark = WARNINGS_ARE_LINES


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


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=[" ".join(c[0]) for c in REFUSED])
def test_bad_input_is_refused_with_one_message(bad, run, arguments, parts):
    before = snapshot(bad)
    run(*arguments).refused(*parts)
    assert snapshot(bad) == before


def test_different_base_models_are_warned_of_once(run):
    assert run("decompose", "based0", "based1", "--out", "out").err.count("warning: ") == 1
