"""nn.MultiheadAttention: PEFT gives both projections one rank and alpha, and always makes both."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from devec import Adapter, DevecError, DevecWarning, combine, compress, decompose
from devec.streaming.decompose_to import decompose_to
from support.adapters.cases import relative_error
from support.adapters.peft_loaded import load, require_exact, require_exact_results, save
from support.models.wrapped_models import Block, Blocks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

SHAPES = {"a": (4, 9.0), "b": (3, 5.0)}


MODELS = {"top": Block, "several": Blocks}

CONFIGS = {
    "plain": {"target_modules": ["attn"]},
    "linear": {"target_modules": ["attn", "fc"]},
    "rslora": {"target_modules": ["attn", "fc"], "use_rslora": True},
    "rank": {"target_modules": ["attn", "fc"], "rank_pattern": {"attn": 2}},
    "alpha": {"target_modules": ["attn", "fc"], "alpha_pattern": {"attn": 32}},
    "out_proj": {
        "target_modules": ["attn", "fc"],
        "rank_pattern": {"out_proj": 2, "attn.base_layer.out_proj": 5},
        "alpha_pattern": {"out_proj": 64},
    },
    "regex": {
        "target_modules": r"(.*\.)?(attn|fc)",
        "rank_pattern": {r"(blocks\.0\.)?a.*n": 5, "fc": 2},
        "alpha_pattern": {r"^attn$": 3, r".*\.attn": 7},
        "use_rslora": True,
    },
    "one of several": {"target_modules": r"(blocks\.1\.)?attn|.*fc"},
    "both projections": {"target_modules": ["attn", "out_proj"]},
    "bias": {"target_modules": ["attn", "fc"], "lora_bias": True},
}


def maker(model):
    def make():
        torch.manual_seed(5)
        return MODELS[model]().eval()

    return make


def pool(tmp_path, make, **fields):
    for seed, (name, (rank, alpha)) in enumerate(SHAPES.items()):
        save(make, tmp_path / name, seed, r=rank, lora_alpha=alpha, **fields)
    return [Adapter.from_pretrained(tmp_path / name) for name in SHAPES]


def some(adapter, end):
    """An adapter without the modules whose names have an ending."""
    kept = {n: d for n, d in adapter.modules.items() if not n.endswith(end)}
    return dataclasses.replace(adapter, modules=kept)


RESULTS = {
    "as read": lambda a, _: {"a": a},
    "sum": lambda a, b: {"sum": combine([a, b], [1, -0.4])},
    "compressed": lambda a, b: {"c": compress(a + b, energy=0.7).adapter},
    "rank 1": lambda a, _: {"c": compress(a, rank=1).adapter},
    "parts": lambda a, b: decompose([a, b], threshold=0.3).outputs(),
    "compact": lambda a, b: decompose([a, b], threshold=0.45).outputs(compact=True),
    "only out_proj": lambda a, b: {"o": some(a, "attn"), "s": some(a, "attn") + some(b, "attn")},
    "only in_proj": lambda a, b: {"i": some(a, ".out_proj"), "s": a + some(b, ".out_proj")},
    "neither": lambda a, _: {"n": some(some(a, "attn"), ".base_layer.out_proj")},
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_peft_holds_what_is_written(tmp_path, model, config):
    make = maker(model)
    a, b = pool(tmp_path, make, **CONFIGS[config])
    for result, operation in RESULTS.items():
        nonzero = {name: part for name, part in operation(a, b).items() if part.modules}
        require_exact_results(make, tmp_path / result, nonzero)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_sums_do_what_their_adapters_do(tmp_path, model, config):
    make, x = maker(model), torch.randn(2, 5, 16)
    a, b = pool(tmp_path, make, **CONFIGS[config])
    combine([a, b], [1, 1e-9]).save_pretrained(tmp_path / "sum")
    with torch.no_grad():
        want = PeftModel.from_pretrained(make(), tmp_path / "a")(x)
        got = load(make, tmp_path / "sum")(x)
        assert torch.dist(want, make()(x)) > 1e-2
    assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_parts_add_up_in_the_forward_pass(tmp_path, model):
    make, x = maker(model), torch.randn(2, 5, 16)
    fields = {"target_modules": ["attn", "fc"], "rank_pattern": {"attn": 5}}
    outputs = decompose(pool(tmp_path, make, **fields), threshold=0.45).outputs(compact=True)
    for name, adapter in outputs.items():
        adapter.save_pretrained(tmp_path / name)
    host = PeftModel.from_pretrained(make(), tmp_path / "a", adapter_name="a")
    for name in ("a-unique", "a-shared"):
        assert not host.load_adapter(tmp_path / name, name).unexpected_keys
    with torch.no_grad():
        want = host(x)
        host.base_model.set_adapter(["a-unique", "a-shared"])
        assert relative_error(host(x), want) < 1e-4


def test_an_adapter_that_no_forward_pass_uses_is_left_out_by_name(tmp_path):
    make, x = maker("top"), torch.randn(2, 5, 16)
    fields = {"target_modules": ["attn", "out_proj"]}
    save(make, tmp_path / "a", 1, r=4, lora_alpha=4, **fields)
    assert "base_model.model.attn.out_proj.lora_A.weight" in load_file(
        tmp_path / "a/adapter_model.safetensors"
    )
    with pytest.warns(DevecWarning, match=r"second adapter.*'base_model.model.attn.out_proj.lora_"):
        adapter = Adapter.from_pretrained(tmp_path / "a")
    assert list(adapter.modules) == ["attn.base_layer.out_proj", "attn"]
    assert not adapter.carried
    assert not adapter.layout.base_copies
    adapter.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = PeftModel.from_pretrained(make(), tmp_path / "a")(x)
        assert torch.equal(load(make, tmp_path / "out")(x), want)


def biases(model):
    """The biases of the base model under PEFT's wrappers, as lists."""
    state = {name.replace(".base_layer", ""): t.tolist() for name, t in model.state_dict().items()}
    return {name: values for name, values in state.items() if name.endswith("bias")}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_carried_with_the_attention(tmp_path, bias):
    make = maker("top")
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=["attn", "fc"], bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(tmp_path / "a"))
    save(make, tmp_path / "b", 2, r=3, lora_alpha=5, target_modules=["attn", "fc"])
    a, b = (Adapter.from_pretrained(tmp_path / name) for name in "ab")
    assert all(key.endswith("bias") for key in a.carried)
    combine([a, b], [1, 1e-9]).save_pretrained(tmp_path / "sum")
    dataclasses.replace(a, modules={"fc": a.modules["fc"]}).save_pretrained(tmp_path / "some")
    decompose([a, b], threshold=0.3).shared["a"].save_pretrained(tmp_path / "shared")
    config = json.loads((tmp_path / "shared/adapter_config.json").read_text())
    assert config["bias"] == "none"
    held = load_file(tmp_path / "shared/adapter_model.safetensors")
    assert not any(key.endswith("bias") for key in held)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want, got = (PeftModel.from_pretrained(make(), tmp_path / n)(x) for n in ("a", "sum"))
    assert relative_error(got, want) < 1e-4
    assert biases(load(make, tmp_path / "some")) == biases(load(make, tmp_path / "a"))
    assert biases(load(make, tmp_path / "some")) != biases(load(make, tmp_path / "b"))


