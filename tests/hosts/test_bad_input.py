"""What cannot be done with a live model is refused by name, and nothing is changed."""

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

import devec
from devec import DevecError, DevecWarning
from support.adapters.cases import Variant, WithHead, make_base, save_adapter
from support.adapters.peft_doras import weighted
from support.models.live_models import (
    NAMES,
    THRESHOLD,
    add,
    apart,
    changed,
    changes,
    make_model,
    model_host,
    outputs,
    peft_host,
    pipeline_host,
)
from support.models.pipelines import make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PAIR = NAMES[:2]


def refused(*words, call=devec.decompose_adapters, **options):
    """Calls, and checks what the refusal says; a function for the arguments."""

    def run(*arguments):
        with pytest.raises(DevecError) as error:
            call(*arguments, **options)
        for word in words:
            assert word in str(error.value), str(error.value)

    return run


@pytest.fixture(scope="module")
def model():
    return model_host("llama", NAMES)


@pytest.fixture(autouse=True)
def nothing_is_changed(model):
    before = outputs(model, "llama")
    names = list(model.peft_config)
    yield
    assert list(model.peft_config) == names
    assert torch.equal(outputs(model, "llama"), before)


def test_unknown_names(model):
    refused("'chalk'", "'anime'", "'pixel'", "'sketch'")(model, ["anime", "chalk"])
    refused("'chalk'", call=devec.extract_adapter)(model, "chalk")
    refused("'chalk'", call=devec.negate_adapter)(model, "chalk")
    refused("'chalk'", call=devec.combine_adapters)(model, ["chalk"], [1], "x")


@pytest.mark.parametrize("make", [make_model, make_base], ids=["transformers", "torch"])
def test_hosts_without_adapters(make):
    refused("holds no adapter", "load")(make("llama" if make is make_model else "linear"), PAIR)


def test_pipelines_without_adapters():
    refused("FluxPipeline holds no adapter", "load_lora_weights")(make_pipeline("flux"), PAIR)


@pytest.mark.parametrize("host", [None, "model", {"a": 1}, torch.zeros(2)], ids=str)
def test_what_is_no_host(host):
    refused("PeftModel", "pipeline", type(host).__name__)(host, PAIR)


def test_a_pipeline_of_transformers_has_a_model(model):
    class TextGeneration:
        pass

    pipeline = TextGeneration()
    pipeline.model = model
    refused("give its .model")(pipeline, PAIR)


def test_mixed_models():
    base = make_base("linear")
    mixed = PeftMixedModel(base, LoraConfig(target_modules=["layer"]), "anime")
    refused("PeftMixedModel", "PeftModel")(mixed, PAIR)


def test_the_tuner_inside_of_a_peft_model(tmp_path):
    refused("LoraModel", "give the PeftModel")(peft_host(tmp_path, "linear").base_model, PAIR)


def test_names_that_are_taken(model):
    add(model, "anime_unique", 0, ["q_proj"])
    refused("'anime_unique'", "delete")(model, PAIR)
    refused("'anime'", "delete", call=devec.combine_adapters)(model, PAIR, [1, 1], "anime")
    refused("'anime'", "delete", call=devec.negate_adapter)(model, "pixel", "anime")
    added = devec.extract_adapter(model, "pixel")
    refused("'anime'", "delete", call=devec.add_adapter)(model, added, "anime")
    model.delete_adapter("anime_unique")
    model.set_adapter("anime")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.b", ["dot", "'a.b'"]),
        ("lora", ["'lora_'"]),
        ("o", ["'lora_'"]),
        ("", ["string"]),
        (3, ["string"]),
        ("layers", ["'layers'", "LlamaForCausalLM"]),
        ("0", ["'0'"]),
        ("weight", ["'weight'"]),
        ("base_layer", ["'base_layer'"]),
        ("lora_A", ["'lora_A'"]),
        ("__base__", ["PEFT's name"]),
        ("half", ["attributes", "'half'"]),
        ("keys", ["attributes", "'keys'"]),
    ],
)
def test_names_that_peft_cannot_take(model, name, words):
    refused(*words, call=devec.combine_adapters)(model, PAIR, [1, 1], name)


def test_shared_is_a_module_of_t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))
    for index, name in enumerate(PAIR):
        add(t5, name, index, ["q", "v"])
    refused("'shared'", "T5ForConditionalGeneration", common_name="shared")(t5, PAIR)
    devec.decompose_adapters(t5, PAIR, threshold=THRESHOLD, common_name="both")
    assert "both" in t5.peft_config


def test_one_name_for_two_parts(model):
    same = {"unique_suffix": "_part", "shared_suffix": "_part"}
    refused("two adapters would be named", "'anime_part'", **same)(model, PAIR)


