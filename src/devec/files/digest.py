"""SHA-256 digests of files, optionally computed in the background."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

_CHUNK = 1 << 22

Version = tuple[int, int, int, int]
_begun: dict[Version, Future[str]] = {}
_queue: SimpleQueue[tuple[Path, Future[str]]] = SimpleQueue()
_threads: list[Thread] = []


def begin(path: Path) -> None:
    """Start computing the digest of a file in the background; ignore paths that are no files."""
    if not path.is_file():
        return
    now = version(path)
    if now in _begun:
        return
    _begun[now] = Future()
    _queue.put((path, _begun[now]))
    if len(_threads) < (os.cpu_count() or 1):  # daemons, as threads of an executor delay the exit
        _threads.append(Thread(target=_work, name="devec-digest", daemon=True))
        _threads[-1].start()


def sha256(path: Path) -> str:
    """The digest of a file in hexadecimal; the one begun before, if the file is unchanged."""
    begun = _begun.pop(version(path), None)
    return _digest(path) if begun is None else begun.result()


def version(path: Path) -> Version:
    """Device, inode, size and modification time of a file, which differ once it has changed."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _work() -> None:
    """Compute digests of queued files, forever."""
    while True:
        path, future = _queue.get()
        try:
            future.set_result(_digest(path))
        except BaseException as error:  # raised where the result is requested
            future.set_exception(error)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
