"""JSON reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devec.cli.shared.sources import name_and_path
from devec.errors import IncompatibleError, OutputError

if TYPE_CHECKING:
    from devec.files.staging import Writer


def json_writer(report: Any) -> Writer:  # noqa: ANN401
    """A function that writes a report as JSON; infinities and NaN become null."""

    def write(path: Path) -> None:
        text = json.dumps(_json_values(report), indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

    return write


def _json_values(value: Any) -> Any:  # noqa: ANN401
    """A value with tensors replaced by lists, and infinities and NaN by None."""
    if isinstance(value, dict):
        return {str(k): _json_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _json_values(value.tolist()) if hasattr(value, "tolist") else value


def require_new(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse outputs that exist, unless they may be replaced."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"output exists: {', '.join(existing[:5])}; allow it with --overwrite")


def require_report(json: Path | None, sources: Sequence[str], *, overwrite: bool) -> None:
    """Refuse a report that cannot be written or would replace an input, before any work is done.

    Args:
        json: The ``--json`` option.
        sources: The sources on the command line.
        overwrite: Whether an existing report may be replaced.

    Raises:
        IncompatibleError: If the report is a source, or no path.
    """
    if json is None:
        return
    if str(json) == "-":
        raise IncompatibleError("--json writes a file, not to standard output; name one")
    paths = [Path(name_and_path(source)[1]) for source in sources]
    if any(json.resolve() in (path.resolve(), *path.resolve().parents) for path in paths):
        raise IncompatibleError(f"the report {json} (--json) is a source; choose another path")
    require_new([json], overwrite=overwrite)
