"""One decomposition from files to files, in one of the processes that share it.

Parts whose shapes are known beforehand are written to their outputs as modules come. Others, the
common vector and parts of DoRAs among them, are spooled until all of their modules are known.
Neither inputs nor outputs are ever in memory as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Plan
from devec.decomposition.engine import run
from devec.decomposition.findings import Findings, Norms
from devec.decomposition.memory import memory_for
from devec.decomposition.question import PartName, Question
from devec.decomposition.result import assemble, module_order, part_of, record_of
from devec.decomposition.scopes import SCOPES
from devec.decomposition.stacks.build import stacks_of
from devec.decomposition.stacks.stack import Pool, Stack
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed
from devec.files.staging import Staging, Writer, output_errors
from devec.formats.record import made_by_devec
from devec.lazy import outlines
from devec.linalg.buffers import MemoryBlocks, return_memory, reuse_memory
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

    outlines: dict[str, Adapter]
    nearest: dict[str, tuple[Adapter, Compression]]


class Job:
    """One decomposition from files to files.

    Args:
        question: What counts as shared, and which parts are made.
        adapters: The pool on common modules.
        out: Directory of the outputs.
        options: How parts are written.
    """

    def __init__(
        self, question: Question, adapters: Sequence[Adapter], out: Path, options: OutputOptions
    ) -> None:
        """Find the paths of all outputs."""
        self.question, self.adapters, self.options = question, adapters, options
        self.record = record_of(question, adapters)
        self.originals = {a.name: a for a in adapters}
        self.pool: Pool = {a.name: a.modules for a in adapters}
        self.order = module_order(adapters)
        suffix = options.suffix(adapters)
        self.paths = {part.label: out / f"{part.label}{suffix}" for part in question.parts}
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
        return repr((self.record, self.options, self.order, sorted(self.paths), kind))

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
        findings, device = Findings(), team.device(device)
        batched = SCOPES[self.question.scope].batched
        work = team.share(list(stacks_of(self.pool, device, batched=batched)))
        with ExitStack() as within:
            if not team.is_first:  # where no staging explains errors
                within.enter_context(output_errors([self.paths[label] for label in unfinished]))
                self._open(unfinished, closing, team)
            files = [sink for sink in self.sinks.values() if isinstance(sink, FileSink)]
            within.enter_context(flushing(files))
            for of_stack in run(
                self.question,
                work,
                self.sinks,
                around=self._with_memory,
                keep_bases=False,
                progress=progress,
            ):
                findings.add(of_stack)
        self._blocks.clear()
        return Share(findings, {name: sink.accepted() for name, sink in self.sinks.items()})

    def finish(
        self, shares: Sequence[Share], team: Team, report: Report | None
    ) -> WrittenDecomposition:
        """In the first process, complete all outputs and the report, and give them their names."""
        findings = self._gathered(shares)
        written = self._result(findings, self._complete(findings), team)
        outputs = list(written.written.values())
        if report is not None:
            report[1](written)(self.staging.staged_path(report[0]))
            outputs.append(report[0])
        self.staging.commit(outputs, written.removed)
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
        for name in self.question.parts:
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
        original = self.originals.get(name.owner)
        if original is None or len(name.of) > 1 or name.kind == "common":
            return None
        layout, known = original.layout, outlines(original.modules)
        if not self.options.as_read or layout is None or layout.joins or _has_gains(original):
            return None
        part = part_of(original, known, self.record, name.kind)
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

    def _complete(self, findings: Findings) -> _Outputs:
        """Complete all outputs that are not zero."""
        outputs = _Outputs({}, {})
        spooled: dict[PartName, Mapping[str, Delta]] = {}
        for name, sink in self.sinks.items():
            original = self.originals.get(name.owner) if len(name.of) == 1 else None
            modules = {} if original is None else original.modules
            if isinstance(sink, SpoolSink):
                spooled[name] = sink.modules(modules, self.order)
            elif not self._is_zero(name, findings):
                with memory_for(f"output {name.label!r}"):
                    sink.complete(modules)
                outputs.outlines[name.label] = sink.adapter
        parts = assemble(self.question, self.adapters, spooled, findings)
        with memory_for("outputs that were spooled"):
            for label, adapter in parts.each_output(compact=self.options.compact):
                self._write(label, adapter, outputs)
                del adapter  # frees memory before the next one is read
                return_memory()
        return outputs

    def _is_zero(self, name: PartName, findings: Findings) -> bool:
        """Whether a part of one adapter is zero to rounding and carries no tensors."""
        norms, original = findings.parts.get(name, Norms()), self.originals[name.owner]
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

    def _result(self, findings: Findings, outputs: _Outputs, team: Team) -> WrittenDecomposition:
        """The result that callers get."""
        made = outputs.outlines
        zero = [path for label, path in self.paths.items() if label not in made]
        removed = [path for path in zero if path.exists() and made_by_devec(path)]
        order = {module: index for index, module in enumerate(self.order)}
        return WrittenDecomposition(
            splits=sorted(findings.rows, key=lambda row: order[row.module]),
            record=self.record,
            unique={name: self._unique(name) for name in self.question.split_adapters},
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

    def _unique(self, name: str) -> Adapter:
        """The outline of a unique part."""
        original = self.originals[name]
        return part_of(original, outlines(original.modules), self.record, "unique")


def _outlined(adapter: Adapter) -> Adapter:
    """An adapter without the values of its modules."""
    modules = {name: delta.outline for name, delta in outlines(adapter.modules).items()}
    return dataclasses.replace(adapter, modules=modules)


def _has_gains(adapter: Adapter) -> bool:
    """Whether any module is a DoRA's."""
    return any(delta.gain is not None for delta in outlines(adapter.modules).values())
