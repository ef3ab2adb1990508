"""SHA-256 of files, which may begin in the background before it is asked for."""

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
_waiting: SimpleQueue[tuple[Path, Future[str]]] = SimpleQueue()
_threads: list[Thread] = []


def begin(path: Path) -> None:
    """Begin to digest a file in the background, if there is one.

    Args:
        path: The file.
    """
    if not path.is_file():
        return
    here = version(path)
    if here in _begun:
        return
    _begun[here] = Future()
    _waiting.put((path, _begun[here]))
    if len(_threads) < (os.cpu_count() or 1):  # of an executor, threads would delay an exit
        _threads.append(Thread(target=_work, name="devec-digest", daemon=True))
        _threads[-1].start()


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as hexadecimal digits; the one begun, if the file has not changed.

    Args:
        path: The file.

    Returns:
        The digest.
    """
    begun = _begun.pop(version(path), None)
    return _digest(path) if begun is None else begun.result()


def version(path: Path) -> Version:
    """What is different once a file has changed.

    Args:
        path: The file.

    Returns:
        Device, inode, size and time of the last change.
    """
    known = path.stat()
    return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns


def _work() -> None:
    """Digest one file after the other."""
    while True:
        path, future = _waiting.get()
        try:
            future.set_result(_digest(path))
        except BaseException as error:  # told to whom asks for it, whatever it is
            future.set_exception(error)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
