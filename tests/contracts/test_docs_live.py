"""The examples of live models and of DoRA give what the arithmetic says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import devec
from support.pages import execute, pool, read
from support.truth.reference import dora_truth

LIVE, DORA = "docs/guides/live-models.md", "docs/guides/dora.md"
BASE = "behaviours-llama"
TOKENS = torch.arange(24).reshape(2, 12)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "default::devec.DevecWarning"),
]


@pytest.fixture(autouse=True)
def _in_the_pool(tmp_path, monkeypatch):
    pool.collect(tmp_path)
    monkeypatch.chdir(tmp_path)


def doubles(file):
    return {key: tensor.double().numpy() for key, tensor in load_file(file).items()}


def alpha_of(module, config):
    patterns = config["alpha_pattern"].items()
    own = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    return (own or [config["lora_alpha"]])[0]


def truths(name):
    """Module → ΔW of an adapter on disk, dense and naive."""
    weights = doubles(f"{BASE}/model.safetensors")
    config = json.loads(Path(name, "adapter_config.json").read_text(encoding="utf-8"))
    stored = doubles(f"{name}/adapter_model.safetensors")
    deltas = {}
    for key in [key for key in stored if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        module = layer.removeprefix("base_model.model.")
        A, B = stored[key], stored[f"{layer}.lora_B.weight"]
        scaling = alpha_of(module, config) / len(A)
        m = stored.get(
            f"{layer}.lora_magnitude_vector"
        )  # PEFT's name; devec's loads in transformers
        m = stored.get(f"{layer}.lora_magnitude_vector.weight", m)
        W = weights[f"{module}.weight"]
        deltas[module] = scaling * B @ A if m is None else dora_truth(W, B, A, scaling, m, "out")
    return deltas


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


def expected(coefficients):
    """Logits of the model whose weights are W0 + Σ w_i ΔW_i."""
    model = AutoModelForCausalLM.from_pretrained(BASE).double()
    for name, weight in coefficients.items():
        for module, delta in truths(name).items():
            model.get_submodule(module).weight.data += weight * torch.from_numpy(delta)
    return logits(model)


def loaded(name):
    """Logits with an adapter that PEFT loaded."""
    base = AutoModelForCausalLM.from_pretrained(BASE).float()
    return logits(PeftModel.from_pretrained(base, name))


def apart(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", pool.DORAS)
def test_the_doras_of_the_pool_change_the_base_unlike_their_loras(name):
    lora, dora = truths(name), truths(f"{name}-dora")
    assert lora.keys() == dora.keys()
    for module, delta in lora.items():
        assert 1e-3 < np.linalg.norm(dora[module] - delta) / np.linalg.norm(delta) < 1


def test_the_examples_of_doras_are_what_peft_loads():
    execute(DORA, "base=base")
    (command,) = re.findall(r"^devec (combine .*)$", read(DORA), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "devec", *shlex.split(command)], check=True)
    for output in ("dora/detox", "dora/mixed"):
        assert json.loads(Path(output, "adapter_config.json").read_text())["use_dora"]
        assert apart(loaded(output), expected({output: 1})) < 1e-5
    want = expected({"unwanted-dora": 1, "copy-dora": -0.5})
    assert apart(loaded("dora/mixed"), want) < 1e-5


def test_the_example_of_diffusers_activates_the_parts():
    names = execute(LIVE, "from diffusers import")
    assert names["image"].size == (24, 24)
    assert names["pipe"].get_active_adapters() == ["pixel_unique", "stripes_unique", "common"]


def test_the_example_of_peft_activates_the_negated_unique_part():
    model = execute(LIVE, "from peft import")["model"]
    assert model.active_adapters == ["detox"]
    (-0.5 * devec.extract_adapter(model, "unwanted_unique")).save_pretrained("want")
    assert apart(logits(model), loaded("want")) < 1e-6


def test_the_example_of_transformers_activates_and_saves_the_sum():
    model = execute(LIVE, '"sort"')["model"]
    want = expected({"sort": 1.0, "reverse": -0.4})
    assert apart(logits(model), want) < 1e-5
    assert apart(loaded("live/mix"), want) < 1e-5
