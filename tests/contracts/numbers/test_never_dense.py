"""No tensor of a module's dense shape is ever formed from factors (a watch on every operation)."""

import pytest
import torch

from devec import (
    Adapter,
    Delta,
    as_lora,
    combine,
    compress,
    cosine,
    decompose,
    distance,
    overlap,
    save_adapters,
)
from devec.deltas.base_weight import HeldWeight
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Magnitude
from support.adapters.cases import make_pool
from support.checks.never_dense import DenseTensorFormedError, Watch

OUT, IN = 97, 83


def pool(k, bias=False):
    adapters = []
    for i in range(k):
        r = 5 + i
        b = torch.randn(OUT) if bias else None
        B = torch.randn(OUT, r)
        B[:, :2] = torch.ones(OUT, 2).cumsum(0).cumprod(1) / OUT + 0.01 * B[:, :2]
        adapters.append(Adapter("abcde"[i], {"q": Delta(B, torch.randn(r, IN), 0.5, b)}))
    return adapters


OPERATIONS = {
    **{
        f"decompose {method} {k} {threshold}": (
            lambda m=method, k=k, t=threshold: decompose(pool(k), method=m, threshold=t).outputs()
        )
        for method in ("chain", "mean")
        for k in (2, 3)
        for threshold in (0.3, "auto")
    },
    "principal": lambda: decompose(pool(2), method="principal"),
    "pairwise": lambda: decompose(pool(3), scope="pairwise", threshold=0.3),
    "iterative": lambda: decompose(pool(3), scope="iterative", target="b", threshold=0.3),
    "compact": lambda: decompose(pool(2), threshold=0.3).outputs(compact=True),
    "bias": lambda: decompose(pool(2, bias=True), threshold=0.3),
    "combine": lambda: combine(pool(3), [1, -0.4, 2.0]),
    "operators": lambda: (lambda a, b: -(a / 2 - b * 3 + a))(*pool(2)),
    "compress": lambda: compress(pool(1)[0], rank=2),
    "overlap": lambda: overlap(pool(3)),
    "measures": lambda: (lambda a, b: (cosine(a, b), distance(a, b), a == b, a.norm()))(*pool(2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_dense_delta_is_formed(name):
    with Watch(OUT * IN):
        OPERATIONS[name]()


def doras(k, axis="out"):
    """A pool of DoRAs, and the base weight they share."""
    W = torch.randn(2 * OUT, IN)  # more rows than are ever formed at once
    adapters, base = [], HeldWeight(W)
    for i in range(k):
        B = torch.cat([torch.eye(2 * OUT, 2), torch.randn(2 * OUT, 2)], dim=1)
        m = torch.rand(2 * OUT if axis == "out" else IN) + W.norm(dim=1 if axis == "out" else 0)
        gain = Magnitude(m, axis, base)
        delta = Delta(B, torch.randn(4, IN), 0.1, gain=gain)
        adapters.append(Adapter("abcde"[i], {"q": delta}))
    return adapters, W


DORA_OPERATIONS = {
    "decompose": lambda pool: decompose(pool, threshold=0.3).outputs(),
    "iterative": lambda pool: decompose(pool, scope="iterative", target="b", threshold=0.3),
    "compact": lambda pool: decompose(pool[:2], threshold=0.3).outputs(compact=True),
    "combine": lambda pool: combine(pool, [1, -0.4, 2.0]).norm(),
    "compress": lambda pool: compress(pool[0], rank=2),
    "overlap": overlap,
    "measures": lambda pool: (cosine(*pool[:2]), distance(*pool[:2]), pool[0] == pool[1]),
    "as_lora": lambda pool: as_lora(pool[0] - pool[1], rank=5),
    "written": lambda pool: as_magnitudes(
        (pool[0] - 0.3 * pool[1]).modules["q"],
        pool[0].modules["q"].gain.axis,
        pool[0].modules["q"].gain.base,
    ),
}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", DORA_OPERATIONS)
def test_of_a_dora_only_the_base_weight_is_dense(name, axis):
    adapters, W = doras(3, axis)
    with Watch(2 * OUT * IN, W):
        DORA_OPERATIONS[name](adapters)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_dense_delta_is_formed_from_files_to_files(tmp_path, kind):
    adapters = [Adapter.from_pretrained(p) for p in make_pool(tmp_path, kind)]
    smallest = min(a * b for a, b in (d.shape for d in adapters[0].modules.values()))
    with Watch(smallest):
        parts = decompose(adapters)
        save_adapters({tmp_path / n: a for n, a in parts.outputs(compact=True).items()})


def test_the_watch_sees_a_dense_product():
    B, A = torch.randn(OUT, 3), torch.randn(3, IN)
    with pytest.raises(DenseTensorFormedError), Watch(OUT * IN):
        B @ A
    W = torch.randn(OUT, IN)
    with pytest.raises(DenseTensorFormedError), Watch(OUT * IN, W):
        W * 2
