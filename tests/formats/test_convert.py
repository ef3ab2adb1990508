"""Conversion between conventions is exact, both ways, whatever is fused or split on the way."""

import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from devec import Adapter, DevecError, convert, distance
from devec.cli import main
from devec.naming.families import flat
from support.folding import folded
from support.paths import GOLDEN
from support.pools.golden_pool import DORA
from support.truth.golden_truth import dense_truth

pytestmark = pytest.mark.filterwarnings("ignore::devec.DevecWarning")

OTHERS = {"lycoris_full", *DORA}  # whole tensors; DoRAs have tests of their own
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if path.stem not in OTHERS)
CARRIED = {"bundled_embeddings", "lycoris_norm"}
OUTDATED = {"diffusers_old", "diffusers_sdxl", "diffusers_sd15"}  # in their names
FORMATS = ["kohya", "diffusers", "peft"]


# Too narrow to be told from others by their shapes, and without a word on their base model.
BASES = {"diffusers_flux_bias": "FLUX.1-dev", "diffusers_sd3": "stable-diffusion-3-medium"}


def golden(name):
    adapter = Adapter.from_pretrained(GOLDEN / f"{name}.safetensors")
    if name in BASES:
        return replace(adapter, layout=adapter.layout.rebased(BASES[name]))
    return adapter


def encoders(adapter):
    return [m for m in adapter.modules if m.startswith(("lora_te", "text_encoder"))]


def through(tmp_path, adapter, *formats, dtype=torch.float32):
    """The adapter as it is read after having been written in one format after the other."""
    for index, wanted in enumerate(formats):
        component = "denoiser" if wanted == "peft" and encoders(adapter) else None
        written = convert(adapter, wanted, component=component)
        path = written.save_pretrained(tmp_path / f"{index}-{wanted}", dtype=dtype)
        adapter = Adapter.from_pretrained(path, adapter.name)
    return adapter


def assert_same_truth(got, want, tolerance=1e-6):
    assert got.keys() == want.keys()
    for module, W in want.items():
        assert_close(got[module], W, rtol=0, atol=tolerance * abs(W).max(), msg=module)


@pytest.mark.parametrize("name", sorted(set(NAMES) - CARRIED))
@folded("wanted", ["kohya", "diffusers"])
def test_every_convention_converts(tmp_path, name, wanted):
    original = golden(name)
    if name == "diffusers_flux_bias" and wanted == "kohya":
        original = original.map(lambda _, delta: replace(delta, bias=None))  # there they are whole
    read = through(tmp_path, original, wanted)
    assert distance(original, read) <= 1e-6 * original.norm()
    assert read.layout.about.format == wanted
    assert len(read.carried) == len(original.carried)


@pytest.mark.parametrize("name", sorted(set(NAMES) - CARRIED))
def test_every_denoiser_converts_to_peft(tmp_path, name):
    original = golden(name)
    modules = {m: d for m, d in original.modules.items() if m not in encoders(original)}
    read = through(tmp_path, original, "peft")
    assert read.norm() == pytest.approx(torch.tensor([d.norm() for d in modules.values()]).norm())
    paths = (tmp_path / "0-peft").iterdir()
    assert {path.name for path in paths} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = through(tmp_path, read, "diffusers")
    assert distance(read, again) <= 1e-6 * read.norm()


@pytest.mark.parametrize("way", [("diffusers", "kohya"), ("diffusers", "diffusers", "kohya")])
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("kohya_", "lycoris_lo"))])
def test_kohya_files_come_back_with_their_modules(tmp_path, name, way):
    read = through(tmp_path, golden(name), *way)
    path = tmp_path / f"{len(way) - 1}-kohya.safetensors"
    assert list(read.modules) == list(golden(name).modules)
    assert_same_truth(dense_truth(path), dense_truth(GOLDEN / f"{name}.safetensors"))


