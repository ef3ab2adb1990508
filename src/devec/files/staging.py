"""Writing outputs so that none is ever seen half-written.

Everything is first written under a hidden temporary directory on the same file system, flushed,
and then renamed into place. A process killed at any time leaves at most such a directory behind,
which the next one takes away.
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

# The hidden directories in which outputs are made, and the lock that says they are in use.
_PREFIX = ".devec-"
_LOCK = ".lock"
_REPLACED = ".replaced"

Writer = Callable[[Path], None]

# The outputs of this process that have their names, for what an interrupted command reports.
COMMITTED: list[Path] = []

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
    with Staging([*outputs, *obsolete], overwrite=overwrite) as staging:
        for path, write in outputs.items():
            write(staging.place(path))
        staging.commit(list(outputs), obsolete)


class Staging:
    """Where outputs are made until all of them get their names at once.

    Args:
        targets: What may be written.
        overwrite: Whether targets that exist may be replaced.
    """

    def __init__(self, targets: Sequence[Path], *, overwrite: bool) -> None:
        """Refuse targets that may not be replaced, before any work is done."""
        _require_replaceable(targets, overwrite)
        _require_apart(targets)
        self._targets, self._overwrite = targets, overwrite
        self._places: dict[Path, Path] = {}
        self._locks: list[IO[bytes]] = []

    def __enter__(self) -> Staging:
        try:
            for parent in {path.parent for path in self._targets}:
                with explained([path for path in self._targets if path.parent == parent]):
                    home = _existing(parent)
                    _remove_abandoned(home)
                    self._places[parent], lock = _made_in(home)
                    self._locks.append(lock)
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._clear()
        if isinstance(error, OSError | SafetensorError):
            with self._explained():
                raise error

    def _clear(self) -> None:
        """Take away all that was made here."""
        for lock in self._locks:  # first, since Windows removes no open files
            lock.close()
        for directory in self._places.values():
            shutil.rmtree(directory, ignore_errors=True)

    def place(self, target: Path) -> Path:
        """Where an output is made."""
        return self._places[target.parent] / target.name

    def commit(self, outputs: Sequence[Path], obsolete: Sequence[Path] = ()) -> None:
        """Flush outputs to the disk and give them their names, all or none.

        Args:
            outputs: The targets that were made.
            obsolete: What is taken away as it has no successor.

        Raises:
            OutputError: If one cannot be written. Nothing is changed then.
        """
        with self._explained():
            for path in outputs:
                _flush(self.place(path))
                _require_same_kind(self.place(path), path)
            _require_replaceable([*outputs, *obsolete], self._overwrite)  # much may have happened
            _commit(outputs, obsolete, self._places)

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self._targets)


@contextmanager
def explained(targets: Sequence[Path]) -> Iterator[None]:
    """Errors of the system as errors of devec.

    Args:
        targets: What is written.

    Yields:
        Nothing.

    Raises:
        OutputError: If the system raised an error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        target = listed([str(path) for path in targets], 1)
        raise OutputError(f"cannot write {target}: {error}; nothing was changed") from error


def _commit(
    outputs: Sequence[Path], obsolete: Iterable[Path], staging: Mapping[Path, Path]
) -> None:
    """Give finished outputs their names and take obsolete ones away; undo all if any step fails."""
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
    except BaseException:  # an interrupt, too, must not cost what was there before
        COMMITTED[:] = before
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


def _made_in(home: Path) -> tuple[Path, IO[bytes]]:
    """A new hidden directory, and a lock in it that lasts as long as the process."""
    while True:
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
        except OSError as error:  # which names what the user never asked for
            raise OSError(error.errno, error.strerror, str(home)) from error
        lock = (directory / _LOCK).open("wb")
        if sys.platform != "win32":  # where nothing that was abandoned is taken away
            import fcntl

            with suppress(OSError):  # not all file systems have locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        lock.close()  # another process took it for abandoned before it was locked


def _remove_abandoned(home: Path) -> None:
    """Take away what processes that were killed have left, and no process holds a lock in."""
    if sys.platform == "win32":
        return
    import fcntl

    for directory in home.glob(f"{_PREFIX}*"):
        if any(directory.glob(f"*{_REPLACED}")):
            continue  # it was killed while it replaced outputs, the only copies of which these are
        # in use, on its way to be, or another user's
        with suppress(OSError), (directory / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _require_apart(targets: Sequence[Path]) -> None:
    """Refuse a target inside of another one, or given twice."""
    for path in targets:
        if targets.count(path) > 1 or any(other in path.parents for other in targets):
            raise OutputError(f"{path} would be written in the place of another output")


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
            with file.open("r+b") as handle:  # which Windows asks for
                os.fsync(handle.fileno())
