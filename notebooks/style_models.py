"""The models of the small Stable Diffusion of notebook 03, with random weights."""

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 24
"""Height and width of every image in pixels, three times those of the raw 8 x 8 digits."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TOKENS = 8


def make_pipeline() -> StableDiffusionPipeline:
    """The pipeline with random weights."""
    tokenizer = make_tokenizer()
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=make_autoencoder(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer with the words of the prompts and their letters as vocabulary."""
    words = ["a", "photo", "of", *WORDS]
    letters = sorted(set("".join(words)))
    pieces = {piece: None for letter in letters for piece in (letter, f"{letter}</w>")}
    merges = []
    for word in words:
        ends = [*(word[:n] for n in range(1, len(word))), f"{word}</w>"]
        rest = [*word[1:-1], f"{word[-1]}</w>"][: len(word) - 1]
        merges += zip(ends, rest, strict=False)
        pieces |= dict.fromkeys(ends)
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *special])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=TOKENS
    )


def make_autoencoder() -> AutoencoderKL:
    """The autoencoder, whose latents are 6 x 6 with 8 channels."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=8,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder: one layer of width 32."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """The UNet: one block down and one up."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
