"""Layers that PEFT makes together, and targets that it must not widen, in live models."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

import devec
from devec import Adapter, DevecError
from support.adapters.cases import dense_deltas, factor_pairs, fill, relative_error
from support.adapters.peft_loaded import require_same, save
from support.models import small_moe
from support.models.wrapped_models import Block, Blocks, Several

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
MAMBA = {**SIZES, "state_size": 4, "time_step_rank": 4}
ROBERTA = {**SIZES, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
UP_AND_DOWN = ["experts.gate_up_proj", "experts.down_proj"]
FLOATS, TOKENS = torch.randn(2, 5, 16), torch.arange(12)[None]

CASES = {
    "attention": (Block, {"target_modules": ["attn", "fc"], "rank_pattern": {"attn": 2}}),
    "attentions": (
        Blocks,
        {
            "target_modules": r"(.*\.)?(attn|fc)",
            "rank_pattern": {r"blocks\.0\.attn": 6, "out_proj": 1},
            "alpha_pattern": {"^attn": 3},
            "use_rslora": True,
        },
    ),
    "both projections": (Blocks, {"target_modules": ["attn", "out_proj"]}),
    "attention with biases": (Block, {"target_modules": ["attn", "fc"], "lora_bias": True}),
    "parameters": (
        Several,
        {
            "target_modules": ["proj"],
            "target_parameters": ["experts.up", "experts.down", "experts.gate"],
            "rank_pattern": {"up": 2, "experts.gate": 5},
        },
    ),
    "mixtral": (
        small_moe.maker("mixtral"),
        {
            "target_modules": ["q_proj"],
            "target_parameters": UP_AND_DOWN,
            "alpha_pattern": {"experts.down_proj": 32},
        },
    ),
    "names of older qwen": (
        small_moe.maker("qwen3"),
        {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "excluded": (
        small_moe.maker("mixtral"),
        {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
    "one layer": (
        small_moe.maker("qwen3"),
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    ),
    "inside a head": (
        lambda: Roberta(RobertaConfig(**ROBERTA)),
        {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
    ),
}


def made(case):
    torch.manual_seed(3)
    return CASES[case][0]().eval()


def trained(model, name, seed):
    """Factors with directions in common, but for some layers that share nothing."""
    fill(model, name, seed, noise=0.02)
    with torch.no_grad():
        for index, (_, _, B) in enumerate(factor_pairs(model, name)):
            if index % 3 == 1:
                B.copy_(torch.roll(B, seed + 1, 0) * (torch.arange(len(B)) % 2 == seed)[:, None])


def host_of(case, *, native=False):
    """A model with two adapters of true ranks that differ by layer."""
    model, fields = made(case), CASES[case][1]
    for seed, (name, rank) in enumerate({"a": 4, "b": 3}.items()):
        config = LoraConfig(r=rank, lora_alpha=9, **fields)
        if native:
            model.add_adapter(config, name)
        elif name == "a":
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
        trained(model, name, seed)
    model.set_adapter("a")
    return model.eval()


def outputs(model, case):
    kind = CASES[case][0]
    inputs = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    inputs = FLOATS if kind in (Block, Blocks) else inputs if kind is Several else TOKENS
    with torch.no_grad():
        result = model(inputs)
    return getattr(result, "logits", result)


def activate(model, names):
    (model.base_model if isinstance(model, PeftModel) else model).set_adapter(list(names))


NATIVE = [case for case in CASES if hasattr(made(case), "config")]
HOSTS = [*((case, False) for case in CASES), *((case, True) for case in NATIVE)]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("case", "native"), HOSTS)
def test_parts_are_added_as_they_are(case, native, compact):
    host = host_of(case, native=native)
    want = outputs(host, case)
    parts = devec.decompose_adapters(host, ["a", "b"], threshold=0.3, compact=compact)
    assert torch.equal(outputs(host, case), want)
    for label, adapter in parts.outputs(compact=compact).items():
        name = label.replace("-", "_")
        require_same(dense_deltas(host, name), adapter)
        require_same(dense_deltas(host, name), devec.extract_adapter(host, name))
    if CASES[case][1].get("modules_to_save"):  # with which PEFT has one active adapter
        return
    activate(host, ["a_unique", "a_shared"])
    assert relative_error(outputs(host, case), want) < 1e-4
    activate(host, ["a_unique"])
    assert relative_error(outputs(host, case), want) > 1e-3


@pytest.mark.parametrize(("case", "native"), HOSTS)
def test_sums_are_added_as_they_are(case, native):
    host = host_of(case, native=native)
    want = outputs(host, case)
    devec.combine_adapters(host, ["a", "b"], [1, 1e-9], "sum", carried_from="a")
    activate(host, ["sum"])
    assert relative_error(outputs(host, case), want) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_files_are_added(tmp_path, case):
    fields = CASES[case][1]
    save(lambda: made(case), tmp_path / "a", 1, r=4, lora_alpha=9, **fields)
    adapter = dataclasses.replace(Adapter.from_pretrained(tmp_path / "a"), carried={})
    some = dict(list(adapter.modules.items())[::2])
    host = PeftModel.from_pretrained(made(case), tmp_path / "a")
    devec.add_adapter(host, adapter, "whole")
    devec.add_adapter(host, dataclasses.replace(adapter, modules=some), "some")
    require_same(dense_deltas(host, "whole"), adapter)
    require_same(dense_deltas(host, "some"), dataclasses.replace(adapter, modules=some))


def test_peft_takes_no_second_adapter_inside_of_a_parameters_module():
    fields = {"target_modules": ["in_proj"], "target_parameters": ["mixer.A_log"]}
    base = MambaForCausalLM(MambaConfig(**MAMBA))
    host = get_peft_model(base, LoraConfig(r=4, **fields), "a")
    trained(host, "a", 1)
    adapter = devec.extract_adapter(host, "a")
    require_same(dense_deltas(host, "a"), adapter)
    with pytest.raises(DevecError, match=r"no place for .*mixer.base_layer.in_proj"):
        devec.add_adapter(host, adapter, "again")
    assert list(host.peft_config) == ["a"]
