"""Base weights from files and live models, by whatever name an adapter has for a module."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from pipelines import ENCODERS, find_modules, linear_modules, make_pipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from devec.base_model.model import base_model
from devec.deltas.gains import zero_gain
from devec.errors import DevecError, FormatError, IncompatibleError, UnsupportedError
from devec.naming.families import flat
from devec.naming.tables import TABLES

CPU = torch.device("cpu")
FAMILIES = {"sd15": "sd", "sdxl": "sdxl", "flux": "flux", "sd3": "sd3"}
COMMIT = "c" * 40


def read(base, module, shape, dtype=torch.float32, **known):
    return base_model(base).weight(module, tuple(shape), **known).read(dtype, CPU)


def wrong(base, ids, truth, **known):
    """Which modules do not read as they should."""
    assert ids
    base = base_model(base)
    return [i for i in ids if not torch.equal(read(base, i, truth(i).shape, **known), truth(i))]


def refused(error, base, *parts, module="first", shape=(4, 6), **known):
    """Assert that a handle is given, and that reading it is refused with a message."""
    handle = base_model(base).weight(module, shape, **known)
    with pytest.raises(error) as caught:
        handle.read(torch.float32, CPU)
    for part in parts:
        assert part in str(caught.value)


def single(path, **tensors):
    """A file of some tensors, whose names have ``__`` for dots."""
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


# Pipelines


pipeline = lru_cache(make_pipeline)


def slots(kind):
    """Name of a model in the pipeline → the model."""
    pipe = pipeline(kind)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    named = {name: getattr(pipe, name, None) for name in (denoiser, *ENCODERS)}
    return {name: model for name, model in named.items() if model is not None}


def family(kind):
    return TABLES[FAMILIES[kind]]()


def swapped(name, weight):
    """A weight with the halves that native names have the other way round."""
    at_end = flat(name).endswith("final_layer_adaLN_modulation_1")
    in_context = flat(name).endswith("joint_blocks_2_context_block_adaLN_modulation_1")
    return torch.cat(weight.chunk(2)[::-1]) if at_end or in_context else weight


def truth_of(kind):
    """Id of a module → its weight, by the tables of the tests."""
    own = linear_modules(next(iter(slots(kind).values())))

    def truth(module):
        name = module.replace("final_layer_adaLN_modulation_1", "norm_out_linear")
        modules = [own[name]] if name in own else find_modules(pipeline(kind), name)
        return swapped(module, torch.cat([m.weight.flatten(1) for m in modules]))

    return truth


# The names of tests/pipelines.py; others of the ends are in the tables of the package alone.
OTHER_ENDS = ("time_in", "guidance_in", "vector_in", "x_embedder_proj", "context_embedder",
              "t_embedder", "y_embedder")  # fmt: skip


def native_names(kind):
    """Native names of the modules of a denoiser."""
    models = slots(kind)
    parts = linear_modules(next(iter(models.values())))
    names = dict.fromkeys(family(kind).module(part, "native") for part in parts)
    return list(names)


def diffusers_ids(kind):
    return [
        f"{slot}.{name}" for slot, model in slots(kind).items() for name in linear_modules(model)
    ]


def encoder_ids(kind, prefixes):
    """Flat ids of the modules of the text encoders; T5's have the third prefix."""
    ids = []
    for slot, prefix in zip(ENCODERS, prefixes, strict=False):
        for name in linear_modules(slots(kind).get(slot, nn.Module())):
            is_clip = "block" not in name and not name.startswith(("text_model", "text_proj"))
            of = "lora_te3_" if "block" in name else prefix
            ids.append(of + ("text_model_" if is_clip else "") + flat(name))
    return ids


def kohya_ids(kind):
    denoiser = next(iter(slots(kind).values()))
    names = linear_modules(denoiser) if kind == "sd15" else native_names(kind)
    names = [flat(n) for n in names if not flat(n).startswith(OTHER_ENDS)]
    encoders = ("lora_te_",) if kind == "sd15" else ("lora_te1_", "lora_te2_", "lora_te3_")
    return [f"lora_unet_{name}" for name in names] + encoder_ids(kind, encoders)


