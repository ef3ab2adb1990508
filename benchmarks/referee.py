"""Errors of DoRAs in PEFT models relative to a dense reference.

The reference is a model with the weights of the formula, computed in float64. The weights that a
PEFT model applies are measured by feeding unit vectors through its layers.
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
    """Module → ΔW (out, in) of a DoRA that PEFT wrote, dense in float64, by the formula."""
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
    """Module → Σ w_i · ΔW_i."""
    return {
        module: sum(w * c[module] for w, c in zip(weights, changes, strict=True))
        for module in changes[0]
    }


def layer_weights(model: nn.Module) -> Changes:
    """Module → the weight that its layer applies with the active adapters."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            unit = torch.eye(layer.in_features, dtype=torch.float64)
            applied = layer(unit) - layer(torch.zeros_like(unit[:1]))
            weights[name.removeprefix("base_model.model.")] = applied.mT
    return weights


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of all images, (n, classes), converted to float64."""
    return torch.cat([model(batch).logits.double() for batch in torch.split(images, 256)])


@dataclass(frozen=True, eq=False)
class Referee:
    """Compares PEFT models with the dense reference.

    Attributes:
        base: The base model in float64.
        images: Held-out images, (n, 3, SIZE, SIZE).
    """

    base: nn.Module
    images: Tensor

    @torch.no_grad()
    def errors(
        self, model: PeftModel, ways: Mapping[str, Sequence[str]], changes: Changes
    ) -> Iterator[Row]:
        """Measure the errors of a model with some of its adapters active.

        Args:
            model: The model as loaded by PEFT; it is converted to float64.
            ways: Label → names of the active adapters, in the order in which PEFT applies them.
            changes: Module → expected dense ΔW.

        Yields:
            Relative errors of weights and logits, and the fraction of images classified
            differently.
        """
        truth = copy.deepcopy(self.base)
        for module, change in changes.items():
            truth.get_submodule(module).weight.add_(change)
        expected = logits(truth, self.images.double())
        actual = {
            what: logits(activated(model, names), self.images) for what, names in ways.items()
        }
        model.double()
        for what, names in ways.items():
            weights = layer_weights(activated(model, names))
            differences = {m: W - truth.get_submodule(m).weight for m, W in weights.items()}
            errors = (actual[what] - expected).norm(dim=1) / expected.norm(dim=1)
            changed = actual[what].argmax(dim=1) != expected.argmax(dim=1)
            yield {
                "what": what,
                "weights": norm(differences) / norm(changes),
                "logits": float(errors.max()),
                "changed": float(changed.double().mean()),
            }


def activated(model: PeftModel, names: Sequence[str]) -> PeftModel:
    """Activate adapters of a model in this order, and return the model."""
    model.base_model.set_adapter([adapter_name(name) for name in names])
    return model


def norm(changes: Changes) -> float:
    """The Frobenius norm over all modules."""
    return float(sum(change.square().sum() for change in changes.values())) ** 0.5
