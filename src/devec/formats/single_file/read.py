"""Reading single-file adapters of all conventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.layout import ReadOptions
from devec.base_model.model import BaseModel, base_model
from devec.deltas.delta import Delta
from devec.errors import FormatError, listed, located, warn
from devec.files.safetensors_reader import (
    TensorFile,
    is_tensor_file,
    read_tensors,
    require_factor,
    require_finite,
)
from devec.formats.magnitudes import MAGNITUDE_PARTS, MagnitudeSlot, warn_of_signs
from devec.formats.rank_patterns import rank_and_scaling
from devec.formats.single_file.header import (
    ADAPTER_KEY,
    adapter_config,
    base_hint,
    record_in_header,
)
from devec.formats.single_file.keys import FileKeys, ModuleKeys, sort_file_keys
from devec.formats.single_file.layout import FileLayout
from devec.formats.single_file.slot import FileSlot
from devec.formats.single_file.storage import SUFFIX
from devec.formats.single_file.stored_module import StoredModule, read_module
from devec.formats.single_file.warnings import warn_of_fused, warn_of_truncation, warn_of_unknown
from devec.lazy import LazyMapping, mapped, outlines, selected
from devec.naming.conventions import (
    DIFFUSERS,
    KOHYA_SUFFIXES,
    OLD_DIFFUSERS,
    PEFT_KEYS,
    PEFT_SUFFIXES,
    XLABS_SUFFIXES,
    Naming,
    Suffixes,
    convention_name,
    naming_of,
)
from devec.naming.detection import conv_kernel, detect_family
from devec.naming.module_id import DENOISERS, parse_module_id

_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}


class _Configured(NamedTuple):
    """The settings of a module in the header."""

    rank: int
    scaling: float
    is_dora: bool


def read_file(path: Path, name: str, options: ReadOptions) -> Adapter | None:
    """Read a single-file adapter.

    Args:
        path: The file, or a directory that holds it alone.
        name: Name of the adapter.
        options: How to read it.

    Returns:
        The adapter; None if the path is no file of tensors.

    Raises:
        FormatError: If the file is not a readable adapter.
        UnsupportedError: If the adapter cannot be represented exactly.
    """
    path = _only_file(path)
    if not (path.is_file() and is_tensor_file(path)):
        return None
    with located(str(path)):
        file = read_tensors(path, allow_pickle=options.allow_pickle)
    adapter = parse_file(file, name, options, str(path))
    return dataclasses.replace(adapter, source=str(path), sha256=file.sha256)


def parse_file(file: TensorFile, name: str, options: ReadOptions, where: str) -> Adapter:
    """The adapter from the tensors and the header of a file.

    Args:
        file: Tensors and header, from a file or as a file would have them.
        name: Name of the adapter.
        options: How to read it.
        where: Their origin, for messages.

    Returns:
        The adapter.

    Raises:
        FormatError: If they are no adapter.
        UnsupportedError: If the adapter cannot be represented exactly.
    """
    tensors, strings = file.tensors, file.metadata
    with located(where):
        keys = sort_file_keys({key: tuple(t.shape) for key, t in outlines(tensors).items()})
        whole = dict.fromkeys((*keys.carried, *keys.unknown))
        carried = mapped(selected(tensors, whole), require_finite)
        configured = _configured(adapter_config(strings), keys.modules)
        stored = _FileModules(keys.modules, tensors, configured, options.max_rank)
        modules = {module: stored.outline(module) for module in keys.modules}
        base = base_model(options.base, strings.get("base_model_name_or_path", ""))
        layout = _layout(modules, keys, file, base, by_metadata=bool(configured))
        deltas = {m: _delta(m, outlined, layout) for m, outlined in modules.items()}
        provenance = record_in_header(strings)

    def read_delta(module: str) -> Delta:
        with located(where):
            return _delta(module, stored.read(module), layout)

    read = LazyMapping(deltas, read_delta) if isinstance(tensors, LazyMapping) else deltas
    warn_of_unknown(where, keys.unknown)
    if layout.convention == PEFT_KEYS and not configured and provenance is None:
        warn(
            f"{where} was written by PEFT, but its adapter_config.json, which has the alphas, is "
            "not beside it; the scaling is taken to be 1, as other readers do"
        )
    warn_of_truncation(where, layout, options)
    warn_of_fused(where, read)
    with located(where):
        warn_of_signs(where, stored.magnitudes())
    return Adapter(name, read, layout, carried, provenance, source=where)


class _FileModules:
    """Reads the modules of a file.

    The outline of a LoRA follows from the shapes of its factors. LoHas and LoKrs are rewritten when
    the file is opened, because their ranks depend on their values, and stay in memory.
    """

    def __init__(
        self,
        keys: Mapping[str, ModuleKeys],
        tensors: Mapping[str, Tensor],
        configured: Mapping[str, _Configured],
        max_rank: int,
    ) -> None:
        self._keys, self._tensors = keys, tensors
        self._configured, self._max_rank = configured, max_rank
        self._rewritten: dict[str, StoredModule] = {}

    def outline(self, module: str) -> StoredModule:
        """The outline of a module."""
        if "up" in self._keys[module].parts or not isinstance(self._tensors, LazyMapping):
            return self._read(module, outlines(self._tensors))
        self._rewritten[module] = self._read(module, self._tensors)
        return self._rewritten[module]

    def read(self, module: str) -> StoredModule:
        """A module with its values, checked."""
        return self._rewritten.get(module) or self._read(module, self._tensors)

    def magnitudes(self) -> Iterator[tuple[str, Tensor]]:
        """The modules with magnitudes, and the magnitudes."""
        for module, keys in self._keys.items():
            for part in MAGNITUDE_PARTS:
                if part in keys.parts:
                    yield module, self._tensors[keys.parts[part]]

    def _read(self, module: str, tensors: Mapping[str, Tensor]) -> StoredModule:
        """A module from tensors or their outlines; scalars are read in either case."""
        with located(f"module {module!r}"):
            parts = {
                part: self._tensors[key]
                if part in ("alpha", "scale")
                else require_factor(key, tensors[key])
                for part, key in self._keys[module].parts.items()
            }
            declared = self._configured.get(module)
            stored = read_module(parts, declared.scaling if declared else None, self._max_rank)
            if declared and declared.rank != stored.delta.rank:
                raise FormatError(
                    f"{ADAPTER_KEY} in the header says rank {declared.rank}, the tensors have "
                    f"rank {stored.delta.rank}"
                )
            if declared and declared.is_dora != bool(stored.magnitudes):
                raise FormatError(
                    f"{ADAPTER_KEY} in the header says use_dora {declared.is_dora}, but there "
                    f"are {'no' if declared.is_dora else 'some'} magnitudes; which of the two is "
                    "wrong cannot be determined"
                )
            return stored


def _delta(module: str, stored: StoredModule, layout: FileLayout) -> Delta:
    """The delta of a module, for a DoRA with its base weight, which is not read."""
    with located(f"module {module!r}"):
        return stored.on(layout.weight(module))


def _only_file(path: Path) -> Path:
    """The only file of tensors in a directory, or the path itself."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix == SUFFIX)
    if len(files) > 1:
        raise FormatError(
            f"{path} holds {len(files)} files, name one of them (weight_name=, or its path): "
            f"{listed([file.name for file in files])}"
        )
    return files[0] if files else path


