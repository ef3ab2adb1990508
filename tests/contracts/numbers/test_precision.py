"""Every product of factors or base weights has its own precision, whatever a model is allowed."""

import ast
import inspect
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import devec
from devec import Adapter, Delta
from devec.deltas.base_weight import HeldWeight
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Magnitude
from devec.linalg.hadamard_kronecker import hadamard_product, kronecker_product
from devec.linalg.precision import full_precision
from support.adapters.cases import fill, make_base, make_pool
from support.patience import patience

ROOT = Path(devec.__file__).parent
SHAPE = (192, 160)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W0 = normal(*SHAPE, seed=0) / 12
BASE = HeldWeight(W0, "base")


def lora(name, seed):
    """A LoRA of two modules; two directions are those of all others, nearly."""
    modules = {}
    for module in ("x", "y"):
        B = normal(SHAPE[0], 8, seed=seed)
        B[:, :2] = normal(SHAPE[0], 2, seed=99) + 0.1 * B[:, :2]
        modules[module] = Delta(B, normal(8, SHAPE[1], seed=seed + 1) / 12, 0.5)
    return Adapter(name, modules)


def dora(name, seed, axis="out"):
    B, A = normal(SHAPE[0], 4, seed=seed) / 8, normal(4, SHAPE[1], seed=seed + 1) / 12
    m = (W0 + B @ A).norm(dim=1 if axis == "out" else 0)
    m = m * (1 + 0.1 * normal(len(m), seed=seed + 2))
    return Adapter(name, {"x": Delta(B, A, 1.0, None, Magnitude(m, axis, BASE))})


a, b, c = lora("a", 1), lora("b", 11), lora("c", 21)
d, e = dora("d", 31), dora("e", 41)
h = dora("h", 51, axis="in")
x, y, g = a.modules["x"], b.modules["x"], d.modules["x"]
Z = torch.linalg.qr(normal(SHAPE[0], 3, seed=5)).Q

# Everything public that computes, by its name.
CALLS = {
    "Adapter.__add__": lambda: (a + b, d + e, d + a, d + h),
    "Adapter.__sub__": lambda: (a - b, d - e),
    "Adapter.__mul__": lambda: (a * 0.3, d * 0.3),
    "Adapter.__rmul__": lambda: 0.3 * d,
    "Adapter.__truediv__": lambda: d / 3,
    "Adapter.__neg__": lambda: -d,
    "Adapter.__eq__": lambda: (a == (a / 3) * 3, d == (d / 3) * 3),
    "Adapter.norm": lambda: (a.norm(), d.norm(), (d - e).norm(), h.norm()),
    "Delta.__add__": lambda: (x + y, g + x),
    "Delta.__sub__": lambda: (x - y, g - x),
    "Delta.__mul__": lambda: g * 0.3,
    "Delta.__rmul__": lambda: 0.3 * g,
    "Delta.__truediv__": lambda: g / 3,
    "Delta.__neg__": lambda: -g,
    "Delta.resolved": lambda: (g.resolved(), h.modules["x"].resolved()),
    "Delta.low_rank": lambda: g.low_rank,
    "Delta.folded": lambda: x.folded(),
    "Delta.inner": lambda: (x.inner(y), g.inner(x), g.inner(h.modules["x"])),
    "Delta.norm": lambda: g.norm(),
    "Delta.weight_norm": lambda: g.resolved().weight_norm(),
    "Delta.bias_norm": lambda: Delta(x.B, x.A, 1.0, x.B[:, 0]).bias_norm(),
    "Delta.column_space": lambda: list(x.column_space()),
    "Delta.factor_norm": lambda: g.factor_norm(),
    "Delta.projected": lambda: (x.projected(Z), g.projected(Z)),
    "Delta.coordinates": lambda: (x.coordinates(Z), g.coordinates(Z)),
    "Delta.without": lambda: (x.without(x.projected(Z)), g.without(g.projected(Z))),
    "Delta.change": lambda: (
        g.resolved().change() @ normal(SHAPE[1], 3, seed=6),
        g.resolved().change().adjoint(Z),
        g.resolved().change().norm(),
        g.resolved().change().distance(x.B, x.A),
    ),
    "Decomposition.outputs": lambda: devec.decompose([a, b], threshold=0.3).outputs(compact=True),
    "as_lora": lambda: devec.as_lora(d, 3),
    "combine": lambda: devec.combine([d, e, a], [1.0, -0.4, 0.2]),
    "compress": lambda: (devec.compress(a, rank=3), devec.compress(d, energy=0.9)),
    "cosine": lambda: (devec.cosine(a, b), devec.cosine(d, e)),
    "decompose": lambda: [
        devec.decompose(pool, threshold=0.3, **options)
        for pool in ([a, b, c], [a, d, e])
        for options in ({}, {"method": "mean"}, {"scope": "iterative", "target": "a"})
    ],
    "distance": lambda: (devec.distance(a, b), devec.distance(d, e)),
    "inner": lambda: (devec.inner(a, b), devec.inner(d, e), devec.inner(d, h)),
    "overlap": lambda: devec.overlap([a, d, e]),
}

