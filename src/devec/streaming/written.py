"""The result of a decomposition whose parts are files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devec.adapters.adapter import Adapter
from devec.decomposition.findings import ModuleSplit
from devec.operations.compress import Compression


@dataclass(frozen=True)
class WrittenDecomposition:
    """What a decomposition from files to files measured and wrote.

    Attributes:
        splits: Spectra, thresholds and norms, a row for each module and group; the bases have
            shapes and no values.
        record: Inputs, operation and parameters.
        unique: Adapter name → outline of its unique part.
        written: Name of an output → its path.
        provenance: Name of an output → its record.
        nearest: Name of an output → the part, a DoRA, and the plain LoRA written instead of it.
        processes: How many processes shared the work.
        doras: Names of the outputs that are DoRAs.
        zero: Paths of the outputs that are zero and were not written.
        removed: Those of them that an earlier run had written, which were removed.
        left: Those of them where there is something else, which was left.
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
        """Whether no direction reached the threshold anywhere."""
        return not any(split.shared_rank for split in self.splits)
