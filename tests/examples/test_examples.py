"""The examples run on tiny random models, as a user runs them, and what they write is right."""

import importlib.util
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from support.paths import ROOT
from support.truth.reference import column_projector, deflate, dora_truth

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
NO_HARNESS = importlib.util.find_spec("lm_eval") is None
TOKENS = torch.arange(20).reshape(2, 10)


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / script, *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    out = tmp_path_factory.mktemp("flux")
    done = run("flux_style_mixing.py", "--tiny", "--weights", "1.0,0.8", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def detoxed(tmp_path_factory):
    out = tmp_path_factory.mktemp("detox")
    tasks = ["--tasks", "arc_easy"] if NO_HARNESS else []
    done = run("llama_detox.py", "--tiny", "--out", out, *tasks)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def test_styles_are_reported_with_the_directions_that_they_were_made_to_share(mixed):
    _, said = mixed
    assert "14 shared directions, in 7 of 7 modules" in said
    assert "\nanime: " in said
    assert "\npixel: " in said


def test_styles_are_painted_side_by_side(mixed):
    out, _ = mixed
    names = ["anime", "pixel", "originals-mixed", "anime_unique", "pixel_unique", "uniques-mixed"]
    assert sorted(path.stem for path in out.iterdir()) == sorted([*names, "grid"])
    images = {name: pixels(out / f"{name}.png") for name in names}
    assert {image.shape for image in images.values()} == {(64, 64, 3)}
    for image, other in zip(names, names[3:] + names[:3], strict=True):
        assert np.abs(images[image] - images[other]).max() > 2  # original and unique
    grid = pixels(out / "grid.png")
    shown = np.vstack([np.hstack([images[n] for n in row]) for row in (names[:3], names[3:])])
    assert np.array_equal(np.vstack([grid[8:72], grid[80:144]]), shown)


def test_what_a_toxic_adapter_shares_is_reported(detoxed):
    _, said = detoxed
    assert "toxic shares with chat: 8 directions" in said  # one in each module
    assert "toxic shares with physics: 8 directions" in said
    assert "toxic_unique, negated at 0.5\n  log-likelihood per token of unwanted text: " in said
    assert ("lm-evaluation-harness is not installed" in said) == NO_HARNESS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model and the adapters that ``--tiny`` makes, and the truth of the unique part."""
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(EXAMPLES / "llama_detox.py")["make_tiny"](folder)
    base = load_file(folder / "llama" / "model.safetensors")
    toxic, *others = (
        {
            key.removeprefix("base_model.model."): tensor.double().numpy()
            for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
        }
        for name in ("toxic", "chat", "physics")
    )
    unique = {}
    for module in [key.removesuffix(".lora_A.weight") for key in toxic if ".lora_A" in key]:
        W = base[f"{module}.weight"].double().numpy()
        A, B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        m = toxic[f"{module}.lora_magnitude_vector"]
        low_rank = 2 * toxic[B] @ toxic[A]
        gain = m / np.linalg.norm(W + low_rank, axis=1)
        rest = [2 * other[B] @ other[A] for other in others]
        shared, _ = deflate(gain[:, None] * low_rank, rest, 0.85)
        delta = dora_truth(W, toxic[B], toxic[A], 2, m, "out")
        unique[module] = torch.from_numpy(delta - column_projector(shared) @ delta)
    return folder, unique


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


@pytest.mark.parametrize("coefficient", [0.25, 0.5, 1])
def test_the_negated_adapter_does_what_it_says(detoxed, tiny, coefficient):
    folder, unique = tiny
    base = LlamaForCausalLM.from_pretrained(folder / "llama")
    path = detoxed[0] / f"toxic_unique-negated-{coefficient}"
    got = logits(PeftModel.from_pretrained(base, path))
    truth = LlamaForCausalLM.from_pretrained(folder / "llama").double()
    without = logits(truth)
    for module, delta in unique.items():
        truth.get_submodule(module).weight.data -= coefficient * delta
    assert (logits(truth) - without).norm() > 0.05 * without.norm()
    torch.testing.assert_close(got, logits(truth), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("flux_style_mixing.py", ["--lora", "anime=user/anime"], "--lora is needed twice"),
        ("flux_style_mixing.py", ["--lora", "anime=anime.safetensors"], "no such file"),
        ("flux_style_mixing.py", ["--weights", "1,nan"], "expected numbers"),
        ("flux_style_mixing.py", ["--threshold", "2"], "expected a number in (0, 1]"),
        ("llama_detox.py", ["--toxic", "toxic=user/toxic"], "--toxic and --other are needed"),
        ("llama_detox.py", ["--toxic", "toxic=/nowhere"], "no such file"),
        ("llama_detox.py", ["--coefficients", "1,1"], "expected different numbers"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, script, arguments, said):
    done = run(script, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
