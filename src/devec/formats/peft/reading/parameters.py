"""Which parameters the factors in a file belong to, and with which ranks.

PEFT wraps a module once for each of its parameters that ``target_parameters`` names, so the keys
tell the position of a wrapper and not the name of its parameter. Ranks and alphas are looked up by
the full name of the parameter. Which wrapper is whose follows from the shapes, as all parameters of
a module that hold experts hold equally many, and from the order in which modules of transformers
register their parameters: PEFT puts the wrapper of the first innermost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

from devec.errors import FormatError, UnsupportedError
from devec.formats.peft.config import targets
from devec.formats.rank_patterns import Config, rank_and_scaling

DeclaredRank = tuple[int, float]  # rank and scaling that the configuration gives a parameter

# Parameters of experts in the order in which all models of transformers register them.
_ORDER = (
    "gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias",
)  # fmt: skip


def owners(config: Config, module: str, count: int = 1) -> list[str]:
    """Full names of the parameters of a module that ``target_parameters`` may name.

    Args:
        config: The configuration.
        module: Name of the module in the base model.
        count: The number of its parameters that have factors.

    Returns:
        The names, none for an ordinary module. An entry that is no more than the name of a
        parameter, as PEFT makes them of ``gate_proj`` for experts, may be one of any module that is
        not a target itself; such entries count only where the others are not enough.
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
    """Rank and scaling of each wrapper of a module.

    Args:
        config: The configuration.
        names: Full names of the parameters that the wrappers may be of.
        rows: Rows of A of each wrapper, the outermost first: rank times number of experts.

    Returns:
        Rank and scaling of each, in this order.

    Raises:
        FormatError: If no parameters have ranks that fit.
        UnsupportedError: If different ones do.
    """
    if len(names) < len(rows):
        raise FormatError(
            f"the file has factors of {len(rows)} parameters of this module, of which "
            f"target_parameters names {len(names)}"
        )
    said = {name: rank_and_scaling(config, name) for name in names}
    fitting = _fitting(said, rows)
    if len(fitting) == 1:
        return list(next(iter(fitting)))
    ranks = " or ".join(dict.fromkeys(str(rank) for rank, _ in said.values()))
    if not fitting:
        have = " and ".join(map(str, rows))
        raise FormatError(f"the config says rank {ranks}, the tensors have rank {have}")
    raise UnsupportedError(
        f"several parameters of this module have different ranks or alphas ({ranks}) and the keys "
        "do not tell which is which; give them one rank and alpha"
    )


def _fitting(
    said: Mapping[str, DeclaredRank], rows: Sequence[int]
) -> set[tuple[DeclaredRank, ...]]:
    """Ranks and scalings that rows allow the wrappers, narrowed by experts and then by order."""
    if len(set(said.values())) == 1:
        same = tuple(said.values())[: len(rows)]
        return {same} if _experts(same, rows) else set()
    orders = {
        names: ranks
        for names in permutations(said, len(rows))
        if _experts(ranks := tuple(said[name] for name in names), rows)
    }
    alike = {n: r for n, r in orders.items() if len(_experts(r, rows) - {1}) <= 1}
    registered = {n: r for n, r in alike.items() if _is_registered(n)}
    return set((registered or alike or orders).values())


def _experts(ranks: Sequence[DeclaredRank], rows: Sequence[int]) -> set[int]:
    """The numbers of experts that ranks make of rows; none if they do not divide them."""
    pairs = [(count, rank) for count, (rank, _) in zip(rows, ranks, strict=True)]
    return set() if any(n % r for n, r in pairs) else {n // r for n, r in pairs}


def _is_registered(names: Sequence[str]) -> bool:
    """Whether parameters, the outermost first, are in the order of modules of transformers."""
    known = [name.rpartition(".")[2] for name in names]
    inside = [_ORDER.index(name) for name in known if name in _ORDER]
    return 1 < len(inside) == len(names) and inside == sorted(inside, reverse=True)
