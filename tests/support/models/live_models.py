"""Models in memory that hold adapters, and what those do by the formulas, dense and in float64."""

import copy

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from support.adapters.cases import (
    HOSTS,
    Variant,
    factor_pairs,
    fill,
    make_base,
    make_inputs,
    save_adapter,
)
from support.models.pipelines import make_pipeline, run
from support.truth import reference

NAMES = ("anime", "pixel", "sketch")
THRESHOLD = 0.5
TOKENS = torch.arange(24).reshape(2, 12)

# What is adapted of each: layers of every kind that it has.
PIPELINES = {
    "sd15": ["to_q", "to_out.0", "conv1", "q_proj", "fc1"],
    "sdxl": ["to_v", "proj_in", "q_proj"],
    "flux": ["to_q", "to_add_out", "proj_out", "q_proj"],
    "sd3": ["to_k", "add_v_proj", "linear", "v_proj"],
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), ["q_proj", "down_proj", "lm_head"]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), ["c_attn", "c_proj", "wpe"]),
}


def make_model(kind):
    """A small language model, the same each time, whose layers have effects one can see."""
    torch.manual_seed(3)
    model = MODELS[kind][0]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 5
    return model.requires_grad_(False)


def trained(model, name, seed):
    """Give an adapter factors and magnitudes as training might leave them."""
    fill(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    for module, A, B in factor_pairs(model, name):
        A.data, B.data = A.data / 4, B.data / len(B) ** 0.5
        held = getattr(module, "lora_magnitude_vector", {})
        if name in held:
            m = held[name].weight.data
            m *= 1 + 0.2 * torch.randn(m.shape, generator=generator).to(m)


def add(model, name, index, targets, **fields):
    """An adapter in a model of transformers or diffusers."""
    rank = (6, 4, 5)[index]
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=targets, **fields)
    model.add_adapter(config, name)
    trained(model, name, 1000 + index)


def peft_host(directory, kind, names=NAMES, **fields):
    """A PeftModel with adapters that have directions in common."""
    for index, name in enumerate(names):
        save_adapter(directory / name, kind, Variant(), index, **fields)
    model = PeftModel.from_pretrained(make_base(kind), directory / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(directory / name, adapter_name=name)
    for index, name in enumerate(names):
        if fields.get("use_dora"):
            trained(model, name, 1000 + index)
    return model.eval()


def model_host(kind, names=NAMES, **fields):
    """A model of transformers with adapters."""
    model = make_model(kind)
    for index, name in enumerate(names):
        add(model, name, index, MODELS[kind][1], **fields)
    model.set_adapter(names[0])
    return model


def pipeline_host(kind, names=NAMES, **fields):
    """A pipeline with adapters in its denoiser and its text encoders."""
    pipe = make_pipeline(kind)
    for model in components(pipe).values():
        for index, name in enumerate(names):
            add(model, name, index, PIPELINES[kind], **fields)
    pipe.set_adapters([names[0]])
    return pipe


def components(pipe):
    """Name → model, of those whose adapters a pipeline manages."""
    slots = pipe._lora_loadable_modules
    return {slot: getattr(pipe, slot) for slot in slots if getattr(pipe, slot, None) is not None}


def layers(model):
    """Name in the base model → LoRA layer."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def base_weight(module):
    """W0 in float64, output side first, and whether the layer stores it so."""
    W = module.weight.detach().double()
    turned = type(module).__name__ in ("Conv1D", "Embedding")
    return (W.T if turned else W.flatten(1)).numpy(), turned


def changes(model, name):
    """Module → (low-rank part, ΔW), by the formulas of LoRA and DoRA on dense matrices."""
    found = {}
    for path, layer in layers(model).items():
        for _, A, B in factor_pairs(_Alone(layer), name):
            A, B = (f.detach().double().flatten(1).numpy() for f in (A, B))
            low = layer.lora_alpha[name] / layer.r[name] * B @ A
            whole = low
            held = getattr(layer, "lora_magnitude_vector", {})
            if name in held:
                W, _ = base_weight(layer.get_base_layer())
                m = held[name].weight.detach().double().numpy().reshape(-1, 1)
                D = m / np.linalg.norm(W + low, axis=1, keepdims=True)
                low, whole = D * low, D * (W + low) - W
            found[path] = low, whole
    return found


class _Alone:
    """A layer as the only module there is."""

    def __init__(self, layer):
        self.layer = layer

    def modules(self):
        return [self.layer]


def parts(pool, threshold=THRESHOLD):
    """Name of a part → module → ΔW, by the paper's method on dense matrices.

    Args:
        pool: Name of an adapter → module → (low-rank part, ΔW).
        threshold: Of the eigenvalues of the chain.
    """
    found = {}
    for module in next(iter(pool.values())):
        lows, wholes = zip(*(changes[module] for changes in pool.values()), strict=True)
        Z = reference.chain_basis(lows, threshold)
        shared = [Z @ Z.T @ W for W in wholes]
        norms = [np.linalg.norm(S) for S in shared]
        for name, S, W in zip(pool, shared, wholes, strict=True):
            found.setdefault(f"{name}_shared", {})[module] = S
            found.setdefault(f"{name}_unique", {})[module] = W - S
        weighted = sum(n * S for n, S in zip(norms, shared, strict=True)) / (sum(norms) or 1)
        found.setdefault("common", {})[module] = weighted
    return found


@torch.no_grad()
def changed(base, deltas):
    """A model with dense changes, in float64."""
    model = copy.deepcopy(base).double()
    for name, delta in deltas.items():
        module = model.get_submodule(name)
        W, turned = base_weight(module)
        W = torch.from_numpy(W + delta)
        module.weight.data = (W.T if turned else W).reshape(module.weight.shape).contiguous()
    return model


def apart(got, want):
    return float((got.double() - want).norm() / want.norm())


def set_weights(model, names, weights):
    """Activate adapters with weights in a model, in this order; PEFT has no call for it."""
    (model.base_model if isinstance(model, PeftModel) else model).set_adapter(list(names))
    for layer in layers(model).values():
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)


@torch.no_grad()
def outputs(model, kind):
    """What a model makes of inputs that stay the same."""
    if kind in MODELS:
        return model(TOKENS).logits
    inputs = make_inputs(kind)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    numbers = inputs.is_floating_point()
    return model(inputs.to(next(inner.parameters()).dtype) if numbers else inputs)


def through_pipeline(pipe):
    """Name of a model → what it makes of inputs that stay the same."""
    return run(pipe)


KINDS = [kind for kind in HOSTS if kind != "experts"]


def tensors_of(model, name):
    """Name without that of the adapter → tensor."""
    return {
        key.replace(f".{name}.", "."): parameter.detach()
        for key, parameter in model.named_parameters()
        if f".{name}." in key
    }
