"""The demo pool is what it is said to be, and the demo measures it."""

from pathlib import Path

import pytest
import torch
from experiments import train_demo_pool as train
from safetensors.torch import load_file

from devec import Adapter, combine
from devec.demo.domains import DOMAINS, SIZE
from devec.demo.evaluate import POOL, TASKS, accuracy, heldout_sets, load_base
from devec.demo.run import loaded, run
from devec.errors import UnsupportedError

pytestmark = pytest.mark.slow

try:
    load_base()
except UnsupportedError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run(out)


def test_the_pool_is_small_and_diverse():
    assert sum(f.stat().st_size for f in POOL.rglob("*") if f.is_file()) <= 3_000_000
    adapters = [Adapter.from_pretrained(POOL / task) for task in TASKS]
    deltas = [next(iter(a.modules.values())) for a in adapters]
    assert len(DOMAINS) >= 4
    assert len({d.rank for d in deltas}) > 1
    assert all(d.scaling != 1 for d in deltas)
    assert not any(a.carried for a in adapters)


def test_heldout_digits_are_those_the_training_set_aside():
    training, heldout = train.load_split()
    stored = load_file(POOL / "heldout.safetensors")
    assert torch.equal(stored["digits"], heldout["digits"])
    assert torch.equal(stored["labels"], heldout["labels"])
    assert len(training["digits"]) + len(heldout["digits"]) == 1797


@pytest.mark.parametrize("task", TASKS)
def test_images_are_drawn_the_same_each_time(task):
    (images, labels), (again, _) = heldout_sets()[task], heldout_sets()[task]
    assert images.shape == (497, 3, SIZE, SIZE)
    assert torch.equal(images, again)
    assert (images.abs() <= 1).all()
    assert set(labels.tolist()) == set(range(10))


def test_every_adapter_helps_in_its_own_domain(found):
    _, demo = found
    for measured in demo.own.values():
        assert measured["original"] > measured["base"] + 0.1


def test_the_plain_sum_lies_between_base_and_single_adapters(found):
    _, demo = found
    base = sum(m["base"] for m in demo.own.values()) / len(demo.own)
    single = sum(m["original"] for m in demo.own.values()) / len(demo.own)
    best = max(measured["original"] for measured in demo.sums.values())
    assert base + 0.04 < best < single - 0.04


def test_parts_are_written_and_read_back_by_peft(found):
    out, demo = found
    for name in demo.parts.outputs():
        assert (out / name / "adapter_model.safetensors").exists()
    assert demo.parts.shared["sign"] + demo.parts.unique["sign"] == Adapter.from_pretrained(
        POOL / "sign"
    )


@torch.no_grad()
def test_a_sum_written_as_one_adapter_does_what_its_terms_do_together(tmp_path):
    terms = [Adapter.from_pretrained(POOL / name) for name in ("ink", "sign")]
    combine(terms, [1.0, 1.0]).save_pretrained(tmp_path / "sum")
    model = loaded({"ink": POOL / "ink", "sign": POOL / "sign", "sum": tmp_path / "sum"})
    images, _ = heldout_sets()["ink"]
    model.base_model.set_adapter(["ink", "sign"])
    together = model(images[:32]).logits
    model.base_model.set_adapter("sum")
    torch.testing.assert_close(model(images[:32]).logits, together, rtol=1e-4, atol=1e-4)


def test_training_is_reproducible(tmp_path, monkeypatch):
    """Two short trainings from the same seed give the same bytes."""
    monkeypatch.setattr(train, "BASE_SCHEDULE", train.Schedule(epochs=2, rate=1e-3))
    monkeypatch.setattr(train, "ADAPTER_SCHEDULE", train.Schedule(epochs=1, rate=1e-3))
    monkeypatch.setattr(train, "TASKS", ("ink", "textures"))
    threads = torch.get_num_threads()
    for run_name in ("one", "two"):
        train.main(["--out", str(tmp_path / run_name)])
    torch.set_num_threads(threads)
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert Path("ink/adapter_model.safetensors") in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_base_without_adapters_is_above_chance():
    images, labels = heldout_sets()["ink"]
    assert accuracy(load_base(), images, labels) > 0.4
