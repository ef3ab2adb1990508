"""What is there is replaced only if that was asked for, and never by something else."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checks.command_line import (
    CONFIG,
    DECOMPOSE,
    PARTS,
    WARNINGS_ARE_LINES,
    WEIGHTS,
    WRITING,
    snapshot,
    strict_json,
)

pytestmark = WARNINGS_ARE_LINES

REPORTING = {
    "decompose": ["decompose", "a", "b", "--out", "out"],
    "overlap": ["overlap", "a", "b"],
    "inspect": ["inspect", "a"],
}


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


def test_a_directory_that_is_no_adapter_is_never_replaced(here, run):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")
    before = snapshot(here)
    run("negate", "a", "--out", "out", "--overwrite").refused("out", CONFIG, "not replaced")
    assert snapshot(here) == before


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
