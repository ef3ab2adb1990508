"""The layers of a base model, and finding the layers that a module of an adapter changes.

Model and adapter may name, fuse and split layers differently, and either may be of a part of what
the other is of.
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
from devec.files.safetensors_reader import FLOAT8_DTYPES, STORAGE_DTYPES
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

# Layers that may share the weight of the input embedding, which files then contain once.
_TIED_INPUTS = re.compile(r"(?:.+\.)?(?:en|de)coder\.embed_tokens")
_TIED_OUTPUTS = re.compile(r"(?:.+\.)?(?:lm_head(?:\.decoder)?|cls\.predictions\.decoder)")
_EMBEDDING = re.compile(r"(?:.+\.)?(?:shared|embed_tokens|wte|tokens_embed|word_embeddings)")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a base model that has a weight.

    Attributes:
        shape: Shape of the weight, flattened to two dimensions.
        load: Loads the weight as it is stored.
        transposed: Whether the weight is stored as (in, out); None if unknown.
    """

    shape: tuple[int, int]
    load: Callable[[], Tensor]
    transposed: bool | None = None


class Rows(NamedTuple):
    """Some rows of a layer: `size` of `total` equal shares, beginning with share `first`."""

    name: str
    first: int = 0
    size: int = 1
    total: int = 1


@dataclass(frozen=True, eq=False)
class Model:
    """One model of a base model: its layers by name.

    Attributes:
        where: The file, folder or object of the model, for messages.
        layers: Dotted name → layer.
        untied: Whether the output layer is known not to share the weight of the input embedding.
        in_memory: Opens the same model with its layer names in memory, if those may differ.
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
        """Read the weight of a module in its stored dtype, as (out, in).

        Args:
            module: Id of the module in an adapter.
            shape: Shape (out, in) of the module in the adapter.
            family: The tables of the model's family, if known from the adapter.
            transposed: Whether the layer stores its weight as (in, out), None if unknown.
            hint: Value of `transposed` for square weights if nothing else tells.

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
            weight = torch.cat([self._load_rows(part) for part in rows])
        else:
            weight = self._load_oriented(rows[0].name, shape, transposed, hint=hint)
        if weight.shape != shape:
            names = listed([part.name for part in rows])
            raise IncompatibleError(
                f"expected a base weight of shape {shape}, but {self.where} gives "
                f"{tuple(weight.shape)} in {names}; this is not the base model that the adapter "
                "was trained on, or another model of its pipeline"
            )
        return weight

    def _load_oriented(
        self, name: str, shape: tuple[int, int], transposed: bool | None, *, hint: bool
    ) -> Tensor:
        """Load the weight of a layer as (out, in)."""
        layer, weight = self.layers[name], self._load(name)
        if transposed is None:
            transposed = layer.transposed
        if transposed is None:
            square = shape[0] == shape[1]
            transposed = hint if square else weight.shape == shape[::-1]
        return weight.mT if transposed else weight

    def _load_rows(self, rows: Rows) -> Tensor:
        """Load some rows of a layer."""
        weight = self._load(rows.name)
        unit, rest = divmod(len(weight), rows.total)
        if rest:
            raise IncompatibleError(
                f"{rows.name!r} of {self.where} has {len(weight)} rows, which are not "
                f"{rows.total} equal shares; this is not the base model that the adapter was "
                "trained on"
            )
        return weight[unit * rows.first : unit * (rows.first + rows.size)]

    def _load(self, name: str) -> Tensor:
        """Load the weight of a layer as a matrix, with 8-bit floats converted to bfloat16."""
        weight = self.layers[name].load()
        if weight.dtype in FLOAT8_DTYPES:
            weight = weight.to(torch.bfloat16)
        if weight.dtype not in STORAGE_DTYPES.values():
            raise UnsupportedError(
                f"{name!r} of {self.where} is stored as {weight.dtype}, expected floating point; "
                "load the model without quantisation"
            )
        return weight.flatten(1)

    def _find(self, module: str, shape: tuple[int, int], family: Family | None) -> Sequence[Rows]:
        """The rows that a module of an adapter changes."""
        name = parse_module_id(module)
        for exact in (module, module.removeprefix(_PEFT_PREFIX), name.path):
            if exact in self.layers:
                return [Rows(exact)]
        index = self._index(name.component, family or self._family)
        found = [index.get(p.name, []) for p in segments_of(name, shape, family or self._family)]
        if not all(found) and (family is None or name.component not in DENOISERS):
            found = [self._by_suffix(name) or self._tied(name)]
        others = [rows.name for candidates in found for rows in candidates[1:]]
        if not all(found) or others:
            raise IncompatibleError(self._not_found(name, [f[0].name for f in found if f], others))
        return _merge_adjacent([candidates[0] for candidates in found])

    @cached_property
    def _family(self) -> Family | None:
        """The family that the names and shapes of the layers show, None if there are no tables."""
        return detect_family({name: layer.shape for name, layer in self.layers.items()}, "")[1]

    def _index(self, component: str, family: Family | None) -> dict[str, list[Rows]]:
        """Name of a part → the rows that contain it, if the model is a given component."""
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

    def _by_suffix(self, name: ModuleId) -> list[Rows]:
        """The layers whose names are a suffix of the module's, or end with the module's name."""
        wanted = flat(name.path)
        suffixes = set() if name.flat else set(_flat_suffixes(name.path))
        return [
            Rows(layer)
            for layer in self.layers
            if flat(layer) in suffixes or wanted in _flat_suffixes(layer)
        ]

    def _tied(self, name: ModuleId) -> list[Rows]:
        """The input embedding, for a layer that shares its weight."""
        shares = bool(_TIED_INPUTS.fullmatch(name.path))
        shares |= not self.untied and bool(_TIED_OUTPUTS.fullmatch(name.path))
        return [Rows(n) for n in self.layers if _EMBEDDING.fullmatch(n)] if shares else []

    def _not_found(self, name: ModuleId, found: list[str], others: list[str]) -> str:
        """The message for a module that matches no layer, or several."""
        if others:
            return f"{self.where} has several layers that this could be: {listed(found + others)}"
        dotted = {flat(n): n for n in self.layers}
        near = get_close_matches(flat(name.path), dotted, 3, 0.5)
        return (
            f"{self.where} has no such layer"
            + (f"; the nearest are {listed([dotted[n] for n in near])}" if near else "")
            + ". Give the base model that the adapter was trained on; if this is it under other "
            "names, give it in the format of diffusers or transformers"
        )


