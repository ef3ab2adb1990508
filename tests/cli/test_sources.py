"""Names of sources and outputs, and paths that are none."""

import shutil

import pytest

from support.checks.command_line import (
    DECOMPOSE,
    PARTS,
    WARNINGS_ARE_LINES,
    WEIGHTS,
    names,
    read,
    snapshot,
    table,
)

pytestmark = WARNINGS_ARE_LINES


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


def test_pairs_that_would_have_one_name(here, run):
    before = snapshot(here)
    pool = ["x+y=a", "z=b", "x=c", "y+z=twin"]
    run("decompose", *pool, "--scope", "pairwise", "--out", "out").refused("x+y+z")
    assert snapshot(here) == before


def test_names_are_printed_as_they_are(run):
    rows = table(run("overlap", "anime[v2]=a", "pixel[red]=b").wrote().out)
    assert "anime[v2] + pixel[red]: first.layer" in rows


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


@pytest.mark.parametrize("source", ["x" * 300, "a=" + "x" * 300, "=".join(["x" * 300] * 2)])
def test_paths_that_no_system_takes_are_refused(run, source):
    run("inspect", source).refused("x" * 300)