def test_arguments_out_of_range(model):
    refused("threshold", threshold=2)(model, PAIR)
    refused("method", method="sum")(model, PAIR)
    refused("scope", scope="some")(model, PAIR)
    refused("target", scope="iterative")(model, PAIR)
    refused("at least two")(model, ["anime"])
    refused("strings", prefix=None)(model, PAIR)
    for odd in ("anime", [1, 2], None, 5):
        refused("list of strings", repr(odd))(model, odd)
    for weights in (1.0, None, "11", ["1", "1"], [1, None]):
        refused("number", call=devec.combine_adapters)(model, PAIR, weights, "x")
    refused("number", "None", call=devec.negate_adapter, scale=None)(model, "anime")
    refused("threshold", "True", threshold=True)(model, PAIR)
    refused("one weight for each", call=devec.combine_adapters)(model, PAIR, [1], "x")
    refused("finite", call=devec.combine_adapters)(model, PAIR, [1, float("nan")], "x")
    refused("more than once")(model, ["anime", "anime"])
    refused("expected an adapter", call=devec.add_adapter)(model, "anime.safetensors", "x")


def test_adapters_on_different_modules():
    model = make_model("llama")
    add(model, "anime", 0, ["q_proj"])
    add(model, "pixel", 1, ["down_proj"])
    refused("no module", "'anime'", "q_proj", "'pixel'", "down_proj")(model, PAIR)
    total = devec.combine_adapters(model, PAIR, [1, 1], "both")  # as a sum they are fine
    assert len(total.modules) == 4


def test_merged_adapters(tmp_path):
    host = peft_host(tmp_path, "linear", PAIR)
    host.merge_adapter(["anime"])
    for call in (devec.extract_adapter, devec.negate_adapter):
        refused("'anime'", "merged", "unmerge_adapter", call=call)(host, "pixel")
    refused("merged")(host, PAIR)
    host.unmerge_adapter()
    devec.decompose_adapters(host, PAIR, threshold=THRESHOLD)


def test_fused_pipelines():
    pipe = pipeline_host("flux", PAIR)
    pipe.fuse_lora()
    refused("'anime'", "merged", "unfuse_lora")(pipe, PAIR)
    pipe.unfuse_lora()
    devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)


def test_unloaded_adapters(tmp_path):
    host = peft_host(tmp_path, "linear", PAIR)
    host.merge_and_unload()
    refused("unloaded", "merge_and_unload")(host, PAIR)
    pipe = pipeline_host("flux", PAIR)
    pipe.unload_lora_weights()
    refused("holds no adapter")(pipe, PAIR)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights", "olora"]),
        ({"bias": "all"}, ["bias='all'", "save"]),
    ],
)
def test_adapters_that_are_no_deltas(fields, words):
    config = LoraConfig(r=4, target_modules=["layer"], **fields)
    host = get_peft_model(make_base("linear"), config, "anime")
    refused(*words, "'anime'", call=devec.extract_adapter)(host, "anime")


def test_adapters_of_other_methods():
    from peft import LoHaConfig

    host = get_peft_model(make_base("linear"), LoHaConfig(r=4, target_modules=["layer"]), "anime")
    refused("LOHA", "'LORA'", call=devec.extract_adapter)(host, "anime")


def test_adapters_of_other_base_models(model, tmp_path):
    path = save_adapter(tmp_path / "other", "linear", Variant(), 0)
    other = devec.Adapter.from_pretrained(path)
    refused("no layer", "first.layer", "another base", call=devec.add_adapter)(model, other, "x")
    pipe = make_pipeline("flux")
    wider = devec.extract_adapter(pipeline_host("sd15", ("anime",)), "anime")
    refused("(12, 12)", "(8, 8)", "another base", call=devec.add_adapter)(pipe, wider, "x")


def test_other_shapes(tmp_path):
    pipe = pipeline_host("flux", ("anime",))
    adapter = devec.extract_adapter(pipe.transformer, "anime")
    short = adapter.map(lambda _, d: devec.Delta(d.B, d.A[:, :-1], d.scaling))
    refused("'transformer.", "of another base", call=devec.add_adapter)(pipe, short, "x")
    host = peft_host(tmp_path, "linear", ("anime",))
    adapter = devec.extract_adapter(host, "anime")
    path = save_adapter(tmp_path / "conv", "conv1d-gpt2", Variant(), 0)
    turned = devec.Adapter.from_pretrained(path)
    before = [name for name, _ in host.named_parameters()]
    devec.add_adapter(host, turned, "same")  # shapes are those of the map from inputs to outputs
    assert [n for n, _ in host.named_parameters() if ".same." not in n] == before


