"""Outputs say what they are and where they came from."""

import dataclasses
import hashlib
import json

import pytest

from devec import Adapter, __version__, combine, compress, decompose, save_adapters
from devec.formats.card import adapter_name
from support.adapters.cases import make_pool, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def written(tmp_path):
    adapters = [Adapter.from_pretrained(p) for p in make_pool(tmp_path)]
    adapters = [dataclasses.replace(a, layout=a.layout.rebased("org/model")) for a in adapters]
    save_adapters({tmp_path / n: a for n, a in decompose(adapters).outputs().items()})
    return tmp_path, adapters


def test_the_record_names_inputs_operation_parameters_and_version(written):
    directory, adapters = written
    record = json.loads((directory / "a-unique/devec.json").read_text())
    assert record["devec_version"] == __version__
    assert record["operation"] == "decompose"
    assert record["parameters"]["threshold"] == 0.85
    assert record["inputs"] == [{"name": a.name, "sha256": a.sha256} for a in adapters]
    assert (record["part"], record["of"]) == ("unique", "a")
    common = json.loads((directory / "common/devec.json").read_text())
    assert (common["part"], common["of"]) == ("common", ["a", "b"])


def test_the_card_has_the_metadata_of_the_hub(written):
    directory, _ = written
    card = (directory / "a-shared/README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: peft" in head
    assert 'base_model: "org/model"' in head
    assert '- "base_model:adapter:org/model"' in head
    assert "- lora" in head
    assert 'adapter_name="a_shared"' in card


def test_records_of_operations_on_results_hold_those_of_the_results(written, tmp_path):
    _, adapters = written
    parts = decompose(adapters)
    difference = combine([parts.unique["a"], adapters[1]], [1.0, -0.5])
    small = compress(difference, rank=3)
    small.adapter.save_pretrained(tmp_path / "small")
    record = json.loads((tmp_path / "small/devec.json").read_text())
    assert record["parameters"]["relative_error"] == small.error > 0
    (made,) = record["inputs"]
    assert made["made_by"]["operation"] == "combine"
    assert made["made_by"]["inputs"][0]["made_by"]["part"] == "unique"
    assert made["made_by"]["inputs"][1] == {"name": "b", "sha256": adapters[1].sha256}


def test_the_digest_is_that_of_the_file(tmp_path):
    path = save_adapter(tmp_path / "a", "linear", "plain", 0)
    one = Adapter.from_pretrained(path).sha256
    assert one == hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "wanted"), [("a-unique", "a_unique"), ("v1.5+x", "v1_5_x"), ("shared", "shared_part")]
)
def test_names_for_adapters_are_ones_that_hosts_accept(name, wanted):
    assert adapter_name(name) == wanted
