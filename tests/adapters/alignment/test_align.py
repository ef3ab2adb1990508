"""Adapters of one base in different conventions: sums, decompositions, overlaps, conversions."""

import json
import re
from functools import cache
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, DevecError, combine, convert, cosine, distance, overlap
from support.adapters.weight_changes import (
    assert_same,
    changes,
    file_truth,
    module_names,
    piece,
    total,
    zero_pipeline,
)
from support.folding import folded
from support.models.module_names import find_modules
from support.pools.golden_pool import assert_close_deltas, command, factors, golden, sibling, summed
from support.truth import reference
from support.truth.golden_truth import dense_truth

# The readers apply it too weakly, and so does the truth.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*have no module in common:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:.*name different base models:devec.DevecWarning"),
]

BASES = {
    "flux": "kohya_flux kohya_flux_single kohya_flux_split_qkv aitoolkit_flux "
    "aitoolkit_native_flux diffusers_flux onetrainer_flux xlabs_flux simpletuner_lokr",
    "sdxl": "kohya_sdxl kohya_sdxl_conv onetrainer_sdxl diffusers_sdxl bundled_embeddings",
    "sd15": "kohya_sd15 diffusers_sd15 diffusers_old peft lycoris_lokr_full lycoris_loha_tucker",
    "sd3": "kohya_sd3 diffusers_sd3",
}
PAIRS = [(kind, *pair) for kind, names in BASES.items() for pair in permutations(names.split(), 2)]
# Conventions that have no names for what these others change.
XLABS_HAS = ("kohya_flux_split_qkv",)
ONE_MODEL = ("lycoris_lokr_full", "lycoris_loha_tucker")
REFUSED = [
    pair for pair in PAIRS
    if (pair[1] == "xlabs_flux" and pair[2] not in XLABS_HAS)
    or (pair[1] == "peft" and pair[2] not in ONE_MODEL)
]  # fmt: skip

# --- sums of golden files ---------------------------------------------------------------------


def difference(a, b):
    adapters = [Adapter.from_pretrained(golden(name)) for name in (a, b)]
    return combine(adapters, [1, -0.5], carried_from="none")


@pytest.mark.parametrize(("kind", "a"), sorted({pair[:2] for pair in set(PAIRS) - set(REFUSED)}))
def test_sums_of_two_conventions(tmp_path, kind, a):
    first = changes(kind, golden(a))
    for b in [b for *pair, b in PAIRS if pair == [kind, a] and (kind, a, b) not in REFUSED]:
        path = difference(a, b).save_pretrained(tmp_path / f"out {b}", dtype=torch.float32)
        want = total(first, changes(kind, golden(b), -0.5))
        assert_same(changes(kind, path), want, 1e-6)


WAN = ("musubi_wan", "diffusion_pipe_wan", "bare", "bare_without_weight", "aitoolkit_lokr")


@pytest.mark.parametrize(("a", "b"), permutations(WAN, 2))
def test_sums_of_two_conventions_of_wan(tmp_path, a, b):
    path = difference(a, b).save_pretrained(tmp_path / "out", dtype=torch.float32)
    first, second, got = (without_prefix(dense_truth(p)) for p in (golden(a), golden(b), path))
    second = {module: -0.5 * delta for module, delta in second.items()}
    assert_close_deltas(got, summed(first, second), 1e-6)
    assert dense_truth(path).keys() == dense_truth(golden(a)).keys()


def without_prefix(truth):
    """Deltas by flat names."""
    return {re.sub(r"^(lora_unet_|diffusion_model\.)", "", m).replace(".", "_"): d
            for m, d in truth.items()}  # fmt: skip


@pytest.mark.parametrize(("kind", "a", "b"), REFUSED)
def test_what_the_first_convention_cannot_name_is_refused_when_written(tmp_path, kind, a, b):
    """It can still be measured, and be written in another format."""
    result = difference(a, b)
    with pytest.raises(DevecError, match=r"--format"):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    whole = {name: changes(kind, golden(name)) for name in (a, b)}
    adapters = [Adapter.from_pretrained(golden(name)) for name in (a, b)]
    assert cosine(*adapters) == pytest.approx(dense_cosine(*whole.values()), abs=1e-6)
    path = convert(result, "kohya").save_pretrained(tmp_path / "out", dtype=torch.float32)
    want = total(whole[a], changes(kind, golden(b), -0.5))
    assert_same(changes(kind, path), want, 1e-6)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("peft", "kohya_sd15", "of one model.*clip_l.*--format"),
        ("xlabs_flux", "kohya_flux", "no name in the convention of the output.*--format"),
    ],
)
def test_refusals_say_what_to_do_and_overlap_works(tmp_path, a, b, said):
    with pytest.raises(DevecError, match=said):
        command("decompose", golden(a), golden(b), "--out", tmp_path / "out", "--threshold", 0.01)
    assert not (tmp_path / "out").exists()
    assert f"{a} + {b}: cosine of the whole adapters" in command("overlap", golden(a), golden(b))
    pool = (golden(a), golden(b), "--out", tmp_path / "out", "--threshold", 0.01)
    assert "kohya convention" in command(
        "inspect", written(command("decompose", *pool, "--format", "kohya"))
    )


