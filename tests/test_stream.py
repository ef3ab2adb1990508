"""Decompositions from files to files: the same files as those of decompositions in memory."""

import json
from functools import cache

import pytest
import torch
from cases import Variant, WithHead, make_pool, save_adapter
from doras import base, dora_file
from golden_pool import golden, sibling
from peft_doras import BASES, save_dora, save_lora
from safetensors.torch import load_file, save_file
from streamed import (
    assert_same_files,
    contents,
    from_files,
    from_files_to_files,
    in_memory,
    stored,
    tree,
)

from devec import Adapter, Delta, DevecError, decompose
from devec.lazy import LazyMapping, outlines
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    # The readers apply it too weakly, whichever way it is split.
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*name different base models:devec.DevecWarning"),
]

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_1_conv2"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def peft_pool(tmp_path_factory):
    """Directories of adapters that PEFT made."""
    return cache(
        lambda kind="linear", variant="plain", k=2: make_pool(
            tmp_path_factory.mktemp(kind), kind, variant, k
        )
    )


@pytest.fixture(scope="module")
def dora_pool(tmp_path_factory):
    """Directories of DoRAs that PEFT made, the third of which is a LoRA."""

    @cache
    def make(kind, k=2):
        root = tmp_path_factory.mktemp(kind)
        made = [save_dora(root / name, kind, index=i) for i, name in enumerate("ab")]
        return [*made, save_lora(root / "c", kind, index=2)][:k]

    return make


