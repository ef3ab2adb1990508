"""Makes the golden files: one small LoRA file for every convention, the same bytes each time.

    python tests/golden/make.py

Where a convention's own writer is a package, that package writes (LyCORIS, diffusers, PEFT); the
others are written by hand, key by key. Files for image models fit the pipelines of `pipelines.py`.
Every text encoder has an `out_proj` among its keys: diffusers knows them by it.
"""

import hashlib
import json
import logging
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from torch.nn.functional import conv2d, linear

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from lycoris.wrapper import LycorisNetwork  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save  # noqa: E402

from support.models.pipelines import find_modules, make_pipeline  # noqa: E402
from support.truth.golden_truth import dense_truth  # noqa: E402

FILES = {}
KOHYA = (".lora_up.weight", ".lora_down.weight")
PEFT = (".lora_B.weight", ".lora_A.weight")


def golden(function):
    """Registers what makes the file of the function's name: it returns tensors and metadata."""
    FILES[function.__name__] = function
    return function


# Writing


def header_sorted(data):
    """The same file with its header's keys in order; safetensors writes metadata in any order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read(path):
    """Tensors and metadata of a file."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def seeded(name):
    """A generator that belongs to a name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def draw(name, *shape):
    """Normal numbers that belong to a name."""
    return torch.randn(shape, generator=seeded(name))


def factors(name, shape, rank):
    """Up and down for a weight of a shape; the effect is about half as large as the weight."""
    rows, columns, *kernel = shape
    down = draw(name + " down", rank, columns, *kernel) / (columns * rank) ** 0.5
    up = draw(name + " up", rows, rank, *(1 for _ in kernel)) / 2
    return up, down


def shape_in(pipeline, module_id):
    """The shape of the weight that an id speaks of, of all its parts if it is fused."""
    modules = find_modules(pipeline, module_id)
    return (sum(len(m.weight) for m in modules), *modules[0].weight.shape[1:])


def lora(shapes, suffixes, ranks=(2,), alpha=None, dtype=torch.float32):
    """Factors for every id, ranks in turn; with an alpha for each if one is given."""
    tensors = {}
    for index, (module_id, shape) in enumerate(shapes.items()):
        rank = ranks[index % len(ranks)]
        for suffix, factor in zip(suffixes, factors(module_id, shape, rank), strict=True):
            tensors[module_id + suffix] = factor.to(dtype)
        if alpha is not None:
            tensors[module_id + ".alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors


def lora_in(kind, ids, suffixes, **fields):
    """`lora` for modules of a pipeline."""
    pipeline = make_pipeline(kind)
    return lora({i: shape_in(pipeline, i) for i in ids.split()}, suffixes, **fields)


def kohya_metadata(tensors, name, dim, alpha, base, architecture, **more):
    """What sd-scripts writes into the header, hashes and all."""
    training = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(dim),
        "ss_network_alpha": str(float(alpha)),
        "ss_output_name": name,
        "ss_base_model_version": base,
        "ss_v2": "False",
        "ss_resolution": "(64, 64)",
        "ss_tag_frequency": json.dumps({"1_cat": {"cat": 3, "sitting": 2}}),
        **more,
    }
    data = save(tensors, training)
    content = data[8 + int.from_bytes(data[:8], "little") :]
    window = data[0x100000 : 0x100000 + 0x10000]
    return {
        **training,
        "sshs_model_hash": hashlib.sha256(content).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.date": "2024-03-01T12:00:00",
        "modelspec.resolution": "64x64",
    }


# sd-scripts and the tools that follow it


@golden
def kohya_sd15():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_proj_in
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k
        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0
        lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj
        lora_te_text_model_encoder_layers_0_self_attn_out_proj
        lora_te_text_model_encoder_layers_1_mlp_fc1
        """,
        KOHYA,
        ranks=(4,),
        alpha=3,
        dtype=torch.float16,
    )
    tensors |= lora_in(
        "sd15",
        "lora_unet_down_blocks_0_resnets_0_conv1 lora_unet_down_blocks_1_downsamplers_0_conv",
        KOHYA,
        ranks=(2,),
        alpha=1,
        dtype=torch.float16,
    )
    args = json.dumps({"conv_dim": "2", "conv_alpha": "1"})
    architecture = "stable-diffusion-v1/lora"
    return tensors, kohya_metadata(
        tensors, "cat_sd15", 4, 3, "sd_v1", architecture, ss_network_args=args
    )


