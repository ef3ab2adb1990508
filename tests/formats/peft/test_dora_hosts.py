"""DoRAs that devec wrote, through everything that loads PEFT directories."""

import copy
import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    HubertConfig,
    HubertForSequenceClassification,
    LlamaConfig,
)

from devec import Adapter, combine
from support.adapters.cases import (
    relative_error,
    save_adapter,
)
from support.adapters.peft_doras import (
    CONFIG,
    MAGNITUDE,
    WEIGHTS,
    change_of,
    changed,
    save_dora,
    weighted,
)
from support.models.small_vit import vit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]


# Hosts


def seeded(model, config):
    """A small model of transformers, the same each time."""
    torch.manual_seed(0)
    return model(copy.deepcopy(config)).eval()


MODELS = {
    "gpt2": (
        partial(
            seeded,
            AutoModelForCausalLM.from_config,
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16),
        ),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"input_ids": torch.arange(12)[None]},
    ),
    "llama": (
        partial(
            seeded,
            AutoModelForCausalLM.from_config,
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=50,
            ),
        ),
        {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"], "use_rslora": True},
        {"input_ids": torch.arange(12)[None]},
    ),
    "vit": (
        vit,
        {"target_modules": ["projection", "query", "dense"]},
        {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
    "hubert": (
        partial(
            seeded,
            HubertForSequenceClassification,
            HubertConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                conv_dim=(8, 12),
                conv_stride=(2, 2),
                conv_kernel=(3, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                feat_extract_norm="layer",
                classifier_proj_size=16,
            ),
        ),
        {"target_modules": r".*(conv_layers\.\d\.conv|q_proj)"},
        {"input_values": torch.randn(2, 64)},
    ),
}


def loaded(make, path, how):
    """A model with an adapter loaded in one of the ways that there are."""
    if how == "transformers":
        model = make()
        model.load_adapter(str(path))
        return model
    options = {"low_cpu_mem_usage": True} if how == "low_cpu_mem_usage" else {}
    if how != "load_adapter":
        return PeftModel.from_pretrained(make(), str(path), **options).eval()
    model = get_peft_model(make(), LoraConfig(**json.loads((path / CONFIG).read_text())))
    result = model.load_adapter(str(path), adapter_name="sum")
    assert not result.unexpected_keys
    model.set_adapter("sum")
    return model.eval()


@pytest.mark.parametrize(
    "how", ["from_pretrained", "load_adapter", "low_cpu_mem_usage", "transformers"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_loader_loads_what_is_written(tmp_path, name, how):
    make, fields, inputs = MODELS[name]
    save_dora(tmp_path / "a", "linear", base=make(), **fields)
    save_adapter(tmp_path / "b", "linear", "plain", 1, base=make(), **fields)
    base = make()
    adapters = [Adapter.from_pretrained(tmp_path / n, base=base) for n in "ab"]
    adapters[0].save_pretrained(tmp_path / "same")
    combine(adapters, [0.6, -0.3]).save_pretrained(tmp_path / "sum")
    a, b = (change_of(tmp_path / n, make) for n in "ab")
    with torch.no_grad():
        before = make()(**inputs).logits
        for path, changes in ("same", a), ("sum", weighted([0.6, -0.3], [a, b])):
            want = changed(make, changes).float()(**inputs).logits
            got = loaded(make, tmp_path / path, how)(**inputs).logits
            assert relative_error(got, want) < 1e-5
            assert relative_error(before, want) > 1e-3


def test_half_precision_models_take_wider_magnitudes(tmp_path):
    make, _, inputs = MODELS["llama"]
    # PEFT itself fails on embeddings in half precision with low_cpu_mem_usage
    fields = {"target_modules": ["q_proj", "down_proj"]}
    save_dora(tmp_path / "a", "linear", "bfloat16", base=make(), **fields)
    adapter = Adapter.from_pretrained(tmp_path / "a", base=make())
    (0.5 * adapter).save_pretrained(tmp_path / "half")
    types = {t.dtype for k, t in load_file(tmp_path / "half" / WEIGHTS).items() if MAGNITUDE in k}
    assert types == {torch.float32}
    for how in ("from_pretrained", "low_cpu_mem_usage", "transformers"):
        got = loaded(lambda: make().bfloat16(), tmp_path / "half", how)(**inputs).logits
        assert got.dtype == torch.bfloat16
        want = changed(make, change_of(tmp_path / "half", make)).float()(**inputs).logits
        assert relative_error(got.detach().float(), want.detach()) < 0.05


def test_resized_embeddings_are_computed_with_as_they_are_stored(tmp_path):
    """PEFT loads the weights that it saved beside the embedding, whatever the base model has."""
    make, fields, inputs = MODELS["llama"]

    def grown():
        model = make()
        torch.manual_seed(3)
        model.resize_token_embeddings(57)
        return model.eval()

    save_dora(tmp_path / "a", "linear", base=grown(), **fields)
    adapter = Adapter.from_pretrained(tmp_path / "a", base=make())
    (0.5 * adapter).save_pretrained(tmp_path / "half")
    want = changed(grown, weighted([0.5], [change_of(tmp_path / "a", grown)])).float()
    got = PeftModel.from_pretrained(grown(), str(tmp_path / "half")).eval()
    with torch.no_grad():
        assert relative_error(got(**inputs).logits, want(**inputs).logits) < 1e-5
