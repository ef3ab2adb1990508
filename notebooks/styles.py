"""The small Stable Diffusion and the three style LoRAs of notebook 03, and their training.

    python notebooks/styles.py

The program trains everything again, in about twenty minutes on one CPU core, and writes it to
`notebooks/assets/03-styles`: `base` (a `StableDiffusionPipeline` in half precision), a folder with
`pytorch_lora_weights.safetensors` for each style, and `judge.safetensors`.

Data: the 1797 handwritten digits of scikit-learn, 8 x 8 pixels, rendered at 24 x 24 in colour. A
look is a set of ingredients. A style has two: night, which all styles share, and one of its own. A
fixed permutation splits the digits: 1000 for the diffusion models, 500 for the judge, 297 to test
the judge.

Autoencoder: trained on all ingredients, as the autoencoder of a real model has seen everything.
Base model: text encoder and UNet, trained on digits on plain paper and, in equal numbers, at night;
the prompt "a photo of a seven" stands for both. It has not seen the styles' own ingredients. (A
base model trained on plain paper only was tried first; digits of its styles were not readable.)
Styles: LoRAs on the UNet, trained with PEFT on digits in that style, with the same prompts.
Judge: a small convolutional network that classifies the digit and the ingredients of an image.

Everything is seeded and runs on one thread. Other versions and machines round differently.
"""

import itertools
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from style_models import SIZE, TOKENS, WORDS, make_pipeline
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate
from transformers.utils import logging as transformers_logging

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()

ASSETS = Path(__file__).parent / "assets" / "03-styles"

INGREDIENTS = ("night", "pixel", "stripes", "frame")

STYLES = {name: ("night", name) for name in INGREDIENTS[1:]}
"""Name of a style → its ingredients: night, and one of its own."""

BASE = ((), ("night",))
"""The looks of the base model: plain paper, and night."""

SPLIT = {"generate": slice(0, 1000), "judge": slice(1000, 1500), "test": slice(1500, 1797)}
BATCH = 64
DRAWN = 64  # number of batches of images that are encoded once, to train a denoiser on
GUIDANCE = 2.0

RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


# Images


