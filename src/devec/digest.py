"""SHA-256 of files, which may begin in the background before it is asked for."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_CHUNK = 1 << 22

_Version = tuple[int, int, int, int]  # device, inode, size, time of the last change
_begun: dict[_Version, Future[str]] = {}
_threads: list[ThreadPoolExecutor] = []


def begin(path: Path) -> None:
    """Begin to digest a file in the background, if there is one.

    Args:
        path: The file.
    """
    if not path.is_file():
        return
    version = _version(path)
    if not _threads:
        _threads.append(ThreadPoolExecutor(os.cpu_count(), "digest"))
    if version not in _begun:
        _begun[version] = _threads[0].submit(_digest, path)


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as hexadecimal digits; the one begun, if the file has not changed.

    Args:
        path: The file.

    Returns:
        The digest.
    """
    begun = _begun.pop(_version(path), None)
    return _digest(path) if begun is None else begun.result()


def _version(path: Path) -> _Version:
    """What is different once a file has changed."""
    known = path.stat()
    return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
