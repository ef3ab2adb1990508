"""A pool on its way from files to files: split module by module, parts written as they come.

Parts whose ranks are known beforehand go straight to their places in the files. Others, the common
vector and parts of DoRAs among them, are put by on the disk until all of them is known. Neither the
inputs nor the outputs are ever in memory as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import merged_layout
from devec.adapters.layout import Plan
from devec.decomposition.findings import Findings, ModuleSplit, Norms
from devec.decomposition.question import Kind, Question, names_of_split, planned_outputs
from devec.decomposition.result import Decomposition, common_part, part_of, record_of
from devec.decomposition.scopes import split
from devec.decomposition.stack import Pool, Stack
from devec.decomposition.stacks import stacks
from devec.decomposition.workers import in_parallel, memory_for
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed
from devec.files.staging import Staging, Writer, output_errors
from devec.formats.record import made_by_devec
from devec.lazy import outlines
from devec.linalg.buffers import Blocks, return_memory, reused
from devec.linalg.precision import full_precision
from devec.operations.as_lora import as_lora as nearest_lora
from devec.operations.as_lora import recorded
from devec.operations.compress import Compression
from devec.streaming.output_options import Form
from devec.streaming.parts import Direct, PutBy, Taken, flushing
from devec.streaming.processes import Team

Key = tuple[Kind, str]


@dataclass(frozen=True)
class Written:
    """What a decomposition found, and what became of its outputs.

    Attributes:
        splits: What was found, a row per module and group; bases have shapes and no values.
        record: Inputs, operation and parameters.
        unique: Adapter name → its unique part, of which the outlines alone are at hand.
        written: Name of an output → its path.
        provenance: Name of an output → its record.
        nearest: Name of an output → the part that is a DoRA and the LoRA that was written for it.
        processes: How many processes shared the work.
        doras: Names of the outputs that are DoRAs.
        zero: Outputs that hold nothing and were not written.
        removed: Those of them that an earlier run had written.
        left: Those of them in whose place there is something else.
    """

    splits: Sequence[ModuleSplit]
    record: Mapping[str, Any]
    unique: Mapping[str, Adapter]
    written: Mapping[str, Path]
    provenance: Mapping[str, Mapping[str, Any]]
    nearest: Mapping[str, tuple[Adapter, Compression]]
    processes: int
    doras: Sequence[str]
    zero: Sequence[Path]
    removed: Sequence[Path]
    left: Sequence[Path]

    @property
    def nothing_shared(self) -> bool:
        """Whether no direction exceeded the threshold anywhere."""
        return not any(split.shared_rank for split in self.splits)


def _outlined(adapter: Adapter) -> Adapter:
    """An adapter without the values of its modules."""
    modules = {name: delta.outline for name, delta in outlines(adapter.modules).items()}
    return dataclasses.replace(adapter, modules=modules)


def _has_gains(adapter: Adapter) -> bool:
    """Whether any module is a DoRA's."""
    return any(delta.gain is not None for delta in outlines(adapter.modules).values())


@dataclass(frozen=True)
class Share:
    """What a process has found and done."""

    found: Findings
    taken: Mapping[Key, Taken]


Report = tuple[Path, Callable[[Written], Writer]]


