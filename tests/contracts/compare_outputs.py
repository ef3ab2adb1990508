"""Compares what two checkouts of devec write, byte for byte.

    python tests/contracts/compare_outputs.py OLD_CHECKOUT NEW_CHECKOUT

Each checkout runs in a process of its own, with its ``src`` first on the path, on the same inputs:
the golden files, each beside a sibling, the demo pool, and DoRAs with their base models. All of it
is done twice, with one thread of torch and with two. Only the public interface and the command line
are used, so that the checkouts may be laid out differently.

Exits with 1 if anything differs but what `ALLOWED` and `ADDED` name and the words of refusals,
which are counted apart: a refusal writes nothing, so that its words change no adapter, but what is
refused by one checkout only differs.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve()
TESTS = HERE.parents[1]

# What may differ between two runs: the date of a file, and the version that wrote it.
ALLOWED = {"modelspec.date", "version"}

# Fields that every report of `inspect` has had since they were declared in one place. They may be
# new only where they say nothing: null or empty.
ADDED = {"architecture", "base_copies", "base_version", "header", "peft_version", "task_type"}
REPORT, REFUSED = "report.json", "refused.txt"

DECOMPOSITIONS = {
    "chain": {},
    "mean auto": {"method": "mean", "threshold": "auto"},
    "principal": {"method": "principal", "threshold": 0.5},
    "pairwise": {"scope": "pairwise", "threshold": 0.5},
    "iterative": {"scope": "iterative", "target": "a", "threshold": 0.5},
}
FORMS = {"": {}, " compact": {"compact": True}, " as lora": {"as_lora": 2}}
COMMANDS = {
    "decompose": ("decompose", "A", "B", "--json", REPORT, "--out", "out"),
    "decompose compact": ("decompose", "A", "B", "--compact", "--dtype", "float32", "--out", "out"),
    "decompose as lora": (
        "decompose",
        "A",
        "B",
        "--as-lora",
        "2",
        "--json",
        REPORT,
        "--out",
        "out",
    ),
    "combine": ("combine", "A", "B", "--weights", "1,-0.4", "--carried-from", "none", "--out"),
    "negate": ("negate", "A", "--out"),
    "compress": ("compress", "A", "--rank", "1", "--out"),
    "convert": ("convert", "A", "--format", "diffusers", "--out"),
    "overlap": ("overlap", "A", "B", "--json", REPORT),
    "inspect": ("inspect", "A", "--modules", "--json", REPORT),
}


def make_inputs(root, checkout):
    """Pools of two golden files each, the demo pool, and DoRAs; base models by the same names."""
    sys.path.insert(0, str(TESTS))
    from support.pools.golden_pool import READABLE, golden, sibling

    pools, bases = root / "pools", root / "bases"
    for name in READABLE:
        (pools / name).mkdir(parents=True)
        shutil.copy(golden(name), pools / name / "a.safetensors")
        sibling(name, pools / name / "b.safetensors")
    demo = checkout / "src" / "devec" / "demo" / "pool"
    for label, name in (("a", "ink"), ("b", "chalk"), ("c", "emboss")):
        shutil.copytree(demo / name, pools / "demo" / label)
    make_dora_directories(pools / "dora directories", bases / "dora directories")
    make_dora_files(pools / "dora files", bases / "dora files")


def make_dora_directories(pool, base):
    """Two DoRAs and a LoRA of a language model, made by PEFT."""
    from support.adapters.llama_doras import save_models

    with tempfile.TemporaryDirectory() as made:
        save_models(Path(made))
        shutil.copytree(Path(made) / "llama", base)
        for label, name in (("a", "toxic"), ("b", "polite"), ("c", "plain")):
            shutil.copytree(Path(made) / name, pool / label)


def make_dora_files(pool, folder):
    """DoRAs on either axis of a linear layer and a convolution, and a LoRA beside a DoRA."""
    from support.adapters.doras import base, dora_file

    block = "lora_unet_mid_block"
    modules = f"{block}_attentions_0_transformer_blocks_0_attn1_to_q", f"{block}_resnets_1_conv2"
    pool.mkdir()
    for seed, (label, axes) in enumerate({"a": ("out", "out"), "b": ("in", None)}.items()):
        named = dict(zip(modules, axes, strict=True))
        dora_file(pool / f"{label}.safetensors", "sd15", named, seed=seed)
    base("sd15").save_pretrained(folder)


# What runs in the process of a checkout


def decompose_to(out, pool, options, fields):
    """Call `decompose_to`, which had a module and its form in an object before it was public."""
    import devec

    if "decompose_to" in devec.__all__:
        return devec.decompose_to(out, pool, **options, **fields)
    from importlib import import_module

    form = import_module("devec.form").Form(**fields)
    return import_module("devec.stream").decompose_to(out, pool, form=form, **options)


def operations(a, b, pool):
    """Name → what is called with the folder that it writes to."""
    import devec

    def saved(outputs):
        return lambda out: devec.save_adapters({out / n: x for n, x in outputs().items()})

    for name, options in DECOMPOSITIONS.items():
        yield f"decompose {name}", saved(lambda o=options: devec.decompose(pool, **o).outputs())
        yield (
            f"decompose compact {name}",
            saved(lambda o=options: devec.decompose(pool, **o).outputs(compact=True)),
        )
        for form, fields in FORMS.items():
            yield (
                f"decompose_to{form} {name}",
                lambda out, o=options, f=fields: decompose_to(out / "parts", pool, o, f),
            )
    weights = [1, -0.7, 0.2][: len(pool)]
    yield (
        "combine",
        saved(lambda: {"sum": devec.combine(pool, weights, carried_from="none", name="sum")}),
    )
    yield "compress rank", saved(lambda: {"small": devec.compress(a, rank=1).adapter})
    yield "compress energy", saved(lambda: {"small": devec.compress(b, energy=0.9).adapter})
    yield "as_lora", saved(lambda: {"plain": devec.as_lora(a, rank=2).adapter})
    yield "negate", saved(lambda: {"negated": -0.5 * a})
    for target in ("kohya", "diffusers", "peft"):
        yield f"convert {target}", saved(lambda t=target: {"converted": devec.convert(a, t)})


def call(arguments):
    """What the command line prints, without a process of its own, and its exit status."""
    from devec.cli import main

    sys.argv = ["devec", *arguments]
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
    return f"{printed.getvalue()}ended with {status}\n", status


def make_outputs(inputs, outputs):
    """Run everything on every pool, with one thread and with two; refusals are outputs, too."""
    import torch

    warnings.simplefilter("ignore")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for pool in sorted((inputs / "pools").iterdir()):
            base = inputs / "bases" / pool.name
            make_outputs_of(
                sorted(pool.iterdir()),
                base if base.exists() else None,
                outputs / f"{threads} threads" / pool.name,
            )


def make_outputs_of(sources, base, outputs):
    """Run everything on one pool."""
    import devec

    adapters = loaded(sources, base)
    for name, operation in operations(*adapters[:2], adapters):
        out = outputs / name
        out.mkdir(parents=True)
        try:
            operation(out)
        except devec.DevecError as error:
            (out / REFUSED).write_text(str(error))
    named = {"A": f"a={sources[0]}", "B": f"b={sources[1]}"}
    for name, (command, *words) in COMMANDS.items():
        out = outputs / f"command {name}"
        out.mkdir(parents=True)
        os.chdir(out)
        words = [named.get(word, word) for word in words]
        words += [f"result{sources[0].suffix}"] if words[-1] == "--out" else []
        words += [] if base is None else ["--base", str(base)]
        printed, status = call([command, *words])
        (out / (REFUSED if status else "printed.txt")).write_text(printed)


def loaded(sources, base):
    """Adapters named after their files; with a base model they are lazy, as on the command line."""
    import devec

    return [
        devec.Adapter.from_pretrained(path, name=path.stem, base=base, lazy=base is not None)
        for path in sources
    ]


# What is compared


def files(root):
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def fields(value, path=""):
    """Path → leaf of nested JSON, also of JSON in strings, without what may differ."""
    if isinstance(value, str) and value[:1] in "{[":
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        found = {}
        for key, inner in value.items():
            if key not in ALLOWED:
                found |= fields(inner, f"{path}/{key}")
        return found or {path: {}}
    if isinstance(value, list):
        found = {}
        for index, inner in enumerate(value):
            found |= fields(inner, f"{path}/{index}")
        return found or {path: []}
    return {path: value}


def content(path):
    """Fields and data of a file: header and tensors, JSON, or text."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        return fields(json.loads(data[8:size])), data[size:]
    if path.suffix == ".json":
        return fields(json.loads(data)), b""
    return {}, data