def test_failures_leave_nothing_behind(model, monkeypatch):
    from devec.hosts import state

    real, calls = state._assign, []

    def second_fails(places, tensors):
        calls.append(places)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        real(places, tensors)

    monkeypatch.setattr(state, "_assign", second_fails)
    before = [name for name, _ in model.named_parameters()]
    refused("'pixel_unique'", "no memory left", threshold=THRESHOLD)(model, PAIR)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_failures_leave_models_without_adapters_as_they_were(model, monkeypatch, failure):
    from devec.hosts import state

    def fails(*_):
        raise failure("no more")

    monkeypatch.setattr(state, "_require_scalings", fails)
    fresh = make_model("llama")
    added = devec.extract_adapter(model, "anime")
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises((DevecError, KeyboardInterrupt), match="no more"):
        devec.add_adapter(fresh, added, "anime")
    after = fresh.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not fresh._hf_peft_config_loaded
    monkeypatch.undo()
    devec.add_adapter(fresh, added, "anime")


def test_failures_beside_two_active_adapters_and_a_head(monkeypatch):
    from devec.hosts import state

    targets = {"target_modules": ["first", "second"]}
    torch.manual_seed(4)
    host = get_peft_model(WithHead(), LoraConfig(r=4, modules_to_save=["head"], **targets), "anime")
    host.add_adapter("pixel", LoraConfig(r=4, **targets))
    host.base_model.set_adapter(["anime", "pixel"])

    def fails(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(state, "_require_scalings", fails)
    before = list(host.state_dict())
    negate = {"call": devec.negate_adapter, "carried_from": "anime"}
    refused("'anime_negated'", "no more", **negate)(host, "anime")
    assert list(host.state_dict()) == before
    assert host.base_model.model.head.active_adapters == ["anime"]
    assert list(host.peft_config) == ["anime", "pixel"]


def test_a_host_that_changes_what_it_is_given_is_found_out(model, monkeypatch):
    from devec.hosts import state

    real = state._assign

    def rounded(places, tensors):
        real(places, {key: t.bfloat16().float() for key, t in tensors.items()})

    monkeypatch.setattr(state, "_assign", rounded)
    refused("something else", "lora_A", call=devec.negate_adapter)(model, "anime")


def test_nothing_shared_is_reported(model):
    with pytest.warns(DevecWarning, match="Nothing is shared at this threshold"):
        parts = devec.decompose_adapters(model, PAIR, threshold=1.0, prefix="t_")
    assert parts.nothing_shared
    held = [name for name in model.peft_config if name.startswith("t_")]
    assert held == ["t_anime_unique", "t_pixel_unique"]
    for name in held:
        model.delete_adapter(name)
    model.set_adapter("anime")


def test_empty_parts_are_reported():
    model = make_model("llama")
    for name in PAIR:
        add(model, name, 0, ["q_proj"])
    with pytest.warns(
        DevecWarning, match="'anime_unique', 'pixel_unique' are zero and are not added"
    ):
        devec.decompose_adapters(model, PAIR)
    assert {"anime_shared", "common"} <= model.peft_config.keys()


def test_two_doras_cannot_be_active_at_once():
    model = model_host("llama", PAIR, use_dora=True)
    with pytest.warns(DevecWarning, match="combine_adapters") as caught:
        devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    (warned,) = [w for w in caught if issubclass(w.category, DevecWarning)]
    assert "'anime_unique', 'pixel_unique'" in str(warned.message)
    # that it is not exact, and that the call it names is
    pool = {name: changes(model, f"{name}_unique") for name in PAIR}
    model.set_adapter(["anime_unique", "pixel_unique"])
    chained = outputs(model, "llama")
    devec.combine_adapters(model, ["anime_unique", "pixel_unique"], [1, 1], "both")
    model.set_adapter("both")
    wholes = [{m: whole for m, (_, whole) in pool[name].items()} for name in PAIR]
    want = outputs(changed(make_model("llama"), weighted([1, 1], wholes)), "llama")
    assert apart(outputs(model, "llama"), want) < 1e-5 < 1e-3 < apart(chained, want)


def test_models_that_a_pipeline_does_not_set():
    pipe = pipeline_host("flux", PAIR)
    for index, name in enumerate(PAIR):
        add(pipe.text_encoder_2, name, index, ["q"])
    with pytest.warns(DevecWarning, match=r"'text_encoder_2'.*pipe\.text_encoder_2\.set_adapter"):
        devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)
    assert "anime_unique" in pipe.text_encoder_2.peft_config


def test_a_peft_model_without_lora_weights_is_read_as_zero():
    host = PeftModel(make_base("linear"), LoraConfig(r=4, target_modules=["layer"]), "anime")
    assert devec.extract_adapter(host, "anime").norm() == 0
