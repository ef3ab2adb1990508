"""What must hold of sums, norms, angles and lower ranks of a pool, against dense truth."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np

from devec import as_lora, combine, compress, cosine, distance, inner, overlap
from support.pools.random_pools import dense, weighted

# Of factors alone, norms and inner products are summed in float64 whatever the precision.
SUMMED = 1e-12
# Balanced factors are rounded to the working precision, and the Gram route adds as much.
CUT = 3
NEAREST = 1.01  # as_lora: within 1 % of the least error on all that was tried
NUMBERS = (float, float, int, np.float32, np.float64, np.int64, Fraction)


def summed(change):
    """Absolute rounding of norms and inner products of a change."""
    return 3 * change.off if change.gained else SUMMED * change.lengths


def drawn_weights(rng, count):
    """Weights of all kinds of numbers, some of them zero, one or negative."""
    found = []
    for _ in range(count):
        value = float(rng.choice([0.0, 1.0, -1.0, -0.4, 2.0, float(rng.normal())]))
        kind = NUMBERS[rng.integers(len(NUMBERS))]
        found.append(kind(round(value) if kind in (int, np.int64) else value))
    return found


def check_same(faults, what, adapter, wanted):
    """An adapter changes every module as is wanted, to rounding of the factors."""
    faults.holds(f"modules of {what}", adapter.modules.keys() == wanted.keys())
    for module in adapter.modules.keys() & wanted.keys():
        W, b = dense(adapter.modules[module])
        want = wanted[module]
        faults.near(f"{what} {module}", W, want.W, 2 * want.off)
        faults.near(f"bias of {what} {module}", b, want.shift, 2 * want.bias_off)


def check_combinations(faults, truth, rng):
    """Weighted sums of some adapters, in any order."""
    names = [str(n) for n in rng.permutation(truth.names)[: rng.integers(1, len(truth.names) + 1)]]
    held = {a.name: a for a in truth.pool.adapters}
    numbers = drawn_weights(rng, len(names))
    plain = [float(w) for w in numbers]
    for weights in (plain, numbers):
        what = f"combine {names} {weights}"
        with faults.step(what):
            total = combine([held[n] for n in names], weights)
            check_same(faults, what, total, wanted_sum(truth, names, plain))


def wanted_sum(truth, names, weights):
    """Module → the truth of Σ w_i·ΔW_i."""
    modules = dict.fromkeys(m for n in names for m in truth.pool.truth[n])
    wanted = {}
    for module in modules:
        terms = [
            (w, truth.change(n, module))
            for n, w in zip(names, weights, strict=True)
            if module in truth.pool.truth[n]
        ]
        wanted[module] = weighted(*zip(*terms, strict=True))
    return wanted


def check_identities(faults, truth, rng):
    """Equality is that of effect: identities of algebra hold, other adapters are unequal."""
    a, b = (truth.pool.adapters[i] for i in rng.permutation(len(truth.names))[:2])
    own, other = (list(truth.pool.truth[x.name].values()) for x in (a, b))
    laws = {
        "(a/3)*3 == a": lambda: (a / 3) * 3 == a,
        "a-a == 0*a": lambda: a - a == 0 * a,
        "0.1a+0.9a == a": lambda: 0.1 * a + 0.9 * a == a,
        "a+b == b+a": lambda: a + b == b + a,
        "-(0-a) == a": lambda: -(0 * a - a) == a,
        "2(a-b) == 2a-2b": lambda: 2 * (a - b) == 2 * a - 2 * b,
    }
    # changes of biases are added up at once: of much larger ones that cancel only rounding is left
    kept, added = (math.hypot(*(float(np.linalg.norm(c.shift)) for c in x)) for x in (own, other))
    if added <= 4 * kept:
        laws["(a+b)-b == a"] = lambda: (a + b) - b == a
    for law, holds in laws.items():
        with faults.step(f"{law} of {a.name}, {b.name}"):
            faults.holds(f"{law} of {a.name}, {b.name}", holds())
    norm, size = (math.hypot(*x) for x in ([c.norm for c in own], [c.factors for c in own]))
    if norm > 1e-2 * math.hypot(size, norm):
        with faults.step(f"{a.name} == 1.1·{a.name}"):
            faults.holds(f"{a.name} == 1.1·{a.name}", a != 1.1 * a)
            faults.holds(f"{a.name} == 0·{a.name}", a != 0 * a)


def check_measures(faults, truth):
    """Norms, inner products, cosines and distances of all pairs."""
    for a in truth.pool.adapters:
        with faults.step(f"norm {a.name}"):
            changes = truth.pool.truth[a.name].values()
            limit = math.hypot(*(summed(c) for c in changes)) + SUMMED * truth.norm([a.name])
            faults.near(f"norm {a.name}", a.norm(), truth.norm([a.name]), limit)
            c = cosine(a, a)
            faults.holds(f"cosine of {a.name} with itself: {c!r}", math.isnan(c) or -1 <= c <= 1)
    for a, b in combinations(truth.pool.adapters, 2):
        at = f"{a.name}, {b.name}"
        common = [m for m in a.modules if m in b.modules]
        pairs = [(truth.change(a.name, m), truth.change(b.name, m)) for m in common]
        with faults.step(f"inner {at}"):
            want = math.fsum(float((c.W * d.W).sum() + c.shift @ d.shift) for c, d in pairs)
            limit = sum(inner_off(c, d) for c, d in pairs)
            faults.near(f"inner {at}", inner(a, b), want, limit)
            norms = truth.norm([a.name]), truth.norm([b.name])
            check_cosine(faults, f"cosine {at}", cosine(a, b), want, limit, norms)
        with faults.step(f"distance {at}"):
            wanted = wanted_sum(truth, [a.name, b.name], [1.0, -1.0]).values()
            want = math.hypot(*(w.norm for w in wanted))
            limit = sum(2 * (w.off + w.bias_off) for w in wanted)
            faults.near(f"distance {at}", distance(a, b), want, limit)


def inner_off(c, d):
    """How far rounding may move an inner product; gains meet factors in the working precision."""
    gained = c.gained or d.gained
    offs = [SUMMED * x.norm + (3 * x.off if gained else SUMMED * x.lengths) for x in (c, d)]
    return offs[0] * (d.norm + d.lengths) + offs[1] * (c.norm + c.lengths)


def check_cosine(faults, what, got, want, limit, norms):
    """A cosine is within [-1, 1], nan if either norm is zero, and right."""
    scale = norms[0] * norms[1]
    if not scale:
        faults.holds(f"{what}: {got}, of zero", math.isnan(got))
        return
    faults.holds(f"{what}: {got!r}", -1 <= got <= 1 or limit > scale)
    if limit < 1e-2 * scale:
        faults.near(what, got, want / scale, 3 * limit / scale)


def check_overlaps(faults, truth):
    """Ranks, squared cosines and cosines of every pair and module."""
    with faults.step("overlap"):
        found = overlap(truth.pool.adapters)
        wanted = {(pair, m) for pair, m in truth.groups("pairwise")}
        faults.holds("rows of overlap", {(row.pair, row.module) for row in found.modules} == wanted)
        for row in found.modules:
            at = f"overlap {'+'.join(row.pair)} {row.module}"
            spaces = [truth.space(name, row.module) for name in row.pair]
            c, d = (truth.change(name, row.module) for name in row.pair)
            inside = float((c.W * d.W).sum() + c.shift @ d.shift)
            faults.near(f"inner of {at}", row.inner, inside, inner_off(c, d))
            norms = c.norm, d.norm
            check_cosine(faults, f"cosine of {at}", row.cosine, inside, inner_off(c, d), norms)
            if not all(s.certain for s in spaces):
                continue
            ranks = tuple(s.rank for s in spaces)
            faults.holds(f"ranks of {at}: {row.ranks}, truly {ranks}", row.ranks == ranks)
            if row.ranks == ranks:
                want = np.linalg.svd(spaces[0].U.T @ spaces[1].U, compute_uv=False) ** 2
                limit = 5 * sum(s.off for s in spaces) * max(1, len(want))
                faults.near(f"cosines of {at}", row.squared_cosines.numpy(), want, limit)


def optimum(change, rank):
    """The least error at a rank, of a DoRA that of its low-rank part."""
    S = np.linalg.svd(change.low, compute_uv=False)
    return float(np.linalg.norm(S[rank:]))


def check_compressions(faults, truth, rng):
    """Lower ranks: the least error there is, and it is what is said."""
    asked = [{"rank": int(rng.integers(1, 9))}, {"energy": 1.0}]
    asked += [{"energy": round(1 - 10 ** -float(rng.uniform(0.1, 6)), 9)}]
    for adapter in truth.pool.adapters:
        for options in asked:
            at = f"compress {adapter.name} {options}"
            with faults.step(at):
                result = compress(adapter, **options)
                check_compression(faults, truth, adapter.name, options, result, at)


def check_compression(faults, truth, name, options, result, at):
    """One compression, module by module and as a whole."""
    lost = []
    for module, change in truth.pool.truth[name].items():
        here, made = f"{at} {module}", result.adapter.modules.get(module)
        zero = np.zeros(change.W.shape), np.zeros(len(change.W))
        W, b = zero if made is None else dense(made)
        rank = 0 if made is None else made.rank
        norm, limit = float(np.linalg.norm(change.W)), CUT * change.off
        faults.near(f"bias {here}", b, change.shift, 2 * change.bias_off)
        error = float(np.linalg.norm(W - change.W))
        lost.append(error)
        faults.near(f"error {here}", error, optimum(change, rank), limit)
        if norm > 1e2 * limit:
            said = result.errors[module] * norm
            faults.near(f"error said {here}", said, error, limit * (1 + error / norm))
        check_rank(faults, truth, (name, module), options, rank, here)
    norm = float(np.linalg.norm([np.linalg.norm(c.W) for c in truth.pool.truth[name].values()]))
    limit = CUT * sum(c.off for c in truth.pool.truth[name].values())
    if norm > 1e2 * limit:
        faults.near(f"whole error said {at}", result.error * norm, np.linalg.norm(lost), 3 * limit)


def check_rank(faults, truth, where, options, rank, here):
    """The rank is the one asked for, or the smallest that keeps the energy; never of rounding."""
    change, own = truth.change(*where), truth.space(*where)
    S = np.linalg.svd(change.low, compute_uv=False)
    # what is below the tolerance of ranks but not of float64 may be kept or not
    most = int((S > max(1e-15 * change.lengths, 1e-13 * S[0])).sum())
    faults.holds(f"rank of rounding {here}: {rank}, truly {most}", rank <= most)
    if "rank" in options:
        faults.holds(f"rank {here}: {rank}", rank <= options["rank"])
        if own.certain:
            wanted = min(options["rank"], own.rank)
            faults.holds(f"rank {here}: {rank}, not {wanted}", rank >= wanted)
        return
    tail = np.append(np.cumsum(S[::-1] ** 2)[::-1], 0.0)
    allowed = (1 - options["energy"]) * np.linalg.norm(change.W) ** 2
    off = 1e-3 * allowed  # a rank is not told where the energy is that at which it changes
    noise = (CUT * change.off) ** 2
    if noise > off or (np.abs(tail - allowed) < off + noise).any():
        return
    wanted = int((tail[:-1] > allowed).sum())
    faults.holds(f"rank {here}: {rank}, not {wanted}", rank == wanted)


def check_nearest(faults, truth, rng):
    """Plain LoRAs for DoRAs: the error said is the true one, and near the least."""
    for adapter in truth.pool.adapters:
        if not any(c.gained for c in truth.pool.truth[adapter.name].values()):
            continue
        rank = int(rng.integers(1, 6))
        at = f"as_lora {adapter.name} rank {rank}"
        with faults.step(at):
            result = as_lora(adapter, rank)
            faults.holds(
                f"plain {at}", all(d.gain is None for d in result.adapter.modules.values())
            )
            for module, change in truth.pool.truth[adapter.name].items():
                W, b = dense(result.adapter.modules[module])
                limit, norm = CUT * change.off, np.linalg.norm(change.W)
                error = float(np.linalg.norm(W - change.W))
                here = f"{at} {module}"
                faults.near(f"bias {here}", b, change.shift, 2 * change.bias_off)
                faults.near(f"error said {here}", result.errors[module] * norm, error, 2 * limit)
                S = np.linalg.svd(change.W, compute_uv=False)
                least = float(np.linalg.norm(S[rank:])) if change.gained else 0.0
                faults.holds(f"error {here}: {error}, {least}", error <= NEAREST * least + limit)
                held = result.adapter.modules[module].rank
                faults.holds(f"rank {here}: {held}", held <= rank or not change.gained)
