"""PEFT adapters in and out, through PEFT's own forward pass."""

import copy
import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from devec import Adapter, combine, compress, decompose, save_adapters
from support.adapters.cases import (
    HOSTS,
    VARIANTS,
    dense,
    dense_deltas,
    make_base,
    make_inputs,
    make_pool,
    relative_error,
    save_adapter,
    supports,
)
from support.truth import reference

CASES = [(k, v) for k in HOSTS for v in VARIANTS if supports(k, v)]
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # 2⁻¹¹, 2⁻⁸

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def through_peft(kind, path):
    """The change of the base model's output that an adapter directory makes, in float32."""
    inputs = make_inputs(kind)
    model = PeftModel.from_pretrained(make_base(kind), str(path))
    with torch.no_grad():
        return (model(inputs) - make_base(kind)(inputs)).double()


def through_dense(kind, deltas):
    """The same change for dense weight deltas put into the base model in float64."""
    model, base = make_base(kind).double(), make_base(kind).double()
    inputs = make_inputs(kind)
    inputs = inputs if kind == "embedding" else inputs.double()
    with torch.no_grad():
        for name, (W, b) in deltas.items():
            path, _, expert = name.partition("[")
            add_dense(model, kind, path, W, b, int(expert[:-1]) if expert else None)
        return model(inputs) - base(inputs)


def add_dense(model, kind, path, W, b, expert):
    """Put one dense delta, output side first, into the weight of a module."""
    W = torch.from_numpy(W)
    if kind == "experts":
        # the parameter declared last is wrapped outermost, so it has the plain name
        weight = getattr(model[0], "up" if path.endswith("base_layer") else "down")[expert]
        # PEFT before 0.19 takes the first axis of an expert for its input side
        weight += W if W.shape == weight.shape else W.T
        return
    module = model.get_submodule(path)
    if kind in ("conv1d-gpt2", "embedding"):
        W = W.T
    module.weight += W.reshape(module.weight.shape)
    if b is not None:
        module.bias += torch.from_numpy(b)


def load_dense(kind, path):
    """Module → (ΔW, Δb) of an adapter directory as PEFT loads it."""
    return dense_deltas(PeftModel.from_pretrained(make_base(kind), str(path)), "default")


