"""Decompositions from files to files: the same files as those of decompositions in memory."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, Delta, DevecError, decompose
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions
from support.adapters.doras import CONV, LINEAR, base, dora_file
from support.adapters.peft_doras import BASES, save_dora, save_lora
from support.checks.streamed import (
    contents,
    from_files,
    from_files_to_files,
    stored,
    tree,
    with_report,
)
from support.checks.streams import assert_streams_as_in_memory
from support.pools.golden_pool import golden
from support.threads import one_and_two_threads

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    # The readers apply it too weakly, whichever way it is split.
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*name different base models:devec.DevecWarning"),
]

UP = ".lora_up.weight"


@pytest.fixture(scope="module")
def dora_pool(tmp_path_factory):
    """Directories of DoRAs that PEFT made, the third of which is a LoRA."""

    @cache
    def make(kind, k=2):
        root = tmp_path_factory.mktemp(kind)
        made = [save_dora(root / name, kind, index=i) for i, name in enumerate("ab")]
        return [*made, save_lora(root / "c", kind, index=2)][:k]

    return make


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


@one_and_two_threads
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


@one_and_two_threads
@pytest.mark.parametrize(
    "options", [{}, {"scope": "pairwise"}, {"scope": "iterative", "target": "a"}], ids=str
)
def test_stacks_of_several_shapes(tmp_path, golden_pool, options):
    assert assert_streams_as_in_memory(tmp_path, golden_pool("kohya_sd15"), **options).written


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


@one_and_two_threads
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


@one_and_two_threads
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
@one_and_two_threads
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


@one_and_two_threads
def test_a_dora_without_its_base_model_is_refused_and_nothing_written(tmp_path, dora_pool):
    with pytest.raises(DevecError, match=r"module 'first.layer'.*--base MODEL"):
        from_files_to_files(tmp_path / "out", dora_pool("linear"))
    assert not list(tmp_path.iterdir())


@one_and_two_threads
def test_an_error_in_a_worker_leaves_nothing_written(tmp_path, golden_pool):
    """A factor that is not finite is noticed when its stack is split."""
    pool = {}
    for name, path in golden_pool("kohya_sd15").items():
        tensors, strings = stored(path)
        last = max(key.removesuffix(UP) for key in tensors if key.endswith(UP))
        tensors[last + UP].fill_(float("nan"))
        pool[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, pool[name], strings)
    with pytest.raises(DevecError, match=last):
        from_files_to_files(tmp_path / "out", pool)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_adapters_in_memory_are_written_the_same(tmp_path, peft_pool):
    decompose_to(tmp_path / "memory", from_files(peft_pool(), lazy=False))
    decompose_to(tmp_path / "files", from_files(peft_pool()))
    assert contents(tmp_path / "memory") == contents(tmp_path / "files")


def test_without_a_layout_there_is_nothing_to_write(tmp_path):
    pool = [Adapter(n, {"q": Delta(torch.randn(9, 2), torch.randn(2, 8))}) for n in "ab"]
    with pytest.raises(DevecError, match="was made in memory and has no file layout"):
        decompose_to(tmp_path / "out", pool)
    assert not list(tmp_path.iterdir())


def test_modules_are_counted_and_a_report_is_written(tmp_path, peft_pool):
    done, out = [], tmp_path / "out"

    def report(written):
        return lambda path: path.write_text(json.dumps(sorted(written.written)))

    written = with_report(
        out, peft_pool(), (tmp_path / "report.json", report), progress=done.append
    )
    assert sorted(done) == ["first.layer", "second.layer"]
    assert json.loads((tmp_path / "report.json").read_text()) == sorted(written.written)
    assert {name.partition("/")[0] for name in tree(out)} == set(written.written)


def test_a_report_in_the_place_of_an_output_is_refused(tmp_path, peft_pool):
    with pytest.raises(DevecError, match=r"--json"):
        with_report(
            tmp_path / "out",
            peft_pool(),
            (tmp_path / "out" / "common", lambda _: lambda path: path.write_text("")),
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
