"""Small language models with experts, and adapters of them as transformers 4 stored them."""

import json

import pytest
import torch
from safetensors.torch import save_file

# Which has all of these models.
transformers = pytest.importorskip("transformers", minversion="5.0")

TOKENS = torch.arange(12)[None]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

MODELS = {
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        {"num_local_experts": 3},
    ),
    "qwen2": (
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        {"num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    ),
    "qwen3": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {"num_experts": 3, "moe_intermediate_size": 12, "head_dim": 8, "mlp_only_layers": [1]},
    ),
    "olmoe": (transformers.OlmoeForCausalLM, transformers.OlmoeConfig, {"num_experts": 4}),
    "deepseek": (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config,
        {
            **LATENT,
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "gpt-oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {"num_local_experts": 3, "head_dim": 8},
    ),
}


def maker(kind):
    """What makes the model of a kind, the same each time."""
    model, config, fields = MODELS[kind]

    def make():
        torch.manual_seed(3)
        return model(config(**SIZES, **fields)).eval()

    return make


def save_of_transformers_4(path, seed, rank, alpha, layers=2, experts=3):
    """An adapter of Mixtral with factors of each expert, as PEFT saved it before transformers 5."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}
    names = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}": shape
        for layer in range(layers)
        for expert in range(experts)
        for part, shape in shapes.items()
    }
    names |= {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in range(layers)}
    tensors = {}
    for name, (out, columns) in names.items():
        A = torch.randn(rank, columns, generator=generator)
        B = torch.randn(out, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A / 3
        tensors[f"base_model.model.{name}.lora_B.weight"] = B / 3
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["w1", "w2", "w3", "q_proj"],
    }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
