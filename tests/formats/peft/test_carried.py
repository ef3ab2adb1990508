"""Sums that keep one adapter's whole trained tensors, beside the factors of another."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import devec
from support.models.live_models import LLAMA, TOKENS, apart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def llama(tied=False):
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(**LLAMA, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    ).eval()


def save(path, seed, tied=False, **fields):
    """An adapter with all that it trains at random, and the weights of the merged model."""
    model = get_peft_model(llama(tied), LoraConfig(r=4, lora_alpha=6, **fields))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    model.save_pretrained(str(path))
    if "q_proj" not in fields["target_modules"]:  # merged, one of two tied layers changes the other
        model = PeftModel.from_pretrained(untied(llama(tied)), path)
    return devec.Adapter.from_pretrained(path), weights(model.merge_and_unload())


def untied(model):
    """A model whose head has a weight of its own."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def weights(model):
    """Name → weight, in float64."""
    return {key: tensor.double() for key, tensor in model.state_dict().items()}


def sum_of(changes, tied=False):
    """The base model with the changes of several, in float64."""
    model = untied(llama(tied).double())
    base = weights(model)
    total = {key: W + sum(changed[key] - W for changed in changes) for key, W in base.items()}
    model.load_state_dict(total)
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


CLASHES = {
    "module": ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head"),
    "full name": ({"modules_to_save": ["model.layers.0.mlp"]}, "up_proj", "layers.0.mlp.up_proj"),
    "an ending that is no whole name": ({"modules_to_save": ["head"]}, "lm_head", "lm_head"),
    "module inside": ({"modules_to_save": ["mlp"]}, "down_proj", "mlp.down_proj"),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, "embed_tokens", "embed_tokens"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "embed_tokens", "embed_tokens"),
    "tokens of a module": ({"trainable_token_indices": {"lm_head": [1]}}, "lm_head", "lm_head"),
    "bias and module": ({"modules_to_save": ["mlp"], "bias": "all"}, "up_proj", "mlp.up_proj"),
}


@pytest.mark.parametrize("first", ["carrier", "other"])
@pytest.mark.parametrize(("whole", "layer", "named"), CLASHES.values(), ids=CLASHES)
def test_modules_that_are_replaced_cannot_be_adapted_in_a_sum(tmp_path, whole, layer, named, first):
    a, _ = save(tmp_path / "a", 1, target_modules=["q_proj"], **whole)
    b, _ = save(tmp_path / "b", 2, target_modules=["q_proj", layer])
    pool = [a, b] if first == "carrier" else [b, a]
    for weights_, carried_from in (([1, 1], "a"), ([1, 1], None), ([1, 0], "a")):
        with pytest.raises(devec.DevecError) as error:
            devec.combine(pool, weights_, carried_from=carried_from)
        for word in (named, str(tmp_path / "a"), str(tmp_path / "b"), "carried_from='none'"):
            assert word in str(error.value)
    kept = devec.combine(pool, [1, 1], carried_from="none")
    assert not kept.carried
    assert kept.modules.keys() == {*a.modules, *b.modules}
    with pytest.raises(devec.DevecError, match="by factors"):
        a + b


def test_two_carriers_of_which_one_is_adapted_by_the_other(tmp_path):
    a, _ = save(tmp_path / "a", 1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    fields = {"target_modules": ["lm_head"], "trainable_token_indices": [1, 2]}
    b, _ = save(tmp_path / "b", 2, **fields)
    with pytest.raises(devec.DevecError, match=r"replaces 'lm_head'.*'b'"):
        devec.combine([a, b], [1, 1], carried_from="a")
    kept = devec.combine([a, b], [1, 1], carried_from="b")
    assert kept.carried.keys() == b.carried.keys()


def test_tied_heads_that_are_tokens_by_their_embedding(tmp_path):
    fields = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}}
    a, _ = save(tmp_path / "a", 1, tied=True, target_modules=["q_proj"], **fields)
    assert not any("lm_head" in key for key in a.carried)
    b, _ = save(tmp_path / "b", 2, tied=True, target_modules=["lm_head"])
    with pytest.raises(devec.DevecError, match="'lm_head'"):
        devec.combine([a, b], [1, 1], carried_from="a")


