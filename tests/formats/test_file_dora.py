"""DoRAs in single files: magnitudes of both axes, beside the dense truth and the real readers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import relative_error
from doras import base, dense_change, dora_file, effects, tensors_of, weight
from golden_pool import DORA, assert_close_deltas, command, golden, stored, summed
from golden_truth import carried, dense_truth, magnitudes
from lycoris.modules.locon import LoConModule
from pipelines import add_deltas, find_modules, make_pipeline, run
from safetensors.torch import load_file, save_file
from torch import nn

from devec import Adapter, DevecError, add_adapter, as_lora, combine, compress, convert, decompose
from devec.deltas.gains import Magnitude
from devec.errors import DevecWarning, FormatError, IncompatibleError, UnsupportedError

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_1_conv2"
WIDE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")
NEEDS_BASE = r"--base MODEL"
AS_LORA = "--as-lora"
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}


def read(path, kind="sd15", **options):
    return Adapter.from_pretrained(path, base=None if kind is None else base(kind), **options)


def widened(path, name, dtype):
    """A golden file in another precision."""
    tensors, metadata = stored(golden(name))
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path, metadata)
    return path


def weighted(*terms):
    """Σ weight · dense deltas."""
    return summed(*({m: w * d for m, d in truth.items()} for w, truth in terms))


# --- golden files -----------------------------------------------------------------------------

quiet = pytest.mark.filterwarnings("ignore:.*written by PEFT, but its adapter_config.json")


@quiet
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", DORA)
def test_what_is_read_is_the_dense_truth(tmp_path, name, dtype):
    path = widened(tmp_path / "a.safetensors", name, dtype)
    adapter, truth = read(path), effects("sd15", path)
    assert adapter.modules.keys() == truth.keys()
    for module, delta in adapter.modules.items():
        got = dense_change(delta, weight("sd15", module))
        assert relative_error(torch.from_numpy(got), truth[module]) <= ROUNDING[dtype], module
        assert delta.norm() == pytest.approx(np.linalg.norm(truth[module]), rel=1e-5)


@quiet
@pytest.mark.parametrize("name", DORA)
def test_what_is_saved_is_saved_the_same_again(tmp_path, name):
    first = read(golden(name), None).save_pretrained(tmp_path / "first")
    second = read(first, None).save_pretrained(tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()
    assert_close_deltas(effects("sd15", first), effects("sd15", golden(name)), 1e-6)
    if name != "lycoris_doha":
        kept = load_file(golden(name))
        saved = load_file(first)
        assert saved.keys() == kept.keys()
        for key, tensor in kept.items():
            torch.testing.assert_close(saved[key], tensor, rtol=0, atol=0)


@quiet
@pytest.mark.parametrize("name", DORA)
def test_without_a_base_model_a_dora_is_described(name):
    adapter = read(golden(name), None)
    assert all(isinstance(delta.gain, Magnitude) for delta in adapter.modules.values())
    found = magnitudes(golden(name))
    axis = "in" if name.endswith("_in") else "out"
    assert adapter.layout.about.dora == {axis: len(found)}
    text = command("inspect", golden(name))
    assert f"{len(found)} modules: DoRA" in text
    assert carried(golden(name)) == list(adapter.carried)


def test_a_base_model_is_not_looked_for_before_it_is_needed(tmp_path):
    adapter = Adapter.from_pretrained(golden("lycoris_dora_out"), base="no/such-model")
    adapter.save_pretrained(tmp_path / "same")
    convert(adapter, "diffusers").save_pretrained(tmp_path / "converted")
    with pytest.raises(DevecError, match="no/such-model"):
        adapter.norm()


@quiet
@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a.norm(),
        lambda a: 2 * a,
        lambda a: a + a,
        lambda a: compress(a, rank=1),
        lambda a: decompose([a, replace(a, name="b")]),
    ],
    ids=["norm", "product", "sum", "compress", "decompose"],
)
def test_without_a_base_model_a_dora_is_not_computed_with(name, compute):
    module = next(iter(dense_truth(golden(name))))
    with pytest.raises(IncompatibleError, match=NEEDS_BASE) as error:
        compute(read(golden(name), None))
    assert module in str(error.value)


# --- in the forward of LyCORIS ----------------------------------------------------------------


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


# --- combinations -----------------------------------------------------------------------------


def test_doras_of_two_axes_add_and_are_not_written(tmp_path):
    paths = {
        axis: dora_file(
            tmp_path / f"{axis}.safetensors", "sd15", {LINEAR: axis, CONV: axis}, seed=n
        )
        for n, axis in enumerate(("out", "in"))
    }
    total = combine([read(path) for path in paths.values()], [1, -0.5])
    want = weighted((1, effects("sd15", paths["out"])), (-0.5, effects("sd15", paths["in"])))
    for module, delta in total.modules.items():
        got = dense_change(delta, weight("sd15", module))
        assert relative_error(torch.from_numpy(got), want[module]) <= 1e-12
    assert total.norm() == pytest.approx(np.sqrt(sum((w**2).sum() for w in want.values())))
    with pytest.raises(UnsupportedError, match=f"{LINEAR}.*{AS_LORA}"):
        total.save_pretrained(tmp_path / "total")


def test_a_dora_of_one_axis_beside_one_of_the_other(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "sd15", {LINEAR: "out", CONV: "in", WIDE: None})
    adapter = read(path)
    assert adapter.layout.about.dora == {"out": 1, "in": 1}
    out = (-0.5 * adapter).save_pretrained(tmp_path / "out")
    assert_close_deltas(effects("sd15", out), weighted((-0.5, effects("sd15", path))), 1e-12)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_parts_of_a_decomposition(tmp_path, axis):
    files = [
        dora_file(tmp_path / f"{n}.safetensors", "sd15", {LINEAR: axis, CONV: axis}, seed=n)
        for n in range(2)
    ]
    a, b = (read(path, name=name) for path, name in zip(files, "ab", strict=True))
    parts = decompose([a, b], threshold=0.05, method="mean")
    assert not parts.nothing_shared
    whole = {}
    for part in (parts.unique["a"], parts.shared["a"]):
        out = part.save_pretrained(tmp_path / f"part {len(whole)}")
        whole = summed(whole, effects("sd15", out))
    assert not magnitudes(parts.shared["a"].save_pretrained(tmp_path / "shared"))
    assert_close_deltas(whole, effects("sd15", files[0]), 1e-9)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_parts_of_a_decomposition_across_conventions(tmp_path, axis):
    fused = dora_file(tmp_path / "a.safetensors", "flux", {QKV: axis, PROJ: axis})
    split = dict.fromkeys([f"{SPLIT}{x}" for x in "qkv"])
    other = dora_file(tmp_path / "b.safetensors", "flux", split, style="diffusers", seed=3)
    a, b = read(fused, "flux", name="a"), read(other, "flux", name="b")
    parts = decompose([a, b], threshold=0.02, method="mean")
    assert not parts.nothing_shared
    whole = {}
    for part in (parts.unique["a"], parts.shared["a"]):
        out = part.save_pretrained(tmp_path / f"part {len(whole)}")
        whole = summed(whole, effects("flux", out))
    assert_close_deltas(whole, effects("flux", fused), 1e-9)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_the_nearest_lora_has_no_magnitudes(tmp_path, style):
    module, kind = (LINEAR, "sd15") if style == "kohya" else (f"{SPLIT}q", "flux")
    path = tmp_path / "a.safetensors"
    config = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": True}
    strings = {"lora_adapter_metadata": json.dumps(config)} if style == "diffusers" else None
    save_file(tensors_of(kind, module, "out", style=style), path, strings)
    assert (
        stored(read(path, None).save_pretrained(tmp_path / "same"))[1].items()
        >= (strings or {}).items()
    )
    full = min(weight(kind, module).shape)
    out = as_lora(read(path, kind), rank=full).adapter.save_pretrained(tmp_path / "out")
    assert not magnitudes(out)
    assert_close_deltas(dense_truth(out), effects(kind, path), 1e-6)
    assert "use_dora" not in stored(out)[1].get("lora_adapter_metadata", "")
    scaled = (0.5 * read(path, kind)).save_pretrained(tmp_path / "scaled")
    half = weighted((0.5, effects(kind, path)))
    for file in (scaled, read(scaled, None).save_pretrained(tmp_path / "again")):
        assert_close_deltas(effects(kind, file), half, 1e-9)


def test_one_alpha_leaves_magnitudes_alone(tmp_path):
    """Of UNets diffusers reads attention layers by one alpha: what lacks goes into B."""
    axes = {LINEAR: "out", WIDE: "out", CONV: "in"}
    path = dora_file(tmp_path / "a.safetensors", "sd15", axes)
    other = dora_file(tmp_path / "b.safetensors", "sd15", {WIDE: None}, seed=2, rank=4)
    out = combine([read(path), read(other)], [1, 1]).save_pretrained(tmp_path / "out")
    want = weighted((1, effects("sd15", path)), (1, effects("sd15", other)))
    assert_close_deltas(effects("sd15", out), want, 1e-12)
    alphas = {float(t) for key, t in load_file(out).items() if key.endswith(".alpha")}
    assert len(alphas) == 1
    for module in (LINEAR, CONV):  # not computed anew
        kept = load_file(path)[f"{module}.dora_scale"]
        torch.testing.assert_close(load_file(out)[f"{module}.dora_scale"], kept, rtol=0, atol=0)


def test_a_module_without_rank_is_written(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "sd15", {LINEAR: "in"})
    adapter = read(path)
    delta = adapter.modules[LINEAR].resolved()
    empty = replace(adapter, modules={LINEAR: delta - delta.low_rank}, sha256="")
    cut = compress(empty, energy=0.99).adapter
    out = cut.save_pretrained(tmp_path / "out")
    W = weight("sd15", LINEAR)
    gains = delta.gain.axes["in"].values.numpy()
    assert relative_error(torch.from_numpy(effects("sd15", out)[LINEAR]), W * gains) <= 1e-10


# --- between conventions ----------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_1_linear1"
PROJ = "lora_unet_double_blocks_1_img_attn_proj"
SPLIT = "transformer.transformer_blocks.0.attn.to_"
FUSED = dict.fromkeys((QKV, LINEAR1, PROJ), "out")


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


# --- in diffusers -----------------------------------------------------------------------------

RTOL = 2e-5  # of outputs in float32
UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_"
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
    pipeline.load_lora_weights(path, adapter_name="a")
    got = run(pipeline)
    changed = [n for n in got if (expected[n] - before[n]).norm() >= 100 * RTOL * before[n].norm()]
    assert changed
    for name, output in expected.items():
        assert (got[name] - output).norm() <= RTOL * output.norm(), name


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


# --- bad input --------------------------------------------------------------------------------


def refused(tmp_path, message, error=FormatError, **parts):
    made = tensors_of("sd15", LINEAR, None)
    tensors = {**made, **{f"{LINEAR}.{key}": value for key, value in parts.items()}}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message) as found:
        Adapter.from_pretrained(tmp_path / "a.safetensors")
    assert LINEAR in str(found.value)
    assert "a.safetensors" in str(found.value)


@pytest.mark.parametrize(
    "shape",
    [(3, 1), (1, 3), (1, 1), (16,), (), (16, 2), (16, 16), (1, 1, 16, 1)],
    ids=str,
)
def test_magnitudes_of_a_wrong_shape(tmp_path, shape):
    n, m = weight("sd15", LINEAR).shape
    assert (n, m) == (16, 16)
    refused(tmp_path, r"\(dora_scale\) have shape .*expected \(16, 1\) for outputs or \(1, 16\)",
            dora_scale=torch.ones(shape))  # fmt: skip


@pytest.mark.parametrize("key", ["magnitude", "lora_magnitude_vector"])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (), (4, 4)], ids=str)
def test_magnitudes_of_outputs_of_a_wrong_shape(tmp_path, key, shape):
    refused(tmp_path, r"have shape .*expected \(16,\)", **{key: torch.ones(shape)})


def test_a_square_weight_is_read_by_which_dimension_is_one(tmp_path):
    for axis, shape in {"out": (16, 1), "in": (1, 16)}.items():
        tensors = {**tensors_of("sd15", LINEAR, None), f"{LINEAR}.dora_scale": torch.ones(shape)}
        save_file(tensors, tmp_path / "a.safetensors")
        [delta] = read(tmp_path / "a.safetensors", None).modules.values()
        assert delta.gain.axis == axis


@pytest.mark.parametrize(("out", "inputs", "axis"), [(1, 5, "out"), (5, 1, "in"), (1, 1, "out")])
def test_a_single_magnitude(tmp_path, out, inputs, axis):
    tensors = {"x.lora_up.weight": torch.ones(out, 1), "x.lora_down.weight": torch.ones(1, inputs)}
    save_file({**tensors, "x.dora_scale": torch.ones(1, 1)}, tmp_path / "a.safetensors")
    [delta] = read(tmp_path / "a.safetensors", None).modules.values()
    assert delta.gain.axis == axis


def test_magnitudes_that_are_no_numbers(tmp_path):
    bad = torch.ones(16, 1)
    bad[3] = torch.nan
    refused(tmp_path, "dora_scale' holds NaN or infinity in 1", dora_scale=bad)
    bad[3] = torch.inf
    refused(tmp_path, "dora_scale' holds NaN or infinity in 1", dora_scale=bad)


def test_magnitudes_twice(tmp_path):
    refused(tmp_path, "both as dora_scale and as",
            dora_scale=torch.ones(16, 1), magnitude=torch.ones(16))  # fmt: skip
    refused(tmp_path, "two tensors for the same part",
            magnitude=torch.ones(16), lora_magnitude_vector=torch.ones(16))  # fmt: skip


def test_magnitudes_alone(tmp_path):
    save_file({**tensors_of("sd15", LINEAR, None), f"{CONV}.dora_scale": torch.ones(16, 1)},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(FormatError, match=f"{CONV}.*there are dora_scale, but no factors"):
        read(tmp_path / "a.safetensors", None)


def test_a_header_that_says_otherwise(tmp_path):
    module = f"{SPLIT}q"
    for said, axis in ((True, None), (False, "out")):
        path = tmp_path / "a.safetensors"
        config = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": said}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        save_file(tensors_of("flux", module, axis, style="diffusers"), path, metadata)
        with pytest.raises(FormatError, match=f"{module}.*use_dora {said}"):
            read(path, None)


def test_magnitudes_that_are_no_norms_are_used_and_told_of(tmp_path):
    made = tensors_of("sd15", LINEAR, "out")
    made[f"{LINEAR}.dora_scale"][:3] *= -1
    made[f"{LINEAR}.dora_scale"][5] = 0
    path = tmp_path / "a.safetensors"
    save_file(made, path)
    negative = int((made[f"{LINEAR}.dora_scale"] < 0).sum())
    with (
        pytest.warns(DevecWarning, match=f"1 magnitudes are zero.*{LINEAR}"),
        pytest.warns(DevecWarning, match=f"{negative} magnitudes are negative.*{LINEAR}"),
    ):
        adapter = read(path)
    got = dense_change(adapter.modules[LINEAR], weight("sd15", LINEAR))
    assert relative_error(torch.from_numpy(got), effects("sd15", path)[LINEAR]) <= 1e-12


def test_biases_beside_magnitudes_have_no_form_in_diffusers(tmp_path):
    dora, lora = f"{SPLIT}q", f"{SPLIT}k"
    a = dora_file(tmp_path / "a.safetensors", "flux", {dora: "out"}, style="diffusers")
    tensors = tensors_of("flux", lora, None, style="diffusers")
    save_file({**tensors, f"{lora}.lora_B.bias": torch.ones(16)}, tmp_path / "b.safetensors")
    total = combine([read(a, "flux"), read(tmp_path / "b.safetensors", "flux")], [1, 1])
    with pytest.raises(UnsupportedError, match=f"bias of '{lora}'"):
        total.save_pretrained(tmp_path / "out")


def test_two_base_models_are_not_mixed(tmp_path):
    path = dora_file(tmp_path / "a.safetensors", "sd15", {LINEAR: "out"})
    other = Adapter.from_pretrained(path, "b", base=make_pipeline("sd15"))
    with pytest.raises(DevecError, match="different base models"):
        combine([read(path), other], [1, 1])
