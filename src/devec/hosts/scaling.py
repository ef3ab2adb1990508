"""Telling whether the scaling of a live adapter includes a mixing weight or a hotswapped alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from devec.errors import IncompatibleError, warn
from devec.hosts.layers import walk

# Relative tolerances by whether the scaling is a tensor, which is float32. Floats differ from
# alpha/r by the rounding of weights that were set and reset.
_RTOL = {False: 1e-9, True: 1e-6}


class _ScaledLayer(NamedTuple):
    """A layer whose current scaling of an adapter is not alpha/r.

    Attributes:
        ratio: The current scaling divided by alpha/r.
        alpha: The alpha that would give the current scaling at the effective rank.
        plausible: Whether that alpha is one that adapters have: a positive multiple of 0.5.
        as_tensor: Whether the scaling is a tensor, as after PEFT's preparation for hotswapping.
        swapped: Whether the effective rank of the factors is not the rank of the layer.
        encoder: Whether it is in a text encoder of a pipeline, where diffusers does not hotswap.
        weighted: Whether another adapter that is active in the layer has a mixing weight.
    """

    ratio: float
    alpha: float
    plausible: bool
    as_tensor: bool
    swapped: bool
    encoder: bool
    weighted: bool


def keeps_current_scaling(
    models: Mapping[str, nn.Module], name: str, label: str, *, mixes: bool
) -> bool:
    """Whether to read an adapter with its current scaling; with alpha/r if not.

    `set_scale`, `set_adapters` and `scale_layer` multiply the scaling of layers by a weight, which
    is no part of an adapter. Hotswapping sets it to alpha/r of the adapter that is swapped in. Both
    leave everything else unchanged: the layers' ranks and alphas, and the configuration.

    ============================================  ==============================================
    Layers whose scaling is not alpha/r           Scaling that is read
    ============================================  ==============================================
    none                                          alpha/r
    floats, some implausible (0.7 at rank 4)      alpha/r: it is a weight
    floats in a text encoder of a pipeline        alpha/r: it is a weight; diffusers does not
                                                  hotswap there
    tensors, some implausible                     refused: a weight times an unknown alpha
    tensors, and factors of another rank          the current one: hotswapped after preparation
    tensors                                       the current one, with a warning
    floats, and another active one has a weight   alpha/r, with a warning (diffusers)
    floats, and factors of another rank           the current one, with a warning
    floats in a PeftModel or of transformers      the current one, with a warning: these hosts
                                                  can hotswap and have no call for weights
    floats in diffusers                           refused: a weight or a hotswapped alpha
    ============================================  ==============================================

    A scaling is plausible if a positive multiple of 0.5 as alpha gives it at the rank of the
    factors. Layers whose factors are zero are ignored.

    Args:
        models: The models of a host by name.
        name: Name of the adapter.
        label: The host, for messages.
        mixes: Whether the host has a call that sets mixing weights, as diffusers does.

    Returns:
        True for the current scaling, False for alpha/r.

    Raises:
        IncompatibleError: If a weight cannot be told from a hotswapped alpha.
    """
    scaled = _scaled_layers(models, name, mixes=mixes)
    floats = [layer for layer in scaled if not layer.as_tensor]
    tensors = [layer for layer in scaled if layer.as_tensor]
    if not scaled or any(layer.encoder or not layer.plausible for layer in floats):
        return False
    if any(not layer.plausible for layer in tensors):
        raise IncompatibleError(_ambiguous(name, label, tensors[0]))
    if any(layer.swapped for layer in tensors) and not floats:
        return True
    is_weight = mixes and any(layer.weighted for layer in floats)
    if mixes and floats and not is_weight and not any(layer.swapped for layer in floats):
        raise IncompatibleError(_ambiguous(name, label, floats[0]))
    _warn_of_scaling(name, label, scaled[0], is_weight=is_weight)
    return not is_weight


def scaling_of(layer: Any, name: str, *, current: bool) -> float:  # noqa: ANN401
    """The scaling of an adapter in a layer: the current one, or alpha/r, also where they agree."""
    now, own = float(layer.scaling[name]), _alpha_over_rank(layer, name)
    same = math.isclose(now, own, rel_tol=_RTOL[isinstance(layer.scaling[name], Tensor)])
    return now if current and not same else own


def _alpha_over_rank(layer: Any, name: str) -> float:  # noqa: ANN401
    """The scaling that a layer was created with: alpha/r, or alpha/√r for rsLoRA."""
    rank = layer.r[name]
    own: float = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)
    return own


def _scaled_layers(
    models: Mapping[str, nn.Module], name: str, *, mixes: bool
) -> list[_ScaledLayer]:
    """The layers whose current scaling of an adapter is not alpha/r."""
    from peft.tuners.lora import LoraLayer

    scaled = []
    for slot, model in models.items():
        for _, layer in walk(model):
            if not isinstance(layer, LoraLayer) or name not in layer.scaling:
                continue
            rank = _effective_rank(layer, name) if _is_scaled(layer, name) else 0
            if rank:
                encoder = mixes and slot.startswith("text_encoder")
                scaled.append(_scaled_layer(layer, name, rank, encoder=encoder))
    return scaled


def _is_scaled(layer: Any, name: str) -> bool:  # noqa: ANN401
    """Whether the current scaling of an adapter differs from alpha/r by more than rounding."""
    return scaling_of(layer, name, current=True) != _alpha_over_rank(layer, name)


def _scaled_layer(layer: Any, name: str, rank: int, *, encoder: bool) -> _ScaledLayer:  # noqa: ANN401
    """The attributes of a layer whose current scaling of an adapter is not alpha/r."""
    alpha, plausible = _implied_alpha(layer, name, rank)
    active = layer.active_adapters
    others = [other for other in active if other != name and other in layer.scaling]
    return _ScaledLayer(
        ratio=float(layer.scaling[name]) / (_alpha_over_rank(layer, name) or math.nan),
        alpha=alpha,
        plausible=plausible,
        as_tensor=isinstance(layer.scaling[name], Tensor),
        swapped=rank != layer.r[name],
        encoder=encoder,
        weighted=name in active and any(_has_mixing_weight(layer, other) for other in others),
    )


def _has_mixing_weight(layer: Any, name: str) -> bool:  # noqa: ANN401
    """Whether only a mixing weight explains the current scaling of an adapter in a layer."""
    rank = _effective_rank(layer, name) if _is_scaled(layer, name) else 0
    return bool(rank) and not _implied_alpha(layer, name, rank)[1]


def _implied_alpha(layer: Any, name: str, rank: int) -> tuple[float, bool]:  # noqa: ANN401
    """The alpha that gives the current scaling at a rank, and whether it is plausible."""
    scaling = layer.scaling[name]
    alpha = float(scaling) * (math.sqrt(rank) if layer.use_rslora[name] else rank)
    twice, rtol = 2 * alpha, _RTOL[isinstance(scaling, Tensor)]
    in_range = math.isfinite(twice) and twice > 0.5
    return alpha, in_range and math.isclose(twice, round(twice), rel_tol=rtol)


def _effective_rank(layer: Any, name: str) -> int:  # noqa: ANN401
    """The rank of an adapter's factors without the zeros that hotswapping pads them with."""
    from accelerate.utils import align_module_device

    if name in layer.lora_embedding_A:
        return _unpadded_rank(layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer)
    A, B = layer.lora_A[name], layer.lora_B[name]
    with align_module_device(A), align_module_device(B):  # they may be offloaded
        return _unpadded_rank(A.weight, B.weight, layer)


