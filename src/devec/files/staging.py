"""Writing outputs atomically: all of them or none, and none incomplete.

Outputs are first written to a hidden temporary directory on the same file system, flushed, and then
renamed. A killed process leaves at most such a directory behind, which the next run removes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from devec.errors import OutputError, listed

# Prefix of the temporary directories, their lock while they are in use, and the suffix of outputs
# that are being replaced.
_DIRECTORY_PREFIX = ".devec-"
_LOCK = ".lock"
_REPLACED = ".replaced"

Writer = Callable[[Path], None]

# The outputs of this process that are complete, for the report of an interrupted command.
COMMITTED: list[Path] = []

# Only directories of adapters are replaced, so that a typo cannot cost a home directory.
_MARKER = "adapter_config.json"


def write_all(
    outputs: Mapping[Path, Writer], *, overwrite: bool = False, obsolete: Sequence[Path] = ()
) -> None:
    """Write several outputs, all or none.

    Args:
        outputs: Target path → function that writes the output to a given path.
        overwrite: Whether existing targets may be replaced.
        obsolete: Outputs of an earlier run to remove, which have no successor among the outputs.

    Raises:
        OutputError: If a target exists and may not be replaced, or cannot be written; then nothing
            is changed.
    """
    with Staging([*outputs, *obsolete], overwrite=overwrite) as staging:
        for path, write in outputs.items():
            write(staging.staged_path(path))
        staging.commit(list(outputs), obsolete)


class Staging:
    """Temporary directories for outputs, which are renamed to their targets together.

    Args:
        targets: The outputs that may be written or removed.
        overwrite: Whether existing targets may be replaced.
    """

    def __init__(self, targets: Sequence[Path], *, overwrite: bool) -> None:
        """Refuse targets that may not be replaced, before any work is done."""
        _require_replaceable(targets, overwrite)
        _require_disjoint(targets)
        self._targets, self._overwrite = targets, overwrite
        self._directories: dict[Path, Path] = {}
        self._locks: list[IO[bytes]] = []

    def __enter__(self) -> Staging:
        try:
            for parent in {path.parent for path in self._targets}:
                with output_errors([path for path in self._targets if path.parent == parent]):
                    existing = _existing_parent(parent)
                    _remove_abandoned(existing)
                    self._directories[parent], lock = _create_locked(existing)
                    self._locks.append(lock)
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._clear()
        if isinstance(error, OSError | SafetensorError):
            with self._output_errors():
                raise error

    def _clear(self) -> None:
        """Remove the temporary directories."""
        for lock in self._locks:  # first, since Windows does not remove open files
            lock.close()
        for directory in self._directories.values():
            shutil.rmtree(directory, ignore_errors=True)

    def staged_path(self, target: Path) -> Path:
        """The temporary path of an output."""
        return self._directories[target.parent] / target.name

    def commit(self, outputs: Sequence[Path], obsolete: Sequence[Path] = ()) -> None:
        """Flush outputs to the disk, rename them to their targets and remove obsolete ones.

        Args:
            outputs: The targets that were staged.
            obsolete: Outputs to remove.

        Raises:
            OutputError: If an output cannot be written; then nothing is changed.
        """
        with self._output_errors():
            for path in outputs:
                _flush(self.staged_path(path))
                _require_same_kind(self.staged_path(path), path)
            # again, as other processes may have written outputs since
            _require_replaceable([*outputs, *obsolete], self._overwrite)
            _commit(outputs, obsolete, self._directories)

    def _output_errors(self) -> AbstractContextManager[None]:
        return output_errors(self._targets)


@contextmanager
def output_errors(targets: Sequence[Path]) -> Iterator[None]:
    """Re-raise errors of the system as an `OutputError` that names the targets."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        target = listed([str(path) for path in targets], 1)
        raise OutputError(f"cannot write {target}: {error}; nothing was changed") from error


def _commit(
    outputs: Sequence[Path], obsolete: Iterable[Path], staging: Mapping[Path, Path]
) -> None:
    """Rename outputs to their targets and remove obsolete ones; undo all if any step fails."""
    done: list[tuple[Path, Path]] = []
    before = list(COMMITTED)

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        done.append((source, target))

    try:
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                move(path, staging[path.parent] / f"{path.name}{_REPLACED}")
            move(staging[path.parent] / path.name, path)
        for path in obsolete:
            if path.exists():
                move(path, staging[path.parent] / f"{path.name}{_REPLACED}")
        COMMITTED.extend(outputs)
    except BaseException:  # including interrupts, which must not lose existing outputs
        COMMITTED[:] = before
        for source, target in reversed(done):
            target.rename(source)
        raise


def _require_replaceable(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse existing outputs, unless they may be replaced and are files or adapter directories."""
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
    """Refuse to replace a directory by a file, or a file by a directory."""
    if target.exists() and staged.is_dir() != target.is_dir():
        old, new = ("directory", "file") if target.is_dir() else ("file", "directory")
        raise OutputError(
            f"{target} is a {old} and is not replaced by a {new}; remove it or choose another path"
        )


def _create_locked(parent: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary directory, and its lock, which is held until it is closed."""
    while True:
        try:
            directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=parent))
        except OSError as error:  # it names the temporary directory, which means nothing to users
            raise OSError(error.errno, error.strerror, str(parent)) from error
        lock = (directory / _LOCK).open("wb")
        if sys.platform != "win32":  # where abandoned directories are not removed
            import fcntl

            with suppress(OSError):  # not all file systems support locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        lock.close()  # another process removed the directory as abandoned before it was locked


def _remove_abandoned(parent: Path) -> None:
    """Remove temporary directories of killed processes, which no process holds a lock in."""
    if sys.platform == "win32":
        return
    import fcntl

    for directory in parent.glob(f"{_DIRECTORY_PREFIX}*"):
        if any(directory.glob(f"*{_REPLACED}")):
            continue  # the process was killed while replacing outputs; these are the only copies
        # errors mean that it is in use, being created, or another user's
        with suppress(OSError), (directory / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _require_disjoint(targets: Sequence[Path]) -> None:
    """Refuse a target that is given twice or is inside of another one."""
    for path in targets:
        if targets.count(path) > 1 or any(other in path.parents for other in targets):
            raise OutputError(f"{path} would be written in the place of another output")


def _existing_parent(path: Path) -> Path:
    """The nearest existing directory at or above a path."""
    path = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not path.is_dir():
        raise OutputError(f"cannot write in {path}: it is a file, expected a directory")
    return path


def _flush(path: Path) -> None:
    """Flush all files of an output to the disk."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open("r+b") as handle:  # Windows flushes only files open for writing
                os.fsync(handle.fileno())
