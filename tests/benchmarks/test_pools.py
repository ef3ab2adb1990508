"""The pools of the benchmarks: the modules of the real models, files that devec reads."""

import pytest
import torch
from benchmarks import floor, pools
from safetensors.torch import load_file

from devec import Adapter, decompose

SHAPES = {
    "flux": (pools.flux_shapes(32, 1, 1), False),
    "sd15": (pools.sd15_shapes(8, 16, 1), False),
    "sdxl": (pools.sdxl_shapes(8, 16, 1), False),
    "llama": (pools.llama_shapes(1, 32, 48), True),
}


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        (pools.flux_shapes(), 494),
        (pools.sd15_shapes(), 264),
        (pools.sdxl_shapes(), 722),
        (pools.llama_shapes(), 224),
    ],
)
def test_real_models_have_so_many_modules(shapes, count):
    assert len(shapes) == count


def test_the_layers_of_sdxl_are_seventy():
    shapes = pools.sdxl_shapes()
    assert sum(name.endswith("attn2.to_k") for name in shapes) == 70
    assert shapes["unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert shapes["unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj"] == (5120, 640)


@pytest.mark.parametrize("model", SHAPES)
def test_devec_reads_files_and_finds_a_quarter_shared(tmp_path, model):
    shapes, peft = SHAPES[model]
    sources = pools.write_pool(tmp_path / "pool", 2, shapes, rank=4, peft=peft)
    adapters = [Adapter.from_pretrained(source) for source in sources]
    assert [len(adapter.modules) for adapter in adapters] == 2 * [len(shapes)]
    splits = decompose(adapters, threshold=0.99).splits
    assert len(splits) == len(shapes)
    assert all(split.shared_rank >= 1 for split in splits)
    stored = sum(pools.tensor_bytes(f) for f in pools.tensor_files(sources[0]))
    tensors = load_file(pools.tensor_files(sources[0])[0])
    assert stored == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("size", [0, 5, 16, 40, 130])
def test_the_floor_writes_as_much_as_is_asked_for(size):
    tensors = [torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(2, 4)]
    written = floor.payload(tensors, size)
    assert 0 <= size - sum(t.nbytes for t in written.values()) < 4


def test_the_floor_reads_and_writes_files(tmp_path, capsys):
    sources = pools.write_pool(tmp_path / "pool", 2, {"module": (8, 6)}, rank=2)
    arguments = ["--out", str(tmp_path / "out"), "--sizes", "56,20,100", "--fsync"]
    floor.main([*arguments, *map(str, sources)])
    assert '"load"' in capsys.readouterr().out
    written = pools.tensor_files(tmp_path / "out")
    assert [pools.tensor_bytes(path) for path in written] == [56, 20, 100]
