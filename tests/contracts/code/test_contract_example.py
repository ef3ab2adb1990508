"""The example of the contract, word for word: a file of kohya's trainers and a repository."""

import pytest

import devec
from support.adapters.cases import save_kohya

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Adapters where the example looks for them: in the current directory and the Hub's cache."""
    save_kohya(tmp_path / "anime.safetensors", 0)
    repository = tmp_path / "cache" / "models--user--pixel-art-lora"
    save_kohya(repository / "snapshots" / COMMIT / "pixel-art.safetensors", 1)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_contract(pool):
    a = devec.Adapter.from_pretrained("anime.safetensors")
    b = devec.Adapter.from_pretrained("user/pixel-art-lora")
    parts = devec.decompose([a, b], threshold=0.85, method="chain")
    written = parts.unique["anime"].save_pretrained("out/anime-unique")

    assert parts.shared["anime"] + parts.unique["anime"] == a
    assert parts.common.norm() > 0
    assert set(parts.spectrum) == set(a.modules)
    assert devec.Adapter.from_pretrained(pool / written) == parts.unique["anime"]

    assert devec.combine([a, b], [1.0, -0.4]) == 1.0 * a - 0.4 * b
    assert devec.compress(a, rank=8).adapter == a
    assert devec.compress(a, energy=0.99).error <= 0.1
    assert devec.cosine(a, b) == pytest.approx(devec.inner(a, b) / (a.norm() * b.norm()))
    assert len(devec.overlap([a, b]).modules) == 4
