"""Collect the adapters that the guides use in one directory, so that their commands can be typed.

    python docs/pool.py pool && cd pool

They come with the repository: five adapters for looks of handwritten digits and one for textures
(PEFT directories, of the demo), three styles (files of diffusers, of notebook 03) and five
behaviours of a language model (PEFT directories, of notebook 04), each with its base model.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "src" / "devec" / "demo" / "pool"
ASSETS = ROOT / "notebooks" / "assets"
STYLES, BEHAVIOURS = ASSETS / "03-styles", ASSETS / "04-behaviours"

SOURCES = {
    **{name: DEMO / name for name in ("ink", "chalk", "sign", "emboss", "halftone", "textures")},
    "devec-demo-vit": DEMO / "base",
    **{
        f"{name}.safetensors": STYLES / name / "pytorch_lora_weights.safetensors"
        for name in ("pixel", "stripes", "frame")
    },
    "pipeline": STYLES / "base",
    **{name: BEHAVIOURS / name for name in ("unwanted", "copy", "reverse", "sort", "next")},
    "behaviours-llama": BEHAVIOURS / "base",
}
"""Name in the directory → file or directory in the repository."""


def collect(directory: Path) -> None:
    """Copy all adapters and base models into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, directory / name)


if __name__ == "__main__":
    collect(Path(sys.argv[1]))
