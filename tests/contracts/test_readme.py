"""The README says what is: its examples run, what it names exists, its figures are printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

import devec
from devec import Adapter
from support.adapters.cases import save_kohya
from support.adapters.llama_doras import apart, expected, loaded, logits, save_adapter, save_models
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "default::devec.DevecWarning"),
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    for index, name in enumerate(("anime", "pixel")):
        save_kohya(tmp_path / f"{name}.safetensors", index)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(mark, **names):
    """Run the one example that has a mark, as it is written; returns the names it leaves."""
    (example,) = [block for block in blocks("python") if mark in block]
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_python_example_runs(here):
    run("a PEFT directory or a Hub id")
    assert Adapter.from_pretrained(here / "out/anime-unique.safetensors").modules


def test_the_example_of_doras_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    run("base=base")
    (command,) = re.findall(r"`devec (combine toxic .*?)`", README)
    subprocess.run([sys.executable, "-m", "devec", *shlex.split(command)], check=True)
    for out, coefficients in (("detox", {}), ("mixed", {"toxic": 1, "polite": -0.5})):
        config = json.loads((tmp_path / "out" / out / "adapter_config.json").read_text())
        assert config["use_dora"]
        if coefficients:
            assert apart(loaded(tmp_path, f"out/{out}"), expected(tmp_path, coefficients)) < 1e-6


def test_live_examples_have_five_lines():
    live = [block for block in blocks("python") if "import devec" not in block]
    assert [len(block.splitlines()) for block in live] == [5, 5, 5]


def test_the_example_of_diffusers_runs(tmp_path, monkeypatch):
    from diffusers import FluxPipeline
    from examples.flux_style_mixing import make_tiny

    model, loras = make_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, file in loras:
        Path(file).rename(f"{name}.safetensors")
    pipe = FluxPipeline.from_pretrained(model)
    pipe.default_sample_size = 16  # of latents; a thousand pixels a side would take minutes
    pipe.set_progress_bar_config(disable=True)
    image = run("# diffusers", devec=devec, pipe=pipe)["image"]
    assert image.size == (32, 32)
    assert pipe.get_active_adapters() == ["anime_unique", "pixel_unique"]


def test_the_example_of_peft_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM.from_pretrained("llama")
    model = run("# PEFT", devec=devec, base=base, PeftModel=PeftModel)["model"]
    assert model.active_adapters == ["detox"]
    (-0.5 * devec.extract_adapter(model, "toxic_unique")).save_pretrained("want")
    assert apart(logits(model), loaded(tmp_path, "want")) < 1e-6


def test_the_example_of_transformers_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path, "french")
    save_adapter(tmp_path, "legal")
    model = LlamaForCausalLM.from_pretrained("llama")
    run("# transformers", devec=devec, model=model)
    want = expected(tmp_path, {"french": 1.0, "legal": -0.4})
    assert apart(logits(model), want) < 1e-6
    assert apart(loaded(tmp_path, "out/mix"), want) < 1e-6


def test_the_command_runs(here):
    lines = [line for block in blocks("sh") for line in block.splitlines() if "devec " in line]
    command = lines[0]
    words = shlex.split(command)
    assert words[0] == "devec"
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    written = sorted(p.name for p in (here / "out").iterdir())
    parts = ["anime-shared", "anime-unique", "common", "pixel-shared", "pixel-unique"]
    assert written == [f"{part}.safetensors" for part in parts]


def test_the_example_of_large_pools_writes_the_same_files(here):
    run("decompose_to")
    test_the_command_runs(here)
    files = sorted((here / "out").iterdir())
    assert files
    for file in files:
        assert (here / "streamed" / file.name).read_bytes() == file.read_bytes()


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
    from devec.cli.demo import demo_command

    demo_command(out=None, threshold="auto", method="mean")
    numbers = r"\d+\.\d{3}"
    shown = re.search(r"<!-- demo -->(.*)<!-- /demo -->", README, flags=re.DOTALL)[1]
    printed = capsys.readouterr().out
    printed = printed[printed.index("Shared subspaces") :]
    got, want = (re.findall(numbers, text) for text in (printed, shown))
    assert [float(x) for x in got] == pytest.approx([float(x) for x in want], abs=0.006)
    words = [re.sub(r"[\d.\s]+", " ", text).strip("` \n") for text in (printed, shown)]
    assert words[0] == words[1].removeprefix("text").strip()


def test_figures_of_speed_are_those_of_the_results():
    """README quotes rows of benchmarks/RESULTS.md, word for word."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    quoted = re.findall(r"<!-- results -->\n(.*?)<!-- /results -->", README, re.DOTALL)
    rows = [line for block in quoted for line in block.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    lines = set(results.splitlines())
    assert [row for row in rows if row not in lines] == []
