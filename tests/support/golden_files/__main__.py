"""Makes the golden files: one small LoRA file for every convention, the same bytes each time.

In the folder tests:

    python -m support.golden_files

Where a convention's own writer is a package, that package writes (LyCORIS, diffusers, PEFT); the
others are written by hand, key by key. Files for image models fit the pipelines of `pipelines.py`.
Every text encoder has an `out_proj` among its keys: diffusers knows them by it.
"""

from pathlib import Path

import torch
from safetensors.torch import save

from support.golden_files import hosts, kohya, lycoris, trainers  # noqa: F401  they register
from support.golden_files.writing import FILES, header_sorted
from support.paths import GOLDEN


def make(directory=GOLDEN):
    """Writes every golden file into a directory."""
    for name, tensors_and_metadata in FILES.items():
        torch.manual_seed(0)
        tensors, metadata = tensors_and_metadata()
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        data = header_sorted(save(tensors, metadata))
        (Path(directory) / f"{name}.safetensors").write_bytes(data)


if __name__ == "__main__":
    make()