def test_a_compressed_adapter_is_decomposed_from_files_to_files(tmp_path):
    make = maker("several")
    a, _ = pool(tmp_path, make, target_modules=["attn", "fc"])
    some(a, ".out_proj").save_pretrained(tmp_path / "in")
    pair = [Adapter.from_pretrained(tmp_path / n, lazy=True) for n in ("in", "b")]
    halved = dataclasses.replace(some(pair[0], ".out_proj"), name="half")
    decompose_to(tmp_path / "out", [halved, pair[1]], threshold=0.3)
    for path in (tmp_path / "out").iterdir():
        require_exact(make, path)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_layer_under_two_names_is_refused(tmp_path, order, lazy):
    """As part of the attention in one adapter, and as a linear layer of its own in another."""
    make = maker("top")
    save(make, tmp_path / "a", 1, r=3, lora_alpha=3, target_modules=["attn", "fc"])
    save(make, tmp_path / "b", 2, r=3, lora_alpha=3, target_modules=["attn.out_proj", "fc"])
    pool = [Adapter.from_pretrained(tmp_path / name, lazy=lazy) for name in "ab"][::order]
    for call in (lambda: combine(pool, [1, 1]), lambda: decompose(pool)):
        with pytest.raises(DevecError, match=r"'attn.out_proj'.*are one layer"):
            call()