@pytest.mark.parametrize(
    "name",
    sorted(
        {n for n in NAMES if n.startswith(("diffusers_", "aitoolkit_flux"))}
        - {"diffusers_flux_bias"}
    ),
)
def test_diffusers_files_come_back_with_their_modules(tmp_path, name):
    read = through(tmp_path, golden(name), "kohya", "diffusers")
    want = dense_truth(GOLDEN / f"{name}.safetensors")
    got = dense_truth(tmp_path / "1-diffusers.safetensors")
    if name in OUTDATED:
        got, want = (sorted(t.values(), key=lambda W: (W.shape, W.sum())) for t in (got, want))
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, rtol=0, atol=1e-6)
    else:  # what else is in a fused module is zero
        assert read.modules.keys() >= golden(name).modules.keys()
        assert all(not W.any() for module, W in got.items() if module not in want)
        assert_same_truth({module: got[module] for module in want}, want)


@pytest.mark.parametrize("name", ["kohya_sd15", "kohya_sdxl", "kohya_flux"])
def test_peft_directories_come_back_as_kohya_files(tmp_path, name):
    through(tmp_path, golden(name), "peft", "kohya")
    want = dense_truth(GOLDEN / f"{name}.safetensors")
    want = {m: W for m, W in want.items() if not m.startswith("lora_te")}
    assert_same_truth(dense_truth(tmp_path / "1-kohya.safetensors"), want)


@pytest.mark.parametrize("component", ["clip_l", "clip_g", "t5"])
def test_text_encoders_convert_to_peft_by_their_own_names(tmp_path, component):
    prefix = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}[component]
    written = convert(golden("kohya_sd3"), "peft", component=component)
    read = Adapter.from_pretrained(written.save_pretrained(tmp_path / "x", dtype=torch.float32))
    want = {m: W for m, W in dense_truth(GOLDEN / "kohya_sd3.safetensors").items() if prefix in m}
    got = {
        prefix + flat(m): (d.scaling * d.B.double() @ d.A.double()).numpy()
        for m, d in read.modules.items()
    }
    assert all("." in module for module in read.modules)
    assert_same_truth(got, want)


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("name", ["kohya_flux", "kohya_sdxl", "aitoolkit_lokr", "float8"])
def test_storage_in_the_types_of_the_input_only_rounds(tmp_path, name, wanted):
    original = convert(golden(name), "diffusers", component="denoiser")
    read = through(tmp_path, original, wanted, dtype=None)
    assert distance(original, read) <= 2**-7 * original.norm()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("lycoris_norm", "diffusers"), ("lycoris_norm", "peft"), ("bundled_embeddings", "peft")],
)
def test_whole_tensors_without_a_place_are_refused_by_name(tmp_path, name, wanted):
    adapter = golden(name)
    with pytest.raises(DevecError) as caught:
        convert(adapter, wanted).save_pretrained(tmp_path / "x")
    assert all(key in str(caught.value) for key in adapter.carried)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"format": "nonsense"}, ["'kohya', 'diffusers', 'peft'", "'nonsense'"]),
        ({"format": "peft"}, ["the denoiser", "'clip_l'", "--component"]),
        ({"format": "peft", "component": "unet"}, ["'denoiser'", "'unet'"]),
        ({"format": "kohya", "component": "t5"}, ["does not change the t5"]),
    ],
)
def test_what_cannot_be_converted(arguments, parts):
    with pytest.raises(DevecError) as caught:
        convert(golden("kohya_sd15"), **arguments)
    assert all(part in str(caught.value) for part in parts)


# Fused and split