def digits(part: str) -> tuple[Tensor, Tensor]:
    """The raw digits (n, 8, 8) in [0, 1] and the labels of one part of the data."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=seeded(0))[SPLIT[part]]
    return torch.tensor(data.images).float()[order] / 16, torch.tensor(data.target)[order]


def render(raw: Tensor, ingredients: Collection[str], generator: Generator) -> Tensor:
    """Render digits with some of `INGREDIENTS`; the rest is as on plain paper.

    Args:
        raw: Digits, (n, 8, 8), in [0, 1].
        ingredients: Names of the ingredients.
        generator: Source of the colours and of the phase of the stripes.

    Returns:
        Images, (n, 3, SIZE, SIZE), in [0, 1].
    """

    def jitter(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(len(raw), *(shape or (3, 1, 1)), generator=generator)
        return low + (high - low) * drawn

    if "night" in ingredients:
        paper = torch.tensor([0.06, 0.06, 0.24]).view(3, 1, 1) + jitter(-0.05, 0.05)
        ink = torch.tensor([0.97, 0.88, 0.55]).view(3, 1, 1) + jitter(-0.05, 0.05)
    else:
        paper, ink = jitter(0.8, 1.0), jitter(0.0, 0.35)
    rows, columns = torch.arange(SIZE).view(-1, 1), torch.arange(SIZE)
    if "stripes" in ingredients:
        wave = torch.cos(math.pi / 3 * (rows + columns) + jitter(0.0, 2 * math.pi, 1, 1, 1))
        paper = paper + (0.55 - paper) * torch.sigmoid(4 * wave)
    strokes = raw.unsqueeze(1)
    if "pixel" in ingredients:
        strokes = (interpolate(strokes, SIZE, mode="nearest") > 0.4).float()
    else:
        strokes = interpolate(strokes, SIZE, mode="bicubic").clamp(0, 1)
    images = paper + (ink - paper) * strokes
    if "frame" in ingredients:
        colour = torch.tensor([0.92, 0.42, 0.12]).view(3, 1, 1) + jitter(-0.08, 0.08)
        edge = torch.minimum(rows, columns).minimum(SIZE - 1 - torch.maximum(rows, columns))
        images = torch.where(edge < 2, colour, images)
    return images.clamp(0, 1)


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def batches(
    part: str, steps: int, looks: Sequence[Collection[str]] | None, generator: Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of digits with equal numbers of each look; of sixteen random looks if None.

    Yields:
        Images (n, 3, SIZE, SIZE), labels (n,) and marks (n, 4), which are 1 for ingredients of the
        image.
    """
    raw, labels = digits(part)
    for _ in range(steps):
        chosen = torch.randint(len(raw), (BATCH,), generator=generator)
        if looks is None:
            marks = torch.randint(2, (16, len(INGREDIENTS)), generator=generator)
        else:
            marks = torch.tensor([[name in look for name in INGREDIENTS] for look in looks])
        images = [
            render(raw[share], list(itertools.compress(INGREDIENTS, mark)), generator)
            for share, mark in zip(chosen.chunk(len(marks)), marks.tolist(), strict=True)
        ]
        marks = marks.float().repeat_interleave(BATCH // len(marks), dim=0)
        yield torch.cat(images), labels[chosen], marks


# The base


def descend(parameters: list[nn.Parameter], rate: float, losses: Iterator[Tensor], steps: int):
    """Train with AdamW and a cosine decay of the learning rate; print the loss ten times."""
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recent, start = 0.0, time.perf_counter()
    for step, loss in enumerate(losses, 1):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item() * 10 / steps
        if step % (steps // 10) == 0:
            seconds = time.perf_counter() - start
            print(f"  step {step:5d}  loss {recent:.4f}  {seconds:.0f} s", flush=True)
            recent = 0.0


def train_autoencoder(vae: AutoencoderKL, steps: int = 1000, rate: float = 3e-3) -> None:
    """Train the autoencoder on all ingredients, and set the scaling factor of its latents."""

    def losses() -> Iterator[Tensor]:
        noise = seeded(2)
        for images, _, _ in batches("generate", steps, None, seeded(1)):
            posterior = vae.encode(2 * images - 1).latent_dist
            decoded = vae.decode(posterior.sample(noise)).sample
            error = decoded - (2 * images - 1)
            yield error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()

    descend(list(vae.parameters()), rate, losses(), steps)
    images = next(batches("generate", 1, None, seeded(3)))[0]
    with torch.no_grad():
        spread = vae.encode(2 * images - 1).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=1 / spread.item())


def prompts(labels: Tensor) -> list[str]:
    return [f"a photo of a {WORDS[label]}" for label in labels]


def denoising_losses(
    pipe: StableDiffusionPipeline,
    looks: Sequence[Collection[str]],
    steps: int,
    generator: Generator,
) -> Iterator[Tensor]:
    """The losses of the UNet on batches of digits in these looks; a tenth of the prompts is empty.

    Yields:
        The loss of one batch.
    """
    drawn = list(batches("generate", DRAWN, looks, generator))
    labels = torch.cat([labels for _, labels, _ in drawn])
    with torch.no_grad():
        encoded = [pipe.vae.encode(2 * images - 1).latent_dist.mean for images, _, _ in drawn]
    latents = torch.cat(encoded) * pipe.vae.config.scaling_factor
    texts = ["", *prompts(torch.arange(len(WORDS)))]
    padding = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    tokens = pipe.tokenizer(texts, **padding).input_ids
    for _ in range(steps):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        told = torch.rand(BATCH, generator=generator) > 0.1
        text = pipe.text_encoder(tokens)[0][(labels[chosen] + 1) * told]
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = torch.randint(1000, (BATCH,), generator=generator)
        noisy = pipe.scheduler.add_noise(latents[chosen], noise, times)
        velocity = pipe.scheduler.get_velocity(latents[chosen], noise, times)
        yield (pipe.unet(noisy, times, text).sample - velocity).square().mean()


def train_base(pipe: StableDiffusionPipeline, steps: int = 3000, rate: float = 2e-3) -> None:
    """Train the text encoder and the UNet on the looks of the base model."""
    parameters = [*pipe.text_encoder.parameters(), *pipe.unet.parameters()]
    descend(parameters, rate, denoising_losses(pipe, BASE, steps, seeded(4)), steps)


# The styles


def train_style(pipe: StableDiffusionPipeline, name: str, steps: int = 600, rate: float = 2e-3):
    """Train and write a LoRA on the UNet of the pipeline, and remove it from the pipeline again."""
    seed = 10 + list(STYLES).index(name)
    torch.manual_seed(seed)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=name
    )
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    descend(parameters, rate, denoising_losses(pipe, [STYLES[name]], steps, seeded(seed)), steps)
    factors = get_peft_model_state_dict(pipe.unet, adapter_name=name)
    layers = {key: value.half() for key, value in convert_state_dict_to_diffusers(factors).items()}
    pipe.save_lora_weights(ASSETS / name, unet_lora_layers=layers)
    pipe.unet.delete_adapters(name)


