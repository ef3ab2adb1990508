"""The comparison of two checkouts sees what differs, and allows what must differ."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from support.paths import TESTS

spec = importlib.util.spec_from_file_location(
    "compare_outputs", TESTS / "contracts" / "compare_outputs.py"
)
compare_outputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_outputs)

HEADER = {"modelspec.date": "today", "devec": '{"version": "1", "operation": "negate"}'}


@pytest.fixture
def trees(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(3)}, tmp_path / name / "a.safetensors", HEADER)
        (tmp_path / name / "report.json").write_text('{"rows": [{"rank": 2}]}')
        (tmp_path / name / "printed.txt").write_text("said")
    return tmp_path / "old", tmp_path / "new"


def found(trees):
    return compare_outputs.compare(*trees)[0]


def test_the_same_trees_do_not_differ(trees):
    assert compare_outputs.compare(*trees) == ({}, 3)


def test_dates_and_versions_may_differ(trees):
    header = {"modelspec.date": "then", "devec": HEADER["devec"].replace('"1"', '"2"')}
    save_file({"w": torch.ones(3)}, trees[1] / "a.safetensors", header)
    assert found(trees) == {}


def test_a_number_of_a_tensor_may_not(trees):
    save_file({"w": torch.tensor([1, 1, 1.0000001])}, trees[1] / "a.safetensors", HEADER)
    assert found(trees) == {"a.safetensors": "data"}


def test_a_field_of_a_record_may_not(trees):
    header = {**HEADER, "devec": HEADER["devec"].replace("negate", "combine")}
    save_file({"w": torch.ones(3)}, trees[1] / "a.safetensors", header)
    assert "'negate', now 'combine'" in found(trees)["a.safetensors"]


def test_a_number_of_a_report_and_a_word_may_not(trees):
    (trees[1] / "report.json").write_text('{"rows": [{"rank": 3}]}')
    (trees[1] / "printed.txt").write_text("sung")
    assert found(trees) == {
        "printed.txt": "text: 'said', now 'sung'",
        "report.json": "1 fields, first /rows/0/rank: 2, now 3",
    }


def test_files_that_only_one_has_are_named(trees):
    (trees[1] / "printed.txt").rename(trees[1] / "more.txt")
    assert found(trees) == {"more.txt": "new", "printed.txt": "missing"}


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('"task_type": null', None),
        ('"header": {}', None),
        ('"base_copies": []', None),
        ('"task_type": "CAUSAL_LM"', "1 fields, first /task_type: 'absent', now 'CAUSAL_LM'"),
        ('"other": null', "1 fields, first /other: 'absent', now None"),
    ],
)
def test_reports_may_have_more_fields_if_they_are_listed_and_empty(trees, field, said):
    (trees[1] / "report.json").write_text(f'{{"rows": [{{"rank": 2}}], {field}}}')
    assert found(trees).get("report.json") == said


def test_a_field_of_an_adapter_may_not_be_added_though_it_is_empty(trees):
    for tree, text in zip(trees, ('{"r": 2}', '{"r": 2, "task_type": null}'), strict=True):
        (tree / "adapter_config.json").write_text(text)
    assert "task_type" in found(trees)["adapter_config.json"]


def test_a_field_of_a_report_may_not_disappear(trees):
    (trees[0] / "report.json").write_text('{"rows": [{"rank": 2}], "task_type": null}')
    assert "/task_type: None, now 'absent'" in found(trees)["report.json"]


def test_only_what_both_refuse_is_reworded(trees):
    (trees[0] / "refused.txt").write_text("no")
    assert not compare_outputs.is_reworded("refused.txt", found(trees)["refused.txt"])
    (trees[1] / "refused.txt").write_text("never")
    assert compare_outputs.is_reworded("refused.txt", found(trees)["refused.txt"])
    assert not compare_outputs.is_reworded("printed.txt", "text: 'no', now 'never'")
