"""Synthetic pools of adapters with the shapes of real models, in memory and as files.

All adapters of a pool share a quarter of their directions, up to noise. Shapes are (out, in), or
(out, in, height, width) for convolutions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from devec import Adapter, Delta

RANK = 16
NOISE = 0.03  # noise of shared directions in files; even 32 adapters share them (cos² > 0.85)
BLOCK = 1 << 24

Shapes = dict[str, tuple[int, ...]]
Level = tuple[str, int, int, int]


def flux_shapes(width: int = 3072, double: int = 19, single: int = 38) -> Shapes:
    """The linear layers in the blocks of the Flux transformer; 494 of them at real size."""
    d = width
    of_double = {
        **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attn.add_{name}_proj": (d, d) for name in "qkv"},
        "attn.to_add_out": (d, d),
        **{f"{ff}.net.0.proj": (4 * d, d) for ff in ("ff", "ff_context")},
        **{f"{ff}.net.2": (d, 4 * d) for ff in ("ff", "ff_context")},
        **{f"{norm}.linear": (6 * d, d) for norm in ("norm1", "norm1_context")},
    }
    of_single = {
        **{f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")},
        "norm.linear": (3 * d, d),
        "proj_mlp": (4 * d, d),
        "proj_out": (d, 5 * d),
    }
    blocks = (
        ("transformer_blocks", double, of_double),
        ("single_transformer_blocks", single, of_single),
    )
    return {
        f"{name}.{i}.{module}": shape
        for name, count, modules in blocks
        for i in range(count)
        for module, shape in modules.items()
    }


def transformer_layer(d: int, context: int) -> Shapes:
    """The ten linear layers of a transformer block in the UNets of Stable Diffusion."""
    own = {f"attn1.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    cross = {f"attn2.{name}": (d, d) for name in ("to_q", "to_out.0")}
    cross |= {f"attn2.{name}": (d, context) for name in ("to_k", "to_v")}
    return {**own, **cross, "ff.net.0.proj": (8 * d, d), "ff.net.2": (d, 4 * d)}


def unet_shapes(levels: Sequence[Level], context: int, kernel: tuple[int, ...] = ()) -> Shapes:
    """The linear layers of all transformers in a UNet, with their input and output projections.

    Args:
        levels: For each block: name, width, number of transformers, number of layers of each.
        context: Width of the text embeddings.
        kernel: Height and width of the projections if they are convolutions.

    Returns:
        Module → shape.
    """
    shapes: Shapes = {}
    for block, d, transformers, layers in levels:
        for i in range(transformers):
            name = f"{block}.attentions.{i}"
            shapes |= {f"{name}.{proj}": (d, d, *kernel) for proj in ("proj_in", "proj_out")}
            for j in range(layers):
                for module, shape in transformer_layer(d, context).items():
                    shapes[f"{name}.transformer_blocks.{j}.{module}"] = shape
    return shapes


def sd15_shapes(width: int = 320, text: int = 768, layers: int = 12) -> Shapes:
    """The 192 modules of the UNet and the 72 of the text encoder of Stable Diffusion 1.5."""
    levels = [
        *((f"down_blocks.{i}", width << i, 2, 1) for i in range(3)),
        ("mid_block", width << 2, 1, 1),
        *((f"up_blocks.{3 - i}", width << i, 3, 1) for i in (2, 1, 0)),
    ]
    encoder: Shapes = {f"self_attn.{name}_proj": (text, text) for name in ("q", "k", "v", "out")}
    encoder |= {"mlp.fc1": (4 * text, text), "mlp.fc2": (text, 4 * text)}
    return {
        **{f"unet.{name}": s for name, s in unet_shapes(levels, text, (1, 1)).items()},
        **{
            f"text_encoder.text_model.encoder.layers.{i}.{name}": shape
            for i in range(layers)
            for name, shape in encoder.items()
        },
    }


def sdxl_shapes(width: int = 640, context: int = 2048, depth: int = 10) -> Shapes:
    """The 722 linear layers in the 70 transformer layers of SDXL's UNet."""
    levels = [
        ("down_blocks.1", width, 2, 2),
        ("down_blocks.2", 2 * width, 2, depth),
        ("mid_block", 2 * width, 1, depth),
        ("up_blocks.0", 2 * width, 3, depth),
        ("up_blocks.1", width, 3, 2),
    ]
    return {f"unet.{name}": shape for name, shape in unet_shapes(levels, context).items()}