def written(printed):
    """The first of the files that a command says it wrote."""
    line = next(line for line in printed.splitlines() if line.startswith("Written: "))
    return line.removeprefix("Written: ").split(", ")[0]


# --- pools that share directions ----------------------------------------------------------------

POOLS = {  # golden file, base, what its sibling is written like, and whether that comes first
    "fused Flux + split": ("kohya_flux_single", "flux", "diffusers", False),
    "split + fused Flux": ("kohya_flux_single", "flux", "diffusers", True),
    "native ai-toolkit + split": ("aitoolkit_native_flux", "flux", "diffusers", False),
    "XLabs + split": ("xlabs_flux", "flux", "diffusers", False),
    "SDXL sgm + diffusers": ("kohya_sdxl", "sdxl", "diffusers", False),
    "diffusers + SDXL sgm": ("kohya_sdxl_conv", "sdxl", "diffusers", True),
    "fused SD3 + split": ("kohya_sd3", "sd3", "diffusers", False),
    "LoHa + PEFT directory": ("lycoris_loha", "sd15", "peft", False),
    "PEFT directory + LoCon": ("lycoris_locon", "sd15", "peft", True),
}
DENOISER_ALONE = [pool for pool in POOLS if "PEFT" in pool or "XLabs" in pool or "+ SDXL" in pool]
PARTS = [f"{name}-{part}" for name in ("a", "b") for part in ("unique", "shared")]
THRESHOLD = 0.85


