"""Decompositions from files to files, compared with those in memory."""

from support.checks.streamed import (
    assert_same_files,
    from_files_to_files,
    in_memory,
)


def assert_streams_as_in_memory(tmp_path, pool, form=None, base=None, **options):
    """Both ways write the same files, bit by bit; returns what the way from files to files says."""
    names = in_memory(tmp_path / "memory", pool, form, base, **options)
    written = from_files_to_files(tmp_path / "files", pool, form, base, **options)
    assert set(written.written) == names
    assert_same_files(tmp_path / "files", tmp_path / "memory", without=("modelspec.date",))
    assert not list(tmp_path.rglob(".devec-*"))
    return written
