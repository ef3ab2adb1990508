"""DoRAs between conventions: fused, split, with their halves swapped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import combine, convert
from devec.errors import IncompatibleError, UnsupportedError
from support.adapters.cases import relative_error
from support.adapters.doras import (
    CONV,
    LINEAR,
    WIDE,
    base,
    dense_change,
    dora_file,
    effects,
    tensors_of,
)
from support.checks.dora_files import FUSED, PROJ, QKV, SPLIT, UNET, read, weighted
from support.models.module_names import find_modules
from support.pools.golden_pool import assert_close_deltas, summed
from support.truth.golden_truth import dense_truth, magnitudes

pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")

NEEDS_BASE = r"--base MODEL"

AS_LORA = "--as-lora"


def pieces(kind, truth):
    """Name of a module of the pipeline → its rows of dense deltas."""
    names = {id(m): n for n, m in base(kind).transformer.named_modules()}
    found = {}
    for module, delta in truth.items():
        modules = find_modules(base(kind), module)
        rows = np.split(delta, np.cumsum([len(m.weight) for m in modules])[:-1])
        found |= {names[id(m)]: part for m, part in zip(modules, rows, strict=True)}
    return found


@pytest.mark.parametrize("wanted", ["diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fused_doras_are_split_and_joined_without_a_base_model(tmp_path, wanted, dtype):
    path = dora_file(tmp_path / "a.safetensors", "flux", FUSED, dtype)
    there = convert(read(path, None), wanted).save_pretrained(tmp_path / "there")
    file = there / "adapter_model.safetensors" if there.is_dir() else there
    tolerance = 1e-3 if dtype == torch.float16 else 1e-12  # alpha is folded
    truth = pieces("flux", effects("flux", path))
    if wanted == "diffusers":
        assert_close_deltas(pieces("flux", effects("flux", file)), truth, tolerance)
        assert all(
            tensor.dtype == dtype and tensor.ndim == 1
            for key, tensor in load_file(file).items()
            if "magnitude" in key
        )
    else:
        for module, delta in read(there, "flux").modules.items():
            W = base("flux").transformer.get_submodule(module).weight.double().numpy()
            assert relative_error(torch.from_numpy(dense_change(delta, W)), truth[module]) <= 2e-3
    kwargs = {} if wanted == "diffusers" else {"component": "denoiser"}
    back = convert(read(there, None), "kohya", **kwargs).save_pretrained(tmp_path / "back")
    assert_close_deltas(pieces("flux", effects("flux", back)), truth, tolerance)
    key = f"{QKV}.dora_scale"
    torch.testing.assert_close(load_file(back)[key], load_file(path)[key], rtol=0, atol=0)


def test_halves_that_diffusers_swaps(tmp_path):
    native, own = "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"
    m = torch.arange(1.0, 33)[:, None]
    made = {".lora_up.weight": torch.ones(32, 2), ".lora_down.weight": torch.ones(2, 16)}
    tensors = {native + key: tensor for key, tensor in {**made, ".dora_scale": m}.items()}
    tensors |= tensors_of("flux", QKV, "out")
    save_file(tensors, tmp_path / "a.safetensors")
    there = convert(read(tmp_path / "a.safetensors", None), "diffusers")
    held = load_file(there.save_pretrained(tmp_path / "there"))
    got = held[f"{own}.lora_magnitude_vector.weight"]
    torch.testing.assert_close(got, m.flatten().roll(16), rtol=0, atol=0)
    adapter = read(tmp_path / "there.safetensors", None)
    adapter = replace(adapter, layout=adapter.layout.rebased("FLUX.1-dev"))
    back = convert(adapter, "kohya")
    again = load_file(back.save_pretrained(tmp_path / "back"))[f"{native}.dora_scale"]
    torch.testing.assert_close(again, m, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["directory", "file"])
def test_a_dora_of_peft_and_a_file(tmp_path, first):
    axes = {LINEAR: "out", CONV: "out"}
    made = dora_file(tmp_path / "a.safetensors", "sd15", axes, torch.float32)
    directory = convert(read(made, None), "peft").save_pretrained(tmp_path / "peft")
    other = dora_file(tmp_path / "b.safetensors", "sd15", {LINEAR: "out", WIDE: None}, seed=5)
    sources = {"directory": directory, "file": other}
    order = sorted(sources, key=lambda kind: kind != first)
    weights = {"directory": -0.7, "file": 0.6}
    adapters = [read(sources[kind]) for kind in order]
    total = combine(adapters, [weights[kind] for kind in order])
    out = total.save_pretrained(tmp_path / "out")
    want = weighted((-0.7, effects("sd15", made)), (0.6, effects("sd15", other)))
    if first == "file":
        assert_close_deltas(effects("sd15", out), want, 1e-5)
        return
    unet = base("sd15").unet
    for module, delta in read(out).modules.items():
        W = unet.get_submodule(module).weight.double().numpy()
        truth = want["lora_unet_" + module.replace(".", "_")]
        assert relative_error(torch.from_numpy(dense_change(delta, W)), truth) <= 1e-5, module


def test_doras_of_one_part_of_a_fused_module(tmp_path):
    """The other parts get magnitudes that do nothing, for which the base model is needed."""
    axes = {f"{SPLIT}k": "out", f"{SPLIT}v": None}
    path = dora_file(tmp_path / "a.safetensors", "flux", axes, style="diffusers")
    bare, based = (
        replace(a, layout=a.layout.rebased("FLUX.1-dev"))
        for a in (read(path, None), read(path, "flux"))
    )
    with pytest.raises(IncompatibleError, match=f"{QKV}.*{NEEDS_BASE}"):
        convert(bare, "kohya").save_pretrained(tmp_path / "out")
    out = convert(based, "kohya").save_pretrained(tmp_path / "out")
    assert effects("flux", out).keys() == {QKV}
    got, want = (pieces("flux", effects("flux", p)) for p in (out, path))
    query = got.pop("transformer_blocks.0.attn.to_q")
    assert np.abs(query).max() <= 1e-12
    assert_close_deltas(got, want, 1e-12)


@pytest.mark.parametrize("first", ["fused", "split"])
def test_a_fused_dora_and_a_split_lora(tmp_path, first):
    fused = dora_file(tmp_path / "a.safetensors", "flux", FUSED)
    axes = dict.fromkeys([*(f"{SPLIT}{x}" for x in "qv"), f"{SPLIT[:-3]}add_q_proj"])
    split = dora_file(tmp_path / "b.safetensors", "flux", axes, style="diffusers", seed=3)
    order = [fused, split] if first == "fused" else [split, fused]
    weights = [0.8, -1.2] if first == "fused" else [-1.2, 0.8]
    out = combine([read(p, "flux") for p in order], weights).save_pretrained(tmp_path / "out")
    want = summed(
        pieces("flux", weighted((0.8, effects("flux", fused)))),
        pieces("flux", weighted((-1.2, effects("flux", split)))),
    )
    got = pieces("flux", effects("flux", out))
    for rest in got.keys() - want.keys():  # what fusing brings with it
        assert np.abs(got.pop(rest)).max() <= 1e-10
    assert_close_deltas(got, want, 1e-10)
    if first == "split":
        assert magnitudes(out).keys() == dense_truth(out).keys()


@pytest.mark.parametrize("wanted", ["diffusers", "peft"])
@pytest.mark.parametrize("modules", [[LINEAR], [LINEAR, CONV]])
def test_magnitudes_of_inputs_have_no_form_elsewhere(tmp_path, wanted, modules):
    path = dora_file(tmp_path / "a.safetensors", "sd15", dict.fromkeys(modules, "in"))
    with pytest.raises(UnsupportedError, match=f"{LINEAR}.*{AS_LORA}"):
        convert(read(path, None), wanted)
    with pytest.raises(UnsupportedError, match=AS_LORA):
        convert(2 * read(path), wanted)


def test_magnitudes_of_inputs_in_a_file_that_has_those_of_outputs(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "sd15", {LINEAR: "in"})
    own = {f"{UNET}v": None, f"{UNET}q": None}
    lora = dora_file(tmp_path / "b.safetensors", "sd15", own, style="diffusers")
    total = combine([read(lora), read(path)], [1, 1])
    with pytest.raises(UnsupportedError, match=f"magnitudes of its inputs.*{AS_LORA}"):
        total.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_dora_after_a_lora_keeps_its_axis(tmp_path, axis):
    path = dora_file(tmp_path / "a.safetensors", "sd15", {CONV: axis}, torch.float16)
    lora = dora_file(tmp_path / "b.safetensors", "sd15", {CONV: None}, torch.bfloat16, seed=1)
    total = combine([read(lora), read(path)], [1, 1])
    assert total.layout.about.dora == {axis: 1}
    stored_magnitudes = load_file(total.save_pretrained(tmp_path / "out"))[f"{CONV}.dora_scale"]
    assert stored_magnitudes.dtype == torch.float32  # as all that are computed


def test_gains_that_vanish_in_a_piece(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "flux", {QKV: "out"})
    split = dora_file(tmp_path / "b.safetensors", "flux", {f"{SPLIT}q": None}, style="diffusers")
    fused = read(path, "flux")
    gains = fused.modules[QKV].resolved().gain.axes["out"].values
    total = combine([fused, read(split, "flux")], [float(-1 / gains.min()), 1])
    with pytest.raises(IncompatibleError, match="largest coefficient"):
        total.save_pretrained(tmp_path / "out")


def test_magnitudes_of_inputs_of_a_fused_module(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "flux", {QKV: "in", PROJ: "in"})
    kept = convert(read(path, None), "kohya").save_pretrained(tmp_path / "kept")
    assert_close_deltas(effects("flux", kept), effects("flux", path), 1e-14)
    split = {f"{SPLIT}q": None}
    other = dora_file(tmp_path / "b.safetensors", "flux", split, style="diffusers", seed=3)
    out = combine([read(path, "flux"), read(other, "flux")], [0.5, -1])
    want = summed(
        pieces("flux", weighted((0.5, effects("flux", path)))),
        pieces("flux", weighted((-1, effects("flux", other)))),
    )
    assert out.norm() == pytest.approx(np.sqrt(sum((w**2).sum() for w in want.values())))
    got = effects("flux", out.save_pretrained(tmp_path / "out"))
    assert_close_deltas(pieces("flux", got), want, 1e-10)
    apart = dora_file(
        tmp_path / "c.safetensors", "flux", {f"{SPLIT}q": "in"}, style="comfy", seed=4
    )
    with pytest.raises(UnsupportedError, match=f"{QKV}.*{AS_LORA}"):
        combine([read(path, "flux"), read(apart, "flux")], [1, 1]).save_pretrained(tmp_path / "no")


@pytest.mark.parametrize(
    ("style", "prefix", "key"),
    [
        ("comfy", "diffusion_model.", ".dora_scale"),
        ("ai-toolkit", "diffusion_model.", ".magnitude"),
        ("ai-toolkit", "transformer.", ".magnitude"),
        ("diffusers", "transformer.", ".lora_magnitude_vector.weight"),
        ("saved by diffusers", "transformer.", ".lora_magnitude_vector.weight"),
    ],
)
def test_a_combination_has_the_keys_of_its_dora(tmp_path, style, prefix, key):
    dora, lora = (f"{prefix}transformer_blocks.{n}.attn.to_q" for n in (0, 1))
    a = dora_file(tmp_path / "a.safetensors", "flux", {dora: "out"}, style=style)
    b = dora_file(tmp_path / "b.safetensors", "flux", {lora: None, dora: None}, style=style, seed=1)
    out = combine([read(a, "flux"), read(b, "flux")], [1, -1]).save_pretrained(tmp_path / "out")
    want = weighted((1, effects("flux", a)), (-1, effects("flux", b)))
    assert_close_deltas(effects("flux", out), want, 1e-10)
    held = {dora, lora} if "vector" in key else {dora}
    assert {k for k in load_file(out) if "mag" in k or "dora" in k} == {m + key for m in held}
