"""Writing outputs so that none is ever seen half-written.

Everything is first written under a hidden temporary directory on the same file system, flushed,
and then renamed into place. A process killed at any time leaves at most such a directory behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from devec.errors import OutputError, listed

Writer = Callable[[Path], None]

# A directory is replaced only if it is an adapter's: nobody loses a home directory to a typo.
_MARKER = "adapter_config.json"


def write_all(
    outputs: Mapping[Path, Writer], *, overwrite: bool = False, obsolete: Sequence[Path] = ()
) -> None:
    """Write several outputs, all or none.

    Args:
        outputs: Target path → function that writes the output at the path it is given.
        overwrite: Whether targets that exist may be replaced.
        obsolete: Outputs of an earlier run that these replace without having a successor.

    Raises:
        OutputError: If a target exists and may not be replaced, or cannot be written. Nothing is
            changed then.
    """
    _require_replaceable([*outputs, *obsolete], overwrite)
    staging: dict[Path, Path] = {}
    try:
        for parent in {path.parent for path in [*outputs, *obsolete]}:
            staging[parent] = Path(tempfile.mkdtemp(prefix=".devec-", dir=_existing(parent)))
        for path, write in outputs.items():
            staged = staging[path.parent] / path.name
            write(staged)
            _flush(staged)
            _require_same_kind(staged, path)
        _commit(outputs, obsolete, staging)
    except (OSError, SafetensorError) as error:
        target = listed([str(path) for path in outputs], 1)
        raise OutputError(f"cannot write {target}: {error}; nothing was changed") from error
    finally:
        for directory in staging.values():
            shutil.rmtree(directory, ignore_errors=True)


def _commit(
    outputs: Iterable[Path], obsolete: Iterable[Path], staging: Mapping[Path, Path]
) -> None:
    """Give finished outputs their names and take obsolete ones away; undo all if any step fails."""
    done: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        done.append((source, target))

    try:
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                move(path, staging[path.parent] / f"{path.name}.replaced")
            move(staging[path.parent] / path.name, path)
        for path in obsolete:
            if path.exists():
                move(path, staging[path.parent] / f"{path.name}.replaced")
    except OSError:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _require_replaceable(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse outputs that exist, unless they may be replaced and are outputs of this kind."""
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(
            f"output exists: {listed([str(p) for p in existing])}; remove it, choose another "
            "path, or allow overwriting (--overwrite, overwrite=True)"
        )
    for path in existing:
        if path.is_dir() and any(path.iterdir()) and not (path / _MARKER).exists():
            raise OutputError(
                f"{path} is a directory without {_MARKER}, so it is not replaced; remove it or "
                "choose another path"
            )


def _require_same_kind(staged: Path, target: Path) -> None:
    """Refuse to put a file in the place of a directory, or a directory in that of a file."""
    if target.exists() and staged.is_dir() != target.is_dir():
        old, new = ("directory", "file") if target.is_dir() else ("file", "directory")
        raise OutputError(
            f"{target} is a {old} and is not replaced by a {new}; remove it or choose another path"
        )


def _existing(path: Path) -> Path:
    """The nearest directory above that exists, where a temporary one can be made."""
    path = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not path.is_dir():
        raise OutputError(f"cannot write in {path}: it is a file, expected a directory")
    return path


def _flush(path: Path) -> None:
    """Make sure an output is on the disk before it gets its name."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
