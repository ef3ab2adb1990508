"""Pictures show the numbers they are drawn from."""

import matplotlib
import pytest
import torch

from devec import Adapter, Delta, decompose, overlap
from devec.plots import plot_overlap, plot_spectra

matplotlib.use("Agg")


@pytest.fixture
def adapters():
    g = torch.Generator().manual_seed(0)
    common = torch.randn(40, 2, generator=g)
    return [
        Adapter(
            name,
            {
                "q": Delta(
                    torch.cat([common, torch.randn(40, 2, generator=g)], 1),
                    torch.randn(4, 20, generator=g),
                )
            },
        )
        for name in "abc"
    ]


def test_overlap_matrix(adapters):
    found = overlap(adapters)
    axes = plot_overlap(found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {f"{row.largest:.2f}\n({row.edge:.2f})" for row in found.modules}


def test_spectra(adapters):
    splits = decompose(adapters, method="mean").splits
    axes = plot_spectra(splits)
    drawn = [y for _, y in axes.collections[0].get_offsets()]
    assert drawn == pytest.approx(splits[0].spectrum[: splits[0].shared_rank].tolist())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q"]
