"""The precision that devec multiplies matrices in, whatever the caller allows for a model.

Models run under autocast, in TF32 or with products in bfloat16. Factors and base weights are
multiplied in float32 or float64: `full_precision` marks every function that does so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from threading import Lock, get_ident
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = tuple(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


class _Settings(NamedTuple):
    """What torch allows for products of float32: in all, and by backend where it has these.

    Attributes:
        overall: ``"highest"``, ``"high"`` or ``"medium"``; None where backends differ, for which
            torch has no word.
        backends: Precision of each backend.
    """

    overall: str | None
    backends: tuple[str, ...]

    @classmethod
    def read(cls) -> _Settings:
        """The present settings."""
        backends = tuple(backend.fp32_precision for backend in _backends())
        try:
            return cls(torch.get_float32_matmul_precision(), backends)
        except RuntimeError:  # torch refuses a mixture of this and settings by backend
            return cls(None, backends)

    def make_full(self) -> None:
        """Have products of float32 computed in float32."""
        if self.overall is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in _backends():
            backend.fp32_precision = "ieee"

    def restore(self) -> None:
        """Make these the settings again."""
        if self.overall is not None:
            torch.set_float32_matmul_precision(self.overall)
        for backend, precision in zip(_backends(), self.backends, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    """The backends whose precision can be set one by one, which torch has since 2.9."""
    homes = (torch.backends.cuda, torch.backends.mkldnn)
    found: list[Any] = [getattr(home, "matmul", None) for home in homes]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


class _FullProducts:
    """Full precision of float32 products for the threads that need it.

    The settings are those of the process, so threads share them. Each thread that enters makes sure
    that they are full, whoever has changed them meanwhile; the last thread to leave restores what
    the caller had set last.
    """

    def __init__(self) -> None:
        """Start without threads."""
        self._lock = Lock()
        self._threads: set[int] = set()
        self._before: _Settings | None = None
        self._during: _Settings | None = None

    def inside(self) -> bool:
        """Whether this thread has entered."""
        return get_ident() in self._threads

    def enter(self) -> None:
        """Have float32 matrices multiplied in float32."""
        with self._lock:
            self._threads.add(get_ident())
            found = _Settings.read()
            if found.overall != "highest" and found != self._during:
                self._before = found
                found.make_full()
                self._during = _Settings.read()

    def leave(self) -> None:
        """Restore the settings if no other thread needs full precision; harmless if repeated."""
        with self._lock:
            self._threads.discard(get_ident())
            self._restore()

    def forked(self) -> None:
        """Forget the threads that a child process does not have."""
        self._lock = Lock()
        self._threads &= {get_ident()}
        self._restore()

    def _restore(self) -> None:
        """Restore the settings, unless they are needed or the caller has changed them."""
        if not self._threads and self._before is not None:
            if _Settings.read() == self._during:
                self._before.restore()
            self._before = self._during = None


_PRODUCTS = _FullProducts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PRODUCTS.forked)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function multiply matrices in the precision of its tensors.

    Args:
        function: The function; no generator, whose consumer would run in this precision, too.

    Returns:
        The function, which runs without autocast, and whose products of float32 matrices are
        computed in float32 rather than in TF32 or bfloat16.

    Cost: some microseconds; less than one within another such function.
    """

    @wraps(function)
    def in_full_precision(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(map(torch.is_autocast_enabled, _AUTOCAST)):
            with ExitStack() as stack:
                for device in filter(torch.is_autocast_enabled, _AUTOCAST):
                    stack.enter_context(torch.autocast(device, enabled=False))
                return in_full_precision(*args, **kwargs)
        if _PRODUCTS.inside():
            return function(*args, **kwargs)
        try:
            _PRODUCTS.enter()
            return function(*args, **kwargs)
        finally:
            _PRODUCTS.leave()

    return in_full_precision
