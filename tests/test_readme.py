"""The README says what is: its examples run, what it names exists, its figures are printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cases import save_kohya
from llama_doras import apart, expected, loaded, save_models

from devec import Adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    for index, name in enumerate(("anime", "pixel")):
        save_kohya(tmp_path / f"{name}.safetensors", index)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs(here):
    example, _ = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert Adapter.from_pretrained(here / "out/anime-unique.safetensors").modules


def test_the_example_of_doras_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, example = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    (command,) = re.findall(r"`devec (combine toxic .*?)`", README)
    subprocess.run([sys.executable, "-m", "devec", *shlex.split(command)], check=True)
    for out, coefficients in (("detox", {}), ("mixed", {"toxic": 1, "polite": -0.5})):
        config = json.loads((tmp_path / "out" / out / "adapter_config.json").read_text())
        assert config["use_dora"]
        if coefficients:
            assert apart(loaded(tmp_path, f"out/{out}"), expected(tmp_path, coefficients)) < 1e-6


def test_the_command_runs(here):
    (command,) = [line for block in blocks("sh") for line in block.splitlines() if "devec " in line]
    words = shlex.split(command)
    assert words[0] == "devec"
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    written = sorted(p.name for p in (here / "out").iterdir())
    parts = ["anime-shared", "anime-unique", "common", "pixel-shared", "pixel-unique"]
    assert written == [f"{part}.safetensors" for part in parts]


def test_the_two_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = [line.split()[1] for b in blocks("sh") for line in b.splitlines() if "make " in line]
    assert wanted == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in wanted)


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_demo_in_the_readme_is_the_demo(capsys):
    """Within rounding: accuracies may differ by a digit image or two between processors."""
    from devec.cli.demo import demo

    demo(out=None, threshold="auto", method="mean")
    numbers = r"\d+\.\d{3}"
    shown = re.search(r"<!-- demo -->(.*)<!-- /demo -->", README, flags=re.DOTALL)[1]
    printed = capsys.readouterr().out
    printed = printed[printed.index("Shared subspaces") :]
    got, want = (re.findall(numbers, text) for text in (printed, shown))
    assert [float(x) for x in got] == pytest.approx([float(x) for x in want], abs=0.006)
    words = [re.sub(r"[\d.\s]+", " ", text).strip("` \n") for text in (printed, shown)]
    assert words[0] == words[1].removeprefix("text").strip()
