"""Validation of the arguments of a decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout, on_common_modules
from devec.adapters.pool import require_distinct_names, warn_if_unrelated
from devec.arguments import number
from devec.decomposition.question import PartName, Question, Threshold
from devec.decomposition.scopes import SCOPES
from devec.errors import IncompatibleError, listed
from devec.linalg.subspaces import METHODS


def validated(
    adapters: Sequence[Adapter],
    threshold: Threshold,
    method: str,
    scope: str,
    target: str | None,
) -> tuple[Question, Sequence[Adapter]]:
    """The question that the arguments of `decompose` ask, and the pool on common modules.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
    """
    require_distinct_names(adapters)
    names = [adapter.name for adapter in adapters]
    parts = planned_parts(names, scope, target)
    level = _threshold(threshold)
    _check_method(method, scope, names)
    adapters = on_common_modules(adapters)
    warn_if_unrelated(adapters)
    merged_layout(adapters)  # refuses adapters that do not compose
    return Question(tuple(names), level, METHODS[method], scope, target or "", parts), adapters


def planned_parts(names: Sequence[str], scope: str, target: str | None) -> tuple[PartName, ...]:
    """The parts that a decomposition of these adapters may result in.

    Raises:
        IncompatibleError: If there are too few adapters, the scope does not exist, the target is
            not among them, or two parts would have one name.
    """
    if len(names) < 2:
        raise IncompatibleError(f"decompose needs at least two adapters, got {len(names)}")
    if scope not in SCOPES:
        raise IncompatibleError(f"scope must be one of {listed(list(SCOPES))}, got {scope!r}")
    targeted = SCOPES[scope].targeted
    if targeted and target not in names:
        raise IncompatibleError(
            f"scope {scope!r} splits one adapter: give a target (--target NAME), one of "
            f"{listed(list(names))}; got {target!r}"
        )
    if not targeted and target is not None:
        of = listed([name for name, each in SCOPES.items() if each.targeted])
        raise IncompatibleError(f"a target is for scope {of} only, got {target!r}")
    parts = SCOPES[scope].parts(names, target or "")
    owners = [part.owner for part in parts if len(part.of) == 2 and part.kind == "shared"]
    if len(set(owners)) < len(owners):
        twice = next(owner for owner in owners if owners.count(owner) > 1)
        raise IncompatibleError(f"two pairs of adapters are both named {twice!r}; rename one")
    return parts


def _check_method(method: str, scope: str, names: Sequence[str]) -> None:
    """Refuse a method that does not exist, or compares fewer adapters than the scope asks for."""
    if method not in METHODS:
        raise IncompatibleError(f"method must be one of {listed(list(METHODS))}, got {method!r}")
    most = METHODS[method].most
    if most is not None and not SCOPES[scope].pairs and len(names) > most:
        raise IncompatibleError(
            f"method {method!r} compares two adapters, got {len(names)}; "
            "use method 'mean' or 'chain', or scope 'pairwise'"
        )


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
