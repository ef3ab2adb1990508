"""Files that LyCORIS writes."""

import logging
import tempfile
from pathlib import Path

import torch
from lycoris.wrapper import LycorisNetwork
from torch.nn.functional import conv2d, linear

from support.golden_files.writing import FILES, fill, golden, read, seeded
from support.models.pipelines import make_pipeline
from support.truth.golden_truth import dense_truth

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