def bare_ids(kind):
    return list(linear_modules(next(iter(slots(kind).values()))))


NAMINGS = {"diffusers": diffusers_ids, "kohya": kohya_ids, "bare": bare_ids}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a pipeline as diffusers saves it."""

    @lru_cache
    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        pipeline(kind).save_pretrained(folder)
        return folder

    return save


def native_state(kind, prefix):
    """The weights of a denoiser by their native names, rows fused by hand."""
    weights = {n: m.weight for n, m in linear_modules(next(iter(slots(kind).values()))).items()}
    return {
        f"{prefix}{name}.weight": swapped(
            name, torch.cat([weights[p.name] for p in family(kind).native[name]])
        ).contiguous()
        for name in native_names(kind)
    }


ENCODER_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer."},
    "flux": {"text_encoder": "text_encoders.clip_l.transformer.",
             "text_encoder_2": "text_encoders.t5xxl.transformer."},
    "sd3": {"text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A single file of all models of a pipeline, as Stability AI and ComfyUI name them."""

    @lru_cache
    def save(kind):
        state = native_state(kind, "model.diffusion_model.")
        for slot, prefix in ENCODER_PREFIXES[kind].items():
            for name, module in linear_modules(slots(kind)[slot]).items():
                clip = "" if "block" in name or name.startswith("text_") else "text_model."
                state[f"{prefix}{clip}{name}.weight"] = module.weight
        state["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2, 3, 3)
        if kind == "sdxl":
            state["conditioner.embedders.1.model.text_projection"] = torch.ones(2, 2)
        path = tmp_path_factory.mktemp(kind) / "checkpoint.safetensors"
        save_file(state, path)
        return path

    return save


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_module_of_a_pipeline_directory_is_read_by_every_name(kind, naming, saved):
    ids = NAMINGS[naming](kind)
    assert wrong(saved(kind), ids, truth_of(kind), family=family(kind)) == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_module_of_a_live_pipeline_is_read_by_every_name(kind, naming):
    ids = NAMINGS[naming](kind)
    assert wrong(pipeline(kind), ids, truth_of(kind), family=family(kind)) == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_module_of_a_single_file_is_read_by_every_name(kind, naming, checkpoint):
    ids = [
        i for i in NAMINGS[naming](kind)
        if kind != "sdxl" or not i.startswith(("text_encoder_2", "lora_te2"))
    ]  # fmt: skip
    assert wrong(checkpoint(kind), ids, truth_of(kind), family=family(kind)) == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_file_of_the_denoiser_alone_has_native_names(kind, naming, tmp_path):
    save_file(native_state(kind, ""), path := tmp_path / "native.safetensors")
    ids = [i for i in NAMINGS[naming](kind) if not i.startswith(("text_", "lora_te"))]
    assert wrong(path, ids, truth_of(kind), family=family(kind)) == []


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_the_family_is_told_by_the_base_model_where_the_adapter_does_not(kind, tmp_path):
    save_file(native_state(kind, ""), path := tmp_path / "native.safetensors")
    assert wrong(path, bare_ids(kind), truth_of(kind)) == []


@pytest.mark.parametrize("base", ["file", "directory"])
@pytest.mark.parametrize("half", ["scale", "shift"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_halves_of_a_module_are_read_by_their_names(half, prefix, base, checkpoint, saved):
    weight = pipeline("flux").transformer.norm_out.linear.weight
    scale, shift = weight.chunk(2)  # as diffusers has them
    path = {"file": checkpoint, "directory": saved}[base]("flux")
    got = read(path, f"{prefix}norm_out.linear:{half}", scale.shape, family=family("flux"))
    assert torch.equal(got, {"scale": scale, "shift": shift}[half])


@pytest.mark.parametrize(
    ("part", "rows"), [("q", slice(0, 9)), ("k", slice(9, 12)), ("v", slice(12, 15))]
)
def test_parts_of_a_fused_layer_may_differ_in_size(part, rows, tmp_path):
    fused, family = torch.randn(15, 9), TABLES["lumina2"]()
    path = single(tmp_path / "lumina.safetensors", layers__0__attention__qkv__weight=fused)
    shape = fused[rows].shape
    got = read(path, f"transformer.layers.0.attn.to_{part}", shape, family=family)
    assert torch.equal(got, fused[rows])


@pytest.mark.parametrize("slot", ["unet", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("live", [True, False])
def test_one_model_of_a_pipeline_is_a_base_model(slot, live, saved):
    model = slots("sdxl")[slot]
    base = model if live else saved("sdxl") / slot
    weights = {name: m.weight.flatten(1) for name, m in linear_modules(model).items()}
    assert wrong(base, list(weights), weights.__getitem__) == []
    prefixed = [f"{slot}.{name}" for name in weights]
    assert wrong(base, prefixed, lambda i: weights[i.removeprefix(f"{slot}.")]) == []


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"]
)
@pytest.mark.parametrize("slot", ["text_encoder", "text_encoder_2"])
def test_text_model_may_be_missing_on_either_side(name, slot, saved):
    (module,) = find_modules(pipeline("sdxl"), f"{slot}.{name}")
    for base in (saved("sdxl") / slot, slots("sdxl")[slot]):
        for module_id in (name, f"{slot}.{name}", f"base_model.model.{name}"):
            assert torch.equal(read(base, module_id, module.weight.shape), module.weight)


# Models of transformers


def _language_models():
    vocabulary = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, **vocabulary)
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, **vocabulary}  # fmt: skip
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    bert = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=24, max_position_embeddings=8)  # fmt: skip
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **llama)),
        "llama, not tied": lambda: LlamaForCausalLM(
            LlamaConfig(tie_word_embeddings=False, **llama)
        ),
        "t5": lambda: T5ForConditionalGeneration(t5),
        "bert": lambda: BertForMaskedLM(bert),
    }


