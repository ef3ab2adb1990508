"""Classifying the keys of a PEFT file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from devec.errors import UnsupportedError
from devec.formats.peft.config import TRAINING_ONLY_TENSORS
from devec.formats.peft.dora import magnitude_owner
from devec.formats.peft.names import PREFIX, attentions_in, unused_projection, unwrapped
from devec.formats.peft.reading.parameters import owners
from devec.formats.rank_patterns import Config

_FACTOR_KEY = re.compile(
    r"(?P<path>.+)\.(?:(?P<embedding>lora_embedding_)|lora_)"
    r"(?P<factor>[AB](?!\.bias)|B)(?P<end>\.weight|\.bias)?"
)


@dataclass
class PeftKeys:
    """The keys of a file, classified.

    Attributes:
        factors: Path of a module → part → key.
        embeddings: Paths of the modules that are embeddings.
        repeated: Keys of magnitudes that are stored twice: path, first and second key.
        base_copies: Keys of base weights.
        carried: Keys of whole trained tensors.
        training_only: Keys of tensors that only training uses.
        attentions: Paths of the modules that are nn.MultiheadAttention.
        unused: Keys of adapters of their output projections that no forward pass uses.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    repeated: list[tuple[str, str, str]] = field(default_factory=list)
    base_copies: list[str] = field(default_factory=list)
    carried: dict[str, None] = field(default_factory=dict)
    training_only: list[str] = field(default_factory=list)
    attentions: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)

    def magnitudes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The modules with magnitudes, and the magnitudes."""
        for path, factors in self.factors.items():
            if "magnitude" in factors:
                yield path.removeprefix(PREFIX), tensors[factors["magnitude"]]


def sort_peft_keys(config: Config, keys: Iterable[str]) -> PeftKeys:
    """Classify every key of a file, by its name alone.

    Args:
        config: The configuration of the adapter.
        keys: The keys.

    Returns:
        The keys, classified.

    Raises:
        UnsupportedError: If a key belongs to an unknown kind of layer.
    """
    result, beside = PeftKeys(), []
    for key in keys:
        match = _FACTOR_KEY.fullmatch(key)
        if match:
            part = "bias" if match["end"] == ".bias" else match["factor"]
            result.factors.setdefault(match["path"], {})[part] = key
            if match["embedding"]:
                result.embeddings.add(match["path"])
        elif any(mark in key for mark in TRAINING_ONLY_TENSORS):
            result.training_only.append(key)
        elif path := magnitude_owner(key):
            known = result.factors.setdefault(path, {}).setdefault("magnitude", key)
            if known != key:
                result.repeated.append((path, known, key))
        elif ".lora_" in key:
            raise UnsupportedError(f"{key!r} belongs to no kind of LoRA layer that is known")
        else:
            beside.append(key)
    _sort_others(config, beside, result)
    return result


def _sort_others(config: Config, keys: Sequence[str], result: PeftKeys) -> None:
    """Classify the keys of tensors that are no factors."""
    parameters = {p for p in result.factors if owners(config, unwrapped(p.removeprefix(PREFIX)))}
    result.attentions = attentions_in(result.factors, parameters)
    unused = tuple(f"{unused_projection(path)}." for path in result.attentions)
    for path in [path for path in result.factors if f"{path}.".startswith(unused)]:
        result.unused += result.factors.pop(path).values()
    trained = config.get("bias", "none") != "none"
    for key in keys:
        path, _, rest = key.rpartition(".base_layer.")
        if key.startswith(unused):
            result.unused.append(key)
        elif path not in result.factors or "." in rest or (trained and "bias" in rest):
            result.carried[key] = None
        else:
            result.base_copies.append(key)
