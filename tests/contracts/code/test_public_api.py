"""The public names and how they are called are those on record.

A change that is meant is recorded, in the folder tests, by:

    python contracts/code/test_public_api.py
"""

import inspect
from pathlib import Path

import devec

RECORD = Path(__file__).with_name("public_api.txt")


def signature(function):
    """Names, kinds and defaults of the parameters; types are mypy's business."""
    found = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(inspect.Signature(plain))


def members(name, value):
    """What a class has, its own and inherited from devec; errors are raised, not called."""
    yield name if issubclass(value, Exception | Warning) else name + signature(value)
    for member in dir(value):
        if member.startswith("_") or not inspect.isclass(value):
            continue
        homes = [c for c in value.__mro__ if member in vars(c)]
        if not homes[0].__module__.startswith("devec"):
            continue
        found = inspect.getattr_static(value, member)
        found = getattr(found, "__func__", found)
        yield f"{name}.{member}" + (signature(found) if inspect.isfunction(found) else "")


def public_api():
    """One line for each name that users may rely on."""
    lines = []
    for name in sorted(devec.__all__):
        value = getattr(devec, name)
        if inspect.isclass(value):
            lines += members(name, value)
        else:
            lines.append(name + (signature(value) if callable(value) else ""))
    return "\n".join(lines) + "\n"


def test_names_and_signatures_are_those_on_record():
    assert public_api().splitlines() == RECORD.read_text(encoding="utf-8").splitlines()


def test_names_that_are_listed_are_all_there_are():
    assert sorted(devec.__all__) == devec.__all__
    assert dir(devec) == devec.__all__


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
