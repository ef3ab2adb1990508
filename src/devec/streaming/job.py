"""One decomposition from files to files, in one of the processes that share it.

Parts whose shapes are known beforehand are written to their outputs as modules come. Others, the
common vector and parts of DoRAs among them, are spooled until all of their modules are known.
Neither inputs nor outputs are ever in memory as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Plan
from devec.decomposition.engine import run
from devec.decomposition.findings import Findings, Norms
from devec.decomposition.memory import memory_for
from devec.decomposition.question import PartName
from devec.decomposition.request import Request
from devec.decomposition.result import Decomposition, assemble, part_of
from devec.decomposition.stacks.stack import Stack
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed
from devec.files.staging import Staging, Writer, output_errors
from devec.formats.record import made_by_devec
from devec.lazy import outlines
from devec.linalg.buffers import MemoryBlocks, return_memory, reuse_memory
from devec.linalg.dtypes import require_device
from devec.linalg.precision import full_precision
from devec.operations.as_lora import as_lora as nearest_lora
from devec.operations.as_lora import with_lora_record
from devec.operations.compress import Compression
from devec.streaming.output_options import OutputOptions
from devec.streaming.processes import Team
from devec.streaming.sinks import Accepted, FileSink, SpoolSink, flushing
from devec.streaming.written import WrittenDecomposition

Report = tuple[Path, Callable[[WrittenDecomposition], Writer]]


@dataclass(frozen=True)
class Share:
    """What one process has measured and written."""

    findings: Findings
    accepted: Mapping[PartName, Accepted]


@dataclass
class _Outputs:
    """What was written: outlines by label, and the LoRAs that were written instead of DoRAs."""

    outlines: dict[str, Adapter] = field(default_factory=dict)
    nearest: dict[str, tuple[Adapter, Compression]] = field(default_factory=dict)


class Job:
    """One decomposition from files to files.

    Args:
        request: The pool, what counts as shared, and which parts are made.
        out: Directory of the outputs.
        options: How parts are written.
    """

    def __init__(self, request: Request, out: Path, options: OutputOptions) -> None:
        """Find the paths of all outputs."""
        self.request, self.options = request, options
        suffix = options.suffix(request.adapters)
        self.paths = {part.label: out / f"{part.label}{suffix}" for part in request.parts}
        self.sinks: dict[PartName, FileSink | SpoolSink] = {}
        self.staging: Staging
        self._blocks = MemoryBlocks()

    def targets(self, report: Path | None) -> list[Path]:
        """All paths that may be written.

        Args:
            report: Path of the report, if there is one.

        Raises:
            IncompatibleError: If the report would replace an output, or an output the report.
        """
        paths = list(self.paths.values())
        if report is None:
            return paths
        if any(path in (report, *report.parents) or report in path.parents for path in paths):
            raise IncompatibleError(
                f"the report {report} (--json) is the name of an adapter that may be written, or "
                f"of their directory: {listed([str(path) for path in paths], 20)}"
            )
        return [*paths, report]

    def sameness(self, device: str | torch.device | None) -> str:
        """A text that is equal in all processes that share one job."""
        kind = None if device is None else torch.device(device).type  # which determines the stacks
        request = self.request
        return repr((request.record, self.options, request.modules, sorted(self.paths), kind))

    def begin(self, team: Team, staging: Staging, closing: ExitStack) -> Mapping[str, Path]:
        """In the first process, create the unfinished outputs and spools.

        Returns:
            Label → path of the unfinished output; empty in the other processes.
        """
        if not team.is_first:
            return {}
        self.staging = staging
        closing.enter_context(staging)
        unfinished = {label: staging.staged_path(path) for label, path in self.paths.items()}
        self._open(unfinished, closing, team)
        return unfinished

    @full_precision
    def share(
        self,
        team: Team,
        unfinished: Mapping[str, Path],
        closing: ExitStack,
        device: str | torch.device | None,
        progress: Callable[[str], None] | None,
    ) -> Share:
        """Split this process's share of the modules."""
        with ExitStack() as within:
            if not team.is_first:  # where no staging explains errors
                within.enter_context(output_errors([self.paths[label] for label in unfinished]))
                self._open(unfinished, closing, team)
            files = [sink for sink in self.sinks.values() if isinstance(sink, FileSink)]
            within.enter_context(flushing(files))
            findings = run(
                self.request,
                self.sinks,
                device=team.device(device),
                share=team.share,
                around=self._with_memory,
                keep_bases=False,
                progress=progress,
            )
        self._blocks.clear()
        return Share(findings, {name: sink.accepted() for name, sink in self.sinks.items()})

    def finish(
        self, shares: Sequence[Share], team: Team, report: Report | None
    ) -> WrittenDecomposition:
        """In the first process, complete all outputs and the report, and give them their names."""
        outputs = _Outputs()
        parts = self._complete(self._gathered(shares), outputs)
        written = self._result(parts, outputs, team)
        paths = list(written.written.values())
        if report is not None:
            report[1](written)(self.staging.staged_path(report[0]))
            paths.append(report[0])
        self.staging.commit(paths, written.removed)
        return written

    @contextmanager
    def _with_memory(self, stack: Stack) -> Iterator[None]:
        """Reuse memory from stack to stack, and say which modules need more than there is."""
        modules, size = listed(list(stack.modules), 1), stack.working_bytes / 1e6
        what = f"{modules}, which need about {size:.0f} MB beside all else"
        with memory_for(what), reuse_memory(self._blocks):
            yield

    def _open(self, unfinished: Mapping[str, Path], closing: ExitStack, team: Team) -> None:
        """Open the sinks of all parts."""
        for name in self.request.parts:
            path = unfinished[name.label]
            made = self._planned(name)
            if made is None:
                sink: FileSink | SpoolSink = SpoolSink(
                    path.with_name(f"{name.label}.{team.rank}.parts")
                )
            else:
                sink = FileSink(*made, path, create=team.is_first)
            self.sinks[name] = sink
            closing.callback(sink.close)

    def _planned(self, name: PartName) -> tuple[Adapter, Plan] | None:
        """A part of one adapter and its plan; None if its shapes are known in the end only."""
        if name.adapter is None:
            return None
        original = self.request.originals[name.adapter]
        layout, known = original.layout, outlines(original.modules)
        if not self.options.as_read or layout is None or layout.joins or _has_gains(original):
            return None
        part = part_of(original, known, self.request.record, name.kind)
        part = dataclasses.replace(part, name=name.label)
        if not (part.modules or part.carried):
            return None
        plan = part.plan(self.options.dtype)
        alone = [piece.modules[0] for piece in plan.pieces if len(piece.modules) == 1]
        single = len(alone) == len(plan.pieces) and all(module in known for module in alone)
        return (part, plan) if single else None

    def _gathered(self, shares: Sequence[Share]) -> Findings:
        """The findings of all processes; sinks take over what all have accepted."""
        for name, sink in self.sinks.items():
            sink.gather([share.accepted[name] for share in shares])
        findings = Findings()
        for share in shares:
            findings.add(share.findings)
        return findings

    def _complete(self, findings: Findings, outputs: _Outputs) -> Decomposition:
        """Complete all outputs that are not zero; returns the parts that were spooled."""
        spooled: dict[PartName, Mapping[str, Delta]] = {}
        for name, sink in self.sinks.items():
            originals = self.request.pool.get(name.adapter or "", {})
            if isinstance(sink, SpoolSink):
                spooled[name] = sink.modules(originals, self.request.modules)
            elif not self._is_zero(name, findings):
                with memory_for(f"output {name.label!r}"):
                    sink.complete(originals)
                outputs.outlines[name.label] = sink.adapter
        parts = assemble(self.request, spooled, findings)
        with memory_for("outputs that were spooled"):
            for label, adapter in parts.each_output(compact=self.options.compact):
                self._write(label, adapter, outputs)
                del adapter  # frees memory before the next one is read
                return_memory()
        return parts

    def _is_zero(self, name: PartName, findings: Findings) -> bool:
        """Whether a part of one adapter is zero to rounding and carries no tensors."""
        norms, original = findings.parts.get(name, Norms()), self.request.originals[name.owner]
        carried = name.kind == "unique" and original.carried
        return not carried and norms.are_rounding_beside(findings.of_original(name.owner))

    def _write(self, label: str, adapter: Adapter, outputs: _Outputs) -> None:
        """Write a part that was spooled, in the requested format."""
        plain = adapter
        if self.options.as_lora is not None and _has_gains(adapter):
            result = nearest_lora(adapter, self.options.as_lora)
            plain = with_lora_record(adapter, result, self.options.as_lora)
            kept = dataclasses.replace(result, adapter=_outlined(result.adapter))
            outputs.nearest[label] = _outlined(adapter), kept
        converted = self.options.converted(plain)
        converted.plan(self.options.dtype).write(self.staging.staged_path(self.paths[label]))
        outputs.outlines[label] = _outlined(converted)

    def _result(self, parts: Decomposition, outputs: _Outputs, team: Team) -> WrittenDecomposition:
        """The result that callers get."""
        made = outputs.outlines
        zero = [path for label, path in self.paths.items() if label not in made]
        removed = [path for path in zero if path.exists() and made_by_devec(path)]
        return WrittenDecomposition(
            splits=parts.splits,
            record=parts.record,
            unique=self._unique(),
            written={label: path for label, path in self.paths.items() if label in made},
            provenance={
                label: made[label].provenance or {} for label in self.paths if label in made
            },
            nearest=outputs.nearest,
            processes=team.size,
            doras=[label for label, adapter in made.items() if _has_gains(adapter)],
            zero=zero,
            removed=removed,
            left=[path for path in zero if path.exists() and path not in removed],
        )

    def _unique(self) -> dict[str, Adapter]:
        """Name of an adapter → the outline of its unique part."""
        originals = {
            name.adapter: self.request.originals[name.adapter]
            for name in self.request.parts
            if name.kind == "unique" and name.adapter is not None
        }
        return {
            name: part_of(original, outlines(original.modules), self.request.record, "unique")
            for name, original in originals.items()
        }