@golden
def kohya_sdxl():
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_input_blocks_4_1_proj_in
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
        lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_v
        lora_unet_middle_block_1_transformer_blocks_0_ff_net_2
        lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_out_0
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_mlp_fc2
        """,
        KOHYA,
        ranks=(4, 2),
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, kohya_metadata(
        tensors, "cat_sdxl", 4, 1, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"
    )


@golden
def kohya_sdxl_conv():
    """Every kind of module outside attention, under its sgm name."""
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_input_blocks_1_0_in_layers_2
        lora_unet_input_blocks_3_0_op
        lora_unet_input_blocks_4_0_emb_layers_1
        lora_unet_input_blocks_4_0_skip_connection
        lora_unet_middle_block_2_out_layers_3
        lora_unet_output_blocks_2_2_conv
        lora_unet_output_blocks_7_0_in_layers_2
        lora_unet_label_emb_0_0
        lora_unet_time_embed_2
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl"}


@golden
def onetrainer_sdxl():
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_2_attentions_1_transformer_blocks_1_attn2_to_v
        lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2
        lora_unet_down_blocks_1_resnets_0_conv_shortcut
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


FLUX_DOUBLE = """
    lora_unet_double_blocks_0_img_attn_qkv
    lora_unet_double_blocks_0_txt_attn_qkv
    lora_unet_double_blocks_1_img_attn_proj
    lora_unet_double_blocks_1_txt_mlp_0
    lora_unet_double_blocks_1_img_mod_lin
    lora_unet_single_blocks_0_linear2
    lora_unet_single_blocks_1_modulation_lin
    lora_te1_text_model_encoder_layers_0_self_attn_out_proj
"""


@golden
def kohya_flux():
    """Without `linear1`: what diffusers splits by the sizes of the real model only."""
    tensors = lora_in("flux", FLUX_DOUBLE, KOHYA, alpha=4, dtype=torch.bfloat16)
    return tensors, kohya_metadata(tensors, "cat_flux", 2, 4, "flux1", "flux-1-dev/lora")


@golden
def kohya_flux_single():
    tensors = lora_in(
        "flux",
        """
        lora_unet_double_blocks_0_img_attn_qkv
        lora_unet_single_blocks_0_linear1
        lora_unet_single_blocks_1_linear1
        lora_unet_single_blocks_1_linear2
        lora_te1_text_model_encoder_layers_1_mlp_fc2
        lora_te3_encoder_block_0_layer_0_SelfAttention_q
        lora_te3_encoder_block_1_layer_1_DenseReluDense_wo
        """,
        KOHYA,
        ranks=(2, 3),
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}


@golden
def kohya_flux_split_qkv():
    """Block-diagonal up, rank 3 × 2, alpha as for rank 2: what `split_qkv` saves."""
    pipeline = make_pipeline("flux")
    tensors = {}
    for name in ("img_attn_qkv", "txt_attn_qkv"):
        module_id = f"lora_unet_double_blocks_0_{name}"
        rows, columns = shape_in(pipeline, module_id)
        parts = [factors(f"{module_id} {n}", (rows // 3, columns), 2) for n in "qkv"]
        tensors[module_id + ".lora_up.weight"] = torch.block_diag(*(up for up, _ in parts))
        tensors[module_id + ".lora_down.weight"] = torch.cat([down for _, down in parts])
        tensors[module_id + ".alpha"] = torch.tensor(2.0)
    args = json.dumps({"split_qkv": "True"})
    return tensors, {"ss_network_module": "networks.lora_flux", "ss_network_args": args}


@golden
def kohya_sd3():
    tensors = lora_in(
        "sd3",
        """
        lora_unet_joint_blocks_0_x_block_attn_qkv
        lora_unet_joint_blocks_0_context_block_attn_qkv
        lora_unet_joint_blocks_1_x_block_attn_proj
        lora_unet_joint_blocks_1_context_block_mlp_fc1
        lora_unet_joint_blocks_2_context_block_attn_qkv
        lora_unet_joint_blocks_2_x_block_mlp_fc2
        lora_te1_text_model_encoder_layers_0_self_attn_k_proj
        lora_te2_text_model_encoder_layers_1_mlp_fc1
        lora_te3_encoder_block_0_layer_0_SelfAttention_q
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, {"ss_network_module": "networks.lora_sd3", "ss_base_model_version": "sd3"}