def flux_split(tmp_path, same_A, ranks=(2, 2, 2, 2)):
    """Flux' q, k, v and MLP of a single block as diffusers has them; and the four deltas."""
    tensors, deltas = {}, []
    shared = torch.randn(2, 12)
    for part, rank in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ranks, strict=True):
        key = f"transformer.single_transformer_blocks.0.{part}"
        A = shared if same_A else torch.randn(rank, 12)
        B = torch.randn(48 if part == "proj_mlp" else 12, rank)
        tensors |= {f"{key}.lora_A.weight": A.clone(), f"{key}.lora_B.weight": B}
        deltas.append(B @ A)
    save_file(tensors, tmp_path / "split.safetensors")
    return Adapter.from_pretrained(tmp_path / "split.safetensors"), torch.cat(deltas)


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 2, 3, 4)])
def test_split_modules_are_fused_block_diagonally(tmp_path, ranks):
    split, delta = flux_split(tmp_path, same_A=False, ranks=ranks)
    path = convert(split, "kohya").save_pretrained(tmp_path / "fused")
    tensors, module = load_file(path), "lora_unet_single_blocks_0_linear1"
    up, down = (tensors[f"{module}.lora_{side}.weight"] for side in ("up", "down"))
    assert down.shape == (sum(ranks), 12)
    assert float(tensors[f"{module}.alpha"]) == sum(ranks)
    starts = [0, ranks[0], sum(ranks[:2]), sum(ranks[:3]), sum(ranks)]
    for rows, (start, end) in zip(up.split([12, 12, 12, 48]), pairwise(starts), strict=True):
        assert rows[:, start:end].abs().min() > 0
        assert rows[:, :start].abs().sum() + rows[:, end:].abs().sum() == 0
    assert_close(up @ down, delta)


def test_split_modules_that_share_their_input_side_are_fused_at_its_rank(tmp_path):
    split, delta = flux_split(tmp_path, same_A=True)
    path = convert(split, "kohya").save_pretrained(tmp_path / "fused")
    tensors, module = load_file(path), "lora_unet_single_blocks_0_linear1"
    up, down = (tensors[f"{module}.lora_{side}.weight"] for side in ("up", "down"))
    assert (down.shape, float(tensors[f"{module}.alpha"])) == ((2, 12), 2)
    assert_close(up @ down, delta)


def test_a_module_of_which_parts_are_missing_is_zero_there(tmp_path):
    _, delta = flux_split(tmp_path, same_A=False)
    kept = load_file(tmp_path / "split.safetensors")
    kept = {key: tensor for key, tensor in kept.items() if "to_k" not in key}
    save_file(kept, tmp_path / "some.safetensors")
    some = Adapter.from_pretrained(tmp_path / "some.safetensors")
    got = dense_truth(convert(some, "kohya").save_pretrained(tmp_path / "fused"))
    delta[12:24] = 0
    want = {"lora_unet_single_blocks_0_linear1": delta.double().numpy()}
    assert_same_truth(got, want)


def test_the_parts_of_fused_modules_share_its_input_side(tmp_path):
    read = through(tmp_path, golden("aitoolkit_native_flux"), "diffusers")
    q, k, v = (read.modules[f"transformer.transformer_blocks.0.attn.to_{n}"] for n in "qkv")
    assert torch.equal(q.A, k.A)
    assert torch.equal(q.A, v.A)
    want = dense_truth(GOLDEN / "aitoolkit_native_flux.safetensors")
    got = torch.cat([d.scaling * d.B @ d.A for d in (q, k, v)]).double().numpy()
    assert_same_truth({"qkv": got}, {"qkv": want["diffusion_model.double_blocks.0.img_attn.qkv"]})


@pytest.mark.parametrize("back", [False, True])
def test_alphas_of_fused_modules_are_kept_by_their_parts(tmp_path, back):
    read = through(tmp_path, golden("kohya_flux_single"), "diffusers", *(["kohya"] if back else []))
    original = golden("kohya_flux_single")
    assert distance(read, original) <= 1e-6 * original.norm()
    if back:
        assert [d.rank for d in read.modules.values()] == [
            d.rank for d in original.modules.values()
        ]


# The command line


@pytest.mark.parametrize("wanted", FORMATS)
def test_the_command_converts(tmp_path, monkeypatch, capsys, wanted):
    out = tmp_path / "out"
    source = str(GOLDEN / "kohya_flux.safetensors")
    arguments = ["devec", "convert", source, "--format", wanted, "--out", str(out)]
    arguments += ["--dtype", "float32", "--component", "denoiser"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert (stopped.value.code or 0, captured.err) == (0, "")
    path = out if wanted == "peft" else tmp_path / "out.safetensors"
    assert str(path) in captured.out
    want = convert(golden("kohya_flux"), "diffusers", component="denoiser")
    assert distance(Adapter.from_pretrained(path), want) <= 1e-6 * want.norm()
