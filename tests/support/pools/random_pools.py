"""Pools of adapters in memory, drawn from a seed, each change of a weight with its dense truth."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from devec import Adapter, Delta
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Gain, Magnitude

NAMES = "abcde"
MODULES = ("layers.0.q", "layers.0.mlp.up", "layers.1.q", "body.out")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (1, 2, 3, 5, 8, 16, 24, 40, 48, 64)
SHAPES = ((1, 1), (3, 40), (40, 3), (64, 48), (1, 12), (12, 1))

# Rounding of the working precisions: float32 unless a factor is float64, and where float64 differs
# from float32 in nothing but this.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}

# Singular values below this fraction of the largest are rounding (design, 2.2).
RANK_RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to one module, dense and in float64.

    Attributes:
        W: ΔW, gains included.
        low: The part of it that is a product of factors, whose column space decides.
        bias: Δb, or None.
        lengths: Σ_j |s|·‖b_j‖·‖a_j‖ over the columns, what rounding of the factors is relative to.
            It does not depend on how columns are scaled, and exceeds ‖s·B·A‖ where they cancel.
        off: How far rounding in the working precision may move ΔW: that of the columns, and of a
            DoRA ‖D·W0‖, since D is known to rounding.
        factors: |s|·‖B‖·‖A‖ and ‖(D-1)·W0‖, what equality of adapters is relative to.
        bias_off: How far it may move Δb.
        dtype: The working precision.
        gained: Whether the change is a DoRA's.
        text: How it was drawn.
    """

    W: np.ndarray
    low: np.ndarray
    bias: np.ndarray | None
    lengths: float
    off: float
    factors: float
    bias_off: float
    dtype: torch.dtype
    gained: bool
    text: str

    @property
    def norm(self):
        """Norm of (ΔW, Δb)."""
        return float(np.hypot(np.linalg.norm(self.W), np.linalg.norm(self.shift)))

    @property
    def shift(self):
        """Δb, zeros for None."""
        return np.zeros(len(self.W)) if self.bias is None else self.bias


@dataclass(frozen=True, eq=False)
class Pool:
    """Adapters, the truth of them, and how they were drawn."""

    seed: int
    adapters: list[Adapter]
    truth: Mapping[str, Mapping[str, Change]]
    bases: Mapping[str, HeldWeight]

    def __str__(self):
        lines = [f"seed {self.seed}"]
        for name, changes in self.truth.items():
            lines += [f"  {name} {module}: {c.text}" for module, c in changes.items()]
        return "\n".join(lines)


def array(tensor):
    """A tensor as an array in float64."""
    return tensor.detach().double().numpy()


def base_array(gain):
    """The base weight of gains or magnitudes."""
    return array(gain.base.read(torch.float64, torch.device("cpu")))


def product(B, A, scaling=1.0):
    """s·B·A, multiplied in extended precision: factors may cancel."""
    wide = np.asarray(B, dtype=np.longdouble) @ np.asarray(A, dtype=np.longdouble)
    return np.asarray(scaling * wide, dtype=np.float64)


def draw_factors(rng, shape, rank, planted):
    """B and A in float64, and what was done to them."""
    out, columns = shape
    B, A = rng.standard_normal((out, rank)), rng.standard_normal((rank, columns))
    shared = min(int(rng.integers(0, 4)), rank, planted.shape[1])
    noise = rng.choice([0.0, 0.0, 0.02, 0.3]) if shared else 0.0
    sign = rng.choice([1.0, -1.0])
    B[:, :shared] = sign * planted[:, :shared] + noise * B[:, :shared]
    done = [f"{shared} planted" + (f" noise {noise}" if noise else "")] if shared else []
    if rank:
        spoil = rng.choice(
            ["", "", "", "", "B=0", "A=0", "B twice", "A twice", "A all alike", "columns", "gauge"]
        )
        if spoil == "B=0":
            B *= 0
        elif spoil == "A=0":
            A *= 0
        elif spoil == "B twice":
            B[:, -1] = B[:, 0]
        elif spoil == "A twice":
            A[-1] = 2 * A[0]
        elif spoil == "A all alike":
            A[:] = A[0]
        elif spoil == "columns":  # ill-conditioned: the last columns are weak
            decades = float(rng.choice([2.5, 4.5, 9.0]))
            B *= 10 ** -np.linspace(0, decades, rank)
            spoil += f" over {decades} decades"
        elif spoil == "gauge":  # large factors of a smaller product
            decades = float(rng.choice([1.0, 3.0]))
            G = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
            G = G * 10 ** -np.linspace(0, decades, rank) @ G.T
            B, A = B @ G, np.linalg.solve(G, A)
            spoil += f" over {decades} decades"
        done += [spoil] if spoil else []
    return B, A, done


