"""What wraps models: one table of hosts, each as models by name and a way to name adapters' files.

An adapter in a `PeftModel` or in a model of transformers is what PEFT would save of it, and one in
a model or pipeline of diffusers what ``save_lora_weights`` would: read in memory, by the readers of
those files. So it is an adapter like any other, and is stored in the format that its host reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from devec.adapters.adapter import Adapter
from devec.adapters.alignment.layout import AlignedLayout
from devec.adapters.layout import ModuleShape, ReadOptions
from devec.base_model.live import live_model
from devec.base_model.model import base_model
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, UnsupportedError, listed, located, warn
from devec.files.safetensors_reader import TensorFile
from devec.formats.convert import convert
from devec.formats.peft.carried import of_base
from devec.formats.peft.config import require_lora
from devec.formats.peft.layout import PeftLayout, peft_layout_for
from devec.formats.peft.names import PREFIX
from devec.formats.peft.read import parse_peft
from devec.formats.rank_patterns import Config
from devec.formats.single_file.header import ADAPTER_KEY
from devec.formats.single_file.read import parse_file
from devec.hosts import embeddings, state, towers
from devec.hosts.layers import Parts, has_merged, offload_again, otherwise_unchanged, walk
from devec.hosts.names import require_names
from devec.hosts.scaling import runs_as_its_own
from devec.lazy import outlines

Stored = tuple[Config, dict[str, Tensor]]  # of one model: configuration, and PEFT's key → tensor

_HOSTS = (
    "a PeftModel, a model of transformers, or a model or pipeline of diffusers that holds adapters"
)
# What diffusers has to be told of an adapter, beside its tensors.
_METADATA = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
# Which model a PEFT directory is of, where a pipeline has several.
_DENOISER = {True: "denoiser", False: None}
_MARKS = ("use_rslora", "use_dora", "lora_bias")


@dataclass(frozen=True)
class Host:
    """Live models that adapters are in, together.

    Attributes:
        given: What it was given as.
        models: Name of a model in its pipeline → model; a model on its own has no name, unless it
            is one of diffusers, in whose files it has one.
        of_diffusers: Whether its adapters are stored in files of diffusers.
        unreached: Names of models whose adapters the pipeline's own calls pass by.
    """

    given: Any
    models: Mapping[str, nn.Module]
    of_diffusers: bool
    unreached: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """What it is, for messages."""
        return type(self.given).__name__

    @property
    def names(self) -> list[str]:
        """Names of all adapters in it."""
        return list(dict.fromkeys(n for m in self.models.values() for n in state.adapters_of(m)))

    def read(self, name: str) -> Adapter:
        """An adapter in the host, its tensors copied.

        Args:
            name: Its name.

        Returns:
            The adapter.

        Raises:
            IncompatibleError: If there is none of that name, or it is merged or unloaded.
            UnsupportedError: If it is not a plain low-rank delta.
        """
        self._require_there(name)
        where = f"adapter {name!r} of {self.label}"
        held: dict[str, Stored] = {}
        runs = runs_as_its_own(self.models, name, self.label, mixes=self.of_diffusers)
        for slot, model in self.models.items():
            if name in state.adapters_of(model):
                with located(where):
                    held[slot] = self._held(model, name, runs=runs)
        options = ReadOptions(base=self.given)
        if self.of_diffusers:
            return parse_file(_as_file(held, self.given), name, options, where)
        ((slot, (config, tensors)),) = held.items()
        adapter = parse_peft(config, tensors, name, options, where)
        copies = self._base_copies(slot, name, config)
        layout = dataclasses.replace(adapter.layout, base_copies=copies)  # type: ignore[type-var]
        return dataclasses.replace(adapter, layout=layout)

    def _base_copies(self, slot: str, name: str, config: Config) -> dict[str, Tensor]:
        """Weights of the base model that are stored with an adapter, copied once for all."""
        model = self.models[slot]
        found = embeddings.base_copies(model, list(walk(model)), name, config)
        return {key: self._copied.setdefault(key, tensor) for key, tensor in found.items()}

    @cached_property
    def _copied(self) -> dict[str, Tensor]:
        """Key → the copy of a weight that all adapters have in common."""
        return {}

    def _require_there(self, name: str) -> None:
        """Refuse names that the host does not know."""
        if not self.names:
            raise IncompatibleError(
                f"{self.label} holds no adapter; load some first (load_adapter, load_lora_weights)"
            )
        if name not in self.names:
            raise IncompatibleError(
                f"{self.label} holds no adapter named {name!r}; it holds {listed(self.names, 20)}"
            )

    @staticmethod
    def _held(model: nn.Module, name: str, *, runs: bool) -> Stored:
        """What one model holds of an adapter, checked."""
        parts = list(walk(model))
        config = json.loads(json.dumps(state.config_of(model, parts, name, runs=runs)))
        require_lora(config, type(model).__name__)
        _require_unmerged(model, parts)
        tensors = state.tensors_of(parts, name)
        if not tensors:
            raise IncompatibleError(
                f"{type(model).__name__} lists it and has no layer with it: it was unloaded "
                "(unload, merge_and_unload); load the adapter again"
            )
        return config, tensors

    def add(self, adapters: Mapping[str, Adapter], *, foreign: bool = False) -> None:
        """Add adapters, all or none, and leave what is active as it was.

        Args:
            adapters: Name → adapter.
            foreign: Whether they come from elsewhere and are stored as in a file. The types of
                their tensors are those of the model then, if these are wider.

        Raises:
            IncompatibleError: If a name cannot be had, or an adapter changes what is not there.
            UnsupportedError: If the host cannot hold an adapter.
            OutputError: If a model does not take it as it is.
        """
        require_names(list(adapters), self.models.values(), self.names)
        for model in self.models.values():
            _require_unmerged(model, list(walk(model)))
        with ExitStack() as unchanged:
            for model in self.models.values():
                unchanged.enter_context(otherwise_unchanged(model))
            added: list[tuple[nn.Module, str]] = []
            try:
                for name, adapter in adapters.items():
                    with located(f"adapter {name!r}"):
                        stored = self._stored(adapter, foreign=foreign)
                        for slot, (config, _) in stored.items():
                            state.require_same_replication(self.models[slot], config)
                        for slot, (config, tensors) in stored.items():
                            added.append((self.models[slot], name))
                            state.put(self.models[slot], name, config, tensors)
            except BaseException:
                for model, name in added:
                    state.remove(model, name)
                raise
        for model in dict(added):
            offload_again(model)
        self._warn_of_unreached([model for model, _ in added])

    def _warn_of_unreached(self, changed: Sequence[nn.Module]) -> None:
        """Name the models whose adapters the pipeline does not set."""
        slots = [s for s in self.unreached if any(self.models[s] is model for model in changed)]
        if slots:
            warn(
                f"set_adapters of {self.label} does not reach {listed(sorted(slots))}, of which "
                "the adapters are, too; call set_adapter there (pipe."
                f"{min(slots)}.set_adapter(names))"
            )

    def _stored(self, adapter: Adapter, *, foreign: bool) -> dict[str, Stored]:
        """An adapter as each of the models is to hold it."""
        adapter = _whole(adapter)
        layout = adapter.layout
        if isinstance(layout, PeftLayout):
            declared = towers.declared_class(layout) if foreign else ""
            slot = self._only_slot(adapter, declared)
            if slot is not None:
                return {slot: self._as_it_is(slot, adapter, layout, foreign=foreign)}
        if adapter.carried:
            raise UnsupportedError(
                f"it holds whole trained tensors ({listed(sorted(adapter.carried))}) that are no "
                f"deltas, for which {self.label} has no place; leave them out "
                "(dataclasses.replace(adapter, carried={}))"
            )
        adapter = self._named_as_here(adapter)
        placed = self._placed(adapter)
        return {
            slot: self._as_peft(self.models[slot], adapter, modules, foreign=foreign)
            for slot, modules in placed.items()
        }

    def _only_slot(self, adapter: Adapter, declared: str) -> str | None:
        """The model that has all modules of a PEFT adapter by their names, None if none has."""
        slots = [slot for slot in self.models if self._has_all(slot, adapter)]
        slots = [slot for slot in slots if self._fits(slot, adapter)] or slots
        return towers.own_slot(slots, self.models, declared)

    def _has_all(self, slot: str, adapter: Adapter) -> bool:
        """Whether a model has all modules of a PEFT adapter, by the same names."""
        known = {_base_name(name.removeprefix(PREFIX)) for name, _ in walk(self.models[slot])}
        return all(_base_name(module) in known for module in adapter.modules)

    def _fits(self, slot: str, adapter: Adapter) -> bool:
        """Whether a model's layers of the names of an adapter's modules have their shapes."""
        known, modules = self._layers[slot], outlines(adapter.modules)
        return towers.fit((modules[m].shape, known[m]) for m in modules if m in known)

    def _as_it_is(
        self, slot: str, adapter: Adapter, layout: PeftLayout, *, foreign: bool
    ) -> Stored:
        """A PEFT adapter as PEFT stores it, for the one model that it is of."""
        model = self.models[slot]
        for module, delta in adapter.modules.items():
            shape = self._layers[slot].get(module)
            if shape is not None:  # a parameter is no layer
                towers.require_shape(module, delta, model, module, shape)
        bases = {key: adapter.carried[key] for key in of_base(layout.config, adapter.carried)}
        embeddings.require_same({**layout.base_copies, **bases}, model)
        own = {k: tensor.clone() for k, tensor in adapter.carried.items() if k not in bases}
        placed = dataclasses.replace(layout, base=base_model(model), base_copies={})
        dtype = _wide_enough(model, adapter) if foreign else None
        return placed.stored(dataclasses.replace(adapter, carried=own).contents, dtype)

    def _named_as_here(self, adapter: Adapter) -> Adapter:
        """An adapter whose modules are named as the host's files name them."""
        layout = adapter.layout
        if layout is None:
            raise IncompatibleError(
                "it was made in memory and says nothing of layers; give it the layout of another "
                "(dataclasses.replace(adapter, layout=other.layout))"
            )
        if len(self._found(adapter)) == len(adapter.modules):
            return adapter
        if not self.of_diffusers:
            return _whole(convert(adapter, "peft"))
        return _whole(
            convert(adapter, "diffusers", component=_DENOISER[layout.names.naming.one_model])
        )

    def _placed(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        """Model → name of a layer → module of the adapter that changes it."""
        found = self._found(adapter)
        placed: dict[str, dict[str, str]] = {}
        for module, delta in adapter.modules.items():
            if module not in found:
                raise IncompatibleError(
                    f"{self.label} has no layer for module {module!r}; the adapter is of another "
                    "base model, or of one that names its layers otherwise"
                )
            slot, name = found[module]
            towers.require_shape(module, delta, self.models[slot], name, self._layers[slot][name])
            placed.setdefault(slot, {})[name] = module
        return placed

    @cached_property
    def _layers(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Model → name → shape of the weight, of all layers that an adapter can change."""
        return {
            slot: {name: layer.shape for name, layer in live_model(model).layers.items()}
            for slot, model in self.models.items()
        }

    def _found(self, adapter: Adapter) -> dict[str, tuple[str, str]]:
        """Module of an adapter → the model and the layer that it is, if there is such a layer."""
        declared = towers.declared_class(adapter.layout)
        modules, found = outlines(adapter.modules), dict[str, tuple[str, str]]()
        for slot, known in self._layers.items():
            inside = {
                module: module.removeprefix(f"{slot}.") if slot else module
                for module in modules
                if not slot or len(self._layers) == 1 or module.startswith(f"{slot}.")
            }
            shapes = {name: modules[module].shape for module, name in inside.items()}
            layers = towers.layers_for(shapes, known, self.models[slot], declared)
            found |= {m: (slot, layers[name]) for m, name in inside.items() if name in layers}
        return found

    @staticmethod
    def _as_peft(
        model: nn.Module, adapter: Adapter, modules: Mapping[str, str], *, foreign: bool
    ) -> Stored:
        """The part of an adapter that changes one model, as PEFT stores it."""
        layout = adapter.require_layout()
        deltas: dict[str, Delta] = {n: adapter.modules[m] for n, m in modules.items()}
        part = dataclasses.replace(adapter, modules=deltas, carried={})
        shapes = {n: ModuleShape(deltas[n].shape, layout.kernel(m)) for n, m in modules.items()}
        made = peft_layout_for(layout, deltas, shapes, "")
        made = dataclasses.replace(made, base=base_model(model))
        return made.stored(part.contents, _wide_enough(model, part) if foreign else None)


def host_of(given: object) -> Host:
    """The models in a live object.

    Args:
        given: A model or a pipeline.

    Returns:
        The host.

    Raises:
        IncompatibleError: If it is none.
        UnsupportedError: If it mixes methods.
    """
    whole: Any = getattr(given, "_orig_mod", given)  # of torch.compile
    parts = getattr(whole, "components", None)
    if isinstance(whole, nn.Module):
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTuner

        if isinstance(whole, BaseTuner):
            raise IncompatibleError(
                f"got the {type(whole).__name__} inside of a PeftModel; give the PeftModel"
            )
        if isinstance(whole, PeftMixedModel):
            raise UnsupportedError("a PeftMixedModel mixes methods; give a PeftModel")
        if hasattr(whole, "load_lora_adapter") and not isinstance(whole, PeftModel):
            slot = "unet" if "UNet" in type(whole).__name__ else "transformer"
            return Host(whole, {slot: whole}, of_diffusers=True)
        return Host(whole, {"": whole}, of_diffusers=False)
    if isinstance(parts, Mapping):
        models = {slot: getattr(part, "_orig_mod", part) for slot, part in parts.items()}
        loadable = getattr(whole, "_lora_loadable_modules", ())
        found = {
            slot: model
            for slot, model in models.items()
            if isinstance(model, nn.Module)
            and (slot in loadable or slot.startswith("text_encoder") or state.adapters_of(model))
        }
        unreached = frozenset(found) - frozenset(loadable or found)
        return Host(whole, found, of_diffusers=True, unreached=unreached)
    hint = "; give its .model" if isinstance(getattr(whole, "model", None), nn.Module) else ""
    raise IncompatibleError(f"expected {_HOSTS}, got {type(whole).__name__}{hint}")


def _require_unmerged(model: nn.Module, parts: Parts) -> None:
    """Refuse models whose weights are not those of the base model."""
    merged = has_merged(parts)
    if merged:
        raise IncompatibleError(
            f"the adapter {merged!r} is merged into the weights of {type(model).__name__}; take it "
            "out first (unmerge_adapter, unfuse_lora)"
        )


def _whole(adapter: Adapter) -> Adapter:
    """An adapter with whole modules, where a pool or a conversion has cut them into pieces."""
    layout = adapter.layout
    return layout.joined(adapter) if isinstance(layout, AlignedLayout) else adapter


def _wide_enough(model: nn.Module, adapter: Adapter) -> torch.dtype:
    """A type in which neither an adapter nor the model it comes to loses precision."""
    wide = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(wide, torch.float32)
    for delta in adapter.modules.values():
        dtype = torch.promote_types(dtype, torch.promote_types(delta.B.dtype, delta.A.dtype))
    return dtype


def _base_name(module: str) -> str:
    """The layer that a module of a PEFT adapter changes: of an expert, the parameter's module."""
    return module.partition("[")[0].replace(".base_layer", "")


def _as_file(held: Mapping[str, Stored], given: Any) -> TensorFile:  # noqa: ANN401
    """What ``save_lora_weights`` of diffusers would write: keys and configuration by model."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for slot, (config, own) in held.items():
        tensors |= {f"{slot}.{key.removeprefix(PREFIX)}": tensor for key, tensor in own.items()}
        fields |= {f"{slot}.{field}": config[field] for field in _METADATA}
        fields |= {f"{slot}.{field}": True for field in _MARKS if config.get(field)}
    strings = {ADAPTER_KEY: json.dumps(fields, sort_keys=True)}
    base = getattr(given, "name_or_path", None)
    if isinstance(base, str) and base:
        strings["base_model_name_or_path"] = base
    return TensorFile(tensors, strings, {})
