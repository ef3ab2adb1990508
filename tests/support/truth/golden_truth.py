"""What a LoRA file says, dense, naive and in float64: the truth that devec is compared with.

Nothing here is shared with devec. Every family is written out as its formula.
A module id is what is left of a key without its suffix; it is never taken apart.
"""

import json
import math
import re

import numpy as np
from safetensors import safe_open

PAIRS = {  # suffix of B (out, r): suffix of A (r, in); the first that fits counts
    ".lora_up.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_B.default.weight": ".lora_A.default.weight",
    ".lora_B": ".lora_A",
    ".lora.up.weight": ".lora.down.weight",
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".up.weight": ".down.weight",
}
HADA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2")
LOKR = tuple(f".lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
MAGNITUDES = (
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".magnitude",
)
SCALES = (".alpha", ".scale")
COMPONENTS = ("text_encoder_2", "text_encoder", "transformer", "unet")


def _read(path):
    """Tensors in float64 and the metadata of a file."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).double().numpy() for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _families(tensors):
    """Module id → the suffixes of its family, of which the file has some."""
    found = {}
    for key in tensors:
        for up, down in PAIRS.items():
            if key.endswith(up):
                found[key.removesuffix(up)] = (up, down, ".lora_mid.weight")
                break
        for family in (HADA, LOKR):
            for suffix in family:
                if key.endswith(suffix):
                    found[key.removesuffix(suffix)] = family
    return found


def _first_match(patterns, name, otherwise):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _scale(tensors, metadata, module, rank):
    """`.scale`, else `.alpha`/r, else what the header's metadata of the adapter says, else 1."""
    if module + ".scale" in tensors:
        return float(tensors[module + ".scale"])
    if module + ".alpha" in tensors:
        return float(tensors[module + ".alpha"]) / rank
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    component = next((c for c in COMPONENTS if module.startswith(c + ".")), "")
    config = {
        k.removeprefix(component + "."): v for k, v in config.items() if k.startswith(component)
    }
    if "lora_alpha" not in config:
        return 1.0
    name = module.removeprefix(component + ".")
    alpha = _first_match(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _tucker(core, first, second):
    """W[o, i, …] = Σ_pq core[p, q, …] first[p, o] second[q, i]."""
    return np.einsum("pq...,po,qi->oi...", core, first, second)


def _lora(parts):
    up, down, mid = parts
    if mid is not None:
        return _tucker(mid, up.reshape(len(up), -1).T, down.reshape(len(down), -1)), len(mid)
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1), len(down)


def _loha(parts):
    a1, b1, a2, b2, t1, t2 = parts
    if t1 is not None:
        return _tucker(t1, a1, b1) * _tucker(t2, a2, b2), len(b1)
    return (a1 @ b1) * (a2 @ b2), len(b1)


def _lokr(parts):
    w1, a1, b1, w2, a2, b2, t2 = parts
    rank = next((len(b) for b in (b1, b2) if b is not None), None)
    if w1 is None:
        w1 = a1 @ b1
    if w2 is None:
        w2 = a2 @ b2 if t2 is None else _tucker(t2, a2, b2)
    return np.kron(w1.reshape(w1.shape + (1,) * (w2.ndim - 2)), w2), rank


def dense_truth(path):
    """Module id → ΔW `(out, in·kh·kw)`. Of a DoRA, the part without the magnitudes."""
    tensors, metadata = _read(path)
    deltas = {}
    for module, family in _families(tensors).items():
        formula = {HADA: _loha, LOKR: _lokr}.get(family, _lora)
        product, rank = formula([tensors.get(module + suffix) for suffix in family])
        # Of a Kronecker product without low-rank factors, alpha means nothing.
        scale = 1.0 if rank is None else _scale(tensors, metadata, module, rank)
        deltas[module] = scale * product.reshape(len(product), -1)
    return deltas


def bias_truth(path):
    """Module id → Δb `(out,)`, of the modules whose B has a bias."""
    tensors, metadata = _read(path)
    return {
        key.removesuffix(".lora_B.bias"): bias
        * _scale(
            tensors,
            metadata,
            key.removesuffix(".lora_B.bias"),
            len(tensors[key.removesuffix("B.bias") + "A.weight"]),
        )
        for key, bias in tensors.items()
        if key.endswith(".lora_B.bias")
    }


def magnitudes(path):
    """Module id → axis of the weight `(out, in, …)` and magnitudes of a DoRA, one for each index.

    `dora_scale` multiplies the weight as it stands; all others are of outputs.
    """
    tensors, _ = _read(path)
    return {
        key.removesuffix(suffix): (
            1 if suffix == ".dora_scale" and value.shape[0] == 1 else 0,
            value.reshape(-1),
        )
        for key, value in tensors.items()
        for suffix in MAGNITUDES
        if key.endswith(suffix)
    }


def dora_truth(path, weights):
    """Module id → ΔW `(out, in·kh·kw)`, of DoRAs m·(W0 + ΔV)/‖W0 + ΔV‖ - W0.

    `weights` gives W0 `(out, in, kh, kw)` or `(out, in)` of a module id.
    """
    deltas, found = dense_truth(path), magnitudes(path)
    for module, (axis, values) in found.items():
        W = weights(module)
        V = W + deltas[module].reshape(W.shape)
        others = tuple(d for d in range(W.ndim) if d != axis)
        scale = values.reshape([-1 if d == axis else 1 for d in range(W.ndim)])
        norm = np.sqrt((V**2).sum(axis=others, keepdims=True))
        deltas[module] = (scale * V / norm - W).reshape(len(W), -1)
    return deltas


def carried(path):
    """The keys that are neither part of a ΔW or Δb, nor a scale, nor a magnitude."""
    tensors, _ = _read(path)
    read = {
        module + suffix
        for module, family in _families(tensors).items()
        for suffix in (*family, *SCALES, *MAGNITUDES, ".lora_B.bias")
    }
    return sorted(tensors.keys() - read)
