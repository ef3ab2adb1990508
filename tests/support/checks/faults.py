"""Checks of one random case, whose faults are all told at the end."""

import contextlib
import warnings

import numpy as np
import pytest

from devec import DevecWarning

# Numbers of float32 below the smallest normal one are whole multiples of about this.
SMALLEST = 2e-45


class Faults:
    """Collects what is wrong with a case, and tells all of it at the end."""

    def __init__(self, case):
        self.case, self.found, self.count = case, [], 0

    def near(self, what, got, want, limit):
        """‖got - want‖ is at most the limit."""
        self.count += 1
        got, want = np.asarray(got), np.asarray(want)
        error = np.linalg.norm(got - want)
        if not error <= limit + SMALLEST * np.sqrt(want.size):
            self.found.append(f"{what}: off by {error:.3g}, allowed are {limit:.3g}")

    def holds(self, what, true):
        """A statement."""
        self.count += 1
        if not true:
            self.found.append(what)

    @contextlib.contextmanager
    def step(self, what):
        """Nothing is raised inside."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DevecWarning)
                yield
        except Exception as error:  # whatever it is, it is what is looked for
            self.found.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")

    def settle(self):
        """Fail if anything is wrong."""
        assert self.count, f"nothing was checked of {self.case}"
        if self.found:
            some = "\n".join(self.found[:12])
            pytest.fail(f"{len(self.found)} of {self.count} checks\n{some}\n{self.case}", False)
