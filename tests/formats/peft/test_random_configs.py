"""Random configurations of PEFT: what PEFT makes and saves is read, computed with, and loads again.

The long form, by hand: ``DEVEC_RANDOM_PEFT=300 pytest tests/formats/peft/test_random_configs.py``.
Each test has its seed for a parameter; a failure tells the configurations.
"""

import os
import re
import warnings

import numpy as np
import pytest
import torch

import devec
from devec import Adapter, DevecError, DevecWarning, combine, decompose
from support.adapters.cases import dense_deltas
from support.adapters.random_adapters import (
    Host,
    all_loaded,
    carried_parameters,
    draw_pool,
    loaded,
    loads_alone,
    merged_change,
    parameters,
    stored_keys,
    with_changes,
)
from support.checks.faults import Faults
from support.models.random_models import MODELS, generator, make_model, outputs

SEEDS = range(int(os.environ.get("DEVEC_RANDOM_PEFT", "13")))
KINDS = tuple(MODELS)
STORED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # rounding, twice over
FORWARD = 2e-5

# What devec refuses for reasons that are documented.
REFUSALS = (
    "factors of a convolution with groups",
    r"adapters differ in target_parameters",
    r"whole trained tensors",
    r"modules differ in shape \('[^']*experts",  # two and one parameter of the same experts
    r"PEFT supports no lora_bias beside use_dora",
    r"PEFT supports no DoRA of",
    r"several parameters of this module have different ranks or alphas",
    r"PEFT cannot hold changes of biases \(lora_bias\) beside",
    r"1 \+ g",
    r"are one layer, adapted as part of nn.MultiheadAttention",
    r"trains biases of the base model itself",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]


def refused(error):
    """Whether a refusal is for one of the reasons that are documented."""
    return any(re.search(reason, str(error)) for reason in REFUSALS)


def read(faults, paths, base):
    """The adapters of directories; a refusal that is documented ends a case."""
    adapters, remarks = {}, {}
    for name, path in paths.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                adapters[name] = Adapter.from_pretrained(path, name, base=base)
            except DevecError as error:
                faults.holds(f"reading {name} is refused: {error}", refused(error))
                return None, None
        remarks[name] = [str(w.message) for w in said if issubclass(w.category, DevecWarning)]
    return adapters, remarks


def check_read(faults, kind, path, adapter, remarks):
    """Every tensor is accounted for, and factors, scalings and magnitudes are PEFT's."""
    name, keys = adapter.name, set(stored_keys(path))
    known = set(adapter.carried) | set(adapter.layout.base_copies)
    for slot in adapter.layout.slots:
        known |= {*slot.keys, slot.magnitude_key, slot.magnitude_key.removesuffix(".weight")}
    lost = [k for k in keys - known if not any(k in remark for remark in remarks)]
    faults.holds(f"keys of {name} that nothing is said of: {lost}", not lost)
    model, missing = loaded(kind, path)
    faults.holds(f"PEFT's own file of {name}: {missing}", not missing)
    wanted = dense_deltas(model, "default")
    same = wanted.keys() == adapter.modules.keys()
    faults.holds(f"modules of {name}: {sorted(wanted.keys() ^ adapter.modules.keys())}", same)
    for module in wanted.keys() & adapter.modules.keys():
        W, b = wanted[module]
        delta = adapter.modules[module]
        got = (delta.scaling * delta.B.double() @ delta.A.double()).numpy()
        faults.near(f"factors of {name} {module}", got, W, 1e-6 * np.linalg.norm(W))
        got = np.zeros(len(W)) if delta.bias is None else delta.scaling * delta.bias.double()
        want = np.zeros(len(W)) if b is None else b
        faults.near(f"bias of {name} {module}", got, want, 1e-6 * np.linalg.norm(want))
        vectors = getattr(
            model.get_submodule(f"base_model.model.{module.partition('[')[0]}"),
            "lora_magnitude_vector",
            {},
        )
        faults.holds(f"DoRA {name} {module}", (delta.gain is not None) == ("default" in vectors))
        if delta.gain is not None and "default" in vectors:
            m = vectors["default"].weight.detach().double().flatten().numpy()
            off = 1e-6 * np.linalg.norm(m)
            faults.near(f"magnitudes {name} {module}", delta.gain.values.double(), m, off)


