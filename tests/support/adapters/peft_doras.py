"""DoRAs that PEFT makes, and what they do by the formula on dense weights in float64."""

import json
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from devec import Adapter
from devec.deltas.gains import Gain
from support.adapters.cases import (
    HOSTS,
    VARIANTS,
    Variant,
    dense_deltas,
    make_base,
    make_inputs,
    save_adapter,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"
KINDS = [kind for kind in HOSTS if kind != "experts"]
ALL = {**VARIANTS, "float64": Variant(dtype=torch.float64)}
TRAINED = [name for name in ALL if name != "bias"]
TOLERANCE = {"plain": 1e-6, "float64": 1e-12}


def with_tensors(path, change):
    """A directory with its tensors changed, each by its key."""
    tensors = load_file(path / WEIGHTS)
    save_file({k: change(k, t).contiguous() for k, t in tensors.items()}, path / WEIGHTS)
    return path


def with_config(path, **changes):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **changes}))
    return path


def save_dora(path, kind, variant="plain", index=0, spread=0.3, **fields):
    """A DoRA saved by PEFT, with magnitudes as training might leave them."""
    path = save_adapter(path, kind, ALL[variant], index, use_dora=True, **fields)
    generator = torch.Generator().manual_seed(500 + index)

    def trained(key, tensor):
        if MAGNITUDE not in key:
            return tensor
        change = 1 + spread * torch.randn(tensor.shape, generator=generator)
        return (tensor * change).to(ALL[variant].dtype)

    return with_tensors(path, trained)


def save_lora(path, kind, variant="plain", index=0, **fields):
    """A LoRA saved by PEFT."""
    return save_adapter(path, kind, ALL[variant], index, **fields)


def read(path, kind):
    """An adapter with its base model."""
    return Adapter.from_pretrained(path, base=BASES[kind])


# The same object each time: adapters of different base models do not combine.
BASES = {kind: make_base(kind).double() for kind in KINDS}


def base_weight(model, name):
    """W0 of a module with the output side first, the module, and whether it stores it so."""
    module = model.get_submodule(name)
    W = module.weight.detach().double()
    turned = type(module).__name__ in ("Conv1D", "Embedding")
    return (W.T if turned else W.flatten(1)).numpy(), module, turned


def change_of(path, make):
    """Module → ΔW of an adapter, by the formula of DoRA on dense weights in float64."""
    base, model = make().double(), PeftModel.from_pretrained(make().double(), str(path))
    changes = {}
    for name, (delta, _) in dense_deltas(model, "default").items():
        W, _, _ = base_weight(base, name)
        changes[name] = delta
        vectors = model.get_submodule(f"base_model.model.{name}").lora_magnitude_vector
        if "default" in vectors:
            m = vectors["default"].weight.detach().double().numpy().reshape(-1, 1)
            V = W + delta
            changes[name] = m / np.linalg.norm(V, axis=1, keepdims=True) * V - W
    return changes


def weighted(weights, changes):
    """Σ w_i ΔW_i, module by module."""
    total = {}
    for weight, held in zip(weights, changes, strict=True):
        for name, W in held.items():
            total[name] = total.get(name, 0) + weight * W
    return total


def changed(make, changes):
    """The base model with dense changes, in float64."""
    model = make().double()
    with torch.no_grad():
        for name, change in changes.items():
            W, module, turned = base_weight(model, name)
            W = torch.from_numpy(W + change)
            module.weight.copy_((W.T if turned else W).reshape(module.weight.shape))
    return model


def inputs_of(kind, dtype):
    """Inputs of a base model, in a precision if they are numbers."""
    inputs = make_inputs(kind)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


@torch.no_grad()
def wanted(kind, changes):
    """Outputs of the base model with dense changes."""
    return changed(partial(make_base, kind), changes)(inputs_of(kind, torch.float64))


@torch.no_grad()
def through_peft(kind, path, dtype, **options):
    """Outputs of the base model with an adapter directory."""
    base = make_base(kind).to(dtype)
    model = PeftModel.from_pretrained(base, str(path), **options).eval()
    return model(inputs_of(kind, dtype)).double()


def precision(variant):
    """The precision of a model for adapters of a variant."""
    return torch.float64 if variant == "float64" else torch.float32


def dense(delta):
    """ΔW of a resolved delta in float64."""
    W = delta.scaling * delta.B.double() @ delta.A.double()
    if isinstance(delta.gain, Gain):
        base = delta.gain.base.read(torch.float64, torch.device("cpu"))
        W = W + delta.gain.axes["out"].values.double()[:, None] * base
    return W.numpy()


def stored(path):
    """Key → tensor of a directory, keys as PEFT spells them, and the configuration."""
    tensors = {k.replace(f"{MAGNITUDE}.weight", MAGNITUDE): t
               for k, t in load_file(path / WEIGHTS).items()}  # fmt: skip
    return tensors, json.loads((path / CONFIG).read_text())


SAVE = {"d": save_dora, "l": save_lora}