WAN = {  # of a model of width 16
    "blocks.0.self_attn.q": (16, 16),
    "blocks.0.self_attn.o": (16, 16),
    "blocks.1.cross_attn.k": (16, 16),
    "blocks.1.ffn.0": (40, 16),
    "blocks.1.ffn.2": (16, 40),
}


@golden
def musubi_wan():
    shapes = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in WAN.items()}
    tensors = lora(shapes, KOHYA, ranks=(4,), alpha=1, dtype=torch.bfloat16)
    return tensors, {
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "4",
        "ss_network_alpha": "1",
        "ss_base_model_version": "wan",
    }


@golden
def onetrainer_flux():
    tensors = lora_in(
        "flux",
        """
        lora_transformer_transformer_blocks_0_attn_to_q
        lora_transformer_transformer_blocks_1_attn_add_v_proj
        lora_transformer_transformer_blocks_1_attn_to_out_0
        lora_transformer_single_transformer_blocks_0_attn_to_k
        lora_transformer_context_embedder
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"modelspec.architecture": "Flux.1-dev/lora"}


@golden
def a1111_scale():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k
        """,
        KOHYA,
        alpha=1,
    )
    first = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[first + ".scale"] = torch.tensor(0.75)
    return tensors, {}


@golden
def bundled_embeddings():
    tensors = lora_in(
        "sdxl",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    for encoder, width in ("clip_l", 8), ("clip_g", 12):
        tensors[f"bundle_emb.cat.{encoder}"] = draw(encoder, 2, width).half()
    return tensors, {}


@golden
def float8():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_0_resnets_0_conv1
        lora_te_text_model_encoder_layers_0_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float8_e4m3fn,
    )
    return tensors, {"ss_network_module": "networks.lora"}


# Dotted names, A and B


@golden
def aitoolkit_flux():
    tensors = lora_in(
        "flux",
        """
        transformer.transformer_blocks.0.attn.to_q
        transformer.transformer_blocks.0.attn.add_k_proj
        transformer.transformer_blocks.1.ff.net.0.proj
        transformer.single_transformer_blocks.0.proj_mlp
        transformer.single_transformer_blocks.1.proj_out
        """,
        PEFT,
        ranks=(4,),
        dtype=torch.bfloat16,
    )
    return tensors, {"format": "pt", "name": "cat", "training_info": json.dumps({"step": 10})}


@golden
def aitoolkit_native_flux():
    tensors = lora_in(
        "flux",
        """
        diffusion_model.double_blocks.0.img_attn.qkv
        diffusion_model.double_blocks.1.txt_attn.proj
        diffusion_model.single_blocks.0.linear1
        diffusion_model.single_blocks.1.linear2
        """,
        PEFT,
        ranks=(4,),
        dtype=torch.float16,
    )
    return tensors, {"format": "pt"}


