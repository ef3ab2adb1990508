"""``devec decompose``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devec._version import __version__
from devec.cli.shared.options import (
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
)
from devec.cli.shared.parts import parse_threshold, print_parts, shared_energy
from devec.cli.shared.reports import json_writer, require_report
from devec.cli.shared.results import storage_dtype
from devec.cli.shared.sources import begin_reading, read_sources
from devec.cli.shared.tables import print_nearest, progress_bar

if TYPE_CHECKING:
    from devec.streaming.job import Report
    from devec.streaming.written import WrittenDecomposition


def decompose_command(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to.")],
    threshold: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="Smallest squared cosine that counts as shared, in (0, 1], or 'auto': the chance "
            "level of random subspaces.",
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
    iterative: DIR/TARGET-unique and DIR/TARGET-shared): directories for PEFT, .safetensors files
    for other formats. Parts that are zero are not written.
    """
    require_report(json, sources, overwrite=overwrite)
    begin_reading(sources)
    from devec.decomposition.request import validated
    from devec.streaming.job import run_job
    from devec.streaming.output_options import OutputOptions
    from devec.streaming.processes import Team, launched

    gc.freeze()  # objects that libraries have created so far are never garbage

    storage_type, level = storage_dtype(dtype), parse_threshold(threshold)
    adapters = read_sources(sources, base, max_rank, allow_pickle=allow_pickle)
    modules = {m for a in adapters for m in a.modules}
    bar = progress_bar("decomposing", -(-len(modules) // launched()))
    with Team(launched()) as team, bar as step:
        written = run_job(
            out,
            lambda: validated(adapters, level, method, scope, target),
            lambda: OutputOptions(storage_type, compact, as_lora, format),
            device=device,
            overwrite=overwrite,
            report=_report(json),
            progress=step,
            team=team,
        )
    if written is not None:  # only the first process prints the results
        _print_results(written, json)


def _report(path: Path | None) -> Report | None:
    """The report to write, if there is a path for it."""
    if path is None:
        return None
    return path, lambda written: json_writer(_decomposition_report(written))


def _print_results(written: WrittenDecomposition, json: Path | None) -> None:
    """Print what was measured and written."""
    for label, (part, result) in written.nearest.items():
        print_nearest(label, part, result)
    print_parts(written)
    if written.processes > 1:
        typer.echo(f"{written.processes} processes shared the work.")
    _print_outputs(written, json)
    if written.doras:
        typer.echo("Activate unique parts first: a DoRA rescales what is listed before it.")


def _print_outputs(written: WrittenDecomposition, json: Path | None) -> None:
    """Print which outputs were written, removed or left."""
    paths = [*written.written.values(), *([json] if json else [])]
    if not paths:
        typer.echo("Nothing was written.")
    replaced = {*written.removed, *written.left}
    fates = {
        "Written": sorted(paths),
        "Zero, not written": [path for path in written.zero if path not in replaced],
        "Zero, not written; an older one was removed": written.removed,
        "Zero, not written; left as it was": written.left,
    }
    for fate, outputs in fates.items():
        if outputs:
            typer.echo(f"{fate}: {', '.join(map(str, outputs))}")


def _decomposition_report(parts: WrittenDecomposition) -> dict[str, Any]:
    """The full report: the record of the operation, and a row for each module and group."""
    records = parts.provenance
    return {
        "devec_version": __version__,
        **parts.record,
        "written": list(parts.written),
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
                "shared_energy": shared_energy([s]),
            }
            for s in parts.splits
        ],
    }
