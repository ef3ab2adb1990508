"""A directory with a pool of adapters in it, and a way to call the command line there."""

import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from devec.cli import main
from support.adapters.cases import Variant, WithHead, make_pool, save_adapter
from support.checks.command_line import CONFIG, WEIGHTS


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def wrote(self):
        """Assert that the command did what it was asked to; return itself."""
        assert (self.code, "error: " in self.err, "Traceback" in self.err) == (0, False, False)
        return self

    def refused(self, *parts):
        """Assert that the command stopped with one message, which holds these parts."""
        assert (self.code, self.out) == (2, "")
        [message] = self.err.strip().splitlines()
        assert message.startswith("error: ")
        assert self.err.count("error: ") == 1
        for part in parts:
            assert part in message


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Call the command line in `here` and in this process, as the installed script does."""

    def call(*arguments, cwd=here):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "argv", ["devec", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Ran(stopped.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Adapters that share two directions a module, and some odd ones, all made by PEFT."""
    root = tmp_path_factory.mktemp("pool")
    make_pool(root, k=3)
    shutil.copytree(root / "a", root / "twin")
    save_adapter(root / "zero", "linear", Variant(zero=True), 1)
    full = Variant(ranks=(16,))
    for index in range(2):
        save_adapter(root / f"full{index}", "linear", full, index)
        layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(24, 30) for _ in range(3)])})
        names = ["layers.0", "layers.1", "layers.2"]
        save_adapter(root / f"deep{index}", "linear", "plain", index, layers, target_modules=names)
        fields = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
        save_adapter(root / f"head{index}", "linear", "plain", index, WithHead(), **fields)
        config = root / f"based{index}" / CONFIG
        shutil.copytree(root / "ab"[index], config.parent)
        base = {"base_model_name_or_path": f"org/base{index}"}
        config.write_text(json.dumps({**json.loads(config.read_text()), **base}))
    return root


@pytest.fixture
def here(pool, tmp_path, monkeypatch):
    """The working directory, with the pool in it, free to be written to."""
    shutil.copytree(pool, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bad(here):
    """The working directory, with broken adapters in it."""
    Path("text").mkdir()
    Path("text/file.txt").write_text("hello")
    weights = Path(shutil.copytree("b", "cut")) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    for name, change in (("nan", lambda t: t / 0), ("other", lambda t: t[[0, *range(30)]])):
        weights = Path(shutil.copytree("b", name)) / WEIGHTS
        tensors = {k: change(t) if "lora_B" in k else t for k, t in load_file(weights).items()}
        save_file(tensors, weights)
    return here