def draw_exponents(rng, dtype, *, stored=False):
    """Powers of ten for B and for the scaling, so that the norm is between 1e-24 and 1e18.

    Files are written in the types they came in, so that theirs are smaller.
    """
    if rng.random() < 0.6:
        return 0.0, 0.0
    if stored:
        range_of = 1 if dtype == torch.float16 else 10
        return float(rng.uniform(-range_of, range_of)), 0.0
    if dtype == torch.float16:
        return float(rng.uniform(-2, 2)), float(rng.uniform(-20, 14))
    whole = float(rng.uniform(-24, 18))
    in_scaling = rng.random() < 0.3
    return (0.0, whole) if in_scaling else (whole, 0.0)


def draw_lora(rng, shape, planted, dtype, decades, biased, *, extreme=True, stored=False):
    """A LoRA and its truth."""
    rank = int(rng.choice([stored, 1, 1, 2, 2, 3, 4, 5, 6, 8], p=[0.04, *[0.96 / 9] * 9]))
    B, A, done = draw_factors(rng, shape, rank, planted)
    of_B, of_s = decades if extreme else (0.0, 0.0)
    scaling = float(rng.choice([1.0, 1.0, 0.5, 1.75, -0.7, 3 / 7, 0.0], p=[*[0.16] * 6, 0.04]))
    scaling *= 10**of_s
    other = dtype if rng.random() < 0.9 else torch.float32
    turned = not biased and rng.random() < 0.3  # the powers of ten are those of A
    B, A = B * 10 ** (0 if turned else of_B), A * 10 ** (of_B if turned else 0)
    B, A = torch.tensor(B).to(dtype), torch.tensor(A).to(dtype if turned else other)
    bias = None
    if biased:
        bias = torch.tensor(rng.standard_normal(shape[0]) * 10**of_B).to(dtype)
    delta = Delta(B, A, scaling, bias)
    exponent = f" 1e{of_B:+.0f}·1e{of_s:+.0f}" if of_B or of_s else ""
    text = f"{shape[0]}×{shape[1]} rank {rank} {str(dtype)[6:]} s={scaling:.3g}{exponent}"
    done += ["powers in A"] if turned and of_B else []
    done += [f"A {str(A.dtype)[6:]}"] if A.dtype != dtype else []
    text = ", ".join([text, *done, *(["bias"] if biased else [])])
    return delta, truth_of_lora(delta, text)