LANGUAGE = _language_models()


@lru_cache
def language_model(kind):
    torch.manual_seed(3)
    return LANGUAGE[kind]().eval().requires_grad_(False)


def layers(model):
    """PEFT's name of a layer → its weight as the map from inputs to outputs."""
    turned = (Conv1D, nn.Embedding)
    return {
        name: module.weight.mT if isinstance(module, turned) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }


def _whole(model, folder):
    model.save_pretrained(folder)
    return folder


def _sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _index(model, folder):
    return _sharded(model, folder) / "model.safetensors.index.json"


def _shards_without_index(model, folder):
    (_index(model, folder)).unlink()
    return folder


def _variant(model, folder):
    model.save_pretrained(folder, variant="fp32")
    return folder


def _sharded_variant(model, folder):
    model.save_pretrained(folder, variant="fp32", max_shard_size="4KB")
    assert (folder / "model.safetensors.index.fp32.json").exists()
    return folder


def _file(model, folder):
    return _whole(model, folder) / "model.safetensors"


def _inner(model, folder):
    model.base_model.save_pretrained(folder)
    return folder


def _live(model, folder):  # noqa: ARG001
    return model


FORMS = [_whole, _sharded, _index, _shards_without_index, _variant, _sharded_variant, _file, _live]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LANGUAGE)
def test_every_layer_of_a_model_of_transformers(kind, form, tmp_path):
    expected = layers(language_model(kind))
    base = form(language_model(kind), tmp_path)
    assert wrong(base, list(expected), expected.__getitem__) == []
    peft = {f"base_model.model.{name}": weight for name, weight in expected.items()}
    assert wrong(base, list(peft), peft.__getitem__) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_checkpoint_of_the_model_without_head_lacks_the_first_name(kind, tmp_path):
    model = language_model(kind)
    prefix = f"{model.base_model_prefix}."
    expected = {n: w for n, w in layers(model).items() if n.startswith(prefix)}
    assert wrong(_inner(model, tmp_path), list(expected), expected.__getitem__) == []


@pytest.mark.parametrize("form", [_whole, _live])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_an_adapter_of_the_model_without_head_lacks_the_first_name(kind, form, tmp_path):
    model = language_model(kind)
    expected = layers(model.base_model)
    assert wrong(form(model, tmp_path), list(expected), expected.__getitem__) == []


