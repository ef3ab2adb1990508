"""Tensors, headers and the register of the golden files."""

import json
import zlib

import torch
from safetensors import safe_open

from support.models.module_names import find_modules
from support.models.pipelines import make_pipeline

FILES = {}


def golden(function):
    """Registers what makes the file of the function's name: it returns tensors and metadata."""
    FILES[function.__name__] = function
    return function


def header_sorted(data):
    """The same file with its header's keys in order; safetensors writes metadata in any order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read(path):
    """Tensors and metadata of a file."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def seeded(name):
    """A generator that belongs to a name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def draw(name, *shape):
    """Normal numbers that belong to a name."""
    return torch.randn(shape, generator=seeded(name))


def factors(name, shape, rank):
    """Up and down for a weight of a shape; the effect is about half as large as the weight."""
    rows, columns, *kernel = shape
    down = draw(name + " down", rank, columns, *kernel) / (columns * rank) ** 0.5
    up = draw(name + " up", rows, rank, *(1 for _ in kernel)) / 2
    return up, down


def shape_in(pipeline, module_id):
    """The shape of the weight that an id speaks of, of all its parts if it is fused."""
    modules = find_modules(pipeline, module_id)
    return (sum(len(m.weight) for m in modules), *modules[0].weight.shape[1:])


def lora(shapes, suffixes, ranks=(2,), alpha=None, dtype=torch.float32):
    """Factors for every id, ranks in turn; with an alpha for each if one is given."""
    tensors = {}
    for index, (module_id, shape) in enumerate(shapes.items()):
        rank = ranks[index % len(ranks)]
        for suffix, factor in zip(suffixes, factors(module_id, shape, rank), strict=True):
            tensors[module_id + suffix] = factor.to(dtype)
        if alpha is not None:
            tensors[module_id + ".alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors


def lora_in(kind, ids, suffixes, **fields):
    """`lora` for modules of a pipeline."""
    pipeline = make_pipeline(kind)
    return lora({i: shape_in(pipeline, i) for i in ids.split()}, suffixes, **fields)


WAN = {  # of a model of width 16
    "blocks.0.self_attn.q": (16, 16),
    "blocks.0.self_attn.o": (16, 16),
    "blocks.1.cross_attn.k": (16, 16),
    "blocks.1.ffn.0": (40, 16),
    "blocks.1.ffn.2": (16, 40),
}


def fill(model, name):
    """Random values for all that is trained, magnitudes near what they were."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            values = draw(f"{name} {key}", *parameter.shape)
            if "magnitude" in key or "dora_scale" in key:
                parameter *= 1 + values.abs() / 4
            else:
                product_of_many = "hada" in key or "lokr" in key
                parameter.copy_(values / (2 if product_of_many else 3))
