"""DoRAs drawn at random, with their dense truth."""

import numpy as np
import torch

from devec import Adapter, Delta
from devec.deltas.base_weight import HeldWeight
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Gain, Magnitude
from support.truth.reference import dora_truth

OUT, IN = 40, 36


class Module:
    """A module with random weights, and random changes of it with their truth."""

    def __init__(self, seed=0, out=OUT, columns=IN):
        self.rng = np.random.default_rng(seed)
        self.W = self.rng.standard_normal((out, columns))
        self.base = HeldWeight(torch.from_numpy(self.W))
        self.common = self.rng.standard_normal((out, 2))

    def factors(self, rank):
        """Factors whose first two columns are nearly those of every other change."""
        B = 0.4 * self.rng.standard_normal((len(self.W), rank))
        B[:, :2] = 0.1 * B[:, :2] + self.common[:, : min(rank, 2)]
        return B, 0.3 * self.rng.standard_normal((rank, self.W.shape[1]))

    def lora(self, rank=3, dtype=torch.float64):
        B, A = self.factors(rank)
        return Delta(torch.from_numpy(B).to(dtype), torch.from_numpy(A).to(dtype), 0.7), 0.7 * B @ A

    def dora(self, rank=4, axis="out", group=1, dtype=torch.float64):
        B, A = self.factors(rank)
        squares = (self.W**2).sum(1 if axis == "out" else 0).reshape(-1, group).sum(1)
        m = np.sqrt(squares) * (1 + 0.2 * self.rng.standard_normal(len(squares)))
        stored = [torch.from_numpy(t).to(dtype) for t in (B, A, m)]
        # what is stored is the truth, whatever its precision
        B, A, m = (t.double().numpy() for t in stored)
        magnitude = Magnitude(stored[2], axis, self.base)
        truth = dora_truth(self.W, B, A, 0.5, m, axis, group)
        return Delta(stored[0], stored[1], 0.5, gain=magnitude), truth

    def dense(self, delta):
        """ΔW = s·B·A + diag(g)·W0 + W0·diag(h), as the class says it."""
        delta = delta.resolved()
        change = delta.scaling * (delta.B.double() @ delta.A.double()).numpy()
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        if "out" in axes:
            change = change + axes["out"].values.double().numpy()[:, None] * self.W
        if "in" in axes:
            change = change + self.W * axes["in"].values.double().numpy()
        return change

    def written(self, delta, axis, group=1):
        """ΔW that a host makes of what is written: one DoRA, by its definition."""
        stored = as_magnitudes(delta, axis, self.base, group)
        B, A, m = (t.double().numpy() for t in (stored.B, stored.A, stored.gain.values))
        return dora_truth(self.W, B, A, stored.scaling, m, axis, group)


def apart(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def low_rank(delta):
    delta = delta.resolved()
    return delta.scaling * (delta.B.double() @ delta.A.double()).numpy()


def pool(axes=("out", "lora", "in"), dtype=torch.float64, seed=0):
    """Adapters of one module that share two directions nearly, and their truths."""
    module, adapters, truths = Module(seed), [], []
    for name, axis in zip("abcde", axes, strict=False):
        delta, truth = (
            module.lora(4, dtype) if axis == "lora" else module.dora(4, axis, dtype=dtype)
        )
        adapters.append(Adapter(name, {"m": delta}))
        truths.append(truth)
    return module, adapters, truths


def dense_change(delta):
    """ΔW of a delta with gains, in float64."""
    delta = delta.resolved()
    W = delta.gain.base.read(torch.float64, torch.device("cpu"))
    change = delta.scaling * delta.B.double() @ delta.A.double()
    axes = delta.gain.axes
    if "out" in axes:
        change = change + axes["out"].values.double()[:, None] * W
    if "in" in axes:
        change = change + W * axes["in"].values.double()
    return change.numpy()
