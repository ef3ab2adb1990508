"""What must hold of a pool's parts, checked against dense truth."""

import math
from functools import cache
from itertools import combinations

import numpy as np
import torch

from devec import decompose
from support.pools.random_pools import Change, Pool, dense
from support.truth.dense_spaces import CLEAR, DENSE, METHODS, Shared, deflated, projector, space

EMPTY = 1e-6  # of its original: a part below it may be left out, a singular value cut off
NORMS = 1e-5  # norms are read off Gram matrices, whose loss is bounded by this


class Truth:
    """The dense truth of a pool's modules, each computed once."""

    def __init__(self, pool: Pool):
        self.pool, self.names = pool, [a.name for a in pool.adapters]
        self.modules = list(dict.fromkeys(m for a in pool.adapters for m in a.modules))
        self.space = cache(self._space)
        self.shared = cache(self._shared)

    def holders(self, module):
        """The adapters that have a module."""
        return [name for name in self.names if module in self.pool.truth[name]]

    def change(self, name, module) -> Change:
        return self.pool.truth[name][module]

    def dtype(self, module):
        """The precision in which a module is split: float64 if any of the adapters is."""
        known = {self.change(name, module).dtype for name in self.holders(module)}
        return torch.float64 if torch.float64 in known else torch.float32

    def _space(self, name, module):
        return space(self.change(name, module), self.dtype(module))

    def _shared(self, group, module, method):
        return Shared([self.space(name, module) for name in group], method)

    def groups(self, scope):
        """The groups that are compared, module by module."""
        if scope == "all":
            found = [(tuple(self.names), m) for m in self.modules]
        else:
            found = [(pair, m) for m in self.modules for pair in combinations(self.names, 2)]
        return [(g, m) for g, m in found if all(m in self.pool.truth[name] for name in g)]

    def norm(self, names):
        """Norm of what adapters change."""
        return math.hypot(*(c.norm for n in names for c in self.pool.truth[n].values()))


def drawn_threshold(rng, truth, scope, methods):
    """A threshold that is clear of all eigenvalues that count; None if none was found."""
    known = [truth.shared(g, m, method) for g, m in truth.groups(scope) for method in methods]
    known = [one for one in known if one.certain]
    for _ in range(100):
        threshold = round(float(rng.uniform(0.02, 0.98)), 6)
        if all(one.clear_of(threshold) for one in known):
            return threshold
    return None


def check_row(faults, truth, row, question):
    """A row of the report for scopes `all` and `pairwise`: ranks, spectrum, basis, norms."""
    threshold, method = question
    at = f"{'+'.join(row.group)} {row.module} {method} {threshold}"
    known = truth.shared(row.group, row.module, method)
    Z = row.basis.double().numpy()
    check_basis(faults, truth, row, at)
    if all(s.certain for s in known.spaces):
        ranks = tuple(s.rank for s in known.spaces)
        faults.holds(f"ranks {at}: {row.ranks}, truly {ranks}", row.ranks == ranks)
        got, want = row.spectrum.double().numpy(), np.sort(known.values)[::-1]
        size = max(len(got), len(want))
        got, want = (np.sort(np.pad(x, (0, size - len(x))))[::-1] for x in (got, want))
        limit = math.sqrt(size or 1) * (known.values_off + DENSE[truth.dtype(row.module)])
        faults.near(f"spectrum {at}", got, want, limit)
    if threshold != "auto":
        faults.holds(f"threshold {at}: {row.threshold}", row.threshold == threshold)
    level = row.threshold
    if not known.certain or (level <= 1 and not known.clear_of(level)):
        return
    count = known.count(level) if level <= 1 else 0
    P, off = (projector(known.basis(count)[0]), known.basis(count)[1])
    limit = off + DENSE[truth.dtype(row.module)]
    if threshold == "auto" and len(row.group) > 2:  # every adapter must hold the direction, too
        faults.near(f"subspace {at}", P @ Z, Z, limit)
        return
    faults.holds(f"count {at}: {row.shared_rank}, truly {count}", row.shared_rank == count)
    if row.shared_rank == count:
        error = np.linalg.norm(projector(Z) - P, 2)
        faults.near(f"subspace {at}", error, 0, limit)


