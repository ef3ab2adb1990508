"""DoRAs in files of any convention, made from the weights of a pipeline, and what they do."""

from functools import cache

import numpy as np
import torch
from safetensors.torch import save_file

from devec.deltas.gains import Gain
from support.models.module_names import find_modules
from support.models.pipelines import make_pipeline
from support.truth.golden_truth import dora_truth

# Modules of the pipelines, as kohya names them.
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_1_conv2"
WIDE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"

SUFFIXES = {  # down, up, magnitudes
    "kohya": (".lora_down.weight", ".lora_up.weight", ".dora_scale"),
    "diffusers": (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"),
    "saved by diffusers": (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
    "ai-toolkit": (".lora_A.weight", ".lora_B.weight", ".magnitude"),
    "comfy": (".lora_A.weight", ".lora_B.weight", ".dora_scale"),
}


@cache
def base(kind):
    """The pipeline that all DoRAs of a kind are of; never changed."""
    return make_pipeline(kind)


def weight(kind, module):
    """W0 of what a file calls a module: several under each other where it fuses them."""
    parts = [m.weight.detach().double().numpy() for m in find_modules(base(kind), module)]
    return np.concatenate(parts)


def effects(kind, path):
    """Module id → dense ΔW of a file."""
    return dora_truth(path, lambda module: weight(kind, module))


def tensors_of(kind, module, axis, rank=2, seed=0, alpha=1.0, style="kohya"):
    """The tensors of a DoRA of a module, or of a LoRA for the axis None."""
    W, rng = weight(kind, module), np.random.default_rng([seed, len(module)])
    ones = (1,) * (W.ndim - 2)
    down, up, magnitude = SUFFIXES[style]
    found = {
        down: rng.standard_normal((rank, *W.shape[1:])) / 3,
        up: rng.standard_normal((len(W), rank, *ones)) / 3,
    }
    if style == "kohya":
        found[".alpha"] = np.array(alpha)
    if axis is not None:
        at = 0 if axis == "out" else 1
        norms = np.sqrt((W**2).sum(axis=tuple(d for d in range(W.ndim) if d != at), keepdims=True))
        m = norms * (1 + 0.3 * rng.standard_normal(norms.shape))
        if style == "ai-toolkit" or ("diffusers" in style and not ones):
            m = m.reshape(-1)
        elif "diffusers" in style:
            m = m.reshape(1, -1, *ones)
        found[magnitude] = m
    return {module + end: torch.tensor(t) for end, t in found.items()}


def dora_file(path, kind, axes, dtype=torch.float64, **fields):
    """A file of the modules, whose axes are given (None for a LoRA)."""
    tensors = {}
    for module, axis in axes.items():
        tensors |= tensors_of(kind, module, axis, **fields)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)
    return path


def dense_change(delta, W):
    """The ΔW that a delta says, dense: s·B·A + diag(g)·W0 + W0·diag(h)."""
    delta = delta.resolved()
    change = (delta.scaling * delta.B.double() @ delta.A.double()).numpy()
    W = W.reshape(len(W), -1)
    for axis, gain in (delta.gain.axes if isinstance(delta.gain, Gain) else {}).items():
        values = gain.values.double().numpy()
        change = change + (values[:, None] * W if axis == "out" else W * values)
    return change
