"""Hosts: the live models that hold an adapter together, and reading and adding adapters.

An adapter is read as its host would save it: from a `PeftModel` or a model of transformers as a
PEFT directory, from a model or pipeline of diffusers as a file of ``save_lora_weights``. The file
is made in memory and parsed by the readers of files, so the adapter has a layout like any other.
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
from devec.adapters.data import contents_of, layout_of
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
from devec.hosts.layers import NamedModules, merged_adapter, offload_again, state_preserved, walk
from devec.hosts.names import require_new_names
from devec.hosts.scaling import keeps_current_scaling
from devec.lazy import outlines

PeftState = tuple[Config, dict[str, Tensor]]  # of one model: configuration, PEFT's key → tensor

_HOSTS = (
    "a PeftModel, a model of transformers, or a model or pipeline of diffusers that holds adapters"
)
# Fields of the configuration that files of diffusers record.
_METADATA = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
_FLAGS = ("use_rslora", "use_dora", "lora_bias")
# The component of a pipeline that a PEFT directory without prefixes of components is of.
_COMPONENT = {True: "denoiser", False: None}


@dataclass(frozen=True)
class Host:
    """One or more live models that hold adapters together.

    Attributes:
        root: The object that the caller passed: a model or a pipeline.
        models: Name in the pipeline → model. A model outside of a pipeline is named ``""``, or, if
            it is one of diffusers, as in diffusers' files.
        of_diffusers: Whether adapters are saved as files of diffusers.
        unreached: Names of models whose adapters the pipeline's own calls do not reach.
    """

    root: Any
    models: Mapping[str, nn.Module]
    of_diffusers: bool
    unreached: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The class of the host, for messages."""
        return type(self.root).__name__

    @property
    def names(self) -> list[str]:
        """Names of all adapters in the host."""
        return list(dict.fromkeys(n for m in self.models.values() for n in state.adapters_of(m)))

    def read(self, name: str) -> Adapter:
        """Read an adapter of the host; its tensors are copies."""
        self._require_listed(name)
        where = f"adapter {name!r} of {self.label}"
        states: dict[str, PeftState] = {}
        current = keeps_current_scaling(self.models, name, self.label, mixes=self.of_diffusers)
        for slot, model in self.models.items():
            if name in state.adapters_of(model):
                with located(where):
                    states[slot] = _read_state(model, name, current_scaling=current)
        options = ReadOptions(base=self.root)
        if self.of_diffusers:
            return parse_file(_as_file(states, self.root), name, options, where)
        ((slot, (config, tensors)),) = states.items()
        adapter = parse_peft(config, tensors, name, options, where)
        copies = self._base_copies(slot, name, config)
        layout = dataclasses.replace(adapter.layout, base_copies=copies)  # type: ignore[type-var]
        return dataclasses.replace(adapter, layout=layout)

    def _base_copies(self, slot: str, name: str, config: Config) -> dict[str, Tensor]:
        """Weights of the base model that are saved with an adapter; adapters share the copies."""
        model = self.models[slot]
        copies = embeddings.base_copies(model, list(walk(model)), name, config)
        return {key: self._copies.setdefault(key, tensor) for key, tensor in copies.items()}

    @cached_property
    def _copies(self) -> dict[str, Tensor]:
        """Key → the copy of a base weight that all adapters share."""
        return {}

    def _require_listed(self, name: str) -> None:
        """Refuse the name of an adapter that the host does not list."""
        if not self.names:
            raise IncompatibleError(
                f"{self.label} holds no adapter; load some first (load_adapter, load_lora_weights)"
            )
        if name not in self.names:
            raise IncompatibleError(
                f"{self.label} holds no adapter named {name!r}; it holds {listed(self.names, 20)}"
            )

    def add(self, adapters: Mapping[str, Adapter], *, foreign: bool = False) -> None:
        """Add adapters, all or none; the active adapters do not change.

        Args:
            adapters: Name → adapter.
            foreign: Whether the adapters come from outside of the host. Then their tensors are
                converted to the dtype of the model where that is wider.

        Raises:
            IncompatibleError: If a name is not allowed, or a model lacks a layer of an adapter.
            UnsupportedError: If the host cannot represent an adapter.
            OutputError: If a model does not hold an adapter exactly after it was added.
        """
        require_new_names(list(adapters), self.models.values(), self.names)
        for model in self.models.values():
            _require_unmerged(model, list(walk(model)))
        with ExitStack() as preserved:
            for model in self.models.values():
                preserved.enter_context(state_preserved(model))
            added: list[tuple[nn.Module, str]] = []
            try:
                for name, adapter in adapters.items():
                    with located(f"adapter {name!r}"):
                        states = self._states(adapter, foreign=foreign)
                        for slot, (config, _) in states.items():
                            state.require_same_replication(self.models[slot], config)
                        for slot, (config, tensors) in states.items():
                            added.append((self.models[slot], name))
                            state.add(self.models[slot], name, config, tensors)
            except BaseException:
                for model, name in added:
                    state.remove(model, name)
                raise
        for model in dict(added):
            offload_again(model)
        self._warn_of_unreached([model for model, _ in added])

    def _warn_of_unreached(self, changed: Sequence[nn.Module]) -> None:
        """Warn if adapters were added to models that the pipeline's ``set_adapters`` skips."""
        slots = [s for s in self.unreached if any(self.models[s] is model for model in changed)]
        if slots:
            warn(
                f"set_adapters of {self.label} does not reach {listed(sorted(slots))}, to which "
                "adapters were added; call set_adapter there, too (pipe."
                f"{min(slots)}.set_adapter(names))"
            )

    def _states(self, adapter: Adapter, *, foreign: bool) -> dict[str, PeftState]:
        """Model → configuration and tensors of an adapter in it."""
        adapter = _joined(adapter)
        layout = adapter.layout
        if isinstance(layout, PeftLayout):
            declared = towers.declared_class(layout) if foreign else ""
            slot = self._only_slot(adapter, declared)
            if slot is not None:
                return {slot: self._same_state(slot, adapter, layout, foreign=foreign)}
        if adapter.carried:
            raise UnsupportedError(
                f"it holds whole trained tensors ({listed(sorted(adapter.carried))}) that are no "
                f"deltas, for which {self.label} has no place; leave them out "
                "(dataclasses.replace(adapter, carried={}))"
            )
        adapter = self._renamed(adapter)
        return {
            slot: _converted_state(self.models[slot], adapter, modules, foreign=foreign)
            for slot, modules in self._assigned(adapter).items()
        }

    def _only_slot(self, adapter: Adapter, declared: str) -> str | None:
        """The model whose layers have the names of a PEFT adapter's modules, None if none has."""
        slots = [slot for slot in self.models if self._has_all(slot, adapter)]
        slots = [slot for slot in slots if self._fits(slot, adapter)] or slots
        return towers.own_slot(slots, self.models, declared)

    def _has_all(self, slot: str, adapter: Adapter) -> bool:
        """Whether a model has all modules of a PEFT adapter, by the same names."""
        names = {_layer_name(name.removeprefix(PREFIX)) for name, _ in walk(self.models[slot])}
        return all(_layer_name(module) in names for module in adapter.modules)

    def _fits(self, slot: str, adapter: Adapter) -> bool:
        """Whether the layers of a model have the shapes of an adapter's modules of their names."""
        shapes, modules = self._shapes[slot], outlines(adapter.modules)
        return towers.fit((modules[m].shape, shapes[m]) for m in modules if m in shapes)

    def _same_state(
        self, slot: str, adapter: Adapter, layout: PeftLayout, *, foreign: bool
    ) -> PeftState:
        """Configuration and tensors of a PEFT adapter, for the one model that it is of."""
        model = self.models[slot]
        for module, delta in adapter.modules.items():
            shape = self._shapes[slot].get(module)
            if shape is not None:  # a parameter is no layer
                towers.require_shape(module, delta, model, module, shape)
        bases = {key: adapter.carried[key] for key in of_base(layout.config, adapter.carried)}
        embeddings.require_same_embeddings({**layout.base_copies, **bases}, model)
        carried = {k: tensor.clone() for k, tensor in adapter.carried.items() if k not in bases}
        layout = dataclasses.replace(layout, base=base_model(model), base_copies={})
        dtype = _widest_dtype(model, adapter) if foreign else None
        return layout.stored(contents_of(dataclasses.replace(adapter, carried=carried)), dtype)

    def _renamed(self, adapter: Adapter) -> Adapter:
        """An adapter whose modules are named as in the files of the host."""
        layout = adapter.layout
        if layout is None:
            raise IncompatibleError(
                "it was made in memory and does not say which layers it changes; give it the "
                "layout of another (dataclasses.replace(adapter, layout=other.layout))"
            )
        if len(self._matches(adapter)) == len(adapter.modules):
            return adapter
        if not self.of_diffusers:
            return _joined(convert(adapter, "peft"))
        component = _COMPONENT[layout.names.naming.one_model]
        return _joined(convert(adapter, "diffusers", component=component))

    def _assigned(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        """Model → layer → module of the adapter that changes it."""
        matches = self._matches(adapter)
        assigned: dict[str, dict[str, str]] = {}
        for module, delta in adapter.modules.items():
            if module not in matches:
                raise IncompatibleError(
                    f"{self.label} has no layer for module {module!r}; the adapter is of another "
                    "base model, or of one that names its layers otherwise"
                )
            slot, name = matches[module]
            towers.require_shape(module, delta, self.models[slot], name, self._shapes[slot][name])
            assigned.setdefault(slot, {})[name] = module
        return assigned

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Model → layer → shape of its weight, for all layers that an adapter can change."""
        return {
            slot: {name: layer.shape for name, layer in live_model(model).layers.items()}
            for slot, model in self.models.items()
        }

    def _matches(self, adapter: Adapter) -> dict[str, tuple[str, str]]:
        """Module of an adapter → model and layer that it changes, if there is such a layer."""
        declared = towers.declared_class(adapter.layout)
        modules, matches = outlines(adapter.modules), dict[str, tuple[str, str]]()
        for slot, known in self._shapes.items():
            inside = {
                module: module.removeprefix(f"{slot}.") if slot else module
                for module in modules
                if not slot or len(self._shapes) == 1 or module.startswith(f"{slot}.")
            }
            shapes = {name: modules[module].shape for module, name in inside.items()}
            layers = towers.layers_for(shapes, known, self.models[slot], declared)
            matches |= {m: (slot, layers[name]) for m, name in inside.items() if name in layers}
        return matches


def host_of(root: object) -> Host:
    """The host that a model or pipeline is; other objects are refused."""
    unwrapped: Any = getattr(root, "_orig_mod", root)  # of torch.compile
    components = getattr(unwrapped, "components", None)
    if isinstance(unwrapped, nn.Module):
        return _model_host(unwrapped)
    if isinstance(components, Mapping):
        return _pipeline_host(unwrapped, components)
    hint = "; give its .model" if isinstance(getattr(unwrapped, "model", None), nn.Module) else ""
    raise IncompatibleError(f"expected {_HOSTS}, got {type(unwrapped).__name__}{hint}")


def _model_host(model: Any) -> Host:  # noqa: ANN401
    """The host that a single model is."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, BaseTuner):
        raise IncompatibleError(
            f"got the {type(model).__name__} inside of a PeftModel; give the PeftModel"
        )
    if isinstance(model, PeftMixedModel):
        raise UnsupportedError("a PeftMixedModel mixes methods; give a PeftModel")
    if hasattr(model, "load_lora_adapter") and not isinstance(model, PeftModel):
        slot = "unet" if "UNet" in type(model).__name__ else "transformer"
        return Host(model, {slot: model}, of_diffusers=True)
    return Host(model, {"": model}, of_diffusers=False)


def _pipeline_host(pipeline: Any, components: Mapping[str, Any]) -> Host:  # noqa: ANN401
    """The host that a pipeline of diffusers is."""
    loadable = getattr(pipeline, "_lora_loadable_modules", ())
    models = {slot: getattr(part, "_orig_mod", part) for slot, part in components.items()}
    models = {
        slot: model
        for slot, model in models.items()
        if isinstance(model, nn.Module)
        and (slot in loadable or slot.startswith("text_encoder") or state.adapters_of(model))
    }
    unreached = frozenset(models) - frozenset(loadable or models)
    return Host(pipeline, models, of_diffusers=True, unreached=unreached)


def _read_state(model: nn.Module, name: str, *, current_scaling: bool) -> PeftState:
    """Configuration and tensors of a plain LoRA or DoRA in one model."""
    modules = list(walk(model))
    config = state.config_of(model, modules, name, current_scaling=current_scaling)
    config = json.loads(json.dumps(config))
    require_lora(config, type(model).__name__)
    _require_unmerged(model, modules)
    tensors = state.tensors_of(modules, name)
    if not tensors:
        raise IncompatibleError(
            f"{type(model).__name__} lists it and has no layer with it: it was unloaded "
            "(unload, merge_and_unload); load the adapter again"
        )
    return config, tensors


def _converted_state(
    model: nn.Module, adapter: Adapter, modules: Mapping[str, str], *, foreign: bool
) -> PeftState:
    """Configuration and tensors for PEFT of the modules of an adapter that change one model."""
    layout = layout_of(adapter)
    deltas: dict[str, Delta] = {n: adapter.modules[m] for n, m in modules.items()}
    part = dataclasses.replace(adapter, modules=deltas, carried={})
    shapes = {n: ModuleShape(deltas[n].shape, layout.kernel(m)) for n, m in modules.items()}
    plain = peft_layout_for(layout, deltas, shapes, "")
    plain = dataclasses.replace(plain, base=base_model(model))
    return plain.stored(contents_of(part), _widest_dtype(model, part) if foreign else None)


def _require_unmerged(model: nn.Module, modules: NamedModules) -> None:
    """Refuse a model into whose weights an adapter is merged."""
    merged = merged_adapter(modules)
    if merged:
        raise IncompatibleError(
            f"the adapter {merged!r} is merged into the weights of {type(model).__name__}; unmerge "
            "it first (unmerge_adapter, unfuse_lora)"
        )


def _joined(adapter: Adapter) -> Adapter:
    """An adapter with whole modules, if alignment or a conversion has cut them into slices."""
    layout = adapter.layout
    return layout.joined(adapter) if isinstance(layout, AlignedLayout) else adapter


def _widest_dtype(model: nn.Module, adapter: Adapter) -> torch.dtype:
    """The dtype that holds the values of the model and of the adapter without rounding."""
    wide = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(wide, torch.float32)
    for delta in adapter.modules.values():
        dtype = torch.promote_types(dtype, torch.promote_types(delta.B.dtype, delta.A.dtype))
    return dtype


def _layer_name(module: str) -> str:
    """The layer of a PEFT adapter's module; for an expert, the module that has the parameter."""
    return module.partition("[")[0].replace(".base_layer", "")


def _as_file(states: Mapping[str, PeftState], root: Any) -> TensorFile:  # noqa: ANN401
    """The file that ``save_lora_weights`` of diffusers would write: keys and fields by model."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for slot, (config, of_model) in states.items():
        tensors |= {f"{slot}.{key.removeprefix(PREFIX)}": t for key, t in of_model.items()}
        fields |= {f"{slot}.{field}": config[field] for field in _METADATA}
        fields |= {f"{slot}.{field}": True for field in _FLAGS if config.get(field)}
    strings = {ADAPTER_KEY: json.dumps(fields, sort_keys=True)}
    base = getattr(root, "name_or_path", None)
    if isinstance(base, str) and base:
        strings["base_model_name_or_path"] = base
    return TensorFile(tensors, strings, {})
