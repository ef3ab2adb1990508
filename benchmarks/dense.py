"""devec compared with the dense method of the paper, on one module.

The dense method forms ΔW and computes its SVD for each adapter, and the eigenvectors of a general
n × n matrix; at n = 4096 that takes about a minute.
"""

from __future__ import annotations

import torch

from benchmarks.pools import in_memory
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import seconds
from devec import Adapter, decompose

TEXT = """\
One module, two adapters of rank 16, float32, in memory, method chain. The dense method is that of
the paper as written (Eq. 6-13), in float64, run once. The second row is an **extrapolation** and
was not run: the time of one module times the number of modules."""
MODULES = 494


def dense_decompose(adapters: list[Adapter], threshold: float = 0.85) -> list[torch.Tensor]:
    """The dense unique parts of adapters of one module, by the paper as written (Eq. 6-13)."""
    (module,) = adapters[0].modules
    deltas = [a.modules[module] for a in adapters]
    weights = [d.scaling * d.B.double() @ d.A.double() for d in deltas]
    product = torch.eye(len(weights[0]), dtype=torch.float64)
    for weight in weights:
        U, S, _ = torch.linalg.svd(weight, full_matrices=False)
        U = U[:, S > 1e-6 * S[0]]
        product = product @ (U @ U.mT)
    values, vectors = torch.linalg.eig(product)
    chosen = vectors[:, values.real > threshold]
    Z = torch.linalg.svd(torch.cat([chosen.real, chosen.imag], 1), full_matrices=False).U
    Z = Z[:, : chosen.shape[1]]
    return [weight - Z @ (Z.mT @ weight) for weight in weights]


def section(settings: Settings) -> Section:
    """Measure one module, and extrapolate to `MODULES`."""
    torch.set_num_threads(settings.threads)
    n = 128 if settings.quick else 4096
    adapters = in_memory(2, {"module": (n, n)})
    fast = seconds(lambda: decompose(adapters), settings.times(201))
    slow = seconds(lambda: dense_decompose(adapters), 1)
    units = {"": "", "devec": "seconds", "dense": "seconds", "dense / devec": "times"}
    rows = [
        {"": what, "devec": times * fast, "dense": times * slow, "dense / devec": slow / fast}
        for what, times in (
            (f"one module {n} × {n}", 1),
            (f"{MODULES} such modules, extrapolated", MODULES),
        )
    ]
    return Section("The dense method of the paper", TEXT, [Table("k = 2", units, rows)])