def llama_shapes(layers: int = 32, width: int = 4096, hidden: int = 11008) -> Shapes:
    """The linear layers of LLaMA-2-7B, with PEFT's names."""
    layer = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")}
    layer["mlp.down_proj"] = (width, hidden)
    return {
        f"base_model.model.model.layers.{i}.{name}": shape
        for i in range(layers)
        for name, shape in layer.items()
    }


def in_memory(
    k: int, shapes: Shapes, dtype: torch.dtype = torch.float32, rank: int = RANK
) -> list[Adapter]:
    """`k` adapters in memory that share a quarter of their directions, with noise of a tenth."""
    adapters = []
    for i in range(k):
        deltas = {}
        for index, (module, (rows, columns)) in enumerate(shapes.items()):
            common = torch.Generator().manual_seed(index)
            own = torch.Generator().manual_seed(1_000_000 + 1000 * i + index)
            B = torch.randn(rows, rank, generator=own)
            B[:, : rank // 4] *= 0.1
            B[:, : rank // 4] += torch.randn(rows, rank // 4, generator=common)
            A = torch.randn(rank, columns, generator=own) / columns**0.5
            deltas[module] = Delta(B.to(dtype), A.to(dtype), scaling=0.5)
        adapters.append(Adapter(f"adapter{i}", deltas))
    return adapters


def file_tensors(
    index: int, shapes: Shapes, rank: int, block: Tensor, condition: float = 1.0
) -> dict[str, Tensor]:
    """The tensors of one adapter in bfloat16, with the keys of PEFT and diffusers.

    Args:
        index: Index of the adapter in the pool.
        shapes: Module → shape.
        rank: Rank of every module.
        block: Random numbers to copy from, which is faster than drawing new ones.
        condition: Approximate condition number of B; 1 for that of a random matrix. A is random, as
            training hardly changes it.

    Returns:
        Key → tensor.
    """
    tensors = {}
    mixed = _mixing(rank, condition)
    shared = max(1, rank // 4)
    for number, (module, (rows, columns, *kernel)) in enumerate(shapes.items()):
        common = torch.Generator().manual_seed(number)
        own = torch.Generator().manual_seed(1_000_000 * (index + 1) + number)
        B = _drawn((rows, rank), block, own)
        B[:, :shared] = _drawn((rows, shared), block, common) + NOISE * B[:, :shared]
        A = _drawn((rank, columns, *kernel), block, own) / columns**0.5
        if condition != 1:
            B = B @ mixed
        tensors[f"{module}.lora_A.weight"] = A.bfloat16()
        tensors[f"{module}.lora_B.weight"] = B.view(rows, rank, *(1 for _ in kernel)).bfloat16()
    return tensors


def _mixing(rank: int, condition: float) -> Tensor:
    """A square matrix with a condition number that scaling its rows or columns does not improve."""
    first, second = (
        torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed))).Q
        for seed in (0, 1)
    )
    return first * torch.logspace(0, -math.log10(condition), rank) @ second


def _drawn(shape: tuple[int, ...], block: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of a part of the block, beginning at a random offset."""
    size = torch.Size(shape).numel()
    start = int(torch.randint(len(block) - size, (), generator=generator))
    return block[start : start + size].view(shape).clone()


def write_pool(
    folder: Path,
    k: int,
    shapes: Shapes,
    rank: int = RANK,
    *,
    peft: bool = False,
    condition: float = 1.0,
) -> list[Path]:
    """Write a pool of `k` adapters to a folder, and return their files or directories.

    Args:
        folder: The folder, which is created.
        k: Number of adapters.
        shapes: Module → shape, with the names of the file format.
        rank: Rank of every module.
        peft: Whether to write PEFT directories; single files otherwise.
        condition: Approximate condition number of B (see `file_tensors`).
    """
    folder.mkdir()
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    sources = []
    for index in range(k):
        tensors = file_tensors(index, shapes, rank, block, condition)
        if peft:
            source = folder / f"adapter{index}"
            source.mkdir()
            (source / "adapter_config.json").write_text(_config(shapes, rank), encoding="utf-8")
            save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            source = folder / f"adapter{index}.safetensors"
            save_file(tensors, source, metadata={"format": "pt"})
        sources.append(source)
    return sources


def _config(shapes: Shapes, rank: int) -> str:
    """PEFT's ``adapter_config.json``."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank // 2,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in shapes}),
    }
    return json.dumps(config, indent=2)


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files at a path, sorted: the path itself, or all files below it."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def tensor_bytes(path: Path) -> int:
    """The size in bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header
