"""Golden files as pools: siblings that share directions with them, and what they are to become."""

import zlib

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from devec.cli import app
from support.paths import GOLDEN
from support.truth.golden_truth import PAIRS, carried

NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
DORA = ("lycoris_doha", "lycoris_dora_in", "lycoris_dora_out", "peft_dora")
WHOLE = "lycoris_full"  # whole tensors only
READABLE = [name for name in NAMES if name not in (*DORA, WHOLE)]

# Of which not the tensors themselves are written, but what they say.
PRODUCTS = [name for name in READABLE if "loha" in name or "lokr" in name]
REWRITTEN = [*PRODUCTS, "lycoris_locon_tucker"]

_UP = (*PAIRS, ".hada_w1_a", ".hada_w2_a", ".lokr_w1", ".lokr_w1_a", ".lokr_w2", ".lokr_w2_a")
_SCALES = (".alpha", ".scale")


def golden(name):
    """The path of a golden file."""
    return GOLDEN / f"{name}.safetensors"


def stored(path):
    """Tensors and metadata of a file."""
    with safe_open(str(path), framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def sibling(name, path):
    """A file like a golden one, whose deltas nearly share one direction or more with its deltas.

    Every factor of the output side keeps one vector, but for noise; all else is drawn again.
    """
    tensors, metadata = stored(golden(name))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, old in tensors.items():
        if key.endswith(_SCALES):
            continue
        old_values = old.double()
        size = old_values.square().mean().sqrt()
        draw = torch.randn(old.shape, generator=generator, dtype=torch.float64) * size
        draw *= old_values != 0  # what is block-diagonal stays so
        if key.endswith(_UP):
            tucker = key.endswith("_a") and any(
                key.rpartition(".")[0] + core in tensors for core in (".hada_t1", ".lokr_t2")
            )
            kept = (0,) if tucker else (slice(None), 0)
            draw[kept] = old_values[kept] + 0.03 * draw[kept]
        tensors[key] = draw.to(old.dtype)
    save_file(tensors, path, metadata)
    return path


def expected_keys(name):
    """Key → type of all tensors that a part of a golden file is stored in, without carried ones."""
    tensors, _ = stored(golden(name))
    if name in PRODUCTS:
        return {
            module + suffix: next(t.dtype for k, t in tensors.items() if k.startswith(module))
            for module in {key.rpartition(".")[0] for key in tensors}
            for suffix in (".lora_up.weight", ".lora_down.weight")
        }
    left_out = (*carried(golden(name)),)
    types = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if key not in left_out and not key.endswith((*_SCALES, ".lora_mid.weight"))
    }
    if name == "diffusers_sd15":  # two spellings, of which diffusers reads that of the first key
        today = {".lora.up.": ".lora_B.", ".lora_linear_layer.up.": ".lora_B."}
        today |= {key.replace("up", "down"): ".lora_A." for key in today}
        for old, new in today.items():
            types = {key.replace(old, new): dtype for key, dtype in types.items()}
    if name == "float8":  # safetensors of eight bits are widened, which is exact
        types = dict.fromkeys(types, torch.bfloat16)
    return types


def scale_keys(path):
    """The keys of a file that scale its modules."""
    return {key for key in stored(path)[0] if key.endswith(_SCALES)}


def factors(path):
    """Module → s, B and A, of a file that holds plain LoRAs with alphas or none."""
    tensors, _ = stored(path)
    result = {}
    for key, tensor in tensors.items():
        for up, down in PAIRS.items():
            if key.endswith(up):
                module = key.removesuffix(up)
                A = tensors[module + down].double().flatten(1)
                scale = float(tensors.get(module + ".alpha", len(A))) / len(A)
                result[module] = scale, tensor.double().flatten(1), A
                break
    return result


def largest_factors(path):
    """Module → |s|·‖B‖_F·‖A‖_2, which bounds what relative rounding of B or A can change."""
    return {
        module: abs(scale) * float(B.norm() * torch.linalg.matrix_norm(A, ord=2))
        for module, (scale, B, A) in factors(path).items()
    }


def summed(*truths):
    """Module → the sum of dense deltas; a module that one lacks is zero there."""
    result = {}
    for truth in truths:
        for module, delta in truth.items():
            result[module] = result.get(module, 0) + delta
    return result


def assert_close_deltas(got, want, tolerance, scale=None):
    """Compares dense deltas module by module, relative to the norm of `scale` or `want`."""
    scale = want if scale is None else scale
    assert got.keys() == want.keys()
    errors = {
        module: np.linalg.norm(got[module] - delta) / np.linalg.norm(scale[module])
        for module, delta in want.items()
    }
    too_far = {module: error for module, error in errors.items() if not error <= tolerance}
    assert not too_far


def command(*arguments):
    """What a command prints; it must do what it was asked to."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output
