"""Parameters of modules (target_parameters): one rank for all of a module, whatever is written."""

import dataclasses

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from devec import Adapter, DevecError, combine, compress, decompose
from support.adapters.cases import dense_deltas, relative_error
from support.adapters.peft_loaded import load, require_exact_results, save
from support.models import small_moe
from support.models.wrapped_models import Inside, Several

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    pytest.mark.skipif(
        not hasattr(peft.tuners.lora.layer, "ParamWrapper"), reason="this PEFT adapts no parameters"
    ),
]


def seeded(make):
    def made():
        torch.manual_seed(4)
        return make().eval()

    return made


NAMES = ["experts.up", "experts.down", "experts.gate"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
MAMBA = {**SIZES, "time_step_rank": 4}
PARTS = {"target_modules": ["q_proj"], "target_parameters": BOTH}

CASES = {
    "two": (Several, {"target_parameters": NAMES[:2]}),
    "three": (Several, {"target_parameters": NAMES}),
    "three, beside a layer": (Several, {"target_parameters": NAMES, "target_modules": ["proj"]}),
    "no names of modules": (Several, {"target_parameters": ["up", "down"]}),
    "ranks": (Several, {"target_parameters": NAMES, "rank_pattern": {"up": 2, r"gate": 5}}),
    "ranks and alphas": (
        Several,
        {
            "target_parameters": NAMES,
            "rank_pattern": {"experts.down": 6, ".*gate": 1},
            "alpha_pattern": {r"(experts\.)?up": 3, "down": 64},
            "use_rslora": True,
        },
    ),
    "mixtral": (small_moe.maker("mixtral"), PARTS),
    "mixtral, with the router": (
        small_moe.maker("mixtral"),
        {"target_modules": ["q_proj"], "target_parameters": [*BOTH, "gate.weight"]},
    ),
    "alphas of experts": (
        small_moe.maker("mixtral"),
        {**PARTS, "alpha_pattern": {"experts.down_proj": 64, ".*layers.1.*gate_up_proj": 1}},
    ),
    "qwen3": (small_moe.maker("qwen3"), PARTS),
    "gpt-oss": (small_moe.maker("gpt-oss"), PARTS),
    "gpt-oss, with biases": (
        small_moe.maker("gpt-oss"),
        {
            "target_modules": [],
            "target_parameters": [*BOTH, *(f"{name}_bias" for name in BOTH)],
            "rank_pattern": {"experts.gate_up_proj_bias": 2, "experts.down_proj": 5},
        },
    ),
    "names of transformers 4": (
        small_moe.maker("mixtral"),
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    ),
    "names of older qwen": (
        small_moe.maker("qwen3"),
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "all linear": (small_moe.maker("deepseek"), {"target_modules": "all-linear"}),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
        {"target_modules": ["in_proj", "x_proj"], "target_parameters": ["mixer.A_log"]},
    ),
    "falcon mamba": (
        lambda: FalconMambaForCausalLM(FalconMambaConfig(**MAMBA)),
        {
            "target_modules": r".*layers\.0\.mixer\.(in_proj|x_proj)|.*embeddings",
            "target_parameters": ["A_log"],
            "rank_pattern": {"mixer.A_log": 2, r"mixer\.in_proj": 5},
        },
    ),
    "weights of layers": (
        Inside,
        {
            "target_modules": ["attn"],
            "target_parameters": ["mixer.conv.weight", "mixer.out_proj.weight"],
            "rank_pattern": {"conv.weight": 2},
        },
    ),
    "layers inside": (
        Inside,
        {
            "target_modules": ["out_proj", "conv", "attn"],
            "target_parameters": ["mixer.table"],
            "rank_pattern": {"mixer.attn": 2, "mixer.out_proj": 5, "mixer.table": 1},
        },
    ),
}


def pool(tmp_path, make, fields):
    for seed, (name, rank) in enumerate({"a": 4, "b": 3}.items()):
        save(make, tmp_path / name, seed, r=rank, lora_alpha=2 * rank + 1, **fields)
    return [Adapter.from_pretrained(tmp_path / name) for name in "ab"]


def without(adapter, end):
    """An adapter without the modules of some parameters."""
    kept = {n: d for n, d in adapter.modules.items() if end not in n}
    return dataclasses.replace(adapter, modules=kept)


RESULTS = {
    "as read": lambda a, _: {"a": a},
    "sum": lambda a, b: {"sum": combine([a, b], [1, -0.4])},
    "compressed": lambda a, b: {"c": compress(a + b, energy=0.7).adapter},
    "compact": lambda a, b: decompose([a, b], threshold=0.3).outputs(compact=True),
    "fewer": lambda a, b: {"f": without(a, "base_layer"), "s": without(a, "[0]") + without(b, "q")},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peft_holds_what_is_written(tmp_path, case):
    make, fields = seeded(CASES[case][0]), CASES[case][1]
    a, b = pool(tmp_path, make, fields)
    for result, operation in RESULTS.items():
        require_exact_results(make, tmp_path / result, operation(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sums_do_what_their_adapters_do(tmp_path, case):
    make, fields = seeded(CASES[case][0]), CASES[case][1]
    a, b = pool(tmp_path, make, fields)
    combine([a, b], [1, 1e-9]).save_pretrained(tmp_path / "sum")
    inputs = torch.randn(2, 5, 12) if CASES[case][0] is Inside else torch.randn(2, 12)
    inputs = small_moe.TOKENS if hasattr(make(), "config") else inputs
    with torch.no_grad():
        made = [
            PeftModel.from_pretrained(make(), tmp_path / "a"),
            load(make, tmp_path / "sum"),
            make(),
        ]
        want, got, before = (getattr(y := m(inputs), "logits", y) for m in made)
    assert relative_error(want, before) > 1e-2
    assert relative_error(got, want) < 1e-4


def test_alphas_that_keys_do_not_tell_apart_are_refused(tmp_path):
    fields = {"target_parameters": NAMES[:2], "alpha_pattern": {"experts.up": 64}}
    save(seeded(Several), tmp_path / "a", 1, r=4, lora_alpha=4, **fields)
    with pytest.raises(DevecError, match=r"'experts\.base_layer'.*different ranks or alphas \(4\)"):
        Adapter.from_pretrained(tmp_path / "a")


def test_factors_of_more_parameters_than_are_named_are_refused(tmp_path):
    save(seeded(Several), tmp_path / "a", 1, r=4, lora_alpha=4, target_parameters=NAMES[:2])
    config = tmp_path / "a/adapter_config.json"
    config.write_text(config.read_text().replace('"experts.up"', '"other.up"'))
    with pytest.raises(DevecError, match=r"factors of 2 parameters of this module.*names 1"):
        Adapter.from_pretrained(tmp_path / "a")


def test_layers_inside_of_another_adapters_parameter_are_read(tmp_path):
    make = seeded(Inside)
    host = get_peft_model(make(), LoraConfig(r=4, target_modules=["out_proj"]), "layers")
    host.add_adapter("table", LoraConfig(r=3, target_parameters=["mixer.table"]))
    host.save_pretrained(tmp_path, selected_adapters=["layers"])
    adapter = Adapter.from_pretrained(tmp_path / "layers")
    inside = {"mixer.base_layer.out_proj", "mixer.base_layer.attn.out_proj"}
    assert set(adapter.modules) == {"out_proj", *inside}


RESULTS_OF_4 = {
    "as read": lambda a, _: a,
    "sum": lambda a, b: combine([a, b], [1, -0.4]),
    "compressed": lambda a, b: compress(a + b, energy=0.7).adapter,
    "common": lambda a, b: decompose([a, b], threshold=0.2).outputs(compact=True)["common"],
    "fewer": lambda a, _: without(without(a, "experts.1"), "w3"),
}


@pytest.mark.parametrize("result", RESULTS_OF_4)
def test_adapters_of_transformers_4_are_loaded_by_5(tmp_path, result):
    make = small_moe.maker("mixtral")
    if not hasattr(make().model.layers[0].mlp, "experts"):
        pytest.skip("this transformers keeps its experts apart")
    paths = [
        small_moe.save_of_transformers_4(tmp_path / n, i, 4 - i, 6) for i, n in enumerate("ab")
    ]
    adapter = RESULTS_OF_4[result](*(Adapter.from_pretrained(path) for path in paths))
    adapter.save_pretrained(tmp_path / "out")
    got = dense_deltas(PeftModel.from_pretrained(make(), tmp_path / "out"), "default")
    effects = {
        n: (d.scaling * d.B.double() @ d.A.double()).numpy() for n, d in adapter.modules.items()
    }
    for name, W in got.items():
        layer, _, expert = name.removesuffix("]").partition(".mlp.experts")
        old = f"{layer}.block_sparse_moe.experts.{expert.rpartition('[')[2]}"
        if "self_attn" in name:
            want = effects.get(name, 0 * W[0])
        elif "base_layer" in name:
            halves = (effects.get(f"{old}.{part}", 0 * W[0][:24]) for part in ("w1", "w3"))
            want = torch.cat([torch.as_tensor(half) for half in halves]).numpy()
        else:
            want = effects.get(f"{old}.w2", 0 * W[0])
        assert relative_error(W[0], want) < 1e-5, name