# What computes nothing, or is covered by the tests of files and hosts below.
ELSEWHERE = {
    "Adapter.from_pretrained", "Adapter.label", "Adapter.loaded",
    "Adapter.map", "Adapter.output_path", "Adapter.plan", "Adapter.push_to_hub",
    "Adapter.save_pretrained", "Adapter.to", "Adapter.unlike",
    "Adapter.writer", "Decomposition.each_output", "Decomposition.nothing_shared",
    "Decomposition.spectrum", "Delta.dtype", "Delta.each", "Delta.on", "Delta.outline",
    "Delta.rank", "Delta.same_as", "Delta.shape", "Delta.to", "add_adapter", "combine_adapters",
    "convert", "decompose_adapters", "decompose_to", "extract_adapter", "negate_adapter",
    "save_adapters",
}  # fmt: skip
_OPERATORS = ("__add__", "__sub__", "__mul__", "__rmul__", "__truediv__", "__neg__", "__eq__")


def members(value):
    """Members of a class, its own and inherited from devec."""
    for home in value.__mro__:
        if home.__module__.startswith("devec"):
            yield from vars(home).items()


def public_names():
    """Public functions, and public methods and operators of the classes with operations."""
    for name in devec.__all__:
        value = getattr(devec, name)
        if inspect.isfunction(value):
            yield name
        if value in (Adapter, Delta, devec.Decomposition):
            for own, member in members(value):
                public = own in _OPERATORS or not own.startswith("_")
                if public and (callable(member) or isinstance(member, property | classmethod)):
                    yield f"{name}.{own}"


def test_all_of_the_public_interface_is_covered():
    names = set(public_names()) - {"Delta.__eq__"}
    assert names == CALLS.keys() | ELSEWHERE


def numbers(value):
    """All numbers of a result, as tensors and floats."""
    if isinstance(value, torch.Tensor | float | int | bool):
        return [value]
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, Delta):
        tensors = []
        value.each(lambda tensor: tensors.append(tensor) or tensor)
        return [*tensors, value.scaling]
    if isinstance(value, Adapter):
        return numbers(dict(value.modules))
    if isinstance(value, devec.Compression):
        return numbers([value.adapter, value.error])
    if isinstance(value, devec.Overlap):
        return numbers([[r.squared_cosines, r.inner] for r in value.modules])
    assert isinstance(value, devec.Decomposition), type(value)
    return numbers([value.unique, value.shared, value.common or {}, value.spectrum])


