"""Adapters of every kind that PEFT can make, made by PEFT itself."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Flattened(nn.Module):
    """A layer with inputs of a shape of its own, so that every kind is called alike."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        return self.layer(x.reshape(len(x), *self.shape)).flatten(1)


class Experts(nn.Module):
    """Two parameters of three experts; linear in each, so that effects add up."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 26, 12) / 4)
        self.down = nn.Parameter(torch.randn(3, 28, 12) / 4)

    def forward(self, x):
        return torch.cat([x @ w.T for weight in (self.up, self.down) for w in weight], dim=-1)


class TwoLayers(nn.Module):
    """Two layers of one kind, so that patterns have something to tell apart."""

    def __init__(self, make, shape):
        super().__init__()
        self.first, self.second = Flattened(make(), shape), Flattened(make(), shape)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=1)


class Embedded(nn.Module):
    """Two embeddings of the same tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(29, 22), nn.Embedding(29, 22)

    def forward(self, tokens):
        return torch.cat([self.first(tokens), self.second(tokens)], dim=-1)


class WithHead(nn.Module):
    """A layer to adapt and a head to train whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 30), nn.Linear(24, 30)
        self.head = nn.Linear(30, 7)

    def forward(self, x):
        return self.head(self.first(x) + self.second(x))


def _linear():
    return TwoLayers(lambda: nn.Linear(24, 30), (24,))


HOSTS = {
    "linear": (_linear, (24,)),
    "conv1d-gpt2": (lambda: TwoLayers(lambda: Conv1D(30, 24), (24,)), (24,)),
    "conv1d": (lambda: TwoLayers(lambda: nn.Conv1d(4, 26, 3), (4, 6)), (24,)),
    "conv2d": (lambda: TwoLayers(lambda: nn.Conv2d(3, 26, (2, 3), stride=2), (3, 4, 6)), (72,)),
    "conv3d": (lambda: TwoLayers(lambda: nn.Conv3d(2, 26, 2), (2, 3, 3, 3)), (54,)),
    "embedding": (Embedded, None),
    "experts": (lambda: nn.Sequential(Experts()), (12,)),
}


def make_base(kind):
    """The base model of a kind, the same each time."""
    torch.manual_seed(7)
    return HOSTS[kind][0]().eval()


def make_inputs(kind, seed=0):
    """Inputs for the base model of a kind."""
    generator = torch.Generator().manual_seed(seed)
    shape = HOSTS[kind][1]
    if shape is None:
        return torch.arange(29)[None]
    return torch.randn(5, *shape, generator=generator)


def target_fields(kind):
    """The fields of LoraConfig that name what is adapted."""
    if kind == "experts":
        return {"target_modules": [], "target_parameters": ["0.up", "0.down"]}
    return {"target_modules": ["first", "second"] if kind == "embedding" else ["layer"]}


@dataclass
class Variant:
    """How the adapters of a pool are configured."""

    config: dict = field(default_factory=dict)
    ranks: tuple[int, ...] = (6, 4, 5, 6, 4)
    dtype: torch.dtype = torch.float32
    zero: bool = False
    deficient: bool = False


VARIANTS = {
    "plain": Variant(),
    "rslora": Variant({"use_rslora": True}),
    "patterns": Variant(
        {
            "rank_pattern": {"second.*": 3, "0.*": 3},
            "alpha_pattern": {r"^second": 7, r"second\.layer": 5, "0.*": 9},
        }
    ),
    "bias": Variant({"lora_bias": True}),
    "zero": Variant(zero=True),
    "deficient": Variant(deficient=True),
    "float16": Variant(dtype=torch.float16),
    "bfloat16": Variant(dtype=torch.bfloat16),
}


def supports(kind, variant):
    """Whether PEFT can make this variant of this kind."""
    return not (variant == "bias" and kind in ("embedding", "experts"))


def factor_pairs(model, name):
    """The (A, B) parameters of an adapter of a PEFT model, each as (rank, …) and (…, rank)."""
    for module in model.modules():
        for A, B in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if name in getattr(module, A, {}):
                a, b = getattr(module, A)[name], getattr(module, B)[name]
                yield module, getattr(a, "weight", a), getattr(b, "weight", b)


def fill(model, name, seed, shared_seed=99, shared=2, noise=0.1):
    """Random factors, `shared` columns of each B nearly the same in all adapters of a pool."""
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (module, A, B) in enumerate(factor_pairs(model, name)):
            common = torch.Generator().manual_seed(shared_seed + index)
            A.copy_(torch.randn(A.shape, generator=own) / 3)
            B.copy_(torch.randn(B.shape, generator=own) / 3)
            experts = getattr(module, "num_experts", 1)
            wide = shared * experts
            directions = torch.randn((B.shape[0], wide), generator=common)
            jitter = torch.randn(directions.shape, generator=own)
            B[:, :wide] = (directions + noise * jitter).reshape(B[:, :wide].shape) / 3
            bias = getattr(getattr(module, "lora_B", {}), name, None) if experts == 1 else None
            if bias is not None and getattr(bias, "bias", None) is not None:
                bias.bias.copy_(torch.randn(bias.bias.shape, generator=own))


def save_adapter(path, kind, variant, index, base=None, **fields):
    """One adapter of a pool, saved by PEFT."""
    v = VARIANTS[variant] if isinstance(variant, str) else variant
    rank = v.ranks[index % len(v.ranks)]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank + 1, **{**target_fields(kind), **v.config, **fields}
    )
    model = get_peft_model(make_base(kind) if base is None else base, config)
    fill(model, "default", seed=1000 + index)
    with torch.no_grad():
        for _, _, B in factor_pairs(model, "default"):
            if v.zero and index == 1:
                B.zero_()
            if v.deficient:
                B[:, -1] = 2 * B[:, 0]
    for _, A, B in factor_pairs(model, "default"):
        A.data, B.data = A.data.to(v.dtype), B.data.to(v.dtype)
    for module in model.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            layer = module.lora_B["default"]
            if getattr(layer, "bias", None) is not None:
                layer.bias.data = layer.bias.data.to(v.dtype)
    model.save_pretrained(str(path))
    return Path(path)


def make_pool(directory, kind="linear", variant="plain", k=2, **fields):
    """A pool of k adapters saved by PEFT; returns their directories."""
    names = "abcde"[:k]
    return [
        save_adapter(Path(directory) / name, kind, variant, i, **fields)
        for i, name in enumerate(names)
    ]


def save_kohya(path, index, rank=4, shared=2, noise=0.1):
    """An adapter as kohya's trainers write one; some columns of B are nearly the same in all."""
    own = torch.Generator().manual_seed(2000 + index)
    common = torch.Generator().manual_seed(98)
    tensors = {}
    for block in range(2):
        for layer, (out, columns) in {"attn1_to_q": (40, 32), "ff_net_2": (36, 28)}.items():
            name = f"lora_unet_mid_block_attentions_0_transformer_blocks_{block}_{layer}"
            up = torch.randn(out, rank, generator=own)
            jitter = noise * torch.randn(out, shared, generator=own)
            up[:, :shared] = torch.randn(out, shared, generator=common) + jitter
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=own)
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"ss_output_name": path.stem, "ss_network_dim": str(rank)})
    return path


def dense_deltas(model, name):
    """Module → (ΔW, Δb) of an adapter of a PEFT model, output side first, in float64.

    From PEFT's parameters by the formulas of its layers, one expert at a time.
    """
    deltas = {}
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.")
        for pair in ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"):
            if name not in getattr(module, pair[0], {}):
                continue
            A, B = (getattr(module, p)[name] for p in pair)
            bias = getattr(B, "bias", None)
            A, B = (getattr(f, "weight", f).detach().double().numpy() for f in (A, B))
            s = module.scaling[name]
            E = getattr(module, "num_experts", 1)
            r = len(A) // E
            for e in range(E):
                b, a = B[:, e::E], A[e * r : (e + 1) * r]
                W = s * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
                key = path if E == 1 else f"{path}[{e}]"
                deltas[key] = W, None if bias is None else s * bias.detach().double().numpy()
    return deltas


def relative_error(got, want):
    """‖got - want‖/‖want‖, or ‖got‖ where nothing is wanted."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (scale if scale > 0 else 1.0)


def dense(delta):
    """ΔW of a Delta, in float64."""
    return (delta.scaling * delta.B.double() @ delta.A.double()).cpu().numpy()
