"""Decompositions from files to files beside those in memory, and what both of them write."""

import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open

from devec import Adapter, as_lora, convert, decompose, save_adapters
from devec.decomposition.request import validated
from devec.operations.as_lora import with_lora_record
from devec.streaming.decompose_to import decompose_to
from devec.streaming.job import run_job
from devec.streaming.output_options import OutputOptions
from devec.streaming.processes import Team

WEIGHTS = ".safetensors"


def from_files(paths, *, lazy=True, base=None):
    """A pool; of each adapter the name is that of its path, unless a dictionary names it."""
    named = paths if isinstance(paths, dict) else {Path(p).stem: p for p in paths}
    return [Adapter.from_pretrained(p, n, base=base, lazy=lazy) for n, p in named.items()]


def in_memory(out, paths, form=None, base=None, **options):
    """Decompose a pool in memory and write its parts; returns the names of the outputs."""
    form = OutputOptions() if form is None else form
    parts = decompose(from_files(paths, lazy=False, base=base), **options)
    made = {}
    for label, adapter in parts.outputs(compact=form.compact).items():
        made[label] = adapter
        if form.as_lora is not None and any(d.gain is not None for d in adapter.modules.values()):
            made[label] = with_lora_record(adapter, as_lora(adapter, form.as_lora), form.as_lora)
        if form.format is not None:
            converted = convert(made[label], form.format)
            made[label] = dataclasses.replace(converted, provenance=made[label].provenance)
    targets = {adapter.output_path(Path(out) / label): adapter for label, adapter in made.items()}
    save_adapters(targets, dtype=form.dtype)
    return set(made)


def from_files_to_files(out, paths, form=None, base=None, **options):
    """Decompose a pool from files to files; returns what was found and written."""
    form = OutputOptions() if form is None else form
    return decompose_to(out, from_files(paths, base=base), **vars(form), **options)


def with_report(out, paths, report, **options):
    """Decompose a pool with a report beside its outputs, as the command line does."""

    def request():
        return validated(from_files(paths), 0.85, "chain", "all", None)

    with Team() as team:
        return run_job(out, request, OutputOptions, report=report, team=team, **options)


def tree(directory):
    """All files of a directory, hidden ones, too, by their paths in it."""
    return {
        str(path.relative_to(directory)): path
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def contents(directory):
    """Path → bytes of all files of a directory."""
    return {name: path.read_bytes() for name, path in tree(directory).items()}


def stored(path):
    """Tensors and strings of a file of tensors."""
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def assert_same_files(got, want, rounding=0.0, without=()):
    """Compare directories: names, texts, headers, and tensors up to a part of their largest value.

    Strings of headers that are digests of the data are left out where the data may be rounded.
    """
    got, want = tree(got), tree(want)
    assert got.keys() == want.keys()
    assert want
    for name, path in want.items():
        if not name.endswith(WEIGHTS):
            assert got[name].read_text() == path.read_text(), name
            continue
        (tensors, strings), (wanted, same) = stored(got[name]), stored(path)
        assert {k: v for k, v in strings.items() if k not in without} == {
            k: v for k, v in same.items() if k not in without
        }, name
        assert tensors.keys() == wanted.keys(), name
        for key, tensor in wanted.items():
            largest = float(tensor.abs().max()) if rounding and tensor.numel() else 0.0
            torch.testing.assert_close(
                tensors[key],
                tensor,
                rtol=0,
                atol=rounding * largest,
                msg=lambda text, at=f"{name} {key}": f"{at}: {text}",
            )
