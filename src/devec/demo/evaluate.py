"""Read the demo pool and measure on it: the base, the held-out digits in every domain, accuracy."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from transformers import ViTForImageClassification

from devec.demo.domains import CLASSES, DOMAINS, textures
from devec.errors import UnsupportedError

POOL = Path(__file__).parent / "pool"
"""The pool in the package: `base`, one adapter a task, `heldout.safetensors`."""

UNRELATED = "textures"
"""The task, and the adapter, that has nothing to do with digits."""

TASKS = (*DOMAINS, UNRELATED)
"""Every task of the demo; each has an adapter of that name in the pool."""


def load_base(pool: Path = POOL) -> ViTForImageClassification:
    """Load the vision transformer that every adapter of the pool belongs to.

    Args:
        pool: directory of the pool.

    Returns:
        The base in evaluation mode, without any adapter.

    Raises:
        UnsupportedError: If transformers is too old for the names of the layers.
    """
    model = ViTForImageClassification.from_pretrained(pool / "base").eval()
    if not any(name.endswith(".q_proj") for name, _ in model.named_modules()):
        raise UnsupportedError(
            "the adapters of the demo name the layers of transformers 5.9 or newer, found "
            f"{transformers.__version__}; install a newer one"
        )
    return model


def heldout_sets(pool: Path = POOL, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw what no training has seen: the held-out digits in every domain, and new textures.

    Args:
        pool: directory of the pool.
        seed: what varies between drawings (noise, colours); the digits are always the same.

    Returns:
        For every task its images, (n, 3, SIZE, SIZE) in [-1, 1], and labels, (n,).
    """
    stored = load_file(pool / "heldout.safetensors")
    digits, labels = stored["digits"], stored["labels"].long()
    return {task: draw(task, digits, labels, Generator().manual_seed(seed)) for task in TASKS}


def draw(task: str, digits: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw one task's images from raw digits, scaled as the model reads them.

    The unrelated task takes nothing from the digits but their number.

    Args:
        task: one of `TASKS`.
        digits: raw digits, (n, 8, 8), uint8 in 0..16.
        labels: what the digits are, (n,).
        generator: source of everything that varies between drawings.

    Returns:
        Images, (n, 3, SIZE, SIZE) in [-1, 1], and labels, (n,).
    """
    if task == UNRELATED:
        surfaces = torch.randint(CLASSES, (len(digits),), generator=generator)
        return 2 * textures(surfaces, generator) - 1, surfaces
    return 2 * DOMAINS[task](digits, generator) - 1, labels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that a model classifies correctly.

    Args:
        model: an image classifier of transformers, with or without adapters.
        images: (n, 3, SIZE, SIZE) in [-1, 1].
        labels: (n,).

    Returns:
        Accuracy in [0, 1].
    """
    model.eval()
    predicted = torch.cat([model(batch).logits.argmax(-1) for batch in torch.split(images, 256)])
    return (predicted == labels).float().mean().item()