def working(*tensors):
    """The precision that tensors are combined in."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def truth_of_lora(delta, text=""):
    """The dense truth of a LoRA."""
    B, A, s = array(delta.B), array(delta.A), delta.scaling
    W = product(B, A, s)
    lengths = abs(s) * float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1))
    dtype = working(delta.B, delta.A)
    bias = None if delta.bias is None else s * array(delta.bias)
    return Change(
        W=W,
        low=W,
        bias=bias,
        lengths=lengths,
        off=ROUNDING[dtype] * lengths,
        factors=abs(s) * float(np.linalg.norm(B) * np.linalg.norm(A)),
        bias_off=0.0 if bias is None else ROUNDING[dtype] * float(np.linalg.norm(bias)),
        dtype=dtype,
        gained=False,
        text=text,
    )


def draw_dora(rng, axis, base, lora, *, stored=False):
    """A DoRA with magnitudes as training leaves them, now and then zero or negative, from a LoRA.

    Its B is brought near the size of the base weight: magnitudes are norms of their sum.
    """
    delta, known = lora
    W0 = array(base.tensor)
    dim = 1 if axis == "out" else 0
    norms = np.linalg.norm(W0 + known.low, axis=dim)
    m = norms * (1 + 0.2 * rng.standard_normal(norms.shape))
    odd = rng.random()
    if len(m) > 4 and odd < 0.3:
        m[0] *= -1 if odd < 0.15 or stored else 0  # none of PEFT's can stand for what that leaves
    values = torch.tensor(m).to(delta.B.dtype)
    dora = Delta(delta.B, delta.A, delta.scaling, delta.bias, Magnitude(values, axis, base))
    return dora, truth_of_dora(dora, known.text)


def truth_of_dora(delta, text=""):
    """The dense truth of a DoRA that has magnitudes."""
    known = truth_of_lora(delta)
    axis, W0, m = delta.gain.axis, base_array(delta.gain), array(delta.gain.values)
    V = W0 + known.low
    D = m / np.linalg.norm(V, axis=1 if axis == "out" else 0)
    D = D[:, None] if axis == "out" else D[None, :]
    B, A = array(delta.B), array(delta.A)
    B, A = (D * B, A) if axis == "out" else (B, A * D)
    lengths = abs(delta.scaling) * float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1))
    size = abs(delta.scaling) * np.linalg.norm(B) * np.linalg.norm(A)
    return Change(
        W=D * V - W0,
        low=D * known.low,
        bias=known.bias,
        lengths=lengths,
        off=ROUNDING[known.dtype] * (lengths + float(np.linalg.norm(D * W0))),
        factors=float(size + np.linalg.norm((D - 1) * W0)),
        bias_off=known.bias_off,
        dtype=known.dtype,
        gained=True,
        text=f"{text}, DoRA {axis}",
    )


def weighted(weights, changes):
    """The truth of Σ w_i·ΔW_i."""
    some = [c for c in changes if c.bias is not None]
    return Change(
        W=sum(w * c.W for w, c in zip(weights, changes, strict=True)),
        low=sum(w * c.low for w, c in zip(weights, changes, strict=True)),
        bias=sum(w * c.shift for w, c in zip(weights, changes, strict=True)) if some else None,
        lengths=sum(abs(w) * c.lengths for w, c in zip(weights, changes, strict=True)),
        off=sum(abs(w) * c.off for w, c in zip(weights, changes, strict=True)),
        factors=sum(abs(w) * c.factors for w, c in zip(weights, changes, strict=True)),
        bias_off=sum(abs(w) * c.bias_off for w, c in zip(weights, changes, strict=True)),
        dtype=max((c.dtype for c in changes), key=lambda dtype: dtype == torch.float64),
        gained=any(c.gained for c in changes),
        text=" + ".join(f"{w:.3g}·({c.text})" for w, c in zip(weights, changes, strict=True)),
    )


def draw_module(rng, kind, shape, planted, base, dtype, decades, biased, *, stored=False):
    """A change of a kind, a LoRA, a DoRA or a sum of DoRAs, and its truth."""
    extreme = kind == "lora"
    lora = draw_lora(rng, shape, planted, dtype, decades, biased, extreme=extreme, stored=stored)
    if kind == "lora":
        return lora
    if kind in ("out", "in"):
        return draw_dora(rng, kind, base, lora, stored=stored)
    axes = rng.choice(["out", "in"], 2)
    other = draw_lora(rng, shape, planted, dtype, decades, biased, extreme=False)
    terms = [draw_dora(rng, str(a), base, one) for a, one in zip(axes, (lora, other), strict=True)]
    weights = [float(w) for w in rng.choice([1.0, -0.4, 0.7, 2.0], 2)]
    total = weights[0] * terms[0][0] + weights[1] * terms[1][0]
    return total, weighted(weights, [truth for _, truth in terms])


def draw_pool(seed, *, stored=False):
    """A pool of two to five adapters of one base model; `stored`: as files of PEFT can hold."""
    rng = np.random.default_rng(seed)
    k, doras = int(rng.integers(2, 6)), rng.random() < 0.4
    modules = MODULES[: rng.integers(1, 5)]
    pool = {name: {} for name in NAMES[:k]}
    one_dtype = DTYPES[rng.integers(len(DTYPES))] if rng.random() < 0.5 else None
    traits, bases = {}, {}
    for name in pool:
        dtype = one_dtype or DTYPES[rng.integers(len(DTYPES))]
        kinds = ["lora", "out"] if stored else ["lora", "out", "in", "sum"]
        kind = str(rng.choice(kinds)) if doras else "lora"
        biased = rng.random() < 0.3 and not (stored and doras)
        traits[name] = (dtype, kind, draw_exponents(rng, dtype, stored=stored), biased)
    for index, module in enumerate(modules):
        small = rng.random() < 0.25
        shape = SHAPES[rng.integers(len(SHAPES))] if small else tuple(rng.choice(SIZES[3:], 2))
        shape = (int(shape[0]), int(shape[1]))
        # small whole numbers over four are the same in every storage type
        planted = rng.integers(-9, 10, (shape[0], min(3, shape[0]))) / 4
        of_base = torch.bfloat16 if rng.random() < 0.3 else torch.float32
        base = bases[module] = HeldWeight(
            torch.tensor(rng.standard_normal(shape) / 2).to(of_base), "base"
        )
        for name, (dtype, kind, decades, biased) in traits.items():
            missing = rng.random() < 0.12 and (index or len(modules) > 1)
            here = decades if rng.random() < 0.8 else draw_exponents(rng, dtype, stored=stored)
            drawn = draw_module(rng, kind, shape, planted, base, dtype, here, biased, stored=stored)
            if not missing:
                pool[name][module] = drawn
    for name, held in pool.items():
        if not held:  # every adapter has a module
            pool[name] = {modules[0]: next(d[modules[0]] for d in pool.values() if modules[0] in d)}
    return Pool(
        seed,
        [Adapter(n, {m: delta for m, (delta, _) in held.items()}) for n, held in pool.items()],
        {n: {m: truth for m, (_, truth) in held.items()} for n, held in pool.items()},
        bases,
    )


def dense(delta):
    """ΔW and Δb of any delta of devec, by the formulas, from its tensors."""
    if isinstance(delta.gain, Magnitude):
        truth = truth_of_dora(delta)
        return truth.W, truth.shift
    truth = truth_of_lora(delta)
    W = truth.W
    for axis, gain in (delta.gain.axes if isinstance(delta.gain, Gain) else {}).items():
        W0, values = base_array(delta.gain), array(gain.values)
        W = W + (values[:, None] * W0 if axis == "out" else W0 * values)
    return W, truth.shift
