"""DoRAs that devec wrote, in the training forward of LyCORIS."""

import pytest
import torch
from lycoris.modules.locon import LoConModule
from safetensors.torch import load_file, save_file
from torch import nn

from devec import combine
from devec.errors import DevecWarning
from support.adapters.cases import relative_error
from support.adapters.doras import (
    CONV,
    LINEAR,
    WIDE,
    dense_change,
    dora_file,
    effects,
    tensors_of,
    weight,
)
from support.checks.dora_files import ROUNDING, read, weighted
from support.pools.golden_pool import assert_close_deltas, golden

pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")


def layer(module, dtype):
    """A layer of its own with the weight that a module is of."""
    W = torch.from_numpy(weight("sd15", module))
    made = (
        nn.Conv2d(W.shape[1], W.shape[0], 3, padding=1)
        if W.ndim == 4
        else nn.Linear(W.shape[1], W.shape[0])
    ).to(dtype)
    made.weight.data = W.to(dtype)
    return made


def by_lycoris(path, module, dtype, axis):
    """The training forward of LyCORIS on an input, and the weights of the layer it adapts."""
    tensors, org = load_file(path), layer(module, dtype)
    up, down = (tensors[f"{module}.lora_{end}.weight"] for end in ("up", "down"))
    m = tensors.get(f"{module}.dora_scale")
    adapted = LoConModule(
        module, org, 1.0, len(down), float(tensors[f"{module}.alpha"]),
        weight_decompose=m is not None, wd_on_out=axis == "out",
    ).to(dtype)  # fmt: skip
    adapted.lora_up.weight.data = up.to(dtype)
    adapted.lora_down.weight.data = down.to(dtype)
    if m is not None:
        assert m.shape == adapted.dora_scale.shape
        del adapted.dora_scale
        adapted.dora_scale = nn.Parameter(m.to(dtype))
    size = (3, org.weight.shape[1], *(7 for _ in org.weight.shape[2:]))
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    adapted.train()
    with torch.no_grad():
        return adapted(x), org, x


WRITTEN = {
    "as read": lambda dora, _: (dora, 1, 0),
    "scaled": lambda dora, _: (0.4 * dora, 0.4, 0),
    "negated": lambda dora, _: (-dora, -1, 0),
    "with a LoRA": lambda dora, lora: (combine([dora, lora], [0.7, -1.3]), 0.7, -1.3),
    "LoRA first": lambda dora, lora: (combine([lora, dora], [-1.3, 0.7]), 0.7, -1.3),
    "doubled": lambda dora, _: (dora + dora, 2, 0),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_in_the_training_forward_of_lycoris(tmp_path, axis, written, dtype):
    modules = dict.fromkeys((LINEAR, CONV), axis)
    path = dora_file(tmp_path / "a.safetensors", "sd15", modules, dtype, rank=3, alpha=1.5)
    plain = dict.fromkeys(modules)
    lora = dora_file(tmp_path / "b.safetensors", "sd15", plain, dtype, rank=2, seed=1)
    adapter, of_dora, of_lora = WRITTEN[written](read(path), read(lora))
    out = adapter.save_pretrained(tmp_path / "out")
    want = weighted((of_dora, effects("sd15", path)), (of_lora, effects("sd15", lora)))
    for module in modules:
        got, org, x = by_lycoris(out, module, dtype, axis)
        org.weight.data += torch.from_numpy(want[module]).reshape(org.weight.shape).to(dtype)
        expected = org(x)
        assert (got - expected).norm() <= ROUNDING[dtype] * expected.norm(), module
        if written != "as read":
            alpha = load_file(out)[f"{module}.alpha"]
            assert float(alpha) == adapter.modules[module].rank


def test_scaled_doras_keep_key_shape_and_type(tmp_path):
    axes = {LINEAR: "in", CONV: "in", WIDE: None}
    path = dora_file(tmp_path / "a.safetensors", "sd15", axes, torch.float16)
    before = load_file(path)
    after = load_file((0.5 * read(path)).save_pretrained(tmp_path / "out"))
    assert before.keys() == after.keys()  # the LoRA stays one: dora_scale is a module's own
    for key, tensor in before.items():
        # of magnitudes a fraction of W0 would be rounded off, and not of the change
        wanted = torch.float32 if key.endswith(".dora_scale") else tensor.dtype
        same_type = key.endswith(".alpha") or after[key].dtype == wanted
        assert same_type
        assert after[key].shape == tensor.shape


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "as read"])
def test_in_half_precision_no_more_is_lost_than_of_factors(tmp_path, stored, axis, asked):
    path = tmp_path / "a.safetensors"
    dora_file(path, "sd15", {LINEAR: axis}, torch.float32 if asked else stored)
    half = 0.5 * read(path)
    written = half.save_pretrained(tmp_path / "out", dtype=stored if asked else None)
    before, after = half.modules, read(written).modules
    for module, delta in before.items():
        assert (delta - after[module]).norm() < 4 * torch.finfo(stored).eps * delta.norm()


def test_products_with_magnitudes_of_both_axes(tmp_path):
    """LoHa, LoKr and cores are rewritten to factors, magnitudes stay."""
    ones = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=ones, dtype=torch.float64) / 2

    o, i = weight("sd15", LINEAR).shape
    c, d = weight("sd15", CONV).shape[:2]
    families = [
        (LINEAR, {f"hada_w{n}_{x}": draw(*((o, 2) if x == "a" else (2, i)))
                  for n in (1, 2) for x in "ab"}),
        (LINEAR, {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(o // 2, 2),
                  "lokr_w2_b": draw(2, i // 2)}),
        (CONV, {"lora_up.weight": draw(c, 2, 1, 1), "lora_down.weight": draw(2, d, 1, 1),
                "lora_mid.weight": draw(2, 2, 3, 3)}),
        (CONV, {f"hada_w{n}_{x}": draw(*((c, 2) if x == "a" else (2, 9 * d)))
                for n in (1, 2) for x in "ab"}),
    ]  # fmt: skip
    for number, (module, parts) in enumerate(families):
        for axis in ("out", "in"):
            made = tensors_of("sd15", module, axis)
            tensors = {f"{module}.{key}": tensor for key, tensor in parts.items()}
            tensors |= {k: made[k] for k in (f"{module}.dora_scale", f"{module}.alpha")}
            path = tmp_path / f"{number} {axis}.safetensors"
            save_file(tensors, path)
            truth = effects("sd15", path)
            got = dense_change(read(path).modules[module], weight("sd15", module))
            assert relative_error(torch.from_numpy(got), truth[module]) <= 1e-12
            out = (0.5 * read(path)).save_pretrained(tmp_path / f"{number} {axis} half")
            assert_close_deltas(effects("sd15", out), weighted((0.5, truth)), 1e-12)


def test_truncated_factors_of_a_dora_are_said_to_be_of_factors():
    with pytest.warns(DevecWarning, match="for DoRAs, that of the factors before normalisation"):
        read(golden("lycoris_doha"), max_rank=1)
