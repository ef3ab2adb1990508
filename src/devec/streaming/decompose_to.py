"""`decompose_to`: a pool is read, split and written, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from devec.adapters.adapter import Adapter
from devec.decomposition.question import Threshold
from devec.decomposition.request import validated
from devec.streaming.job import run_job
from devec.streaming.output_options import OutputOptions
from devec.streaming.processes import Team
from devec.streaming.written import WrittenDecomposition


def decompose_to(
    out: str | Path,
    adapters: Sequence[Adapter],
    *,
    threshold: Threshold = 0.85,
    method: str = "chain",
    scope: str = "all",
    target: str | None = None,
    dtype: torch.dtype | None = None,
    compact: bool = False,
    as_lora: int | None = None,
    format: str | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> WrittenDecomposition:
    """Split a pool of adapters and write the parts, without holding an adapter in memory.

    The result is that of `decompose` and `save_adapters`. Adapters that were read with
    ``lazy=True`` are read, split and written module by module, several at a time on several cores.
    ``torchrun -m devec decompose …`` shares the work between processes.

    Args:
        out: Directory for the outputs: ``NAME-unique``, ``NAME-shared`` and ``common``; for scope
            ``"pairwise"`` ``A+B-shared``; for scope ``"iterative"`` the parts of the target.
        adapters: Two or more adapters of one base model, with different names.
        threshold: Smallest squared cosine at which directions count as shared, in (0, 1], or
            ``"auto"`` (see `decompose`).
        method: ``"chain"``, ``"mean"`` or ``"principal"``.
        scope: ``"all"``, ``"pairwise"`` or ``"iterative"``.
        target: Name of the adapter to split, for scope ``"iterative"``.
        dtype: Storage type of the outputs; by default that of the inputs.
        compact: Whether to cut every module of the unique and shared parts to its numerical rank.
        as_lora: Rank at which DoRAs are written as the nearest plain LoRAs; by default they are
            written as DoRAs.
        format: Format of the outputs, a key of `devec.formats.convert.FORMATS`; by default that of
            the first input.
        device: Where to compute; by default where the tensors are.
        overwrite: Whether existing outputs may be replaced.
        progress: Called with the name of each module when it is done.

    Returns:
        What was measured and written.

    Raises:
        IncompatibleError: If the adapters do not fit together or an argument is out of range.
        FormatError: If an input cannot be read, or changes meanwhile.
        OutputError: If an output exists and may not be replaced, or cannot be written. After any
            error all outputs are as they were.

    Cost: the time of `decompose`, and of reading and writing the files. Memory: for method
    ``"chain"`` and scopes ``"all"`` and ``"iterative"`` a few factors of a module for each stack in
    progress (two on a CPU if they fit in 256 MB, up to four on a GPU); for the others the bases of
    all adapters in a module. With DoRAs one base weight for each stack. LoHas, LoKrs and pickles
    are held in memory; parts that are compact, or plain LoRAs for DoRAs, one adapter at a time.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.

    Example:
        >>> import tempfile, devec
        >>> from devec.demo.evaluate import POOL
        >>> paths = [POOL / "ink", POOL / "chalk"]
        >>> pool = [devec.Adapter.from_pretrained(path, lazy=True) for path in paths]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     written = devec.decompose_to(out, pool, threshold=0.5)
        >>> sorted(written.written)
        ['chalk-shared', 'chalk-unique', 'common', 'ink-shared', 'ink-unique']
    """
    with Team() as team:
        written = run_job(
            Path(out),
            lambda: validated(adapters, threshold, method, scope, target),
            lambda: OutputOptions(dtype, compact, as_lora, format),
            device=device,
            overwrite=overwrite,
            progress=progress,
            team=team,
        )
    return cast("WrittenDecomposition", written)  # None is for processes beside the first
