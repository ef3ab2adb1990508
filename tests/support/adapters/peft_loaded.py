"""Adapters that devec wrote, loaded by PEFT: exactly the layers of the file, and what they do."""

import json

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from devec import Adapter
from support.adapters.cases import dense_deltas, relative_error


def save(make, path, seed, *, std=0.3, **fields):
    """An adapter with random factors, saved by PEFT."""
    model = get_peft_model(make(), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(path))
    return path


def load(make, path, *, low=False):
    """A model with the adapter at a path, of which PEFT has made the layers in the file alone."""
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = True
    model = PeftModel(make(), config, "default", low_cpu_mem_usage=low)
    result = model.load_adapter(str(path), "default", low_cpu_mem_usage=low)
    assert not result.unexpected_keys
    assert not result.missing_keys
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(f"{path}/adapter_model.safetensors").keys()
    assert held.keys() == {key for key in written if not key.endswith(".base_layer.weight")}
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def require_exact(make, path, adapter=None, *, low=False):
    """Load an adapter with PEFT, and compare its layers with what devec says of it.

    Args:
        make: Makes the base model.
        path: Where the adapter was written.
        adapter: What was written; modules that it lacks are to be zeros, as are its experts.
        low: Whether PEFT makes its layers on the device ``"meta"`` first.

    Returns:
        The model.
    """
    model = load(make, path, low=low)
    again = Adapter.from_pretrained(path)
    require_same(dense_deltas(model, "default"), again)
    if adapter is not None:
        require_same(dense_deltas(model, "default"), adapter)
    return model


def require_same(got, adapter):
    """Compare module → (ΔW, Δb) of a model with an adapter."""
    assert adapter.modules.keys() <= got.keys()
    for module, (W, b) in got.items():
        delta = adapter.modules.get(module)
        want = np.zeros_like(W) if delta is None else effect(delta)
        assert relative_error(W, want) < 1e-5, module
        if delta is not None and delta.bias is not None:
            assert relative_error(b, delta.scaling * delta.bias.double().numpy()) < 1e-5, module


def effect(delta):
    """ΔW of a delta, dense and in float64."""
    return (delta.scaling * delta.B.double() @ delta.A.double()).numpy()


def targets(path):
    """What a written configuration targets."""
    return json.loads((path / "adapter_config.json").read_text())["target_modules"]


def require_exact_results(make, folder, results):
    """Write adapters by name, load each with PEFT in both ways, and compare its layers."""
    for name, adapter in results.items():
        path = folder / f"{name}-out"
        adapter.save_pretrained(path)
        for low in (False, True):
            require_exact(make, path, adapter, low=low)
