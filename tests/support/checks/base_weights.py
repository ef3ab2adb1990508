"""Base weights as devec reads them, and the names and files of pipelines to read them from."""

from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from devec.base_model.model import base_model
from devec.naming.families import flat
from devec.naming.tables import TABLES
from support.models.pipelines import ENCODERS, linear_modules, make_pipeline

CPU = torch.device("cpu")

FAMILIES = {"sd15": "sd", "sdxl": "sdxl", "flux": "flux", "sd3": "sd3"}


def read(base, module, shape, dtype=torch.float32, **known):
    return base_model(base).weight(module, tuple(shape), **known).read(dtype, CPU)


def wrong(base, ids, truth, **known):
    """Which modules do not read as they should."""
    assert ids
    base = base_model(base)
    return [i for i in ids if not torch.equal(read(base, i, truth(i).shape, **known), truth(i))]


def refused(error, base, *parts, module="first", shape=(4, 6), **known):
    """Assert that a handle is given, and that reading it is refused with a message."""
    handle = base_model(base).weight(module, shape, **known)
    with pytest.raises(error) as caught:
        handle.read(torch.float32, CPU)
    for part in parts:
        assert part in str(caught.value)


def single(path, **tensors):
    """A file of some tensors, whose names have ``__`` for dots."""
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


pipeline = lru_cache(make_pipeline)


def slots(kind):
    """Name of a model in the pipeline → the model."""
    pipe = pipeline(kind)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    named = {name: getattr(pipe, name, None) for name in (denoiser, *ENCODERS)}
    return {name: model for name, model in named.items() if model is not None}


def family(kind):
    return TABLES[FAMILIES[kind]]()


def swapped(name, weight):
    """A weight with the halves that native names have the other way round."""
    at_end = flat(name).endswith("final_layer_adaLN_modulation_1")
    in_context = flat(name).endswith("joint_blocks_2_context_block_adaLN_modulation_1")
    return torch.cat(weight.chunk(2)[::-1]) if at_end or in_context else weight


def native_names(kind):
    """Native names of the modules of a denoiser."""
    models = slots(kind)
    parts = linear_modules(next(iter(models.values())))
    names = dict.fromkeys(family(kind).module(part, "native") for part in parts)
    return list(names)


def native_state(kind, prefix):
    """The weights of a denoiser by their native names, rows fused by hand."""
    weights = {n: m.weight for n, m in linear_modules(next(iter(slots(kind).values()))).items()}
    return {
        f"{prefix}{name}.weight": swapped(
            name, torch.cat([weights[p.name] for p in family(kind).native[name]])
        ).contiguous()
        for name in native_names(kind)
    }


ENCODER_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer."},
    "flux": {"text_encoder": "text_encoders.clip_l.transformer.",
             "text_encoder_2": "text_encoders.t5xxl.transformer."},
    "sd3": {"text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."},
}  # fmt: skip


def _language_models():
    vocabulary = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, **vocabulary)
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, **vocabulary}  # fmt: skip
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    bert = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=24, max_position_embeddings=8)  # fmt: skip
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **llama)),
        "llama, not tied": lambda: LlamaForCausalLM(
            LlamaConfig(tie_word_embeddings=False, **llama)
        ),
        "t5": lambda: T5ForConditionalGeneration(t5),
        "bert": lambda: BertForMaskedLM(bert),
    }


LANGUAGE = _language_models()


@lru_cache
def language_model(kind):
    torch.manual_seed(3)
    return LANGUAGE[kind]().eval().requires_grad_(False)


def layers(model):
    """PEFT's name of a layer → its weight as the map from inputs to outputs."""
    turned = (Conv1D, nn.Embedding)
    return {
        name: module.weight.mT if isinstance(module, turned) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }


def _sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _index(model, folder):
    return _sharded(model, folder) / "model.safetensors.index.json"


def plain(**replaced):
    """A model of three layers, some replaced."""
    torch.manual_seed(2)
    inner = {"first": nn.Linear(6, 4), "second": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    return nn.ModuleDict({**inner, **replaced}).requires_grad_(False)


UNQUANTISED = nn.Linear(64, 32).requires_grad_(False).state_dict()


def quantised(kind):
    nf4 = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)(64, 32, **nf4)
    layer.load_state_dict(UNQUANTISED)
    return layer.requires_grad_(False).to("cpu")
