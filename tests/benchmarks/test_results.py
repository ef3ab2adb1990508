"""The page says what was run, on what, and whether bars are met."""

import json

import pytest
from benchmarks.results import Bar, Measured, Section, Table, cell, load, render, save

PLACE = {"processor": "an abacus"}


def measured(command="python -m benchmarks", place=PLACE, quick=False):
    bars = [Bar("fast", 1.5, 2.0, "times"), Bar("faster", 10.0, 1000.0, "times", at_least=True)]
    units = {"job": "", "time": "seconds", "ratio": "times"}
    rows = [{"job": "beads", "time": 0.25, "ratio": 1.5}, {"job": "none", "time": 200.0}]
    section = Section("Sums", "How.", [Table("One table", units, rows, bars, ["A note."])])
    return Measured(section, command, "2001-02-03", place, {"torch": "9.9"}, quick)


def test_the_page_states_commands_machine_bars_and_ratios():
    page = render({"sums": measured()})
    top = page[: page.index("## Sums")]
    assert "`python -m benchmarks`" in top
    assert "an abacus" in top
    assert "torch 9.9" in top
    assert "| beads | 250 ms | 1.50 × |" in page
    assert "| none | 200 s | – |" in page
    assert "- **met**: fast: 1.50 ×, bar ≤ 2.00 ×" in page
    assert "- **not met**: faster: 10.00 ×, bar ≥ 1,000 ×" in page
    assert "2001-02-03" in page
    assert "A note." in page
    assert "mean nothing" not in page


def test_sections_from_elsewhere_say_so():
    other = measured("python -m benchmarks --only other", {"processor": "a slide rule"}, quick=True)
    page = render({"sums": measured(), "other": other})
    assert "Machine 1: processor: an abacus" in page
    assert "Machine 2: processor: a slide rule" in page
    assert "Machine 2: 2001-02-03, `python -m benchmarks --only other`. Tiny sizes" in page


def test_numbers_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "results.json"
    save(path, {"sums": measured()})
    assert render(load(path)) == render({"sums": measured()})
    assert json.loads(path.read_text())["sums"]["section"]["tables"][0]["rows"][0]["time"] == 0.25
    assert load(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("value", "unit", "printed"),
    [
        (0.00012, "seconds", "0.12 ms"),
        (1.234, "seconds", "1.23 s"),
        (1_234_000_000, "bytes", "1.23 GB"),
        (631_000_000, "bytes", "631 MB"),
        (4321.0, "times", "4,321 ×"),
        (0.123, "percent", "12.3 %"),
        (None, "seconds", "–"),
    ],
)
def test_figures_are_printed_with_the_digits_that_mean_something(value, unit, printed):
    assert cell(value, unit) == printed
