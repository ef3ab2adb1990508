"""Train the demo pool: one small vision transformer, and one LoRA adapter for every task.

    python -m experiments.train_demo_pool [--out DIR]

The program writes the pool that the package ships (`devec/demo/pool`), in about three minutes on
one CPU core: `base` (a `ViTForImageClassification`), one PEFT directory for each task, and
`heldout.safetensors`.

Data: the test set of the UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak,
1998, CC BY 4.0), as distributed with scikit-learn: 1797 digits of 8 x 8 pixels. A fixed permutation
holds out the first 497; nothing is trained or chosen on them. Sizes, ranks, learning rates and
epochs were chosen on the last 300 of the others, after training on the first 1000.

Tasks: the same digits in the five visual domains of `devec.demo.domains`, and one unrelated task,
ten textures.

Base model: trained on every domain, but on 120 digits only. It is therefore competent in each
domain, and part of what it lacks (the variety of handwriting) is the same in all of them. It never
sees a texture.

Adapters: trained with PEFT on all 1300 training digits in one domain, rendered again in each epoch.
They contain LoRA factors only; the classifier is that of the base model. Ranks are 4 and 8, alpha
is twice the rank. Each adapter has its own seed for its initial factors and its order of images, so
adapters share only what they have learned.

Everything is seeded and runs on one thread: two runs on one machine with the same library versions
write the same bytes. On other machines rounding, and therefore the accuracies, may differ.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from devec.demo.domains import CLASSES, DOMAINS, SIZE
from devec.demo.evaluate import POOL, TASKS, accuracy, draw, heldout_sets, load_base

BASE_NAME = "devec-demo-vit"
SEED = 0
HELDOUT = 497
BASE_DIGITS = 120
BATCH = 64

Sampler = Callable[[Generator], tuple[Tensor, Tensor]]
"""Renders the images and labels of one epoch."""


@dataclass(frozen=True)
class Schedule:
    """Number of epochs, and the initial learning rate of a cosine decay to zero."""

    epochs: int
    rate: float


BASE_SCHEDULE = Schedule(epochs=150, rate=1e-3)
ADAPTER_SCHEDULE = Schedule(epochs=20, rate=2e-3)

RANKS = {"ink": 4, "chalk": 8, "sign": 8, "emboss": 8, "halftone": 4, "textures": 8}
ALPHA_PER_RANK = 2
TARGETS = ["fc1", "fc2", "o_proj", "q_proj", "v_proj"]


def main(arguments: list[str] | None = None) -> None:
    """Train the pool, write it, and print the held-out accuracy of each of its models.

    Args:
        arguments: Command line without the program's name; `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train_demo_pool", description="Train the demo pool."
    )
    parser.add_argument("--out", type=Path, default=POOL, help="directory to write the pool to")
    out = parser.parse_args(arguments).out

    torch.set_num_threads(1)
    train, heldout = load_split()
    out.mkdir(parents=True, exist_ok=True)
    save_file(heldout, out / "heldout.safetensors")
    train_base(train["digits"][:BASE_DIGITS], train["labels"][:BASE_DIGITS].long(), out)
    for task in TASKS:
        train_adapter(task, train["digits"], train["labels"].long(), out)
    report(out)


def load_split() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split scikit-learn's digits by a fixed permutation.

    Returns:
        The training set and the held-out set, each with `digits`, (n, 8, 8), uint8 in 0..16, and
        `labels`, (n,), uint8.
    """
    raw = load_digits()
    digits = torch.from_numpy(raw.images).to(torch.uint8)
    labels = torch.from_numpy(raw.target).to(torch.uint8)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(SEED))
    heldout, train = order[:HELDOUT], order[HELDOUT:]
    return (
        {"digits": digits[train], "labels": labels[train]},
        {"digits": digits[heldout], "labels": labels[heldout]},
    )


def train_base(digits: Tensor, labels: Tensor, out: Path) -> None:
    """Train the base model on digits in all domains at once, and write it to `out / "base"`.

    Args:
        digits: Raw digits, (n, 8, 8), uint8 in 0..16.
        labels: Their classes, (n,).
        out: Directory of the pool.
    """
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=6,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=CLASSES,
        initializer_range=0.1,  # about width ** -0.5; the default 0.02 is for widths near 768
    )
    model = ViTForImageClassification(config)

    def sample(generator: Generator) -> tuple[Tensor, Tensor]:
        images = torch.stack([draw(domain, digits, labels, generator)[0] for domain in DOMAINS])
        chosen = torch.randint(len(DOMAINS), (len(digits),), generator=generator)
        return images[chosen, torch.arange(len(digits))], labels

    fit(model, sample, BASE_SCHEDULE, SEED)
    model.save_pretrained(out / "base")


def train_adapter(
    task: str,
    digits: Tensor,
    labels: Tensor,
    out: Path,
    *,
    use_dora: bool = False,
    epochs: int | None = None,
) -> None:
    """Train the adapter of one task on the base model in `out`, and write it to `out / task`.

    Args:
        task: One of `TASKS`.
        digits: Raw digits, (n, 8, 8), uint8 in 0..16.
        labels: Their classes, (n,).
        out: Directory of the pool.
        use_dora: Whether to train a DoRA; the adapters of the pool are LoRAs.
        epochs: Number of epochs; by default that of the adapters of the pool.
    """
    seed = SEED + 1 + TASKS.index(task)
    torch.manual_seed(seed)
    base = load_base(out)
    base.name_or_path = BASE_NAME  # PEFT records it; a local path would mean nothing elsewhere
    config = LoraConfig(
        r=RANKS[task],
        lora_alpha=ALPHA_PER_RANK * RANKS[task],
        target_modules=TARGETS,
        use_dora=use_dora,
    )
    model = get_peft_model(base, config)
    schedule = Schedule(epochs or ADAPTER_SCHEDULE.epochs, ADAPTER_SCHEDULE.rate)
    fit(model, lambda generator: draw(task, digits, labels, generator), schedule, seed)
    config.target_modules = TARGETS  # PEFT converts it to a set, whose order varies between runs
    model.save_pretrained(out / task, save_embedding_layers=False)
    (out / task / "README.md").unlink()


def fit(model: nn.Module, sample: Sampler, schedule: Schedule, seed: int) -> None:
    """Train the trainable parameters of a model in place.

    Args:
        model: An image classifier of transformers, with or without adapters.
        sample: Renders the images and labels of one epoch.
        schedule: Number of epochs and learning rate.
        seed: Seed of the images and of their order.
    """
    generator = Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.epochs)
    model.train()
    for _ in range(schedule.epochs):
        images, labels = sample(generator)
        for batch in torch.split(torch.randperm(len(labels), generator=generator), BATCH):
            optimiser.zero_grad()
            torch.autograd.backward(cross_entropy(model(images[batch]).logits, labels[batch]))
            optimiser.step()
        decay.step()


def report(pool: Path) -> None:
    """Print the held-out accuracy of the base model and of every adapter on every task."""
    sets = heldout_sets(pool)
    print("".join(f"{name:>10}" for name in ("", *sets)))
    for name in ("base", *TASKS):
        model: nn.Module = load_base(pool)
        if name != "base":
            model = PeftModel.from_pretrained(model, pool / name)
        scores = [accuracy(model, images, labels) for images, labels in sets.values()]
        print(f"{name:>10}" + "".join(f"{score:>10.3f}" for score in scores))


if __name__ == "__main__":
    main()
