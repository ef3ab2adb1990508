"""Damaged files end in success or one `DevecError`: no other error, no hang, no run on memory.

The same cases by the hundred thousand: ``python -m support.fuzzing.fuzz`` in the folder tests.
"""

import contextlib
import json

import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, DevecError
from support.fuzzing.damage import make_case, originals
from support.fuzzing.fuzz import limited, peak_memory, run, time_limit

pytestmark = pytest.mark.filterwarnings("ignore::devec.DevecWarning")

CHUNK = 200


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_damaged_files_are_read_or_refused(chunk):
    counts, failures = run(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    report = [f"cases {numbers[:5]}:\n{text}" for text, numbers in failures.values()]
    assert not report, "\n".join(report)
    assert counts["read"] > CHUNK / 20  # else little but the first checks is tried
    assert counts["FormatError"] > CHUNK / 20
    assert sum(counts.values()) == CHUNK


@pytest.mark.parametrize("number", range(20))
def test_cases_are_their_numbers(number):
    assert make_case(number) == make_case(number)


@pytest.mark.parametrize("name", originals())
def test_undamaged_files_are_read_in_little_memory(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(originals()[name])
    before = peak_memory()
    with contextlib.suppress(DevecError):
        Adapter.from_pretrained(path).norm()
    assert peak_memory() - before < 32 << 20


KRONECKER = {"lokr_w1": (8192, 1), "lokr_w2": (8192, 1)}
TUCKER = {"lokr_w1": (1, 1), "lokr_w2_a": (1, 1), "lokr_w2_b": (1, 8192), "lokr_t2": (1, 1, 90, 90)}
HADAMARD = {"hada_w1_a": (2000, 64), "hada_w1_b": (64, 1), "hada_w2_a": (2000, 64),
            "hada_w2_b": (64, 1)}  # fmt: skip


@pytest.mark.parametrize(
    "shapes", [KRONECKER, TUCKER, HADAMARD], ids=["kronecker", "tucker", "hadamard"]
)
def test_small_files_of_large_products_take_memory_by_their_size(tmp_path, shapes):
    tensors = {f"lora_unet_x.{part}": torch.ones(shape) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    before = peak_memory()
    with limited(), contextlib.suppress(DevecError):
        Adapter.from_pretrained(tmp_path / "a.safetensors").norm()
    assert peak_memory() - before < 100 * size + (16 << 20)


MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
PAIR = {f"{MODULE}.lora_A.weight": torch.ones(2, 4), f"{MODULE}.lora_B.weight": torch.ones(4, 2)}
ENDLESS = r"(\w|\w\w|\.)+!"  # a pattern that takes exponential time to find that it does not match


def read_in_time(path):
    with time_limit(3), contextlib.suppress(DevecError):
        Adapter.from_pretrained(path)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_the_header_do_not_run_away(tmp_path, field):
    config = {"unet.r": 2, "unet.lora_alpha": 2, f"unet.{field}": {ENDLESS: 2}}
    save_file(PAIR, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    read_in_time(tmp_path / "a.safetensors")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_patterns_of_configurations_do_not_run_away(tmp_path, field):
    tensors = {key.replace("unet.", "base_model.model."): t for key, t in PAIR.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_k"]}
    config[field] = ENDLESS if field == "target_modules" else {ENDLESS: 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read_in_time(tmp_path)


@pytest.mark.parametrize(
    "key", ["a." * 500_000, "a" * 1_000_000, ".alpha" * 200_000, "_lora1" * 200_000]
)
def test_names_of_any_length_are_read_in_time(tmp_path, key):
    save_file(PAIR | {key: torch.ones(1)}, tmp_path / "a.safetensors")
    read_in_time(tmp_path / "a.safetensors")


def test_many_names_of_which_one_appears_twice_are_refused_in_time(tmp_path):
    names = [f"k{n}" for n in range(60_000)]
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ",".join(f'"{name}":{entry}' for name in [*names, names[0]]).join("{}").encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with time_limit(3), pytest.raises(DevecError, match="'k0' more than once"):
        Adapter.from_pretrained(tmp_path / "a.safetensors")
