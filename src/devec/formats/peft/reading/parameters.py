"""Which parameters the factors in a file belong to, and their ranks.

PEFT wraps a module once for each of its parameters that ``target_parameters`` names, so keys tell
the position of a wrapper and not the name of its parameter. Ranks and alphas are looked up by the
full name of the parameter. The parameter of a wrapper follows from the shapes, as all parameters of
a module have the same number of experts, and from the order in which modules of transformers
register their parameters: the wrapper of the first is the innermost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

from devec.errors import FormatError, UnsupportedError
from devec.formats.peft.config import targets
from devec.formats.rank_patterns import Config, rank_and_scaling

DeclaredRank = tuple[int, float]  # rank and scaling of a parameter, by the configuration

# Parameters of experts in the order in which all models of transformers register them.
_ORDER = (
    "gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias",
)  # fmt: skip


def owners(config: Config, module: str, count: int = 1) -> list[str]:
    """Full names of the parameters of a module that ``target_parameters`` may name.

    An entry without the name of a module, as PEFT writes for ``gate_proj`` of experts, may belong
    to any module that is not a target itself; such entries count only if the others are too few.

    Args:
        config: The configuration.
        module: Name of the module in the base model.
        count: The number of its parameters with factors.

    Returns:
        The names; none for an ordinary module.
    """
    named, anywhere = [], []
    is_target = bool(config.get("target_modules")) and targets(config, module)
    for entry in config.get("target_parameters") or []:
        owner, _, parameter = entry.rpartition(".")
        if not owner and not is_target:
            anywhere.append(f"{module}.{parameter}")
        elif owner and f".{module}".endswith(f".{owner}"):
            named.append(f"{module}.{parameter}")
    return list(dict.fromkeys(named if len(named) >= count else named + anywhere))


def parameter_ranks(
    config: Config, names: Sequence[str], rows: Sequence[int]
) -> list[DeclaredRank]:
    """Rank and scaling of each wrapper of a module, outermost first.

    Args:
        config: The configuration.
        names: Full names of the parameters that the wrappers may belong to.
        rows: Rows of A of each wrapper: rank times number of experts.

    Returns:
        The ranks and scalings.

    Raises:
        FormatError: If no assignment of parameters to wrappers fits the ranks.
        UnsupportedError: If several assignments fit, with different ranks or scalings.
    """
    if len(names) < len(rows):
        raise FormatError(
            f"the file has factors of {len(rows)} parameters of this module, of which "
            f"target_parameters names {len(names)}"
        )
    declared = {name: rank_and_scaling(config, name) for name in names}
    fitting = _fitting(declared, rows)
    if len(fitting) == 1:
        return list(next(iter(fitting)))
    ranks = " or ".join(dict.fromkeys(str(rank) for rank, _ in declared.values()))
    if not fitting:
        have = " and ".join(map(str, rows))
        raise FormatError(f"the config says rank {ranks}, the tensors have rank {have}")
    raise UnsupportedError(
        f"several parameters of this module have different ranks or alphas ({ranks}) and the keys "
        "do not tell which is which; give them one rank and alpha"
    )


def _fitting(
    declared: Mapping[str, DeclaredRank], rows: Sequence[int]
) -> set[tuple[DeclaredRank, ...]]:
    """Assignments of ranks and scalings that fit the rows, narrowed by experts, then by order."""
    if len(set(declared.values())) == 1:
        same = tuple(declared.values())[: len(rows)]
        return {same} if _experts(same, rows) else set()
    orders = {
        names: ranks
        for names in permutations(declared, len(rows))
        if _experts(ranks := tuple(declared[name] for name in names), rows)
    }
    alike = {n: r for n, r in orders.items() if len(_experts(r, rows) - {1}) <= 1}
    registered = {n: r for n, r in alike.items() if _is_registered(n)}
    return set((registered or alike or orders).values())


def _experts(ranks: Sequence[DeclaredRank], rows: Sequence[int]) -> set[int]:
    """The numbers of experts, rows over rank; none if a rank does not divide its rows."""
    pairs = [(count, rank) for count, (rank, _) in zip(rows, ranks, strict=True)]
    return set() if any(n % r for n, r in pairs) else {n // r for n, r in pairs}


def _is_registered(names: Sequence[str]) -> bool:
    """Whether parameters, outermost first, are in the order in which transformers has them."""
    known = [name.rpartition(".")[2] for name in names]
    inside = [_ORDER.index(name) for name in known if name in _ORDER]
    return 1 < len(inside) == len(names) and inside == sorted(inside, reverse=True)
