"""``devec inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from devec.cli.common import (
    JsonFile,
    Overwrite,
    Source,
    json_writer,
    module_type,
    new_table,
    ranged,
    read_source,
    require_new,
    show,
)

if TYPE_CHECKING:
    from devec.adapter import Adapter


def inspect(source: Source, json: JsonFile = None, overwrite: Overwrite = False) -> None:
    """Say what is in an adapter.

    Format, base model, modules, ranks, scalings, types, norms, and what is carried over whole.
    """
    from devec.output import write_all

    require_new([json] if json else [], overwrite=overwrite)
    adapter = read_source(source)
    report = _report(adapter)
    if json:
        write_all({json: json_writer(report)}, overwrite=overwrite)
    _print(adapter, report)


def _report(adapter: Adapter) -> dict[str, Any]:
    """All there is to say of an adapter, a row per module."""
    files = adapter.layout.describe() if adapter.layout is not None else {}
    return {
        "name": adapter.name,
        "sha256": adapter.sha256,
        **files,
        "norm": adapter.norm(),
        "carried": {
            key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for key, tensor in sorted(adapter.carried.items())
        },
        "provenance": adapter.provenance,
        "modules": [
            {
                "module": module,
                "shape": delta.shape,
                "rank": delta.rank,
                "scaling": delta.scaling,
                "dtype": str(delta.B.dtype).removeprefix("torch."),
                "bias": delta.bias is not None,
                "norm": delta.norm(),
            }
            for module, delta in adapter.modules.items()
        ],
    }


def _print(adapter: Adapter, report: dict[str, Any]) -> None:
    """Print the report by type of module."""
    lines = [f"{report['name']}: {report.get('format', 'in-memory').upper()} LoRA adapter"]
    lines.append(f"base model: {report.get('base_model') or 'not on record'}")
    lines.append(f"{len(adapter.modules)} modules, norm {report['norm']:.4g}")
    lines.append(f"SHA-256 {report['sha256']}")
    if report["carried"]:
        lines.append(f"carried over whole (not a delta): {', '.join(report['carried'])}")
    if report["provenance"]:
        lines.append(f"made by {report['provenance'].get('operation')}, see devec.json")
    typer.echo("\n".join(lines))
    table = new_table("module", "modules", "rank", "scaling", "shape", "type", "norm")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in report["modules"]:
        kinds.setdefault(module_type(row["module"]), []).append(row)
    for kind, rows in kinds.items():
        table.add_row(
            kind,
            str(len(rows)),
            ranged([r["rank"] for r in rows]),
            _distinct(f"{r['scaling']:.4g}" for r in rows),
            _distinct("×".join(str(n) for n in r["shape"]) for r in rows),
            _distinct(r["dtype"] for r in rows),
            _spread([f"{norm:.3g}" for norm in sorted(r["norm"] for r in rows)]),
        )
    show("Modules, by type", table)


def _spread(ordered: list[str]) -> str:
    """The first and the last of ordered values, once if they read the same."""
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


def _distinct(values: Any) -> str:  # noqa: ANN401
    """The different values, at most three."""
    found = list(dict.fromkeys(values))
    return ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
