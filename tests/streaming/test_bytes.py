"""From files to files: what is copied byte by byte, what is read and when."""

import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, decompose
from devec.lazy import LazyMapping, outlines
from support.checks.streamed import (
    contents,
    from_files,
    from_files_to_files,
    stored,
)
from support.pools.golden_pool import golden

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    # The readers apply it too weakly, whichever way it is split.
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*name different base models:devec.DevecWarning"),
]


@pytest.mark.parametrize("name", ["kohya_sd15", "diffusers_flux_bias", "onetrainer_sdxl"])
def test_what_does_not_change_is_copied(tmp_path, golden_pool, name):
    pool = golden_pool(name)
    written = from_files_to_files(tmp_path / "out", pool)
    for adapter, path in pool.items():
        original, _ = stored(path)
        for kind in ("unique", "shared"):
            part, _ = stored(written.written[f"{adapter}-{kind}"])
            same = [k for k in original if (".lora_down." in k or ".lora_A." in k) and k in part]
            assert same
            for key in same:
                assert part[key].dtype == original[key].dtype
                assert torch.equal(part[key], original[key]), key


def test_carried_tensors_of_any_type_are_copied(tmp_path, golden_pool):
    pool = {}
    for name, path in golden_pool("kohya_sd15").items():
        tensors, strings = stored(path)
        tensors["steps"] = torch.arange(7)
        pool[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, pool[name], strings)
    with pytest.warns(UserWarning, match="carried over whole: 'steps'"):
        written = from_files_to_files(tmp_path / "out", pool)
    for name, path in written.written.items():
        tensors, _ = stored(path)
        assert ("steps" in tensors) == name.endswith("-unique")
        if name.endswith("-unique"):
            torch.testing.assert_close(tensors["steps"], torch.arange(7), rtol=0, atol=0)


@pytest.mark.parametrize("part", ["a-unique", "a-shared", "common"])
@pytest.mark.parametrize("pool", ["linear", "experts", "kohya_flux", "diffusers_sdxl"])
def test_saved_again_every_byte_is_the_same(tmp_path, peft_pool, golden_pool, pool, part):
    paths = peft_pool(pool) if pool in ("linear", "experts") else golden_pool(pool)
    written = from_files_to_files(tmp_path / "out", paths)
    first = written.written[part]
    for lazy in (False, True):
        again = Adapter.from_pretrained(first, lazy=lazy).save_pretrained(tmp_path / f"{lazy}")
        got, want = (contents(p) if p.is_dir() else p.read_bytes() for p in (again, first))
        assert got == want


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_byte(tmp_path, peft_pool, threads):
    def run(name, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for kind in ("linear", "conv2d"):
                from_files_to_files(tmp_path / name / kind, peft_pool(kind))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return contents(tmp_path / name)

    assert run("some", threads) == run("other", 2)


@pytest.mark.parametrize(
    "name", ["linear", "experts", "embedding", "kohya_sd15", "lycoris_loha", "diffusers_flux_bias"]
)
def test_what_is_read_lazily_is_what_is_read_at_once(tmp_path, peft_pool, name):
    path = golden(name) if "_" in name else peft_pool(name)[0]
    lazy, eager = Adapter.from_pretrained(path, lazy=True), Adapter.from_pretrained(path)
    assert isinstance(lazy.modules, LazyMapping)
    assert not isinstance(eager.modules, LazyMapping)
    assert list(lazy.modules) == list(eager.modules)
    for module, delta in eager.modules.items():
        known = outlines(lazy.modules)[module]
        assert known.B.is_meta or name == "lycoris_loha"  # whose ranks only its values tell
        assert (known.shape, known.rank, known.scaling) == (delta.shape, delta.rank, delta.scaling)
        assert known.B.dtype == delta.B.dtype
        assert lazy.modules[module].same_as(delta)
    assert lazy.loaded() == eager
    assert repr(lazy) == repr(eager)
    for field in ("name", "source", "sha256", "provenance"):
        assert getattr(lazy, field) == getattr(eager, field)
    (tmp_path / "x").mkdir()
    written = [a.save_pretrained(tmp_path / "x" / n) for a, n in ((lazy, "lazy"), (eager, "eager"))]
    first, second = (contents(p) if p.is_dir() else p.read_bytes() for p in written)
    assert first == second


def test_what_is_read_lazily_is_not_held(peft_pool):
    adapter = Adapter.from_pretrained(peft_pool()[0], lazy=True)
    first, second = (adapter.modules["first.layer"] for _ in range(2))
    assert first.B.data_ptr() != second.B.data_ptr()
    first.B.zero_()
    assert adapter.modules["first.layer"].same_as(second)


def test_lazy_adapters_can_be_computed_with(peft_pool):
    lazy, eager = (from_files(peft_pool(), lazy=way) for way in (True, False))
    assert lazy[0] == eager[0]
    assert 2 * lazy[0] - lazy[1] == 2 * eager[0] - eager[1]
    assert lazy[0].norm() == eager[0].norm()
    got, want = decompose(lazy), decompose(eager)
    assert got.common == want.common
    assert got.unique["b"] == want.unique["b"]