def reference_parts(pool, threshold=0.85, method="chain"):
    """Output name → module → (ΔW, Δb) by the dense reference."""
    parts = {"common": {}}
    for module in pool["a"]:
        shared, unique, common, Z = reference.decompose(
            [pool[n][module][0] for n in pool], threshold, method
        )
        P = Z @ Z.T
        for name, S, U in zip(pool, shared, unique, strict=True):
            b = pool[name][module][1]
            parts.setdefault(f"{name}-shared", {})[module] = S, None if b is None else P @ b
            parts.setdefault(f"{name}-unique", {})[module] = U, None if b is None else b - P @ b
        if Z.shape[1]:
            norms = [np.linalg.norm(S) for S in shared]
            biases = [pool[name][module][1] for name in pool]
            b = sum(w * P @ c for w, c in zip(norms, biases, strict=True) if c is not None)
            parts["common"][module] = common, None if biases[0] is None else b / sum(norms)
    return parts


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """The paths of a pool, what is in them dense, the adapters and their parts; made once."""

    @cache
    def make(kind, variant):
        paths = make_pool(tmp_path_factory.mktemp("pool"), kind, variant)
        adapters = [Adapter.from_pretrained(p) for p in paths]
        dense = {p.name: load_dense(kind, p) for p in paths}
        return SimpleNamespace(
            paths=paths, dense=dense, adapters=adapters, parts=decompose(adapters)
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_written_parts_do_what_the_dense_reference_does(tmp_path, pools, kind, variant):
    pool = pools(kind, variant)
    want = reference_parts(pool.dense)
    effects = {name: through_dense(kind, deltas) for name, deltas in want.items()}
    for compact in (False, True):
        parts = pool.parts.outputs(compact=compact)
        outputs = {tmp_path / f"compact {compact}" / n: a for n, a in parts.items()}
        save_adapters(outputs, dtype=torch.float32)
        assert len(outputs) == (1 if variant == "zero" else 5)
        for path in outputs:
            got = through_peft(kind, path)
            assert relative_error(got, effects[path.name]) < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("kind", HOSTS)
def test_larger_pools_do_what_the_dense_reference_does(tmp_path, kind, k, method):
    paths = make_pool(tmp_path, kind, "patterns", k=k)
    pool = {p.name: load_dense(kind, p) for p in paths}
    adapters = [Adapter.from_pretrained(p) for p in paths]
    parts = decompose(adapters, threshold=0.6, method=method)
    outputs = {tmp_path / "out" / n: a for n, a in parts.outputs().items()}
    save_adapters(outputs)
    assert len(outputs) == 2 * k + 1
    want = reference_parts(pool, 0.6, method)
    for path in outputs:
        got = through_peft(kind, path)
        assert relative_error(got, through_dense(kind, want[path.name])) < 1e-5, path.name


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_shared_plus_unique_is_the_original_in_storage_precision(tmp_path, pools, kind, variant):
    pool = pools(kind, variant)
    save_adapters({tmp_path / n: a for n, a in pool.parts.outputs().items()})
    tolerance = ROUNDING[VARIANTS[variant].dtype]
    for name, whole in pool.dense.items():
        if not (tmp_path / f"{name}-unique").exists():
            continue
        unique = load_dense(kind, tmp_path / f"{name}-unique")
        shared_path = tmp_path / f"{name}-shared"
        shared = load_dense(kind, shared_path) if shared_path.exists() else None
        for module, (W, _) in whole.items():
            total = unique[module][0] + (shared[module][0] if shared else 0)
            assert relative_error(total, W) < tolerance


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_parts_keep_rank_alpha_config_keys_and_types(tmp_path, pools, kind, variant):
    paths = pools(kind, variant).paths
    pools(kind, variant).parts.unique["a"].save_pretrained(tmp_path / "unique")
    before, after = (
        load_file(p / "adapter_model.safetensors") for p in (paths[0], tmp_path / "unique")
    )
    assert before.keys() == after.keys()
    assert all(
        (before[k].dtype, before[k].shape) == (after[k].dtype, after[k].shape) for k in before
    )
    assert all(torch.equal(before[k], after[k]) for k in before if "_A" in k)
    configs = [
        json.loads((p / "adapter_config.json").read_text()) for p in (paths[0], tmp_path / "unique")
    ]
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_combinations_with_negative_weights_are_exact(tmp_path, kind, variant):
    paths = make_pool(tmp_path, kind, variant, k=3)
    adapters = [Adapter.from_pretrained(p) for p in paths]
    weights = [1.0, -0.4, 0.7]
    combine(adapters, weights).save_pretrained(tmp_path / "sum", dtype=torch.float32)
    want = 0
    for p, w in zip(paths, weights, strict=True):
        want = want + w * through_dense(kind, load_dense(kind, p))
    assert relative_error(through_peft(kind, tmp_path / "sum"), want) < 1e-5


@pytest.mark.parametrize("kind", HOSTS)
def test_compressed_adapters_are_the_best_of_their_rank(tmp_path, kind):
    path = save_adapter(tmp_path / "a", kind, "plain", 0)
    result = compress(Adapter.from_pretrained(path), rank=2)
    result.adapter.save_pretrained(tmp_path / "small")
    before, after = load_dense(kind, path), load_dense(kind, tmp_path / "small")
    for module, (W, _) in before.items():
        singular = torch.linalg.svdvals(torch.from_numpy(W))
        least = float(singular[2:].norm() / singular.norm())
        assert relative_error(after[module][0], W) == pytest.approx(least, rel=1e-5)
        assert result.errors[module] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_save_load_save_is_byte_identical(tmp_path, kind):
    paths = make_pool(tmp_path, kind, "bfloat16")
    parts = decompose([Adapter.from_pretrained(p) for p in paths])
    for name, adapter in parts.outputs(compact=True).items():
        adapter.save_pretrained(tmp_path / "one" / name)
        Adapter.from_pretrained(tmp_path / "one" / name).save_pretrained(tmp_path / "two" / name)
        for file in (tmp_path / "one" / name).iterdir():
            assert file.read_bytes() == (tmp_path / "two" / name / file.name).read_bytes()


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_several_parts_load_beside_each_other(tmp_path, kind):
    paths = make_pool(tmp_path, kind)
    parts = decompose([Adapter.from_pretrained(p) for p in paths])
    save_adapters({tmp_path / n: a for n, a in parts.outputs().items()})
    model = PeftModel.from_pretrained(
        make_base(kind), str(tmp_path / "a-unique"), adapter_name="a_unique"
    )
    for name in ("b-unique", "common"):
        result = model.load_adapter(str(tmp_path / name), adapter_name=name.replace("-", "_"))
        assert not result.unexpected_keys
    model.base_model.set_adapter(["a_unique", "b_unique", "common"])
    inputs = make_inputs(kind)
    with torch.no_grad():
        together = (model(inputs) - make_base(kind)(inputs)).double()
    want = sum(through_peft(kind, tmp_path / n) for n in ("a-unique", "b-unique", "common"))
    assert relative_error(together, want) < 1e-5


@pytest.mark.slow
def test_an_adapter_read_is_the_adapter_saved(tmp_path):
    for kind, variant in CASES:
        path = save_adapter(tmp_path / f"{kind}-{variant}", kind, variant, 0)
        adapter = Adapter.from_pretrained(path)
        for module, (W, b) in load_dense(kind, path).items():
            delta = adapter.modules[module]
            assert relative_error(dense(delta), W) < 1e-6
            if b is not None:
                assert relative_error(delta.scaling * delta.bias.double(), b) < 1e-6


def test_left_out_modules_do_not_come_back(tmp_path):
    """A module of rank 0 whose name ends like one that stays must not be adapted by it."""

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(self.inner["proj"](x))

    torch.manual_seed(0)
    base = Nested()
    path = save_adapter(
        tmp_path / "a", "linear", "plain", 0, base=copy.deepcopy(base), target_modules=["proj"]
    )
    adapter = Adapter.from_pretrained(path)
    cut = {name: delta for name, delta in adapter.modules.items() if name == "proj"}
    assert len(adapter.modules) == 2
    dataclasses.replace(adapter, modules=cut).save_pretrained(tmp_path / "cut")
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "cut"))
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["base_model.model.proj"]


def test_ranks_that_differ_are_grouped_in_anchored_patterns(tmp_path):
    paths = make_pool(tmp_path)
    adapter = Adapter.from_pretrained(paths[0])
    result = compress(adapter, energy=0.8).adapter
    mixed = {
        "first.layer": compress(adapter, rank=2).adapter.modules["first.layer"],
        "second.layer": compress(adapter, rank=5).adapter.modules["second.layer"],
    }
    dataclasses.replace(result, modules=mixed).save_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^(?:second\.layer)": 5}
    assert config["target_modules"] == ["first.layer", "second.layer"]
    want = {n: (dense(d), None) for n, d in mixed.items()}
    assert (
        relative_error(through_peft("linear", tmp_path / "mixed"), through_dense("linear", want))
        < 1e-5
    )
