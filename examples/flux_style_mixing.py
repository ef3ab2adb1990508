r"""Style mixing with FLUX.1-schnell: the sum of style LoRAs, and the sum of their unique parts.

    python examples/flux_style_mixing.py --prompt "pixel art of a witch, anime style" \
        --lora anime=anime.safetensors --lora pixel=user/pixel-art-lora --weights 1.0,0.8 \
        --out out/flux

The script loads two or more LoRAs into one pipeline. Each LoRA is a file or a repository on the
Hugging Face Hub (user/repo, or user/repo/file.safetensors). The script splits the LoRAs into shared
and unique parts and generates images of one prompt from the same noise: with each style alone, and
with all of them at once. --out receives a PNG for each, named after the active adapters, and
grid.png: the originals in the upper row, the unique parts in the lower row, the mixtures on the
right.

FLUX.1-schnell in bfloat16 takes about 35 GB of GPU memory. To run the script in seconds on any
machine, with a tiny pipeline and LoRAs of random weights, which generate noise:

    python examples/flux_style_mixing.py --tiny --out out/flux-tiny

Reference: Damirchi et al. 2025, arXiv 2512.22511, §4.2.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import devec

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from PIL.Image import Image


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, and refuse inconsistent arguments before anything is loaded."""
    parser = argparse.ArgumentParser(description="Mix styles: original LoRAs and unique parts.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-schnell", help="a FLUX model")
    parser.add_argument("--lora", action="append", default=[], type=named, metavar="NAME=PATH")
    parser.add_argument("--prompt", default="pixel art of a lighthouse in a storm, anime style")
    parser.add_argument("--weights", type=numbers, metavar="W,W,...", help="default: 1 for each")
    parser.add_argument("--threshold", default=0.85, type=threshold, metavar="T", help="or 'auto'")
    parser.add_argument("--method", default="chain", choices=("chain", "mean", "principal"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--steps", default=4, type=int)
    parser.add_argument("--guidance", default=0.0, type=float, help="0 for schnell, 3.5 for dev")
    parser.add_argument("--size", default=1024, type=int, help="width and height of the images")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty")
    parser.add_argument("--tiny", action="store_true", help="a tiny random pipeline and LoRAs")
    args = parser.parse_args()
    if args.tiny:
        args.lora = [("anime", ""), ("pixel", "")]
        args.device, args.dtype, args.size = "cpu", "float32", 64
    names = [name for name, _ in args.lora]
    args.weights = args.weights or [1.0] * len(names)
    if len(set(names)) < max(2, len(names)):
        parser.error(f"--lora is needed twice or more, with different names; got {names}")
    if len(args.weights) != len(names):
        parser.error(f"--weights needs {len(names)} numbers, one per LoRA; got {args.weights}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty directory; choose another")
    return args


def named(text: str) -> tuple[str, str]:
    """Parse NAME=PATH."""
    name, _, path = text.partition("=")
    if not (name.isidentifier() and path):
        raise argparse.ArgumentTypeError(
            f"expected NAME=PATH, with a name such as pixel_art; got {text!r}"
        )
    on_the_hub = path.count("/") >= 1 and not path.startswith((".", "/", "~"))
    if not Path(path).exists() and not on_the_hub:
        raise argparse.ArgumentTypeError(f"no such file or directory: {path!r}")
    return name, path


def numbers(text: str) -> list[float]:
    """Parse numbers that are separated by commas."""
    try:
        values = [float(number) for number in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}")
    return values


def threshold(text: str) -> float | str:
    """Parse a number in (0, 1], or the word auto."""
    if text == "auto":
        return text
    if re.fullmatch(r"[0-9.e-]+", text) and 0 < float(text) <= 1:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in (0, 1] or 'auto', got {text!r}")


def load_pipeline(args: argparse.Namespace) -> FluxPipeline:
    """Load the pipeline and all LoRAs with diffusers."""
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    for name, path in args.lora:
        if path.count("/") > 1 and not Path(path).exists():  # a file of a repository on the Hub
            user, repository, file = path.split("/", 2)
            pipe.load_lora_weights(f"{user}/{repository}", weight_name=file, adapter_name=name)
        else:
            pipe.load_lora_weights(path, adapter_name=name)
    return pipe.to(args.device)


def report(parts: devec.Decomposition, names: Sequence[str]) -> None:
    """Print how much of each style is shared."""
    sharing = [split for split in parts.splits if split.shared_rank]
    rank = sum(split.shared_rank for split in sharing)
    print(f"{rank} shared directions, in {len(sharing)} of {len(parts.splits)} modules")
    for index, name in enumerate(names):
        shared = sum(split.shared_norms[index] ** 2 for split in sharing)
        total = sum(norm**2 for norm in parts.norms[name].values())
        print(f"{name}: {shared / total:.1%} of the squared norm is shared, the rest unique")


def paint(pipe: FluxPipeline, args: argparse.Namespace, weights: Mapping[str, float]) -> Image:
    """An image of the prompt with these adapters active, always from the same noise."""
    import torch

    pipe.set_adapters(list(weights), list(weights.values()))
    return pipe(
        args.prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        height=args.size,
        width=args.size,
        max_sequence_length=256,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]


def draw_grid(rows: Sequence[Mapping[str, Image]]) -> Image:
    """A grid of images with their names above them."""
    from PIL import Image, ImageDraw

    size = next(iter(rows[0].values())).width
    height = size + size // 8
    grid = Image.new("RGB", (size * len(rows[0]), height * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for y, row in enumerate(rows):
        for x, (name, image) in enumerate(row.items()):
            draw.text((size * x, height * y), name, fill="black", font_size=size // 12)
            grid.paste(image, (size * x, height * y + size // 8))
    return grid


def main(args: argparse.Namespace) -> None:
    """Load, decompose, and generate the images."""
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            args.model, args.lora = make_tiny(Path(folder))
        pipe = load_pipeline(args)
    names = [name for name, _ in args.lora]
    parts = devec.decompose_adapters(pipe, names, threshold=args.threshold, method=args.method)
    if empty := [name for name in names if f"{name}-unique" not in parts.outputs()]:
        raise devec.DevecError(f"nothing is unique to {', '.join(empty)}: leave a style out")
    report(parts, names)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row, suffix in (("originals", ""), ("uniques", "_unique")):
        weights = {name + suffix: w for name, w in zip(names, args.weights, strict=True)}
        images = {name: paint(pipe, args, {name: w}) for name, w in weights.items()}
        rows.append({**images, f"{row}-mixed": paint(pipe, args, weights)})
        for name, image in rows[-1].items():
            image.save(args.out / f"{name}.png")
    draw_grid(rows).save(args.out / "grid.png")
    print(f"written to {args.out}: grid.png, {', '.join(f'{n}.png' for r in rows for n in r)}")


def make_tiny(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """A tiny FLUX pipeline and two LoRAs with random weights.

    Half of the columns of B are the same in both LoRAs, so two directions of four are shared.

    Returns:
        The directory of the pipeline, and name and file of each LoRA.
    """
    import torch
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "flux")
    transformer = pipe.transformer
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    common = {name: torch.randn(32, 2) for name, _ in transformer.named_modules()}
    loras = []
    for name in ("anime", "pixel"):
        transformer.add_adapter(config, adapter_name=name)
        for key, module in transformer.named_modules():
            if key.endswith(f"lora_B.{name}"):
                module.weight.data = torch.randn_like(module.weight)
                module.weight.data[:, :2] = common[key.partition(".lora_B")[0]]
        weights = get_peft_model_state_dict(transformer, adapter_name=name)
        FluxPipeline.save_lora_weights(folder / name, transformer_lora_layers=weights)
        loras.append((name, str(folder / name / "pytorch_lora_weights.safetensors")))
    return str(folder / "flux"), loras


def tiny_pipeline() -> FluxPipeline:
    """A FLUX pipeline of tiny models with random weights."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        **tiny_text_encoders(),
    )


def tiny_text_encoders() -> dict[str, Any]:
    """The text encoders and tokenizers of a FLUX pipeline, tiny and with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    words = {"<end>": 0, "pixel": 1, "art": 2, "anime": 3, "style": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<end>", "unk_token": "<end>", "eos_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=0,
        pad_token_id=0,
    )
    t5 = T5Config(vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return {
        "text_encoder": CLIPTextModel(clip),
        "tokenizer": fast,
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer_2": fast,
    }


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        main(arguments)
    except devec.DevecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
