"""The data of an adapter, which its algebra and alignment work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from devec.adapters.layout import Contents, Layout
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError
from devec.lazy import LazyMapping


@dataclass(frozen=True, eq=False, repr=False)
class AdapterData:
    """The attributes of an `Adapter`, documented there."""

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

    @property
    def label(self) -> str:
        """The name, with the source if there is one, for messages."""
        return f"{self.name!r} ({self.source})" if self.source else repr(self.name)


AdapterT = TypeVar("AdapterT", bound=AdapterData)


def contents_of(adapter: AdapterData) -> Contents:
    """What a layout writes of an adapter."""
    unchanged = bool(adapter.sha256)
    return Contents(adapter.name, adapter.modules, adapter.carried, adapter.provenance, unchanged)


def layout_of(adapter: AdapterData) -> Layout:
    """The layout of an adapter; an adapter that was made in memory is refused."""
    if adapter.layout is None:
        raise IncompatibleError(
            f"adapter {adapter.name!r} was made in memory and has no file layout; give it one "
            "with dataclasses.replace(adapter, layout=other.layout)"
        )
    return adapter.layout