@pytest.mark.filterwarnings("ignore:the files of:devec.DevecWarning")
def test_an_output_layer_that_is_not_tied_has_no_weight_in_the_input(tmp_path):
    base = _inner(language_model("llama, not tied"), tmp_path)
    refused(IncompatibleError, base, "no such layer", module="lm_head", shape=(40, 16))


@pytest.mark.parametrize("module", ["lycoris_model_layers_1_mlp_up_proj", "layers.1.mlp.up_proj"])
def test_flat_and_shortened_names_of_language_models(module, tmp_path):
    model = language_model("llama")
    got = read(_whole(model, tmp_path), module, (24, 16))
    assert torch.equal(got, model.model.layers[1].mlp.up_proj.weight)


# Which way round


SQUARE = torch.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize(
    ("model_type", "name", "turned"),
    [("gpt2", "c_proj", True), ("imagegpt", "c_attn", True), ("gpt2", "score", False),
     ("gpt_bigcode", "c_proj", False), (None, "c_proj", False)],
)  # fmt: skip
def test_square_weights_are_turned_where_the_configuration_says_so(
    model_type, name, turned, tmp_path
):
    path = single(tmp_path / "model.safetensors", **{f"h__0__{name}__weight": SQUARE})
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    got = read(path, f"h.0.{name}", (4, 4))
    assert torch.equal(got, SQUARE.mT if turned else SQUARE)


@pytest.mark.parametrize("transposed", [True, False])
def test_the_adapter_may_know_which_way_round_a_weight_is(transposed, tmp_path):
    path = single(tmp_path / "model.safetensors", h__0__c_proj__weight=SQUARE)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    got = read(path, "h.0.c_proj", (4, 4), transposed=transposed)
    assert torch.equal(got, SQUARE.mT if transposed else SQUARE)


@pytest.mark.parametrize("live", [True, False])
def test_what_the_base_model_knows_comes_before_what_peft_says_of_all_layers(live, tmp_path):
    """fan_in_fan_out is one field for Conv1D and Linear layers."""
    model = nn.ModuleDict({"c_proj": Conv1D(4, 4), "q_proj": nn.Linear(4, 4, bias=False)})
    base = model
    if not live:
        save_file(model.state_dict(), base := tmp_path / "model.safetensors")
        nested = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
        (tmp_path / "config.json").write_text(json.dumps(nested))
    hint = {"fan_in_fan_out": True}
    assert torch.equal(read(base, "q_proj", (4, 4), **hint), model.q_proj.weight)
    assert torch.equal(read(base, "c_proj", (4, 4), **hint), model.c_proj.weight.T)


@pytest.mark.parametrize("turned", [True, False])
def test_where_nothing_else_tells_peft_is_believed(turned, tmp_path):
    path = single(tmp_path / "other.safetensors", first__weight=SQUARE)
    got = read(path, "first", (4, 4), fan_in_fan_out=turned)
    assert torch.equal(got, SQUARE.mT if turned else SQUARE)


def test_one_layer_does_not_stand_for_those_of_all_blocks(tmp_path):
    path = single(tmp_path / "other.safetensors", q_proj__weight=torch.ones(4, 6))
    refused(IncompatibleError, path, "no such layer", module="layers.0.q_proj")
    assert read(path, "model.q_proj", (4, 6)).shape == (4, 6)


def test_a_file_and_the_directory_it_is_in_are_one_model(tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=SQUARE)
    assert base_model(path).source == base_model(tmp_path).source
    other = single(tmp_path / "other.safetensors", first__weight=SQUARE)
    assert base_model(other).source != base_model(path).source


def test_an_initialisation_that_changes_the_base_weights_is_refused():
    torch.manual_seed(0)
    host = get_peft_model(
        plain(), LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
    )
    for base in (host, host.base_model.model):
        refused(IncompatibleError, base, "pissa", "default", "first")
        assert read(base, "second", (4, 4)).shape == (4, 4)


def test_what_is_stored_the_other_way_round_is_not_taken_for_what_it_is_said_to_be(tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(6, 4))
    refused(IncompatibleError, path, "(4, 6)", "(6, 4)", transposed=False)
    assert read(path, "first", (4, 6)).shape == (4, 6)


