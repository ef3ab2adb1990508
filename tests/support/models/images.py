"""Images that tiny pipelines paint, and a way to paint them in a process of their own.

python -m support.models.images OUT KIND=FILE…   writes what each pipeline paints with the
adapter in a file.
"""

import sys

import numpy as np
import torch
from diffusers import AutoencoderKL

from support.models.pipelines import TOKENS, VOCABULARY, make_pipeline


def painter(kind):
    """A pipeline that paints: with an autoencoder, and the same each time."""
    pipe = make_pipeline(kind)
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
    )
    pipe.register_modules(vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd15(pipe, tokens):
    text = pipe.text_encoder(tokens).last_hidden_state
    return {"prompt_embeds": text, "guidance_scale": 1.0}


def _sdxl(pipe, tokens):
    first = pipe.text_encoder(tokens, output_hidden_states=True)
    second = pipe.text_encoder_2(tokens, output_hidden_states=True)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = second.text_embeds
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}


def _flux(pipe, tokens):
    pooled = pipe.text_encoder(tokens).pooler_output
    text = pipe.text_encoder_2(tokens).last_hidden_state
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


def _sd3(pipe, tokens):
    found = [e(tokens, output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    text = torch.cat([f.hidden_states[-2] for f in found], dim=-1)
    third = pipe.text_encoder_3(tokens).last_hidden_state
    text = torch.nn.functional.pad(text, (0, third.shape[-1] - text.shape[-1]))
    pooled = torch.cat([f.text_embeds for f in found], dim=-1)
    text = torch.cat([text, third], dim=1)
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}


PROMPTS = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "sd3": _sd3}


@torch.no_grad()
def paint(pipe, kind):
    """An image of 64 × 64 pixels, from the same prompt and noise each time."""
    tokens = torch.arange(TOKENS)[None] + 3
    tokens[:, -1] = VOCABULARY - 1
    result = pipe(
        **PROMPTS[kind](pipe, tokens),
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    )
    return result.images[0]


def main(out, *sources):
    images = {}
    for kind, _, file in (source.partition("=") for source in sources):
        pipe = painter(kind)
        folder, _, name = file.rpartition("/")
        pipe.load_lora_weights(folder, weight_name=name, adapter_name="reloaded")
        images[kind] = paint(pipe, kind)
    np.savez(out, **images)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
