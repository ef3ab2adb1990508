"""``devec inspect``."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devec.cli.common import json_writer, require_report
from devec.cli.options import AllowPickle, Base, JsonFile, MaxRank, Overwrite, Source
from devec.cli.sources import read_source
from devec.cli.tables import module_type, new_table, ranged, show
from devec.lazy import outlines

if TYPE_CHECKING:
    import torch

    from devec.adapters.adapter import Adapter


def inspect(
    source: Source,
    modules: Annotated[
        bool, typer.Option("--modules", help="A row for every module, not for every type.")
    ] = False,
    base: Base = None,
    json: JsonFile = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Say what is in an adapter.

    Convention, base model, modules, ranks, alphas, types, norms, and what is carried over whole.
    """
    from devec.files.staging import write_all

    require_report(json, [source], overwrite=overwrite)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    report = _report(adapter, with_base=base is not None)
    if json:
        write_all({json: json_writer(report)}, overwrite=overwrite)
    _print(adapter, report, by_type=not modules)


def _report(adapter: Adapter, *, with_base: bool) -> dict[str, Any]:
    """All there is to say of an adapter, a row per module."""
    about = adapter.require_layout().about
    norms = {
        module: delta.norm() if with_base or delta.gain is None else None
        for module, delta in adapter.modules.items()
    }
    known = [norm for norm in norms.values() if norm is not None]
    return {
        "name": adapter.name,
        "sha256": adapter.sha256,
        **{field.name: getattr(about, field.name) for field in dataclasses.fields(about)},
        "norm": math.hypot(*known) if len(known) == len(norms) else None,
        "carried": {
            key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for key, tensor in sorted(outlines(adapter.carried).items())
        },
        "provenance": adapter.provenance,
        "modules": [
            {
                "module": module,
                "shape": delta.shape,
                "rank": delta.rank,
                "alpha": delta.scaling * delta.rank,
                "scaling": delta.scaling,
                "dtype": str(_type(adapter, module)).removeprefix("torch."),
                "bias": delta.bias is not None,
                "dora": delta.gain is not None,
                "norm": norms[module],
            }
            for module, delta in outlines(adapter.modules).items()
        ],
    }


def _type(adapter: Adapter, module: str) -> torch.dtype:
    """The type that a module is stored in."""
    if adapter.layout is None:
        return outlines(adapter.modules)[module].B.dtype
    return adapter.layout.stored_type(module)


def _print(adapter: Adapter, report: dict[str, Any], *, by_type: bool) -> None:
    """Print the report, a row per type of module or per module."""
    lines = [f"{report['name']}: adapter in the {report.get('format', 'in-memory')} convention"]
    lines.append(f"base model: {_base(report)}")
    norm = report["norm"]
    said = "norm not known without the base model (--base)" if norm is None else f"norm {norm:.4g}"
    lines.append(f"{len(adapter.modules)} modules, {said}")
    doras = sum(row["dora"] for row in report["modules"])
    lines += [f"{doras} modules: DoRA"] if doras else []
    lines += [
        f"{n} modules: {kind}, rewritten to factors" for kind, n in report["rewritten"].items()
    ]
    if report["truncated"]:
        worst = max(report["truncated"].values())
        lines.append(f"{len(report['truncated'])} modules truncated, error up to {worst:.3g}")
    lines.append(f"SHA-256 {report['sha256']}")
    if report["carried"]:
        lines.append(f"carried over whole (not a delta): {', '.join(report['carried'])}")
    if report["provenance"]:
        lines.append(f"made by devec {report['provenance'].get('operation')}")
    typer.echo("\n".join(lines))
    table = new_table("module", "modules", "rank", "alpha", "scaling", "shape", "type", "norm")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in report["modules"]:
        kind = module_type(row["module"]) if by_type else row["module"]
        kinds.setdefault(kind, []).append(row)
    for kind, rows in kinds.items():
        table.add_row(
            kind,
            str(len(rows)),
            ranged([r["rank"] for r in rows]),
            _distinct(f"{r['alpha']:.4g}" for r in rows),
            _distinct(f"{r['scaling']:.4g}" for r in rows),
            _distinct("×".join(str(n) for n in r["shape"]) for r in rows),
            _distinct(r["dtype"] for r in rows),
            _spread(sorted(r["norm"] for r in rows if r["norm"] is not None)),
        )
    show("Modules, by type" if by_type else "Modules", table)


def _base(report: dict[str, Any]) -> str:
    """What is known of the base model: its family, and what is on record."""
    said = [report.get(key) for key in ("family", "base_model", "base_version", "architecture")]
    return ", ".join(dict.fromkeys(str(value) for value in said if value)) or "not on record"


def _spread(ordered: list[float]) -> str:
    """The first and the last of ordered values, once if they read the same."""
    ends = dict.fromkeys(f"{value:.3g}" for value in ordered[:1] + ordered[-1:])
    return "-".join(ends) or "?"


def _distinct(values: Any) -> str:  # noqa: ANN401
    """The different values, at most three."""
    found = list(dict.fromkeys(values))
    return ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
