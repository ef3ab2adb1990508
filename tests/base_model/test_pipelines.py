"""Base weights of pipelines, by whatever name an adapter has for a module."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from devec.naming.families import flat
from devec.naming.tables import TABLES
from support.checks.base_weights import (
    FAMILIES,
    family,
    native_names,
    native_state,
    pipeline,
    read,
    single,
    slots,
    swapped,
    wrong,
)
from support.models.module_names import find_modules
from support.models.pipelines import ENCODERS, linear_modules

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


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