def check_loads(faults, host, what, path, name, low):
    """PEFT loads a directory alone and beside an original: no key is missing, none left over."""
    _, missing = loaded(host.kind, path, low_cpu_mem_usage=low)
    faults.holds(f"{what} alone: {missing}", not missing)
    with faults.step(f"{what} beside {name}"):
        missing, unexpected = host.beside(path, name, low_cpu_mem_usage=low)
        faults.holds(f"{what} lacks {missing[:4]}", not missing)
        faults.holds(f"{what} has beside {unexpected[:4]}", not unexpected)


def check_changes(faults, what, got, want, tolerance, sizes):
    """Changes of parameters are the same, to rounding of the terms and, of DoRAs, of the whole."""
    faults.holds(
        f"parameters of {what}: {sorted(n for n in got.keys() - want.keys())[:4]}",
        all(float(got[n].norm()) < 1e-5 for n in got.keys() - want.keys()),
    )
    for name, change in want.items():
        found = got.get(name, torch.zeros_like(change))
        faults.near(f"{what} {name}", found, change, tolerance * max(sizes[name], 1e-3))


def sizes_of(kind, paths, adapters, weights):
    """What rounding of sums is relative to: Σ |w_i|·‖change_i‖, and ‖W0‖ if any is a DoRA."""
    total = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, change in merged_change(kind, path).items():
            total[name] = total.get(name, 0) + abs(weight) * float(change.norm())
    if any(delta.gain is not None for a in adapters for delta in a.modules.values()):
        whole = parameters(make_model(kind))
        total = {
            n: size + float(whole[n].norm()) if n in whole else size for n, size in total.items()
        }
    return total


def precision(*adapters):
    """The rounding of the coarsest type that factors of adapters are stored in."""
    return max(
        STORED.get(d, 2e-6) for a in adapters for slot in a.layout.slots for d in slot.dtypes
    )


