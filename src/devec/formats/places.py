"""What layouts have in common: where modules go, and in which type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed

Places = Mapping[str, tuple[tuple[int, int], tuple[int, ...]]]  # module → shape and kernel


def require_places(shapes: Mapping[str, tuple[int, int]], modules: Mapping[str, Delta]) -> None:
    """Refuse modules that a layout has no place for: they would be lost.

    Args:
        shapes: Module → shape (out, in) of the weight it has a place for.
        modules: The modules to be written.

    Raises:
        IncompatibleError: If there are such modules.
    """
    lost = [module for module, delta in modules.items() if shapes.get(module) != delta.shape]
    if lost:
        raise IncompatibleError(
            f"the layout has no place for the modules {listed(lost)}; it is that of an adapter "
            "without them, or of another base model"
        )


def spread(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel, where one of a single point is none: that is a linear layer."""
    return kernel if any(size != 1 for size in kernel) else ()


def usual_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The most frequent type; float32 if there is none."""
    counts = Counter(dtypes).most_common(1)
    return counts[0][0] if counts else torch.float32