class Job:
    """A pool on its way from files to files.

    Args:
        question: What is asked of every module.
        adapters: The pool.
        out: Directory for the outputs.
        form: In which form parts are written.
    """

    def __init__(
        self, question: Question, adapters: Sequence[Adapter], out: Path, form: Form
    ) -> None:
        """Find out which parts there are."""
        self.question, self.adapters, self.form = question, adapters, form
        self.record = record_of(question, adapters)
        self.suffix, self._out = form.suffix(adapters), out
        self.originals = {a.name: a for a in adapters}
        self.pool: Pool = {a.name: a.modules for a in adapters}
        self.order = list(dict.fromkeys(m for modules in self.pool.values() for m in modules))
        self.keys = planned_outputs(question.names, question.scope, question.target)
        self.parts: dict[Key, Direct | PutBy] = {}
        self.staging: Staging
        self._blocks = Blocks()

    def targets(self, report: Path | None) -> list[Path]:
        """All that may be written.

        Args:
            report: Where a report is written, if there is one.

        Returns:
            The paths.

        Raises:
            IncompatibleError: If the report is in the place of an adapter, or an adapter in its.
        """
        paths = [self.target(label) for label in self.keys.values()]
        if report is None:
            return paths
        if any(path in (report, *report.parents) or report in path.parents for path in paths):
            raise IncompatibleError(
                f"the report {report} (--json) is the name of an adapter that may be written, or "
                f"of their directory: {listed([str(path) for path in paths], 20)}"
            )
        return [*paths, report]

    def sameness(self, device: str | torch.device | None) -> str:
        """What is the same in all processes that share this job; the kind of device makes stacks.

        Returns:
            Its text.
        """
        kind = None if device is None else torch.device(device).type
        return repr((self.record, self.form, self.order, sorted(self.keys.values()), kind))

    def target(self, label: str) -> Path:
        """Where an output is written."""
        return self._out / f"{label}{self.suffix}"

    def begin(self, team: Team, staging: Staging, closing: ExitStack) -> Mapping[str, Path]:
        """In the first process make what all of them write to.

        Returns:
            Name of an output → where it is made; nothing in the other processes.
        """
        if not team.is_first:
            return {}
        self.staging = staging
        closing.enter_context(staging)
        places = {label: staging.staged_path(self.target(label)) for label in self.keys.values()}
        self._open(places, closing, team)
        return places

    @full_precision
    def share(
        self,
        team: Team,
        places: Mapping[str, Path],
        closing: ExitStack,
        device: str | torch.device | None,
        progress: Callable[[str], None] | None,
    ) -> Share:
        """Split this process's share of the modules and take up their parts."""
        found, device = Findings(), team.device(device)
        work = stacks(self.pool, device, together=self.question.scope != "iterative")
        with ExitStack() as within:
            if not team.is_first:  # where there is no staging that would do so
                within.enter_context(output_errors([self.target(label) for label in places]))
                self._open(places, closing, team)
            direct = [part for part in self.parts.values() if isinstance(part, Direct)]
            within.enter_context(flushing(direct))
            for one, modules in in_parallel(self._split, team.share(list(work))):
                found.add(one)
                for module in modules if progress is not None else ():
                    progress(module)  # type: ignore[misc]
        self._blocks.clear()
        return Share(found, {key: part.taken() for key, part in self.parts.items()})

    def _open(self, places: Mapping[str, Path], closing: ExitStack, team: Team) -> None:
        """Open all parts where they are made."""
        for key, label in self.keys.items():
            original = self.originals.get(key[1])
            made = None if original is None else self._direct(original, key[0], label)
            if made is None:
                self.parts[key] = PutBy(places[label].with_name(f"{label}.{team.rank}.parts"))
            else:
                self.parts[key] = Direct(*made, places[label], create=team.is_first)
            closing.callback(self.parts[key].close)

    def _direct(self, original: Adapter, kind: Kind, label: str) -> tuple[Adapter, Plan] | None:
        """A part of an adapter whose form is that of the original; None if it is not."""
        known = outlines(original.modules)
        layout = original.layout
        if not self.form.as_read or layout is None or layout.joins:
            return None
        if any(delta.gain is not None for delta in known.values()):
            return None
        part = dataclasses.replace(part_of(original, known, self.record, kind), name=label)
        if not (part.modules or part.carried):
            return None
        plan = part.plan(self.form.dtype)
        there = [piece.modules[0] in known for piece in plan.pieces if len(piece.modules) == 1]
        return (part, plan) if len(there) == len(plan.pieces) and all(there) else None

    def _split(self, stack: Stack) -> tuple[Findings, Sequence[str]]:
        """Split a stack and take up its parts."""
        found = Findings()
        modules, size = listed(list(stack.modules), 1), stack.working_bytes / 1e6
        what = f"{modules}, which need about {size:.0f} MB beside all else"
        with memory_for(what), reused(self._blocks):
            for part in split(self.question, stack, found):
                found.add_part(part)
                self.parts[part.kind, part.name].take(part.deltas)
                del part  # before the next one is made
        stack.release()
        return found.outlined(), stack.modules

    def finish(self, shares: Sequence[Share], team: Team, report: Report | None) -> Written:
        """Complete all outputs, and the report, and give them their names."""
        written = self.complete(self.gather(shares), self.staging, team)
        kept = list(written.written.values())
        if report is not None:
            report[1](written)(self.staging.staged_path(report[0]))
            kept.append(report[0])
        self.staging.commit(kept, written.removed)
        return written

    def gather(self, shares: Sequence[Share]) -> Findings:
        """Take note of what all processes have found and done."""
        for key, part in self.parts.items():
            part.gather([share.taken[key] for share in shares])
        found = Findings()
        for share in shares:
            found.add(share.found)
        order = {module: index for index, module in enumerate(self.order)}
        found.rows.sort(key=lambda row: order[row.module])
        return found

    def complete(self, found: Findings, staging: Staging, team: Team) -> Written:
        """Complete all outputs that hold anything, where they are made."""
        held: dict[str, Adapter] = {}  # outlines of what is written
        nearest: dict[str, tuple[Adapter, Compression]] = {}
        for (kind, name), part in self.parts.items():
            if isinstance(part, Direct):
                with memory_for(f"output {part.adapter.name!r}"):
                    if not self._is_zero(part, kind, name, found):
                        part.complete(self.originals[name].modules)
                        held[part.adapter.name] = part.adapter
        with memory_for("outputs that were put by"):
            for label, adapter in self._put_by(found).each_output(compact=self.form.compact):
                plain = adapter
                if self.form.as_lora is not None and _has_gains(adapter):
                    result = nearest_lora(adapter, self.form.as_lora)
                    plain = recorded(adapter, result, self.form.as_lora)
                    kept = dataclasses.replace(result, adapter=_outlined(result.adapter))
                    nearest[label] = _outlined(adapter), kept
                converted = self.form.converted(plain)
                converted.plan(self.form.dtype).write(staging.staged_path(self.target(label)))
                held[label] = _outlined(converted)
                del adapter, plain, converted  # before the next one is made
                return_memory()
        paths = {label: self.target(label) for label in self.keys.values()}
        zero = [path for label, path in paths.items() if label not in held]
        removed = [path for path in zero if path.exists() and made_by_devec(path)]
        return Written(
            splits=found.rows,
            record=self.record,
            unique={name: self._unique(name) for name in names_of_split(self.question)},
            written={label: path for label, path in paths.items() if label in held},
            provenance={label: held[label].provenance or {} for label in paths if label in held},
            nearest=nearest,
            processes=team.size,
            doras=[label for label, adapter in held.items() if _has_gains(adapter)],
            zero=zero,
            removed=removed,
            left=[path for path in zero if path.exists() and path not in removed],
        )

    def _unique(self, name: str) -> Adapter:
        """The outline of a unique part."""
        original = self.originals[name]
        return part_of(original, outlines(original.modules), self.record, "unique")

    def _is_zero(self, part: Direct, kind: Kind, name: str, found: Findings) -> bool:
        """Whether nothing of a part is to be written."""
        norms = found.parts.get((kind, name), Norms())
        return not part.adapter.carried and norms.are_rounding_beside(found.of_original(name))

    def _put_by(self, found: Findings) -> Decomposition:
        """The parts that were put by, as a decomposition."""
        shared: dict[str, Adapter] = {}
        unique: dict[str, Adapter] = {}
        common = None
        for (kind, name), part in self.parts.items():
            if isinstance(part, Direct):
                continue
            original = self.originals.get(name)
            modules = part.modules({} if original is None else original.modules, self.order)
            if original is not None:
                home = unique if kind == "unique" else shared
                home[name] = part_of(original, modules, self.record, kind)
            elif kind == "common":
                common = self._common(self.adapters, modules, "common")
            elif modules:
                pairs = combinations(self.adapters, 2)
                pair = next(p for p in pairs if "+".join(a.name for a in p) == name)
                shared[name] = self._common(pair, modules, name)
        return Decomposition(
            unique, shared, common, found.rows, self.record, found.norms, found.bias_norms
        )

    def _common(self, group: Sequence[Adapter], modules: Mapping[str, Delta], name: str) -> Adapter:
        """The common vector of a group."""
        return common_part(group, merged_layout(group), modules, self.record, name)
