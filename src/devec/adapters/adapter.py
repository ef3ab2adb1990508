"""Adapters as values: module name → delta, with what is needed to write them back.

An adapter is a vector: it can be added, scaled, negated, measured and compared. The format that
read an adapter gives it a `Layout`, which stores it again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from devec.adapters.algebra import (
    adapter_norm,
    differing_modules,
    linear_combination,
    same_effect,
)
from devec.adapters.data import AdapterData, contents_of, layout_of
from devec.adapters.layout import MAX_RANK, Plan, ReadOptions
from devec.arguments import inverse, number, whole_number
from devec.deltas.delta import Delta
from devec.errors import FormatError, IncompatibleError, located
from devec.files.locate import adapters_inside, default_name, exists, locate, upload
from devec.files.staging import Writer, write_all
from devec.lazy import outlines
from devec.linalg.dtypes import require_device
from devec.linalg.precision import full_precision


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(AdapterData):
    """A LoRA or DoRA adapter as an element of a vector space.

    Adapters of one base model can be added, subtracted and scaled (``0.5 * a - b``), and compared:
    ``a == b`` holds if they differ by rounding only. Operations return new adapters.

    Attributes:
        name: Name of the adapter in reports and outputs.
        modules: Module name → delta. Only equality of the names matters.
        layout: How the adapter is stored; None if it was made in memory.
        carried: Key → tensor that is no delta (a whole trained module or bias). Such tensors cannot
            be combined linearly: they stay with one adapter, or are refused.
        provenance: The record of the operation that made the adapter, written to its outputs.
        source: The file or directory that the adapter was read from, for messages; may be empty.
        sha256: Digest of the weights file that the adapter was read from; may be empty.

    Example:
        >>> import torch
        >>> from devec import Adapter, Delta
        >>> a = Adapter("a", {"layer": Delta(torch.ones(4, 1), torch.ones(1, 4))})
        >>> a + a == 2 * a
        True
        >>> a - 0.5 * a
        Adapter('a', 1 modules, rank 2)
    """

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
        """Read an adapter (LoRA, DoRA, LoHa or LoKr) in any format that devec knows.

        Args:
            path: A file, a directory with an adapter (of PEFT, or with one ``.safetensors`` file),
                or the id of a repository on the Hugging Face Hub, ``"user/repo"``. A path that
                exists takes precedence over a repository.
            name: Name of the adapter; by default the stem of the file, or the name of the directory
                or repository.
            subfolder: Folder within the directory or repository.
            weight_name: File within that folder; required if it has several.
            revision: Branch, tag or commit of the repository.
            token: Access token for the Hub; by default that of the login.
            max_rank: Largest rank, at least 1, of the factors that a LoHa or LoKr is rewritten to.
                Factors of a larger rank are truncated at the least error, and a warning states it.
            allow_pickle: Whether pickled state dicts may be read; only tensors are read from them.
            base: The base model, which every DoRA requires: a directory, file or sharded index of
                weights, the id of a repository in the Hub's local cache, or a model in memory. Its
                weights are read one at a time, on demand.
            lazy: Read and check the tensors of a module on each access instead of all of them at
                once. The file stays open; if it changes, later accesses raise an error.

        Returns:
            The adapter, with its tensors in the types they are stored in.

        Raises:
            FormatError: If there is no readable adapter at the path.
            UnsupportedError: If the adapter is not a sum of low-rank deltas; the message says why.
            IncompatibleError: If an argument is out of range.

        Example:
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> Adapter.from_pretrained(POOL / "ink")
            Adapter('ink', 20 modules, rank 4)
        """
        local = locate(path, subfolder, weight_name, revision, token)
        name = name or (default_name(local) if exists(path) or weight_name else _hub_name(path))
        max_rank = whole_number(max_rank, "max_rank")
        if max_rank < 1:
            raise IncompatibleError(f"max_rank must be at least 1, got {max_rank}")
        from devec.formats import readers  # which build on adapters

        for read in readers():
            adapter = read(local, name, ReadOptions(max_rank, allow_pickle, base))
            if adapter is not None:
                return adapter if lazy else adapter.loaded()
        raise FormatError(
            f"{local} is not an adapter: expected a .safetensors file, a directory with one, or a "
            f"PEFT adapter directory{adapters_inside(local)}"
        )

    def save_pretrained(
        self, path: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> Path:
        """Write the adapter in the format that it was read in, atomically.

        Args:
            path: Output path; a missing ``.safetensors`` is appended for single-file formats.
            dtype: Storage type of the factors; by default that of the input.
            overwrite: Whether an existing output may be replaced.

        Returns:
            The path written.

        Raises:
            OutputError: If the output exists and may not be replaced, or cannot be written.
            IncompatibleError: If the adapter was made in memory and has no layout.

        Example:
            >>> import tempfile
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> a = Adapter.from_pretrained(POOL / "ink")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Adapter.from_pretrained(a.save_pretrained(f"{folder}/copy")) == a
            True
        """
        target = self.output_path(path)
        write_all({target: self.writer(dtype)}, overwrite=overwrite)
        return target

    def output_path(self, path: str | Path) -> Path:
        """The path that `save_pretrained` writes to, with the suffix of the format.

        Args:
            path: A path, with or without the suffix.

        Returns:
            The path with the suffix.

        Example:
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> Adapter.from_pretrained(POOL / "ink").output_path("out").name
            'out'
        """
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
        """Upload the adapter to the Hugging Face Hub, in the format that it was read in.

        Args:
            repo_id: ``"user/repo"``; created if it does not exist.
            dtype: Storage type of the factors; by default that of the input.
            commit_message: Message of the commit.
            private: Whether a new repository is private.
            token: Access token; by default that of the login.

        Returns:
            URL of the commit.

        Raises:
            OutputError: If the adapter cannot be written or the Hub refuses it.
            IncompatibleError: If the adapter was made in memory and has no layout.

        Example::

            adapter.push_to_hub("user/anime-unique", private=True)
        """
        with tempfile.TemporaryDirectory() as folder:
            target = self.save_pretrained(Path(folder) / self.name, dtype=dtype)
            root = target if target.is_dir() else target.parent
            message = commit_message or f"Upload {self.name}"
            return upload(root, repo_id, message, private=private, token=token)

    def writer(self, dtype: torch.dtype | None = None) -> Writer:
        """A function that writes the adapter to a path; several can be committed together.

        Args:
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The function.

        Raises:
            IncompatibleError: If the adapter was made in memory and has no layout.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> write = Adapter.from_pretrained(POOL / "ink").writer()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     write(Path(folder) / "ink")
            ...     (Path(folder) / "ink" / "adapter_model.safetensors").is_file()
            True
        """
        layout_of(self)
        return lambda path: self.plan(dtype).write(path)

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """What will be written of the adapter; made from outlines, without reading lazy modules.

        Args:
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The plan.

        Raises:
            IncompatibleError: If the adapter was made in memory and has no layout.

        Example:
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> len(Adapter.from_pretrained(POOL / "ink", lazy=True).plan().pieces)
            20
        """
        return layout_of(self).plan(contents_of(self), dtype)

    def loaded(self) -> Adapter:
        """The same adapter with all of its tensors in memory.

        Returns:
            The adapter, no longer lazy.

        Example:
            >>> from devec import Adapter
            >>> from devec.demo.evaluate import POOL
            >>> lazy = Adapter.from_pretrained(POOL / "ink", lazy=True)
            >>> lazy.loaded() == lazy
            True
        """
        return dataclasses.replace(self, modules=dict(self.modules), carried=dict(self.carried))

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter with its deltas on another device.

        Args:
            device: The device.

        Returns:
            The adapter; its carried tensors stay where they are.

        Raises:
            IncompatibleError: If the device cannot be used.

        Example:
            >>> import torch
            >>> from devec import Adapter, Delta
            >>> a = Adapter("a", {"layer": Delta(torch.ones(3, 1), torch.ones(1, 2))})
            >>> a.to("cpu").modules["layer"].B.device
            device(type='cpu')
        """
        require_device(device)
        return self.map(lambda _, delta: delta.to(device))

    @full_precision
    def map(self, change: Callable[[str, Delta], Delta], **changes: Any) -> Adapter:  # noqa: ANN401
        """A new adapter with every delta replaced.

        Args:
            change: Called with module name and delta; returns the new delta.
            **changes: Other attributes to replace.

        Returns:
            The new adapter.

        Example:
            >>> import torch
            >>> from devec import Adapter, Delta
            >>> a = Adapter("a", {"layer": Delta(torch.ones(3, 1), torch.ones(1, 2))})
            >>> a.map(lambda module, delta: 2 * delta, name="b") == 2 * a
            True
        """
        modules: dict[str, Delta] = {}
        for module, delta in self.modules.items():
            with located(f"module {module!r} of {self.label}"):
                modules[module] = change(module, delta)
        return dataclasses.replace(self, modules=modules, **changes)

    def norm(self) -> float:
        """Frobenius norm over all modules, of ΔW and bias changes.

        Returns:
            The norm, exact to rounding, accurate also where terms cancel.

        Cost: O(Σ (out + in)·r²); DoRAs read base weights.

        Example:
            >>> import torch
            >>> from devec import Adapter, Delta
            >>> Adapter("a", {"layer": Delta(torch.ones(4, 1), torch.ones(1, 4))}).norm()
            4.0
        """
        return adapter_norm(self)

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

    def __eq__(self, other: object) -> bool:
        return same_effect(self, other) if isinstance(other, Adapter) else NotImplemented

    def unlike(self, other: Adapter) -> Adapter:
        """The adapter without the modules whose tensors are identical in another adapter.

        Args:
            other: The other adapter.

        Example:
            >>> import torch
            >>> from devec import Adapter, Delta
            >>> a = Adapter("a", {"layer": Delta(torch.ones(4, 1), torch.ones(1, 4))})
            >>> list(a.unlike(a).modules), list(a.unlike(2 * a).modules)
            ([], ['layer'])
        """
        return differing_modules(self, other)

    __hash__ = None  # type: ignore[assignment]  # equality is up to rounding


def _hub_name(path: str | Path) -> str:
    """The name of a repository, or of the file in it."""
    name = Path(path).name
    return Path(name).stem if name.endswith(".safetensors") else name.partition("@")[0]
