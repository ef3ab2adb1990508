"""What is written names its layers so that PEFT adapts these and no other, in any model."""

import copy
import dataclasses
import json
import random
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from devec import Adapter, DevecError, combine, compress, decompose
from devec.formats.convert import convert
from support.adapters.cases import dense_deltas, relative_error, save_kohya
from support.adapters.peft_loaded import load, require_exact, require_exact_results, save, targets
from support.models import small_moe
from support.models.live_models import changed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = {**SIZES, "intermediate_size": 24}
BERT = {**LAYERS, "max_position_embeddings": 40, "num_labels": 3}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


class Alike(nn.Module):
    """Layers whose names are endings of each other, and of layers that are never adapted."""

    def __init__(self):
        super().__init__()
        self.proj, self.dense = nn.Linear(24, 24), nn.Linear(24, 24)
        self.inner = nn.ModuleDict({"proj": nn.Linear(24, 24), "dense": nn.Linear(24, 24)})
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(24, 24)})})
        self.head = nn.Sequential()
        self.head.add_module("dense", nn.Linear(24, 24))
        self.head.add_module("proj", nn.Linear(24, 4))

    def forward(self, x):
        x = self.inner["dense"](self.dense(x)) + self.outer["inner"]["proj"](x)
        return self.head(self.proj(self.inner["proj"](x)))


def llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**LAYERS, num_key_value_heads=2, **fields))


MODELS = {
    "alike": Alike,
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)),
    "bert": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    **{kind: small_moe.maker(kind) for kind in small_moe.MODELS},
}

