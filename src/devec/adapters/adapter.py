"""Adapters as values: module name → delta, with what is needed to write them back.

An adapter is a vector: it can be added, scaled, negated, measured and compared. How it is stored
is the business of its `Layout`, which a format made when it read the adapter.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.adapters.algebra import (
    distances,
    linear_combination,
    on_common_modules,
    same_base_models,
    same_tensors,
)
from devec.adapters.layout import MAX_RANK, Layout, Plan, ReadOptions, readers
from devec.arguments import inverse, number, whole_number
from devec.deltas.delta import Delta
from devec.errors import FormatError, IncompatibleError, UnsupportedError, located
from devec.files.locate import adapters_inside, default_name, exists, locate, upload
from devec.files.staging import Writer, write_all
from devec.lazy import LazyMapping, outlines
from devec.linalg.dtypes import require_device
from devec.linalg.precision import full_precision

# Two adapters are equal in effect when they differ by less than this fraction of their factors, and
# their biases by less than this fraction of these: a few units of float32 roundoff, the precision
# factors are combined in. Of the factors, not of the norm: a - a is zero but for rounding of terms
# as large as a.
EFFECT_RTOL = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """A LoRA adapter as an element of a vector space.

    Attributes:
        name: What the adapter is called in reports and output names.
        modules: Module name → delta. Names are opaque: only equality matters.
        layout: How the adapter is stored; None for one that was made in memory.
        carried: Tensors that are not deltas (whole trained modules or biases), by key. No linear
            combination of them is right, so they stay with one adapter or are refused.
        provenance: Where the adapter came from, for the files written.
        source: The file or directory it was read from, for messages; empty if none.
        sha256: Digest of the weights file it was read from; empty if none.
    """

    name: str
    modules: Mapping[str, Delta]
    layout: Layout | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    source: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("modules", "carried"):
            value = getattr(self, name)
            if not isinstance(value, LazyMapping):  # the caller may change it
                object.__setattr__(self, name, dict(value))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        name: str | None = None,
        *,
        subfolder: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        max_rank: int = MAX_RANK,
        allow_pickle: bool = False,
        base: object | None = None,
        lazy: bool = False,
    ) -> Adapter:
        """Read an adapter: LoRA, DoRA, LoHa or LoKr, in any format that devec knows.

        Args:
            path: A file, a directory that holds one (of PEFT, or with one ``.safetensors`` file),
                or the id of a repository on the Hugging Face Hub, ``"user/repo"``. What exists on
                the disk comes first.
            name: What to call it; by default the stem of the file or the name of the directory or
                repository.
            subfolder: Folder within the directory or repository.
            weight_name: File within it, where there are several.
            revision: Branch, tag or commit of the repository.
            token: Access token for the Hub; by default the one of the login.
            max_rank: Largest rank of the factors that a LoHa or LoKr is rewritten to. What has a
                larger one is truncated at the least error, and a warning states the error.
            allow_pickle: Whether pickled state dicts may be read; of these, tensors only.
            base: The base model, which a DoRA cannot be computed with without: a directory, file or
                sharded index of its weights, the id of a repository in the Hub's local cache, or a
                model in memory. Its weights are read one at a time, when they are needed.
            lazy: Read a module's tensors, and check their values, whenever they are asked for,
                instead of all of them now and once. The file stays open, and a change of it is an
                error from then on.

        Returns:
            The adapter, its tensors as stored.

        Raises:
            FormatError: If there is no readable adapter at the path.
            UnsupportedError: If the adapter is not a sum of low-rank deltas; the message says why.
            IncompatibleError: If an argument is out of range.
        """
        found = locate(path, subfolder, weight_name, revision, token)
        name = name or (default_name(found) if exists(path) or weight_name else _hub_name(path))
        max_rank = whole_number(max_rank, "max_rank")
        if max_rank < 1:
            raise IncompatibleError(f"max_rank must be at least 1, got {max_rank}")
        for read in readers():
            adapter = read(found, name, ReadOptions(max_rank, allow_pickle, base))
            if adapter is not None:
                return adapter if lazy else adapter.loaded()
        raise FormatError(
            f"{found} is not an adapter: expected a .safetensors file, a directory with one, or a "
            f"PEFT adapter directory{adapters_inside(found)}"
        )

    def save_pretrained(
        self, path: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> Path:
        """Write the adapter in the format it came in, atomically.

        Args:
            path: Where to write; formats of a single file add ``.safetensors`` where it is missing.
            dtype: Storage precision; by default that of the input.
            overwrite: Whether an existing output may be replaced.

        Returns:
            The path written.

        Raises:
            OutputError: If the output exists and may not be replaced, or cannot be written.
        """
        target = self.output_path(path)
        write_all({target: self.writer(dtype)}, overwrite=overwrite)
        return target

    def output_path(self, path: str | Path) -> Path:
        """Where the adapter is written when asked to be written at a path."""
        path, suffix = Path(path), self.layout.suffix if self.layout is not None else ""
        return path if path.suffix == suffix or not suffix else path.with_name(path.name + suffix)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the adapter to the Hugging Face Hub, in the format it came in.

        Args:
            repo_id: ``"user/repo"``; made if it does not exist.
            dtype: Storage precision; by default that of the input.
            commit_message: What to say of it.
            private: Whether a new repository is private.
            token: Access token; by default the one of the login.

        Returns:
            Address of the commit.

        Raises:
            OutputError: If it cannot be written or the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = self.save_pretrained(Path(folder) / self.name, dtype=dtype)
            root = target if target.is_dir() else target.parent
            message = commit_message or f"Upload {self.name}"
            return upload(root, repo_id, message, private=private, token=token)

    def writer(self, dtype: torch.dtype | None = None) -> Writer:
        """A function that writes the adapter at a path, for writing several outputs at once.

        Args:
            dtype: Storage precision; by default that of the input.

        Returns:
            The function.

        Raises:
            IncompatibleError: If the adapter was made in memory and has no layout.
        """
        self._require_layout()
        return lambda path: self.plan(dtype).write(path)

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """What is written of the adapter; known before its modules are, where these are lazy.

        Args:
            dtype: Storage precision; by default that of the input.

        Returns:
            The plan.
        """
        return self._require_layout().plan(self, dtype)

    def _require_layout(self) -> Layout:
        """The layout; refused for an adapter that was made in memory and has none."""
        if self.layout is None:
            raise IncompatibleError(
                f"adapter {self.name!r} was made in memory and has no file layout; give it one "
                "with dataclasses.replace(adapter, layout=other.layout)"
            )
        return self.layout

    def loaded(self) -> Adapter:
        """The same adapter with all of its tensors in memory."""
        return dataclasses.replace(self, modules=dict(self.modules), carried=dict(self.carried))

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter with its deltas on another device.

        Args:
            device: The device.

        Returns:
            The adapter.

        Raises:
            IncompatibleError: If the device cannot be used.
        """
        require_device(device)
        return self.map(lambda _, delta: delta.to(device))

    @property
    def label(self) -> str:
        """The name, with the source where it is known, for messages."""
        return f"{self.name!r} ({self.source})" if self.source else repr(self.name)

    @full_precision
    def map(self, change: Callable[[str, Delta], Delta], **changes: Any) -> Adapter:  # noqa: ANN401
        """A new adapter with every delta replaced.

        Args:
            change: From module name and delta to the new delta.
            **changes: Other attributes to replace.

        Returns:
            The new adapter.
        """
        modules: dict[str, Delta] = {}
        for module, delta in self.modules.items():
            with located(f"module {module!r} of {self.label}"):
                modules[module] = change(module, delta)
        return dataclasses.replace(self, modules=modules, **changes)

    def __repr__(self) -> str:
        ranks = [delta.rank for delta in outlines(self.modules).values()] or [0]
        spread = f"{min(ranks)}-{max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
        return f"Adapter({self.name!r}, {len(self.modules)} modules, rank {spread})"

    def __add__(self, other: Adapter) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        return linear_combination([self, other], [1.0, 1.0])

    def __sub__(self, other: Adapter) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        return linear_combination([self, other], [1.0, -1.0])

    def __mul__(self, weight: float) -> Adapter:
        return linear_combination([self], [float(number(weight, "weight"))])

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Adapter:
        return self * inverse(weight, "weight")

    def __neg__(self) -> Adapter:
        return self * -1.0

    @full_precision
    def __eq__(self, other: object) -> bool:
        # of effect: the distance is rounding, and carried tensors are identical
        if not isinstance(other, Adapter):
            return NotImplemented
        try:
            one, two = on_common_modules([self, other])
        except (IncompatibleError, UnsupportedError):  # of different base models or kinds
            return False
        if not same_tensors(one.carried, two.carried):
            return False
        one, two = one.unlike(two), two.unlike(one)
        if not same_base_models(one, two):
            return False
        terms = [*one.modules.values(), *two.modules.values()]
        weights, biases = distances(one, two)
        return weights <= EFFECT_RTOL * math.hypot(
            *(delta.factor_norm() for delta in terms)
        ) and biases <= EFFECT_RTOL * math.hypot(*(delta.bias_norm() for delta in terms))

    def unlike(self, other: Adapter) -> Adapter:
        """What is left without the modules that are tensor for tensor those of another adapter."""
        held = {
            module: delta
            for module, delta in self.modules.items()
            if module not in other.modules or not delta.same_as(other.modules[module])
        }
        return dataclasses.replace(self, modules=held)

    __hash__ = None  # type: ignore[assignment]  # equality is up to rounding

    @full_precision
    def norm(self) -> float:
        """Frobenius norm over all modules, of ΔW and bias changes; O(Σ (out + in)·r²)."""
        norms = []
        for module, delta in self.modules.items():
            with located(f"module {module!r} of {self.label}"):
                norms.append(delta.norm())
        return math.hypot(*norms)


def _hub_name(path: str | Path) -> str:
    """The name of a repository, or of the file in it."""
    name = Path(path).name
    return Path(name).stem if name.endswith(".safetensors") else name.partition("@")[0]
