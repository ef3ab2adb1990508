"""What a layout says about an adapter: how its modules are named, and what its files say."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from devec import Adapter
from devec.adapters.layout import About, ModuleNames
from devec.cli.inspect import inspect_command
from devec.demo.evaluate import POOL
from devec.naming.conventions import naming_of

GOLDEN = Path(__file__).parents[1] / "golden"
FLAT = ModuleNames(naming_of(["lora_unet_mid_block_attentions_0_proj_in"], None))
DOTTED = ModuleNames(naming_of(["unet.mid_block.attentions.0.proj_in"], None))


def test_names_agree_if_they_are_spelled_alike():
    assert FLAT.agree(FLAT)
    assert not FLAT.agree(DOTTED)
    assert FLAT.spelled(FLAT.naming)
    assert not FLAT.spelled(DOTTED.naming)


def test_names_of_the_base_model_agree_with_each_other_only():
    verbatim = replace(DOTTED, verbatim=True)
    assert verbatim.agree(replace(FLAT, verbatim=True))
    assert not verbatim.agree(DOTTED)
    assert not DOTTED.agree(verbatim)


def test_names_with_several_prefixes_agree_if_no_module_has_two_names():
    ids = ["unet.conv_in", "diffusion_model.conv_out"]
    names = ModuleNames(naming_of(ids, None), ids={("", id): id for id in ids})
    assert names.agree(names)
    other = {("", "unet.conv_in"): "diffusion_model.conv_in"}
    assert not names.agree(replace(names, ids=other))


@pytest.mark.parametrize("source", [POOL / "ink", GOLDEN / "kohya_sdxl.safetensors"])
def test_reports_have_the_same_keys_for_every_format(source, tmp_path):
    inspect_command(str(source), json=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    about = Adapter.from_pretrained(source).layout.about
    for field in fields(About):
        value = getattr(about, field.name)
        assert report[field.name] == (list(value) if isinstance(value, tuple) else value)
