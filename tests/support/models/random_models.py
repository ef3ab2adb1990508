"""Small models, and configurations of PEFT for them, drawn from a seed."""

import re

import numpy as np
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

TOKENS = {"input_ids": torch.arange(12)[None]}
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
EXPERTS = {**SIZES, "num_key_value_heads": 1, "num_experts_per_tok": 2}
DECODER = {"decoder_input_ids": torch.arange(5)[None]}


class Custom(nn.Module):
    """A layer of every kind that PEFT adapts, some of them twice."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(12, 16)
        self.first = nn.ModuleDict({"proj": nn.Linear(16, 16), "conv": nn.Conv1d(1, 4, 3)})
        self.second = nn.ModuleDict({"proj": nn.Linear(16, 16), "conv": nn.Conv2d(1, 4, (2, 3))})
        self.third = nn.ModuleDict({"conv": nn.Conv3d(1, 3, 2)})
        self.turned = Conv1D(16, 16)
        self.head = nn.Linear(4 * 14 + 4 * 6 + 3 * 3 + 16, 6)

    def forward(self, input_ids):
        x = self.tokens(input_ids[0])
        x = x + torch.tanh(self.first["proj"](x)) + self.turned(x)
        y = self.second["proj"](x)
        flat = [
            self.first["conv"](y[:, None]).flatten(1),
            self.second["conv"](y.reshape(-1, 1, 4, 4)).flatten(1),
            self.third["conv"](y.reshape(-1, 1, 4, 2, 2)).flatten(1),
            y,
        ]
        return self.head(torch.cat(flat, dim=1))


class Attention(nn.Module):
    """nn.MultiheadAttention between linear layers."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


def _hf(model, config, **fields):
    """What makes a model of transformers, weights of input and output apart."""
    return lambda: getattr(hf, model)(getattr(hf, config)(**fields, tie_word_embeddings=False))


_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 40, "num_layers": 1}
_WHISPER = {
    "d_model": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    "vocab_size": 40,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VIT = {k: v for k, v in SIZES.items() if k != "vocab_size"}
_LLAMA = {**SIZES, "num_key_value_heads": 1}
_CAUSAL, _BERT = "CausalLM", {**SIZES, "max_position_embeddings": 20}

# Kind → what makes the model, its inputs, and layers that are trained whole.
MODELS = {
    "llama": (_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA), TOKENS, ["lm_head"]),
    "gpt2": (_hf("GPT2LMHeadModel", "GPT2Config", **_GPT2), TOKENS, ["lm_head", "ln_f"]),
    "roberta": (
        _hf("RobertaForSequenceClassification", "RobertaConfig", **_BERT, num_labels=3),
        TOKENS,
        ["classifier", "out_proj"],
    ),
    "bert": (_hf("BertModel", "BertConfig", **_BERT), TOKENS, ["pooler"]),
    "t5": (
        _hf("T5ForConditionalGeneration", "T5Config", **_T5),
        {**TOKENS, **DECODER},
        ["final_layer_norm"],
    ),
    "mixtral": (
        _hf("MixtralForCausalLM", "MixtralConfig", **EXPERTS, num_local_experts=3),
        TOKENS,
        ["lm_head"],
    ),
    "qwen3-moe": (
        _hf(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **EXPERTS,
            head_dim=8,
            num_experts=4,
            moe_intermediate_size=12,
        ),
        TOKENS,
        ["lm_head"],
    ),
    "vit": (
        _hf(
            "ViTForImageClassification",
            "ViTConfig",
            **_VIT,
            image_size=8,
            patch_size=4,
            num_labels=3,
        ),
        {"pixel_values": torch.linspace(-1, 1, 384).sin().reshape(2, 3, 8, 8)},
        ["classifier"],
    ),
    "clip": (
        _hf("CLIPTextModel", "CLIPTextConfig", **SIZES, max_position_embeddings=16),
        TOKENS,
        ["fc2"],
    ),
    "whisper": (
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        {"input_features": torch.linspace(-9, 9, 128).cos().reshape(1, 8, 16), **DECODER},
        ["proj_out"],
    ),
    "mamba": (
        _hf(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=16,
            num_hidden_layers=2,
            vocab_size=40,
            state_size=4,
        ),
        TOKENS,
        ["lm_head"],
    ),
    "custom": (Custom, TOKENS, ["head"]),
    "attention": (Attention, {"x": torch.linspace(-5, 5, 80).sin().reshape(1, 5, 16)}, ["fc"]),
}
# Weights that have several names, that the model reads past its layers, or that PEFT cannot adapt.
LEFT_OUT = {
    "t5": ("shared", "embed_tokens", "relative_attention_bias"),
    "mamba": ("conv1d", "dt_proj"),
    "whisper": ("conv1", "conv2", "embed_positions"),
    "attention": ("out_proj",),
}
ADAPTED = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def make_model(kind, *, biased=False, but=()):
    """A model, the same each time, whose layers have effects one can see.

    Args:
        kind: A key of `MODELS`.
        biased: Whether linear layers without biases have some of zeros, to which PEFT can merge.
        but: Layers that have none, since they are trained whole.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    model = MODELS[kind][0]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and hasattr(model, "config"):
            parameter.data *= 5
    if "moe" in kind or kind == "mixtral":
        model.config._experts_implementation = "eager"  # the others do not compute in float64
    for name, module in model.named_modules() if biased else ():
        whole = any(part in but for part in name.split("."))
        if isinstance(module, nn.Linear) and module.bias is None and not whole:
            module.bias = nn.Parameter(torch.zeros(len(module.weight)))
    return model.requires_grad_(False)


@torch.no_grad()
def outputs(model, kind):
    """What a model computes, in float64."""
    held = {k: t.double() if t.is_floating_point() else t for k, t in MODELS[kind][1].items()}
    found = model(held["x"]) if kind == "attention" else model(**held)
    return (found if isinstance(found, torch.Tensor) else found[0]).double().numpy()


def adaptable(kind):
    """Names of the layers that an adapter can change."""
    named = make_model(kind).named_modules()
    left_out = LEFT_OUT.get(kind, ())
    return [
        name
        for name, module in named
        if isinstance(module, ADAPTED) and name.rpartition(".")[2] not in left_out
    ]


def subset(rng, values, most=4):
    """Some of the values, one at least."""
    count = int(rng.integers(1, min(most, len(values)) + 1))
    return [values[i] for i in rng.permutation(len(values))[:count]]


def drawn_targets(rng, names):
    """``target_modules`` of one of the kinds that PEFT knows."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    kind = rng.choice(["leaves", "leaves", "names", "pattern", "layer", "all-linear"])
    if kind == "leaves":
        return subset(rng, leaves)
    if kind == "names":
        return subset(rng, names)
    if kind == "pattern":
        return rf".*\b({'|'.join(map(re.escape, subset(rng, leaves)))})"
    if kind == "layer":
        return rf".*\b0\..*({'|'.join(map(re.escape, subset(rng, leaves)))})"
    return "all-linear"


