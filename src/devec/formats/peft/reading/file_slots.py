"""The layers that a file of PEFT has factors of, found from its keys, shapes and configuration."""

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


def slots_of(config: Config, keys: PeftKeys, known: Mapping[str, Tensor]) -> list[PeftSlot]:
    """The slots of a file, by the shapes of its tensors.

    Args:
        config: The configuration.
        keys: The keys of the file.
        known: Key → tensor, or its outline.

    Returns:
        The slots, in the order of the file.

    Raises:
        FormatError: If tensors and configuration contradict each other.
        UnsupportedError: If the factors of a layer are no plain delta.
    """
    factors = {path: {p: known[k] for p, k in held.items()} for path, held in keys.factors.items()}
    for path, tensors in factors.items():
        name = path.removeprefix(PREFIX)
        missing = {"A", "B"} - tensors.keys()
        if missing:
            raise FormatError(f"module {name!r} has no factor {missing.pop()}")
        with located(f"module {name!r}"):
            require_shapes(tensors["A"], tensors["B"])
    if not factors:
        raise FormatError("the file holds no LoRA factors (lora_A, lora_B)")
    wrappers = _wrappers(factors)
    slots = []
    for path in factors:
        with located(f"module {path.removeprefix(PREFIX)!r}"):
            slots.append(_slot_of(config, keys, path, factors, wrappers))
        if slots[-1].attention and slots[-1].attention != slots[-1].name:
            _warn_of_attention(slots[-1].name)
    _require_as_said(config, slots, factors)
    return slots


def unlisted_targets(config: Config, keys: PeftKeys, slots: Sequence[PeftSlot]) -> tuple[str, ...]:
    """Modules that ``target_modules`` names and that have no factors.

    They are inside modules that are trained whole, which PEFT does not adapt, or output projections
    of nn.MultiheadAttention, which are adapted with the attention.

    Args:
        config: The configuration.
        keys: The keys of the file.
        slots: The slots of the file.

    Returns:
        Their names.
    """
    inside = [key.rpartition(".")[0] for key in keys.carried]
    inside += [unused_projection(path) for path in keys.attentions]
    adapted = {slot.target for slot in slots}
    names = dict.fromkeys(unwrapped(path.removeprefix(PREFIX)) for path in inside)
    return tuple(n for n in names if n not in adapted and targets(config, n))


def _wrappers(factors: FactorTensors) -> dict[str, list[str]]:
    """Name of a module → paths of its wrappers, the outermost first."""
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


def _require_as_said(config: Config, slots: Sequence[PeftSlot], factors: FactorTensors) -> None:
    """Check that modules and their tensors are those that the configuration speaks of."""
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
    """PEFT's forward pass of nn.MultiheadAttention is not the one its factors say."""
    warn(
        f"module {name!r} is inside nn.MultiheadAttention, where PEFT applies the change of the "
        "output projection twice; parts add up all the same"
    )
