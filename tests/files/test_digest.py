"""Digests that begin before they are asked for hold for the file as it is then."""

import hashlib
import os
from concurrent.futures import wait

import pytest

from devec.files import digest


def truth(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10_000))
    return path


@pytest.fixture
def counted(monkeypatch):
    """The files that were gone through."""
    digested, original = [], digest._digest
    monkeypatch.setattr(digest, "_digest", lambda path: digested.append(path) or original(path))
    return digested


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
@pytest.mark.parametrize("early", [True, False])
def test_it_is_the_digest_of_all_bytes(tmp_path, size, early):
    path = tmp_path / "file"
    path.write_bytes(b"\x5a" * size)
    if early:
        digest.begin(path)
    assert digest.sha256(path) == truth(path)


def test_what_was_begun_is_used_and_not_begun_twice(file, counted):
    digest.begin(file)
    digest.begin(file)
    assert digest.sha256(file) == truth(file)
    assert counted == [file]


def test_it_is_forgotten_once_it_was_used(file, counted):
    digest.begin(file)
    assert digest.sha256(file) == digest.sha256(file) == truth(file)
    assert counted == [file, file]


def rewritten(path):
    """Later by more than the clock of a file system may miss."""
    later = path.stat().st_mtime_ns + 10**9
    path.write_bytes(os.urandom(10_000))
    os.utime(path, ns=(later, later))


def appended(path):
    path.write_bytes(path.read_bytes() + b"x")


def replaced(path):
    """By a file of the same size and time."""
    known = path.stat()
    other = path.with_name("other")
    other.write_bytes(os.urandom(known.st_size))
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [rewritten, appended, replaced])
def test_after_a_change_it_is_not_used(file, counted, change):
    digest.begin(file)
    before = digest._begun[digest.version(file)].result()
    change(file)
    assert digest.sha256(file) == truth(file) != before
    assert counted == [file, file]


def test_what_is_no_file_is_left_alone(tmp_path, counted):
    digest.begin(tmp_path)
    digest.begin(tmp_path / "missing")
    assert counted == []
    with pytest.raises(FileNotFoundError):
        digest.sha256(tmp_path / "missing")


def test_a_file_that_vanishes_meanwhile_is_an_error_of_the_reader_alone(file, counted):
    digest.begin(file)
    begun = digest._begun[digest.version(file)]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        digest.sha256(file)
    wait([begun])
    assert counted == [file]


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError(5, "Input/output error")])
def test_whatever_goes_wrong_in_the_background_is_told(file, monkeypatch, error):
    def failing(_):
        raise error

    monkeypatch.setattr(digest, "_digest", failing)
    digest.begin(file)
    with pytest.raises(type(error), match=str(error.args[-1])):
        digest.sha256(file)
