"""Pools with something missing, from files to files: what is not there is not written."""

import pytest
import torch
from safetensors.torch import load_file

from devec import Adapter, DevecError
from devec.streaming.decompose_to import decompose_to
from support.adapters.cases import Variant, WithHead, save_adapter
from support.checks.streamed import (
    from_files,
    from_files_to_files,
    in_memory,
)
from support.checks.streams import assert_streams_as_in_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    # The readers apply it too weakly, whichever way it is split.
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*name different base models:devec.DevecWarning"),
]

WEIGHTS = "adapter_model.safetensors"


def test_whole_trained_tensors_go_to_unique_parts(tmp_path):
    fields = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    pool = [
        save_adapter(tmp_path / name, "linear", "plain", index, WithHead(), **fields)
        for index, name in enumerate("ab")
    ]
    written = assert_streams_as_in_memory(tmp_path, pool)
    for name, path in written.written.items():
        assert any("head" in key for key in load_file(path / WEIGHTS)) == name.endswith("-unique")


def test_what_is_shared_with_nothing_is_not_written(tmp_path, peft_pool):
    written = assert_streams_as_in_memory(tmp_path, peft_pool(), threshold=1.0)
    assert written.nothing_shared
    assert set(written.written) == {"a-unique", "b-unique"}
    assert {path.name for path in written.zero} == {"a-shared", "b-shared", "common"}
    unique, original = (
        load_file(p / WEIGHTS) for p in (written.written["a-unique"], peft_pool()[0])
    )
    assert unique.keys() == original.keys()
    assert all(torch.equal(unique[key], original[key]) for key in unique)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_what_is_shared_whole_leaves_nothing_unique(tmp_path, peft_pool, kind):
    pool = dict.fromkeys("ab", peft_pool(kind)[0])
    written = assert_streams_as_in_memory(tmp_path, pool)
    assert set(written.written) == {"a-shared", "b-shared", "common"}


def test_a_zero_adapter_has_no_parts(tmp_path, peft_pool):
    written = assert_streams_as_in_memory(tmp_path, peft_pool("linear", "zero"))
    assert set(written.written) == {"a-unique"}


@pytest.mark.parametrize(
    "options", [{}, {"scope": "pairwise"}, {"scope": "iterative", "target": "b"}]
)
def test_adapters_that_lack_modules(tmp_path, options):
    """Of three, the second lacks a module, and the third has one that no other has."""
    variant = Variant(ranks=(5,))
    targets = [["first", "second"], ["first"], ["first", "second", "head"]]
    pool = [
        save_adapter(tmp_path / n, "linear", variant, i, WithHead(), target_modules=targets[i])
        for i, n in enumerate("abc")
    ]
    written = assert_streams_as_in_memory(tmp_path, pool, **options)
    for name, path in written.written.items():
        if name.startswith("b-"):
            assert Adapter.from_pretrained(path).modules.keys() == {"first"}


def test_an_older_output_without_a_successor_is_taken_away(tmp_path, peft_pool):
    out, pool = tmp_path / "out", peft_pool()
    from_files_to_files(out, pool)
    with pytest.raises(DevecError, match="output exists"):
        from_files_to_files(out, pool, threshold=1.0)
    written = from_files_to_files(out, pool, threshold=1.0, overwrite=True)
    assert {path.name for path in written.removed} == {"a-shared", "b-shared", "common"}
    assert {path.name for path in out.iterdir()} == {"a-unique", "b-unique"}


def test_outputs_may_replace_their_own_inputs(tmp_path, peft_pool):
    whole = in_memory(tmp_path / "want", {"a-unique": peft_pool()[0], "b": peft_pool()[1]})
    assert "a-unique-unique" in whole
    out = tmp_path / "out"
    first, second = from_files({"a": peft_pool()[0], "b": peft_pool()[1]})
    first.save_pretrained(out / "a-unique")
    again = Adapter.from_pretrained(out / "a-unique", "a", lazy=True)
    decompose_to(out, [again, second], overwrite=True)
    got, want = (
        load_file(p / WEIGHTS) for p in (out / "a-unique", tmp_path / "want/a-unique-unique")
    )
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
