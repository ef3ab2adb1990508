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
            if not isinstance(
                value := getattr(self, name), LazyMapping
            ):  # the caller may change it
                object.__setattr__(self, name, dict(value))

    @property
    def label(self) -> str:
        """The name, with the source if there is one, for messages."""
        return f"{self.name!r} ({self.source})" if self.source else repr(self.name)

    @property
    def contents(self) -> Contents:
        """What a layout writes of the adapter."""
        unchanged = bool(self.sha256)
        return Contents(self.name, self.modules, self.carried, self.provenance, unchanged)

    def require_layout(self) -> Layout:
        """The layout; raises `IncompatibleError` for an adapter that was made in memory."""
        if self.layout is None:
            raise IncompatibleError(
                f"adapter {self.name!r} was made in memory and has no file layout; give it one "
                "with dataclasses.replace(adapter, layout=other.layout)"
            )
        return self.layout


AdapterT = TypeVar("AdapterT", bound=AdapterData)
