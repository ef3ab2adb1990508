"""Adapters of one tower of a model of several: put where they belong, or refused, never guessed."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BlipConfig,
    BlipModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    FlavaConfig,
    FlavaModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

import devec
from support.models.live_models import LLAMA, changes, layers, trained
from support.models.pipelines import make_pipeline
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES["num_attention_heads"] = 2
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TEXT = {**SIZES, **TOKENS, "vocab_size": 64, "max_position_embeddings": 16}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
PATCHES = {**SIZES, "num_patches": 4, "patch_size": 4}
SOUND = {
    "hidden_size": 16, "num_mel_bins": 32, "spec_size": 32, "patch_embeds_hidden_size": 8,
    "depths": [1, 1], "num_attention_heads": [1, 1], "patch_size": 4, "patch_stride": [4, 4],
    "window_size": 2,
}  # fmt: skip
BOTH = {"text_config": TEXT, "vision_config": IMAGE}


def siglip2(**fields):
    """A model that transformers has since 4.49."""
    transformers = pytest.importorskip("transformers", minversion="4.49")
    return transformers.Siglip2Model(transformers.Siglip2Config(**fields))


FAMILIES = {
    "clip": lambda: CLIPModel(CLIPConfig(**BOTH)),
    "siglip": lambda: SiglipModel(SiglipConfig(**BOTH)),
    "siglip2": lambda: siglip2(text_config=TEXT, vision_config=PATCHES),
    "chinese-clip": lambda: ChineseCLIPModel(ChineseCLIPConfig(**BOTH)),
    "blip": lambda: BlipModel(BlipConfig(**BOTH)),
    "clap": lambda: ClapModel(
        ClapConfig(text_config=TEXT, audio_config=SOUND, projection_dim=16)
    ),
    "flava": lambda: FlavaModel(
        FlavaConfig(text_config=TEXT, image_config=IMAGE, multimodal_config=SIZES)
    ),
}  # fmt: skip
TOWERS = [
    *((family, tower) for family in list(FAMILIES)[:5] for tower in ("text_model", "vision_model")),
    *(("clap", tower) for tower in ("text_model", "audio_model")),
    *(("flava", tower) for tower in ("text_model", "image_model", "multimodal_model")),
]
# Of the others, layers have other names in each of the towers.
ALIKE = ("clip", "siglip", "siglip2", "flava")
TARGETS = r".*(q_proj|layers\.\d+\.mlp\.fc1|qkv|attention\.query|self\.query)"


def make(family, **changed):
    torch.manual_seed(3)
    if changed:
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**IMAGE, **changed})).eval()
    return FAMILIES[family]().eval()


def adapter_of(model, path, record=True):
    """An adapter of a model, saved by PEFT, with the model's class on record or without."""
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, target_modules=TARGETS)).eval()
    trained(tuned, "default", 1)
    tuned.save_pretrained(str(path))
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == type(model).__name__
    if not record:
        config["auto_mapping"] = None
    (path / "adapter_config.json").write_text(json.dumps(config))
    return devec.Adapter.from_pretrained(path), tuned


def refused(model, adapter, *words):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(devec.DevecError) as error:
        devec.add_adapter(model, adapter, "x")
    for word in words:
        assert word in str(error.value), str(error.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("family", "tower"), TOWERS)
def test_an_adapter_goes_to_the_tower_that_it_was_trained_in(family, tower, tmp_path):
    model = make(family)
    adapter, tuned = adapter_of(getattr(model, tower), tmp_path)
    devec.add_adapter(model, adapter, "x")
    want = {f"{tower}.{n}": whole for n, (_, whole) in changes(tuned, "default").items()}
    got = {n: whole for n, (_, whole) in changes(model, "x").items()}
    assert got.keys() == want.keys()
    for name, whole in want.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), torch.from_numpy(whole))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tower_computes_as_it_did_alone(family, tmp_path):
    model = make(family)
    inputs = {"text_model": torch.arange(8)[None], "vision_model": torch.randn(2, 3, 8, 8)}
    for tower in inputs:
        adapter, tuned = adapter_of(getattr(model, tower), tmp_path / tower)
        name = tower.partition("_")[0]
        devec.add_adapter(model, adapter, name)
        model.set_adapter(name)
        with torch.no_grad():
            got = {at: getattr(model, at)(x).last_hidden_state for at, x in inputs.items()}
            model.disable_adapters()
            base = {at: getattr(model, at)(x).last_hidden_state for at, x in inputs.items()}
            model.enable_adapters()
            want = tuned(inputs[tower]).last_hidden_state
        (other,) = inputs.keys() - {tower}
        torch.testing.assert_close(got[tower], want)
        assert not torch.allclose(got[tower], base[tower])
        assert torch.equal(got[other], base[other])


@pytest.mark.parametrize(("family", "tower"), TOWERS)
def test_without_a_record_no_tower_is_guessed(family, tower, tmp_path):
    model = make(family)
    adapter, _ = adapter_of(getattr(model, tower), tmp_path, record=False)
    first = next(iter(adapter.modules))
    if family in ALIKE:
        refused(model, adapter, f"{tower}.{first}", f"text_model.{first}", type(model).__name__)
    elif tower == "text_model" or first.startswith("audio_encoder."):  # the only place
        devec.add_adapter(model, adapter, "x")
        assert set(layers(model)) == {f"{tower}.{name}" for name in adapter.modules}
    else:
        refused(model, adapter, "no layer", first)


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_layers_of_other_shapes_are_no_place(tower, tmp_path):
    model = make("clip", hidden_size=24)
    adapter, _ = adapter_of(getattr(model, tower), tmp_path, record=False)
    if tower == "text_model":
        devec.add_adapter(model, adapter, "x")
        assert set(layers(model)) == {f"{tower}.{name}" for name in adapter.modules}
    else:
        refused(model, adapter, "no layer")


