"""Files of every convention are read as they mean and saved as they were."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, DevecError, combine, compress, convert, decompose
from support.adapters.cases import dense, relative_error
from support.folding import folded
from support.pools.golden_pool import (
    READABLE,
    REWRITTEN,
    WHOLE,
    assert_close_deltas,
    golden,
    largest_factors,
    sibling,
    stored,
)
from support.truth.golden_truth import bias_truth, carried, dense_truth

# The readers apply it too weakly, and so does the truth.
STACKED = "ignore:.*side by side but the alpha of one:devec.DevecWarning"
pytestmark = pytest.mark.filterwarnings(STACKED)

# Whose tensors are not written as they were: products, `.scale`, eight bits, two spellings at once.
NOT_KEPT = [*REWRITTEN, "a1111_scale", "float8", "diffusers_sd15"]
RECOMPUTED = {"ss_network_module", "ss_network_dim", "ss_network_alpha"}
FLOAT32_LORA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def read(name):
    return Adapter.from_pretrained(golden(name))


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_what_is_read_is_the_dense_truth(name):
    adapter, truth, biases = read(name), dense_truth(golden(name)), bias_truth(golden(name))
    assert adapter.modules.keys() == truth.keys()
    tolerance = 1e-6 if name in REWRITTEN else 1e-14  # factors as stored, multiplied in float64
    for module, delta in adapter.modules.items():
        assert relative_error(dense(delta), truth[module]) <= tolerance, module
        if module in biases:
            assert relative_error(delta.scaling * delta.bias.double(), biases[module]) <= 1e-14
    held = {module for module, delta in adapter.modules.items() if delta.bias is not None}
    assert held == biases.keys()


@pytest.mark.parametrize("name", READABLE)
def test_what_is_no_delta_is_carried_as_it_is(name):
    adapter, (tensors, _) = read(name), stored(golden(name))
    assert sorted(adapter.carried) == carried(golden(name))
    for key, tensor in adapter.carried.items():
        torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=0)


def test_some_golden_files_carry_something():
    assert carried(golden("lycoris_norm"))
    assert carried(golden("bundled_embeddings"))


def test_whole_tensors_alone_are_carried():
    adapter = read(WHOLE)
    assert not adapter.modules
    assert set(adapter.carried) == set(carried(golden(WHOLE)))


def test_a_key_of_no_known_kind_is_named_and_carried(tmp_path):
    tensors, _ = stored(golden("kohya_sd15"))
    save_file({**tensors, "something.else": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="'something.else'"):
        adapter = Adapter.from_pretrained(tmp_path / "a.safetensors")
    assert list(adapter.carried) == ["something.else"]
    assert adapter.modules.keys() == dense_truth(golden("kohya_sd15")).keys()


# --- alphas -------------------------------------------------------------------------------------


def scaling(tmp_path, metadata=None, module=FLOAT32_LORA, **parts):
    """The scaling that a module of a file is read with."""
    tensors = {f"{module}.{part}": value for part, value in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapter = Adapter.from_pretrained(tmp_path / "a.safetensors")
    truth = dense_truth(tmp_path / "a.safetensors")
    assert relative_error(dense(adapter.modules[module]), truth[module]) <= 1e-6
    return adapter.modules[module].scaling


def pair(rank=4):
    return {"lora_up.weight": torch.ones(6, rank), "lora_down.weight": torch.ones(rank, 5)}


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({}, 1),
        ({"alpha": 3.0}, 0.75),
        ({"scale": 0.3}, 0.3),
        ({"scale": 0.3, "alpha": 8.0}, 0.3),
        ({"alpha": -2.0}, -0.5),
    ],
    ids=["none", "alpha", "scale", "scale and alpha", "negative alpha"],
)
def test_scale_comes_before_alpha_and_alpha_before_one(tmp_path, scales, expected):
    scales = {key: torch.tensor(value, dtype=torch.float64) for key, value in scales.items()}
    assert scaling(tmp_path, **pair(), **scales) == expected


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_alpha_of_any_shape_of_one_number(tmp_path, shape):
    parts = {**pair(), "alpha": torch.full(shape, 2.0)}
    save_file({f"a.{part}": value for part, value in parts.items()}, tmp_path / "a.safetensors")
    assert Adapter.from_pretrained(tmp_path / "a.safetensors").modules["a"].scaling == 0.5


INFINITE = torch.tensor(9999999999.0).half()
FAMILIES = {
    "lora": pair(),
    "loha": {f"hada_w{i}_{c}": torch.ones((6, 2) if c == "a" else (2, 5))
             for i in (1, 2) for c in "ab"},
    "lokr": {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(6, 2),
             "lokr_w2_b": torch.ones(2, 5)},
}  # fmt: skip


@pytest.mark.parametrize("value", [INFINITE, torch.tensor(9999999999.0)], ids=["inf", "huge"])
def test_alpha_of_two_whole_factors_means_nothing(tmp_path, value):
    whole = {"lokr_w1": torch.eye(2), "lokr_w2": torch.ones(3, 5)}
    assert scaling(tmp_path, **whole, alpha=value) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_of_low_rank_factors_is_finite(tmp_path, family):
    assert math.isinf(INFINITE)
    with pytest.raises(DevecError, match=f"{FLOAT32_LORA}.*alpha is inf, expected a finite"):
        scaling(tmp_path, **FAMILIES[family], alpha=INFINITE)
    assert scaling(tmp_path, **FAMILIES[family], alpha=torch.tensor(1.0)) in (0.25, 0.5)


PATTERNS = {
    "r and alpha": ({"r": 4, "lora_alpha": 8}, 2),
    "pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"^b\.0\.attn\.to_q": 3}}, 0.75),
    "suffix": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 3}}, 0.75),
    "no match": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 3}}, 2),
    "rank pattern": (
        {"r": 9, "lora_alpha": 8, "rank_pattern": {"attn.to_q": 4}, "alpha_pattern": None},
        2,
    ),
    "rsLoRA": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_alphas_of_the_header(tmp_path, case):
    config, expected = PATTERNS[case]
    header = {f"transformer.{key}": value for key, value in config.items()}
    parts = {"lora_B.weight": torch.ones(6, 4), "lora_A.weight": torch.ones(4, 5)}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    assert scaling(tmp_path, metadata, "transformer.b.0.attn.to_q", **parts) == expected


def test_alpha_of_another_component_is_not_used(tmp_path):
    header = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    parts = {"lora_B.weight": torch.ones(6, 4), "lora_A.weight": torch.ones(4, 5)}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    assert scaling(tmp_path, metadata, "transformer.b.0.attn.to_q", **parts) == 1


def test_rslora_of_lycoris_stands_in_alpha():
    scalings = [delta.scaling for delta in read("lycoris_rslora").modules.values()]
    assert scalings == pytest.approx([1 / math.sqrt(2)] * 2, rel=1e-7)


# --- saving -------------------------------------------------------------------------------------


def bare(adapter):
    """An adapter without what it carries: not every operation has a place for that."""
    return dataclasses.replace(adapter, carried={})


OPERATIONS = {
    "as read": lambda a, _: a,
    "sum": lambda a, b: combine([a, b], [1, -0.7], carried_from="none"),
    "rank 1": lambda a, _: compress(a, rank=1).adapter,
    "unique": lambda a, b: decompose([a, b]).unique["a"],
    "common": lambda a, b: decompose([a, b]).common,
    "diffusers": lambda a, _: convert(bare(a), "diffusers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READABLE)
def test_what_is_saved_is_saved_the_same_again(tmp_path, name):
    a = Adapter.from_pretrained(golden(name), "a")
    b = Adapter.from_pretrained(sibling(name, tmp_path / "b.safetensors"))
    for label, operation in OPERATIONS.items():
        first = operation(a, b).save_pretrained(tmp_path / label / "first")
        second = Adapter.from_pretrained(first).save_pretrained(tmp_path / label / "second")
        assert first.read_bytes() == second.read_bytes(), label


@pytest.mark.parametrize("name", sorted(set(READABLE) - set(NOT_KEPT)))
def test_tensors_and_header_are_stored_as_they_were(tmp_path, name):
    (tensors, metadata), path = stored(golden(name)), read(name).save_pretrained(tmp_path / "a")
    saved, header = stored(path)
    assert saved.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=0)
    hashes = {"sshs_legacy_hash", "sshs_model_hash"}
    kept = {key: value for key, value in metadata.items() if key not in RECOMPUTED | hashes}
    assert kept.items() <= header.items()
    added = RECOMPUTED if "ss_network_module" in metadata else {"lora_adapter_metadata"}
    assert header.keys() - metadata.keys() <= {"format", *added}
    assert header["format"] == "pt"
    if "sshs_model_hash" in metadata:
        data = path.read_bytes()
        content = data[8 + int.from_bytes(data[:8], "little") :]
        assert header["sshs_model_hash"] == hashlib.sha256(content).hexdigest()
        assert header.get("sshs_legacy_hash") in (None, legacy_hash(data))


def legacy_hash(data):
    return hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@pytest.mark.parametrize("name", READABLE)
@folded("dtype", [None, torch.float32])
def test_what_is_saved_means_the_same(tmp_path, name, dtype):
    truth = dense_truth(golden(name))
    path = read(name).save_pretrained(tmp_path / "a", dtype=dtype)
    assert sorted(carried(golden(name))) == sorted(carried(path))
    if name in REWRITTEN:
        types = {t.dtype for t in stored(golden(name))[0].values()}
        eps = max(torch.finfo(dtype or t).eps for t in types)
        bounds = largest_factors(path)
        for module, delta in dense_truth(path).items():
            assert np.linalg.norm(delta - truth[module]) <= eps * 1.01 * bounds[module], module
    else:
        # alphas that are not kept are folded into B, rounded once
        assert_close_deltas(dense_truth(path), truth, 1e-7)