def test_tied_heads_that_are_saved_with_their_embedding(tmp_path):
    fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    a, _ = save(tmp_path / "a", 1, tied=True, target_modules=["q_proj"], **fields)
    b, _ = save(tmp_path / "b", 2, tied=True, target_modules=["lm_head"])
    with pytest.raises(devec.DevecError, match="'lm_head'"):
        devec.combine([a, b], [1, 1], carried_from="a")


BESIDE = {
    "head beside embedding": ({"modules_to_save": ["lm_head"]}, ["embed_tokens"]),
    "embedding beside head": ({"modules_to_save": ["embed_tokens"]}, ["lm_head"]),
    "mlp beside attention": ({"modules_to_save": ["mlp"]}, ["o_proj"]),
    "tokens beside head": ({"trainable_token_indices": [1, 2]}, ["lm_head"]),
    "biases of its layers": ({"bias": "lora_only"}, ["k_proj"]),
    "biases of all layers": ({"bias": "all"}, ["k_proj", "up_proj"]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("whole", "layers"), BESIDE.values(), ids=BESIDE)
def test_sums_with_whole_tensors_beside_factors(tmp_path, whole, layers, tied):
    """PEFT reads the bias of a layer under another key if it is adapted."""
    a, of_a = save(tmp_path / "a", 1, tied, target_modules=["q_proj"], **whole)
    b, of_b = save(tmp_path / "b", 2, tied, target_modules=layers)
    pools = {"ab": ([a, b], [1, 0.5]), "ba": ([b, a], [0.5, 1])}
    base = weights(llama(tied))
    half = {key: W + (of_b[key] - W) / 2 for key, W in base.items()}
    want = logits(sum_of([of_a, half], tied))
    for name, (pool, numbers) in pools.items():
        path = devec.combine(pool, numbers, carried_from="a").save_pretrained(tmp_path / name)
        model = PeftModel.from_pretrained(llama(tied), path).eval()
        assert apart(logits(model), want) < 1e-5


def test_biases_stay_when_their_layer_has_no_factors_left(tmp_path):
    fields = {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}
    a, _ = save(tmp_path / "a", 1, **fields)
    path = devec.combine([a], [1], name="x").save_pretrained(tmp_path / "whole")
    assert load_file(path / "adapter_model.safetensors").keys() >= a.carried.keys()
    some = {m: d for m, d in a.modules.items() if "k_proj" not in m}
    path = dataclasses.replace(a, modules=some).save_pretrained(tmp_path / "part")
    model = PeftModel.from_pretrained(llama(), path).eval()
    for key, tensor in a.carried.items():
        layer = model.get_submodule(key.removesuffix(".base_layer.bias"))
        bias = layer.base_layer.bias if ".q_proj." in key else layer.bias
        assert torch.equal(bias, tensor)


HEADS = {"SEQ_CLS": {"task_type": "SEQ_CLS"}, "part of it": {"modules_to_save": ["out_proj"]}}


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_labels": 3}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 40}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, **layers)).eval()


@pytest.mark.parametrize("kept", HEADS)
@pytest.mark.parametrize("order", [1, -1])
def test_the_task_is_that_of_the_head_that_is_kept(tmp_path, kept, order):
    """PEFT's class for a task wants all of its head, of which another adapter trained a part."""
    merged = {}
    for seed, (name, fields) in enumerate(HEADS.items()):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["query"], **fields)
        model = get_peft_model(classifier(), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 5
        model.save_pretrained(str(tmp_path / name))
        merged[name] = weights(model.merge_and_unload())
    pool = [devec.Adapter.from_pretrained(tmp_path / name) for name in HEADS][::order]
    devec.combine(pool, [1, 1], carried_from=kept).save_pretrained(tmp_path / "sum")
    want, base = classifier().double(), weights(classifier())
    changes = {
        key: sum(m[key] - W for name, m in merged.items() if "query" in key or name == kept)
        for key, W in base.items()
    }
    want.load_state_dict({key: W + changes[key] for key, W in base.items()})
    got = PeftModel.from_pretrained(classifier(), tmp_path / "sum").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            got(tokens).logits.double(), want(tokens).logits, rtol=1e-4, atol=1e-5
        )