def _configured(
    config: Mapping[str, Any], modules: Mapping[str, ModuleKeys]
) -> dict[str, _Configured]:
    """Module → settings in the header's ``lora_adapter_metadata``; empty if it has none."""
    components: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        component, _, field_name = key.rpartition(".")
        components.setdefault(component, {})[field_name] = value
    result: dict[str, _Configured] = {}
    for module in modules:
        name = parse_module_id(module)
        own, path = name.prefix.rstrip("."), name.current_path
        if own not in components:  # a model that the conventions do not name
            own = next((c for c in components if c and module.startswith(f"{c}.")), "")
            path = module.removeprefix(f"{own}.") if own else path
        settings = components.get(own)
        if settings:
            rank, scaling = rank_and_scaling({**_PEFT_DEFAULTS, **settings}, path)
            result[module] = _Configured(rank, scaling, bool(settings.get("use_dora")))
    return result


def _layout(
    modules: Mapping[str, StoredModule],
    keys: FileKeys,
    file: TensorFile,
    base: BaseModel,
    *,
    by_metadata: bool,
) -> FileLayout:
    """The layout of a file, from its modules."""
    shapes = {module: stored.delta.shape for module, stored in modules.items()}
    family, table = detect_family(shapes, base_hint(file.metadata))
    ids = list(modules) or [key.rpartition(".")[0] for key in keys.carried]
    naming = naming_of(ids, table)
    _require_distinct_modules(modules)
    downs = {k.parts["down"].removeprefix(k.id) for k in keys.modules.values() if "down" in k.parts}
    convention = convention_name(map(parse_module_id, ids), min(downs, default=""))
    # diffusers ignores keys that are not spelled like the first key of a file
    spelled = {down.startswith(".lora_A") for down in downs}
    one_style = convention in (DIFFUSERS, OLD_DIFFUSERS) and len(spelled) > 1
    suffixes = _suffixes(keys.modules.values(), naming, one_style=one_style)
    slots = [
        _file_slot(keys.modules[module], stored, file, family, suffixes)
        for module, stored in modules.items()
    ]
    return FileLayout(
        convention=DIFFUSERS if one_style else convention,
        naming=naming,
        suffixes=suffixes,
        family=family,
        slots=tuple(map(_current, slots) if one_style else slots),
        metadata=dict(file.metadata),
        base=base,
        by_metadata=by_metadata,
        kinds={m: stored.kind for m, stored in modules.items() if stored.kind != "LoRA"},
        errors={m: stored.error for m, stored in modules.items() if stored.error},
    )


