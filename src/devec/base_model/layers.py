"""The layers of a base model by name, and which of them a module of an adapter stands for.

The model may be named otherwise than the adapter, fused or split otherwise, and stand on its own
where the adapter was trained on a part of something larger, or the other way round.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from devec.errors import IncompatibleError, UnsupportedError, listed
from devec.files.safetensors_reader import STORAGE_DTYPES
from devec.naming.detection import detect_family
from devec.naming.families import Family, flat
from devec.naming.module_id import (
    CLIP_G,
    CLIP_L,
    DENOISER,
    DENOISER_2,
    DENOISERS,
    T5,
    ModuleId,
    parse_module_id,
)
from devec.naming.tables import segments_of

# Layers that share the weights of the input embedding, which files then hold once.
_TIED_INPUTS = re.compile(r"(?:.+\.)?(?:en|de)coder\.embed_tokens")
_TIED_OUTPUTS = re.compile(r"(?:.+\.)?(?:lm_head(?:\.decoder)?|cls\.predictions\.decoder)")
_EMBEDDING = re.compile(r"(?:.+\.)?(?:shared|embed_tokens|wte|tokens_embed|word_embeddings)")
_PEFT_PREFIX = "base_model.model."
_WIDENED = (torch.float8_e4m3fn, torch.float8_e5m2)  # bfloat16 holds each of their values


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a base model that has a weight.

    Attributes:
        shape: Shape of the weight, that of a convolution flattened.
        load: Gives the weight as it is stored.
        transposed: Whether it is stored as (in, out); None if that is not known.
    """

    shape: tuple[int, int]
    load: Callable[[], Tensor]
    transposed: bool | None = None


class Rows(NamedTuple):
    """Some rows of a layer: `size` of `total` equal shares, from share `first` on."""

    name: str
    first: int = 0
    size: int = 1
    total: int = 1


@dataclass(frozen=True, eq=False)
class Model:
    """One model, by the names of its layers.

    Attributes:
        where: The file, folder or object it is in, for messages.
        layers: Dotted name → layer.
        untied: Whether its output layer is known to have a weight of its own.
        in_memory: Gives the same model by the names it has in memory, where those may differ.
    """

    where: str
    layers: Mapping[str, Layer]
    untied: bool = False
    in_memory: Callable[[], Model] | None = None
    _indices: dict[tuple[str, str], dict[str, list[Rows]]] = field(default_factory=dict)

    def read(
        self,
        module: str,
        shape: tuple[int, int],
        family: Family | None,
        transposed: bool | None,
        *,
        hint: bool,
    ) -> Tensor:
        """The weight of a module, as it is stored but as the map from inputs to outputs.

        Args:
            module: Id of the module in an adapter.
            shape: Shape (out, in) that the adapter wants.
            family: The tables of the model's family, if the adapter knows it.
            transposed: Whether the layer stores its weight as (in, out), None if not known.
            hint: Whether square weights do, of which nothing is known.

        Returns:
            The weight.

        Raises:
            IncompatibleError: If there is no such module, or it has another shape.
        """
        try:
            rows = self._find(module, shape, family)
        except IncompatibleError:
            if self.in_memory is None:
                raise
            return self.in_memory().read(module, shape, family, transposed, hint=hint)
        if len(rows) > 1 or rows[0].size < rows[0].total:
            weight = torch.cat([self._share(part) for part in rows])
        else:
            weight = self._whole(rows[0].name, shape, transposed, hint=hint)
        if weight.shape != shape:
            names = listed([part.name for part in rows])
            raise IncompatibleError(
                f"expected a base weight of shape {shape}, but {self.where} gives "
                f"{tuple(weight.shape)} in {names}; this is not the base model that the adapter "
                "was trained on, or another model of its pipeline"
            )
        return weight

    def _whole(
        self, name: str, shape: tuple[int, int], transposed: bool | None, *, hint: bool
    ) -> Tensor:
        """The weight of a layer, turned around if it is stored that way."""
        layer, weight = self.layers[name], self._loaded(name)
        turned = layer.transposed if transposed is None else transposed
        if turned is None:
            square = shape[0] == shape[1]
            turned = hint if square else weight.shape == shape[::-1]
        return weight.mT if turned else weight

    def _share(self, rows: Rows) -> Tensor:
        """Some rows of a layer."""
        weight = self._loaded(rows.name)
        unit, rest = divmod(len(weight), rows.total)
        if rest:
            raise IncompatibleError(
                f"{rows.name!r} of {self.where} has {len(weight)} rows, which are not "
                f"{rows.total} equal shares; this is not the base model that the adapter was "
                "trained on"
            )
        return weight[unit * rows.first : unit * (rows.first + rows.size)]

    def _loaded(self, name: str) -> Tensor:
        """The weight of a layer as stored, as a matrix."""
        weight = self.layers[name].load()
        if weight.dtype in _WIDENED:
            weight = weight.to(torch.bfloat16)
        if weight.dtype not in STORAGE_DTYPES.values():
            raise UnsupportedError(
                f"{name!r} of {self.where} is stored as {weight.dtype}, expected floating point; "
                "load the model without quantisation"
            )
        return weight.flatten(1)

    def _find(self, module: str, shape: tuple[int, int], family: Family | None) -> Sequence[Rows]:
        """The rows that a module of an adapter stands for."""
        name = parse_module_id(module)
        for exact in (module, module.removeprefix(_PEFT_PREFIX), name.path):
            if exact in self.layers:
                return [Rows(exact)]
        index = self._index(name.component, family or self._family)
        found = [index.get(p.name, []) for p in segments_of(name, shape, family or self._family)]
        if not all(found) and (family is None or name.component not in DENOISERS):
            found = [self._tails(name) or self._tied(name)]
        several = [rows.name for candidates in found for rows in candidates[1:]]
        if not all(found) or several:
            raise IncompatibleError(self._not_found(name, [f[0].name for f in found if f], several))
        return _together([candidates[0] for candidates in found])

    @cached_property
    def _family(self) -> Family | None:
        """The family that the model's own names and shapes tell, if there are tables of it."""
        return detect_family({name: layer.shape for name, layer in self.layers.items()}, "")[1]

    def _index(self, component: str, family: Family | None) -> dict[str, list[Rows]]:
        """Part → the rows that hold it, the model taken for a component."""
        key = (component, family.name if family else "")
        if key not in self._indices:
            index: dict[str, list[Rows]] = defaultdict(list)
            for name, layer in self.layers.items():
                parts = segments_of(ModuleId("", component, name, flat=False), layer.shape, family)
                first, total = 0, sum(part.size for part in parts)
                for part in parts:
                    index[part.name].append(Rows(name, first, part.size, total))
                    first += part.size
            self._indices[key] = index
        return self._indices[key]

    def _tails(self, name: ModuleId) -> list[Rows]:
        """The layers whose names end with that of a module, or the other way round."""
        wanted = flat(name.path)
        inside = set() if name.flat else set(_shorter(name.path))
        return [
            Rows(layer)
            for layer in self.layers
            if flat(layer) in inside or wanted in _shorter(layer)
        ]

    def _tied(self, name: ModuleId) -> list[Rows]:
        """The input embedding, for a layer that shares its weight."""
        shares = bool(_TIED_INPUTS.fullmatch(name.path))
        shares |= not self.untied and bool(_TIED_OUTPUTS.fullmatch(name.path))
        return [Rows(n) for n in self.layers if _EMBEDDING.fullmatch(n)] if shares else []

    def _not_found(self, name: ModuleId, found: list[str], several: list[str]) -> str:
        """Why a module cannot be found."""
        if several:
            return f"{self.where} has several layers that this could be: {listed(found + several)}"
        dotted = {flat(n): n for n in self.layers}
        near = get_close_matches(flat(name.path), dotted, 3, 0.5)
        return (
            f"{self.where} has no such layer"
            + (f"; the nearest are {listed([dotted[n] for n in near])}" if near else "")
            + ". Give the base model that the adapter was trained on; if this is it under other "
            "names, give it in the form of diffusers or transformers"
        )


