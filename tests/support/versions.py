"""Tests of what the oldest supported versions of other libraries cannot do."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package, oldest, reason):
    """Marks a test that is skipped with an older version of a package, for a reason."""
    present = version(package)
    return pytest.mark.skipif(
        Version(present) < Version(oldest), reason=f"{package} {present}: {reason}"
    )
