"""The life of parts in a pipeline: added, activated, switched off, saved, loaded, deleted."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

import devec
from support.models.images import paint, painter
from support.models.live_models import NAMES, PIPELINES, THRESHOLD, components, pipeline_host
from support.paths import TESTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

PAIR = NAMES[:2]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_originals(folder, kind):
    """Files of two adapters, written by diffusers."""
    pipe = pipeline_host(kind, PAIR)
    for name in PAIR:
        layers = {
            f"{slot}_lora_layers": get_peft_model_state_dict(model, adapter_name=name)
            for slot, model in components(pipe).items()
        }
        configs = {
            f"{slot}_lora_adapter_metadata": model.peft_config[name].to_dict()
            for slot, model in components(pipe).items()
        }
        pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers, **configs)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Kind → what was painted on the way, and the file that was saved at its end."""
    folder = tmp_path_factory.mktemp("lives")
    torch.set_num_threads(1)
    return {kind: live(folder / kind, kind) for kind in PIPELINES}


def live(folder, kind):
    save_originals(folder, kind)
    pipe = painter(kind)
    images = {"base": paint(pipe, kind)}
    for name in PAIR:
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters("anime")
    images["original"] = paint(pipe, kind)
    devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)
    images["original, decomposed"] = paint(pipe, kind)
    pipe.set_adapters(["anime_unique", "anime_shared"])
    images["whole"] = paint(pipe, kind)
    pipe.set_adapters(["anime_unique", "pixel_unique"], [1.0, 0.8])
    images["uniques"] = paint(pipe, kind)
    mix = devec.combine_adapters(pipe, ["anime_unique", "pixel_unique"], [1.0, 0.8], "mix")
    file = mix.save_pretrained(folder / "mix")
    pipe.set_adapters("mix")
    images["mix"] = paint(pipe, kind)
    pipe.disable_lora()
    images["disabled"] = paint(pipe, kind)
    pipe.enable_lora()
    images["enabled"] = paint(pipe, kind)
    held = list(dict.fromkeys(n for names in pipe.get_list_adapters().values() for n in names))
    pipe.delete_adapters(held)
    images["deleted"] = paint(pipe, kind)
    return pipe, images, held, file


@pytest.mark.parametrize("kind", PIPELINES)
def test_images(lives, kind):
    _, images, _, _ = lives[kind]
    assert images["base"].shape == (64, 64, 3)
    for left, right in [
        ("original", "original, decomposed"),
        ("disabled", "base"),
        ("enabled", "mix"),
        ("deleted", "base"),
    ]:
        assert np.array_equal(images[left], images[right]), (left, right)
    for left, right in [("original", "whole"), ("uniques", "mix")]:
        assert np.abs(images[left] - images[right]).max() < 1e-4, (left, right)
    for left, right in [("base", "original"), ("original", "uniques"), ("base", "uniques")]:
        assert np.abs(images[left] - images[right]).max() > 1e-2, (left, right)


@pytest.mark.parametrize("kind", PIPELINES)
def test_nothing_is_left_of_deleted_adapters(lives, kind):
    pipe, _, held, _ = lives[kind]
    parts = [f"{name}_{part}" for name in PAIR for part in ("unique", "shared")]
    assert sorted(held) == sorted([*PAIR, *parts, "common", "mix"])
    assert not pipe.get_list_adapters()
    for model in components(pipe).values():
        assert not getattr(model, "peft_config", {})
        assert not [name for name, _ in model.named_parameters() if ".lora_" in name]


def test_a_fresh_process_paints_the_same(lives, tmp_path):
    sources = [f"{kind}={file}" for kind, (*_, file) in lives.items()]
    command = [sys.executable, "-m", "support.models.images", tmp_path / "images.npz", *sources]
    subprocess.run(command, check=True, cwd=TESTS, capture_output=True)
    painted = np.load(tmp_path / "images.npz")
    for kind, (_, images, _, _) in lives.items():
        assert np.abs(painted[kind] - images["mix"]).max() < 1e-6, kind
