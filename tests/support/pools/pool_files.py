"""Pools as PEFT directories, written by hand and read without devec."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support.pools.random_pools import Pool, array, product, truth_of_dora, truth_of_lora

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base_model(pool):
    """A module that has the base weights under their names."""
    root = nn.Module()
    for name, held in pool.bases.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Linear(*held.tensor.shape[::-1], bias=False)
        layer.weight = nn.Parameter(held.tensor, requires_grad=False)
        parent.add_module(last, layer)
    return root


def as_stored(delta):
    """A delta with the scaling that alpha/r gives, and alpha."""
    alpha = delta.scaling * delta.rank
    return dataclasses.replace(delta, scaling=alpha / delta.rank), alpha


def write_pool(pool, folder):
    """Write every adapter as a PEFT directory.

    Returns:
        Name → directory, and the pool with the truth of what was written.
    """
    paths, truth = {}, {}
    for adapter in pool.adapters:
        stored = {m: as_stored(delta) for m, delta in adapter.modules.items()}
        truth[adapter.name] = {
            m: (truth_of_lora if d.gain is None else truth_of_dora)(
                d, pool.truth[adapter.name][m].text.removesuffix(", DoRA out")
            )
            for m, (d, _) in stored.items()
        }
        paths[adapter.name] = Path(folder) / adapter.name
        write_adapter(stored, paths[adapter.name])
    return paths, dataclasses.replace(pool, truth=truth)


def write_adapter(stored, path):
    """Write one adapter: module → delta and alpha."""
    tensors = {}
    for module, (delta, _) in stored.items():
        key = f"{PREFIX}{module}."
        tensors[key + "lora_A.weight"], tensors[key + "lora_B.weight"] = delta.A, delta.B
        if delta.bias is not None:
            tensors[key + "lora_B.bias"] = delta.bias
        if delta.gain is not None:
            tensors[key + "lora_magnitude_vector"] = delta.gain.values
    first, alpha = next(iter(stored.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(m): d.rank for m, (d, _) in stored.items()},
        "alpha_pattern": {re.escape(m): a for m, (_, a) in stored.items()},
        "target_modules": list(stored),
        "lora_bias": any(d.bias is not None for d, _ in stored.values()),
        "use_dora": any(d.gain is not None for d, _ in stored.values()),
    }
    path.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config))


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """A change that was read, and how far rounding to its storage type may have moved it."""

    W: np.ndarray
    bias: np.ndarray
    off: float
    bias_off: float


def read_adapter(path, pool: Pool):
    """Module → change of a PEFT directory, by PEFT's rules."""
    tensors = load_file(Path(path) / WEIGHTS)
    config = json.loads((Path(path) / CONFIG).read_text())
    found = {}
    ends = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector.weight"
    for key in [k for k in tensors if k.endswith(ends[0])]:
        stem = key.removesuffix(ends[0])
        module = stem.removeprefix(PREFIX).rstrip(".")
        A, B, b, m = (tensors.pop(stem + end, None) for end in ends)
        m = tensors.pop(stem + "lora_magnitude_vector", m)
        rank = first_match(config.get("rank_pattern"), module, config["r"])
        assert A.shape[0] == B.shape[1] == rank, f"{module}: rank {rank}, B {tuple(B.shape)}"
        alpha = first_match(config.get("alpha_pattern"), module, config["lora_alpha"])
        s = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        assert (m is not None) == bool(config.get("use_dora")), module
        W0 = pool.bases[module].tensor
        found[module] = change(A, B, s, b, m, array(W0))
    assert not tensors, f"keys that mean nothing: {list(tensors)}"
    return found


def first_match(pattern, name, otherwise):
    """The value of the first pattern that matches, as PEFT matches it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def change(A, B, s, b, m, W0):
    """The change that tensors make, and how far rounding of them may have moved it."""
    eps = max(torch.finfo(t.dtype).eps for t in (A, B))
    tiny = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in (A, B))
    A, B = array(A), array(B)
    W = product(B, A, s)
    D = np.ones((len(W), 1))
    if m is not None:
        V = W0 + W
        D = (array(m) / np.linalg.norm(V, axis=1))[:, None]
        W = D * V - W0
    a, c = np.linalg.norm(A, axis=1), np.linalg.norm(D * B, axis=0)
    # relative to each number, but for those that are below the smallest normal one
    lost = tiny * (np.sqrt(len(B)) * np.abs(D).max() * a.sum() + np.sqrt(A.shape[1]) * c.sum())
    bias = np.zeros(len(W)) if b is None else s * array(b)
    of_m = 0.0 if m is None else torch.finfo(m.dtype).eps * float(np.linalg.norm(W + W0))
    return Read(
        W=W,
        bias=bias,
        off=abs(s) * (2 * eps * float(a @ c) + lost) + 2 * of_m,
        bias_off=eps * float(np.linalg.norm(bias)) + abs(s) * tiny * np.sqrt(len(bias)),
    )
