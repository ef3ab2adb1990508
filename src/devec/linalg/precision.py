"""Full precision of matrix products, regardless of the caller's settings.

Models run under autocast, in TF32 or with products in bfloat16. devec multiplies factors and base
weights in float32 or float64; `full_precision` decorates every function that does so.
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
    """Torch's settings for float32 products: the overall one and those of the backends.

    Attributes:
        overall: ``"highest"``, ``"high"`` or ``"medium"``; None if the backends differ.
        backends: Precision of each backend.
    """

    overall: str | None
    backends: tuple[str, ...]

    @classmethod
    def read(cls) -> _Settings:
        """The current settings."""
        backends = tuple(backend.fp32_precision for backend in _backends())
        try:
            return cls(torch.get_float32_matmul_precision(), backends)
        except RuntimeError:  # the overall setting is undefined if the backends differ
            return cls(None, backends)

    def make_full(self) -> None:
        """Compute float32 products in float32."""
        if self.overall is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in _backends():
            backend.fp32_precision = "ieee"

    def restore(self) -> None:
        """Restore these settings."""
        if self.overall is not None:
            torch.set_float32_matmul_precision(self.overall)
        for backend, precision in zip(_backends(), self.backends, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    """The backends with a precision of their own, available since torch 2.9."""
    homes = (torch.backends.cuda, torch.backends.mkldnn)
    backends: list[Any] = [getattr(home, "matmul", None) for home in homes]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


class _FullProducts:
    """Full precision of float32 products while any thread needs it.

    The settings belong to the process, so threads share them. Each thread that enters makes sure
    that they are full, even if they were changed in the meantime. The last thread to leave restores
    the caller's latest settings.
    """

    def __init__(self) -> None:
        """Start without any thread inside."""
        self._lock = Lock()
        self._threads: set[int] = set()
        self._before: _Settings | None = None
        self._during: _Settings | None = None

    def inside(self) -> bool:
        """Whether the calling thread has entered."""
        return get_ident() in self._threads

    def enter(self) -> None:
        """Enter: multiply float32 matrices in float32."""
        with self._lock:
            self._threads.add(get_ident())
            current = _Settings.read()
            if current.overall != "highest" and current != self._during:
                self._before = current
                current.make_full()
                self._during = _Settings.read()

    def leave(self) -> None:
        """Leave: restore the settings if no thread is inside any more; safe to repeat."""
        with self._lock:
            self._threads.discard(get_ident())
            self._restore()

    def after_fork(self) -> None:
        """Forget the threads that a forked child does not have."""
        self._lock = Lock()
        self._threads &= {get_ident()}
        self._restore()

    def _restore(self) -> None:
        """Restore the settings unless a thread is inside or the caller has changed them."""
        if not self._threads and self._before is not None:
            if _Settings.read() == self._during:
                self._before.restore()
            self._before = self._during = None


_PRODUCTS = _FullProducts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PRODUCTS.after_fork)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run without autocast and with float32 products in float32.

    Not for generators: the code that consumes one would run in full precision, too.

    Args:
        function: The function.

    Returns:
        The decorated function.

    Cost: some microseconds per call; less than one inside another decorated function.
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