LOAD_IT = (
    "load the model as it is used and give that (base=model), PEFT dequantises the weights of a "
    "loaded model"
)


def _shorter(name: str) -> Iterator[str]:
    """The flat name of a dotted one, and of what is behind its dots up to the first number."""
    head = ""  # without its number, one layer would stand for those of all blocks
    while name and not head.isdigit():
        yield flat(name)
        head, _, name = name.partition(".")


def _together(rows: Sequence[Rows]) -> list[Rows]:
    """Rows with those put together that follow each other in one layer."""
    result: list[Rows] = []
    for part in rows:
        last = result[-1] if result else None
        if last and last.name == part.name and last.first + last.size == part.first:
            result[-1] = last._replace(size=last.size + part.size)
        else:
            result.append(part)
    return result


Models = dict[str, Callable[[], Model]]  # component → opens the model

_SLOTS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5,
}


def models_of_pipeline(
    classes: Mapping[str, str], where: str, opened: Callable[[str], Callable[[], Model]]
) -> Models:
    """The models of a pipeline that adapters change.

    Args:
        classes: Name of a model in the pipeline → name of its class.
        where: The pipeline, for messages.
        opened: Gives the function that opens a model.

    Returns:
        Component → what opens it.
    """
    models: Models = {}
    for slot, component in _SLOTS.items():
        if slot in classes:
            is_t5 = component != DENOISER and "T5" in classes[slot]
            models[T5 if is_t5 else component] = opened(slot)
    if "transformer_2" in classes:
        models[DENOISER] = _two_denoisers(where)
        models[DENOISER_2] = opened("transformer_2")
    return models


def _two_denoisers(where: str) -> Callable[[], Model]:
    """What stands for the denoiser where there are two, of which an adapter names none."""

    def refuse() -> Model:
        raise IncompatibleError(
            f"{where} has two denoisers, and which of them the adapter is for cannot be told; "
            "give the one (its folder, or the model itself)"
        )

    return refuse
