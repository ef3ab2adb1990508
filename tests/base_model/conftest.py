"""Pipelines saved as directories and as single files."""

from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file

from support.checks.base_weights import ENCODER_PREFIXES, native_state, pipeline, slots
from support.models.pipelines import linear_modules


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a pipeline as diffusers saves it."""

    @lru_cache
    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        pipeline(kind).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A single file of all models of a pipeline, as Stability AI and ComfyUI name them."""

    @lru_cache
    def save(kind):
        state = native_state(kind, "model.diffusion_model.")
        for slot, prefix in ENCODER_PREFIXES[kind].items():
            for name, module in linear_modules(slots(kind)[slot]).items():
                clip = "" if "block" in name or name.startswith("text_") else "text_model."
                state[f"{prefix}{clip}{name}.weight"] = module.weight
        state["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2, 3, 3)
        if kind == "sdxl":
            state["conditioner.embedders.1.model.text_projection"] = torch.ones(2, 2)
        path = tmp_path_factory.mktemp(kind) / "checkpoint.safetensors"
        save_file(state, path)
        return path

    return save
