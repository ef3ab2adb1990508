"""The base model of adapters, which is read one weight at a time.

The delta of a DoRA is diag(m/‖W0 + s·B·A‖)·(W0 + s·B·A) − W0 and needs the base weight W0. A base
model is often given only to detect its family, so nothing is searched, opened or imported before
the first weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from devec.base_model.files import model_folder, models_in
from devec.base_model.layers import Model, ModelOpeners
from devec.base_model.live import is_live, live_models, live_source
from devec.deltas.base_weight import BaseWeight
from devec.errors import FormatError, IncompatibleError, located
from devec.files.locate import exists
from devec.naming.families import Family
from devec.naming.module_id import CLIP_G, CLIP_L, DENOISER, DENOISER_2, T5, parse_module_id

_MODEL_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w.-]+))?"
    r"(?:/(?P<inside>.+))?"
)
_ACCEPTED = (
    "a checkpoint directory, a .safetensors file, the id of a model in the local cache of the "
    "Hugging Face Hub or, in Python, a loaded model"
)
_COMPONENT_NAMES = {
    DENOISER: "denoiser",
    DENOISER_2: "second denoiser",
    CLIP_L: "first text encoder (CLIP-L)",
    CLIP_G: "second text encoder (CLIP-G)",
    T5: "T5 text encoder",
}


def base_model(base: object | None, recorded: str = "") -> BaseModel:
    """The base model for an argument ``base``, not opened yet.

    Args:
        base: A path, the id of a model in the local cache of the Hub (``user/name``,
            ``user/name@revision``, ``user/name/folder``), a loaded model or pipeline, a
            `BaseModel`, or None. With None, or a string that names no model, an error is raised
            when a weight is read.
        recorded: Id of the base model that the adapter records, for messages.

    Returns:
        The base model.

    Raises:
        IncompatibleError: If `base` is another kind of object.
    """
    if isinstance(base, BaseModel):
        return base
    if base is None or isinstance(base, str | Path) or is_live(base):
        return BaseModel(base, recorded)
    raise IncompatibleError(f"expected as base model {_ACCEPTED}; got {type(base).__name__}")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model, opened on first use. Two are equal if they have the same source.

    Attributes:
        reference: A path, a model id, a loaded model or pipeline, or None.
        recorded: Id of the base model that the adapter records, for messages.
    """

    reference: object | None = field(repr=False)
    recorded: str = ""

    @cached_property
    def source(self) -> str:
        """The identity of the model: its resolved path, or class and address of the object."""
        if self.reference is None:
            return "no base model"
        if not isinstance(self.reference, str | Path):
            return live_source(self.reference)
        return str(model_folder(self._path.resolve()) if self._path else self.reference)

    def weight(
        self,
        module: str,
        shape: tuple[int, int],
        *,
        family: Family | None = None,
        transposed: bool | None = None,
        fan_in_fan_out: bool = False,
    ) -> BaseWeight:
        """The base weight of an adapter's module, read on request.

        Args:
            module: Id of the module in any convention of adapters.
            shape: Shape (out, in) of the module's delta.
            family: The tables of the model's family, if known from the adapter.
            transposed: Whether the layer stores its weight as (in, out), as embeddings do; None to
                tell from its class, or from its shape and the model's configuration.
            fan_in_fan_out: The field of PEFT's configuration, used if nothing else tells.

        Returns:
            The weight, not read yet; reading raises if it is not available.
        """
        return _ModuleWeight(self, module, shape, transposed, fan_in_fan_out, family)

    def open(self, component: str) -> Model:
        """The model of a component, opened once; a single model stands for any component."""
        openers = self._openers
        opener = next(iter(openers.values())) if len(openers) == 1 else openers.get(component)
        if opener is None:
            raise IncompatibleError(
                f"{self.source} holds no {_COMPONENT_NAMES[component]}, only "
                f"{', '.join(_COMPONENT_NAMES[c] for c in openers) or 'other models'}"
            )
        return opener()

    @cached_property
    def _openers(self) -> ModelOpeners:
        """Component → function that opens its model."""
        if self.reference is None:
            raise IncompatibleError(
                "the module is a DoRA, or is to be written as one, and its change "
                "diag(m/‖W0 + s·B·A‖)·(W0 + s·B·A) − W0 depends on the base weight W0; give the "
                "base model (--base MODEL, Adapter.from_pretrained(..., base=MODEL)): "
                f"{_ACCEPTED}{self._trained_on}"
            )
        if not isinstance(self.reference, str | Path):
            return live_models(self.reference)
        if self._path is None:
            raise FormatError(_unavailable_model(str(self.reference)) + self._trained_on)
        return models_in(self._path)

    @property
    def _trained_on(self) -> str:
        """The end of a message: the base model that the adapter records."""
        return f"; the adapter was trained on {self.recorded!r}" if self.recorded else ""

    @cached_property
    def _path(self) -> Path | None:
        """The path of the files; paths on the disk take precedence over the cache of the Hub."""
        reference = str(self.reference)
        return Path(reference) if exists(reference) else _cached_path(reference)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseModel) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)


@dataclass(frozen=True)
class _ModuleWeight:
    """The base weight of a module, read on request."""

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
            model = self.model.open(parse_module_id(self.module).component)
            weight = model.read(
                self.module, self.shape, self.family, self.transposed, hint=self.fan_in_fan_out
            )
        return weight.to(device, dtype)


def _cached_path(reference: str) -> Path | None:
    """The path of a model in the local cache of the Hub, None if it is not cached."""
    from huggingface_hub import snapshot_download

    match = _MODEL_ID.fullmatch(reference)
    if match is None:
        return None
    try:
        folder = snapshot_download(match["repo"], revision=match["revision"], local_files_only=True)
    except (OSError, ValueError):
        return None
    path = Path(folder, match["inside"] or "")
    return path if path.exists() else None


def _unavailable_model(reference: str) -> str:
    """The message for a path or id of a model that is not available."""
    match = _MODEL_ID.fullmatch(reference)
    if match is None:
        return f"no such file or directory: {reference!r}; a base model is {_ACCEPTED}"
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    return (
        f"no such file or directory: {reference!r}, nor is it in the local cache of the Hugging "
        f"Face Hub, and base models are not downloaded; if it is the id of one there, get it with: "
        f"hf download {match['repo']}{revision}"
    )
