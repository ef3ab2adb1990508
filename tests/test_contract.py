"""The example of the contract, word for word, on PEFT adapters."""

import pytest
from cases import save_adapter

import devec


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Adapters under the names that the example reads."""
    save_adapter(tmp_path / "anime.safetensors", "linear", "plain", 0)
    save_adapter(tmp_path / "user" / "pixel-art-lora", "linear", "plain", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_of_the_contract(pool):
    a = devec.Adapter.from_pretrained("anime.safetensors")
    b = devec.Adapter.from_pretrained("user/pixel-art-lora")
    parts = devec.decompose([a, b], threshold=0.85, method="chain")
    parts.unique["anime"].save_pretrained("out/anime-unique")

    assert parts.shared["anime"] + parts.unique["anime"] == a
    assert parts.common.norm() > 0
    assert set(parts.spectrum) == set(a.modules)
    assert devec.Adapter.from_pretrained(pool / "out/anime-unique") == parts.unique["anime"]

    assert devec.combine([a, b], [1.0, -0.4]) == 1.0 * a - 0.4 * b
    assert devec.compress(a, rank=8).adapter == a
    assert devec.compress(a, energy=0.99).error <= 0.1
    assert devec.cosine(a, b) == pytest.approx(devec.inner(a, b) / (a.norm() * b.norm()))
    assert len(devec.overlap([a, b]).modules) == 2