def rewritten(kind, path, target, convention):
    """A file written again, by hand: one LoRA for every layer of diffusers, without alpha."""
    tensors, ranks = {}, set()
    plain = Adapter.from_pretrained(path).save_pretrained(path.with_name("plain.safetensors"))
    for module_id, (scale, B, A) in factors(plain).items():
        modules = find_modules(zero_pipeline(kind), module_id)
        rows = B.split([len(module.weight) for module in modules])
        for module, part in zip(modules, rows, strict=True):
            component, name = module_names(kind)[id(module)]
            prefix = "base_model.model" if convention == "peft" else component
            kernel = module.weight.shape[2:]
            down, up = A.reshape(len(A), -1, *kernel), part.reshape(*part.shape, *[1] * len(kernel))
            tensors[f"{prefix}.{name}.lora_A.weight"] = down.float().contiguous()
            tensors[f"{prefix}.{name}.lora_B.weight"] = (scale * up).float().contiguous()
            ranks.add(len(A))
    if convention == "diffusers":
        save_file(tensors, target.with_suffix(".safetensors"), {"format": "pt"})
        return target.with_suffix(".safetensors")
    target.mkdir()
    names = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors})
    [rank] = ranks
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Sources of a pool, the first named a and the second b, and what is in them."""

    @cache
    def make(pool):
        name, kind, convention, reverse = POOLS[pool]
        root = tmp_path_factory.mktemp("pool")
        other = sibling(name, root / "sibling.safetensors")
        paths = [golden(name), rewritten(kind, other, root / "rewritten", convention)]
        paths = paths[::-1] if reverse else paths
        return SimpleNamespace(
            kind=kind,
            paths=paths,
            sources=[f"{letter}={path}" for letter, path in zip("ab", paths, strict=True)],
            changes={i: changes(kind, path) for i, path in zip("ab", paths, strict=True)},
        )

    return make


@pytest.fixture(scope="module")
def decomposed(pools, tmp_path_factory):
    """Parts of a pool by name, what they change, and the report."""

    @cache
    def run(pool, *options):
        root, found = tmp_path_factory.mktemp("out"), pools(pool)
        out = ("--out", root / "out", "--json", root / "report.json", "--dtype", "float32")
        command("decompose", *found.sources, *out, "--threshold", THRESHOLD, *options)
        paths = {path.name.removesuffix(".safetensors"): path for path in (root / "out").iterdir()}
        return SimpleNamespace(
            paths=paths,
            changes={part: changes(found.kind, path) for part, path in paths.items()},
            report=json.loads((root / "report.json").read_text()),
        )

    return run


@pytest.mark.parametrize("pool", POOLS)
@folded("adapter", ["a", "b"])
def test_unique_and_shared_add_up(pools, decomposed, pool, adapter):
    parts = [decomposed(pool).changes[f"{adapter}-{part}"] for part in ("unique", "shared")]
    assert_same(total(*parts), pools(pool).changes[adapter], 1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_parts_are_those_of_the_dense_method_for_every_piece(pools, decomposed, pool):
    originals, parts = pools(pool).changes, decomposed(pool).changes
    assert originals["a"].keys() == originals["b"].keys()
    shared_somewhere = 0
    for name in originals["a"]:
        deltas = [originals[i][name] for i in "ab"]
        shared, unique, common, Z = reference.decompose(deltas, THRESHOLD, "chain")
        wanted = dict(zip(("a-unique", "b-unique", "a-shared", "b-shared", "common"),
                          (*unique, *shared, common), strict=True))  # fmt: skip
        scale = max(map(np.linalg.norm, deltas))
        for part, want in wanted.items():
            got = parts[part].get(name, 0)
            assert np.linalg.norm(got - want) <= 1e-5 * scale, (part, name)
        shared_somewhere += Z.shape[1]
    assert shared_somewhere >= len(originals["a"]) / 2


@pytest.mark.parametrize("pool", POOLS)
def test_modules_are_compared_in_the_finest_pieces(pools, decomposed, pool):
    rows = [row["module"] for row in decomposed(pool).report["modules"]]
    pieces = [piece(pools(pool).kind, row) for row in rows]
    assert len(set(pieces)) == len(pieces)
    assert set(pieces) == pools(pool).changes["a"].keys()


@pytest.mark.parametrize("pool", POOLS)
@folded("part", [*PARTS, "common"])
def test_parts_are_in_the_convention_of_the_first(pools, decomposed, pool, part):
    first, path = pools(pool).paths[0], decomposed(pool).paths[part]
    assert path.is_dir() == first.is_dir()
    ids = file_truth(path).keys()
    want = {module.replace(".text_model.", ".") for module in file_truth(first)}
    assert {module.replace(".text_model.", ".") for module in ids} == want


@pytest.mark.parametrize(
    ("pool", "format"),
    [(pool, format) for pool in POOLS for format in ("kohya", "diffusers", "peft")
     if format != "peft" or pool in DENOISER_ALONE],
)  # fmt: skip
def test_parts_in_another_format(pools, decomposed, pool, format):
    default, other = decomposed(pool), decomposed(pool, "--format", format)
    assert other.paths.keys() == {*PARTS, "common"}
    for part, path in other.paths.items():
        assert path.is_dir() == (format == "peft")
        scale = pools(pool).changes[part[0] if part != "common" else "a"]
        assert_same(other.changes[part], default.changes[part], 1e-6, scale)
        first = next(iter(file_truth(path)))
        starts = {"kohya": "lora_", "diffusers": ("transformer.", "unet.", "text_encoder")}
        assert first.startswith(starts.get(format, first))


# --- measures -----------------------------------------------------------------------------------


def dense_cosine(a, b):
    inner = sum(float((a[name] * b[name]).sum()) for name in a.keys() & b.keys())
    return inner / (norm(a) * norm(b))


def norm(found):
    return np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in found.values()))


@pytest.mark.parametrize("pool", POOLS)
def test_cosine_distance_and_overlap_are_those_of_the_dense_deltas(pools, pool):
    dense = pools(pool).changes
    a, b = (Adapter.from_pretrained(p, n) for n, p in zip("ab", pools(pool).paths, strict=True))
    assert a.norm() == pytest.approx(norm(dense["a"]), rel=1e-6)
    assert cosine(a, b) == pytest.approx(dense_cosine(dense["a"], dense["b"]), abs=1e-6)
    apart = {name: delta - dense["b"][name] for name, delta in dense["a"].items()}
    assert distance(a, b) == pytest.approx(norm(apart), rel=1e-6)
    rows = {piece(pools(pool).kind, row.module): row for row in overlap([a, b]).modules}
    assert rows.keys() == dense["a"].keys()
    for name, row in rows.items():
        bases = [reference_basis(dense[i][name]) for i in "ab"]
        cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
        assert row.ranks == tuple(basis.shape[1] for basis in bases)
        np.testing.assert_allclose(row.squared_cosines, cosines**2, atol=1e-5)


def reference_basis(delta):
    U, S, _ = np.linalg.svd(delta, full_matrices=False)
    return U[:, S > 1e-6 * S[0]]


@pytest.mark.parametrize("pool", POOLS)
def test_one_adapter_in_two_conventions_is_one_adapter(pools, tmp_path, pool):
    a = Adapter.from_pretrained(pools(pool).paths[0])
    other = convert(a, "diffusers").save_pretrained(tmp_path / "other", dtype=torch.float32)
    again = Adapter.from_pretrained(other)
    assert distance(a, again) <= 1e-6 * a.norm()
    back = convert(again, "kohya").save_pretrained(tmp_path / "back", dtype=torch.float32)
    assert_same(changes(pools(pool).kind, back), pools(pool).changes["a"], 1e-6)
