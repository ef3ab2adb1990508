"""The modules of a pool in stacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from devec.decomposition.stacks.exact import ExactModule
from devec.decomposition.stacks.lora import LoraStack
from devec.decomposition.stacks.stack import Pool, Stack
from devec.deltas.delta import Delta
from devec.lazy import outlines

# A stacked factor of this many bytes stays in a core's cache from one product to the next; a GPU
# wants enough work in every call.
_STACKED_BYTES = 1 << 21
_STACKED_BYTES_ON_GPU = 1 << 27
_MOST_MODULES = 64


def stacks_of(pool: Pool, device: torch.device | str | None, *, batched: bool) -> Iterator[Stack]:
    """All modules of a pool: LoRAs that are alike in batches, all others one by one.

    Args:
        pool: The adapters.
        device: Where to compute.
        batched: Whether a stack may have more than one module.
    """
    known = {name: outlines(modules) for name, modules in pool.items()}
    alike: dict[object, list[str]] = {}
    for module in dict.fromkeys(module for modules in known.values() for module in modules):
        deltas = {name: modules[module] for name, modules in known.items() if module in modules}
        alike.setdefault(_likeness(module, deltas), []).append(module)
    for likeness, modules in alike.items():
        having = {name: pool[name] for name in known if modules[0] in known[name]}
        if likeness == modules[0]:
            yield ExactModule(modules[0], having, device)
            continue
        first = [known[name][modules[0]] for name in having]
        size = _stack_size(first, torch.device(device or first[0].B.device)) if batched else 1
        for start in range(0, len(modules), size):
            yield LoraStack(modules[start : start + size], having, device)


def sound_stacks(stack: Stack, unsound: Collection[str]) -> list[Stack]:
    """The modules of a stack, ill-conditioned ones taken out of the batch."""
    rest = [module for module in stack.modules if module not in unsound]
    exact = [ExactModule(m, stack.pool, stack.device) for m in stack.modules if m in unsound]
    return [*exact, *([LoraStack(rest, stack.pool, stack.device)] if rest else [])]


def _likeness(module: str, deltas: Mapping[str, Delta]) -> object:
    """What the modules of a batch have in common; the module's name if it fits in no batch."""
    if any(d.gain is not None or not d.scaling or not d.rank for d in deltas.values()):
        return module
    return tuple(
        (name, d.shape, d.rank, d.B.dtype, d.A.dtype, d.B.device, d.bias is None)
        for name, d in deltas.items()
    )


def _stack_size(deltas: Sequence[Delta], device: torch.device) -> int:
    """How many modules are computed together."""
    factor = max(4 * delta.rank * max(delta.shape) for delta in deltas)
    limit = _STACKED_BYTES if device.type in ("cpu", "meta") else _STACKED_BYTES_ON_GPU
    return max(1, min(_MOST_MODULES, limit // max(factor, 1)))
