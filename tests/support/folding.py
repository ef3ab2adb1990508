"""One test for many cases that differ in numbers alone."""

import functools
import inspect
from itertools import product

import torch


def folded(names, values):
    """Like ``pytest.mark.parametrize``, but all cases are one test, whose failure names them.

    Every case starts from the same random state; ``tmp_path`` is a folder of the case's own.
    Decorators multiply as parameters do.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else [*names]
    values = [value if len(names) > 1 else (value,) for value in values]

    def decorate(test):
        cases = [(names, values), *getattr(test, "folded", [])]
        body = getattr(test, "body", test)

        @functools.wraps(body)
        def run(**fixtures):
            failed = {}
            for number, case in enumerate(product(*(rows for _, rows in cases))):
                given = {}
                for (known, _), row in zip(cases, case, strict=True):
                    given |= zip(known, row, strict=True)
                own = dict(fixtures)
                if "tmp_path" in fixtures:
                    own["tmp_path"] = fixtures["tmp_path"] / str(number)
                    own["tmp_path"].mkdir()
                torch.manual_seed(0)
                try:
                    body(**own, **given)
                except Exception as error:
                    failed[str(given)] = error
            if failed:
                first = next(iter(failed.values()))
                raise AssertionError(f"fails for: {'; '.join(failed)}") from first

        folds = {name for known, _ in cases for name in known}
        signature = inspect.signature(body)
        kept = [p for p in signature.parameters.values() if p.name not in folds]
        run.__signature__ = signature.replace(parameters=kept)
        run.folded, run.body = cases, body
        return run

    return decorate
