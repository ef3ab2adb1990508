"""README.md is short, and its examples run as they are written."""

import re
import shlex
import subprocess
import sys

from devec import Adapter
from support.pages import ROOT, blocks, example, prose, read

README = "README.md"


def test_the_readme_is_short():
    assert len(read(README).encode()) <= 8000


def test_a_line_of_the_readme_is_a_sentence():
    ends = re.compile(r"(?<!\b[A-Z])[.!?] +[A-Z]")
    assert [line for line in prose(read(README)) if ends.search(line)] == []


def test_the_live_example_is_that_of_the_guide():
    mark = "from diffusers import"
    assert example(README, mark) == example("docs/guides/live-models.md", mark)


def test_the_two_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for _, block in blocks(README, "sh") for line in block.splitlines()]
    wanted = [line.split()[1] for line in lines if line.startswith("make ")]
    assert wanted == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in wanted)


def test_the_adapters_of_the_command_are_collected_as_the_readme_says(tmp_path):
    lines = [line for _, block in blocks(README, "sh") for line in block.splitlines()]
    (collect,) = [line for line in lines if line.startswith("python ")]
    program, target = shlex.split(collect)[1:]
    subprocess.run([sys.executable, ROOT / program, tmp_path / target], check=True)
    (ran,) = re.findall(r"<!-- run: devec decompose (.*?) --method", read(README))
    assert all(Adapter.from_pretrained(tmp_path / target / name).modules for name in ran.split())