def check_basis(faults, truth, row, at):
    """The basis is orthonormal, and norms are those of what it was asked of."""
    Z = row.basis.double().numpy()
    limit = 5e-6 if truth.dtype(row.module) == torch.float32 else 1e-11
    faults.near(f"orthonormal {at}", Z.T @ Z, np.eye(Z.shape[1]), limit * max(1, Z.shape[1]))
    for name, norm, part in zip(row.group, row.norms, row.shared_norms, strict=True):
        change = truth.change(name, row.module)
        W = np.linalg.norm(change.W)
        faults.near(f"norm {name} {at}", norm, W, NORMS * W + 3 * change.off)
        S = np.linalg.norm(Z.T @ change.W)
        limit = NORMS * S + 3 * change.off
        faults.near(f"shared norm {name} {at}", part, S, limit)


def check_parts(faults, truth, parts, names, bases, at):
    """Shared is Z·Zᵀ·ΔW, unique has nothing in Z, both together are the original."""
    for name in names:
        faults.holds(
            f"modules {name} {at}",
            truth.pool.truth[name].keys()
            == parts.shared[name].modules.keys()
            == parts.unique[name].modules.keys(),
        )
        for module, change in truth.pool.truth[name].items():
            S, b_S = dense(parts.shared[name].modules[module])
            U, b_U = dense(parts.unique[name].modules[module])
            Z = bases.get(module, np.zeros((len(S), 0)))
            limit = change.off
            here = f"{name} {module} {at}"
            faults.near(f"sum {here}", S + U, change.W, 2 * limit)
            faults.near(f"shared {here}", S, Z @ (Z.T @ change.W), 5 * limit)
            faults.near(f"unique in Z {here}", Z.T @ U, 0 * Z.T @ U, 5 * limit)
            limit = change.bias_off
            faults.near(f"sum of biases {here}", b_S + b_U, change.shift, 2 * limit)
            faults.near(f"shared bias {here}", b_S, Z @ (Z.T @ change.shift), 5 * limit)


def check_common(faults, truth, adapter, group, bases, at):
    """The common vector is Σ n_i·shared_i/Σ n_i with n_i = ‖shared_i‖, where anything is shared."""
    held = {} if adapter is None else adapter.modules
    wanted = {m for m, Z in bases.items() if Z.shape[1]}
    faults.holds(
        f"common modules {at}: {sorted(held)}, truly {sorted(wanted)}", held.keys() == wanted
    )
    for module in wanted & held.keys():
        Z = bases[module]
        changes = [truth.change(name, module) for name in group]
        parts = [Z @ (Z.T @ c.W) for c in changes]
        norms = [float(np.linalg.norm(S)) for S in parts]
        total = math.fsum(norms) or 1.0
        shares = [n / total for n in norms]
        want = sum(w * S for w, S in zip(shares, parts, strict=True))
        # an error of shared_i is one of the sum, and of the weights
        off = [5 * c.off for c in changes]
        size = float(np.linalg.norm(want))
        terms = zip(off, norms, strict=True)
        limit = sum(min(1, e / total) * (2 * n + size) + NORMS * n * n / total for e, n in terms)
        got, b = dense(held[module])
        faults.near(f"common {module} {at}", got, want, limit)
        biases = [Z @ (Z.T @ c.shift) for c in changes]
        want = sum(w * x for w, x in zip(shares, biases, strict=True))
        limits = [
            w * (5 * c.bias_off + NORMS * np.linalg.norm(x)) + min(1, e / total) * np.linalg.norm(x)
            for c, w, x, e in zip(changes, shares, biases, off, strict=True)
        ]
        faults.near(f"common bias {module} {at}", b, want, sum(limits))


def originals(parts, truth):
    """Name of an output → the part, and the adapters that it was made of."""
    known = {f"{n}-unique": (part, [n]) for n, part in parts.unique.items()}
    for name, part in parts.shared.items():
        known[f"{name}-shared"] = part, name.split("+")
    if parts.common is not None:
        known["common"] = parts.common, truth.names
    return known


def check_outputs(faults, truth, parts, at):
    """What is not among the outputs is zero beside its original; compact parts are the parts."""
    known = originals(parts, truth)
    whole, compact = parts.outputs(), parts.outputs(compact=True)
    faults.holds(f"compact outputs {at}", list(whole) == list(compact))
    faults.holds(f"outputs {at}", whole.keys() <= known.keys())
    for label, (part, made_of) in known.items():
        here = f"{label} {at}"
        held = {m: dense(d) for m, d in part.modules.items()}
        if label not in whole:
            norm = math.hypot(*(np.linalg.norm(x) for pair in held.values() for x in pair))
            faults.near(f"left out {here}", norm, 0, 2 * EMPTY * truth.norm(made_of))
            continue
        faults.holds(f"modules {here}", whole[label].modules.keys() == part.modules.keys())
        if label in compact and label != "common":
            check_compact(faults, truth, compact[label], held, made_of, here)


