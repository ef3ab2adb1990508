"""What faults do to files, and what may be there afterwards."""

import dataclasses
from pathlib import Path

from devec.lazy import LazyMapping, outlines


def module_of(adapter):
    """The last of its modules."""
    return list(adapter.modules)[-1]


def assert_nothing_but(directory, *names):
    """That is in a directory, hidden or not."""
    assert sorted(path.name for path in Path(directory).iterdir()) == sorted(names)


def before_reading(adapter, module, act):
    """The adapter, with something that happens before a module is read."""

    def read(name):
        if name == module:
            act()
        return adapter.modules[name]

    return dataclasses.replace(adapter, modules=LazyMapping(outlines(adapter.modules), read))
