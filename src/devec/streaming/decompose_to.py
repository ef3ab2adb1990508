"""From files to files: a pool is read, split and written, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from devec.adapters.adapter import Adapter
from devec.decomposition.question import Threshold
from devec.decomposition.request import asked
from devec.errors import IncompatibleError
from devec.files.staging import Staging
from devec.linalg.dtypes import require_device
from devec.streaming.job import Job, Report, Written
from devec.streaming.output_options import Form
from devec.streaming.processes import Team

__all__ = ["Form", "Written", "decompose_to"]


def decompose_to(
    out: str | Path,
    adapters: Sequence[Adapter],
    *,
    threshold: Threshold = 0.85,
    method: str = "chain",
    scope: str = "all",
    target: str | None = None,
    form: Form | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    progress: Callable[[str], None] | None = None,
    team: Team | None = None,
) -> Written | None:
    """Split a pool of adapters and write the parts, never holding all of an adapter.

    What `decompose` and `save_adapters` do together, for adapters that were read with
    ``lazy=True``: the modules are read, split and written one after the other, several at a time
    on several cores, or by several processes.

    Args:
        out: Directory for the outputs: ``NAME-unique``, ``NAME-shared`` and ``common``; of scope
            ``"pairwise"`` ``A+B-shared``; of scope ``"iterative"`` those of the target.
        adapters: As in `decompose`.
        threshold: As in `decompose`.
        method: As in `decompose`.
        scope: As in `decompose`.
        target: As in `decompose`.
        form: In which form parts are written; by default in that of the inputs.
        device: As in `decompose`; of several GPUs every process takes its own.
        overwrite: Whether outputs that exist may be replaced.
        report: Path of a report, and what makes its writer; it is written with the outputs.
        progress: Called with the name of each module when it is done.
        team: The processes that share the work, each of which makes this call; this one alone if
            none are given.

    Returns:
        What was found and written; None in all but the first of several processes.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
        FormatError: If an input cannot be read, or is changed meanwhile.
        OutputError: If an output exists and may not be replaced, or cannot be written. Nothing is
            changed by any error.

    Cost: time that of `decompose`, and reading and writing the files. Memory: for method
    ``"chain"`` and scopes ``"all"`` and ``"iterative"`` some factors of a module for each of the
    stacks that are worked on at a time, of which there are two on a CPU if they fit in 256 MB, and
    up to four on a GPU; for the others the bases of all adapters in a module. With DoRAs one base
    weight for each. What was rewritten when it was read, LoHas and LoKrs, and pickles are held;
    results that are compact, or plain LoRAs for DoRAs, one adapter at a time.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.
    """
    team = Team() if team is None else team
    jobs: list[Job] = []
    done: list[Written] = []
    with ExitStack() as closing:

        def begin() -> tuple[str, Mapping[str, Path]]:
            question, pool, _ = asked(adapters, threshold, method, scope, target)
            if device is not None:
                require_device(device)
            job = Job(question, pool, Path(out), form or Form())
            jobs.append(job)
            targets = job.targets(report[0] if report else None)
            places = job.begin(team, Staging(targets, overwrite=overwrite), closing)
            return job.sameness(device), places

        def end() -> None:
            if team.is_first:
                done.append(job.finish(shares, team, report))

        begun = team.gather(begin)
        _require_same([sameness for sameness, _ in begun])
        (job,), (_, places) = jobs, begun[0]
        shares = team.gather(lambda: job.share(team, places, closing, device, progress))
        team.gather(end, "the outputs were written, or all of them were not")
    return done[0] if done else None


def _require_same(what: Sequence[str]) -> None:
    """Refuse processes that were asked different things, or read different files."""
    if len(set(what)) > 1:
        raise IncompatibleError(
            "the processes were not given the same sources and options, or a source was changed "
            "between one reading it and another; run again"
        )
