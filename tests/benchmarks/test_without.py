"""What switches a measure off is there to be switched off."""

import importlib

import pytest
from benchmarks.without import MEASURES


@pytest.mark.parametrize("measure", MEASURES)
def test_the_names_that_a_measure_replaces_exist(measure):
    for name in MEASURES[measure]:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"devec.{module}"), attribute)
