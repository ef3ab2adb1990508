"""``devec decompose``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devec._version import __version__
from devec.cli.common import (
    AllowPickle,
    AsLora,
    Base,
    Device,
    Dtype,
    Format,
    JsonFile,
    MaxRank,
    Overwrite,
    Sources,
    in_format,
    json_writer,
    module_type,
    new_table,
    progress_bar,
    ranged,
    read_source,
    require_new,
    show,
    storage_dtype,
    to_plain,
)
from devec.errors import IncompatibleError

if TYPE_CHECKING:
    from devec.adapter import Adapter
    from devec.decompose import Decomposition
    from devec.split import ModuleSplit, Threshold


def decompose(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to.")],
    threshold: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="Squared cosine above which directions count as shared, in (0, 1], or 'auto': "
            "more than chance would give.",
        ),
    ] = "0.85",
    method: Annotated[
        str, typer.Option(metavar="M", help="chain (the paper), mean or principal.")
    ] = "chain",
    scope: Annotated[
        str,
        typer.Option(metavar="S", help="all, pairwise, or iterative (with --target)."),
    ] = "all",
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Adapter to split, for --scope iterative.")
    ] = None,
    as_lora: AsLora = None,
    format: Format = None,
    base: Base = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Write true ranks; leave out modules of rank 0.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    max_rank: MaxRank = None,
    allow_pickle: AllowPickle = False,
    json: JsonFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Split adapters into what they share and what is unique to each.

    Writes DIR/NAME-unique, DIR/NAME-shared and DIR/common (scope pairwise: DIR/A+B-shared; scope
    iterative: DIR/TARGET-unique and DIR/TARGET-shared), directories for PEFT and .safetensors files
    otherwise. Parts that are zero are not written.
    """
    from devec import decompose as split
    from devec.output import write_all
    from devec.report import planned_outputs

    storage = storage_dtype(dtype)
    level = parse_threshold(threshold)
    adapters = [read_source(s, base, max_rank, allow_pickle=allow_pickle) for s in sources]
    suffix = _suffix(adapters, format, plain=as_lora is not None)
    names = planned_outputs([a.name for a in adapters], scope, target)
    planned = [out / f"{name}{suffix}" for name in names]
    _require_apart(json, planned)
    require_new([*planned, *([json] if json else [])], overwrite=overwrite)
    modules = {m for a in adapters for m in a.modules}
    with progress_bar("decomposing", len(modules)) as step:
        parts = split(
            adapters,
            threshold=level,
            method=method,
            scope=scope,
            target=target,
            device=device,
            progress=step,
        )
    plain = {n: to_plain(part, as_lora) for n, part in parts.outputs(compact=compact).items()}
    held = {name: in_format(part, format) for name, part in plain.items()}
    outputs = {part.output_path(out / name): part.writer(storage) for name, part in held.items()}
    report = {json: json_writer(_report(parts, held))} if json else {}
    fates = _fates([path for path in planned if path not in outputs])
    write_all({**outputs, **report}, overwrite=overwrite, obsolete=fates[_REMOVED])
    print_parts(parts)
    _tell({"Written": sorted([*outputs, *report]), **fates})
    if any(delta.gain is not None for part in held.values() for delta in part.modules.values()):
        typer.echo("Activate unique parts first: a DoRA rescales what is listed before it.")


_REMOVED = "Zero, not written; an older one was removed"


def _fates(zero: Sequence[Path]) -> dict[str, list[Path]]:
    """What becomes of outputs that are zero, and of what is where they would be."""
    from devec.formats.record import made_by_devec

    there = [path for path in zero if path.exists()]
    return {
        "Zero, not written": [path for path in zero if path not in there],
        _REMOVED: [path for path in there if made_by_devec(path)],
        "Zero, not written; left as it was": [path for path in there if not made_by_devec(path)],
    }


def _tell(fates: Mapping[str, Sequence[Path]]) -> None:
    """Say what became of all outputs."""
    if not fates["Written"]:
        typer.echo("Nothing was written.")
    for fate, paths in fates.items():
        if paths:
            typer.echo(f"{fate}: {', '.join(map(str, paths))}")


