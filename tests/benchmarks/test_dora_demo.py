"""DoRAs of the demo, trained for a moment: what devec writes is exact, PEFT's sums are not."""

import pytest
import torch
from benchmarks import dora_demo

from devec.demo.evaluate import load_base
from devec.errors import UnsupportedError

pytestmark = pytest.mark.slow

try:
    load_base()
except UnsupportedError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def tables():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora_demo, "PAIR_WEIGHTS", ((1.0, 1.0), (1.0, -0.5)))
        patch.setattr(dora_demo, "COEFFICIENTS", (0.3,))
        patch.setattr(dora_demo, "NEGATIONS", (-1.0,))
        found = dora_demo.measure(epochs=2, images=16)
    torch.set_num_threads(threads)
    return found


def errors(tables, what, quantity):
    return [row[quantity] for row in tables["errors"] if row["what"] == what]


def test_the_dense_truth_is_what_peft_computes(tables):
    assert len(errors(tables, "one DoRA by itself", "weights")) == 3
    assert max(errors(tables, "one DoRA by itself", "weights")) < 1e-12


@pytest.mark.parametrize(
    ("what", "count"), [("`devec.combine`", 6), ("unique, then shared part", 3)]
)
def test_what_devec_writes_is_exact(tables, what, count):
    assert len(errors(tables, what, "weights")) == count
    assert max(errors(tables, what, "weights")) <= 1e-6
    assert max(errors(tables, what, "logits")) <= 1e-5


@pytest.mark.parametrize("way", dora_demo.PEFT_TYPES)
def test_sums_of_peft_are_wrong(tables, way):
    assert len(errors(tables, f"PEFT's `{way}`", "weights")) == 6
    assert min(errors(tables, f"PEFT's `{way}`", "weights")) > 0.01
    assert min(errors(tables, f"PEFT's `{way}`", "logits")) > 0.01


@pytest.mark.parametrize("what", ["both active in PEFT", "shared, then unique part"])
def test_two_adapters_at_once_are_a_chain(tables, what):
    assert len(errors(tables, what, "weights")) == 3
    assert min(errors(tables, what, "weights")) > 1e-3


def test_every_part_is_measured(tables):
    assert len(tables["own"]) == 3
    assert all(0 <= row[kind] <= 1 for row in tables["own"] for kind in ("base", "original"))
    assert [row["coefficient"] for row in tables["sums"]] == [0.3]
    assert [row["weight"] for row in tables["negations"]] == 3 * [0.0, -1.0, -1.0]


def test_json_holds_what_is_printed(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dora_demo, "measure", lambda _: tables)
    dora_demo.main(["--epochs", "1", "--json", str(tmp_path / "found.json")])
    assert '"what": "PEFT\'s `cat`"' in (tmp_path / "found.json").read_text()
    printed = capsys.readouterr().out
    assert printed.count("| PEFT's `cat` |") == 2
