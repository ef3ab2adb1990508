"""``devec inspect``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devec.cli.shared.options import AllowPickle, Base, JsonFile, MaxRank, Overwrite, Source
from devec.cli.shared.reports import json_writer, require_report
from devec.cli.shared.sources import read_source
from devec.cli.shared.tables import module_type, new_table, ranged, show
from devec.lazy import outlines

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter
    from devec.adapters.layout import About, Layout


def inspect_command(
    source: Source,
    modules: Annotated[
        bool, typer.Option("--modules", help="Print a row for each module instead of each type.")
    ] = False,
    base: Base = None,
    json: JsonFile = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Describe an adapter.

    Prints the convention, base model, modules, ranks, alphas, types and norms, and the tensors that
    are carried over whole.
    """
    from devec.adapters.data import layout_of
    from devec.files.staging import write_all

    require_report(json, [source], overwrite=overwrite)
    adapter = read_source(source, base, max_rank, allow_pickle=allow_pickle)
    layout = layout_of(adapter)
    report = _inspect_report(adapter, layout, with_base=base is not None)
    if json:
        write_all({json: json_writer(report)}, overwrite=overwrite)
    typer.echo("\n".join(_lines(adapter, layout.about, report)))
    _print_modules(report["modules"], by_type=not modules)


def _inspect_report(adapter: Adapter, layout: Layout, *, with_base: bool) -> dict[str, Any]:
    """The full report, a row for each module."""
    about = layout.about
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
                "dtype": str(layout.stored_type(module)).removeprefix("torch."),
                "bias": delta.bias is not None,
                "dora": delta.gain is not None,
                "norm": norms[module],
            }
            for module, delta in outlines(adapter.modules).items()
        ],
    }


def _lines(adapter: Adapter, about: About, report: dict[str, Any]) -> list[str]:
    """The lines above the table."""
    lines = [f"{adapter.name}: adapter in the {about.format} convention"]
    recorded = (about.family, about.base_model, about.base_version, about.architecture)
    base = ", ".join(dict.fromkeys(str(value) for value in recorded if value))
    lines.append(f"base model: {base or 'not on record'}")
    norm = report["norm"]
    known = "norm not known without the base model (--base)" if norm is None else f"norm {norm:.4g}"
    lines.append(f"{len(adapter.modules)} modules, {known}")
    doras = sum(row["dora"] for row in report["modules"])
    lines += [f"{doras} modules: DoRA"] if doras else []
    lines += [f"{n} modules: {kind}, rewritten to factors" for kind, n in about.rewritten.items()]
    if about.truncated:
        worst = max(about.truncated.values())
        lines.append(f"{len(about.truncated)} modules truncated, error up to {worst:.3g}")
    lines.append(f"SHA-256 {adapter.sha256}")
    if adapter.carried:
        lines.append(f"carried over whole (not a delta): {', '.join(report['carried'])}")
    if adapter.provenance:
        lines.append(f"made by devec {adapter.provenance.get('operation')}")
    return lines


def _print_modules(modules: list[dict[str, Any]], *, by_type: bool) -> None:
    """Print the table of modules, a row for each type of module or for each module."""
    table = new_table("module", "modules", "rank", "alpha", "scaling", "shape", "type", "norm")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in modules:
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
            _norm_range(sorted(r["norm"] for r in rows if r["norm"] is not None)),
        )
    show("Modules, by type" if by_type else "Modules", table)


def _norm_range(ordered: list[float]) -> str:
    """The first and the last of ordered values, once if they read the same."""
    ends = dict.fromkeys(f"{value:.3g}" for value in ordered[:1] + ordered[-1:])
    return "-".join(ends) or "?"


def _distinct(values: Iterable[str]) -> str:
    """The distinct values, at most three."""
    distinct = list(dict.fromkeys(values))
    return ", ".join(distinct[:3]) + (", …" if len(distinct) > 3 else "")
