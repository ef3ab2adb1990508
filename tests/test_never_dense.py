"""No tensor of a module's dense shape is ever formed from factors (a watch on every operation)."""

import pytest
import torch
from cases import make_pool
from torch.utils._python_dispatch import TorchDispatchMode

from devec import (
    Adapter,
    Delta,
    combine,
    compress,
    cosine,
    decompose,
    distance,
    overlap,
    save_adapters,
)

OUT, IN = 97, 83


class DenseTensorFormedError(AssertionError):
    """A tensor as large as the weight itself came out of an operation."""


class Watch(TorchDispatchMode):
    """Fails on any operation whose result could hold a dense delta."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.dense:
                raise DenseTensorFormedError(f"{func} gave {tuple(tensor.shape)}")
        return result


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