def test_a_convolution_is_flattened_and_never_turned(tmp_path):
    kernel = torch.randn(4, 2, 3, 1)
    path = single(tmp_path / "model.safetensors", first__weight=kernel)
    assert torch.equal(read(path, "first", (4, 6)), kernel.flatten(1))
    refused(IncompatibleError, path, "(6, 4)", shape=(6, 4))


# Precision


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_weights_are_given_in_the_precision_asked_for(stored, wanted, tmp_path):
    weight = torch.randn(4, 6).to(stored)
    path = single(tmp_path / "model.safetensors", first__weight=weight)
    got = read(path, "first", (4, 6), wanted)
    assert got.dtype == wanted
    assert torch.equal(got, weight.to(wanted))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("live", [True, False])
def test_eight_bits_without_scales_are_widened(stored, live, tmp_path):
    base = plain()
    base.first.weight = nn.Parameter(base.first.weight.to(stored), requires_grad=False)
    weight = base.first.weight
    if not live:
        base = single(tmp_path / "model.safetensors", first__weight=weight.data)
    assert torch.equal(read(base, "first", (4, 6)), weight.float())


# Live models


def plain(**replaced):
    """A model of three layers, some replaced."""
    torch.manual_seed(2)
    inner = {"first": nn.Linear(6, 4), "second": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    return nn.ModuleDict({**inner, **replaced}).requires_grad_(False)


def with_head():
    torch.manual_seed(4)
    return plain(head=nn.Linear(4, 3), table=nn.Embedding(5, 4))


def with_adapter(**fields):
    host = with_head()
    targets = ["first", "table"]
    return get_peft_model(host, LoraConfig(r=2, target_modules=targets, **fields))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("module", ["first", "second", "table", "head", "base_model.model.first"])
def test_the_base_layers_of_a_model_with_adapters(module, wrapped):
    host = with_adapter(modules_to_save=["head"])
    expected = layers(with_head())
    weight = expected[module.removeprefix("base_model.model.")]
    base = host if wrapped else host.base_model.model
    assert torch.equal(read(base, module, weight.shape), weight)
    assert base_model(host).source == base_model(host.base_model.model).source


def test_attention_inside_of_an_adapter():
    attention = nn.MultiheadAttention(4, 2)
    host = get_peft_model(plain(attn=attention), LoraConfig(r=2, target_modules=["attn"]))
    got = read(host, "attn.out_proj", (4, 4))
    assert torch.equal(got, host.base_model.model.attn.base_layer.out_proj.base_layer.weight)


def test_a_merged_adapter_is_refused_until_it_is_taken_out():
    host = with_adapter(init_lora_weights=False)
    base, before = base_model(host), read(host, "first", (4, 6)).clone()
    host.merge_adapter()
    refused(IncompatibleError, base, "merged", "default", "unmerge_adapter")
    assert read(base, "second", (4, 4)).shape == (4, 4)
    host.unmerge_adapter()
    torch.testing.assert_close(read(base, "first", (4, 6)), before)


def test_an_adapter_of_a_pipeline_that_is_in_use_is_no_part_of_its_weights():
    pipe = make_pipeline("sd15")
    (module,) = find_modules(pipe, "lora_unet_mid_block_attentions_0_proj_in")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False))
    got = read(pipe, "unet.mid_block.attentions.0.proj_in", module.weight.flatten(1).shape)
    assert torch.equal(got, module.weight.flatten(1))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers_are_dequantised_by_peft(kind):
    layer = quantised(kind)
    got = read(plain(first=layer), "first", (32, 64))
    assert got.shape == (32, 64)
    error = float((got - UNQUANTISED["weight"]).abs().max())
    assert 0 < error < (0.03 if kind == "Linear4bit" else 1e-3)
    adapted = get_peft_model(plain(first=layer), LoraConfig(r=2, target_modules=["first"]))
    assert torch.equal(read(adapted, "first", (32, 64)), got)
    # the layer multiplies by this very weight
    eye = layer(torch.eye(64)) - layer.bias
    torch.testing.assert_close(eye.mT, got, atol=2e-3, rtol=0.02)
    # and does so after it was read once more
    assert torch.equal(read(plain(first=layer), "first", (32, 64)), got)
    assert torch.equal(layer(torch.eye(64)) - layer.bias, eye)