CASES = [
    ("alike", {"target_modules": "proj"}),
    ("alike", {"target_modules": ["proj"], "exclude_modules": ["inner.proj", "head.proj"]}),
    ("alike", {"target_modules": r"(inner\.)?(proj|dense)"}),
    ("alike", {"target_modules": ["proj", "dense"], "modules_to_save": ["head"]}),
    ("alike", {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.0\..*q_proj"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": "h"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("roberta", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    ("roberta", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("roberta", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    ("roberta", {"target_modules": r".*\.(dense|query)", "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["value", "dense"], "task_type": "TOKEN_CLS"}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": r".*h\.1\..*c_proj", "fan_in_fan_out": True}),
    ("t5", {"target_modules": ["q", "wo"], "exclude_modules": r"encoder\..*"}),
    ("t5", {"target_modules": r".*(Self|EncDec)Attention\.(q|o)", "task_type": "SEQ_2_SEQ_LM"}),
    ("mixtral", {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    ("mixtral", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]}),
    ("mixtral", {"target_modules": r"model\.layers\.0\.self_attn\.[qk]_proj"}),
    ("mixtral", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen2", {"target_modules": r".*shared_expert\.(up|down)_proj|.*0.*v_proj"}),
    ("qwen2", {"target_modules": ["gate_proj"], "layers_to_transform": [1]}),
    ("qwen3", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    ("qwen3", {"target_modules": "all-linear"}),
    ("olmoe", {"target_modules": r".*layers\.1.*(q|v)_proj"}),
    ("deepseek", {"target_modules": ["o_proj", "q_a_proj"], "exclude_modules": r".*1.*q_a_proj"}),
    ("gpt-oss", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
]


def maker(model):
    def make():
        torch.manual_seed(3)
        return MODELS[model]().eval()

    return make


def pool(tmp_path, make, fields):
    for seed, (name, rank) in enumerate({"a": 4, "b": 3}.items()):
        save(make, tmp_path / name, seed, r=rank, lora_alpha=9, **copy.deepcopy(fields))
    return [Adapter.from_pretrained(tmp_path / name) for name in "ab"]


def some(adapter, seed):
    """Some of the modules of an adapter, without its head."""
    names = list(adapter.modules)
    kept = random.Random(seed).sample(names, max(1, len(names) // 2))
    modules = {n: d for n, d in adapter.modules.items() if n in kept}
    return dataclasses.replace(adapter, modules=modules, carried={})


RESULTS = {
    "as read": lambda a, b: {"a": a, "b": dataclasses.replace(b, carried={})},
    "sum": lambda a, b: {"sum": combine([a, b], [1, 1], carried_from="a")},
    "sum without the head": lambda a, b: {"s": combine([a, b], [1, -2], carried_from="none")},
    "some": lambda a, b: {"some": some(a, 1), "sum": some(a, 2) + some(b, 3)},
    "compressed": lambda a, _: {"c": compress(a, energy=0.5).adapter},
    "parts": lambda a, b: decompose([a, b], threshold=0.2).outputs(),
    "compact": lambda a, b: decompose([a, b], threshold=0.3).outputs(compact=True),
}


@pytest.mark.parametrize(("model", "fields"), CASES)
def test_peft_adapts_what_is_in_the_file_and_no_more(tmp_path, model, fields):
    make = maker(model)
    a, b = pool(tmp_path, make, fields)
    for result, operation in RESULTS.items():
        require_exact_results(make, tmp_path / result, operation(a, b))


@pytest.mark.parametrize(
    ("model", "fields"), [c for c in CASES if c[0] in ("llama", "tied", "gpt2", "t5")]
)
def test_models_do_what_the_deltas_say(tmp_path, model, fields):
    make = maker(model)
    a, b = pool(tmp_path, make, {**fields, "modules_to_save": None})
    (a - 0.5 * b).save_pretrained(tmp_path / "out")
    loaded = load(make, tmp_path / "out")
    deltas = {n: W for n, (W, _) in dense_deltas(loaded, "default").items()}
    base = make()
    if model == "tied":  # each gets a change of its own
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    inputs = {"input_ids": torch.arange(12)[None]}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if model == "t5" else {}
    with torch.no_grad():
        want = changed(base, deltas)(**inputs).logits
        assert relative_error(loaded(**inputs).logits, want) < 1e-4
        assert relative_error(make()(**inputs).logits, want) > 1e-2


@pytest.mark.parametrize("model", ["roberta", "bert"])
def test_parts_without_a_head_are_loaded_by_the_classes_that_train_one(tmp_path, model):
    make, task = maker(model), {"roberta": "SEQ_CLS", "bert": "TOKEN_CLS"}[model]
    a, b = pool(tmp_path, make, {"target_modules": ["dense"], "task_type": task})
    parts = decompose([a, b], threshold=0.2)
    for name, adapter in parts.outputs().items():
        adapter.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(make(), tmp_path / name)
        assert loaded.peft_config["default"].task_type == (task if adapter.carried else None)


def test_an_adapter_as_read_keeps_its_targets_where_they_hold(tmp_path):
    make = maker("roberta")
    a, b = pool(tmp_path, make, {"target_modules": ["query"], "task_type": "SEQ_CLS"})
    decompose([a, b], threshold=0.2).shared["a"].save_pretrained(tmp_path / "shared")
    assert targets(tmp_path / "shared") == ["query"]
    a.save_pretrained(tmp_path / "same")
    read = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert json.loads((tmp_path / "same/adapter_config.json").read_text()) == read


@pytest.mark.parametrize("rank", [4, 5])
def test_adapters_of_other_formats_name_modules_exactly(tmp_path, rank):
    adapter = convert(
        Adapter.from_pretrained(save_kohya(tmp_path / "k.safetensors", 0, rank)), "peft"
    )
    adapter.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == list(adapter.modules)
    for name in adapter.modules:
        assert not re.fullmatch(config["exclude_modules"], name)
        assert re.fullmatch(config["exclude_modules"], f"other.{name}")


def test_peft_does_not_warn_of_what_is_excluded(tmp_path, recwarn):
    make = maker("llama")
    a, b = pool(tmp_path, make, {"target_modules": r".*layers\.0.*(q|v)_proj"})
    (a + b).save_pretrained(tmp_path / "sum")
    recwarn.clear()
    load(make, tmp_path / "sum")
    assert not [str(warning.message) for warning in recwarn if "exclude" in str(warning.message)]


def test_weighted_sums_of_peft_reach_all_modules(tmp_path):
    make = maker("llama")
    for name, pattern in {"a": r".*layers\.0.*q_proj", "b": r".*layers\.1.*(q|v)_proj"}.items():
        one, two = pool(tmp_path / name, make, {"target_modules": pattern})
        (one + two).save_pretrained(tmp_path / f"{name}-sum")
    host = get_peft_model(make(), LoraConfig(target_modules=["k_proj"]), "other")
    for name in "ab":
        host.load_adapter(tmp_path / f"{name}-sum", name)
    host.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    reached = {n for n, m in host.named_modules() if "both" in getattr(m, "lora_A", {})}
    assert len(reached) == 3


def test_whole_trained_heads_stay_with_one_part(tmp_path):
    make = maker("roberta")
    a, b = pool(tmp_path, make, {"target_modules": ["dense"], "task_type": "SEQ_CLS"})
    combine([a, b], [1, 1], carried_from="b").save_pretrained(tmp_path / "sum")
    held = load_file(tmp_path / "sum/adapter_model.safetensors")
    assert {key for key in held if ".classifier." in key} == b.carried.keys()


@pytest.mark.parametrize(
    ("whole", "layer"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [1, 2]}, "embed_tokens"),
        ({"modules_to_save": ["mlp"]}, "up_proj"),
    ],
)
def test_factors_and_whole_tensors_of_one_layer_are_not_written_together(tmp_path, whole, layer):
    make = maker("llama")
    (a, _), (b, _) = (
        pool(tmp_path / name, make, fields)
        for name, fields in {
            "one": {"target_modules": ["q_proj"], **whole},
            "two": {"target_modules": ["q_proj", layer]},
        }.items()
    )
    combine([a, b], [1, 1], carried_from="none").save_pretrained(tmp_path / "sum")
    require_exact(make, tmp_path / "sum")
    with pytest.raises(DevecError, match=rf"{layer}.*whole trained tensors.*carried_from='none'"):
        combine([a, b], [1, 1], carried_from="a").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