def _unpadded_rank(A: Tensor, B: Tensor, layer: Any) -> int:  # noqa: ANN401
    """The rank of factors without trailing rows of A and columns of B that are both zero."""
    if B.shape[1] != A.shape[0] or getattr(layer, "num_experts", 1) > 1:  # factors of all experts
        return A.shape[0] // getattr(layer, "num_experts", 1)
    rows, columns = A.detach().flatten(1), B.detach().transpose(0, 1).flatten(1)
    nonzero = ((rows != 0).any(1) | (columns != 0).any(1)).nonzero()
    return int(nonzero.max()) + 1 if len(nonzero) else 0


def _ambiguous(name: str, label: str, layer: _ScaledLayer) -> str:
    """The message for a scaling that may be a mixing weight or a hotswapped alpha."""
    return (
        f"the layers of {name!r} in {label} run at {layer.ratio:.6g} times their own alpha/rank: "
        "that is a mixing weight (set_adapters, set_scale, scale_layer), or the alpha of an "
        f"adapter that was hotswapped ({layer.alpha:.6g}), and nothing in memory tells which. Set "
        "the weight to 1 (set_adapters(names), set_scale(name, 1.0), unscale_layer()), or, if the "
        "adapter was hotswapped, read its file (devec.Adapter.from_pretrained)"
    )


def _warn_of_scaling(name: str, label: str, layer: _ScaledLayer, *, is_weight: bool) -> None:
    """Warn which of two possible readings of a scaling was chosen."""
    if is_weight:
        reading = (
            f"is taken for a mixing weight, as another active adapter has one, and left out; if "
            f"{name!r} was hotswapped, read its file (devec.Adapter.from_pretrained)"
        )
    else:
        reading = (
            f"is taken for the alpha of a hotswapped adapter ({layer.alpha:.6g}); if it is a "
            "weight, set it back to 1 (set_scale(name, 1.0), unscale_layer()) and read it again"
        )
    warn(
        f"the layers of {name!r} in {label} run at {layer.ratio:.6g} times their own alpha/rank, "
        f"which {reading}"
    )
