"""Validated arguments of a decomposition: the question, its scope, and the pool."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout, on_common_modules, provenance
from devec.adapters.pool import require_distinct_names, warn_if_unrelated
from devec.arguments import number
from devec.decomposition.question import PartName, Question, Threshold
from devec.decomposition.scopes import SCOPES, Scope
from devec.decomposition.stacks.stack import Pool
from devec.errors import IncompatibleError, listed
from devec.linalg.subspaces import METHODS, Method


@dataclass(frozen=True)
class Request:
    """What is decomposed, and how.

    Attributes:
        question: Which directions count as shared in a module.
        scope: Which adapters are compared.
        adapters: The pool, on common modules.
        parts: The parts that may result. Which of them are zero is known in the end only.
    """

    question: Question
    scope: Scope
    adapters: Sequence[Adapter]
    parts: tuple[PartName, ...]

    @cached_property
    def originals(self) -> Mapping[str, Adapter]:
        """Name → adapter of the pool."""
        return {adapter.name: adapter for adapter in self.adapters}

    @cached_property
    def pool(self) -> Pool:
        """Name → module → delta."""
        return {adapter.name: adapter.modules for adapter in self.adapters}

    @cached_property
    def modules(self) -> Sequence[str]:
        """The modules of the pool, in the order in which its adapters have them."""
        return list(dict.fromkeys(module for modules in self.pool.values() for module in modules))

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The record of the operation that outputs keep."""
        return provenance(
            "decompose",
            self.adapters,
            threshold=self.question.threshold,
            method=self.question.method.name,
            scope=self.scope.name,
            target=self.question.target or None,
        )


def validated(
    adapters: Sequence[Adapter],
    threshold: Threshold,
    method: str,
    scope: str,
    target: str | None,
) -> Request:
    """The request that the arguments of `decompose` make.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
    """
    require_distinct_names(adapters)
    names = [adapter.name for adapter in adapters]
    _require_several(names)
    question = Question(tuple(names), _threshold(threshold), _method(method), target or "")
    parts = planned_parts(names, scope, target)
    _require_enough(question.method, SCOPES[scope], names)
    adapters = on_common_modules(adapters)
    warn_if_unrelated(adapters)
    merged_layout(adapters)  # refuses adapters that do not compose
    return Request(question, SCOPES[scope], adapters, parts)


def planned_parts(names: Sequence[str], scope: str, target: str | None) -> tuple[PartName, ...]:
    """The parts that a decomposition of these adapters may result in.

    Raises:
        IncompatibleError: If there are too few adapters, the scope does not exist, the target is
            not among them, or two parts would have one name.
    """
    _require_several(names)
    if scope not in SCOPES:
        raise IncompatibleError(f"scope must be one of {listed(list(SCOPES))}, got {scope!r}")
    chosen = SCOPES[scope]
    if chosen.targeted and target not in names:
        raise IncompatibleError(
            f"scope {scope!r} splits one adapter: give a target (--target NAME), one of "
            f"{listed(list(names))}; got {target!r}"
        )
    if not chosen.targeted and target is not None:
        targeted = listed([name for name, each in SCOPES.items() if each.targeted])
        raise IncompatibleError(f"a target is for scope {targeted} only, got {target!r}")
    parts = chosen.parts(names, target or "")
    labels = [part.label for part in parts]
    if twice := [part.owner for part in parts if labels.count(part.label) > 1]:
        raise IncompatibleError(f"two pairs of adapters are both named {twice[0]!r}; rename one")
    return parts


def _require_several(names: Sequence[str]) -> None:
    """Refuse a pool of fewer than two adapters."""
    if len(names) < 2:
        raise IncompatibleError(f"decompose needs at least two adapters, got {len(names)}")


def _require_enough(method: Method, scope: Scope, names: Sequence[str]) -> None:
    """Refuse a method that compares fewer adapters than the scope asks for."""
    if method.most is not None and not scope.pairs and len(names) > method.most:
        raise IncompatibleError(
            f"method {method.name!r} compares two adapters, got {len(names)}; "
            "use method 'mean' or 'chain', or scope 'pairwise'"
        )


def _method(name: str) -> Method:
    """The method of a name."""
    if name not in METHODS:
        raise IncompatibleError(f"method must be one of {listed(list(METHODS))}, got {name!r}")
    return METHODS[name]


def _threshold(threshold: object) -> Threshold:
    """The threshold as a float of Python, or ``"auto"``; refused if it is neither."""
    if isinstance(threshold, str) and threshold == "auto":
        return "auto"
    value = math.nan
    if isinstance(threshold, float):  # of NumPy, too; NaN is refused as out of range
        value = float(threshold)
    elif not isinstance(threshold, str):
        value = float(number(threshold, "threshold"))
    if not 0 < value <= 1:
        raise IncompatibleError(f"threshold must be in (0, 1] or 'auto', got {threshold!r}")
    return value
