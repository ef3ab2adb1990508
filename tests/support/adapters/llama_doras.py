"""A small language model, two DoRA adapters of it and a LoRA, made by PEFT, and their truth."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from support.truth.reference import dora_truth

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DORAS = ("toxic", "polite")
TOKENS = torch.arange(24).reshape(2, 12)


def save_models(root):
    """A model in `llama`, and adapters that have two directions in common."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 10  # the usual 0.02 makes for logits of next to nothing
    model.save_pretrained(root / "llama")
    for name in (*DORAS, "plain"):
        save_adapter(root, name)


def save_adapter(root, name):
    """An adapter made by PEFT, with factors and magnitudes as if they had been trained."""
    model = LlamaForCausalLM.from_pretrained(root / "llama")
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=name in DORAS)
    model = get_peft_model(model, config)
    torch.manual_seed(7)
    common = {key: torch.randn(32, 2) for key, _ in model.named_parameters()}
    torch.manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.05 * torch.randn_like(parameter)
            parameter.data[:, :2] += 0.3 * common[key]
        if "magnitude" in key:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(root / name)


def truths(root, name):
    """Module → ΔW, dense and naive, and the base weights."""
    base = load_file(root / "llama" / "model.safetensors")
    stored = {k: t.double().numpy() for k, t in load_file(root / name / WEIGHTS).items()}
    deltas = {}
    for key, A in stored.items():
        if ".lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            W = base[f"{module}.weight"].double().numpy()
            B = stored[key.replace("lora_A", "lora_B")]
            m = stored.get(key.replace("lora_A.weight", "lora_magnitude_vector"))
            deltas[module] = 1.5 * B @ A if m is None else dora_truth(W, B, A, 1.5, m, "out")
    return deltas


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


def expected(root, coefficients):
    """Logits of the model whose weights are W0 + Σ w_i ΔW_i."""
    model = LlamaForCausalLM.from_pretrained(root / "llama").double()
    for name, weight in coefficients.items():
        for module, delta in truths(root, name).items():
            model.get_submodule(module).weight.data += weight * torch.from_numpy(delta)
    return logits(model)


def loaded(root, *names):
    """Logits with adapters that PEFT loaded, all of them active."""
    model = LlamaForCausalLM.from_pretrained(root / "llama")
    model = PeftModel.from_pretrained(model, root / names[0], adapter_name=names[0].split("/")[-1])
    for name in names[1:]:
        model.load_adapter(root / name, adapter_name=name.split("/")[-1])
    model.base_model.set_adapter([name.split("/")[-1] for name in names])
    return logits(model)


def apart(got, want):
    return float((got - want).norm() / want.norm())
