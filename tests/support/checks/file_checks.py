"""What must hold of a pool that goes from files to files, against dense truth and in memory."""

import numpy as np

from devec import Adapter, DevecError, combine, compress, decompose
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions
from support.checks.algebra_checks import drawn_weights, wanted_sum
from support.checks.pool_checks import EMPTY
from support.pools.pool_files import CONFIG, WEIGHTS, Read, read_adapter
from support.pools.random_pools import dense

FILES = (WEIGHTS, CONFIG)

# What cannot be written is refused for these reasons alone.
REFUSALS = ("1 + g", "more than torch.float16 can hold", "more than torch.bfloat16 can hold")


def open_pool(paths, base, *, lazy):
    """The adapters of directories."""
    return [Adapter.from_pretrained(p, n, base=base, lazy=lazy) for n, p in paths.items()]


def drawn_question(rng, names):
    """What is asked of a pool, and in which form it is written."""
    scope = str(rng.choice(["all", "all", "pairwise", "iterative"]))
    methods = ["chain", "mean"] + (["principal"] if len(names) == 2 or scope != "all" else [])
    options = {
        "scope": scope,
        "method": str(rng.choice(methods)),
        "threshold": [0.85, round(float(rng.uniform(0.05, 0.95)), 6), 1.0, "auto"][rng.integers(4)],
    }
    if scope == "iterative":
        options["target"] = str(rng.choice(names))
    return options, OutputOptions(compact=bool(rng.random() < 0.4))


def refused(error):
    """Whether a refusal is one of those that are documented."""
    return any(reason in str(error) for reason in REFUSALS)


def check_streamed(faults, truth, paths, base, rng, out):
    """From files to files the parts are those in memory, and no part is lost."""
    names, pool = truth.names, truth.pool
    options, form = drawn_question(rng, names)
    at = f"{options} compact {form.compact}"
    with faults.step(at):
        inside = decompose(open_pool(paths, base, lazy=False), **options)
        held = inside.outputs(compact=form.compact)
        try:
            done = decompose_to(out, open_pool(paths, base, lazy=True), **vars(form), **options)
        except DevecError as error:
            faults.holds(f"refusal {at}: {error}", refused(error))
            return
        faults.holds(
            f"outputs {at}: {sorted(done.written)}, in memory {sorted(held)}",
            done.written.keys() == held.keys(),
        )
        read = {label: read_adapter(path, pool) for label, path in done.written.items()}
        for label, part in held.items():
            compare_parts(faults, truth, label, part, read.get(label, {}), at)
        split = [] if options["scope"] == "pairwise" else names
        for name in [options["target"]] if options["scope"] == "iterative" else split:
            check_total(faults, truth, name, read, at)


def compare_parts(faults, truth, label, part, read, at):
    """A part that was written is that in memory, to rounding of the storage type."""
    stem = label.rpartition("-")[0]
    made_of = stem.split("+") if stem else truth.names
    for module, delta in part.modules.items():
        W, b = dense(delta)
        changes = [truth.change(n, module) for n in made_of if module in truth.pool.truth[n]]
        got = read.get(module) or Read(np.zeros(W.shape), np.zeros(len(b)), 0.0, 0.0)
        limit = got.off + 3 * sum(c.off for c in changes)
        faults.near(f"written {label} {module} {at}", got.W, W, limit)
        limit = got.bias_off + 2 * sum(c.bias_off for c in changes)
        faults.near(f"written bias {label} {module} {at}", got.bias, b, limit)


def check_total(faults, truth, name, read, at):
    """What is written of an adapter, put together, is the adapter."""
    parts = [read.get(f"{name}-{kind}", {}) for kind in ("unique", "shared")]
    whole = truth.norm([name])
    for module, change in truth.pool.truth[name].items():
        held = [part[module] for part in parts if module in part]
        W = sum((r.W for r in held), np.zeros(change.W.shape))
        b = sum((r.bias for r in held), np.zeros(len(change.W)))
        # a part may be left out that is zero beside the adapter, and what is cut beside the module
        cut = 5 * EMPTY * (whole if len(held) < 2 else np.linalg.norm(change.W))
        limit = sum(r.off for r in held) + cut + 3 * change.off
        faults.near(f"total {name} {module} {at}", W, change.W, limit)
        limit = sum(r.bias_off for r in held) + 2 * change.bias_off
        if len(held) < 2:
            limit += 2 * EMPTY * whole
        faults.near(f"total bias {name} {module} {at}", b, change.shift, limit)


def check_read(faults, truth, adapters):
    """What is read is what was written by hand."""
    for adapter in adapters:
        wanted = truth.pool.truth[adapter.name]
        faults.holds(f"modules {adapter.name}", adapter.modules.keys() == wanted.keys())
        for module, delta in adapter.modules.items():
            (W, b), c = dense(delta), wanted[module]
            faults.near(f"read {adapter.name} {module}", W, c.W, 1e-6 * c.off)
            faults.near(f"bias {adapter.name} {module}", b, c.shift, 1e-6 * c.bias_off)


def check_saved(faults, truth, paths, base, rng, out):
    """What is combined and compressed is written as it is, and written again byte by byte."""
    weights = drawn_weights(rng, len(truth.names))
    plain = [float(w) for w in weights]
    rank = (int, np.int64)[rng.integers(2)](rng.integers(1, 7))
    with faults.step("read"):
        adapters = open_pool(paths, base, lazy=bool(rng.random() < 0.5))
        check_read(faults, truth, adapters)
    chosen = adapters[int(rng.integers(len(adapters)))]
    own = truth.pool.truth[chosen.name]
    total, half = wanted_sum(truth, truth.names, plain), wanted_sum(truth, [chosen.name], [0.5])
    small = f"compress {chosen.name} rank {rank!r}"
    results = [
        (f"combine {plain}", lambda: combine(adapters, plain), total),
        (f"combine {weights}", lambda: combine(adapters, weights), total),
        (f"half of {chosen.name}", lambda: chosen * 0.5, half),
        (small, lambda: compress(chosen, rank=rank).adapter, None),
    ]
    for number, (what, make, wanted) in enumerate(results):
        with faults.step(what):
            result = make()
            try:
                path = result.save_pretrained(out / f"{number}")
            except DevecError as error:
                nothing = "there is nothing to write" in str(error) and not result.modules
                faults.holds(f"refusal {what}: {error}", nothing or refused(error))
                continue
            compare_saved(faults, what, read_adapter(path, truth.pool), result, wanted, own)
            again = Adapter.from_pretrained(path, "again", base=base)
            second = again.save_pretrained(out / f"{number} again")
            same = all((path / f).read_bytes() == (second / f).read_bytes() for f in FILES)
            faults.holds(f"saved again: {what}", same)


def compare_saved(faults, what, read, result, wanted, own):
    """What was written is the truth; of what has none of its own, what is in memory."""
    for module in result.modules if wanted is None else wanted:
        if wanted is None:
            (W, b), change = dense(result.modules[module]), own[module]
        else:
            change = wanted[module]
            W, b = change.W, change.shift
        got = read[module]
        limit = got.off + 4 * change.off
        faults.near(f"{what} {module}", got.W, W, limit)
        limit = got.bias_off + 2 * change.bias_off
        faults.near(f"bias of {what} {module}", got.bias, b, limit)
