"""The pictures of the pages are what their scripts draw now."""

import runpy

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from support.pages import DOCS

PICTURES = DOCS / "pictures"


def test_the_picture_of_the_packages_shows_the_imports():
    pytest.importorskip("grimp")
    drawn = runpy.run_path(str(PICTURES / "packages.py"))["draw"]()
    assert drawn == (PICTURES / "packages.svg").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_picture_of_the_parts_is_what_its_script_draws():
    with mpl.rc_context():
        figure = runpy.run_path(str(PICTURES / "parts.py"))["draw"]()
        figure.canvas.draw()
        drawn = np.asarray(figure.canvas.buffer_rgba())
    with Image.open(PICTURES / "parts.png") as image:
        kept = np.asarray(image.convert("RGBA"))
        drawn_by = image.info["Software"]
    assert drawn.shape == kept.shape
    apart = np.abs(drawn.astype(int) - kept.astype(int)).max(-1)
    assert apart.mean() < 2  # of 255; fonts may be drawn otherwise by another matplotlib
    if f"version{mpl.__version__}," in drawn_by:
        tall, wide = (side // 15 * 15 for side in apart.shape)
        tiles = apart[:tall, :wide].reshape(tall // 15, 15, wide // 15, 15).mean((1, 3))
        assert tiles.max() < 12