def save(faults, adapter, path, **options):
    """Write an adapter, and again what is read of it; None if that is refused."""
    try:
        adapter.save_pretrained(path, **options)
    except DevecError as error:
        faults.holds(f"writing {path.name} is refused: {error}", refused(error))
        return None
    again = Adapter.from_pretrained(path, "again", base=adapter.layout.base.reference)
    second = again.save_pretrained(path.with_name(f"{path.name} again"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        same = (path / file).read_bytes() == (second / file).read_bytes()
        faults.holds(f"{path.name} saved again: {file}", same)
    return path


def of_part(label):
    """The adapter that a part is of; the common vector is of the first, too."""
    return "a" if label == "common" else label.partition("-")[0]


def check_parts(faults, host, paths, adapters, rng, out):
    """Parts load, and unique and shared together are the original."""
    kind = host.kind
    options = {
        "threshold": round(float(rng.uniform(0.05, 0.9)), 3),
        "method": str(rng.choice(["chain", "mean"])),
    }
    compact, low = bool(rng.random() < 0.4), bool(rng.random() < 0.4)
    dtype = [None, torch.float32][rng.integers(2)]
    written, outputs_of = {}, {}
    with faults.step(f"decompose {options}"):
        try:
            parts = decompose(list(adapters.values()), **options)
        except DevecError as error:
            faults.holds(f"decompose is refused: {error}", refused(error))
            return
        outputs_of = parts.outputs(compact=compact)
        for label, part in outputs_of.items():
            with faults.step(f"part {label} {options} compact {compact}"):
                path = save(faults, part, out / label, dtype=dtype)
                if path is not None:
                    written[label] = merged_change(kind, path)
                    check_loads(faults, host, f"part {label}", path, of_part(label), low)
    for name, adapter in adapters.items():
        labels = [f"{name}-{part}" for part in ("unique", "shared")]
        held = [written.get(label) for label in labels]
        if held[0] is None or any(label in outputs_of and label not in written for label in labels):
            continue
        with faults.step(f"parts of {name}"):
            want, total = merged_change(kind, paths[name]), dict(held[0])
            for parameter, change in (held[1] or {}).items():
                total[parameter] = total.get(parameter, 0) + change
            eps = STORED[torch.float32] if dtype else precision(adapter)
            sizes = sizes_of(kind, [paths[name]], [adapter], [1])
            check_changes(faults, f"parts of {name}", total, want, eps, sizes)
            alone = held[1] is None or loads_alone(paths[name])
            if not alone and eps == STORED[torch.float32] and host.agrees:
                check_together(faults, kind, name, paths[name], out)


def check_together(faults, kind, name, path, out):
    """Unique and shared part active in one model do what the original does."""
    model, _ = loaded(kind, path)
    want = outputs(model.double(), kind)
    base = outputs(make_model(kind).double(), kind)
    both, _ = loaded(kind, out / f"{name}-unique", adapter_name="own")
    both.load_adapter(str(out / f"{name}-shared"), "rest")
    both.base_model.set_adapter(["own", "rest"])
    got = outputs(both.double().eval(), kind)
    off = FORWARD * np.linalg.norm(want - base) + 2e-6 * np.linalg.norm(want)
    faults.near(f"unique and shared of {name} together", got, want, off)


def wanted_sum(kind, paths, adapters, weights, carrier):
    """Parameter → Σ w_i·change_i, and the whole tensors of the carrier."""
    total = {}
    for (name, adapter), weight in zip(adapters.items(), weights, strict=True):
        whole = carried_parameters(adapter)
        for parameter, change in merged_change(kind, paths[name]).items():
            if parameter not in whole:
                total[parameter] = total.get(parameter, 0) + weight * change
            elif name == carrier:
                total[parameter] = total.get(parameter, 0) + change
    return total


def check_sum(faults, host, paths, adapters, rng, out):
    """A weighted sum loads, and the model computes with it what it does with the dense sum."""
    kind = host.kind
    weights = [round(float(rng.normal()), 3) for _ in adapters]
    carriers = [name for name, a in adapters.items() if a.carried]
    carrier = str(rng.choice([*carriers, "none"])) if carriers else None
    dtype, low = [None, torch.float32][rng.integers(2)], bool(rng.random() < 0.4)
    what = f"sum {weights} carried from {carrier}"
    with faults.step(what):
        try:
            total = combine(list(adapters.values()), weights, carried_from=carrier)
        except DevecError as error:
            faults.holds(f"{what} is refused: {error}", refused(error))
            return
        path = save(faults, total, out / "sum", dtype=dtype)
        if path is None:
            return
        check_loads(faults, host, what, path, carrier if carrier in paths else "a", low)
        wanted = wanted_sum(kind, paths, adapters, weights, carrier)
        eps = STORED[torch.float32] if dtype else precision(*adapters.values())
        sizes = sizes_of(kind, paths.values(), adapters.values(), weights)
        check_changes(faults, what, merged_change(kind, path), wanted, eps, sizes)
        if not host.agrees or eps > STORED[torch.float32]:
            return
        want = outputs(with_changes(kind, wanted), kind)
        base = outputs(make_model(kind).double(), kind)
        model, _ = loaded(kind, path, low_cpu_mem_usage=low)
        off = FORWARD * np.linalg.norm(want - base) + 2e-6 * np.linalg.norm(want)
        faults.near(f"forward of {what}", outputs(model.double(), kind), want, off)


def check_live(faults, host, paths, adapters, rng):
    """The same in a live PeftModel."""
    if not host.loads_all:
        return
    kind = host.kind
    weights = [round(float(rng.normal()), 3) for _ in adapters]
    carriers = [name for name, a in adapters.items() if a.carried]
    carrier = str(rng.choice([*carriers, "none"])) if carriers else None
    what = f"live sum {weights} carried from {carrier}"
    with faults.step(what):
        live = all_loaded(kind, paths)
        before = outputs(live.double(), kind)
        live.float()
        try:
            devec.combine_adapters(live, list(paths), weights, "total", carried_from=carrier)
        except DevecError as error:
            faults.holds(f"{what} is refused: {error}", refused(error))
            return
        live.double()
        faults.near(f"active after {what}", outputs(live, kind), before, 1e-6 * abs(before).max())
        if not host.agrees:
            return
        live.base_model.set_adapter(["total"])
        want = outputs(
            with_changes(kind, wanted_sum(kind, paths, adapters, weights, carrier)), kind
        )
        base = outputs(make_model(kind).double(), kind)
        off = FORWARD * np.linalg.norm(want - base) + 2e-6 * np.linalg.norm(want)
        faults.near(f"forward of {what}", outputs(live.eval(), kind), want, off)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_peft_makes_is_computed_with_and_loads_again(seed, tmp_path):
    kind = KINDS[seed % len(KINDS)]
    rng = generator(seed, 1)
    paths, story = draw_pool(seed, kind, tmp_path / "pool")
    faults, base = Faults(story), make_model(kind)
    adapters, remarks = read(faults, paths, base)
    if adapters is not None:
        for name, adapter in adapters.items():
            with faults.step(f"read {name}"):
                check_read(faults, kind, paths[name], adapter, remarks[name])
        host = Host(kind, paths)
        check_parts(faults, host, paths, adapters, rng, tmp_path / "parts")
        check_sum(faults, host, paths, adapters, rng, tmp_path / "sums")
        check_live(faults, host, paths, adapters, rng)
    merged_change.cache_clear()
    faults.settle()