UNQUANTISED = nn.Linear(64, 32).requires_grad_(False).state_dict()


def quantised(kind):
    nf4 = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)(64, 32, **nf4)
    layer.load_state_dict(UNQUANTISED)
    return layer.requires_grad_(False).to("cpu")


def test_a_layer_that_is_yet_to_be_quantised_is_read_as_it_is():
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(UNQUANTISED)
    assert torch.equal(read(plain(first=layer), "first", (32, 64)), UNQUANTISED["weight"])


class Packed(nn.Module):
    """A layer as GPTQ has them."""

    in_features, out_features = 6, 4

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(3, 4, dtype=torch.int32))


class Scaled(nn.Linear):
    """A layer with eight bits and a scale."""

    def __init__(self):
        super().__init__(6, 4, bias=False)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", torch.ones(1))


class Integers(nn.Module):
    """A layer with integers, of which nobody says what they mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [Packed, Scaled, Integers])
def test_what_peft_cannot_dequantise_is_refused(kind):
    refused(UnsupportedError, plain(first=kind()), "without quantisation")


def test_what_is_not_in_memory_is_refused():
    base = plain(first=nn.Linear(6, 4, device="meta"))
    refused(UnsupportedError, base, "not in memory", "without offloading")


def test_a_pipeline_of_two_denoisers_leaves_open_which_is_meant():
    class Pipeline:
        components = {"transformer": plain(), "transformer_2": plain(), "vae": None}  # noqa: RUF012

    refused(IncompatibleError, Pipeline(), "two denoisers")


def test_a_text_encoder_that_the_base_model_lacks():
    parts = "first text encoder (CLIP-L)", "second text encoder (CLIP-G)"
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    refused(IncompatibleError, pipeline("sd15"), *parts, module=module, shape=(16, 8))


# What is no base model, or not that of the adapter


def test_without_a_base_model_the_remedy_is_said():
    refused(IncompatibleError, None, "diag(m/", "base=MODEL", "--base MODEL", ".safetensors")


@pytest.mark.parametrize("base", [None, "no such path"])
def test_the_base_model_on_record_is_suggested(base):
    handle = base_model(base, "user/base").weight("first", (4, 6))
    with pytest.raises(DevecError, match="trained on 'user/base'"):
        handle.read(torch.float32, CPU)


@pytest.mark.parametrize("base", [3, ["a"], {"first.weight": torch.ones(4, 6)}])
def test_an_object_that_is_no_model_is_refused_at_once(base):
    with pytest.raises(IncompatibleError, match=f"loaded model; got {type(base).__name__}"):
        base_model(base)


def test_a_module_that_the_base_model_lacks(saved):
    module, near = "unet.mid_block.attentions.0.proj_inn", "mid_block.attentions.0.proj_in"
    refused(IncompatibleError, saved("sd15") / "unet", near, "unet", module=module)


def test_a_module_of_which_there_could_be_several(tmp_path):
    path = single(
        tmp_path / "model.safetensors",
        text__layers__0__q__weight=torch.ones(4, 6),
        vision__layers__0__q__weight=torch.ones(4, 6),
    )
    parts = "several", "text.layers.0.q", "vision.layers.0.q"
    refused(IncompatibleError, path, *parts, module="layers.0.q")


@pytest.mark.parametrize("shape", [(4, 5), (8, 6), (3, 8)])
def test_another_shape_than_the_adapter_wants(shape, tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6))
    parts = str(shape), "(4, 6)", "not the base model", "model.safetensors"
    refused(IncompatibleError, path, *parts, shape=shape)


@pytest.mark.parametrize("rows", [48, 49])
def test_rows_of_a_fused_layer_that_do_not_fit(rows, tmp_path):
    name = "double_blocks.0.img_attn.qkv"
    path = single(tmp_path / "flux.safetensors", **{f"{name}.weight": torch.ones(rows, 16)})
    module = "transformer.transformer_blocks.0.attn.to_q"
    parts = "not the base model", name, "flux.safetensors"
    refused(IncompatibleError, path, *parts, module=module, shape=(15, 16), family=family("flux"))


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, live, tmp_path):
    base = plain()
    base.first.weight[1, 2] = value
    if not live:
        save_file(base.state_dict(), path := tmp_path / "model.safetensors")
        base = path
    weight = base_model(base).weight("first", (4, 6))
    with pytest.raises(FormatError, match="NaN or infinity in 1 of its rows"):
        zero_gain(torch.ones(2, 6), weight)


def test_open_clip_has_other_names(checkpoint):
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    refused(UnsupportedError, checkpoint("sdxl"), "OpenCLIP", "model_index.json", module=module)


def _state(folder, **tensors):
    return single(folder / "model.safetensors", **tensors)


def _four_bits(folder):
    save_file(
        {f"first.{k}": v.contiguous() for k, v in quantised("Linear4bit").state_dict().items()},
        path := folder / "model.safetensors",
    )
    return path


def _eight_bits(folder):
    state = quantised("Linear8bitLt").state_dict()
    state = {f"first.{k}": torch.as_tensor(v) for k, v in state.items()}
    save_file(state, path := folder / "model.safetensors")
    return path


def _gptq(folder):
    packed = torch.ones(3, 4, dtype=torch.int32)
    return _state(folder, first__qweight=packed, first__scales=torch.ones(1, 4))


def _scaled(folder):
    weight = torch.ones(4, 6).to(torch.float8_e4m3fn)
    return _state(folder, first__weight=weight, first__scale_weight=torch.ones(1))


def _said_by_the_configuration(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    return _state(folder, first__weight=torch.ones(4, 6))


QUANTISED = [_four_bits, _eight_bits, _gptq, _scaled, _said_by_the_configuration]


@pytest.mark.parametrize("made", QUANTISED)
def test_quantised_files_are_refused(made, tmp_path):
    refused(UnsupportedError, made(tmp_path), "quantised", "base=model", "model.safetensors")


# Where the files are


def _pickles(folder):
    torch.save(plain().state_dict(), folder / "pytorch_model.bin")
    return folder


def _a_pickle(folder):
    return _pickles(folder) / "pytorch_model.bin"


def _something_else(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder / "model.gguf"


def _nothing(folder):
    (folder / "README.md").write_text("hello")
    return folder


def _several(folder):
    for name in ("a", "b"):
        single(folder / f"{name}.safetensors", first__weight=torch.ones(4, 6))
    return folder


def _missing_shard(folder):
    path = _index(language_model("llama"), folder)
    min(folder.glob("*.safetensors")).unlink()
    return path


def _paths_in_the_index(folder):
    text = json.dumps({"weight_map": {"first.weight": "../other.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def _no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return folder


def _truncated(folder):
    path = single(folder / "model.safetensors", first__weight=torch.ones(4, 6))
    path.write_bytes(path.read_bytes()[:-8])
    return path


def _missing_folder(folder):
    text = json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]})
    (folder / "model_index.json").write_text(text)
    return folder


def _no_such_path(folder):
    return folder / "missing" / "model.safetensors"


BROKEN = {
    _pickles: ("pytorch_model.bin", "safetensors", "base=model"),
    _a_pickle: ("pytorch_model.bin", "safetensors", "base=model"),
    _something_else: ("model.gguf", ".safetensors"),
    _nothing: ("README.md", ".safetensors"),
    _several: ("a.safetensors", "b.safetensors", "name one"),
    _missing_shard: ("model-00001-of", "downloaded"),
    _paths_in_the_index: ("weight_map",),
    _no_json: ("model.safetensors.index.json", "JSON"),
    _truncated: ("model.safetensors", "truncated"),
    _missing_folder: ("unet", "downloaded"),
    _no_such_path: ("missing", "no such file"),
}


@pytest.mark.parametrize("made", BROKEN)
def test_what_is_no_base_model_is_refused_when_it_is_read(made, tmp_path):
    refused(FormatError, made(tmp_path), *BROKEN[made])


def test_usual_names_come_before_others(tmp_path):
    _several(tmp_path)
    single(tmp_path / "model.safetensors", first__weight=torch.zeros(4, 6))
    assert not read(tmp_path, "first", (4, 6)).any()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub; the working directory is empty, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache, repo, name, tensor, ref="main"):
    """Put a file of one weight into the cache, as the Hub's client does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    link, blob = root / "snapshots" / COMMIT / name, root / "blobs" / "digest"
    for folder in (link.parent, blob.parent, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    single(blob, first__weight=tensor)
    link.symlink_to(blob)
    (root / "refs" / ref).write_text(COMMIT)
    return root / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("repo", "ref", "name", "asked"),
    [("user/base", "main", "model.safetensors", "user/base"),
     ("base", "main", "model.safetensors", "base"),
     ("user/base", "v2", "model.safetensors", "user/base@v2"),
     ("user/base", "v2", "model.safetensors", f"user/base@{COMMIT}"),
     ("user/base", "main", "unet/model.safetensors", "user/base/unet"),
     ("user/base", "main", "old.safetensors", "user/base/old.safetensors")],
)  # fmt: skip
def test_models_in_the_cache_of_the_hub(repo, ref, name, asked, cache):
    folder = cached(cache, repo, name, torch.randn(4, 6), ref)
    expected = load_file(folder / name)["first.weight"]
    assert torch.equal(read(asked, "first", (4, 6)), expected)
    assert COMMIT in base_model(asked).source or name.startswith("old")


