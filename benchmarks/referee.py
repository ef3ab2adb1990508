"""What DoRAs should do, dense and naive, and how far from that is what PEFT does with them.

The truth is the formula in float64, put into a model of its own. What PEFT does is told from its
layers: the weight that one applies is read off what it does to the unit vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments.train_demo_pool import ALPHA_PER_RANK
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from devec.formats.card import adapter_name

Row = dict[str, Any]
Changes = dict[str, Tensor]


def dense_changes(base: nn.Module, path: Path) -> Changes:
    """ΔW of every module of a DoRA by the formula, dense, in float64.

    Args:
        base: The base model.
        path: The adapter, as PEFT wrote it.

    Returns:
        Module → ΔW, shape (out, in).
    """
    stored = load_file(path / "adapter_model.safetensors")
    changes = {}
    for key, m in stored.items():
        if key.endswith(".lora_magnitude_vector"):
            name = key.removesuffix(".lora_magnitude_vector")
            B, A = (stored[f"{name}.lora_{x}.weight"].double() for x in "BA")
            module = name.removeprefix("base_model.model.")
            W = base.get_submodule(module).weight.detach().double()
            V = W + ALPHA_PER_RANK * B @ A
            changes[module] = m.double()[:, None] * V / V.norm(dim=1, keepdim=True) - W
    return changes


def weighted_sum(changes: Sequence[Changes], weights: Sequence[float]) -> Changes:
    """Σ w_i · ΔW_i, module by module."""
    return {
        module: sum(w * c[module] for w, c in zip(weights, changes, strict=True))
        for module in changes[0]
    }


def layer_weights(model: nn.Module) -> Changes:
    """Module → the weight that its layer applies, with whatever adapters are active."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            unit = torch.eye(layer.in_features, dtype=torch.float64)
            applied = layer(unit) - layer(torch.zeros_like(unit[:1]))
            weights[name.removeprefix("base_model.model.")] = applied.mT
    return weights


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images, (n, classes), in float64."""
    return torch.cat([model(batch).logits.double() for batch in torch.split(images, 256)])


@dataclass(frozen=True, eq=False)
class Referee:
    """Compares what PEFT does with the dense truth.

    Attributes:
        base: The base in float64.
        images: Held-out images, (n, 3, SIZE, SIZE).
    """

    base: nn.Module
    images: Tensor

    @torch.no_grad()
    def errors(
        self, model: PeftModel, ways: Mapping[str, Sequence[str]], changes: Changes
    ) -> Iterator[Row]:
        """How far a model is from the truth, with some of its adapters active.

        Args:
            model: The model as PEFT loaded it; it is in float64 afterwards.
            ways: What is compared → the adapters active, in the order in which PEFT applies them.
            changes: Module → ΔW that they should make, dense.

        Yields:
            Relative errors of weights and logits, and the share of images classified otherwise.
        """
        truth = copy.deepcopy(self.base)
        for module, change in changes.items():
            truth.get_submodule(module).weight.add_(change)
        expected = logits(truth, self.images.double())
        found = {what: logits(activated(model, names), self.images) for what, names in ways.items()}
        model.double()
        for what, names in ways.items():
            weights = layer_weights(activated(model, names))
            off = {m: W - truth.get_submodule(m).weight for m, W in weights.items()}
            apart = (found[what] - expected).norm(dim=1) / expected.norm(dim=1)
            changed = found[what].argmax(dim=1) != expected.argmax(dim=1)
            yield {
                "what": what,
                "weights": norm(off) / norm(changes),
                "logits": float(apart.max()),
                "changed": float(changed.double().mean()),
            }


def activated(model: PeftModel, names: Sequence[str]) -> PeftModel:
    """The model with these adapters active, in this order."""
    model.base_model.set_adapter([adapter_name(name) for name in names])
    return model


def norm(changes: Changes) -> float:
    """Frobenius norm over all modules."""
    return float(sum(change.square().sum() for change in changes.values())) ** 0.5
