"""`devec decompose A.safetensors B.safetensors --out out`, for every convention."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.folding import folded
from support.pools.golden_pool import (
    PRODUCTS,
    READABLE,
    REWRITTEN,
    assert_close_deltas,
    command,
    expected_keys,
    factors,
    golden,
    largest_factors,
    scale_keys,
    sibling,
    stored,
    summed,
)
from support.truth import reference
from support.truth.golden_truth import bias_truth, carried, dense_truth

# The readers apply it too weakly, and so does the truth.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
]

PARTS = ["a-shared", "a-unique", "b-shared", "b-unique", "common"]
THRESHOLD = 0.85
FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory):
    """Decomposes the pool of a golden file: its paths, what was printed, and the files by name."""

    @cache
    def run(name, *options):
        root = tmp_path_factory.mktemp(name)
        paths = {"a": root / "a.safetensors", "b": sibling(name, root / "b.safetensors")}
        paths["a"].write_bytes(golden(name).read_bytes())
        arguments = (*paths.values(), "--out", root / "out", "--threshold", THRESHOLD)
        printed = command("decompose", *arguments, *options)
        files = {path.stem: path for path in sorted((root / "out").iterdir())}
        return SimpleNamespace(inputs=paths, printed=printed, files=files, out=root / "out")

    return run


@pytest.mark.parametrize("name", READABLE)
def test_files_are_written_under_the_names_of_their_inputs(decomposed, name):
    ran = decomposed(name)
    assert list(ran.files) == PARTS
    assert all(path.suffix == ".safetensors" for path in ran.files.values())
    assert f"Written: {', '.join(str(ran.files[part]) for part in PARTS)}\n" in ran.printed


@pytest.mark.parametrize("name", READABLE)
@folded("adapter", ["a", "b"])
def test_unique_and_shared_add_up_in_float32(decomposed, name, adapter):
    ran = decomposed(name, *FLOAT32)
    parts = [dense_truth(ran.files[f"{adapter}-{part}"]) for part in ("unique", "shared")]
    assert_close_deltas(summed(*parts), dense_truth(ran.inputs[adapter]), 1e-6)
    biases = [bias_truth(ran.files[f"{adapter}-{part}"]) for part in ("unique", "shared")]
    assert_close_deltas(summed(*biases), bias_truth(ran.inputs[adapter]), 1e-6)


@pytest.mark.parametrize("name", READABLE)
@folded("adapter", ["a", "b"])
def test_unique_and_shared_add_up_as_stored(decomposed, name, adapter):
    """B is rounded once to the type of the input, and of a rewritten product so is A."""
    ran = decomposed(name)
    files = [ran.files[f"{adapter}-{part}"] for part in ("unique", "shared")]
    got, want = summed(*map(dense_truth, files)), dense_truth(ran.inputs[adapter])
    assert got.keys() == want.keys()
    types = expected_keys(name).values()
    rounding = max(torch.finfo(dtype).eps / 2 for dtype in types)
    rounding *= 2 if name in REWRITTEN else 1
    sizes = summed(*map(largest_factors, files))
    for module, delta in want.items():
        error = np.linalg.norm(got[module] - delta)
        bound = 1.01 * rounding * sizes[module] + 1e-6 * np.linalg.norm(delta)
        assert error <= bound, module


@pytest.mark.parametrize("name", READABLE)
def test_parts_are_those_of_the_dense_method(decomposed, name):
    ran = decomposed(name, *FLOAT32)
    truths = [dense_truth(ran.inputs[adapter]) for adapter in ("a", "b")]
    parts = {part: dense_truth(path) for part, path in ran.files.items()}
    for module in truths[0]:
        deltas = [truth[module] for truth in truths]
        shared, unique, common, _ = reference.decompose(deltas, THRESHOLD, "chain")
        wanted = dict(zip(PARTS, (shared[0], unique[0], shared[1], unique[1], common), strict=True))
        scale = max(map(np.linalg.norm, deltas))
        for part, want in wanted.items():
            got = parts[part].get(module, 0)
            assert np.linalg.norm(got - want) <= 1e-5 * scale, (part, module)
        assert np.linalg.norm(common) > 0.01 * scale, "the pool should share something"


@pytest.mark.parametrize("name", READABLE)
def test_what_is_carried_goes_to_the_unique_part_and_is_named(decomposed, name):
    ran = decomposed(name)
    for adapter, path in ran.inputs.items():
        keys, (original, _) = carried(path), stored(path)
        unique, _ = stored(ran.files[f"{adapter}-unique"])
        assert carried(ran.files[f"{adapter}-unique"]) == keys
        assert carried(ran.files[f"{adapter}-shared"]) == []
        for key in keys:
            torch.testing.assert_close(unique[key], original[key], rtol=0, atol=0)
        line = f"Carried over whole to {adapter}-unique (not a delta): {', '.join(keys)}\n"
        assert (line in ran.printed) == bool(keys)
    assert carried(ran.files["common"]) == []


@pytest.mark.parametrize("name", READABLE)
@folded("part", PARTS)
def test_outputs_keep_the_keys_and_types_of_the_input(decomposed, name, part):
    path = decomposed(name).files[part]
    tensors, _ = stored(path)
    left_out = {*scale_keys(path), *carried(path)}
    types = {key: tensor.dtype for key, tensor in tensors.items() if key not in left_out}
    assert types == expected_keys(name)
    has_alpha = bool(scale_keys(golden(name))) or name in PRODUCTS
    assert scale_keys(path) == {f"{m}.alpha" for m in dense_truth(path) if has_alpha}
    originals, _ = stored(golden(name))
    for key, tensor in tensors.items():
        if key in originals and name not in REWRITTEN:
            assert tensor.ndim == originals[key].ndim, key
        if name in REWRITTEN and ".lora_" in key:
            kernel = (3, 3) if "conv1" in key else (1, 1) if "proj_in" in key else ()
            assert tensor.shape[2:] == (kernel if "down" in key else (1,) * len(kernel)), key


@pytest.mark.parametrize("name", READABLE)
@folded("part", PARTS)
def test_compact_parts_have_their_true_ranks(decomposed, name, part):
    ran, whole = decomposed(name, "--compact", *FLOAT32), decomposed(name, *FLOAT32)
    truth, kept = dense_truth(whole.files[part]), dense_truth(ran.files[part])
    ranks = {module: B.shape[1] for module, (_, B, _) in factors(ran.files[part]).items()}
    owners = [dense_truth(ran.inputs[o]) for o in ("ab" if part == "common" else part[0])]
    for module, delta in truth.items():
        scale = min(np.linalg.norm(owner[module]) for owner in owners)
        rank = np.linalg.matrix_rank(delta, tol=1e-6 * scale)
        assert ranks.get(module, 0) == rank, module
        error = np.linalg.norm(kept.get(module, 0) - delta)
        assert error <= 1e-6 * scale * np.sqrt(min(delta.shape)), module
