"""DoRA in and out of PEFT directories, through PEFT's own forward pass."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import Adapter, combine, decompose
from devec.adapters.layout import ModuleShape
from devec.deltas.gains import Gain, Magnitude
from devec.formats.peft.layout import peft_layout_for
from support.adapters.cases import (
    make_base,
    relative_error,
)
from support.adapters.peft_doras import (
    ALL,
    BASES,
    CONFIG,
    KINDS,
    MAGNITUDE,
    SAVE,
    TOLERANCE,
    TRAINED,
    WEIGHTS,
    base_weight,
    change_of,
    dense,
    precision,
    read,
    save_dora,
    save_lora,
    stored,
    through_peft,
    wanted,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


# Reading


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_formula_says(tmp_path, kind, variant):
    path = save_dora(tmp_path / "a", kind, variant)
    adapter = read(path, kind)
    want = change_of(path, partial(make_base, kind))
    assert adapter.modules.keys() == want.keys()
    for name, delta in adapter.modules.items():
        assert isinstance(delta.gain, Magnitude)
        assert delta.gain.values.dtype == ALL[variant].dtype
        assert relative_error(dense(delta.resolved()), want[name]) < 1e-6
    assert adapter.layout.about.dora == {"out": len(want)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_is_what_peft_does(tmp_path, kind):
    path = save_dora(tmp_path / "a", kind, "float64")
    got = through_peft(kind, path, torch.float64)
    want = wanted(kind, change_of(path, partial(make_base, kind)))
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
def test_all_spellings_of_the_key_are_read(tmp_path, ending):
    path = save_dora(tmp_path / "a", "linear")
    want = Adapter.from_pretrained(path)
    tensors = load_file(path / WEIGHTS)
    spelled = {k + ending if k.endswith(MAGNITUDE) else k: t for k, t in tensors.items()}
    save_file(spelled, path / WEIGHTS)
    got = Adapter.from_pretrained(path)
    for name, delta in want.modules.items():
        assert torch.equal(delta.gain.values, got.modules[name].gain.values)


# Writing


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_dora_needs_no_base_model_and_keeps_every_bit(tmp_path, kind, variant):
    path = save_dora(tmp_path / "a", kind, variant)
    (1.0 * Adapter.from_pretrained(path)).save_pretrained(tmp_path / "b")
    (before, config), (after, same) = stored(path), stored(tmp_path / "b")
    assert config == same
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape)
        assert torch.equal(tensor, after[key])


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_save_is_byte_identical(tmp_path, kind):
    adapters = [
        read(save_dora(tmp_path / "a", kind, "bfloat16", 0), kind),
        read(save_lora(tmp_path / "b", kind, "float16", 1), kind),
    ]
    one, two = tmp_path / "one" / "sum", tmp_path / "two" / "sum"
    combine(adapters, [0.7, -0.3], name="sum").save_pretrained(one)
    Adapter.from_pretrained(one).save_pretrained(two)
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


WEIGHTS_OF_THREE = [(0.5, -0.4, 0.3), (-0.8, 0.55, 0.3), (0.25, 1.5, -1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", TOLERANCE)
@pytest.mark.parametrize("which", ["dld", "ldd", "ddd"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_combinations_are_one_dora(tmp_path, kind, which, variant):
    paths = [SAVE[d](tmp_path / str(i), kind, variant, i) for i, d in enumerate(which)]
    adapters = [read(p, kind) for p in paths]
    changes = [change_of(p, partial(make_base, kind)) for p in paths]
    for weights in WEIGHTS_OF_THREE:
        out = tmp_path / f"sum {weights}"
        combine(adapters, weights).save_pretrained(out)
        want = wanted(kind, weighted(weights, changes))
        got = through_peft(kind, out, precision(variant))
        assert relative_error(got, want) < TOLERANCE[variant], weights


@pytest.mark.parametrize("variant", ["rslora", "patterns", "zero", "deficient"])
@pytest.mark.parametrize("kind", KINDS)
def test_combinations_of_differently_configured_adapters(tmp_path, kind, variant):
    paths = [save_lora(tmp_path / "a", kind), save_dora(tmp_path / "b", kind, variant, 1)]
    combine([read(p, kind) for p in paths], [0.6, -0.9]).save_pretrained(tmp_path / "sum")
    make = partial(make_base, kind)
    want = wanted(kind, weighted([0.6, -0.9], [change_of(p, make) for p in paths]))
    assert relative_error(through_peft(kind, tmp_path / "sum", torch.float32), want) < 1e-6


LAYER = {"embedding": ("first", "second")}


@pytest.mark.slow
@pytest.mark.parametrize("variant", TOLERANCE)
@pytest.mark.parametrize("which", ["ld", "dl", "dd"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_disjoint_modules(tmp_path, kind, which, variant):
    paths = [
        SAVE[d](tmp_path / d / layer, kind, variant, i, target_modules=[layer])
        for i, (d, layer) in enumerate(
            zip(which, LAYER.get(kind, ("first.layer", "second.layer")), strict=True)
        )
    ]
    combine([read(p, kind) for p in paths], [0.9, -0.7]).save_pretrained(tmp_path / "sum")
    make = partial(make_base, kind)
    want = wanted(kind, weighted([0.9, -0.7], [change_of(p, make) for p in paths]))
    got = through_peft(kind, tmp_path / "sum", precision(variant))
    assert relative_error(got, want) < TOLERANCE[variant]


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_rank_zero_keep_their_gains(tmp_path, kind):
    path = save_dora(tmp_path / "a", kind, "float64")
    adapter = read(path, kind)
    bare = adapter.map(lambda _, d: 0.5 * d - 0.5 * d.low_rank).map(
        lambda _, d: type(d)(d.B[:, :0], d.A[:0], gain=without_columns(d.gain))
    )
    bare.save_pretrained(tmp_path / "bare")
    gains = {m: d.resolved().gain.axes["out"].values for m, d in adapter.modules.items()}
    want = {m: 0.5 * g[:, None].numpy() * base_weight(BASES[kind], m)[0] for m, g in gains.items()}
    got = through_peft(kind, tmp_path / "bare", torch.float64)
    assert relative_error(got, wanted(kind, want)) < 1e-12
    assert json.loads((tmp_path / "bare" / CONFIG).read_text())["r"] == 1


def without_columns(gain):
    """Gains beside factors of rank 0."""
    axis = gain.axes["out"]
    return Gain(gain.base, {"out": type(axis)(axis.values, axis.overlap[:, :0], axis.squares)})


ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("asked", [False, True], ids=["as read", "asked for"])
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("kind", KINDS)
def test_storage_costs_no_more_than_its_roundoff(tmp_path, kind, dtype, asked):
    """Of A and B, to first order, what the roundoff of each says; magnitudes stay as they are."""
    variant = "plain" if asked else str(dtype).removeprefix("torch.")
    paths = [SAVE[d](tmp_path / d, kind, variant, i) for i, d in enumerate("ld")]
    total = combine([read(p, kind) for p in paths], [0.3, 0.5])
    total.save_pretrained(tmp_path / "sum", dtype=dtype if asked else None)
    make = partial(make_base, kind)
    want = weighted([0.3, 0.5], [change_of(p, make) for p in paths])
    for name, change in change_of(tmp_path / "sum", make).items():
        low = total.modules[name].low_rank
        terms = np.linalg.norm((low.scaling * low.B.abs() @ low.A.abs()).numpy())
        error = np.linalg.norm(change - want[name])
        assert 0 < error < ROUNDOFF[dtype] * 4 * terms
    tensors = load_file(tmp_path / "sum" / WEIGHTS)
    types = {MAGNITUDE in k: t.dtype for k, t in tensors.items()}
    assert types == {False: dtype, True: torch.float32}


def test_parts_without_gains_are_plain_loras(tmp_path):
    paths = [save_dora(tmp_path / str(i), "linear", "float64", i) for i in range(2)]
    adapters = [read(p, "linear") for p in paths]
    parts = decompose(adapters, threshold=0.5)
    parts.shared["0"].save_pretrained(tmp_path / "shared")
    parts.unique["0"].save_pretrained(tmp_path / "unique")
    assert stored(tmp_path / "shared")[1]["use_dora"] is False
    assert not any(MAGNITUDE in key for key in stored(tmp_path / "shared")[0])
    assert stored(tmp_path / "unique")[1]["use_dora"] is True
    make = partial(make_base, "linear")
    shared, unique = (change_of(tmp_path / n, make) for n in ("shared", "unique"))
    for name, whole in change_of(paths[0], make).items():
        assert np.linalg.norm(shared[name]) > 0.01 * np.linalg.norm(whole)
        assert relative_error(shared[name] + unique[name], whole) < 1e-12


@pytest.mark.parametrize("variant", ["plain", "patterns"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_doras_from_other_conventions_keep_their_gains(tmp_path, kind, variant):
    adapter = read(save_dora(tmp_path / "a", kind, variant), kind)
    kernel = adapter.layout.kernel
    shapes = {m: ModuleShape(d.shape, kernel(m)) for m, d in adapter.modules.items()}
    layout = peft_layout_for(adapter.layout, adapter.modules, shapes, "")
    moved = dataclasses.replace(adapter, layout=layout)
    moved.save_pretrained(tmp_path / "b")
    (2 * moved).save_pretrained(tmp_path / "c")
    make = partial(make_base, kind)
    want = change_of(tmp_path / "a", make)
    for weight, path in ((1, "b"), (2, "c")):
        got = change_of(tmp_path / path, make)
        assert max(relative_error(got[m], weight * W) for m, W in want.items()) < 1e-5
    same = load_file(tmp_path / "b" / WEIGHTS).items()
    assert all(torch.equal(t, stored(tmp_path / "a")[0][k.removesuffix(".weight")])
               for k, t in same if MAGNITUDE in k)  # fmt: skip
