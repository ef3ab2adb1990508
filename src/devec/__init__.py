"""devec: adapter algebra for LoRA and DoRA, computed on the low-rank factors.

Split a pool of adapters into shared, unique and common parts:

    import devec

    a = devec.Adapter.from_pretrained("anime.safetensors")
    b = devec.Adapter.from_pretrained("pixel.safetensors")
    parts = devec.decompose([a, b])
    parts.unique["anime"].save_pretrained("out/anime-unique")

Public names are imported on first use, so the command line can answer without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from devec._version import __version__

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter
    from devec.adapters.algebra import cosine, distance, inner
    from devec.adapters.pool import save_adapters
    from devec.decomposition.findings import ModuleSplit
    from devec.decomposition.in_memory import decompose
    from devec.decomposition.result import Decomposition
    from devec.deltas.delta import Delta
    from devec.errors import DevecError, DevecWarning
    from devec.formats.convert import convert
    from devec.hosts.live import (
        add_adapter,
        combine_adapters,
        decompose_adapters,
        extract_adapter,
        negate_adapter,
    )
    from devec.operations.as_lora import as_lora
    from devec.operations.combine import combine
    from devec.operations.compress import Compression, compress
    from devec.operations.overlap import ModuleOverlap, Overlap, overlap
    from devec.streaming.decompose_to import decompose_to

_MODULES = {
    "Adapter": "adapters.adapter",
    "Compression": "operations.compress",
    "Decomposition": "decomposition.result",
    "Delta": "deltas.delta",
    "DevecError": "errors",
    "DevecWarning": "errors",
    "ModuleOverlap": "operations.overlap",
    "ModuleSplit": "decomposition.findings",
    "Overlap": "operations.overlap",
    "add_adapter": "hosts.live",
    "as_lora": "operations.as_lora",
    "combine": "operations.combine",
    "combine_adapters": "hosts.live",
    "compress": "operations.compress",
    "convert": "formats.convert",
    "cosine": "adapters.algebra",
    "decompose": "decomposition.in_memory",
    "decompose_adapters": "hosts.live",
    "decompose_to": "streaming.decompose_to",
    "distance": "adapters.algebra",
    "extract_adapter": "hosts.live",
    "inner": "adapters.algebra",
    "negate_adapter": "hosts.live",
    "overlap": "operations.overlap",
    "save_adapters": "adapters.pool",
}

__all__ = [
    "Adapter",
    "Compression",
    "Decomposition",
    "Delta",
    "DevecError",
    "DevecWarning",
    "ModuleOverlap",
    "ModuleSplit",
    "Overlap",
    "__version__",
    "add_adapter",
    "as_lora",
    "combine",
    "combine_adapters",
    "compress",
    "convert",
    "cosine",
    "decompose",
    "decompose_adapters",
    "decompose_to",
    "distance",
    "extract_adapter",
    "inner",
    "negate_adapter",
    "overlap",
    "save_adapters",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'devec' has no attribute {name!r}")
    return getattr(import_module(f"devec.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
