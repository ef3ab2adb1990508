"""DoRAs in single files, read, combined and saved: magnitudes of both axes, beside the truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import Adapter, DevecError, as_lora, combine, compress, convert, decompose
from devec.deltas.gains import Magnitude
from devec.errors import IncompatibleError, UnsupportedError
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
from support.checks.dora_files import (
    PROJ,
    QKV,
    ROUNDING,
    SPLIT,
    read,
    weighted,
)
from support.pools.golden_pool import DORA, assert_close_deltas, command, golden, stored, summed
from support.truth.golden_truth import carried, dense_truth, magnitudes

pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")

NEEDS_BASE = r"--base MODEL"

AS_LORA = "--as-lora"


def widened(path, name, dtype):
    """A golden file in another precision."""
    tensors, metadata = stored(golden(name))
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path, metadata)
    return path


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


@pytest.mark.slow
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
    for module in (LINEAR, CONV):  # not computed again
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