def require_same(got, want):
    got, want = numbers(got), numbers(want)
    assert len(got) == len(want) > 0
    for one, two in zip(got, want, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


@pytest.fixture
def allowed():
    """Set what float32 may be multiplied in; it is as before afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def products(monkeypatch):
    """For every product of matrices, in any thread: the setting, and whether autocast is on."""
    seen = []

    def spied(original):
        def product(*args, **kwargs):
            setting = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
            seen.append(setting)
            return original(*args, **kwargs)

        return product

    for home, names in (
        (torch.Tensor, ("__matmul__", "addmm_")),
        (torch, ("matmul", "einsum")),
    ):
        for name in names:
            monkeypatch.setattr(home, name, spied(getattr(home, name)))
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_bit(name, products):
    want = CALLS[name]()
    products.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CALLS[name]()
        assert torch.is_autocast_enabled("cpu")
    require_same(got, want)
    assert not any(autocast for _, autocast in products)


@pytest.mark.parametrize("name", CALLS)
def test_reduced_precision_of_float32_changes_no_bit(name, products, allowed):
    want = CALLS[name]()
    products.clear()
    allowed("medium")
    got = CALLS[name]()
    assert torch.get_float32_matmul_precision() == "medium"
    require_same(got, want)
    assert {setting for setting, _ in products} <= {"highest"}


def test_the_spy_sees_products(products):
    """Where it saw none, the tests above could not fail."""
    for name in ("decompose", "combine", "inner", "overlap", "compress"):
        products.clear()
        CALLS[name]()
        assert products, name


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_files_and_lazy_sums_are_the_same_under_autocast(tmp_path, kind, allowed):
    """Sums of lazy adapters are computed when they are written."""
    paths = make_pool(tmp_path / "pool", kind)

    def write(out):
        adapters = [Adapter.from_pretrained(path, lazy=True) for path in paths]
        devec.combine(adapters, [1.0, -0.4]).save_pretrained(out / "sum")
        parts = devec.decompose(adapters, threshold=0.3).outputs(compact=True)
        devec.save_adapters({out / name: part for name, part in parts.items()})
        devec.convert(adapters[0], "peft").save_pretrained(out / "converted")
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*.safetensors"))
        }

    want = write(tmp_path / "plain")
    allowed("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert write(tmp_path / "autocast") == want
    assert len(want) > 3


def in_a_live_model():
    """All that is done with the adapters of a model, and what it holds afterwards."""
    model = get_peft_model(make_base("linear"), LoraConfig(target_modules=["layer"], r=4), "a")
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=3))
    for index, name in enumerate("ab"):
        fill(model, name, seed=index)
    devec.decompose_adapters(model, ["a", "b"], threshold=0.3, compact=True)
    devec.combine_adapters(model, ["a", "b"], [1.0, -0.4], "sum")
    devec.negate_adapter(model, "a")
    devec.add_adapter(model, devec.extract_adapter(model, "sum"), "again")
    return {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}


def test_live_models_hold_the_same_under_autocast(allowed):
    want = in_a_live_model()
    allowed("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        require_same(in_a_live_model(), want)
    assert any("common" in name for name in want)


@pytest.mark.parametrize("max_rank", [64, 4])
def test_loha_and_lokr_are_rewritten_the_same_under_autocast(allowed, max_rank):
    factors = [normal(*s, seed=i) for i, s in enumerate([(96, 4), (4, 80), (96, 4), (4, 80)])]

    def rewritten():
        products = (
            hadamard_product(*factors, max_rank),
            kronecker_product(factors[0][:8], (factors[2], factors[3]), max_rank),
        )
        return [[found.B, found.A, found.error] for found in products]

    want = rewritten()
    allowed("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        require_same(rewritten(), want)


def test_doras_are_written_the_same_under_autocast(allowed):
    want = as_magnitudes((d + e).modules["x"], "out", BASE)
    allowed("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        require_same(as_magnitudes((d + e).modules["x"], "out", BASE), want)


# --- the setting is that of the process -----------------------------------------------------------


def test_the_first_thread_to_end_does_not_take_it_from_the_others(allowed):
    allowed("high")
    first_is_inside, may_leave, seen = threading.Event(), threading.Event(), []

    @full_precision
    def first():
        first_is_inside.set()
        may_leave.wait(patience())

    @full_precision
    def second(thread):
        may_leave.set()
        thread.join(patience())
        seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_inside.wait(patience())
    second(thread)
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"


def test_a_setting_that_the_caller_makes_meanwhile_stays(allowed):
    allowed("high")
    full_precision(lambda: torch.set_float32_matmul_precision("medium"))()
    assert torch.get_float32_matmul_precision() == "medium"


def test_errors_leave_the_settings_as_they_were(allowed):
    allowed("high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                full_precision(lambda: 1 / 0)()
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.is_autocast_enabled("cpu")


# --- nothing is forgotten -------------------------------------------------------------------------

_PRODUCTS = {"matmul", "einsum", "addmm", "addmm_", "bmm", "baddbmm", "mm", "svd", "qr", "eigh"}


def multiplies(function):
    """Whether the body of a function has a product of matrices, or a decomposition."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _PRODUCTS:
            return True
    return False


def public_functions(tree):
    """Functions that may be called from elsewhere; generators run in what consumes them."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        if isinstance(node, ast.FunctionDef):
            name = node.name
            hidden = name.startswith("_") and not name.startswith("__")
            yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(node))
            if not hidden and not yields:
                yield node


def test_every_public_function_that_multiplies_does_so_in_full_precision():
    found, lacking = 0, []
    for path in sorted(ROOT.rglob("*.py")):
        if "demo" in path.relative_to(ROOT).parts:
            continue
        for function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
            if multiplies(function):
                found += 1
                marks = {getattr(mark, "id", "") for mark in function.decorator_list}
                if "full_precision" not in marks:
                    lacking.append(f"{path.name}: {function.name}")
    assert found > 20
    assert lacking == []
