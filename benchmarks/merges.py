"""Methods that compute one LoRA of a given rank from a weighted sum of LoRAs, for one module.

Every method returns B and A with scaling 1. The methods on factors are implemented here as their
authors describe them, with `torch.linalg` only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import devec
from devec import Adapter, Delta

MODULE = "module"
ROWS = 512  # rows of dense matrices that are formed at a time

Factors = tuple[Tensor, Tensor]


def deltas(adapters: Sequence[Adapter]) -> list[Delta]:
    """The deltas of the module."""
    return [adapter.modules[MODULE] for adapter in adapters]


def by_devec(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Factors:
    """The factors that the public functions of devec return."""
    merged = devec.compress(devec.combine(adapters, weights), rank=rank).adapter
    delta = merged.modules[MODULE]
    return delta.scaling * delta.B, delta.A


def compressed_by_devec(adapter: Adapter, rank: int) -> Factors:
    """The factors that `devec.compress` returns for one adapter."""
    delta = devec.compress(adapter, rank=rank).adapter.modules[MODULE]
    return delta.scaling * delta.B, delta.A


def stacked(
    adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype = torch.float32
) -> Factors:
    """The factors [w1·s1·B1 … wk·sk·Bk] and [A1; …; Ak] of the weighted sum."""
    of_module = deltas(adapters)
    B = [w * d.scaling * d.B.to(dtype) for w, d in zip(weights, of_module, strict=True)]
    return torch.cat(B, 1), torch.cat([d.A.to(dtype) for d in of_module])


def truncated(left: Tensor, core: Tensor, right: Tensor, rank: int) -> Factors:
    """left·core·right truncated to a rank; left and rightᵀ have orthonormal columns."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    root = S[:rank].sqrt()
    return left @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right


def by_qr(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Factors:
    """Thin QR of the stacked factors and SVD of the core, in float32."""
    B, A = stacked(adapters, weights)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    return truncated(Q_B, R_B @ R_A.mT, Q_A.mT, rank)


def by_core_space(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Factors:
    """Common bases of all B and all A by SVDs, and truncation of the summed cores, in float64.

    Reference: Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core
    Space".
    """
    B, A = stacked(adapters, [1.0] * len(adapters), torch.float64)
    U = torch.linalg.svd(B, full_matrices=False).U
    Vh = torch.linalg.svd(A, full_matrices=False).Vh
    cores = [
        w * d.scaling * (U.mT @ d.B.double()) @ (d.A.double() @ Vh.mT)
        for w, d in zip(weights, deltas(adapters), strict=True)
    ]
    return truncated(U, torch.stack(cores).sum(0), Vh, rank)


class Host(nn.Module):
    """A model of one linear layer without a bias."""

    def __init__(self, rows: int, columns: int) -> None:
        """Create the layer, with a weight of shape (out, in)."""
        super().__init__()
        self.module = nn.Linear(columns, rows, bias=False)


class ByPeft:
    """PEFT's ``add_weighted_adapter(combination_type="svd")``."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Load the adapters under their names."""
        self.names = [adapter.name for adapter in adapters]
        self.model = _loaded(adapters)
        self._numbers = count()

    def __call__(
        self, names: Sequence[str], weights: Sequence[float], rank: int, *, full: bool = True
    ) -> Factors:
        """Merge adapters by name, by a full SVD (PEFT's default) or a thin one."""
        name = f"merged{next(self._numbers)}"
        self.model.add_weighted_adapter(
            list(names),
            list(weights),
            name,
            combination_type="svd",
            svd_rank=rank,
            svd_full_matrices=full,
        )
        layer: Any = self.model.base_model.model.module
        B, A = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        return layer.scaling[name] * B, A


def _loaded(adapters: Sequence[Adapter]) -> PeftModel:
    """A PEFT model with all adapters."""
    first = deltas(adapters)[0]
    model: Any = Host(first.B.shape[0], first.A.shape[1])
    for index, (adapter, delta) in enumerate(zip(adapters, deltas(adapters), strict=True)):
        rank = delta.B.shape[1]
        config = LoraConfig(r=rank, lora_alpha=delta.scaling * rank, target_modules=[MODULE])
        if index:
            model.add_adapter(adapter.name, config)
        else:
            model = get_peft_model(model, config, adapter_name=adapter.name)
        layer: Any = model.base_model.model.module
        layer.lora_B[adapter.name].weight.data.copy_(delta.B)
        layer.lora_A[adapter.name].weight.data.copy_(delta.A)
    return model


def relative_error(
    adapters: Sequence[Adapter], weights: Sequence[float], factors: Factors
) -> float:
    """‖Σ w_i·ΔW_i - B·A‖/‖Σ w_i·ΔW_i‖, computed densely in float64, in blocks of rows."""
    B, A = (part.double() for part in factors)
    difference = norm = 0.0
    for first in range(0, len(B), ROWS):
        rows = slice(first, first + ROWS)
        terms = [
            w * d.scaling * (d.B[rows].double() @ d.A.double())
            for w, d in zip(weights, deltas(adapters), strict=True)
        ]
        truth = torch.stack(terms).sum(0)
        difference += float((truth - B[rows] @ A).square().sum())
        norm += float(truth.square().sum())
    return math.sqrt(difference / norm)


def optimal_error(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> float:
    """The smallest possible error at a rank (Eckart-Young), from singular values in float64."""
    B, A = stacked(adapters, weights, torch.float64)
    S = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
    return float(S[rank:].norm() / S.norm())
