"""`devec inspect` says what is in an adapter and where it came from."""

import pytest

from support.checks.command_line import WARNINGS_ARE_LINES, read, strict_json, table

pytestmark = WARNINGS_ARE_LINES


def test_inspect_says_what_is_in_an_adapter(run):
    adapter = read("head0")
    text = run("inspect", "anime=head0", "--json", "r.json").wrote().out
    report = strict_json("r.json")
    assert (report["name"], report["format"]) == ("anime", "peft")
    assert report["sha256"] == adapter.sha256
    assert adapter.sha256 in text
    assert report["norm"] == pytest.approx(adapter.norm())
    assert report["carried"].keys() == adapter.carried.keys()
    assert "base_model.model.head.weight" in text
    assert [row["module"] for row in report["modules"]] == list(adapter.modules)
    for row, delta in zip(report["modules"], adapter.modules.values(), strict=True):
        assert row["shape"] == [30, 24]
        assert (row["rank"], row["dtype"], row["bias"]) == (6, "float32", False)
        assert row["scaling"] == pytest.approx(13 / 6)
        assert row["norm"] == pytest.approx(delta.norm())
    assert table(text)["first"]["scaling"] == "2.167"
    assert table(text)["first"]["shape"] == "30×24"


def test_inspect_says_where_an_output_came_from(run):
    run("negate", "a", "--out", "out").wrote()
    assert "combine" in run("inspect", "out", "--json", "r.json").wrote().out
    [origin] = strict_json("r.json")["provenance"]["inputs"]
    assert origin == {"name": "a", "sha256": read("a").sha256}
