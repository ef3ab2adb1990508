"""The slots of a PEFT file, from its keys, shapes and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from devec.errors import FormatError, listed, located, warn
from devec.formats.peft.config import CONFIG_NAME, targets
from devec.formats.peft.dora import require_everywhere
from devec.formats.peft.names import (
    PREFIX,
    attention_of,
    depth,
    lookup_name,
    unused_projection,
    unwrapped,
)
from devec.formats.peft.reading.keys import PeftKeys
from devec.formats.peft.reading.parameters import owners, parameter_ranks
from devec.formats.peft.slots import PeftSlot, require_shapes
from devec.formats.rank_patterns import Config, rank_and_scaling

FactorTensors = Mapping[str, Mapping[str, Tensor]]  # path → part → tensor


def slots_of(config: Config, keys: PeftKeys, tensors: Mapping[str, Tensor]) -> list[PeftSlot]:
    """The slots of a file, in its order.

    Args:
        config: The configuration.
        keys: The keys of the file.
        tensors: Key → tensor or its outline.

    Returns:
        The slots.

    Raises:
        FormatError: If tensors and configuration contradict each other.
        UnsupportedError: If the factors of a layer are no plain delta.
    """
    factors = {
        path: {part: tensors[key] for part, key in parts.items()}
        for path, parts in keys.factors.items()
    }
    for path, parts in factors.items():
        name = path.removeprefix(PREFIX)
        missing = {"A", "B"} - parts.keys()
        if missing:
            raise FormatError(f"module {name!r} has no factor {missing.pop()}")
        with located(f"module {name!r}"):
            require_shapes(parts["A"], parts["B"])
    if not factors:
        raise FormatError("the file holds no LoRA factors (lora_A, lora_B)")
    wrappers = _wrappers(factors)
    slots = []
    for path in factors:
        with located(f"module {path.removeprefix(PREFIX)!r}"):
            slots.append(_slot_of(config, keys, path, factors, wrappers))
        if slots[-1].attention and slots[-1].attention != slots[-1].name:
            _warn_of_attention(slots[-1].name)
    _require_as_declared(config, slots, factors)
    return slots


def unlisted_targets(config: Config, keys: PeftKeys, slots: Sequence[PeftSlot]) -> tuple[str, ...]:
    """Names of modules that ``target_modules`` names and that have no factors.

    Such modules are inside modules that are trained whole, which PEFT does not adapt, or output
    projections of nn.MultiheadAttention, which are adapted with the attention.

    Returns:
        The names.
    """
    inside = [key.rpartition(".")[0] for key in keys.carried]
    inside += [unused_projection(path) for path in keys.attentions]
    adapted = {slot.target for slot in slots}
    names = dict.fromkeys(unwrapped(path.removeprefix(PREFIX)) for path in inside)
    return tuple(n for n in names if n not in adapted and targets(config, n))


def _wrappers(factors: FactorTensors) -> dict[str, list[str]]:
    """Name of a module → paths of its wrappers, outermost first."""
    wrappers: dict[str, list[str]] = {}
    for path in sorted(factors, key=depth):
        wrappers.setdefault(unwrapped(path.removeprefix(PREFIX)), []).append(path)
    return wrappers


def _slot_of(
    config: Config,
    keys: PeftKeys,
    path: str,
    factors: FactorTensors,
    wrappers: Mapping[str, Sequence[str]],
) -> PeftSlot:
    """The slot of a pair of factors."""
    A, B = factors[path]["A"], factors[path]["B"]
    target = lookup_name(path, keys.attentions).removeprefix(PREFIX)
    attention = attention_of(path, keys.attentions) or (path if path in keys.attentions else "")
    paths = wrappers[unwrapped(path.removeprefix(PREFIX))]
    parameters = [] if attention else owners(config, target, len(paths))
    if parameters:
        rows = [len(factors[p]["A"]) for p in paths]
        rank, scaling = parameter_ranks(config, parameters, rows)[paths.index(path)]
    else:
        rank, scaling = rank_and_scaling(config, target)
        if rank != len(A):
            raise FormatError(f"the config says rank {rank}, the tensors have rank {len(A)}")
    experts = len(A) // rank
    kind = "conv" if A.ndim > 2 else "embedding" if path in keys.embeddings else "linear"
    return PeftSlot(
        path=path,
        name=path.removeprefix(PREFIX),
        kind="experts" if experts > 1 else kind,
        shape=(B.shape[0], A[0].numel()),
        rank=rank,
        scaling=scaling,
        dtypes=(A.dtype, B.dtype),
        kernel=tuple(A.shape[2:]),
        experts=experts,
        parameters=tuple(parameters),
        attention=attention.removeprefix(PREFIX),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _require_as_declared(config: Config, slots: Sequence[PeftSlot], factors: FactorTensors) -> None:
    """Check that modules and their tensors are those that the configuration declares."""
    unexpected = [
        slot.name for slot in slots if not slot.parameters and not targets(config, slot.target)
    ]
    if unexpected:
        raise FormatError(
            f"the file has modules that target_modules of {CONFIG_NAME} does not name, which no "
            f"host would load: {listed(unexpected)}"
        )
    if bool(config.get("lora_bias")) != any("bias" in t for t in factors.values()):
        raise FormatError(
            f"lora_bias is {config.get('lora_bias')} in {CONFIG_NAME}, which the tensors contradict"
        )
    require_everywhere(
        config, {path.removeprefix(PREFIX): tensors for path, tensors in factors.items()}
    )


def _warn_of_attention(name: str) -> None:
    """Warn that PEFT's forward pass of nn.MultiheadAttention differs from what its factors mean."""
    warn(
        f"module {name!r} is inside nn.MultiheadAttention, where PEFT applies the change of the "
        "output projection twice; parts add up all the same"
    )
