"""Compares what two checkouts of devec write, byte for byte.

    python tests/contracts/compare_outputs.py OLD_CHECKOUT NEW_CHECKOUT

Each checkout runs in a process of its own, with its ``src`` first on the path, on the same inputs:
the golden files, each beside a sibling, and the demo pool. Only the public interface and the
command line are used, so that the checkouts may be laid out differently. Exits with 1 if anything
differs but what `ALLOWED` names.
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

DECOMPOSITIONS = {
    "chain": {},
    "mean auto": {"method": "mean", "threshold": "auto"},
    "principal": {"method": "principal", "threshold": 0.5},
    "pairwise": {"scope": "pairwise", "threshold": 0.5},
    "iterative": {"scope": "iterative", "target": "a", "threshold": 0.5},
}
COMMANDS = {
    "decompose": ("decompose", "A", "B", "--json", "report.json", "--out", "out"),
    "decompose compact": ("decompose", "A", "B", "--compact", "--dtype", "float32", "--out", "out"),
    "combine": ("combine", "A", "B", "--weights", "1,-0.4", "--carried-from", "none", "--out"),
    "negate": ("negate", "A", "--out"),
    "compress": ("compress", "A", "--rank", "1", "--out"),
    "convert": ("convert", "A", "--format", "diffusers", "--out"),
    "overlap": ("overlap", "A", "B", "--json", "report.json"),
    "inspect": ("inspect", "A", "--modules", "--json", "report.json"),
}


def make_inputs(folder, checkout):
    """Pools of two golden files each, and the demo pool."""
    sys.path.insert(0, str(TESTS))
    from support.pools.golden_pool import READABLE, golden, sibling

    for name in READABLE:
        (folder / name).mkdir(parents=True)
        shutil.copy(golden(name), folder / name / "a.safetensors")
        sibling(name, folder / name / "b.safetensors")
    demo = checkout / "src" / "devec" / "demo" / "pool"
    for label, name in (("a", "ink"), ("b", "chalk"), ("c", "emboss")):
        shutil.copytree(demo / name, folder / "demo" / label)
    return folder


# What runs in the process of a checkout


def streaming():
    """`decompose_to`, which was in a module of its own before it was public."""
    import devec

    try:
        return devec.decompose_to
    except AttributeError:
        from importlib import import_module

        return import_module("devec.stream").decompose_to


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
        yield f"decompose_to {name}", lambda out, o=options: streaming()(out / "parts", pool, **o)
    weights = [1, -0.7, 0.2][: len(pool)]
    yield (
        "combine",
        saved(lambda: {"sum": devec.combine(pool, weights, carried_from="none", name="sum")}),
    )
    yield "compress rank", saved(lambda: {"small": devec.compress(a, rank=1).adapter})
    yield "compress energy", saved(lambda: {"small": devec.compress(b, energy=0.9).adapter})
    yield "negate", saved(lambda: {"negated": -0.5 * a})
    for target in ("kohya", "diffusers", "peft"):
        yield f"convert {target}", saved(lambda t=target: {"converted": devec.convert(a, t)})


def call(arguments):
    """What the command line prints, without a process of its own."""
    from devec.cli import main

    sys.argv = ["devec", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as ended:
            printed.write(f"ended with {ended.code}\n")
    return printed.getvalue()


def make_outputs(inputs, outputs):
    """Run everything on every pool; refusals are outputs, too."""
    import torch

    import devec

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for folder in sorted(inputs.iterdir()):
        sources = sorted(folder.iterdir())
        for name, operation in operations(*loaded(sources)[:2], loaded(sources)):
            out = outputs / folder.name / name
            out.mkdir(parents=True)
            try:
                operation(out)
            except devec.DevecError as error:
                (out / "refused.txt").write_text(str(error))
        for name, words in COMMANDS.items():
            out = outputs / folder.name / f"command {name}"
            out.mkdir(parents=True)
            os.chdir(out)
            named = {"A": f"a={sources[0]}", "B": f"b={sources[1]}"}
            words = [named.get(word, word) for word in words]
            suffix = sources[0].suffix
            words += [f"result{suffix}"] if words[-1] == "--out" else []
            (out / "printed.txt").write_text(call(words))


def loaded(sources):
    """Adapters named after their files."""
    import devec

    return [devec.Adapter.from_pretrained(path, name=path.stem) for path in sources]


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
    if keys:
        key = min(keys)
        was, now = (f.get(key, "absent") for f in (old_fields, new_fields))
        return f"{len(keys)} fields, first {key}: {was!r}, now {now!r}"
    if old_data != new_data:
        if old.suffix in (".txt", ".md"):
            return f"text: {old.read_text()!r}, now {new.read_text()!r}"
        return "data"
    return None


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
        inputs = make_inputs(root / "inputs", arguments.checkouts[0].resolve())
        trees = []
        for label, checkout in zip(("old", "new"), arguments.checkouts, strict=True):
            # the same path for both, since records name it
            work = root / "work"
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
            command = [sys.executable, HERE, "--make", inputs, work]
            subprocess.run(command, check=True, env=environment)
            trees.append(work.rename(root / label))
        refused = len(list(trees[0].rglob("refused.txt")))
        found, count = compare(*trees)
    for name, said in found.items():
        print(f"{name}: {said}")
    print(f"{len(found)} of {count} files differ; {refused} of them are texts of refusals")
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main())
