"""Scalings of adapters that were hotswapped, or have mixing weights: told apart, or refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import LlamaConfig, LlamaForCausalLM

import devec
from devec import DevecWarning
from support.models.live_models import LLAMA, TOKENS, layers, trained
from support.models.pipelines import make_pipeline
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGETS = ["q_proj", "down_proj"]


def llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def save(path, seed, rank, alpha, **fields):
    """An adapter in the files of PEFT."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **fields)
    model = get_peft_model(llama(), config)
    trained(model, "default", seed)
    model.save_pretrained(str(path))
    return devec.Adapter.from_pretrained(path)


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def check(model, want):
    """That an adapter is read as it is in its file, and as the model runs it."""
    assert devec.extract_adapter(model, "slot") == want
    ref = logits(model)
    devec.negate_adapter(model, "slot", "same", scale=-1.0)
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), ref)


SWAPS = {  # rank and alpha, before and after
    "larger alpha": ((4, 4), (4, 16)),
    "smaller alpha": ((4, 8), (4, 4)),
    "half an alpha": ((4, 8), (4, 4.5)),
    "larger rank": ((4, 4), (6, 12)),
    "smaller rank": ((6, 6), (4, 12)),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("before", "after"), SWAPS.values(), ids=SWAPS)
def test_a_hotswapped_alpha_is_read(before, after, rslora, tmp_path):
    save(tmp_path / "a", 1, *before, use_rslora=rslora)
    want = save(tmp_path / "b", 2, *after, use_rslora=rslora)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    hotswap_adapter(model, tmp_path / "b", "slot", torch_device="cpu")
    with pytest.warns(DevecWarning, match="'slot'.*hotswapped.*set_scale"):
        check(model, want)


@pytest.mark.parametrize("alpha", [16, 4])
def test_a_hotswapped_scaling_that_is_the_same_is_read(alpha, tmp_path):
    save(tmp_path / "a", 1, 4, alpha)
    want = save(tmp_path / "b", 2, 4, alpha)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    hotswap_adapter(model, tmp_path / "b", "slot", torch_device="cpu")
    check(model, want)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(("before", "after"), SWAPS.values(), ids=SWAPS)
def test_prepared_models_are_read(before, after, with_config, tmp_path):
    save(tmp_path / "a", 1, *before)
    want = save(tmp_path / "b", 2, *after)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    config = {"config": model.peft_config} if with_config else {}
    prepare_model_for_compiled_hotswap(model, target_rank=8, **config)
    hotswap_adapter(model, tmp_path / "b", "slot", torch_device="cpu")
    if before[0] == after[0]:
        with pytest.warns(DevecWarning, match="hotswapped"):
            check(model, want)
    else:
        check(model, want)


def test_models_that_are_prepared_and_not_swapped(tmp_path):
    want = save(tmp_path / "a", 1, 6, 13)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    got = devec.extract_adapter(model, "slot")
    assert {delta.scaling for delta in got.modules.values()} == {13 / 6}  # not of float32
    check(model, want)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("weight", [0.7, -0.5, 1 / 3])
def test_weights_are_not_taken_for_an_alpha(weight, when, tmp_path):
    want = save(tmp_path / "a", 1, 4, 8)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    if when == "after":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    for layer in layers(model).values():
        layer.set_scale("slot", weight)
    assert devec.extract_adapter(model, "slot") == want
    for layer in layers(model).values():
        layer.set_scale("slot", 1)
        layer.scale_layer(weight)
    assert devec.extract_adapter(model, "slot") == want
    for layer in layers(model).values():
        layer.unscale_layer(weight)  # but for rounding
    got = devec.extract_adapter(model, "slot")
    assert {delta.scaling for delta in got.modules.values()} == {2.0}


@pytest.mark.parametrize("weight", [0.7, -0.5])
@pytest.mark.parametrize("how", ["scale_layer", "set_scale"])
def test_weights_on_prepared_models_are_refused(how, weight, tmp_path):
    want = save(tmp_path / "a", 1, 4, 8)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    if how == "scale_layer":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    for layer in layers(model).values():
        layer.scale_layer(weight) if how == "scale_layer" else layer.set_scale("slot", weight)
    if how == "set_scale":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(devec.DevecError, match=r"'slot'.*unscale_layer\(\)"):
        devec.extract_adapter(model, "slot")
    for layer in layers(model).values():
        layer.unscale_layer()
    assert devec.extract_adapter(model, "slot") == want


def test_weights_that_could_be_an_alpha_are_named(tmp_path):
    save(tmp_path / "a", 1, 4, 8)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="slot").eval()
    for layer in layers(model).values():
        layer.set_scale("slot", 0.5)
    with pytest.warns(DevecWarning, match=r"0\.5 times.*hotswapped adapter \(4\).*set it back"):
        got = devec.extract_adapter(model, "slot")
    assert {delta.scaling for delta in got.modules.values()} == {1.0}


@needs("transformers", "5", "its models cannot hotswap adapters")
def test_a_model_of_transformers_is_read_as_it_runs(tmp_path):
    save(tmp_path / "a", 1, 4, 8)
    save(tmp_path / "b", 2, 4, 16)
    model = llama()
    model.load_adapter(tmp_path / "a", adapter_name="slot")
    model.load_adapter(tmp_path / "b", adapter_name="slot", hotswap=True)
    model.set_adapter("slot")
    want = logits(model)
    devec.negate_adapter(model, "slot", "same", scale=-1.0)
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), want)


