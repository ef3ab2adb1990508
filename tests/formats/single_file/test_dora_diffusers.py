"""DoRAs that devec wrote, in diffusers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import add_adapter, combine, convert
from devec.errors import IncompatibleError
from support.adapters.doras import LINEAR, WIDE, dora_file, effects
from support.checks.dora_files import (
    FUSED,
    SPLIT,
    UNET,
    read,
    weighted,
)
from support.models.module_names import add_deltas
from support.models.pipelines import make_pipeline, run
from support.pools.golden_pool import stored
from support.truth.golden_truth import dense_truth, magnitudes

pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")

NEEDS_BASE = r"--base MODEL"

RTOL = 2e-5  # of outputs in float32

POOLS = {
    "sd15": (
        {f"{UNET}q": "out", "unet.mid_block.resnets.0.conv1": "out"},
        {f"{UNET}v": None, f"{UNET}q": None,
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": None},
    ),
    "sdxl": (
        {f"{UNET}k": "out", "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": "out",
         "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj": "out"},
        {f"{UNET}k": None, f"{UNET}v": None,
         "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": None},
    ),
    "flux": ({f"{SPLIT}q": "out"}, {f"{SPLIT}q": None, f"{SPLIT}v": None}),
    "sd3": ({f"{SPLIT}q": "out"}, {f"{SPLIT}q": None, f"{SPLIT}v": None}),
}  # fmt: skip


def assert_loads(kind, path, want):
    """Diffusers loads a file, and it does what dense deltas do."""
    pipeline, truth = make_pipeline(kind), make_pipeline(kind)
    before = run(truth)
    add_deltas(truth, want)
    expected = run(truth)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    got = run(pipeline)
    changed = [n for n in got if (expected[n] - before[n]).norm() >= 100 * RTOL * before[n].norm()]
    assert changed
    for name, output in expected.items():
        assert (got[name] - output).norm() <= RTOL * output.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", POOLS)
def test_a_combination_in_diffusers(tmp_path, kind, dtype):
    dora, lora = (
        dora_file(tmp_path / f"{n}.safetensors", kind, axes, dtype, rank=2 + n, seed=n,
                  style="diffusers")
        for n, axes in enumerate(POOLS[kind])
    )  # fmt: skip
    adapter = combine([read(lora, kind), read(dora, kind)], [-0.6, 0.9])
    out = adapter.save_pretrained(tmp_path / "out", dtype=torch.float32)
    want = weighted((-0.6, effects(kind, lora)), (0.9, effects(kind, dora)))
    assert_loads(kind, out, want)
    fields = json.loads(stored(out)[1]["lora_adapter_metadata"])
    assert any(field.endswith("use_dora") for field in fields)


def test_a_scaled_dora_in_the_text_encoders_of_diffusers(tmp_path):
    """Without an ending of the key they would not load magnitudes; diffusers itself writes none."""
    axes = POOLS["sdxl"][0]
    path = dora_file(tmp_path / "a.safetensors", "sdxl", axes, torch.float32,
                     style="saved by diffusers")  # fmt: skip
    assert read(path).save_pretrained(tmp_path / "same").read_bytes()
    assert load_file(tmp_path / "same.safetensors").keys() == load_file(path).keys()
    out = (-0.8 * read(path, "sdxl")).save_pretrained(tmp_path / "out")
    assert_loads("sdxl", out, weighted((-0.8, effects("sdxl", path))))


def test_a_fused_dora_converted_to_diffusers(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "flux", FUSED, torch.float32)
    out = convert(read(path, None), "diffusers").save_pretrained(tmp_path / "out")
    assert_loads("flux", out, effects("flux", path))


MIXED = {
    "sd15": {f"{UNET.replace('.', '_')}q".replace("unet_", "lora_unet_"): "out",
             "lora_unet_mid_block_resnets_0_conv1": "out",
             f"{UNET.replace('.', '_')}v".replace("unet_", "lora_unet_"): None},
    "flux": {**FUSED, next(iter(FUSED)).replace("_0_", "_1_"): None},
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_files_in_live_pipelines(tmp_path, kind):
    """Of kohya's DoRAs diffusers drops the magnitudes; a LoRA among them becomes a DoRA, too."""
    path = dora_file(tmp_path / "a.safetensors", kind, MIXED[kind], torch.float32)
    pipeline, truth = make_pipeline(kind), make_pipeline(kind)
    before = run(truth)
    add_adapter(pipeline, read(path, None), "live")
    pipeline.set_adapters("live")
    add_deltas(truth, effects(kind, path))
    got, expected = run(pipeline), run(truth)
    for name, output in expected.items():
        assert (got[name] - output).norm() <= RTOL * output.norm(), name
    assert any((before[n] - o).norm() >= 100 * RTOL * o.norm() for n, o in expected.items())


def test_magnitudes_wider_than_factors_in_diffusers(tmp_path):
    """They come first in the file, and diffusers goes by its first key."""
    path = dora_file(tmp_path / "a.safetensors", "sdxl", POOLS["sdxl"][0], torch.float16,
                     style="diffusers")  # fmt: skip
    tensors = load_file(path)
    wide = {k: t.float() if "magnitude" in k else t for k, t in tensors.items()}
    save_file(wide, path)
    out = read(path, None).save_pretrained(tmp_path / "out")
    assert_loads("sdxl", out, effects("sdxl", path))


def test_a_lora_of_a_converted_dora_gets_magnitudes(tmp_path):
    """In kohya's files a DoRA is a module's own; in diffusers it is one of all modules."""
    axes = {LINEAR: "out", WIDE: None}
    path = dora_file(tmp_path / "a.safetensors", "sd15", axes, torch.float32)
    with pytest.raises(IncompatibleError, match=f"to_be|is to be written as a DoRA.*{NEEDS_BASE}"):
        convert(read(path, None), "diffusers").save_pretrained(tmp_path / "no")
    out = convert(read(path), "diffusers").save_pretrained(tmp_path / "out")
    assert magnitudes(out).keys() == dense_truth(out).keys()
    assert_loads("sd15", out, effects("sd15", path))