def check_compact(faults, truth, compact, held, made_of, here):
    """A compact part: what is cut is below 1e-6 of the original module, the bias is kept."""
    for module, (W, b) in held.items():
        changes = [truth.change(name, module) for name in made_of]
        norm = math.hypot(*(float(np.linalg.norm(c.W)) for c in changes))
        limit = 5 * EMPTY * norm + 3 * sum(c.off for c in changes)
        zero = np.zeros(W.shape), np.zeros(b.shape)
        got, bias = dense(compact.modules[module]) if module in compact.modules else zero
        faults.near(f"compact {module} {here}", got, W, limit)
        limit_of_bias = 2 * sum(c.bias_off for c in changes)
        faults.near(f"compact bias {module} {here}", bias, b, limit_of_bias)
        if module in compact.modules and compact.modules[module].gain is None:
            S = np.linalg.svd(W, compute_uv=False)
            # the rounding of cancelled columns is not known to be worth none
            most = int((S > 0.5 * EMPTY * norm).sum()) if limit < 20 * EMPTY * norm else len(S)
            rank = compact.modules[module].rank
            faults.holds(f"compact rank {module} {here}: {rank}, truly {most}", rank <= most)


def check_pool(faults, truth, method, scope, threshold):
    """Scopes `all` and `pairwise`."""
    at = f"{scope} {method} {threshold}"
    adapters = truth.pool.adapters
    with faults.step(f"decompose {at}"):
        parts = decompose(adapters, threshold=threshold, method=method, scope=scope)
        rows = {(row.group, row.module): row for row in parts.splits}
        faults.holds(f"rows {at}", set(rows) == set(truth.groups(scope)))
        bases = {key: row.basis.double().numpy() for key, row in rows.items()}
        for row in parts.splits:
            check_row(faults, truth, row, (threshold, method))
        for group in dict.fromkeys(group for group, _ in bases):
            held = {m: Z for (g, m), Z in bases.items() if g == group}
            if scope == "all":
                check_common(faults, truth, parts.common, group, held, at)
                continue
            label = "+".join(group)
            part = parts.shared.get(label)
            check_common(faults, truth, part, group, held, f"{label} {at}")
        if scope == "all":
            held = {m: Z for (_, m), Z in bases.items()}
            check_parts(faults, truth, parts, truth.names, held, at)
        check_outputs(faults, truth, parts, at)


def check_target(faults, truth, method, target, threshold):
    """Scope `iterative`."""
    at = f"iterative {target} {method} {threshold}"
    with faults.step(f"decompose {at}"):
        parts = decompose(
            truth.pool.adapters,
            threshold=threshold,
            method=method,
            scope="iterative",
            target=target,
        )
        bases = {}
        for module in truth.pool.truth[target]:
            others = [n for n in truth.holders(module) if n != target]
            rows = [row for row in parts.splits if row.module == module]
            groups = [(target, other) for other in others]
            faults.holds(f"rows {module} {at}", [row.group for row in rows] == groups)
            bases[module] = np.concatenate(
                [truth.space(target, module).U[:, :0], *(r.basis.double().numpy() for r in rows)], 1
            )
            for row in rows:
                check_basis(faults, truth, row, at)
            spaces = [truth.space(n, module) for n in (target, *others)]
            if threshold != "auto" and all(s.certain for s in spaces):
                check_steps(faults, rows, deflated(spaces, threshold), spaces, f"{module} {at}")
        check_parts(faults, truth, parts, [target], bases, at)
        check_outputs(faults, truth, parts, at)


def check_steps(faults, rows, steps, spaces, at):
    """Ranks, spectra and bases of the steps, where none of the values is near the threshold."""
    if steps is None or len(rows) != len(steps):
        return
    for row, (left, squared, Z, off), other in zip(rows, steps, spaces[1:], strict=True):
        faults.holds(
            f"step ranks {at}: {row.ranks}, truly {left, other.rank}",
            row.ranks == (left, other.rank),
        )
        got = row.spectrum.double().numpy()
        faults.holds(f"step spectrum {at}: {len(got)} values", len(got) == len(squared))
        if len(got) == len(squared):
            faults.near(f"step spectrum {at}", got, squared, max(off, CLEAR / 20))
        faults.holds(f"step count {at}: {row.shared_rank}", row.shared_rank == Z.shape[1])
        if row.shared_rank == Z.shape[1]:
            error = np.linalg.norm(projector(row.basis.double().numpy()) - projector(Z), 2)
            faults.near(f"step subspace {at}", error, 0, off + 2e-5)


ALL_METHODS = tuple(METHODS)
