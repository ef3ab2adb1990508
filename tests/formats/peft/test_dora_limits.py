"""DoRAs that PEFT or nobody can write, and such as are broken."""

import dataclasses
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from devec import Adapter, DevecError, DevecWarning, combine
from devec.deltas.gains import Magnitude
from support.adapters.cases import (
    Experts,
    make_base,
    relative_error,
    save_adapter,
)
from support.adapters.peft_doras import (
    CONFIG,
    KINDS,
    MAGNITUDE,
    TOLERANCE,
    WEIGHTS,
    change_of,
    precision,
    read,
    save_dora,
    save_lora,
    through_peft,
    wanted,
    weighted,
    with_config,
    with_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


# Gains that no DoRA has


def gains(adapter):
    """All gains of an adapter."""
    return torch.cat([d.resolved().gain.axes["out"].values for d in adapter.modules.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_coefficient_that_cancels_a_row_is_refused_and_the_largest_that_does_not_works(
    tmp_path, kind
):
    path = save_dora(tmp_path / "a", kind, "float64")
    adapter = read(path, kind)
    coefficient = -1 / float(gains(adapter).min())
    with pytest.raises(DevecError) as caught:
        (coefficient * adapter).save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert re.search(r"module '(first|second)", str(caught.value))
    said = float(re.search(r"coefficient that works is ([\d.]+)", str(caught.value))[1])
    assert 0.99 < said < 1
    smaller = said * coefficient
    (smaller * adapter).save_pretrained(tmp_path / "b")
    want = weighted([smaller], [change_of(path, partial(make_base, kind))])
    got = through_peft(kind, tmp_path / "b", torch.float64)
    assert relative_error(got, wanted(kind, want)) < 1e-10


@pytest.mark.parametrize("variant", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_turned_around_are_written(tmp_path, kind, variant):
    path = save_dora(tmp_path / "a", kind, variant)
    adapter = read(path, kind)
    coefficient = -1.37 / float(gains(adapter).median())
    (coefficient * adapter).save_pretrained(tmp_path / "b")
    with pytest.warns(
        DevecWarning, match=r"magnitudes are negative, each of which turns an output"
    ):
        again = Adapter.from_pretrained(tmp_path / "b")
    assert any(bool((d.gain.values < 0).any()) for d in again.modules.values())
    want = weighted([coefficient], [change_of(path, partial(make_base, kind))])
    got = through_peft(kind, tmp_path / "b", precision(variant))
    assert relative_error(got, wanted(kind, want)) < 10 * TOLERANCE[variant]


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_odd_magnitudes_are_used_as_they_are(tmp_path, value):
    path = save_dora(tmp_path / "a", "linear", "float64")

    def odd(key, tensor):
        if MAGNITUDE in key and "second" in key:
            tensor[3:5] = value
        return tensor

    with_tensors(path, odd)
    what = "2 magnitudes are zero, .*off" if value == 0 else "2 magnitudes are negative, .*around"
    with pytest.warns(DevecWarning, match=rf"{WEIGHTS}: {what}.*as they are, in 'second.layer'"):
        adapter = read(path, "linear")
    (0.5 * adapter).save_pretrained(tmp_path / "b")
    want = wanted("linear", weighted([0.5], [change_of(path, partial(make_base, "linear"))]))
    got = through_peft("linear", tmp_path / "b", torch.float64)
    assert relative_error(got, want) < 1e-12


# Bad input


def refused(path, *parts):
    """Whether a directory is refused with a message of these parts."""
    with pytest.raises(DevecError) as caught:
        Adapter.from_pretrained(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture
def dora(tmp_path):
    return save_dora(tmp_path / "dora", "linear")


def without(path, *marks):
    """A directory without the tensors whose keys contain all marks."""
    tensors = load_file(path / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if not all(m in k for m in marks)}, path / WEIGHTS)
    return path


def test_magnitudes_that_are_missing(dora):
    refused(without(dora, MAGNITUDE, "second"), WEIGHTS, "use_dora is true", "1 of 2 modules",
            "'second.layer'")  # fmt: skip
    refused(without(dora, MAGNITUDE), "2 of 2 modules", "'first.layer', 'second.layer'")


def test_magnitudes_that_the_config_denies(dora):
    denied = with_config(dora, use_dora=False)
    refused(denied, WEIGHTS, "use_dora is not true", "'first.layer', 'second.layer'")
    refused(denied, "which of the two is wrong cannot be determined")
    refused(with_config(dora, use_dora="yes"), CONFIG, "use_dora should be true or false")


def test_magnitudes_without_factors(dora):
    refused(without(dora, "second", "lora_A"), "'second.layer' has no factor A")
    refused(without(dora, "second", "lora_B"), "'second.layer' has no factor")


@pytest.mark.parametrize("shape", [(29,), (31,), (24,), (1,), (0,), (30, 2), (15, 2)])
def test_magnitudes_of_wrong_length(dora, shape):
    with_tensors(dora, lambda k, t: torch.ones(shape) if MAGNITUDE in k else t)
    refused(dora, "module 'first.layer'", f"magnitudes have shape {shape}", "30 outputs")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_magnitudes_that_are_not_finite(dora, value):
    with_tensors(dora, lambda k, t: t.fill_(value) if MAGNITUDE in k else t)
    refused(dora, WEIGHTS, MAGNITUDE, "NaN or infinity in 30 of its values")


def test_magnitudes_under_two_keys(dora):
    tensors = load_file(dora / WEIGHTS)
    key = next(k for k in tensors if MAGNITUDE in k)
    save_file({**tensors, f"{key}.weight": tensors[key].clone()}, dora / WEIGHTS)
    assert len(Adapter.from_pretrained(dora).modules) == 2
    save_file({**tensors, f"{key}.weight": 2 * tensors[key]}, dora / WEIGHTS)
    refused(dora, f"{key}.weight", "not the same as the other magnitudes")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("target_parameters", ["first.layer.weight"]),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_what_peft_refuses_beside_use_dora(dora, field, value):
    refused(with_config(dora, **{field: value}), CONFIG, field, "beside use_dora")


def test_a_missing_base_model_is_named_where_it_is_needed(dora):
    adapter = Adapter.from_pretrained(with_config(dora, base_model_name_or_path="org/model"))
    with pytest.raises(DevecError, match=r"'first.layer'.*--base MODEL.*'org/model'"):
        _ = 0.5 * adapter


def test_a_lora_among_doras_needs_a_base_model(tmp_path):
    lora = save_lora(tmp_path / "lora", "linear", target_modules=["second.layer"])
    first = save_dora(tmp_path / "first", "linear", target_modules=["first.layer"])
    both = combine([Adapter.from_pretrained(p) for p in (lora, first)], [1, 1])
    with pytest.raises(DevecError, match=r"'second.layer' \(a LoRA that is to be.*--base MODEL"):
        both.save_pretrained(tmp_path / "both")
    adapters = [Adapter.from_pretrained(lora), read(first, "linear")]
    combine(adapters, [1, 1]).save_pretrained(tmp_path / "both")  # the base that was given
    assert len(Adapter.from_pretrained(tmp_path / "both").modules) == 2


def test_changes_of_biases_among_doras_are_refused(tmp_path, dora):
    lora = save_lora(tmp_path / "lora", "linear", "bias")
    both = combine([read(p, "linear") for p in (lora, dora)], [1, 1])
    with pytest.raises(DevecError, match=r"bias of 'first.layer'.*no lora_bias beside use_dora"):
        both.save_pretrained(tmp_path / "both")


def test_gains_of_inputs_are_refused(tmp_path, dora):
    def turned(_, delta):
        values = torch.ones(delta.shape[1])
        return dataclasses.replace(delta, gain=Magnitude(values, "in", delta.gain.base))

    adapter = read(dora, "linear").map(turned)
    for other in (adapter, 0.5 * adapter):
        with pytest.raises(
            DevecError, match=r"'first.layer'.*magnitudes of outputs only; --as-lora RANK"
        ):
            other.save_pretrained(tmp_path / "b")
    with pytest.raises(DevecError, match=r"'first.layer'.*of the outputs and of the inputs"):
        (adapter + read(dora, "linear")).save_pretrained(tmp_path / "b")


def test_parameters_among_doras_are_refused(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.proj = Experts(), nn.Linear(12, 9)

        def forward(self, x):
            return self.experts(self.proj(x))

    save_adapter(
        tmp_path / "a", "linear", "plain", 0, base=Mixed(),
        target_modules=["proj"], target_parameters=["experts.up"],
    )  # fmt: skip
    adapter = Adapter.from_pretrained(tmp_path / "a", base=Mixed())
    proj = adapter.modules["proj"]
    gain = Magnitude(torch.ones(9), "out", adapter.layout.base.weight("proj", proj.shape))
    modules = {**adapter.modules, "proj": dataclasses.replace(proj, gain=gain)}
    with pytest.raises(DevecError, match=r"no DoRA of 'experts', which are parameters"):
        dataclasses.replace(adapter, modules=modules).save_pretrained(tmp_path / "b")


def test_attention_among_doras_is_refused(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.proj = nn.MultiheadAttention(12, 2), nn.Linear(12, 9)

    save_adapter(tmp_path / "a", "linear", "plain", 0, base=Attention(), target_modules=["attn"])
    save_dora(tmp_path / "b", "linear", base=Attention(), target_modules=["proj"])
    base = Attention()
    with pytest.warns(DevecWarning, match="MultiheadAttention"):
        adapters = [Adapter.from_pretrained(tmp_path / n, base=base) for n in "ab"]
    with pytest.raises(DevecError, match=r"no DoRA of 'attn.base_layer.out_proj'"):
        combine(adapters, [1, 1]).save_pretrained(tmp_path / "c")
