"""What concerns several adapters together: telling them apart, doubts, writing all or none."""

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
    """Check that adapters can be told apart by name.

    Args:
        adapters: The adapters.

    Raises:
        IncompatibleError: If two have the same name.
    """
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


def warn_of_strangers(adapters: Sequence[Adapter]) -> None:
    """Say so when adapters name different base models, or change no module in common.

    Args:
        adapters: The adapters of a pool.
    """
    described = [a.layout.about for a in adapters if a.layout is not None]
    # as Hugging Face, kohya's trainers and Stability's ModelSpec say it
    for field in ("base_model", "base_version", "architecture"):
        named = [str(value) for about in described if (value := getattr(about, field))]
        # trainers spell one base model differently
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
    """Write several adapters, all or none, each in the format it came in.

    Args:
        adapters: Path → adapter.
        dtype: Storage precision; by default that of each adapter's input.
        overwrite: Whether outputs that exist may be replaced.

    Raises:
        IncompatibleError: If an adapter was made in memory and has no layout.
        OutputError: If an output exists and may not be replaced, or cannot be written; nothing is
            changed then.
    """
    writers = {a.output_path(path): a.writer(dtype) for path, a in adapters.items()}
    write_all(writers, overwrite=overwrite)
