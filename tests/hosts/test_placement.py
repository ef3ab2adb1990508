"""Types, devices, modes and what else is as it was, wherever the tensors of a host lie."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import devec
from support.models.live_models import (
    NAMES,
    THRESHOLD,
    add,
    apart,
    changes,
    layers,
    make_model,
    model_host,
    outputs,
    pipeline_host,
    tensors_of,
    through_pipeline,
    trained,
)
from support.models.pipelines import make_pipeline
from support.versions import needs

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*are DoRAs, of which:devec.DevecWarning"
)

PAIR = NAMES[:2]


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_have_the_type_of_their_adapter(dtype, model_dtype):
    model = model_host("llama", PAIR).to(model_dtype)
    for name in PAIR:
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.to(dtype)
    originals = {name: devec.extract_adapter(model, name) for name in PAIR}
    devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    parts = devec.decompose(list(originals.values()), threshold=THRESHOLD)
    for name in PAIR:
        held = tensors_of(model, f"{name}_unique")
        assert {tensor.dtype for tensor in held.values()} == {dtype}
        want = parts.unique[name]
        for module, layer in layers(model).items():
            delta = want.modules[module]
            assert torch.equal(layer.lora_B[f"{name}_unique"].weight, delta.B.to(dtype))
            assert torch.equal(layer.lora_A[f"{name}_unique"].weight, delta.A.to(dtype))
            assert layer.scaling[f"{name}_unique"] == layer.scaling[name]


def test_magnitudes_are_not_narrowed_by_a_half_precision_model():
    model = model_host("llama", PAIR, use_dora=True).to(torch.bfloat16)
    devec.combine_adapters(model, PAIR, [1, -0.5], "mix")
    held = tensors_of(model, "mix")
    kinds = {key.split(".lora_")[1].partition(".")[0]: t.dtype for key, t in held.items()}
    assert kinds == {"A": torch.bfloat16, "B": torch.bfloat16, "magnitude_vector": torch.float32}


def test_parts_and_values_share_no_memory_with_adapters():
    model = model_host("llama", PAIR)
    parts = devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    values = [*parts.unique.values(), *parts.shared.values(), parts.common]
    values += [devec.extract_adapter(model, "anime"), devec.negate_adapter(model, "pixel")]
    norms = [value.norm() for value in values]
    before = {key: tensor.clone() for key, tensor in tensors_of(model, "anime_unique").items()}
    for name in PAIR:
        for tensor in tensors_of(model, name).values():
            tensor.zero_()
    after = tensors_of(model, "anime_unique")
    assert all(torch.equal(after[key], before[key]) for key in before)
    for tensor in after.values():
        tensor.zero_()
    assert [value.norm() for value in values] == norms
    assert min(norms) > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("active", [["pixel"], ["pixel", "anime"], []])
def test_what_is_active_and_trainable_stays(active, training):
    model = model_host("llama", PAIR)
    model.set_adapter(active)
    model.train(training)
    trainable = {key: p.requires_grad for key, p in model.named_parameters()}
    devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    now = {key: p.requires_grad for key, p in model.named_parameters()}
    assert {key: now[key] for key in trainable} == trainable
    assert not any(flag for key, flag in now.items() if key not in trainable)
    assert {tuple(layer.active_adapters) for layer in layers(model).values()} == {tuple(active)}
    assert {module.training for module in model.modules()} == {training}


def test_disabled_adapters_stay_disabled():
    pipe = pipeline_host("flux", PAIR)
    base = through_pipeline(make_pipeline("flux"))
    pipe.disable_lora()
    devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)
    after = through_pipeline(pipe)
    assert all(torch.equal(after[name], base[name]) for name in base)
    pipe.enable_lora()
    after = through_pipeline(pipe)
    assert not torch.equal(after["transformer"], base["transformer"])


def test_new_layers_take_no_part_before_they_are_asked_to():
    model = make_model("llama")
    base = outputs(model, "llama")
    add(model, "anime", 0, ["q_proj"])
    add(model, "pixel", 1, ["q_proj", "up_proj"])
    model.set_adapter("anime")
    before = outputs(model, "llama")
    added = devec.extract_adapter(model, "pixel")
    fresh = make_model("llama")
    devec.add_adapter(fresh, added, "pixel")
    assert torch.equal(outputs(fresh, "llama"), base)
    fresh.set_adapter("pixel")
    model.set_adapter("pixel")
    assert torch.equal(outputs(fresh, "llama"), outputs(model, "llama"))
    assert not torch.equal(outputs(fresh, "llama"), base)
    model.set_adapter("anime")
    assert torch.equal(outputs(model, "llama"), before)


def test_dropout_of_new_layers_follows_the_model():
    model = model_host("llama", PAIR, lora_dropout=0.5).eval()
    devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    model.set_adapter("anime_unique")
    assert torch.equal(outputs(model, "llama"), outputs(model, "llama"))
    model.train()
    assert not torch.equal(outputs(model, "llama"), outputs(model, "llama"))


def test_weights_that_are_set_do_not_count():
    pipe = pipeline_host("flux", PAIR)
    want = devec.extract_adapter(pipe, "anime")
    pipe.set_adapters(["anime", "pixel"], [0.3, -2.0])
    assert devec.extract_adapter(pipe, "anime") == want
    devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)
    whole = [devec.extract_adapter(pipe, f"anime_{part}") for part in ("unique", "shared")]
    assert whole[0] + whole[1] == want
    scalings = {layer.scaling["anime"] for layer in layers(pipe.transformer).values()}
    assert scalings == {0.3 * 13 / 6}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_offloaded_models(method):
    model = model_host("llama", PAIR, use_dora=method == "dora")
    want = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    devec.decompose_adapters(model, PAIR, threshold=THRESHOLD)
    devec.decompose_adapters(want, PAIR, threshold=THRESHOLD)
    for name in ("anime_unique", "pixel_shared", "common"):
        held, meant = tensors_of(model, name), tensors_of(want, name)
        assert held.keys() == meant.keys()
        assert all(torch.equal(held[key], meant[key]) for key in meant)
    if method == "dora":
        return  # PEFT itself cannot run one whose base weight is elsewhere
    for names in (["anime_unique"], ["anime_unique", "pixel_shared"], ["common"]):
        model.set_adapter(names)
        want.set_adapter(names)
        assert torch.equal(outputs(model, "llama"), outputs(want, "llama"))


def test_group_offloaded_pipelines():
    pipe, want = (pipeline_host("flux", PAIR) for _ in range(2))
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    for one in (pipe, want):
        devec.decompose_adapters(one, PAIR, threshold=THRESHOLD)
        one.set_adapters(["anime_unique", "pixel_unique"])
    for layer in layers(pipe.transformer).values():  # else they would stay where they are
        for factor in (layer.lora_A, layer.lora_B):
            assert hasattr(factor["anime_unique"], "_diffusers_hook")
    got, want = through_pipeline(pipe), through_pipeline(want)
    assert torch.equal(got["transformer"], want["transformer"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_models(method):
    fields = {"use_dora": method == "dora"}
    pipe, want = (pipeline_host("flux", PAIR, **fields) for _ in range(2))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for one in (pipe, want):
        devec.decompose_adapters(one, PAIR, threshold=THRESHOLD)
        # diffusers' own set_adapters passes by models that torch.compile has wrapped
        one.transformer.set_adapters(["anime_unique", "pixel_shared"])
        one.text_encoder.set_adapter(["anime_unique", "pixel_shared"])
    got, want = through_pipeline(pipe), through_pipeline(want)
    assert apart(got["transformer"], want["transformer"].double()) < 1e-6
    alone = torch.compile(model_host("llama", PAIR), backend="eager")
    before = outputs(alone, "llama")
    devec.negate_adapter(alone, "anime")
    alone.set_adapter(["anime", "anime_negated"])
    assert apart(outputs(alone, "llama"), outputs(make_model("llama"), "llama").double()) < 1e-6
    assert not torch.equal(outputs(alone, "llama"), before)


def test_hotswapped_adapters(tmp_path):
    """Hotswapping pads factors and changes scalings, and says nothing of it in configurations."""
    made = pipeline_host("flux", NAMES)
    files = {}
    for name in NAMES:
        adapter = devec.extract_adapter(made.transformer, name)
        files[name] = adapter.save_pretrained(tmp_path / name)
    pipe = make_pipeline("flux")
    pipe.enable_lora_hotswap(target_rank=8)
    load = {"weight_name": files["anime"].name, "adapter_name": "slot"}
    pipe.load_lora_weights(tmp_path, **load)
    assert devec.extract_adapter(pipe, "slot") == devec.extract_adapter(made.transformer, "anime")
    pipe.load_lora_weights(
        tmp_path, weight_name=files["pixel"].name, adapter_name="slot", hotswap=True
    )
    assert devec.extract_adapter(pipe, "slot") == devec.extract_adapter(made.transformer, "pixel")
    # a part of another goes in the same way
    devec.decompose_adapters(made.transformer, PAIR, threshold=THRESHOLD)
    unique = devec.extract_adapter(made, "anime_unique").save_pretrained(tmp_path / "unique")
    pipe.load_lora_weights(tmp_path, weight_name=unique.name, adapter_name="slot", hotswap=True)
    made.set_adapters("anime_unique")
    got, want = through_pipeline(pipe), through_pipeline(made)
    assert apart(got["transformer"], want["transformer"].double()) < 1e-5
    pipe.load_lora_weights(
        tmp_path, weight_name=files["pixel"].name, adapter_name="slot", hotswap=True
    )
    devec.add_adapter(pipe, devec.Adapter.from_pretrained(files["sketch"]), "sketch")
    devec.combine_adapters(pipe, ["slot", "sketch"], [1, 1], "mix")
    pipe.set_adapters("mix")
    made.set_adapters(["pixel", "sketch"])
    got, want = through_pipeline(pipe), through_pipeline(made)
    assert apart(got["transformer"], want["transformer"].double()) < 1e-5


# a DoRA on weights of eight bits is nothing that PEFT itself can run on a CPU
@pytest.mark.parametrize(
    ("method", "quantised"),
    [
        ("lora", "Linear4bit"),
        ("lora", "Linear8bitLt"),
        pytest.param(
            "dora",
            "Linear4bit",
            marks=needs("bitsandbytes", "0.47", "what it has quantised it quantises again"),
        ),
    ],
)
def test_quantised_bases(method, quantised):
    bnb = pytest.importorskip("bitsandbytes")
    layer = getattr(bnb.nn, quantised)
    options = {"quant_type": "nf4"} if quantised == "Linear4bit" else {"has_fp16_weights": False}
    torch.manual_seed(0)
    model = nn.Sequential(layer(64, 64, bias=False, **options)).to("cpu")
    targets = {"target_modules": ["0"], "use_dora": method == "dora"}
    host = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **targets), "anime")
    host.add_adapter("pixel", LoraConfig(r=3, lora_alpha=6, **targets))
    for index, name in enumerate(PAIR):
        trained(host, name, index)
    host.eval()
    x = torch.randn(3, 64)
    host.set_adapter("anime")
    with torch.no_grad():
        original = host(x)
        devec.decompose_adapters(host, PAIR, threshold=THRESHOLD)
        assert torch.equal(host(x), original)
        host.base_model.set_adapter(["anime_unique", "anime_shared"])
        assert apart(host(x), original.double()) < 1e-5
    assert {p.dtype for p in tensors_of(host, "anime_unique").values()} == {torch.float32}


def test_models_with_weights_of_eight_bits():
    pipe = make_pipeline("flux")
    adapter = devec.extract_adapter(pipeline_host("flux", ("anime",)).transformer, "anime")
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    devec.add_adapter(pipe, adapter, "anime")
    assert {t.dtype for t in tensors_of(pipe.transformer, "anime").values()} == {torch.float32}


@pytest.mark.parametrize("second", ["transformer_2", "controlnet"])
def test_pipelines_of_several_denoisers(tmp_path, second):
    """As Wan 2.2 has two; their modules have the same names."""
    pipe = make_pipeline("flux")
    models = {"transformer": pipe.transformer, second: make_pipeline("flux").transformer}
    for seed, model in enumerate(models.values()):
        for index, name in enumerate(PAIR):
            add(model, name, index, ["to_q", "to_add_out"])
            trained(model, name, 10 * seed + index)

    class Pipeline(type(pipe)):
        _lora_loadable_modules = tuple(models)
        components = models

        def __init__(self):
            pass

    host = Pipeline()
    pools = {slot: {n: changes(m, n) for n in PAIR} for slot, m in models.items()}
    parts = devec.decompose_adapters(host, PAIR, threshold=THRESHOLD)
    devec.combine_adapters(host, PAIR, [1, -1], "mix")
    for slot, model in models.items():
        found = [changes(model, f"anime_{part}") for part in ("unique", "shared")]
        mixed = changes(model, "mix")
        for module, (_, whole) in pools[slot]["anime"].items():
            total = torch.from_numpy(found[0][module][1] + found[1][module][1])
            assert apart(total, torch.from_numpy(whole)) < 1e-6
            difference = whole - pools[slot]["pixel"][module][1]
            assert apart(torch.from_numpy(mixed[module][1]), torch.from_numpy(difference)) < 1e-6
    path = parts.unique["anime"].save_pretrained(tmp_path / "anime")
    again = devec.Adapter.from_pretrained(path)
    assert again == parts.unique["anime"]
    assert {module.partition(".")[0] for module in again.modules} == set(models)


def test_a_peft_adapter_goes_to_the_one_model_that_has_its_modules(tmp_path):
    pipe = pipeline_host("flux", ("anime",))
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    encoder = get_peft_model(make_pipeline("flux").text_encoder, config, "anime")
    path = devec.extract_adapter(encoder, "anime").save_pretrained(tmp_path / "encoder")
    devec.add_adapter(pipe, devec.Adapter.from_pretrained(path), "extra")
    assert pipe.get_list_adapters() == {
        "transformer": ["anime"],
        "text_encoder": ["anime", "extra"],
    }