def drawn_pattern(rng, names, values):
    """Patterns for some modules, of the kinds that people write."""
    found = {}
    for _ in range(int(rng.integers(1, 4))):
        name = names[rng.integers(len(names))]
        leaf = name.rpartition(".")[2]
        key = [leaf, name, f"^{re.escape(name)}", rf".*\.0\..*{leaf}", f".*{leaf[:2]}.*"]
        found[str(key[rng.integers(len(key))])] = values()
    return found


def maybe(rng, probability, fields, **more):
    """Add fields now and then."""
    if rng.random() < probability:
        fields.update(more)


def draw_config(rng, kind, experts=()):
    """Fields of a LoraConfig that PEFT may or may not accept for a model."""
    names, whole = adaptable(kind), MODELS[kind][2]

    def alpha():
        return [1, 2, 7, 16, 0.5][rng.integers(5)]

    def rank():
        return int(rng.integers(1, 7))

    fields = {"r": rank(), "lora_alpha": alpha(), "target_modules": drawn_targets(rng, names)}
    if kind == "gpt2":
        fields["fan_in_fan_out"] = True
    if experts:
        fields["target_parameters"] = list(experts)
    maybe(rng, 0.4, fields, rank_pattern=drawn_pattern(rng, names, rank))
    maybe(rng, 0.4, fields, alpha_pattern=drawn_pattern(rng, names, alpha))
    maybe(rng, 0.3, fields, use_rslora=True)
    if rng.random() < 0.25:
        fields["use_dora"] = True
    else:
        maybe(rng, 0.2, fields, lora_bias=True)
    if "lora_bias" not in fields:  # one bias would change in two ways
        maybe(rng, 0.1, fields, bias=str(rng.choice(["all", "lora_only"])))
    maybe(rng, 0.15, fields, exclude_modules=subset(rng, names))
    maybe(rng, 0.15, fields, layers_to_transform=[int(rng.integers(2))])
    maybe(rng, 0.2, fields, modules_to_save=subset(rng, whole, 1))
    if kind != "t5":  # whose output layer PEFT ties to the tokens
        maybe(rng, 0.15, fields, trainable_token_indices=[1, 3, 8])
    init = [True, False, "gaussian", "orthogonal"][rng.integers(4)]
    maybe(rng, 0.3, fields, init_lora_weights=init)
    if kind == "roberta":
        maybe(rng, 0.5, fields, task_type="SEQ_CLS")
    return fields


def drawn_experts(rng, kind):
    """Parameters of experts that all adapters of a pool target; none for most models."""
    if kind not in ("mixtral", "qwen3-moe") or rng.random() < 0.4:
        return ()
    return tuple(subset(rng, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))


def generator(*numbers):
    """A source of random numbers."""
    return np.random.default_rng(numbers)
