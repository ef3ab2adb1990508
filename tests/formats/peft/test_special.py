"""What PEFT stores beside factors, and adapters whose training leaves traces."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from devec import Adapter, DevecError, DevecWarning, combine, decompose, save_adapters
from support.adapters.cases import (
    Embedded,
    WithHead,
    dense_deltas,
    factor_pairs,
    fill,
    make_base,
    make_inputs,
    relative_error,
    save_adapter,
)
from support.models.small_vit import vit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def save(base, path, seed, **fields):
    """An adapter of a given model with random factors."""
    rank = fields.pop("r", 4)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank + 1, **fields))
    fill(model, "default", seed)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for whole in module.modules_to_save.values():
                for parameter in whole.parameters():
                    parameter.data += seed
    model.save_pretrained(str(path))
    return path


def head_base():
    torch.manual_seed(1)
    return WithHead().eval()


@pytest.fixture
def heads(tmp_path):
    """One adapter with a trained head, one without."""
    a = save(
        head_base(), tmp_path / "a", 1, target_modules=["first", "second"], modules_to_save=["head"]
    )
    b = save(head_base(), tmp_path / "b", 2, target_modules=["first", "second"])
    return [Adapter.from_pretrained(p) for p in (a, b)]


def test_trained_modules_go_to_unique_and_do_there_what_they_did(tmp_path, heads):
    parts = decompose(heads)
    save_adapters({tmp_path / n: p for n, p in parts.outputs().items()})
    tensors = load_file(tmp_path / "a-unique" / "adapter_model.safetensors")
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} < tensors.keys()
    shared = json.loads((tmp_path / "a-shared/adapter_config.json").read_text())
    assert shared["modules_to_save"] is None
    assert not any("head" in k for k in load_file(tmp_path / "a-shared/adapter_model.safetensors"))
    x = torch.randn(5, 24)
    model = PeftModel.from_pretrained(
        head_base(), str(tmp_path / "a-unique"), adapter_name="unique"
    )
    model.load_adapter(str(tmp_path / "a-shared"), adapter_name="rest")
    model.base_model.set_adapter(["unique", "rest"])
    whole = PeftModel.from_pretrained(head_base(), str(tmp_path / "a"))
    assert relative_error(model(x).detach(), whole(x).detach()) < 1e-6


def test_trained_modules_are_not_added_or_scaled(heads):
    a, b = heads
    assert (
        combine([a, b], [1.0, -0.4]).carried.keys() == a.carried.keys()
    )  # exact: the change, once
    for weights in ([0.5, 1], [-1, 1]):
        with pytest.raises(DevecError, match=r"'a'.*head.bias.*carried_from"):
            combine([a, b], weights)
    with pytest.raises(DevecError, match="cannot be added or scaled"):
        _ = -a
    assert combine([a, b], [0.5, 1], carried_from="a").carried.keys() == a.carried.keys()
    assert not combine([a, b], [0.5, 1], carried_from="none").carried
    with pytest.raises(DevecError, match="no adapter is named 'c'"):
        combine([a, b], [0.5, 1], carried_from="c")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_carried_over(tmp_path, bias):
    model = get_peft_model(head_base(), LoraConfig(r=4, target_modules=["first"], bias=bias))
    fill(model, "default", 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter += 1
    model.save_pretrained(str(tmp_path / "a"))
    saved = load_file(tmp_path / "a/adapter_model.safetensors")
    if not any(key.endswith(".bias") for key in saved):
        pytest.skip(f"this PEFT does not save the biases that it trains with bias={bias!r}")
    b = save(head_base(), tmp_path / "b", 2, target_modules=["first"])
    a = Adapter.from_pretrained(tmp_path / "a")
    assert len(a.carried) == (3 if bias == "all" else 1)
    parts = decompose([a, Adapter.from_pretrained(b)])
    parts.unique["a"].save_pretrained(tmp_path / "unique")
    parts.shared["a"].save_pretrained(tmp_path / "shared")
    assert json.loads((tmp_path / "shared/adapter_config.json").read_text())["bias"] == "none"
    x = torch.randn(5, 24)
    both = PeftModel.from_pretrained(head_base(), str(tmp_path / "unique"))
    with torch.no_grad():
        for (_, A, B), (_, A2, B2) in zip(
            factor_pairs(both, "default"),
            factor_pairs(
                PeftModel.from_pretrained(head_base(), str(tmp_path / "shared")), "default"
            ),
            strict=True,
        ):
            assert torch.equal(A, A2)
            B += B2
    assert relative_error(both(x).detach(), model.eval()(x).detach()) < 1e-6


def test_base_weights_beside_embeddings_are_kept_with_every_part(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = Embedded(), nn.Linear(44, 3)
            self.config = type("Config", (), {"vocab_size": 29, "to_dict": lambda _: {}})()

        def get_input_embeddings(self):
            return self.body.first

        def get_output_embeddings(self):
            return None

        def forward(self, tokens):
            return self.out(self.body(tokens))

    for seed, name in enumerate("ab"):
        torch.manual_seed(5)
        model = get_peft_model(Model(), LoraConfig(r=4, target_modules=["first"]))
        fill(model, "default", seed)
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=True)
    adapters = [Adapter.from_pretrained(tmp_path / n) for n in "ab"]
    key = "base_model.model.body.first.base_layer.weight"
    assert not adapters[0].carried
    outputs = decompose(adapters).outputs(compact=True)
    save_adapters({tmp_path / n: a for n, a in outputs.items()})
    assert all(key in load_file(tmp_path / n / "adapter_model.safetensors") for n in outputs)
    (adapters[0] - adapters[1]).save_pretrained(tmp_path / "difference")
    adapters[1].layout.base_copies[key][0] += 1
    with pytest.raises(DevecError, match="different base weights"):
        adapters[0] - adapters[1]


@pytest.mark.parametrize(
    ("method", "fields", "traces"),
    [
        ("Velora", {"num_groups": 2}, "lora_velora_embed"),
        ("Monteclora", {"num_samples": 2}, "lora_monteclora_sampler"),
    ],
)
def test_state_of_training_is_left_out_by_name(tmp_path, method, fields, traces):
    if not hasattr(peft, f"{method}Config"):
        pytest.skip(f"this PEFT has no {method}Config")
    config = {f"{method.lower()}_config": getattr(peft, f"{method}Config")(**fields)}
    path = save_adapter(tmp_path / "a", "linear", "plain", 0, **config)
    with pytest.warns(DevecWarning, match=f"serve training only.*{traces}"):
        adapter = Adapter.from_pretrained(path)
    adapter.save_pretrained(tmp_path / "plain")
    x = make_inputs("linear")
    one, two = (
        PeftModel.from_pretrained(make_base("linear"), str(tmp_path / n)).eval()
        for n in ("a", "plain")
    )
    assert relative_error(two(x).detach(), one(x).detach()) < 1e-6
    assert not any(traces in k for k in load_file(tmp_path / "plain/adapter_model.safetensors"))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica", False])
def test_plain_initialisations_do_not_run_again(tmp_path, init):
    if init and init not in str(LoraConfig.__annotations__["init_lora_weights"]):
        pytest.skip(f"this PEFT has no initialisation {init!r}")
    path = save_adapter(tmp_path / "a", "linear", "plain", 0, init_lora_weights=init)
    adapter = Adapter.from_pretrained(path)
    adapter.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    x = make_inputs("linear")
    one, two = (
        PeftModel.from_pretrained(make_base("linear"), str(p)) for p in (path, tmp_path / "out")
    )
    assert torch.equal(one(x), two(x))


def test_multihead_attention_is_linear_in_its_parts(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    for seed, name in enumerate("ab"):
        torch.manual_seed(5)
        save(Attention(), tmp_path / name, seed, target_modules=["attn"])
    with pytest.warns(DevecWarning, match="MultiheadAttention"):
        adapters = [Adapter.from_pretrained(tmp_path / n) for n in "ab"]
    assert sorted(adapters[0].modules) == ["attn", "attn.base_layer.out_proj"]
    parts = decompose(adapters, threshold=0.3)
    (parts.unique["a"] + parts.shared["a"]).save_pretrained(tmp_path / "back")
    x = torch.randn(3, 5, 16)
    changes = []
    for name in ("a", "back"):
        torch.manual_seed(5)
        base = Attention().eval()
        before = base(x)
        changes.append(PeftModel.from_pretrained(base, str(tmp_path / name))(x) - before)
    assert relative_error(changes[0].detach(), 0 * changes[0].detach()) > 1e-3
    assert relative_error(changes[1].detach(), changes[0].detach()) < 1e-5


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    return AutoModelForCausalLM.from_config(config).eval()


def llama(layers=2):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
    ).eval()


def mixtral():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            vocab_size=50,
        )
    ).eval()


MODELS = {
    "mixtral": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        {"input_ids": torch.arange(12)[None]},
    ),
    "vit": (vit, {"target_modules": "all-linear"}, {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "gpt2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"input_ids": torch.arange(12)[None]},
    ),
    "llama": (
        llama,
        {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"], "use_rslora": True},
        {"input_ids": torch.arange(12)[None]},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_every_part(tmp_path, name, compact):
    make, fields, inputs = MODELS[name]
    parameters = [n for n, _ in make().named_parameters()]
    if not all(any(n.endswith(t) for n in parameters) for t in fields.get("target_parameters", [])):
        pytest.skip("this transformers keeps its experts apart")
    for seed, adapter in enumerate("ab"):
        save(make(), tmp_path / adapter, seed, r=6 - seed, **fields)
    parts = decompose([Adapter.from_pretrained(tmp_path / n) for n in "ab"])
    outputs = parts.outputs(compact=compact)
    save_adapters({tmp_path / n: a for n, a in outputs.items()})
    assert list(outputs) == ["a-unique", "b-unique", "a-shared", "b-shared", "common"]
    for part in outputs:
        native = make()
        native.load_adapter(str(tmp_path / part))
        wrapped = PeftModel.from_pretrained(make(), str(tmp_path / part))
        with torch.no_grad():
            got, want = native(**inputs).logits, wrapped(**inputs).logits
            base = make()(**inputs).logits
        assert relative_error(got, want) < 1e-6
        assert relative_error(got, base) > 1e-4


def test_layer_replication_keeps_an_adapter_for_every_copy(tmp_path):
    fields = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]}
    for seed, name in enumerate("ab"):
        save(llama(3), tmp_path / name, seed, **fields)
    adapters = [Adapter.from_pretrained(tmp_path / n) for n in "ab"]
    assert len(adapters[0].modules) == 4
    (adapters[0] - 0.5 * adapters[1]).save_pretrained(tmp_path / "difference")
    loaded = {
        n: dense_deltas(PeftModel.from_pretrained(llama(3), str(tmp_path / n)), "default")
        for n in ("a", "b", "difference")
    }
    for module, (W, _) in loaded["difference"].items():
        want = loaded["a"][module][0] - 0.5 * loaded["b"][module][0]
        assert relative_error(W, want) < 1e-6