def difference(old, new):
    """What differs between two files that is not allowed to, or None."""
    if old.read_bytes() == new.read_bytes():
        return None
    (old_fields, old_data), (new_fields, new_data) = content(old), content(new)
    keys = [k for k in old_fields.keys() | new_fields.keys()
            if old_fields.get(k, "absent") != new_fields.get(k, "absent")]  # fmt: skip
    if new.name == REPORT:
        keys = [key for key in keys if key in old_fields or not says_nothing(key, new_fields[key])]
    if keys:
        key = min(keys)
        was, now = (f.get(key, "absent") for f in (old_fields, new_fields))
        return f"{len(keys)} fields, first {key}: {was!r}, now {now!r}"
    if old_data != new_data:
        if old.suffix in (".txt", ".md"):
            return f"text: {old.read_text()!r}, now {new.read_text()!r}"
        return "data"
    return None


def says_nothing(path, value):
    """Whether a field is one that may be added, and is null or empty."""
    return path.rpartition("/")[2] in ADDED and value in (None, [], {})


def compare(old, new):
    """Path → how two trees differ there."""
    before, after = files(old), files(new)
    found = {}
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found[name] = "missing"
        elif name not in before:
            found[name] = "new"
        elif said := difference(before[name], after[name]):
            found[name] = said
    return found, len(before)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs=2, type=Path, help="an old checkout and a new one")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.make:  # then these are inputs and outputs
        return make_outputs(*(path.resolve() for path in arguments.checkouts))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = root / "inputs"
        make_inputs(inputs, arguments.checkouts[0].resolve())
        trees = []
        for label, checkout in zip(("old", "new"), arguments.checkouts, strict=True):
            # the same path for both, since records name it
            work = root / "work"
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
            command = [sys.executable, HERE, "--make", inputs, work]
            subprocess.run(command, check=True, env=environment)
            trees.append(work.rename(root / label))
        refused = len(list(trees[0].rglob(REFUSED)))
        found, count = compare(*trees)
    reworded = {name for name, said in found.items() if is_reworded(name, said)}
    for name, said in found.items():
        print(f"{'reworded: ' if name in reworded else ''}{name}: {said}")
    print(f"{len(found) - len(reworded)} of {count} files differ")
    print(f"{len(reworded)} of {refused} refusals are worded differently")
    return 1 if len(found) > len(reworded) or not count else 0


def is_reworded(name, said):
    """Whether both refuse, in different words."""
    return Path(name).name == REFUSED and said not in ("missing", "new")


if __name__ == "__main__":
    sys.exit(main())
