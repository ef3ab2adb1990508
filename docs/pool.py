"""Collect the adapters that the guides use in one directory, so that their commands can be typed.

    python docs/pool.py pool && cd pool

They come with the repository: five adapters for looks of handwritten digits and one for textures
(PEFT directories, of the demo), three styles (files of diffusers, of notebook 03) and five
behaviours of a language model (PEFT directories, of notebook 04), each with its base model. Two of
the behaviours are there as DoRAs, too.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

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

DORAS = ("unwanted", "copy")
"""LoRAs that are there as `NAME-dora`, too."""


def save_dora(lora: Path, base: Path, directory: Path) -> None:
    """Write the DoRA with the factors of a LoRA and the magnitudes of its base model."""
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(lora / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        weight = weights[f"{layer.removeprefix('base_model.model.')}.weight"].float()
        tensors[f"{layer}.lora_magnitude_vector"] = weight.norm(dim=1)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps({**config, "use_dora": True}, indent=2) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def collect(directory: Path) -> None:
    """Copy all adapters and base models into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        if source.is_dir():
            shutil.copytree(source, directory / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, directory / name)
    for name in DORAS:
        save_dora(BEHAVIOURS / name, BEHAVIOURS / "base", directory / f"{name}-dora")


if __name__ == "__main__":
    collect(Path(sys.argv[1]))