@golden
def aitoolkit_lokr():
    """Both halves full, and an alpha that means nothing: infinite in float16."""
    tensors = {}
    for name, (out, columns) in WAN.items():
        module_id = f"diffusion_model.{name}"
        tensors[module_id + ".lokr_w1"] = draw(module_id + " w1", 4, 4) / 4
        tensors[module_id + ".lokr_w2"] = draw(module_id + " w2", out // 4, columns // 4) / 4
        tensors[module_id + ".alpha"] = torch.tensor(9999999999.0)
    return {key: value.half() for key, value in tensors.items()}, {"format": "pt"}


@golden
def diffusion_pipe_wan():
    shapes = {"diffusion_model." + name: shape for name, shape in WAN.items()}
    return lora(shapes, PEFT, ranks=(4,), dtype=torch.bfloat16), {"format": "pt"}


@golden
def bare():
    return lora(WAN, PEFT, ranks=(3,), dtype=torch.float16), {}


@golden
def bare_without_weight():
    return lora(WAN, (".lora_B", ".lora_A"), ranks=(3,), dtype=torch.bfloat16), {}


@golden
def diffusers_old():
    attention = "unet.{}.transformer_blocks.0.{}.processor.{}"
    pipeline = make_pipeline("sd15")
    ids = [
        attention.format("down_blocks.0.attentions.0", "attn1", "to_q"),
        attention.format("down_blocks.0.attentions.0", "attn1", "to_out"),
        attention.format("mid_block.attentions.0", "attn2", "to_k"),
    ]
    unet = {i: shape_in(pipeline, i) for i in ids}
    i = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = {i: shape_in(pipeline, i)}
    tensors = lora(unet, ("_lora.up.weight", "_lora.down.weight"), ranks=(4,))
    tensors |= lora(encoder, (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"))
    return tensors, {"format": "pt"}


@golden
def xlabs_flux():
    tensors = lora_in(
        "flux",
        """
        double_blocks.0.processor.qkv_lora1
        double_blocks.0.processor.qkv_lora2
        double_blocks.0.processor.proj_lora1
        double_blocks.0.processor.proj_lora2
        """,
        (".up.weight", ".down.weight"),
        dtype=torch.bfloat16,
    )
    tensors |= lora_in(
        "flux",
        "single_blocks.0.processor.qkv single_blocks.1.processor.proj",
        ("_lora.up.weight", "_lora.down.weight"),
        dtype=torch.bfloat16,
    )
    return tensors, {}


# PEFT and diffusers


def adapted(model, name, **config):
    """A model with a random adapter by PEFT; returns its config."""
    config = LoraConfig(init_lora_weights=False, **config)
    model.add_adapter(config)
    fill(model, name)
    return config


def fill(model, name):
    """Random values for all that is trained, magnitudes near what they were."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            values = draw(f"{name} {key}", *parameter.shape)
            if "magnitude" in key or "dora_scale" in key:
                parameter *= 1 + values.abs() / 4
            else:
                product_of_many = "hada" in key or "lokr" in key
                parameter.copy_(values / (2 if product_of_many else 3))


def saved_by(pipeline, **layers):
    """What a pipeline's own `save_lora_weights` writes."""
    with tempfile.TemporaryDirectory() as directory:
        pipeline.save_lora_weights(directory, **layers)
        tensors, metadata = read(Path(directory) / "pytorch_lora_weights.safetensors")
    if found := metadata.get("lora_adapter_metadata"):
        config = json.loads(found)  # what is a set in PEFT comes in any order
        config = {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True)
    return tensors, metadata


def unet_layers(model):
    """The adapter of a UNet or its text encoder, as the training scripts of diffusers take it."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model))


ATTENTION = {
    "down": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up": "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
}


@golden
def diffusers_sd15():
    pipeline = make_pipeline("sd15")
    targets = [*ATTENTION.values(), "mid_block.resnets.1.conv2"]
    adapted(pipeline.unet, "unet", r=4, lora_alpha=4, target_modules=targets)
    adapted(pipeline.text_encoder, "te", r=2, lora_alpha=2, target_modules=["q_proj"])
    return saved_by(
        pipeline,
        unet_lora_layers=unet_layers(pipeline.unet),
        text_encoder_lora_layers=unet_layers(pipeline.text_encoder),
    )


@golden
def diffusers_sdxl():
    pipeline = make_pipeline("sdxl")
    layers = {}
    for name, targets in {
        "unet": list(ATTENTION.values()),
        "text_encoder": ["q_proj"],
        "text_encoder_2": ["out_proj"],
    }.items():
        model = getattr(pipeline, name)
        config = adapted(model, name, r=4, lora_alpha=3, target_modules=targets)
        layers[f"{name}_lora_layers"] = unet_layers(model)
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
    return saved_by(pipeline, **layers)


FLUX_TARGETS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.1.proj_out",
]


@golden
def diffusers_flux():
    """Ranks and alphas that differ, known only from the header."""
    pipeline = make_pipeline("flux")
    config = adapted(
        pipeline.transformer,
        "flux",
        r=4,
        lora_alpha=8,
        target_modules=FLUX_TARGETS,
        rank_pattern={"transformer_blocks.1.ff.net.2": 2},
        alpha_pattern={r"^single_transformer_blocks\.1\.proj_out": 3},
    )
    return saved_by(
        pipeline,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )


@golden
def diffusers_flux_bias():
    pipeline = make_pipeline("flux")
    fields = {"lora_bias": True, "target_modules": FLUX_TARGETS[:3]}
    adapted(pipeline.transformer, "bias", r=2, lora_alpha=2, **fields)
    return saved_by(
        pipeline, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer)
    )


@golden
def diffusers_sd3():
    pipeline = make_pipeline("sd3")
    targets = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.2.ff.net.0.proj",
    ]
    adapted(pipeline.transformer, "sd3", r=4, lora_alpha=4, target_modules=targets)
    adapted(pipeline.text_encoder, "te", r=2, lora_alpha=2, target_modules=["q_proj"])
    return saved_by(
        pipeline,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )


def saved_by_peft(**config):
    unet = make_pipeline("sd15").unet
    targets = [*ATTENTION.values(), "mid_block.resnets.1.conv2"]
    fields = {"r": 4, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(unet, LoraConfig(**fields, **config))
    fill(model, "peft")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return read(Path(directory) / "adapter_model.safetensors")


@golden
def peft():
    return saved_by_peft()


@golden
def peft_dora():
    return saved_by_peft(use_dora=True)


@golden
def peft_default():
    """The keys of a PEFT model's own `state_dict`, with the adapter's name in them."""
    tensors, metadata = saved_by_peft()
    renamed = {key.replace(".weight", ".default.weight"): v for key, v in tensors.items()}
    return {key: v.bfloat16() for key, v in renamed.items()}, metadata


# LyCORIS

BLOCK = "up_blocks.3.attentions.1"
LINEAR = f"{BLOCK}.transformer_blocks.0.attn2.to_v"
WIDE = f"{BLOCK}.transformer_blocks.0.ff.net.0.proj"
CONV = "up_blocks.3.resnets.2.conv1"
POINTWISE = f"{BLOCK}.proj_in"
NORM = f"{BLOCK}.norm"


def saved_by_lycoris(
    model,
    name,
    targets,
    algo,
    prefix="lora_unet",
    dtype=None,
    lora_dim=2,
    alpha=1,
    **fields,
):
    """What LyCORIS writes for modules of a model; its forward must be what the truth says."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    LycorisNetwork.apply_preset(
        {
            "lora_prefix": prefix,
            "target_module": [],
            "target_name": list(targets),
            "module_algo_map": {},
            "name_algo_map": {},
            "use_fnmatch": True,
            "exclude_name": [],
        }
    )
    sizes = {"lora_dim": lora_dim, "conv_lora_dim": lora_dim, "alpha": alpha, "conv_alpha": alpha}
    network = LycorisNetwork(model, network_module=algo, **sizes, **fields)
    network.apply_to()
    network.requires_grad_(True)
    fill(network, name)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.safetensors"
        network.save_weights(str(path), None, {})
        compare_with_training(network, dense_truth(path))
        network.save_weights(str(path), dtype, {})
        return read(path)


@torch.no_grad()
def compare_with_training(network, truth):
    """Compares dense ΔW with what the training forward of LyCORIS adds to its layers.

    Not with `get_diff_weight`, which scales LoHa and LoKr twice.
    """
    network.train()
    modules = {module.lora_name: module for module in network.loras}
    for module_id, delta in truth.items():
        module = modules[module_id]
        layer, W = module.org_module[0], module.org_module[0].weight
        x = torch.randn(3, W.shape[1], *(7 for _ in W.shape[2:]), generator=seeded("x"))
        added = layer(x) - module.org_forward(x)
        delta = torch.as_tensor(delta).to(W).reshape(W.shape)
        if getattr(module, "wd", False):
            axis = 0 if module.wd_on_out else 1
            dims = [d for d in range(W.ndim) if d != axis]
            V = W + delta
            norm = torch.linalg.vector_norm(V, dim=dims, keepdim=True)
            delta = module.dora_scale * V / norm - W
        conv = {"stride": layer.stride, "padding": layer.padding} if W.ndim == 4 else {}
        wanted = (conv2d if W.ndim == 4 else linear)(x, delta, **conv)
        torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5, msg=module_id)


LYCORIS = {
    "lycoris_locon": ((LINEAR, POINTWISE, CONV), {"algo": "locon"}),
    "lycoris_locon_tucker": ((LINEAR, CONV), {"algo": "locon", "use_tucker": True}),
    "lycoris_rslora": ((LINEAR, CONV), {"algo": "locon", "rs_lora": True}),
    "lycoris_loha": ((LINEAR, POINTWISE, CONV), {"algo": "loha"}),
    "lycoris_loha_tucker": ((LINEAR, CONV), {"algo": "loha", "use_tucker": True}),
    "lycoris_lokr_full": ((LINEAR, WIDE, CONV), {"algo": "lokr", "full_matrix": True}),
    "lycoris_lokr": (
        (LINEAR, WIDE, CONV),
        {"algo": "lokr", "factor": 2, "dtype": torch.float16},
    ),
    "lycoris_lokr_both": ((WIDE,), {"algo": "lokr", "decompose_both": True}),
    "lycoris_lokr_tucker": ((CONV,), {"algo": "lokr", "factor": 2, "use_tucker": True}),
    "lycoris_norm": ((LINEAR, NORM), {"algo": "locon", "train_norm": True}),
    "lycoris_dora_out": (
        (LINEAR, CONV),
        {"algo": "locon", "weight_decompose": True, "wd_on_out": True},
    ),
    "lycoris_dora_in": (
        (LINEAR, CONV),
        {"algo": "locon", "weight_decompose": True, "wd_on_out": False},
    ),
    "lycoris_doha": ((LINEAR,), {"algo": "loha", "weight_decompose": True, "wd_on_out": True}),
    "lycoris_full": ((LINEAR, POINTWISE), {"algo": "full", "dtype": torch.float16}),
}

for file_name, (modules, settings) in LYCORIS.items():
    FILES[file_name] = lambda name=file_name, targets=modules, settings=settings: saved_by_lycoris(
        make_pipeline("sd15").unet, name, targets, **settings
    )


@golden
def simpletuner_lokr():
    return saved_by_lycoris(
        make_pipeline("flux").transformer,
        "simpletuner",
        ["transformer_blocks.0.attn.to_v", "transformer_blocks.1.ff.net.0.proj"],
        "lokr",
        prefix="lycoris",
        dtype=torch.bfloat16,
        factor=2,
    )


def make(directory=HERE):
    """Writes every golden file into a directory."""
    for name, tensors_and_metadata in FILES.items():
        torch.manual_seed(0)
        tensors, metadata = tensors_and_metadata()
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        data = header_sorted(save(tensors, metadata))
        (Path(directory) / f"{name}.safetensors").write_bytes(data)


if __name__ == "__main__":
    make()
