"""Whether the scaling of a live adapter's layers is its own, or has a mixing weight in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from devec.errors import IncompatibleError, warn
from devec.hosts.layers import walk

# Relative: floats differ by rounding of weights that were set and set back, tensors are float32.
_RTOL = {False: 1e-9, True: 1e-6}


class _Changed(NamedTuple):
    """A layer whose scaling of an adapter is not the one of its rank and alpha.

    Attributes:
        ratio: The scaling, relative to that of its rank and alpha.
        alpha: The alpha that gives an adapter of the factors' rank this scaling.
        possible: Whether adapters have such alphas: positive multiples of a half.
        as_tensor: Whether the scaling is a tensor, as PEFT's preparation for hotswapping leaves it.
        swapped: Whether the factors are of another rank than the layer was made for.
        encoder: Whether it is in a text encoder of a pipeline, in which diffusers hotswaps nothing.
        weighted: Whether another adapter that is active with it certainly has a mixing weight.
    """

    ratio: float
    alpha: float
    possible: bool
    as_tensor: bool
    swapped: bool
    encoder: bool
    weighted: bool


def runs_as_its_own(models: Mapping[str, nn.Module], name: str, label: str, *, mixes: bool) -> bool:
    """Whether the scaling that an adapter runs with is its own, and not alpha/r of its layers.

    `set_scale`, `set_adapters` and `scale_layer` multiply the scaling of layers by a weight, which
    is no part of an adapter. Hotswapping sets it to alpha/r of the adapter that is swapped in. Both
    leave everything else as it was: the layers' ranks and alphas, and the configuration.

    ============================================  ==============================================
    Layers whose scaling is not alpha/r           Reading
    ============================================  ==============================================
    none                                          alpha/r
    floats, some no alpha's (0.7 at rank 4)       alpha/r: a weight
    floats in a text encoder of a pipeline        alpha/r: a weight, since diffusers swaps none
    tensors, some no alpha's                      refused: a weight on an unknown alpha
    tensors, and factors of another rank          as it runs: swapped in after preparation
    tensors                                       as it runs, with a warning
    floats, beside an active one with a weight    alpha/r, with a warning (diffusers)
    floats, and factors of another rank           as it runs, with a warning
    floats in a PeftModel or of transformers      as it runs, with a warning: these have no call
                                                  for weights, and hotswapping is one
    floats in diffusers                           refused: a weight or a swapped alpha
    ============================================  ==============================================

    "An alpha's" is a scaling that a positive multiple of a half gives at the rank of the factors.
    Layers whose factors are zero count for nothing.

    Args:
        models: The models of a host by name.
        name: Name of the adapter.
        label: What the host is, for messages.
        mixes: Whether the host has a call that sets mixing weights, as diffusers has.

    Returns:
        True if it is to be read with the scaling that it runs with, False for alpha/r.

    Raises:
        IncompatibleError: If nothing in the model tells a weight from a hotswapped alpha.
    """
    found = _changed(models, name, mixes=mixes)
    floats = [layer for layer in found if not layer.as_tensor]
    tensors = [layer for layer in found if layer.as_tensor]
    if not found or any(layer.encoder or not layer.possible for layer in floats):
        return False
    if any(not layer.possible for layer in tensors):
        raise IncompatibleError(_doubt(name, label, tensors[0]))
    if any(layer.swapped for layer in tensors) and not floats:
        return True
    beside = mixes and floats and any(layer.weighted for layer in floats)
    if mixes and floats and not beside and not any(layer.swapped for layer in floats):
        raise IncompatibleError(_doubt(name, label, floats[0]))
    _warn(name, label, found[0], weight=bool(beside))
    return not beside


def scaling_of(layer: Any, name: str, *, runs: bool) -> float:  # noqa: ANN401
    """The scaling of an adapter in a layer.

    Args:
        layer: A LoRA layer that holds it.
        name: Name of the adapter.
        runs: Whether it is the one that it runs with, or else alpha/r.

    Returns:
        The scaling; alpha/r where the two differ by rounding.
    """
    now, own = float(layer.scaling[name]), _declared(layer, name)
    same = math.isclose(now, own, rel_tol=_RTOL[isinstance(layer.scaling[name], Tensor)])
    return now if runs and not same else own


def _declared(layer: Any, name: str) -> float:  # noqa: ANN401
    """The scaling that a layer was made with."""
    rank = layer.r[name]
    own: float = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)
    return own


def _changed(models: Mapping[str, nn.Module], name: str, *, mixes: bool) -> list[_Changed]:
    """The layers of an adapter whose scaling is not alpha/r."""
    from peft.tuners.lora import LoraLayer

    found = []
    for slot, model in models.items():
        for _, layer in walk(model):
            if not isinstance(layer, LoraLayer) or name not in layer.scaling:
                continue
            rank = _rank_in_use(layer, name) if _is_changed(layer, name) else 0
            if rank:
                encoder = mixes and slot.startswith("text_encoder")
                found.append(_described(layer, name, rank, encoder=encoder))
    return found


def _is_changed(layer: Any, name: str) -> bool:  # noqa: ANN401
    """Whether a layer runs an adapter with another scaling than alpha/r, by more than rounding."""
    return scaling_of(layer, name, runs=True) != _declared(layer, name)


def _described(layer: Any, name: str, rank: int, *, encoder: bool) -> _Changed:  # noqa: ANN401
    """What there is to say of a layer whose scaling of an adapter is not alpha/r."""
    as_tensor = isinstance(layer.scaling[name], Tensor)
    alpha, possible = _alpha(layer, name, rank)
    active = layer.active_adapters
    others = [other for other in active if other != name and other in layer.scaling]
    return _Changed(
        ratio=float(layer.scaling[name]) / (_declared(layer, name) or math.nan),
        alpha=alpha,
        possible=possible,
        as_tensor=as_tensor,
        swapped=rank != layer.r[name],
        encoder=encoder,
        weighted=name in active and any(_has_weight(layer, other) for other in others),
    )


def _has_weight(layer: Any, name: str) -> bool:  # noqa: ANN401
    """Whether an adapter certainly has a mixing weight in a layer."""
    rank = _rank_in_use(layer, name) if _is_changed(layer, name) else 0
    return bool(rank) and not _alpha(layer, name, rank)[1]


def _alpha(layer: Any, name: str, rank: int) -> tuple[float, bool]:  # noqa: ANN401
    """The alpha that gives an adapter of a rank its scaling, and whether adapters have such."""
    scaling = layer.scaling[name]
    alpha = float(scaling) * (math.sqrt(rank) if layer.use_rslora[name] else rank)
    twice, rtol = 2 * alpha, _RTOL[isinstance(scaling, Tensor)]
    possible = math.isfinite(twice) and twice > 0.5
    return alpha, possible and math.isclose(twice, round(twice), rel_tol=rtol)


def _rank_in_use(layer: Any, name: str) -> int:  # noqa: ANN401
    """The rank of an adapter's factors without the zeros that hotswapping pads them with."""
    from accelerate.utils import align_module_device

    if name in layer.lora_embedding_A:
        return _used(layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer)
    A, B = layer.lora_A[name], layer.lora_B[name]
    with align_module_device(A), align_module_device(B):  # where they are offloaded
        return _used(A.weight, B.weight, layer)


