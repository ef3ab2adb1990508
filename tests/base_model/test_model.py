"""Base models by path and by id, and when two weights are the same."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from devec.base_model.model import base_model
from devec.errors import FormatError
from support.checks.base_weights import (
    plain,
    read,
    refused,
    single,
)

CPU = torch.device("cpu")

COMMIT = "c" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub; the working directory is empty, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache, repo, name, tensor, ref="main"):
    """Put a file of one weight into the cache, as the Hub's client does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    link, blob = root / "snapshots" / COMMIT / name, root / "blobs" / "digest"
    for folder in (link.parent, blob.parent, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    single(blob, first__weight=tensor)
    link.symlink_to(blob)
    (root / "refs" / ref).write_text(COMMIT)
    return root / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("repo", "ref", "name", "asked"),
    [("user/base", "main", "model.safetensors", "user/base"),
     ("base", "main", "model.safetensors", "base"),
     ("user/base", "v2", "model.safetensors", "user/base@v2"),
     ("user/base", "v2", "model.safetensors", f"user/base@{COMMIT}"),
     ("user/base", "main", "unet/model.safetensors", "user/base/unet"),
     ("user/base", "main", "old.safetensors", "user/base/old.safetensors")],
)  # fmt: skip
def test_models_in_the_cache_of_the_hub(repo, ref, name, asked, cache):
    folder = cached(cache, repo, name, torch.randn(4, 6), ref)
    expected = load_file(folder / name)["first.weight"]
    assert torch.equal(read(asked, "first", (4, 6)), expected)
    assert COMMIT in base_model(asked).source or name.startswith("old")


def test_the_same_model_by_its_id_and_its_path_is_the_same(cache):
    folder = cached(cache, "user/base", "model.safetensors", torch.ones(4, 6))
    assert base_model("user/base") == base_model(folder)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [("user/absent", "hf download user/absent"), ("absent", "hf download absent"),
     ("user/absent@v2", "hf download user/absent --revision v2"),
     ("a path with spaces", ".safetensors")],
)  # fmt: skip
def test_what_is_neither_on_the_disk_nor_in_the_cache(asked, advice, cache):  # noqa: ARG001
    assert base_model(asked).source == asked
    refused(FormatError, asked, asked, "no such file", advice)


def test_what_is_on_the_disk_comes_before_the_cache(cache):
    cached(cache, "base", "model.safetensors", torch.ones(4, 6))
    Path("base").mkdir()
    single(Path("base/model.safetensors"), first__weight=torch.zeros(4, 6))
    assert not read("base", "first", (4, 6)).any()


def test_handles_of_the_same_weight_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6))
    one, other = (base_model(p).weight("first", (4, 6)) for p in (path, "./model.safetensors"))
    assert one.source == other.source == str(tmp_path.resolve())
    assert one == other
    assert hash(one) == hash(other)
    assert one != base_model(path).weight("second", (4, 6))
    assert one != base_model(None).weight("first", (4, 6))


def test_live_models_are_told_apart():
    one, other = plain(), plain()
    assert base_model(one) == base_model(one)
    assert base_model(one) != base_model(other)
    assert "ModuleDict" in base_model(one).source
    assert len(repr(base_model(one).weight("first", (4, 6)))) < 200


def test_a_base_model_is_taken_as_it_is(tmp_path):
    base = base_model(single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6)))
    assert base_model(base) is base