@pytest.fixture
def one_thread():
    """What several threads compute together they round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden_pool(tmp_path_factory):
    """A golden file and one that shares directions with it."""
    return cache(
        lambda name: {
            "a": golden(name),
            "b": sibling(name, tmp_path_factory.mktemp(name) / "b.safetensors"),
        }
    )


def assert_streams_as_in_memory(tmp_path, pool, form=None, base=None, **options):
    """Both ways write the same files, bit by bit; returns what the way from files to files says."""
    names = in_memory(tmp_path / "memory", pool, form, base, **options)
    written = from_files_to_files(tmp_path / "files", pool, form, base, **options)
    assert set(written.written) == names
    assert_same_files(tmp_path / "files", tmp_path / "memory", without=("modelspec.date",))
    assert not list(tmp_path.rglob(".devec-*"))
    return written


# --- layer kinds, formats, scopes and forms -----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *((kind, "plain") for kind in ("conv1d-gpt2", "conv1d", "conv2d", "conv3d", "embedding")),
        *(("experts", variant) for variant in ("plain", "bfloat16")),
        *(("linear", v) for v in ("plain", "rslora", "patterns", "deficient", "float16")),
        *((kind, "bias") for kind in ("linear", "conv2d")),
    ],
)
def test_adapters_of_peft(tmp_path, peft_pool, kind, variant):
    assert len(assert_streams_as_in_memory(tmp_path, peft_pool(kind, variant)).written) == 5


SCOPES = {
    "mean": {"method": "mean"},
    "low": {"threshold": 0.3},
    "auto": {"threshold": "auto"},
    "mean auto": {"method": "mean", "threshold": "auto"},
    "pairwise": {"scope": "pairwise"},
    "pairwise principal": {"scope": "pairwise", "method": "principal"},
    "iterative": {"scope": "iterative", "target": "b"},
}


@pytest.mark.parametrize("name", SCOPES)
def test_scopes_methods_and_thresholds(tmp_path, peft_pool, name):
    pool = peft_pool("linear", "plain", 3)
    written = assert_streams_as_in_memory(tmp_path, pool, **SCOPES[name])
    want = decompose(from_files(pool, lazy=False), **SCOPES[name])
    assert written.record == want.record
    for got, split in zip(written.splits, want.splits, strict=True):
        assert got.basis.is_meta
        assert got.basis.shape == split.basis.shape
        for field in ("module", "group", "ranks", "threshold", "edge", "quantity"):
            assert getattr(got, field) == getattr(split, field)
        for field in ("spectrum", "norms", "shared_norms"):
            torch.testing.assert_close(getattr(got, field), getattr(split, field))


@pytest.mark.parametrize(
    "name",
    [
        "bundled_embeddings",
        "diffusers_flux_bias",
        "diffusers_sd15",
        "float8",
        "kohya_flux_single",
        "kohya_sdxl_conv",
        "lycoris_locon_tucker",
        "lycoris_loha",
        "lycoris_lokr",
        "lycoris_norm",
        "onetrainer_sdxl",
        "xlabs_flux",
    ],
)
def test_single_files(tmp_path, golden_pool, name):
    assert len(assert_streams_as_in_memory(tmp_path, golden_pool(name)).written) == 5


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("kohya_flux_single", "aitoolkit_flux"),
        ("diffusers_flux", "kohya_flux"),
        ("aitoolkit_native_flux", "xlabs_flux"),
        ("kohya_sdxl", "diffusers_sdxl"),
        ("peft", "lycoris_loha_tucker"),
    ],
)
def test_pools_of_several_conventions(tmp_path, a, b):
    assert_streams_as_in_memory(tmp_path, {"a": golden(a), "b": golden(b)}, threshold=1e-4)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (OutputOptions(compact=True), {}),
        (OutputOptions(), {"scope": "pairwise"}),
        (OutputOptions(format="kohya"), {}),
    ],
    ids=["compact", "pairwise", "kohya"],
)
def test_forms_and_scopes_of_several_conventions(tmp_path, form, options):
    pool = {"a": golden("diffusers_sdxl"), "b": golden("kohya_sdxl")}
    assert_streams_as_in_memory(tmp_path, pool, form, threshold=1e-4, **options)


def test_of_a_pool_with_no_module_in_common_no_pair_is_written(tmp_path):
    pool = {"a": golden("peft"), "b": golden("lycoris_loha_tucker")}
    assert not from_files_to_files(tmp_path, pool, scope="pairwise").written
    assert not list(tmp_path.iterdir())


FORMS = {
    "compact": OutputOptions(compact=True),
    "dtype": OutputOptions(dtype=torch.bfloat16),
    "kohya": OutputOptions(format="kohya"),
    "diffusers": OutputOptions(format="diffusers", dtype=torch.float16),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["kohya_sd15", "diffusers_sdxl"])
def test_forms(tmp_path, golden_pool, name, form):
    assert_streams_as_in_memory(tmp_path, golden_pool(name), FORMS[form])


def test_a_directory_as_a_file_and_a_file_as_a_directory(tmp_path, golden_pool):
    files, directories = tmp_path / "to-file", tmp_path / "to-directory"
    form = OutputOptions(format="diffusers")
    written = assert_streams_as_in_memory(files, golden_pool("peft"), form)
    assert {path.suffix for path in written.written.values()} == {".safetensors"}
    pool = {"a": golden("diffusers_flux"), "b": golden("aitoolkit_flux")}
    written = assert_streams_as_in_memory(
        directories, pool, OutputOptions(format="peft"), threshold=1e-4
    )
    assert all(path.is_dir() for path in written.written.values())


@pytest.mark.parametrize("kind", ["linear", "conv1d-gpt2", "conv2d", "embedding"])
def test_doras_of_peft(tmp_path, dora_pool, kind):
    written = assert_streams_as_in_memory(tmp_path, dora_pool(kind), base=BASES[kind])
    assert {name for name in written.doras if "shared" in name} == set()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (OutputOptions(compact=True), {}),
        (OutputOptions(as_lora=2), {}),
        (OutputOptions(as_lora=3, compact=True, dtype=torch.float16), {}),
        (OutputOptions(), {"scope": "iterative", "target": "a"}),
        (OutputOptions(), {"scope": "pairwise", "method": "mean"}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread")
def test_forms_and_scopes_of_doras_and_a_lora(tmp_path, dora_pool, form, options):
    pool = dora_pool("linear", 3)
    written = assert_streams_as_in_memory(tmp_path, pool, form, BASES["linear"], **options)
    assert bool(written.nearest) == (form.as_lora is not None)
    assert (not written.doras) == (form.as_lora is not None or options.get("scope") == "pairwise")


@pytest.mark.parametrize("axes", [("out", "out"), ("in", "out"), ("out", None)], ids=str)
@pytest.mark.parametrize(
    "form", [OutputOptions(), OutputOptions(as_lora=2)], ids=["whole", "as LoRA"]
)
def test_doras_in_single_files(tmp_path, axes, form):
    """Of two modules, and of an adapter that has only one of them."""
    axes = dict(zip((LINEAR, CONV), axes, strict=True))
    pool = {
        "a": dora_file(tmp_path / "a.safetensors", "sd15", axes),
        "b": dora_file(tmp_path / "b.safetensors", "sd15", {LINEAR: axes[LINEAR]}, seed=1),
    }
    assert_streams_as_in_memory(tmp_path, pool, form, base("sd15"), threshold=1e-4)


def test_a_dora_without_its_base_model_is_refused_and_nothing_written(tmp_path, dora_pool):
    with pytest.raises(DevecError, match=r"module 'first.layer'.*--base MODEL"):
        from_files_to_files(tmp_path / "out", dora_pool("linear"))
    assert not list(tmp_path.iterdir())


# --- pools with something missing ---------------------------------------------------------------


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


# --- bytes --------------------------------------------------------------------------------------


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


# --- what is read, and when -----------------------------------------------------------------------


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


def test_adapters_in_memory_are_written_the_same(tmp_path, peft_pool):
    decompose_to(tmp_path / "memory", from_files(peft_pool(), lazy=False))
    decompose_to(tmp_path / "files", from_files(peft_pool()))
    assert contents(tmp_path / "memory") == contents(tmp_path / "files")


def test_without_a_layout_there_is_nothing_to_write(tmp_path):
    pool = [Adapter(n, {"q": Delta(torch.randn(9, 2), torch.randn(2, 8))}) for n in "ab"]
    with pytest.raises(DevecError, match="was made in memory and has no file layout"):
        decompose_to(tmp_path / "out", pool)
    assert not list(tmp_path.iterdir())


# --- reports --------------------------------------------------------------------------------------


def test_modules_are_counted_and_a_report_is_written(tmp_path, peft_pool):
    done, out = [], tmp_path / "out"

    def report(written):
        return lambda path: path.write_text(json.dumps(sorted(written.written)))

    written = from_files_to_files(
        out, peft_pool(), progress=done.append, report=(tmp_path / "report.json", report)
    )
    assert sorted(done) == ["first.layer", "second.layer"]
    assert json.loads((tmp_path / "report.json").read_text()) == sorted(written.written)
    assert {name.partition("/")[0] for name in tree(out)} == set(written.written)


def test_a_report_in_the_place_of_an_output_is_refused(tmp_path, peft_pool):
    with pytest.raises(DevecError, match=r"--json"):
        from_files_to_files(
            tmp_path / "out",
            peft_pool(),
            report=(tmp_path / "out" / "common", lambda _: lambda path: path.write_text("")),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, r"threshold must be in \(0, 1\]"),
        ({"method": "median"}, r"method must be one of"),
        ({"device": "cuda:99"}, r"device 'cuda:99' cannot be used"),
        ({"form": OutputOptions(format="zip")}, r"zip"),
        ({"form": OutputOptions(as_lora=0)}, r"rank must be at least 1"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(
    tmp_path, dora_pool, options, message
):
    with pytest.raises(DevecError, match=message):
        from_files_to_files(tmp_path / "out", dora_pool("linear"), base=BASES["linear"], **options)
    assert not list(tmp_path.iterdir())