def test_the_same_model_by_its_id_and_its_path_is_the_same(cache):
    folder = cached(cache, "user/base", "model.safetensors", torch.ones(4, 6))
    assert base_model("user/base") == base_model(folder)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [("user/absent", "hf download user/absent"), ("absent", "hf download absent"),
     ("user/absent@v2", "hf download user/absent --revision v2"),
     ("a path with spaces", ".safetensors")],
)  # fmt: skip
def test_what_is_neither_on_the_disk_nor_in_the_cache(asked, advice, cache):  # noqa: ARG001
    assert base_model(asked).source == asked
    refused(FormatError, asked, asked, "no such file", advice)


def test_what_is_on_the_disk_comes_before_the_cache(cache):
    cached(cache, "base", "model.safetensors", torch.ones(4, 6))
    Path("base").mkdir()
    single(Path("base/model.safetensors"), first__weight=torch.zeros(4, 6))
    assert not read("base", "first", (4, 6)).any()


# Handles


def test_handles_of_the_same_weight_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6))
    one, other = (base_model(p).weight("first", (4, 6)) for p in (path, "./model.safetensors"))
    assert one.source == other.source == str(tmp_path.resolve())
    assert one == other
    assert hash(one) == hash(other)
    assert one != base_model(path).weight("second", (4, 6))
    assert one != base_model(None).weight("first", (4, 6))


