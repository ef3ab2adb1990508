"""Tables of names say what diffusers' own converters say: the same modules, the same rows."""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.loaders import single_file_utils as whole
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from devec import Adapter, convert
from devec.naming import tables
from devec.naming.families import flat
from support.truth.golden_truth import dense_truth

TABLES = {**tables.TABLES, "text encoder": tables.text_encoders}


@pytest.mark.parametrize("name", TABLES)
def test_no_two_names_of_a_table_have_one_flat_form(name):
    table = TABLES[name]()
    for names in (list(table.native), list(table.diffusers_names)):
        assert len(names) == len({flat(n) for n in names})
    both = {flat(n) for n in table.native} & {flat(n) for n in table.diffusers_names}
    same = {flat(n) for n in table.native if [p.name for p in table.native[n]] == [n]}
    assert both <= same, "a flat name means one module by the authors and another in diffusers"


DOUBLE = {"img_attn.qkv": (24, 8), "txt_attn.qkv": (24, 8), "img_attn.proj": (8, 8),
          "txt_attn.proj": (8, 8), "img_mlp.0": (32, 8), "img_mlp.2": (8, 32),
          "txt_mlp.0": (32, 8), "txt_mlp.2": (8, 32)}  # fmt: skip
ENDS = {"img_in": (8, 4), "txt_in": (8, 6), "time_in.in_layer": (8, 5), "time_in.out_layer": (8, 8),
        "guidance_in.in_layer": (8, 5), "guidance_in.out_layer": (8, 8),
        "final_layer.linear": (4, 8), "final_layer.adaLN_modulation.1": (16, 8)}  # fmt: skip
WAN = {f"{a}_attn.{n}": (8, 8) for a in ("self", "cross") for n in "qkvo"}
WAN |= {"ffn.0": (16, 8), "ffn.2": (8, 16)}
IMAGES = {"cross_attn.k_img": (8, 8), "cross_attn.v_img": (8, 8)}
LUMINA = {"attention.qkv": (3840, 2304), "attention.out": (2304, 2304),
          **{f"feed_forward.w{i}": (8, 2304) for i in (1, 2, 3)}}  # fmt: skip
Z_IMAGE = {"attention.qkv": (24, 8), "attention.out": (8, 8), "adaLN_modulation.0": (32, 8),
           **{f"feed_forward.w{i}": (16, 8) for i in (1, 2, 3)}}  # fmt: skip
HUNYUAN = {name.replace("attn.", "attn_").replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2"): s
           for name, s in DOUBLE.items()}  # fmt: skip


def blocks(*groups):
    """``("double_blocks", (0, 18), {name: shape})`` → every name in these blocks."""
    return {
        f"{b}.{i}.{n}": s for b, indices, names in groups for i in indices for n, s in names.items()
    }


