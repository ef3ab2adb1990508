"""Magnitudes that cannot be right are refused, and odd ones told of."""

import json

import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, DevecError, combine
from devec.errors import DevecWarning, FormatError, UnsupportedError
from support.adapters.cases import relative_error
from support.adapters.doras import (
    CONV,
    LINEAR,
    dense_change,
    dora_file,
    effects,
    tensors_of,
    weight,
)
from support.checks.dora_files import (
    SPLIT,
    read,
)
from support.models.pipelines import make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning")


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


def test_magnitudes_that_are_no_norms_are_used_with_a_warning(tmp_path):
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