PAIR = ("anime", "pixel")


def pipeline(kind="flux", alphas=(8, 8), encoder=False):
    """A pipeline with two adapters of rank 4."""
    pipe = make_pipeline(kind)
    denoiser = pipe.unet if kind == "sd15" else pipe.transformer
    models = {
        denoiser: ["to_q", "to_out.0"],
        **({pipe.text_encoder: ["q_proj"]} if encoder else {}),
    }
    for model, targets in models.items():
        for index, (name, alpha) in enumerate(zip(PAIR, alphas, strict=True)):
            model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets), name)
            trained(model, name, index)
    pipe.set_adapters(list(PAIR))
    return pipe


def test_weights_of_set_adapters_do_not_count():
    pipe = pipeline()
    want = {name: devec.extract_adapter(pipe, name) for name in PAIR}
    for weights in ([0.7, -2.0], [0.3, 0.9], [1.0, 0.7], [0.0, 1.0], [1.1, 1 / 3]):
        pipe.set_adapters(list(PAIR), weights)
        assert all(devec.extract_adapter(pipe, name) == want[name] for name in PAIR)
    pipe.set_adapters(list(PAIR), [0.7, 0.5])  # an alpha of 4, or a weight beside a weight
    assert devec.extract_adapter(pipe, "anime") == want["anime"]
    with pytest.warns(DevecWarning, match=r"'pixel'.*0\.5 times.*mixing weight.*from_pretrained"):
        assert devec.extract_adapter(pipe, "pixel") == want["pixel"]
    with pytest.warns(DevecWarning, match="'pixel'"):
        devec.decompose_adapters(pipe, PAIR, threshold=0.1)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 2.0], [0.5, 1.0]])
def test_weights_that_could_be_an_alpha_are_refused_in_pipelines(weights):
    pipe = pipeline()
    want = {name: devec.extract_adapter(pipe, name) for name in PAIR}
    pipe.set_adapters(list(PAIR), weights)
    for name, weight in zip(PAIR, weights, strict=True):
        if weight != 1:
            with pytest.raises(
                devec.DevecError, match=rf"'{name}'.* {weight:.6g} times.*set_adapt"
            ):
                devec.extract_adapter(pipe, name)
    pipe.set_adapters(list(PAIR))
    assert all(devec.extract_adapter(pipe, name) == want[name] for name in PAIR)


def test_a_weight_in_a_text_encoder_is_no_hotswapped_alpha():
    pipe = pipeline("sd15", encoder=True)
    want = {name: devec.extract_adapter(pipe, name) for name in PAIR}
    pipe.set_adapters(list(PAIR), [0.5, 2.0])
    assert all(devec.extract_adapter(pipe, name) == want[name] for name in PAIR)


def test_weights_by_block_do_not_count():
    pipe = pipeline("sd15")
    want = devec.extract_adapter(pipe, "anime")
    pipe.set_adapters(["anime"], [{"unet": {"down": 0.7, "mid": 1.0, "up": 0.5}}])
    assert devec.extract_adapter(pipe, "anime") == want


SAME = {"weight_name": "b.safetensors", "adapter_name": "slot"}


def saved_pair(folder, rank, alpha):
    """Save adapters "a" and "b" of a transformer, the second of a rank and alpha; return it."""
    made = make_pipeline("flux").transformer
    for index, (name, r, own) in enumerate((("a", 4, 4), ("b", rank, alpha))):
        made.add_adapter(LoraConfig(r=r, lora_alpha=own, target_modules=["to_q"]), name)
        trained(made, name, index)
        devec.extract_adapter(made, name).save_pretrained(folder / name)
    return made


@pytest.mark.parametrize("rank", [4, 6])
def test_hotswapped_alphas_in_pipelines(rank, tmp_path):
    """Without preparation, which diffusers asks for if alphas differ."""
    made = saved_pair(tmp_path, rank, 16)
    want = devec.extract_adapter(made, "b")
    pipe = make_pipeline("flux")
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="slot")
    pipe.load_lora_weights(tmp_path, **SAME, hotswap=True)
    scalings = {layer.scaling["slot"] for layer in layers(pipe.transformer).values()}
    assert scalings == {16 / rank}
    if rank == 4:
        with pytest.raises(devec.DevecError, match=r"'slot'.*hotswapped \(16\).*from_pretrained"):
            devec.extract_adapter(pipe, "slot")
    else:
        with pytest.warns(DevecWarning, match=r"hotswapped adapter \(16\)"):
            assert devec.extract_adapter(pipe, "slot") == want


@pytest.mark.parametrize("rank", [4, 6])
def test_hotswapped_alphas_in_prepared_pipelines(rank, tmp_path):
    made = saved_pair(tmp_path, rank, 9)
    pipe = make_pipeline("flux")
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="slot")
    pipe.load_lora_weights(tmp_path, **SAME, hotswap=True)
    want = devec.extract_adapter(made, "b")
    if rank == 4:
        with pytest.warns(DevecWarning, match="hotswapped"):
            assert devec.extract_adapter(pipe, "slot") == want
    else:
        assert devec.extract_adapter(pipe, "slot") == want
    for layer in layers(pipe.transformer).values():
        layer.scale_layer(0.7)
    with pytest.raises(devec.DevecError, match=r"'slot'.*unscale_layer"):
        devec.extract_adapter(pipe, "slot")
