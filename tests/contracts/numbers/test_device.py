"""On a GPU, where there is one, the same is found as on the CPU."""

import pytest
import torch
from safetensors.torch import load_file

from devec import Adapter, Delta, decompose
from devec.linalg.batched import column_bases
from support.adapters.cases import make_pool, relative_error, save_kohya
from support.checks.streamed import from_files, from_files_to_files, stored, tree

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

AVAILABLE = {
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
}
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"there is no {name}"))
    for name, there in AVAILABLE.items()
]
TOLERANCE = 1e-4  # of float32; tensor cores are not used unless they are asked for

OPTIONS = {
    "chain": {},
    "mean": {"method": "mean"},
    "auto": {"threshold": "auto"},
    "pairwise": {"scope": "pairwise", "method": "principal"},
    "iterative": {"scope": "iterative", "target": "b"},
}


def pool(k=3, n=200, rank=8, modules=5, dtype=torch.float32):
    """Adapters in memory with modules of one shape, one of which is of a low rank in one."""
    adapters = []
    for index in range(k):
        own = torch.Generator().manual_seed(index)
        deltas = {}
        for module in range(modules):
            common = torch.Generator().manual_seed(100 + module)
            B = torch.randn(n, rank, generator=own)
            B[:, :2] = torch.randn(n, 2, generator=common) + 0.1 * B[:, :2]
            if (index, module) == (1, 3):
                B[:, 5] = B[:, 4]
            A = torch.randn(rank, 90, generator=own)
            deltas[f"m{module}"] = Delta(B.to(dtype), A.to(dtype), 0.5 + index)
        adapters.append(Adapter("abc"[index], deltas))
    return adapters


def effect(delta):
    return delta.scaling * delta.B.double() @ delta.A.double()


def assert_close_adapters(got, want):
    assert got.modules.keys() == want.modules.keys()
    for module, delta in want.modules.items():
        assert got.modules[module].B.device.type == "cpu"
        assert relative_error(effect(got.modules[module]), effect(delta)) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_parts_are_those_of_the_cpu(device, dtype, name):
    adapters = pool(dtype=dtype)
    got, want = (decompose(adapters, device=d, **OPTIONS[name]) for d in (device, None))
    for one, two in zip(got.splits, want.splits, strict=True):
        assert (one.module, one.group, one.ranks) == (two.module, two.group, two.ranks)
        assert one.shared_rank == two.shared_rank
        torch.testing.assert_close(
            one.spectrum.double(), two.spectrum.double(), rtol=TOLERANCE, atol=TOLERANCE
        )
    for kind in ("unique", "shared"):
        found, wanted = getattr(got, kind), getattr(want, kind)
        assert found.keys() == wanted.keys()
        for adapter in wanted:
            assert_close_adapters(found[adapter], wanted[adapter])
    if want.common is not None:
        assert_close_adapters(got.common, want.common)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    kohya = [save_kohya(root / f"{name}.safetensors", index) for index, name in enumerate("ab")]
    return {"kohya": kohya, "peft": make_pool(root / "peft", "conv2d")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_files_are_those_of_the_cpu(tmp_path, files, device, kind):
    paths = files[kind]
    for name in (device, None):
        from_files_to_files(tmp_path / str(name), paths, device=name)
    got, want = tree(tmp_path / device), tree(tmp_path / "None")
    assert got.keys() == want.keys()
    for name, path in want.items():
        if not name.endswith(".safetensors"):
            assert got[name].read_text() == path.read_text()
            continue
        (tensors, strings), (wanted, same) = stored(got[name]), stored(path)
        assert strings == same
        assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {
            k: (t.dtype, t.shape) for k, t in wanted.items()
        }
    labels = {name.partition("/")[0] for name in want}
    for label in labels:  # the factors of common vectors are of one sign or the other
        one, two = (Adapter.from_pretrained(tmp_path / d / label) for d in (device, "None"))
        assert_close_adapters(one, two)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_change_is_copied_bit_by_bit(tmp_path, files, device):
    written = from_files_to_files(tmp_path / "out", files["kohya"], device=device)
    original, part = (load_file(p) for p in (files["kohya"][0], written.written["a-unique"]))
    same = [key for key in original if ".lora_down." in key]
    assert same
    assert all(torch.equal(original[key], part[key]) for key in same)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_that_lie_on_a_device_stay_there(files, device):
    adapters = [adapter.to(device) for adapter in from_files(files["kohya"], lazy=False)]
    got, want = decompose(adapters), decompose(from_files(files["kohya"], lazy=False))
    assert {d.B.device.type for d in got.unique["a"].modules.values()} == {device}
    assert_close_adapters(got.common.to("cpu"), want.common)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [4096, 11008])
def test_wide_factors_are_sound_and_their_bases_orthonormal(device, n):
    B, A = (torch.randn(3, *shape, device=device) for shape in ((n, 256), (256, 4096)))
    found = column_bases(B, A)
    assert found.sound.all()
    U = found.U.cpu().double()
    assert (U.mT @ U - torch.eye(256)).abs().max() < 1e-6
    norms = torch.linalg.matrix_norm(torch.linalg.qr(B.cpu().double()).R @ A.cpu().double())
    torch.testing.assert_close(found.norms.cpu().double(), norms, rtol=1e-5, atol=0)


@pytest.mark.skipif(not AVAILABLE["cuda"], reason="there is no cuda")
def test_parts_on_the_host_are_in_memory_of_their_own_that_is_not_pinned():
    got = decompose(pool(), device="cuda")
    for part in (*got.unique.values(), *got.shared.values(), got.common):
        for delta in part.modules.values():
            assert not delta.B.is_pinned()
            assert delta.B.untyped_storage().nbytes() == delta.B.nbytes


@pytest.mark.parametrize("device", DEVICES)
def test_parts_on_a_device_are_complete_when_they_are_given(device):
    adapters = [adapter.to(device) for adapter in pool(n=3000, rank=64, modules=40)]
    for _ in range(3):
        got = decompose(adapters)
        for adapter in adapters:
            for module, delta in adapter.modules.items():
                parts = (got.unique[adapter.name], got.shared[adapter.name])
                total = sum(effect(part.modules[module]) for part in parts)
                assert relative_error(total.cpu(), effect(delta).cpu()) < TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cpu_named_as_a_device_gives_the_same(name):
    adapters = pool()
    got, want = (decompose(adapters, device=d, **OPTIONS[name]) for d in ("cpu", None))
    for adapter, part in {**want.unique, **want.shared}.items():
        found = {**got.unique, **got.shared}[adapter]
        assert all(delta.same_as(part.modules[m]) for m, delta in found.modules.items())