LOAD_ADVICE = (
    "load the model as you use it and give it as the base model (base=model); PEFT dequantises the "
    "weights of a loaded model"
)


def _flat_suffixes(name: str) -> Iterator[str]:
    """The flat names of a dotted name and of its suffixes, up to the first number."""
    head = ""  # without its number, a layer would match the layers of all blocks
    while name and not head.isdigit():
        yield flat(name)
        head, _, name = name.partition(".")


def _merge_adjacent(rows: Sequence[Rows]) -> list[Rows]:
    """Rows, with those merged that follow each other in one layer."""
    result: list[Rows] = []
    for part in rows:
        last = result[-1] if result else None
        if last and last.name == part.name and last.first + last.size == part.first:
            result[-1] = last._replace(size=last.size + part.size)
        else:
            result.append(part)
    return result


ModelOpeners = dict[str, Callable[[], Model]]  # component → function that opens the model

_COMPONENTS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5,
}


def models_of_pipeline(
    classes: Mapping[str, str], where: str, opener: Callable[[str], Callable[[], Model]]
) -> ModelOpeners:
    """The models of a pipeline that adapters change.

    Args:
        classes: Name of a model in the pipeline → name of its class.
        where: The pipeline, for messages.
        opener: Name of a model in the pipeline → function that opens it.

    Returns:
        Component → function that opens its model.
    """
    openers: ModelOpeners = {}
    for slot, component in _COMPONENTS.items():
        if slot in classes:
            is_t5 = component != DENOISER and "T5" in classes[slot]
            openers[T5 if is_t5 else component] = opener(slot)
    if "transformer_2" in classes:
        openers[DENOISER] = _refuse_two_denoisers(where)
        openers[DENOISER_2] = opener("transformer_2")
    return openers


def _refuse_two_denoisers(where: str) -> Callable[[], Model]:
    """The opener of the denoiser in a pipeline of two, for adapters that do not say which."""

    def refuse() -> Model:
        raise IncompatibleError(
            f"{where} has two denoisers, and the adapter does not tell which of them it is for; "
            "give that one (its folder, or the model itself)"
        )

    return refuse