def parse_threshold(text: str) -> Threshold:
    """The threshold of the command line.

    Args:
        text: As on the command line.

    Returns:
        The threshold.

    Raises:
        IncompatibleError: If it is neither a number nor ``"auto"``.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise IncompatibleError(
            f"--threshold is a number in (0, 1] or 'auto', got {text!r}"
        ) from None


def _suffix(adapters: Sequence[Adapter], format: str | None, *, plain: bool) -> str:
    """What the paths of the outputs end with: as the format has it, or the first adapter.

    Returns:
        The ending, once it is known that the first adapter, or the LoRA of it, can be written so.
    """
    import dataclasses

    first = adapters[0]
    if plain:
        first = first.map(lambda _, delta: dataclasses.replace(delta, gain=None))
    layout = in_format(first, format).layout
    return layout.suffix if layout is not None else ""


def print_parts(parts: Decomposition) -> None:
    """Print what was found, by group and type of module.

    Args:
        parts: The decomposition.
    """
    table = new_table(
        "module",
        "modules",
        "rank",
        "shared rank",
        "shared energy",
        f"largest {parts.splits[0].quantity if parts.splits else 'cos²'}",
        "random edge",
        "threshold",
    )
    rows: dict[tuple[str, str], list[ModuleSplit]] = {}
    several = len({split.group for split in parts.splits}) > 1
    for split in parts.splits:
        group = f"{' + '.join(split.group)}: " if several else ""
        rows.setdefault((group, module_type(split.module)), []).append(split)
    order = list(dict.fromkeys(group for group, _ in rows))
    for (group, kind), splits in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        best = max(splits, key=lambda s: s.largest)
        table.add_row(
            group + kind,
            str(len(splits)),
            ranged([rank for s in splits for rank in s.ranks]),
            ranged([s.shared_rank for s in splits]),
            _percent(_energy(splits)),
            f"{best.largest:.3f}",
            f"{best.edge:.3f}",
            f"{best.threshold:.3f}",
        )
    show("Shared subspaces, by type of module", table)
    _print_partial(parts)
    _print_carried(parts)
    if parts.nothing_shared:
        from devec.report import nothing_shared

        typer.echo(nothing_shared(parts.splits, parts.record["parameters"]["threshold"]))


def _print_partial(parts: Decomposition) -> None:
    """Say how many modules were not compared, since not all adapters have them."""
    modules = {module for adapter in parts.unique.values() for module in adapter.modules}
    partial = len(modules - {split.module for split in parts.splits})
    if partial:
        typer.echo(f"{partial} modules are not in all adapters; all of those is unique.")


def _energy(splits: Sequence[ModuleSplit]) -> float:
    """Share of the squared norm of the adapters that lies in the shared subspaces."""
    total = math.fsum(norm**2 for s in splits for norm in s.norms)
    shared = math.fsum(norm**2 for s in splits for norm in s.shared_norms)
    return shared / total if total else 0.0


def _percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.1f} %"


def _require_apart(json: Path | None, planned: Sequence[Path]) -> None:
    """Refuse a report in the place of an adapter."""
    if json is not None and any(path in (json, *json.parents) for path in planned):
        raise IncompatibleError(f"--json {json} is the name of an adapter that may be written")


def _print_carried(parts: Decomposition) -> None:
    """Name what is not a delta and went with the unique part."""
    for name, adapter in parts.unique.items():
        if adapter.carried:
            keys = ", ".join(sorted(adapter.carried))
            typer.echo(f"Carried over whole to {name}-unique (not a delta): {keys}")


def _report(parts: Decomposition, written: Mapping[str, Adapter]) -> dict[str, Any]:
    """Where it came from and all that was found, a row per module and group."""
    records = {name: part.provenance or {} for name, part in written.items()}
    return {
        "devec_version": __version__,
        **parts.record,
        "written": list(written),
        "as_lora": {name: r["as_lora"] for name, r in records.items() if "as_lora" in r},
        "modules": [
            {
                "module": s.module,
                "group": s.group,
                "ranks": s.ranks,
                "threshold": s.threshold,
                "random_edge": s.edge,
                "quantity": s.quantity,
                "largest": s.largest,
                "spectrum": s.spectrum,
                "shared_rank": s.shared_rank,
                "norms": s.norms,
                "shared_norms": s.shared_norms,
                "shared_energy": _energy([s]),
            }
            for s in parts.splits
        ],
    }