# The judge


class Judge(nn.Module):
    """Classifies the digit and the ingredients of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        self.answer = nn.Linear(16 * (SIZE // 4) ** 2, len(WORDS) + len(INGREDIENTS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, 10) of the digits and (n, 4) of the ingredients of images in [0, 1]."""
        answers = self.answer(self.features(2 * images - 1))
        return answers[:, : len(WORDS)], answers[:, len(WORDS) :]


@torch.no_grad()
def through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images encoded and decoded by the autoencoder: the best that the pipeline could generate."""
    decoded = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def train_judge(vae: AutoencoderKL, steps: int = 1000, rate: float = 2e-3) -> Judge:
    """Train the judge on digits that the diffusion models have not seen."""
    torch.manual_seed(20)
    judge = Judge()

    def losses() -> Iterator[Tensor]:
        for images, labels, marks in batches("judge", steps, None, seeded(20)):
            digit, ingredients = judge(through(vae, images))
            right = cross_entropy(digit, labels)
            yield right + binary_cross_entropy_with_logits(ingredients, marks)

    descend(list(judge.parameters()), rate, losses(), steps)
    return judge.eval()


# Loading and generating


def load_pipeline() -> StableDiffusionPipeline:
    """The base pipeline in single precision, without progress bars."""
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "base").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(ASSETS / "judge.safetensors"))
    return judge.eval()


def generate(pipe: StableDiffusionPipeline, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Generate images (count, 3, SIZE, SIZE) in [0, 1] of the digits 0, 1, ..., 9, 0, ....

    Returns:
        The images and their labels.
    """
    labels = torch.arange(count) % len(WORDS)
    images = pipe(
        prompts(labels),
        height=SIZE,
        width=SIZE,
        num_inference_steps=8,
        guidance_scale=GUIDANCE,
        generator=seeded(seed),
        output_type="pt",
    ).images
    return images, labels


def main() -> None:
    """Train and write everything."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = make_pipeline()
    print("autoencoder")
    train_autoencoder(pipe.vae)
    print("base")
    train_base(pipe)
    pipe.to(torch.float16).save_pretrained(ASSETS / "base")
    pipe = load_pipeline()
    for name in STYLES:
        print(name)
        train_style(pipe, name)
    print("judge")
    judge = train_judge(pipe.vae)
    save_file(judge.half().state_dict(), ASSETS / "judge.safetensors")


if __name__ == "__main__":
    main()
