"""What a PEFT adapter directory stores, apart from values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from devec.base_model.model import BaseModel, base_model
from devec.formats.peft.dora import BaseWeights
from devec.formats.peft.slots import PeftSlot
from devec.formats.rank_patterns import Config
from devec.naming.detection import detect_family
from devec.naming.families import Family

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftStorage:
    """What a PEFT adapter directory stores.

    Attributes:
        config: The configuration, as read.
        slots: The stored pairs of factors, in the order of the file.
        base: The base model that was given with the adapter.
        base_copies: Base weights that PEFT stores beside the factors: embeddings that are adapted,
            or of a resized vocabulary.
        merged_from: Configurations of all adapters that the slots come from, if there are several
            and `config` does not describe all of them.
        unlisted: Names of modules that their ``target_modules`` name and that have no slot.
    """

    config: Config
    slots: tuple[PeftSlot, ...]
    base: BaseModel = field(default_factory=lambda: base_model(None))
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    merged_from: tuple[Config, ...] = ()
    unlisted: tuple[str, ...] = ()

    @property
    def weights(self) -> BaseWeights:
        """The base weights of the slots."""
        return BaseWeights(self.base, recorded_family(self.config, self.slots)[1], self.base_copies)


def recorded_family(config: Config, slots: Sequence[PeftSlot]) -> tuple[str, Family | None]:
    """The family of the base model: its name, empty if unknown, and its tables."""
    shapes = {slot.name: slot.shape for slot in slots}
    return detect_family(shapes, str(config.get("base_model_name_or_path") or ""))
