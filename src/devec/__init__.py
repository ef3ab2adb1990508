"""devec: adapter algebra for LoRA and DoRA, on the low-rank factors.

    import devec

    a = devec.Adapter.from_pretrained("anime.safetensors")
    b = devec.Adapter.from_pretrained("pixel.safetensors")
    parts = devec.decompose([a, b])
    parts.unique["anime"].save_pretrained("out/anime-unique")

The public names are loaded on first use, so that the command line answers without loading torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from devec._version import __version__

if TYPE_CHECKING:
    from devec.adapter import Adapter
    from devec.algebra import cosine, distance, inner
    from devec.as_lora import as_lora
    from devec.combine import combine
    from devec.compress import Compression, compress
    from devec.decompose import Decomposition, decompose
    from devec.delta import Delta
    from devec.errors import DevecError, DevecWarning
    from devec.formats.convert import convert
    from devec.hosts.live import (
        add_adapter,
        combine_adapters,
        decompose_adapters,
        extract_adapter,
        negate_adapter,
    )
    from devec.overlap import Overlap, overlap
    from devec.pool import save_adapters

_HOME = {
    "Adapter": "adapter",
    "Compression": "compress",
    "Decomposition": "decompose",
    "Delta": "delta",
    "DevecError": "errors",
    "DevecWarning": "errors",
    "Overlap": "overlap",
    "add_adapter": "hosts.live",
    "as_lora": "as_lora",
    "combine": "combine",
    "combine_adapters": "hosts.live",
    "compress": "compress",
    "convert": "formats.convert",
    "cosine": "algebra",
    "decompose": "decompose",
    "decompose_adapters": "hosts.live",
    "distance": "algebra",
    "extract_adapter": "hosts.live",
    "inner": "algebra",
    "negate_adapter": "hosts.live",
    "overlap": "overlap",
    "save_adapters": "pool",
}

__all__ = [
    "Adapter",
    "Compression",
    "Decomposition",
    "Delta",
    "DevecError",
    "DevecWarning",
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
    "distance",
    "extract_adapter",
    "inner",
    "negate_adapter",
    "overlap",
    "save_adapters",
]


class _Package(ModuleType):
    """A package whose functions are not shadowed by the modules of the same name.

    Importing ``devec.decompose`` makes Python set the attribute ``decompose`` of the package to the
    module; users mean the function by it.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Load a public name, and with the first of them the formats that `Adapter` reads."""
    if name not in _HOME:
        raise AttributeError(f"module 'devec' has no attribute {name!r}")
    import_module("devec.formats")
    return getattr(import_module(f"devec.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