@pytest.mark.parametrize("spelled", ["with", "without"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_adapter_of_one_tower_is_not_for_the_other(family, spelled, tmp_path):
    """Alone, towers are models whose layers have the same names."""
    model = make(family)
    text, vision = model.text_model, model.vision_model
    if spelled == "with" and family == "clip":
        text = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
    for one, other in ((text, vision), (vision, text)):
        path = tmp_path / type(one).__name__
        adapter, _ = adapter_of(one, path)
        refused(other, adapter, type(one).__name__, type(other).__name__)


@pytest.mark.parametrize("record", [True, False])
def test_versions_of_transformers_name_the_layers_of_a_text_model_differently(tmp_path, record):
    torch.manual_seed(3)
    with_part = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()
    without = make("clip").text_model
    for one, other in ((with_part, without), (without, with_part)):
        path = tmp_path / type(one).__name__
        adapter, _ = adapter_of(one, path, record)
        devec.add_adapter(other, adapter, "x")
        assert len(layers(other)) == len(adapter.modules)


def test_names_that_say_text_are_not_put_into_a_vision_model(tmp_path):
    with_part = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()
    adapter, _ = adapter_of(with_part, tmp_path, record=False)
    vision = make("clip").vision_model
    refused(vision, adapter, type(vision).__name__, "text_model.")
    with_vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE)).eval()
    refused(with_vision, adapter)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_adapter_of_both_towers_goes_to_both(family, tmp_path):
    model = make(family)
    adapter, tuned = adapter_of(model, tmp_path)
    assert {name.partition(".")[0] for name in adapter.modules} == {"text_model", "vision_model"}
    devec.add_adapter(model, adapter, "x")
    assert set(layers(model)) == set(layers(tuned))


@needs("transformers", "5", "vision_model of a CLIPModel has another class, without a prefix")
def test_a_vision_adapter_is_not_for_the_text_encoder_of_a_pipeline(tmp_path):
    pipe = make_pipeline("flux")
    config = pipe.text_encoder.config
    sizes = {key: getattr(config, key) for key in SIZES}
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**IMAGE, **sizes}))
    adapter, _ = adapter_of(model.vision_model, tmp_path)
    with pytest.raises(devec.DevecError, match=r"text_encoder CLIPTextModel.*in CLIPVisionModel"):
        devec.add_adapter(pipe, adapter, "x")
    assert not getattr(pipe.text_encoder, "peft_config", None)


def test_text_encoders_of_a_pipeline_are_not_taken_for_each_other(tmp_path):
    """An older transformers named the layers of the first as the second's are named now."""
    pipe = make_pipeline("sdxl")
    adapter, _ = adapter_of(pipe.text_encoder, tmp_path)
    devec.add_adapter(pipe, adapter, "x")
    assert "x" in pipe.text_encoder.peft_config
    assert not getattr(pipe.text_encoder_2, "peft_config", None)
    pipe = make_pipeline("sdxl")
    second, _ = adapter_of(pipe.text_encoder_2, tmp_path / "second")
    config = second.layout.config
    config["auto_mapping"]["base_model_class"] = "CLIPTextModel"
    with pytest.raises(devec.DevecError, match=r"text_encoder_2.*text_encoder CLIPTextModel"):
        devec.add_adapter(pipe, second, "x")


def test_the_denoisers_of_a_pipeline_are_not_taken_for_each_other(tmp_path):
    pipe = make_pipeline("flux")
    models = {"transformer": pipe.transformer, "transformer_2": make_pipeline("flux").transformer}
    tuned = get_peft_model(
        copy.deepcopy(pipe.transformer), LoraConfig(r=3, target_modules=["to_q"])
    )
    tuned.save_pretrained(str(tmp_path))

    class Pipeline(type(pipe)):
        _lora_loadable_modules = tuple(models)
        components = models

        def __init__(self):
            pass

    adapter = devec.Adapter.from_pretrained(tmp_path)
    with pytest.raises(
        devec.DevecError, match=r"transformer FluxTransformer2DModel.*transformer_2"
    ):
        devec.add_adapter(Pipeline(), adapter, "x")
    devec.add_adapter(models["transformer_2"], adapter, "x")
    assert "x" in models["transformer_2"].peft_config


def test_a_language_model_inside_of_another_is_found_by_its_class(tmp_path):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    adapter, _ = adapter_of(model.model, tmp_path)
    devec.add_adapter(model, adapter, "x")
    assert set(layers(model)) == {f"model.{name}" for name in adapter.modules}


def test_what_a_host_holds_already_is_where_it_belongs(tmp_path):
    """PEFT loads by names alone; what is made of it goes where it was."""
    model = make("clip")
    adapter_of(model.vision_model, tmp_path)
    host = PeftModel.from_pretrained(model.text_model, tmp_path, adapter_name="x")
    devec.negate_adapter(host, "x", "y")
    assert "y" in host.peft_config
