"""`devec overlap` prints every pair."""

from itertools import combinations

import pytest

import devec
from support.checks.command_line import WARNINGS_ARE_LINES, read, strict_json, table

pytestmark = WARNINGS_ARE_LINES


def test_overlap_prints_and_reports_every_pair(run):
    pool = [read(name) for name in ("a", "b", "c")]
    want = devec.overlap(pool)
    text = run("overlap", "a", "b", "c", "--json", "r.json").wrote().out
    rows, report = table(text), strict_json("r.json")
    assert len(rows) == len(report["modules"]) == len(want.modules) == 6
    for row, found in zip(report["modules"], want.modules, strict=True):
        printed = rows[f"{' + '.join(found.pair)}: {found.module}"]
        assert (row["module"], tuple(row["pair"])) == (found.module, found.pair)
        assert row["squared_cosines"] == pytest.approx(found.squared_cosines.tolist())
        assert row["random_edge"] == pytest.approx(found.edge)
        assert row["cosine"] == pytest.approx(found.cosine)
        assert printed["largest cos²"] == f"{found.largest:.3f}"
        assert printed["random edge"] == f"{found.edge:.3f}"
        assert printed["above edge"] == f"2 of {len(found.squared_cosines)}"
        assert printed["cosine"] == f"{found.cosine:.3f}"
    assert [tuple(row["pair"]) for row in report["cosines"]] == list(combinations("abc", 2))
    for x, y in combinations(pool, 2):
        assert f"{x.name} + {y.name}: cosine of the whole adapters {devec.cosine(x, y):.3f}" in text


def test_overlap_needs_different_names(run):
    run("overlap", "a", "a=b").refused("must differ", "'a'", "NAME=PATH")


def test_overlap_warns_of_adapters_without_a_module_in_common(run):
    assert "warning: " in run("overlap", "a", "deep0").wrote().err
