"""The base model that adapters were trained on, asked for one weight at a time.

A DoRA's change is diag(m/‖W0 + s·B·A‖)·(W0 + s·B·A) − W0, so its base weight W0 has to be known. A
base model is named before it is needed, often only for its family: nothing is looked for, opened or
imported before a weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from devec.base_model.files import model_folder, models_in
from devec.base_model.layers import Model, Models
from devec.base_model.live import is_live, label, live_models
from devec.deltas.base_weight import BaseWeight
from devec.errors import FormatError, IncompatibleError, located
from devec.files.locate import exists
from devec.naming.families import Family
from devec.naming.module_id import CLIP_G, CLIP_L, DENOISER, DENOISER_2, T5, parse_module_id

_REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w.-]+))?"
    r"(?:/(?P<inside>.+))?"
)
_FORMS = (
    "a checkpoint directory, a .safetensors file, the id of a model in the local cache of the "
    "Hugging Face Hub or, in Python, a loaded model"
)
_CALLED = {
    DENOISER: "denoiser",
    DENOISER_2: "second denoiser",
    CLIP_L: "first text encoder (CLIP-L)",
    CLIP_G: "second text encoder (CLIP-G)",
    T5: "T5 text encoder",
}


def base_model(base: object | None, recorded: str = "") -> BaseModel:
    """A base model, from whatever it is given as.

    Args:
        base: A path, the id of a model in the local cache of the Hub (``user/name``,
            ``user/name@revision``, ``user/name/folder``), a loaded model or pipeline, a
            `BaseModel`, or None if there is none. Without one, or with a string that names none,
            weights raise when they are read.
        recorded: Id of the base model on record in the adapter, for messages.

    Returns:
        The model, not opened yet.

    Raises:
        IncompatibleError: If it is an object that is no model.
    """
    if isinstance(base, BaseModel):
        return base
    if base is None or isinstance(base, str | Path) or is_live(base):
        return BaseModel(base, recorded)
    raise IncompatibleError(f"expected as base model {_FORMS}; got {type(base).__name__}")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model. Two are equal if they have the same source.

    Attributes:
        given: What it was given as.
        recorded: Id of the base model on record in the adapter, for messages.
    """

    given: object | None = field(repr=False)
    recorded: str = ""

    @cached_property
    def source(self) -> str:
        """Which model it is: its resolved path, or a label of the object."""
        if self.given is None:
            return "no base model"
        if not isinstance(self.given, str | Path):
            return label(self.given)
        return str(model_folder(self._path.resolve()) if self._path else self.given)

    def weight(
        self,
        module: str,
        shape: tuple[int, int],
        *,
        family: Family | None = None,
        transposed: bool | None = None,
        fan_in_fan_out: bool = False,
    ) -> BaseWeight:
        """The base weight of a module of an adapter.

        Args:
            module: Id of the module, in any convention that adapters have.
            shape: Shape (out, in) of the module's change.
            family: The tables of the model's family, if it is known from the adapter.
            transposed: Whether the layer stores its weight as (in, out), as embeddings do; None to
                tell from its class, or from its shape and the model's configuration.
            fan_in_fan_out: What PEFT says of all linear layers, where nothing else tells.

        Returns:
            A handle; it reads the weight when asked to, and raises then if it cannot be had.
        """
        return _ModuleWeight(self, module, shape, transposed, fan_in_fan_out, family)

    def opened(self, component: str) -> Model:
        """One of the models that it consists of.

        Args:
            component: Which one; if there is but one, that is it.

        Returns:
            The model, opened once.

        Raises:
            IncompatibleError: If no base model was given, or it has no such component.
            FormatError: If it cannot be found or read.
        """
        models = self._models
        opened = next(iter(models.values())) if len(models) == 1 else models.get(component)
        if opened is None:
            raise IncompatibleError(
                f"{self.source} holds no {_CALLED[component]}, only "
                f"{', '.join(_CALLED[c] for c in models) or 'other models'}"
            )
        return opened()

    @cached_property
    def _models(self) -> Models:
        """Component → what opens it."""
        if self.given is None:
            raise IncompatibleError(
                "the module is a DoRA, or is to be written as one, and its change "
                "diag(m/‖W0 + s·B·A‖)·(W0 + s·B·A) − W0 depends on the base weight W0; give the "
                "base model (--base MODEL, Adapter.from_pretrained(..., base=MODEL)): "
                f"{_FORMS}{self._on_record}"
            )
        if not isinstance(self.given, str | Path):
            return live_models(self.given)
        if self._path is None:
            raise FormatError(_not_had(str(self.given)) + self._on_record)
        return models_in(self._path)

    @property
    def _on_record(self) -> str:
        """What the adapter says of its base model, for the end of a message."""
        return f"; the adapter was trained on {self.recorded!r}" if self.recorded else ""

    @cached_property
    def _path(self) -> Path | None:
        """Where its files are; what exists on the disk comes before the cache of the Hub."""
        given = str(self.given)
        return Path(given) if exists(given) else _cached(given)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseModel) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)


@dataclass(frozen=True)
class _ModuleWeight:
    """The base weight of a module, read when it is needed."""

    model: BaseModel
    module: str
    shape: tuple[int, int]
    transposed: bool | None
    fan_in_fan_out: bool
    family: Family | None = field(compare=False, repr=False)

    @property
    def source(self) -> str:
        return self.model.source

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        with located("base weight"):
            model = self.model.opened(parse_module_id(self.module).component)
            weight = model.read(
                self.module, self.shape, self.family, self.transposed, hint=self.fan_in_fan_out
            )
        return weight.to(device, dtype)


def _cached(given: str) -> Path | None:
    """Where the local cache of the Hub has a model, None if it has not."""
    from huggingface_hub import snapshot_download

    match = _REPOSITORY.fullmatch(given)
    if match is None:
        return None
    try:
        folder = snapshot_download(match["repo"], revision=match["revision"], local_files_only=True)
    except (OSError, ValueError):
        return None
    path = Path(folder, match["inside"] or "")
    return path if path.exists() else None


def _not_had(given: str) -> str:
    """What to say of a string that names no model that is there."""
    match = _REPOSITORY.fullmatch(given)
    if match is None:
        return f"no such file or directory: {given!r}; a base model is {_FORMS}"
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    return (
        f"no such file or directory: {given!r}, nor is it in the local cache of the Hugging Face "
        f"Hub, and base models are not downloaded; if it is the id of one there, get it with: hf "
        f"download {match['repo']}{revision}"
    )
