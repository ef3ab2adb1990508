"""Bad files are refused with a message that says what, where and what to do."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import Adapter, DevecError, DevecWarning, combine, decompose, overlap
from support.adapters.cases import save_adapter
from support.paths import GOLDEN

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UP, DOWN, ALPHA = (f"{MODULE}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha"))
OTHER = "lora_unet_mid_block_attentions_0_proj_in"


def pair(module=MODULE, rows=8, columns=6, rank=2):
    """A kohya module with an alpha."""
    return {
        f"{module}.lora_up.weight": torch.randn(rows, rank),
        f"{module}.lora_down.weight": torch.randn(rank, columns),
        f"{module}.alpha": torch.tensor(1.0),
    }


def saved(tmp_path, tensors, metadata=None, name="a.safetensors"):
    path = tmp_path / name
    if any(t.is_complex() for t in tensors.values()):  # which older ones do not write
        pytest.importorskip("safetensors", minversion="0.7")
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata)
    return path


def refused(path, *parts, **options):
    """Assert that a file is refused with one message that names it and holds these parts."""
    with pytest.raises(DevecError) as caught:
        Adapter.from_pretrained(path, **options)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def tensor_with(key, index, value):
    """A change that sets one value of a tensor."""

    def change(tensors):
        tensors[key].view(-1)[index] = value

    return change


def cast(key, dtype):
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


def put(**changes):
    names = {"up": UP, "down": DOWN, "alpha": ALPHA}
    return lambda tensors: tensors.update({names[k]: v for k, v in changes.items()})


ONES = torch.ones
BAD_TENSORS = {
    "up with NaN": (tensor_with(UP, 3, float("nan")), [UP, "NaN or infinity in 1"]),
    "down with infinity": (tensor_with(DOWN, 0, float("-inf")), [DOWN, "NaN or infinity in 1"]),
    "integers": (cast(UP, torch.int32), [MODULE, UP, "torch.int32", "float32"]),
    "bytes": (cast(DOWN, torch.uint8), [MODULE, DOWN, "torch.uint8", "float32"]),
    "complex": (cast(DOWN, torch.complex64), [MODULE, DOWN, "complex64", "float32"]),
    "a vector": (put(up=ONES(8)), [MODULE, "(8,)"]),
    "a scalar": (put(down=torch.tensor(1.0)), [MODULE, "()"]),
    "six dimensions": (put(down=ONES(2, 6, 1, 1, 1, 1)), [DOWN, "6 dimensions", "5"]),
    "dozens of dimensions": (put(down=ONES((2, 6) + (1,) * 60)), [DOWN, "62 dimensions"]),
    "nothing inside": (put(up=ONES(8, 0), down=ONES(0, 6)), [MODULE, "(0, 6)"]),
    "ranks disagree": (put(up=ONES(8, 3)), [MODULE, "ranks disagree", "2", "3"]),
    "up with a kernel": (put(up=ONES(8, 2, 3, 3)), [MODULE, "(8, 2, 3, 3)"]),
    "infinite alpha": (put(alpha=torch.tensor(torch.inf)), [MODULE, "alpha", "inf", "finite"]),
    "alpha NaN": (put(alpha=torch.tensor(torch.nan)), [MODULE, "alpha", "nan", "finite"]),
    "alpha a vector": (put(alpha=ONES(2)), [MODULE, "alpha", "single number", "(2,)"]),
    "no alpha in the alpha": (put(alpha=ONES(0)), [MODULE, "alpha", "single number", "(0,)"]),
    "complex alpha": (put(alpha=torch.tensor(1j)), [MODULE, "alpha", "complex64"]),
    "huge rank": (put(up=ONES(1, 20_000), down=ONES(20_000, 1)), [MODULE, "20000", "16384"]),
    "no up": (lambda tensors: tensors.pop(UP), [MODULE, "no up"]),
    "no down": (lambda tensors: tensors.pop(DOWN), [MODULE, "no down"]),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_cannot_be_right(tmp_path, name):
    change, parts = BAD_TENSORS[name]
    tensors = pair() | pair(OTHER)
    change(tensors)
    refused(saved(tmp_path, tensors), *parts)


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[]"}, "should hold a JSON object"),
        ({"lora_adapter_metadata": '{"unet.r": -4}'}, "unet.r should be a positive integer"),
        ({"lora_adapter_metadata": '{"unet.r": 1e99}'}, "unet.r should be a positive integer"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "unet.lora_alpha"),
        ({"lora_adapter_metadata": '{"unet.rank_pattern": {"(": 2}}'}, "no pattern"),
        ({"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 3}'}, "rank 3"),
        ({"devec": "nonsense"}, "'devec'"),
        ({"devec": "{}"}, "record of origin"),
    ],
)
def test_headers_that_contradict(tmp_path, metadata, part):
    tensors = {"unet.a.lora_A.weight": ONES(2, 6), "unet.a.lora_B.weight": ONES(8, 2)}
    refused(saved(tmp_path, tensors, metadata), part)


def test_huge_metadata_are_refused_before_they_are_read(tmp_path):
    refused(saved(tmp_path, pair(), {"x": "y" * (40 << 20)}), "header", "bytes", "at most")


def test_headers_that_name_a_tensor_twice(tmp_path):
    path = saved(tmp_path, pair())
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    text = json.dumps(entries)[:-1] + f", {json.dumps(UP)}: {json.dumps(entries[UP])}}}"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])
    refused(path, UP, "more than once")


TWICE = {
    "two spellings": {f"{MODULE}.lora_A.weight": ONES(2, 6), f"{MODULE}.lora_B.weight": ONES(8, 2)},
    "two prefixes": pair(MODULE.replace("lora_unet_", "lora_unet__")),
    "dots and underscores": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" + end: tensor
        for end, tensor in ((".lora_A.weight", ONES(2, 6)), (".lora_B.weight", ONES(8, 2)))
    },
    "old and new attention": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora." + end: t
        for end, t in (("down.weight", ONES(2, 6)), ("up.weight", ONES(8, 2)))
    },
}


@pytest.mark.parametrize("name", TWICE)
def test_two_names_for_one_module(tmp_path, name):
    refused(saved(tmp_path, pair() | TWICE[name]), MODULE, "two")


def test_unknown_keys_of_an_adapted_module_are_refused(tmp_path):
    keys = [f"{MODULE}.{end}" for end in ("lora_gate", "lora_gate.weight", "new")]
    refused(saved(tmp_path, pair() | dict.fromkeys(keys, ONES(2))), *keys, "not known")


def test_unknown_keys_elsewhere_are_carried_and_warned_of(tmp_path):
    keys = ["something", "lora_unet_elsewhere.gate"]
    path = saved(tmp_path, pair() | dict.fromkeys(keys, ONES(2)))
    with pytest.warns(DevecWarning) as caught:
        adapter = Adapter.from_pretrained(path)
    assert all(key in str(caught[0].message) for key in (str(path), *keys))
    assert sorted(adapter.carried) == sorted(keys)
    assert load_file(adapter.save_pretrained(tmp_path / "out")).keys() == load_file(path).keys()


@pytest.mark.parametrize("end", ["alpha", "scale"])
def test_an_alpha_without_factors_is_warned_of_and_kept(tmp_path, end):
    lone = f"{OTHER}.{end}"
    path = saved(tmp_path, pair() | {lone: torch.tensor(2.0)})
    with pytest.warns(DevecWarning, match=re.escape(lone)):
        adapter = Adapter.from_pretrained(path)
    assert list(adapter.modules) == [MODULE]
    assert adapter.carried.keys() == {lone}


METHODS = {
    "OFT": {"oft_blocks": ONES(4, 2, 2), "alpha": ONES(())},
    "BOFT": {"oft_blocks": ONES(2, 4, 2, 2), "alpha": ONES(())},
    "GLoRA": {f"{p}.weight": ONES(2, 2) for p in ("a1", "a2", "b1", "b2", "bm")},
    "IA3": {"weight": ONES(8, 1), "on_input": ONES(())},
    "T-LoRA": {
        "q_layer.weight": ONES(2, 6),
        "p_layer.weight": ONES(8, 2),
        "lambda_layer": ONES(1, 2),
    },
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a LoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_delta_is_refused_by_name(tmp_path, method, beside):
    tensors = {f"{OTHER}.{part}": tensor for part, tensor in METHODS[method].items()}
    path = saved(tmp_path, tensors | (pair() if beside else {}))
    refused(path, f" {method} ", OTHER)


@pytest.mark.parametrize("end", ["oft_R.weight", "boft_R", "ia3_l", "vera_lambda_b"])
def test_other_methods_of_peft_are_refused_by_name(tmp_path, end):
    method = {"oft": "OFT", "boft": "BOFT", "ia3": "IA3", "vera": "VeRA"}[end.partition("_")[0]]
    refused(saved(tmp_path, {f"base_model.model.x.{end}": ONES(2, 2)}), f" {method} ")


def test_weights_of_peft_without_their_configuration():
    with pytest.warns(DevecWarning, match=r"adapter_config.json.*scaling is taken to be 1"):
        Adapter.from_pretrained(GOLDEN / "peft.safetensors")


def test_weights_of_peft_under_another_name_are_read_by_their_configuration(tmp_path):
    adapter = save_adapter(tmp_path / "a", "linear", "plain", 0)
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    read = Adapter.from_pretrained(adapter / "other.safetensors")
    assert {delta.scaling for delta in read.modules.values()} == {13 / 6}


NO_ADAPTERS = {
    "a checkpoint of SD": (
        [
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.decoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
        ],
        "full checkpoint",
    ),
    "a model of diffusers": (["conv_in.weight", "conv_in.bias"], "full checkpoint"),
    "Flux": (
        [
            "double_blocks.0.img_attn.qkv.weight",
            "double_blocks.0.img_attn.qkv.bias",
            "double_blocks.0.img_attn.norm.key_norm.scale",
        ],
        "full checkpoint",
    ),
    "Wan": (["blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias", "head.modulation"], "full checkpoint"),
    "a VAE": (["encoder.conv_in.weight", "decoder.conv_in.bias"], "full checkpoint"),
    "an embedding of SD 1.5": (["emb_params"], "embedding"),
    "an embedding of SDXL": (["clip_l", "clip_g"], "embedding"),
    "an embedding of diffusers": (["<cat>"], "embedding"),
    "something": (["one", "two"], "LoRA"),
}


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_what_is_no_adapter_is_called_what_it_is(tmp_path, name):
    keys, what = NO_ADAPTERS[name]
    refused(saved(tmp_path, dict.fromkeys(keys, ONES(4, 4))), what, *keys)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello\n" * 9, b"{}", b"PK\x03\x04" * 30])
def test_files_that_are_something_else(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, "safetensors file" if content else "empty")


@pytest.mark.parametrize("end", ["txt", "zip", "json", ""])
def test_other_file_types(tmp_path, end):
    path = tmp_path / f"a.{end}".rstrip(".")
    path.write_bytes(b"hello")
    refused(path, "not an adapter", ".safetensors")


def test_directories_with_several_files_and_with_none(tmp_path):
    refused(tmp_path, "not an adapter")
    saved(tmp_path, pair(), name="one.safetensors")
    assert Adapter.from_pretrained(tmp_path).modules.keys() == {MODULE}
    saved(tmp_path, pair(), name="two.safetensors")
    refused(tmp_path, "2 files", "'one.safetensors', 'two.safetensors'", "weight_name=")
    assert Adapter.from_pretrained(tmp_path, weight_name="two.safetensors").name == "two"


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("end", ["pt", "pth", "bin", "ckpt", "PT"])
@pytest.mark.parametrize("allowed", [False, True])
def test_pickles_do_not_run_code(tmp_path, end, allowed):
    marker, path = tmp_path / "marker", tmp_path / f"a.{end}"
    path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    refused(path, "pickle", allow_pickle=allowed)
    torch.save(pair() | {"x": Malicious(marker)}, path)
    refused(path, "pickle", allow_pickle=allowed)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so it would have run


@pytest.mark.parametrize("wrap", [dict, lambda held: {"state_dict": held, "step": 3}])
def test_pickles_of_tensors_are_read_if_allowed(tmp_path, wrap):
    tensors = pair()
    torch.save(wrap(tensors), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "pickle", "--allow-pickle", "allow_pickle=True")
    read = Adapter.from_pretrained(tmp_path / "a.pt", allow_pickle=True)
    assert read == Adapter.from_pretrained(saved(tmp_path, tensors))
    assert read.save_pretrained(tmp_path / "out").suffix == ".safetensors"


@pytest.mark.parametrize("held", [[1, 2], 7, {"a": 1}, {1: ONES(2)}, {}])
def test_pickles_of_something_else(tmp_path, held):
    torch.save(held, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", allow_pickle=True)


OPERATIONS = {
    "decompose": decompose,
    "combine": lambda pool: combine(pool, [1, 1]),
    "overlap": overlap,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_pools_of_different_bases_are_refused_by_shape(tmp_path, operation):
    paths = [saved(tmp_path, pair(rows=rows), name=f"r{rows}.safetensors") for rows in (8, 9)]
    with pytest.raises(DevecError) as caught:
        OPERATIONS[operation]([Adapter.from_pretrained(path) for path in paths])
    for part in ("different base models", MODULE, "(8, 6)", "(9, 6)", *map(str, paths)):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ss_base_model_version", ("sd_v1", "sd_v2")),
        ("base_model_name_or_path", ("org/one", "org/two")),
        ("modelspec.architecture", ("stable-diffusion-v1/lora", "stable-diffusion-v2/lora")),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_pools_whose_metadata_name_different_bases_are_warned_of(
    tmp_path, field, values, operation, recwarn
):
    paths = [saved(tmp_path, pair(), {field: v}, f"{v[-1]}{i}.sft") for i, v in enumerate(values)]
    pool = [Adapter.from_pretrained(path) for path in paths]
    OPERATIONS[operation](pool)
    said = [str(w.message) for w in recwarn if issubclass(w.category, DevecWarning)]
    assert any(all(repr(v) in message for v in values) for message in said), said
    recwarn.clear()
    same = [Adapter.from_pretrained(paths[0], name) for name in "ab"]
    OPERATIONS[operation](same)
    assert not [w for w in recwarn if "different base" in str(w.message)]