def run_job(
    out: Path,
    request: Callable[[], Request],
    options: Callable[[], OutputOptions],
    *,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    progress: Callable[[str], None] | None = None,
    team: Team,
) -> WrittenDecomposition | None:
    """Decompose from files to files, in one of the processes that share the work.

    Args:
        out: Directory of the outputs.
        request: Validates and returns the request; errors reach the other processes.
        options: Validates and returns how parts are written.
        device: Where to compute; of several GPUs every process takes its own.
        overwrite: Whether existing outputs may be replaced.
        report: Path of a report, and a function from the result to its writer; it is written
            together with the outputs.
        progress: Called with the name of each module when it is done.
        team: The processes, each of which makes this call.

    Returns:
        What was measured and written; None in all but the first process.
    """
    jobs: list[Job] = []
    results: list[WrittenDecomposition] = []
    with ExitStack() as closing:

        def begin() -> tuple[str, Mapping[str, Path]]:
            job = Job(request(), out, options())
            if device is not None:
                require_device(device)
            jobs.append(job)
            targets = job.targets(report[0] if report else None)
            unfinished = job.begin(team, Staging(targets, overwrite=overwrite), closing)
            return job.sameness(device), unfinished

        def end() -> None:
            if team.is_first:
                results.append(job.finish(shares, team, report))

        begun = team.gather(begin)
        _require_same([sameness for sameness, _ in begun])
        (job,), (_, unfinished) = jobs, begun[0]
        shares = team.gather(lambda: job.share(team, unfinished, closing, device, progress))
        team.gather(end, "the outputs were written, or all of them were not")
    return results[0] if results else None


def _require_same(jobs: Sequence[str]) -> None:
    """Refuse processes that were given different arguments, or read different files."""
    if len(set(jobs)) > 1:
        raise IncompatibleError(
            "the processes were not given the same sources and options, or a source was changed "
            "between one reading it and another; run again"
        )


def _outlined(adapter: Adapter) -> Adapter:
    """An adapter without the values of its modules."""
    modules = {name: delta.outline for name, delta in outlines(adapter.modules).items()}
    return dataclasses.replace(adapter, modules=modules)


def _has_gains(adapter: Adapter) -> bool:
    """Whether any module is a DoRA's."""
    return any(delta.gain is not None for delta in outlines(adapter.modules).values())