# What to convert: function of diffusers, prefix, suffixes, native name → shape. Sizes are those of
# the real model where diffusers counts on them.
CONVERTERS = {
    "flux": (
        theirs._convert_kohya_flux_lora_to_diffusers,
        "lora_unet_",
        blocks(
            ("double_blocks", (0, 18), {**DOUBLE, "img_mod.lin": (48, 8), "txt_mod.lin": (48, 8)}),
            ("single_blocks", (0, 37), {"linear1": (21504, 8), "linear2": (8, 40),
                                        "modulation.lin": (24, 8)}),
        ) | ENDS | {"vector_in.in_layer": (8, 7), "vector_in.out_layer": (8, 8)},
    ),
    "xlabs": (
        theirs._convert_xlabs_flux_lora_to_diffusers,
        "",
        blocks(
            ("double_blocks", (0, 18), {"processor.qkv_lora1": (24, 8),
                                        "processor.qkv_lora2": (24, 8),
                                        "processor.proj_lora1": (8, 8),
                                        "processor.proj_lora2": (8, 8)}),
            ("single_blocks", (0, 37), {"processor.qkv": (24, 8), "processor.proj": (8, 8)}),
        ),
    ),
    "wan": (
        theirs._convert_non_diffusers_wan_lora_to_diffusers,
        "diffusion_model.",
        blocks(("blocks", (0, 1), WAN | IMAGES)) | {
            "time_projection.1": (48, 8), "head.head": (4, 8), "text_embedding.0": (8, 6),
            "text_embedding.2": (8, 8), "time_embedding.0": (8, 5), "time_embedding.2": (8, 8),
            "img_emb.proj.1": (8, 6), "img_emb.proj.3": (8, 8),
        },
    ),
    "musubi wan": (theirs._convert_musubi_wan_lora_to_diffusers, "lora_unet_",
                   blocks(("blocks", (0, 1), WAN | IMAGES))),
    "lumina2": (
        theirs._convert_non_diffusers_lumina2_lora_to_diffusers,
        "diffusion_model.",
        blocks(("layers", (0,), LUMINA | {"adaLN_modulation.1": (9216, 1024)}),
               ("noise_refiner", (0,), LUMINA | {"adaLN_modulation.1": (9216, 1024)}),
               ("context_refiner", (0,), LUMINA)),
    ),
    "hunyuan-video": (
        theirs._convert_hunyuan_video_lora_to_diffusers,
        "diffusion_model.",
        blocks(
            ("double_blocks", (0, 19), {**HUNYUAN, "img_mod.linear": (48, 8),
                                        "txt_mod.linear": (48, 8)}),
            ("single_blocks", (0, 39), {"linear1": (21504, 8), "linear2": (8, 40),
                                        "modulation.linear": (24, 8)}),
        ),
    ),
    "hunyuan-video's ends": (
        theirs._convert_hunyuan_video_lora_to_diffusers,
        "diffusion_model.",
        blocks(("double_blocks", (0,), {"img_mod.linear": (48, 8)})) | {
            "img_in.proj": (8, 4), "vector_in.in_layer": (8, 7), "vector_in.out_layer": (8, 8),
            "time_in.mlp.0": (8, 5), "time_in.mlp.2": (8, 8), "guidance_in.mlp.0": (8, 5),
            "guidance_in.mlp.2": (8, 8), "final_layer.linear": (4, 8),
        },
    ),
    "flux2": (
        theirs._convert_non_diffusers_flux2_lora_to_diffusers,
        "diffusion_model.",
        blocks(("double_blocks", (0, 7), DOUBLE),
               ("single_blocks", (0, 47), {"linear1": (72, 8), "linear2": (8, 32)})) | ENDS | {
            f"{stream}.lin": (24, 8) for stream in ("single_stream_modulation",
            "double_stream_modulation_img", "double_stream_modulation_txt")
        },
    ),
    "kohya flux2": (
        theirs._convert_kohya_flux2_lora_to_diffusers,
        "lora_unet_",
        blocks(("double_blocks", (0, 7), DOUBLE),
               ("single_blocks", (0, 47), {"linear1": (72, 8), "linear2": (8, 32)})),
    ),
    "z-image": (
        theirs._convert_non_diffusers_z_image_lora_to_diffusers,
        "lora_unet_",
        blocks(("layers", (0, 29), Z_IMAGE), ("noise_refiner", (0, 1), Z_IMAGE),
               ("context_refiner", (0, 1), Z_IMAGE)),
    ),
}  # fmt: skip


def native_tensors(prefix, shapes):
    """Rank 2 for every name; kohya's with an alpha of 1, for all but the final layer."""
    tensors = {}
    for name, (rows, columns) in shapes.items():
        module = prefix + (flat(name) if prefix == "lora_unet_" else name)
        ends = (".lora_up.weight", ".lora_down.weight") if "_" in prefix[:5] else None
        ends = ends or (".lora_B.weight", ".lora_A.weight")
        if not prefix:
            numbered = name.endswith(("lora1", "lora2"))
            ends = (".up.weight", ".down.weight") if numbered else None
            ends = ends or ("_lora.up.weight", "_lora.down.weight")
        tensors[module + ends[0]] = torch.randn(rows, 2)
        tensors[module + ends[1]] = torch.randn(2, columns)
        if prefix == "lora_unet_" and not name.startswith("final_layer"):
            tensors[module + ".alpha"] = torch.tensor(1.0)
    return tensors