def _file_slot(
    keys: ModuleKeys, stored: StoredModule, file: TensorFile, family: str, usual: Suffixes
) -> FileSlot:
    """The slot of a module: its own keys, or those of a plain LoRA."""
    parts, delta = keys.parts, stored.delta
    plain = stored.kind.startswith("LoRA")
    suffixes = PEFT_SUFFIXES if plain else KOHYA_SUFFIXES
    down, up, alpha, bias = suffixes.keys(keys.id)
    kernel = stored.kernel
    if not kernel and not plain:
        name = parse_module_id(keys.id)
        own = name.component in DENOISERS
        kernel = conv_kernel(family, name.key[1], delta.shape[1]) if own else ()
    if "scale" in parts:  # only A1111 reads it
        alpha = keys.id + KOHYA_SUFFIXES.alpha
    factors = [k for part, k in parts.items() if part not in ("alpha", "scale", *MAGNITUDE_PARTS)]
    known = outlines(file.tensors)
    types = [known[parts.get(part, factors[0])].dtype for part in ("down", "up")]
    alpha_type = known[parts["alpha"]].dtype if "alpha" in parts else torch.float32
    alpha_type = alpha_type if alpha_type.is_floating_point else torch.float32
    return FileSlot(
        id=keys.id,
        shape=delta.shape,
        kernel=kernel,
        down=parts.get("down", down),
        up=parts.get("up", up),
        alpha=parts.get("alpha", alpha),
        bias=parts.get("bias", bias),
        magnitude=_magnitude_slot(keys, stored, file, usual.magnitude),
        dtypes=(types[0], types[1], alpha_type),
        rank=0 if "scale" in parts else delta.rank,
        scaling=delta.scaling,
        read_as=file.narrow.get(factors[0]),
    )


def _magnitude_slot(
    keys: ModuleKeys, stored: StoredModule, file: TensorFile, suffix: str
) -> MagnitudeSlot:
    """The slot of a module's magnitudes."""
    key = next((keys.parts[part] for part in MAGNITUDE_PARTS if part in keys.parts), "")
    if not key:
        return MagnitudeSlot(keys.id + suffix)
    tensor = outlines(file.tensors)[key]
    return MagnitudeSlot(key, stored.axis, tuple(tensor.shape))


def _suffixes(keys: Iterable[ModuleKeys], naming: Naming, *, one_style: bool) -> Suffixes:
    """The suffixes for keys of further modules, from the keys of the file."""
    keys = list(keys)
    usual = _usual_suffixes(keys, naming, one_style=one_style)
    ends = (k.parts[p].removeprefix(k.id) for k in keys for p in MAGNITUDE_PARTS if p in k.parts)
    return dataclasses.replace(usual, magnitude=next(ends, usual.magnitude))


def _usual_suffixes(keys: Sequence[ModuleKeys], naming: Naming, *, one_style: bool) -> Suffixes:
    """The suffixes of a file; for magnitudes, those of the programs that read it."""
    pairs = [k for k in keys if {"up", "down"} <= k.parts.keys()]
    has_alpha = any("alpha" in k.parts for k in pairs)
    if naming.scheme == "xlabs":
        return XLABS_SUFFIXES
    if one_style:
        return PEFT_SUFFIXES
    if not pairs:
        return KOHYA_SUFFIXES
    down, up = (pairs[0].parts[part].removeprefix(pairs[0].id) for part in ("down", "up"))
    alike = KOHYA_SUFFIXES if has_alpha else PEFT_SUFFIXES
    magnitude = (KOHYA_SUFFIXES if naming.is_comfy else PEFT_SUFFIXES).magnitude
    return Suffixes(down, up, alike.alpha, alike.bias, magnitude)


def _current(slot: FileSlot) -> FileSlot:
    """A slot of diffusers with the keys that it writes today."""
    name = parse_module_id(slot.id)
    module, magnitude = name.prefix + name.current_path, slot.magnitude
    down, up, _, bias = PEFT_SUFFIXES.keys(module)
    if magnitude.everywhere:
        magnitude = dataclasses.replace(magnitude, key=module + PEFT_SUFFIXES.magnitude)
    return dataclasses.replace(slot, down=down, up=up, bias=bias, magnitude=magnitude)


def _require_distinct_modules(modules: Mapping[str, StoredModule]) -> None:
    """Refuse two ids of one module: readers apply only one of them, and not all the same."""
    seen: dict[tuple[str, str], str] = {}
    for module in modules:
        name = parse_module_id(module)
        other = seen.setdefault(name.key, module)
        known = parse_module_id(other)
        # a.b_c and a_b.c are two modules, though their flat names are one
        apart = not name.flat and name.prefix == known.prefix and name.bare_path != known.bare_path
        if other != module and not apart:
            raise FormatError(
                f"{other!r} and {module!r} are two names of one module; remove one of them"
            )
