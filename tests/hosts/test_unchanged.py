"""Adding to a host, or failing to, changes nothing of what was there: state and forward pass."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

import devec
from devec.hosts import state
from support.folding import folded
from support.models.live_models import LLAMA, NAMES, THRESHOLD, TOKENS, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PAIR = NAMES[:2]
WHOLE = {
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "tokens-by-module": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    "module": {"modules_to_save": ["lm_head"]},
    "module-with-layers": {"modules_to_save": ["mlp"]},
}


# Host, whether both adapters have whole tensors, and what its own calls can make active then.
CASES = [
    *(("peft", False, which) for which in ("first", "second", "both", "off")),
    *(("peft", True, which) for which in ("first", "second", "off")),
    *(("transformers", False, which) for which in ("first", "off")),
    *(("transformers", True, which) for which in ("first", "second", "off")),
]


def llama(**fields):
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **fields)).eval()


def make(kind, whole, of_both, **fields):
    """A host whose first adapter, or both, has whole trained tensors beside its factors."""
    model = llama(**fields)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    configs = [LoraConfig(**config, **(whole if i == 0 or of_both else {})) for i in range(2)]
    if kind == "peft":
        model = get_peft_model(model, configs[0], PAIR[0])
        model.add_adapter(PAIR[1], configs[1])
    else:  # its own add_adapter fails where the second has no such tensors
        for name, config in zip(PAIR, configs, strict=True):
            inject_adapter_in_model(config, model, name)
        model._hf_peft_config_loaded = True
    for index, name in enumerate(PAIR):
        trained(model, name, index)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    return model.eval()


def activate(model, kind, which):
    if which == "both":
        (model.base_model if kind == "peft" else model).set_adapter(list(PAIR))
    else:
        model.set_adapter(PAIR[which == "second"])
    if which == "off" and kind == "peft":
        model.base_model.disable_adapter_layers()
    elif which == "off":
        model.disable_adapters()


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def seen(model):
    """What a model says of itself and of each of its modules and parameters."""
    keys = ("_active_adapter", "active_adapter", "_disable_adapters", "training")
    found = {
        name: {key: repr(module.__dict__.get(key)) for key in keys} | {"kind": type(module)}
        for name, module in model.named_modules()
    }
    found |= {f"{n} (parameter)": p.requires_grad for n, p in model.named_parameters()}
    for key in ("peft_config", "_hf_peft_config_loaded"):
        found[key] = repr(getattr(model, key, None))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("kind", "of_both", "which"), CASES)
@folded("training", [False, True])
def test_what_is_active_stays(kind, whole, of_both, which, training):
    model = make(kind, WHOLE[whole], of_both)
    model.train(training)
    activate(model, kind, which)
    want, before = logits(model), seen(model)
    devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    devec.combine_adapters(model, PAIR, [1, -1], "sum", carried_from=PAIR[0])
    after = seen(model)
    said = [key for key in before if key != "peft_config"]
    assert {key: after[key] for key in said} == {key: before[key] for key in said}
    assert torch.equal(logits(model), want)
    new = [m for n, m in model.named_modules() if n not in before]
    assert new
    assert {module.training for module in new} == {training}


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("kind", "of_both", "which"), CASES)
def test_failures_change_nothing(kind, whole, of_both, which, monkeypatch):
    model = make(kind, WHOLE[whole], of_both)
    activate(model, kind, which)
    want = logits(model)
    before, weights = seen(model), {k: v.clone() for k, v in model.state_dict().items()}

    def fails(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(state, "_require_scalings", fails)
    with pytest.raises(devec.DevecError, match="no more"):
        devec.combine_adapters(model, PAIR, [1, -1], "sum", carried_from=PAIR[0])
    assert seen(model) == before
    assert torch.equal(logits(model), want)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


@pytest.mark.parametrize("whole", ["tokens", "module"])
@pytest.mark.parametrize("tied", [False, True])
def test_failures_change_nothing_of_models_without_adapters(whole, tied, monkeypatch):
    fields = {"tie_word_embeddings": tied}
    added = devec.extract_adapter(make("transformers", WHOLE[whole], False, **fields), PAIR[0])
    model = llama(**fields)
    want, before = logits(model), seen(model)

    def fails(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(state, "_require_scalings", fails)
    with pytest.raises(devec.DevecError, match="no more"):
        devec.add_adapter(model, added, "anime")
    assert seen(model) == before
    assert "peft_config" not in vars(model)
    assert torch.equal(logits(model), want)
    monkeypatch.undo()
    devec.add_adapter(model, added, "anime")
    assert torch.equal(logits(model), want)


REPLICATED = {"layer_replication": [[0, 2], [1, 2], [0, 1]]}


def replicated(kind, directory):
    """Two adapters for layers that PEFT replicates, and a host that holds the first."""
    for index, name in enumerate(PAIR):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], **REPLICATED)
        model = get_peft_model(llama(), config)
        trained(model, "default", index)
        model.save_pretrained(directory / name)
    if kind == "peft":
        return PeftModel.from_pretrained(llama(), directory / PAIR[0], adapter_name=PAIR[0]).eval()
    model = llama()
    model.load_adapter(directory / PAIR[0], adapter_name=PAIR[0])
    return model.eval()


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_replicated_layers_are_not_replicated_again(kind, tmp_path):
    model = replicated(kind, tmp_path)
    model.set_adapter(PAIR[0])
    inner = model.get_base_model() if kind == "peft" else model
    want, count = logits(model), len(inner.model.layers)
    assert count == 4
    devec.add_adapter(model, devec.Adapter.from_pretrained(tmp_path / PAIR[1]), PAIR[1])
    devec.negate_adapter(model, PAIR[0], "same", scale=-1.0)
    total = devec.combine_adapters(model, PAIR, [1, 0.5], "sum")
    assert len(inner.model.layers) == inner.config.num_hidden_layers == count
    assert torch.equal(logits(model), want)
    for name in ("same", PAIR[1], "sum"):
        model.set_adapter(name)
        saved = devec.extract_adapter(model, name).save_pretrained(tmp_path / f"out-{name}")
        again = PeftModel.from_pretrained(llama(), saved).eval()
        assert len(again.get_base_model().model.layers) == count
        torch.testing.assert_close(logits(again), logits(model))
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), want)
    model.set_adapter(PAIR[1])
    alone = PeftModel.from_pretrained(llama(), tmp_path / PAIR[1]).eval()
    torch.testing.assert_close(logits(model), logits(alone))
    assert total.layout.config["layer_replication"] == REPLICATED["layer_replication"]


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_failures_leave_replicated_layers(kind, tmp_path, monkeypatch):
    model = replicated(kind, tmp_path)
    want, before = logits(model), seen(model)

    def fails(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(state, "_require_scalings", fails)
    with pytest.raises(devec.DevecError, match="no more"):
        devec.negate_adapter(model, PAIR[0])
    assert seen(model) == before
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("of_host", [None, [[0, 1], [0, 2], [1, 2]]], ids=["none", "other"])
def test_adapters_for_other_replications_are_refused(of_host, tmp_path):
    replicated("peft", tmp_path)
    adapter = devec.Adapter.from_pretrained(tmp_path / PAIR[0])
    torch.manual_seed(3)
    deeper = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 4})).eval()
    config = LoraConfig(target_modules=["q_proj"], layer_replication=of_host)
    host = get_peft_model(llama() if of_host else deeper, config, "pixel").eval()
    want = logits(host)
    with pytest.raises(devec.DevecError, match=r"layer_replication=\[\[0, 2\], \[1, 2\], \[0, 1"):
        devec.add_adapter(host, adapter, "anime")
    assert torch.equal(logits(host), want)


def test_adapters_of_the_base_model_are_not_for_replicated_layers(tmp_path):
    host = replicated("peft", tmp_path)
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), "pixel")
    with pytest.raises(devec.DevecError, match="PeftModel has replicated layers"):
        devec.add_adapter(host, devec.extract_adapter(plain, "pixel"), "pixel")


def test_an_adapter_beside_replicated_layers_is_saved_for_them(tmp_path):
    """PEFT itself saves it without the field, by the names that the replicated layers have."""
    host = replicated("peft", tmp_path)
    host.add_adapter("pixel", LoraConfig(r=4, target_modules=["q_proj"]))
    trained(host, "pixel", 5)
    host.set_adapter("pixel")
    saved = devec.extract_adapter(host, "pixel").save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(llama(), saved).eval()
    torch.testing.assert_close(logits(again), logits(host))