def probed(path):
    """Module → ΔW·X by diffusers' names; X is the same for all modules of a width."""
    tensors, found = load_file(path), {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            X = torch.randn(A.shape[1], 3, generator=torch.Generator().manual_seed(5))
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[key.removesuffix(".lora_A.weight").removeprefix("transformer.")] = B @ (A @ X)
    return found


@pytest.mark.parametrize("name", CONVERTERS)
def test_tables_name_what_diffusers_names_and_split_the_same_rows(tmp_path, name):
    function, prefix, shapes = CONVERTERS[name]
    tensors = native_tensors(prefix, shapes)
    save_file(tensors, tmp_path / "native.safetensors")
    converted = function({key: tensor.clone() for key, tensor in tensors.items()})
    cloned = {key: tensor.clone().contiguous() for key, tensor in converted.items()}
    save_file(cloned, tmp_path / "theirs.safetensors")
    ours = convert(Adapter.from_pretrained(tmp_path / "native.safetensors"), "diffusers")
    got, want = (
        probed(ours.save_pretrained(tmp_path / "ours")),
        probed(tmp_path / "theirs.safetensors"),
    )
    assert got.keys() == want.keys()
    for module, effect in want.items():
        if name == "flux2" and module == "norm_out.linear":
            effect = theirs.swap_scale_shift(effect)  # as diffusers does to whole models
        assert_close(got[module], effect, rtol=1e-4, atol=1e-4, msg=module)


JOINT = {
    f"{side}_block.{n}": shape
    for side in ("x", "context")
    for n, shape in {
        "attn.qkv": (24, 8),
        "attn.proj": (8, 8),
        "mlp.fc1": (32, 8),
        "mlp.fc2": (8, 32),
    }.items()
}
JOINT |= {"x_block.attn2.qkv": (24, 8), "x_block.attn2.proj": (8, 8)}
LAST = {n: s for n, s in JOINT.items() if not n.startswith("context") or n.endswith("qkv")}
EMBEDDER = {"t_embedder.mlp.0": (8, 5), "t_embedder.mlp.2": (8, 8), "cap_embedder.1": (8, 7)}
FINAL = {"final_layer.linear": (4, 8), "final_layer.adaLN_modulation.1": (8, 8)}

# What diffusers does to whole models, which it gets from their authors, it must do to their deltas.
MODELS = {
    "sd3": (
        whole.convert_sd3_transformer_checkpoint_to_diffusers,
        blocks(
            ("joint_blocks", (0,), JOINT | {"x_block.adaLN_modulation.1": (72, 8),
                                            "context_block.adaLN_modulation.1": (48, 8)}),
            ("joint_blocks", (1,), LAST | {"x_block.adaLN_modulation.1": (72, 8),
                                           "context_block.adaLN_modulation.1": (16, 8)}),
        ) | {"context_embedder": (8, 6), "final_layer.linear": (4, 8),
             "final_layer.adaLN_modulation.1": (16, 8), "t_embedder.mlp.0": (8, 5),
             "t_embedder.mlp.2": (8, 8), "y_embedder.mlp.0": (8, 7), "y_embedder.mlp.2": (8, 8)},
    ),
    "flux2": (
        whole.convert_flux2_transformer_checkpoint_to_diffusers,
        blocks(("double_blocks", (0,), DOUBLE), ("single_blocks", (0,), {"linear1": (72, 8)}))
        | ENDS,
    ),
    "lumina2": (whole.convert_lumina2_to_diffusers,
                {"layers.0.attention.qkv": (3840, 2304), **EMBEDDER, **FINAL}),
    "z-image": (whole.convert_z_image_transformer_checkpoint_to_diffusers,
                {"layers.0.attention.qkv": (24, 8), "x_embedder": (8, 4), **EMBEDDER, **FINAL}),
}  # fmt: skip


class Partial(dict):
    """A checkpoint of which zeros stand for what is missing."""

    def pop(self, key, *_):
        return super().pop(key, torch.zeros(6, 6))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_tables_do_to_deltas_what_diffusers_does_to_whole_models(tmp_path, name, prefix):
    function, shapes = MODELS[name]
    save_file(native_tensors(prefix, shapes), tmp_path / "native.safetensors")
    truth = dense_truth(tmp_path / "native.safetensors")
    modules = {prefix + (flat(n) if prefix == "lora_unet_" else n): n for n in shapes}
    weights = {f"{modules[m]}.weight": torch.from_numpy(W).float() for m, W in truth.items()}
    want = {k.removesuffix(".weight"): W for k, W in function(Partial(weights)).items() if W.any()}
    ours = convert(Adapter.from_pretrained(tmp_path / "native.safetensors"), "diffusers")
    got = dense_truth(ours.save_pretrained(tmp_path / "ours"))
    got = {m.removeprefix("transformer."): torch.from_numpy(W).float() for m, W in got.items()}
    assert got.keys() == want.keys()
    for module, W in want.items():
        assert_close(got[module], W, rtol=1e-4, atol=1e-4, msg=module)


def unet_names():
    """Names of the layers of SDXL's UNet by its authors → shape; small, but for the depth."""
    resnet = {"in_layers.2": (8, 4, 3, 3), "emb_layers.1": (8, 6), "out_layers.3": (8, 8, 3, 3),
              "skip_connection": (8, 4, 1, 1)}  # fmt: skip
    layer = {f"attn{a}.to_{n}": (8, 8) for a in (1, 2) for n in ("q", "k", "v", "out.0")}
    layer |= {"ff.net.0.proj": (64, 8), "ff.net.2": (8, 32)}

    def attention(depth):
        names = {f"transformer_blocks.{i}.{n}": s for i in range(depth) for n, s in layer.items()}
        return {"proj_in": (8, 8), "proj_out": (8, 8), **names}

    places = {"middle_block.0": resnet, "middle_block.1": attention(10), "middle_block.2": resnet}
    for i in (1, 2, 4, 5, 7, 8):
        places[f"input_blocks.{i}.0"] = resnet
    for i in range(9):
        places[f"output_blocks.{i}.0"] = resnet
    for i, depth in {4: 2, 5: 2, 7: 10, 8: 10}.items():
        places[f"input_blocks.{i}.1"] = attention(depth)
    for i in range(6):
        places[f"output_blocks.{i}.1"] = attention(10 if i < 3 else 2)
    places |= {"input_blocks.3.0": {"op": (8, 8, 3, 3)}, "input_blocks.6.0": {"op": (8, 8, 3, 3)}}
    places |= {f"output_blocks.{i}.2": {"conv": (8, 8, 3, 3)} for i in (2, 5)}
    places |= {"time_embed": {"0": (8, 4), "2": (8, 8)}, "label_emb.0": {"0": (8, 5), "2": (8, 8)}}
    places |= {"input_blocks.0": {"0": (8, 4, 3, 3)}, "out": {"2": (4, 8, 3, 3)}}
    return {f"{place}.{n}": shape for place, names in places.items() for n, shape in names.items()}


def test_names_of_sdxl_are_those_of_diffusers(tmp_path):
    tensors, native = {}, {}
    for index, (name, (rows, columns, *kernel)) in enumerate(unet_names().items()):
        module = f"lora_unet_{flat(name)}"
        tensors[f"{module}.lora_down.weight"] = torch.full((1, columns, *kernel), float(index + 1))
        tensors[f"{module}.lora_up.weight"] = torch.ones(rows, 1, *(1 for _ in kernel))
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
        native[index + 1] = name
    save_file(tensors, tmp_path / "native.safetensors")
    config = type("Config", (), {"layers_per_block": 2})
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    want = {}
    for key, tensor in converted.items():
        if "down.weight" in key:
            module = key.replace(".processor", "").replace("_lora.down", ".lora.down")
            module = flat(module.removesuffix(".weight").removesuffix(".lora.down"))
            want[module.removesuffix("_lora")] = native[int(tensor.view(-1)[0])]
    ours = convert(Adapter.from_pretrained(tmp_path / "native.safetensors"), "diffusers")
    written = load_file(ours.save_pretrained(tmp_path / "ours"))
    got = {}
    for key, tensor in written.items():
        if key.endswith(".lora_A.weight"):
            number = float(tensor.view(-1)[0] * written[key.replace("_A.", "_B.")].view(-1)[0])
            module = flat(key.removesuffix(".lora_A.weight")).replace("to_out_0", "to_out")
            got[module] = native[round(number)]
    assert {v: k for k, v in got.items()} == {v: k for k, v in want.items()}
    assert len(got) == len(tensors) // 3 == len(alphas)
