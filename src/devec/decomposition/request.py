"""Arguments of a decomposition, validated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout, on_common_modules
from devec.adapters.layout import Layout
from devec.adapters.pool import require_distinct_names, warn_if_unrelated
from devec.arguments import number
from devec.decomposition.question import Question, Threshold
from devec.decomposition.scopes import SCOPES
from devec.errors import IncompatibleError, listed
from devec.linalg.subspaces import METHODS


def asked(
    adapters: Sequence[Adapter],
    threshold: Threshold,
    method: str,
    scope: str,
    target: str | None,
) -> tuple[Question, Sequence[Adapter], Layout | None]:
    """What is asked of a pool, checked; the pool on common modules; the layout of its results.

    Args:
        adapters: As in `decompose`.
        threshold: As in `decompose`.
        method: As in `decompose`.
        scope: As in `decompose`.
        target: As in `decompose`.

    Returns:
        All three.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
    """
    _check_arguments(adapters, threshold, method, scope, target)
    adapters = on_common_modules(adapters)
    warn_if_unrelated(adapters)
    layout = merged_layout(adapters)  # refuses adapters that do not compose
    names = tuple(a.name for a in adapters)
    return Question(names, _level(threshold), method, scope, target or ""), adapters, layout


def _check_arguments(
    adapters: Sequence[Adapter], threshold: Threshold, method: str, scope: str, target: str | None
) -> None:
    """Refuse arguments that are out of range, before any work is done."""
    require_distinct_names(adapters)
    names = [a.name for a in adapters]
    if len(names) < 2:
        raise IncompatibleError(f"decompose needs at least two adapters, got {len(names)}")
    _level(threshold)
    for value, table, what in ((method, METHODS, "method"), (scope, SCOPES, "scope")):
        if value not in table:
            raise IncompatibleError(f"{what} must be one of {listed(list(table))}, got {value!r}")
    if scope == "iterative" and target not in names:
        raise IncompatibleError(
            "scope 'iterative' splits one adapter: give a target (--target NAME), one of "
            f"{listed(names)}; got {target!r}"
        )
    if scope != "iterative" and target is not None:
        raise IncompatibleError(f"a target is for scope 'iterative' only, got {target!r}")
    if method == "principal" and scope == "all" and len(names) > 2:
        raise IncompatibleError(
            f"method 'principal' compares two adapters, got {len(names)}; "
            "use method 'mean' or 'chain', or scope 'pairwise'"
        )
    pairs = ["+".join(pair) for pair in combinations(names, 2)]
    if scope == "pairwise" and len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise IncompatibleError(f"two pairs of adapters are both named {twice!r}; rename one")


def _level(threshold: object) -> Threshold:
    """The threshold as a float of Python, or ``"auto"``; refused if it is neither."""
    if isinstance(threshold, str) and threshold == "auto":
        return "auto"
    level = math.nan
    if isinstance(threshold, float):  # of NumPy, too; NaN is refused as out of range
        level = float(threshold)
    elif not isinstance(threshold, str):
        level = float(number(threshold, "threshold"))
    if not 0 < level <= 1:
        raise IncompatibleError(f"threshold must be in (0, 1] or 'auto', got {threshold!r}")
    return level
