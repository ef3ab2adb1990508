"""The demo pool's base model and held-out digits, and the accuracy of a model on them."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from transformers import ViTForImageClassification

from devec.demo.domains import CLASSES, DOMAINS, textures
from devec.errors import UnsupportedError

POOL = Path(__file__).parent / "pool"
"""The pool in the package: `base`, one adapter for each task, `heldout.safetensors`."""

UNRELATED = "textures"
"""Name of the task, and of its adapter, that is unrelated to digits."""

TASKS = (*DOMAINS, UNRELATED)
"""All tasks of the demo; the pool has an adapter of each name."""


def load_base(pool: Path = POOL) -> ViTForImageClassification:
    """The base model of the pool, in evaluation mode; needs transformers 5.9 or newer."""
    model = ViTForImageClassification.from_pretrained(pool / "base").eval()
    if not any(name.endswith(".q_proj") for name, _ in model.named_modules()):
        raise UnsupportedError(
            "the demo needs transformers 5.9 or newer, whose layer names its adapters use; found "
            f"{transformers.__version__}; upgrade it (pip install -U transformers)"
        )
    return model


def heldout_sets(pool: Path = POOL, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Render the held-out digits in every domain, and new textures.

    Args:
        pool: Directory of the pool.
        seed: Seed of noise and colours; the digits are always the same.

    Returns:
        Task → images, (n, 3, SIZE, SIZE) in [-1, 1], and labels, (n,).
    """
    stored = load_file(pool / "heldout.safetensors")
    digits, labels = stored["digits"], stored["labels"].long()
    return {task: draw(task, digits, labels, Generator().manual_seed(seed)) for task in TASKS}


def draw(task: str, digits: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Render the images of one task, scaled to the input range of the model.

    The unrelated task uses only the number of digits.

    Args:
        task: One of `TASKS`.
        digits: Raw digits, (n, 8, 8), uint8 in 0..16.
        labels: Their classes, (n,).
        generator: Source of all variation between renderings.

    Returns:
        Images, (n, 3, SIZE, SIZE) in [-1, 1], and labels, (n,).
    """
    if task == UNRELATED:
        surfaces = torch.randint(CLASSES, (len(digits),), generator=generator)
        return 2 * textures(surfaces, generator) - 1, surfaces
    return 2 * DOMAINS[task](digits, generator) - 1, labels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images, (n, 3, SIZE, SIZE) in [-1, 1], that a model classifies correctly."""
    model.eval()
    predicted = torch.cat([model(batch).logits.argmax(-1) for batch in torch.split(images, 256)])
    return (predicted == labels).float().mean().item()