def _used(A: Tensor, B: Tensor, layer: Any) -> int:  # noqa: ANN401
    """The rank of factors without zeros at the end of both."""
    if B.shape[1] != A.shape[0] or getattr(layer, "num_experts", 1) > 1:  # stacks of several
        return A.shape[0] // getattr(layer, "num_experts", 1)
    rows, columns = A.detach().flatten(1), B.detach().transpose(0, 1).flatten(1)
    used = ((rows != 0).any(1) | (columns != 0).any(1)).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def _doubt(name: str, label: str, layer: _Changed) -> str:
    """What cannot be told of an adapter, and what to do."""
    return (
        f"the layers of {name!r} in {label} run at {layer.ratio:.6g} times their own alpha/rank: "
        "that is a mixing weight (set_adapters, set_scale, scale_layer), or the alpha of an "
        f"adapter that was hotswapped ({layer.alpha:.6g}), and nothing in memory tells which. Set "
        "the weight to 1 (set_adapters(names), set_scale(name, 1.0), unscale_layer()), or, if the "
        "adapter was hotswapped, read its file (devec.Adapter.from_pretrained)"
    )


def _warn(name: str, label: str, layer: _Changed, *, weight: bool) -> None:
    """State which reading was taken where another is possible."""
    if weight:
        taken = (
            f"is taken for a mixing weight, as another active adapter has one, and left out; if "
            f"{name!r} was hotswapped, read its file (devec.Adapter.from_pretrained)"
        )
    else:
        taken = (
            f"is taken for the alpha of a hotswapped adapter ({layer.alpha:.6g}); if it is a "
            "weight, set it back to 1 (set_scale(name, 1.0), unscale_layer()) and read it again"
        )
    warn(
        f"the layers of {name!r} in {label} run at {layer.ratio:.6g} times their own alpha/rank, "
        f"which {taken}"
    )
