"""Pools as directories of PEFT and as files of kohya's trainers."""

import shutil

import pytest

from support.adapters.cases import make_pool, save_kohya


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of each kind of input, never changed."""
    root = tmp_path_factory.mktemp("made")
    for index, name in enumerate("ab"):
        save_kohya(root / "kohya" / f"{name}.safetensors", index)
    make_pool(root / "peft")
    return root


@pytest.fixture(params=["peft", "kohya"])
def pool(made, tmp_path, request):
    """Inputs that may be spoiled."""
    shutil.copytree(made / request.param, tmp_path / "in")
    return sorted((tmp_path / "in").iterdir())


@pytest.fixture
def plain(made, tmp_path):
    """The inputs of PEFT alone."""
    shutil.copytree(made / "peft", tmp_path / "in")
    return sorted((tmp_path / "in").iterdir())
