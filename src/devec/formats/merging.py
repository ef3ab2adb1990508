"""Helpers for the layout of a combination of adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from devec.adapters.layout import Layout
from devec.base_model.model import BaseModel
from devec.errors import IncompatibleError

LayoutT = TypeVar("LayoutT", bound=Layout)


def all_of_class(layouts: Sequence[Layout], expected: type[LayoutT]) -> list[LayoutT]:
    """The layouts, all of one class; adapters with others should have been aligned first."""
    same = [layout for layout in layouts if isinstance(layout, expected)]
    if len(same) < len(layouts):
        raise IncompatibleError("adapters of different kinds of files were not aligned")
    return same


def first_base(layouts: Sequence[Layout]) -> BaseModel:
    """The base model of the first layout that was given one; else that of the first."""
    given = (layout.base for layout in layouts if layout.base.reference is not None)
    return next(given, layouts[0].base)


def usual_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The most frequent type; float32 if there is none."""
    counts = Counter(dtypes).most_common(1)
    return counts[0][0] if counts else torch.float32
