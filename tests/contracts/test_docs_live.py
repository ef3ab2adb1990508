"""The examples of live models and of DoRA run, and give what the arithmetic says."""

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
from support.adapters.llama_doras import apart, expected, loaded, logits, save_adapter, save_models
from support.pages import blocks, execute, written_by_hand

LIVE, DORA = "docs/guides/live-models.md", "docs/guides/dora.md"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "default::devec.DevecWarning")


@pytest.mark.slow
def test_the_example_of_doras_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    execute(DORA, "base=base")
    (command,) = re.findall(r"^devec (combine toxic .*)$", written_by_hand(DORA), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "devec", *shlex.split(command)], check=True)
    for out, coefficients in (("detox", {}), ("mixed", {"toxic": 1, "polite": -0.5})):
        config = json.loads((tmp_path / "out" / out / "adapter_config.json").read_text())
        assert config["use_dora"]
        if coefficients:
            assert apart(loaded(tmp_path, f"out/{out}"), expected(tmp_path, coefficients)) < 1e-6


def test_live_examples_have_five_lines():
    assert [len(text.splitlines()) for _, text in blocks(LIVE, "python")] == [5, 5, 5]


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
    image = execute(LIVE, "# diffusers", devec=devec, pipe=pipe)["image"]
    assert image.size == (32, 32)
    assert pipe.get_active_adapters() == ["anime_unique", "pixel_unique"]


def test_the_example_of_peft_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM.from_pretrained("llama")
    model = execute(LIVE, "# PEFT", devec=devec, base=base, PeftModel=PeftModel)["model"]
    assert model.active_adapters == ["detox"]
    (-0.5 * devec.extract_adapter(model, "toxic_unique")).save_pretrained("want")
    assert apart(logits(model), loaded(tmp_path, "want")) < 1e-6


def test_the_example_of_transformers_runs(tmp_path, monkeypatch):
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path, "french")
    save_adapter(tmp_path, "legal")
    model = LlamaForCausalLM.from_pretrained("llama")
    execute(LIVE, "# transformers", devec=devec, model=model)
    want = expected(tmp_path, {"french": 1.0, "legal": -0.4})
    assert apart(logits(model), want) < 1e-6
    assert apart(loaded(tmp_path, "out/mix"), want) < 1e-6