def test_live_models_are_told_apart():
    one, other = plain(), plain()
    assert base_model(one) == base_model(one)
    assert base_model(one) != base_model(other)
    assert "ModuleDict" in base_model(one).source
    assert len(repr(base_model(one).weight("first", (4, 6)))) < 200


def test_a_base_model_is_taken_as_it_is(tmp_path):
    base = base_model(single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6)))
    assert base_model(base) is base


def test_nothing_is_opened_before_a_weight_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    handle = base_model(path).weight("first", (4, 6))
    single(path, first__weight=torch.ones(4, 6))
    assert handle.read(torch.float32, CPU).all()


def test_headers_are_read_once(tmp_path, monkeypatch):
    path = _index(language_model("llama"), tmp_path)
    base, weights = base_model(path), layers(language_model("llama"))
    assert wrong(base, ["lm_head"], weights.__getitem__) == []
    # whatever else is needed is in the files of weights
    path.unlink()
    monkeypatch.setattr("devec.base_model.files._header_entries", None)
    assert wrong(base, list(weights), weights.__getitem__) == []


def test_a_checkpoint_without_configuration_is_read_by_shapes(tmp_path):
    model = LlamaModel(language_model("llama").config)
    save_file(model.state_dict(), path := tmp_path / "weights.safetensors")
    expected = layers(model)
    assert wrong(path, list(expected), expected.__getitem__) == []
