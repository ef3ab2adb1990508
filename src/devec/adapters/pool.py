"""Checks on a pool of adapters (distinct names, same base model), and saving several atomically."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch

from devec.adapters.adapter import Adapter
from devec.errors import IncompatibleError, listed, warn
from devec.files.staging import write_all


def require_distinct_names(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters of which two have the same name, and objects that are no adapters."""
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise IncompatibleError(
                f"expected adapters, got {type(adapter).__name__} {adapter!r}; read one with "
                "devec.Adapter.from_pretrained"
            )
    names = [adapter.name for adapter in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise IncompatibleError(
            f"adapter names must differ, but {listed(twice)} is given more than once; "
            "name adapters with NAME=PATH or Adapter.from_pretrained(path, name=...)"
        )


def warn_if_unrelated(adapters: Sequence[Adapter]) -> None:
    """Warn if adapters record different base models, or change no module in common."""
    described = [a.layout.about for a in adapters if a.layout is not None]
    # recorded by Hugging Face, kohya's trainers and Stability's ModelSpec, respectively
    for field in ("base_model", "base_version", "architecture"):
        named = [str(value) for about in described if (value := getattr(about, field))]
        # trainers spell the name of one base model differently
        bases = list({re.sub(r"[^a-z0-9]", "", name.lower()): name for name in named}.values())
        if len(bases) > 1:
            warn(
                f"the adapters name different base models ({listed(bases)}); the result means "
                "something only if the weights of those are the same"
            )
            break
    if not any(a.modules.keys() & b.modules.keys() for a, b in combinations(adapters, 2)):
        some = "; ".join(f"{a.label} has {listed(list(a.modules), 2) or 'none'}" for a in adapters)
        warn(f"the adapters have no module in common, so they may not belong together: {some}")


def save_adapters(
    adapters: Mapping[str | Path, Adapter],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write several adapters, each in the format that it was read in: all of them, or none.

    Args:
        adapters: Output path → adapter; a missing ``.safetensors`` is appended for single-file
            formats.
        dtype: Storage type of the factors; by default that of each adapter's input.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        IncompatibleError: If an adapter was made in memory and has no layout.
        OutputError: If an output exists and may not be replaced, or cannot be written. Then nothing
            is changed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from devec import Adapter, save_adapters
        >>> from devec.demo.evaluate import POOL
        >>> a = Adapter.from_pretrained(POOL / "ink")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapters({f"{folder}/same": a, f"{folder}/half": 0.5 * a})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['half', 'same']
    """
    writers = {a.output_path(path): a.writer(dtype) for path, a in adapters.items()}
    write_all(writers, overwrite=overwrite)
