"""Ways to damage an adapter's files. A case is its number: the same number makes the same bytes."""

import contextlib
import io
import json
import random
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from support.adapters.cases import save_adapter
from support.paths import GOLDEN

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**40), 10**30, 0.5, 1e308, 1e999, -1e999)
ODD = (*NUMBERS, float("nan"), "", "8", "nan", None, True, [], [1], {}, {"a": 1}, "\ud800",
       "é" * 99)  # fmt: skip
PATTERNS = ("", "(", ".*", "[", "a{99999}", "^(?:x)", r"(\w|\w\w|\.)+!", "(a|a?)+$", "\\", "(?P<a>")
TYPES = [
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "C64", "F4",
    "X"
]  # fmt: skip
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)  # fmt: skip
VALUES = (float("nan"), float("inf"), 0.0, -1.0, 1e-45, 3e38, 1e300, 1e-300, 9999999999.0, 0.3)
SUFFIXES = [
    ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".scale",
    ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_A", ".lora.up.weight",
    "_lora.down.weight", ".lora_linear_layer.up.weight", ".up.weight", ".hada_w1_a",
    ".hada_w1_b", ".hada_w2_a", ".hada_t1", ".hada_t2", ".lokr_w1", ".lokr_w1_a", ".lokr_w2",
    ".lokr_w2_b", ".lokr_t2", ".dora_scale", ".magnitude", ".diff", ".diff_b", ".w_norm",
    ".set_weight", ".oft_blocks", ".on_input", ".a1.weight", ".lora_A.default.weight",
    ".lora_magnitude_vector", ".unknown", ".weight"
]  # fmt: skip
METADATA = [
    "lora_adapter_metadata", "lora_adapter_metadata", "devec", "ss_network_dim", "x",
    "ss_network_args", "ss_network_module", "ss_output_name", "sshs_model_hash",
    "modelspec.architecture", "modelspec.hash_sha256", "base_model_name_or_path",
    "ss_base_model_version", "format", "name"
]  # fmt: skip
PREFIXES = [
    "lora_unet_", "lora_unet__", "lora_te_", "lora_te2_", "lora_transformer_", "lycoris_",
    "transformer.", "unet.", "diffusion_model.", "base_model.model.", "text_encoder.",
    "text_encoder_2.", "bundle_emb.", "x"
]  # fmt: skip


def load(data):
    """The tensors of a file in the order of their names; safetensors has them in any."""
    return dict(sorted(safetensors.torch.load(data).items()))


def save(tensors, strings):
    """A file of tensors, the same bytes each time; safetensors writes metadata in any order."""
    data = safetensors.torch.save({k: t.contiguous().clone() for k, t in tensors.items()}, strings)
    size = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()
    return len(text).to_bytes(8, "little") + text + data[size:]


@cache
def originals():
    """Name → bytes of every golden file."""
    return {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.safetensors"))}


@cache
def directories():
    """Files of small PEFT directories, made by PEFT."""
    made = []
    for kind, variant in (("linear", "patterns"), ("conv2d", "bias"), ("embedding", "plain"),
                          ("experts", "plain"), ("linear", "rslora")):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = save_adapter(Path(folder) / "a", kind, variant, 0)
            made.append(
                {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.suffix != ".md"}
            )
    return made


# Bytes


def damage_bytes(rng, data):
    """Flips, gaps, repetitions and truncations anywhere, or in the header, or behind it."""
    if not data:
        return rng.randbytes(rng.randrange(40))
    header = min(8 + int.from_bytes(data[:8], "little"), len(data))
    start, end = rng.choice([(0, len(data)), (0, 8), (8, header), (header, len(data))])
    if not start < end <= len(data):
        start, end = 0, len(data)
    at = rng.randrange(start, end)
    kind, size, result = rng.randrange(7), rng.choice([1, 2, 8, 100]), bytearray(data)
    if kind <= 2:
        for _ in range(rng.choice([1, 1, 2, 5, 30])):
            result[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        result = result[: rng.choice([0, 1, 7, 8, 9, header - 1, header, at, len(data) - 1])]
    elif kind == 4:
        result[at : at + size] = rng.choice([b"\0", b"\xff", b"{", b'"', b"9"]) * rng.choice(
            [0, size]
        )
    elif kind == 5:
        result[at:at] = rng.choice([rng.randbytes(size), bytes(data[at : at + size])])
    else:
        number = rng.choice([0, 1, header, len(data), 1 << 24, 1 << 26, 1 << 62, (1 << 64) - 1])
        result[:8] = number.to_bytes(8, "little")
    return bytes(result)


# Headers


def damage_header(rng, data):
    """Edits of the header's JSON; the tensors' bytes stay what they are."""
    size = int.from_bytes(data[:8], "little")
    try:
        pairs = list(json.loads(data[8 : 8 + size]).items())
    except (ValueError, AttributeError, RecursionError):
        return damage_bytes(rng, data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        edit_header(rng, pairs)
    text = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs)
    text = rng.choice(["{%s}"] * 40 + ["[%s]", "%s", "{%s", "{%s}}", '{"a":{%s}}']) % text
    encoded = text.encode(rng.choice(["utf-8"] * 40 + ["utf-16", "utf-7"]))
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


def edit_header(rng, pairs):
    """One change of a list of header entries, in place."""
    at = rng.randrange(len(pairs)) if pairs else None
    if at is None or not isinstance(pairs[at][1], dict):
        pairs.append((rng.choice(SUFFIXES), rng.choice(ODD)))
        return
    key, entry = pairs[at][0], dict(pairs[at][1])
    shape = entry.get("shape")
    match rng.randrange(9):
        case 0:
            key = renamed(rng, key, [k for k, _ in pairs])
        case 1:
            pairs.append(rng.choice(pairs))
            return
        case 2:
            del pairs[at]
            return
        case 3:
            entry["dtype"] = rng.choice(TYPES)
        case 4 if isinstance(shape, list):
            odd = [1] * 70, [0], [2**32, 2**32], [*shape, 1], shape[:-1], [0, 2**62], shape[::-1]
            entry["shape"] = rng.choice([*odd, [rng.choice(ODD)], [1, *shape], [*shape, 0]])
        case 5:
            offsets = entry.get("data_offsets")
            offsets = offsets if isinstance(offsets, list) else [0, 0]
            entry["data_offsets"] = [rng.choice([o, 1, -1, 8, 2**63]) for o in offsets[:2]]
        case 6:
            entry[rng.choice([*entry, "new"])] = rng.choice(ODD)
        case 7:
            entry = rng.choice([*ODD, {}, [entry]])
        case _:
            pairs.insert(at, ("__metadata__", odd_metadata(rng, {})))
            return
    pairs[at] = (key, entry)


def renamed(rng, key, keys):
    """Another name for a tensor: other suffix, prefix, owner, or something odd."""
    stem, dot, end = key.partition(rng.choice([".lora", ".", ".hada", "."]))
    other = rng.choice(keys or [key])
    odd = "", ".", key + "." + end, "\0" + key, key * 50, "é" + key, "a" * 100_000, "a." * 100_000
    names = [stem + rng.choice(SUFFIXES), rng.choice(PREFIXES) + stem + dot + end, rng.choice(odd)]
    return rng.choice([*names, other, other.partition(".")[0] + dot + end])


def odd_metadata(rng, strings):
    """Metadata with broken, huge or contradictory entries."""
    fields = [
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
        "use_dora", "x"
    ]  # fmt: skip
    config = {
        rng.choice(["unet.", "transformer.", "text_encoder.", ""]) + rng.choice(fields):
        rng.choice([*ODD, {rng.choice(PATTERNS): rng.choice(ODD)}, {"to_q": 2}, 4])
        for _ in range(rng.randrange(5))
    }  # fmt: skip
    key = rng.choice(METADATA)
    record = {"operation": rng.choice(ODD), "inputs": rng.choice([*ODD, [{}], [{"name": None}]])}
    text = json.dumps(rng.choice([config, config, record, rng.choice(ODD)]))
    cut, deep = text[: rng.randrange(len(text))], "[" * rng.choice([10, 100_000])
    value = rng.choice([text, text, text, cut, deep, "x" * 10**6, "\x00", "1" * 5000, "", *strings])
    return {**strings, key: value}


# Tensors


def damage_tensors(rng, data):
    """A well-formed file whose tensors or names do not make sense together."""
    try:
        tensors = load(data)
        strings = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        strings = strings.get("__metadata__") or {}
    except Exception:  # not readable as it is: damaged before
        return damage_bytes(rng, data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if tensors:
            edit_tensors(rng, tensors)
    if rng.random() < 0.2:
        strings = odd_metadata(rng, strings)
    try:
        return save(tensors, strings)
    except Exception:  # not a file that can be written
        return damage_header(rng, data)


def edit_tensors(rng, tensors):
    """One change of a dictionary of tensors, in place."""
    key = rng.choice(list(tensors))
    tensor, other = tensors[key], tensors[rng.choice(list(tensors))]
    match rng.randrange(11):
        case 0 | 1:
            tensors[renamed(rng, key, list(tensors))] = tensors.pop(key)
        case 2:
            tensors[renamed(rng, key, list(tensors))] = rng.choice([tensor, other])
        case 3:
            del tensors[key]
        case 4:
            tensors[key] = tensor.to(rng.choice(DTYPES))
        case 5:
            real = tensor.real if tensor.is_complex() else tensor
            flat = real.to(torch.float64).reshape(-1).clone()
            flat[rng.choice([slice(None), slice(0, 1), slice(1, None)])] = rng.choice(VALUES)
            tensors[key] = flat.reshape(tensor.shape).to(rng.choice([tensor.dtype, torch.float32]))
        case 6:
            changes = (
                lambda t: t[:-1], lambda t: t[..., :-1], lambda t: t.T if t.ndim == 2 else t[0],
                lambda t: t[None], lambda t: t[..., None], lambda t: t.reshape(-1),
                lambda t: t[:0], lambda t: torch.cat([t, t]), lambda t: t[..., None, None],
                lambda t: t.reshape(t.shape + (1,) * 9), lambda t: t[None, ..., None],
            )  # fmt: skip
            with contextlib.suppress(IndexError, RuntimeError):
                tensors[key] = rng.choice(changes)(tensor)
        case 7:
            shape = rng.choice([(), (1,), (2,), (0,), (1, 1)])
            tensors[key] = torch.full(shape, rng.choice(VALUES), dtype=torch.float64)
        case 8:
            tensors[key] = other
        case 9:
            shape = rng.choice(
                [(20_000, 1), (1, 20_000), (3000, 1), (1, 3000), (1, 1), (3, 3, 3, 3)]
            )
            tensors[key] = torch.ones(shape, dtype=rng.choice([torch.float32, torch.float16]))
        case _:
            tensors.update(load(originals()[rng.choice(list(originals()))]))


# Configurations and pickles


def damage_config(rng, data):
    """An `adapter_config.json` or record with fields changed, added or cut."""
    config = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*config, "layer_replication", "alora_invocation_tokens", "devec", "x"])
        names = ["first", "second.layer", "0.up", ".*", *PATTERNS]
        value = rng.choice(
            [*ODD, rng.sample(names, 2), {rng.choice(names): rng.choice(ODD)}, *names]
        )
        config[key] = rng.choice([value, [value], {"first": value}])
        if rng.random() < 0.1:
            config.pop(rng.choice(list(config)))
    text = json.dumps(config).encode()
    return text if rng.random() < 0.8 else damage_bytes(rng, text)


def pickled(rng, data):
    """A golden file's tensors, or something else, as `torch.save` writes them."""
    held = rng.choice(
        [load(data)] * 5 + [{"state_dict": load(data)}, load(data) | {"step": 3}, [1], 7]
    )
    file = io.BytesIO()
    torch.save(held, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return file.getvalue()


@dataclass
class Case:
    """Files to be read: by name, the one or the directory to be read, and whose damage it is."""

    files: dict
    path: str
    original: str = ""
    allow_pickle: bool = False


# Most of the damage is to what the tensors say, which gets furthest.
DAMAGES = (
    damage_bytes,
    damage_header,
    damage_header,
    damage_tensors,
    damage_tensors,
    damage_tensors,
)


def make_case(number):
    """The files of a case."""
    rng = random.Random(number)
    kind = rng.random()
    name = rng.choice(list(originals()))
    if kind < 0.03:
        ends = ["safetensors", "SAFETENSORS", "sft", "pt", "bin", "ckpt", "txt"]
        junk = [b"", b"\0", b"{}", b"hello\n" * 20, rng.randbytes(200), b"\x80\x04",
                b"PK\x03\x04" * 9]  # fmt: skip
        path = f"a.{rng.choice(ends)}"
        return Case({path: rng.choice(junk)}, path, allow_pickle=rng.random() < 0.5)
    if kind < 0.08:
        path = f"a.{rng.choice(['pt', 'bin', 'ckpt', 'pth'])}"
        data = pickled(rng, originals()[name])
        for _ in range(rng.randrange(3)):
            data = damage_bytes(rng, data)
        return Case({path: data}, path, name, allow_pickle=rng.random() < 0.8)
    if kind < 0.28:
        files = dict(rng.choice(directories()))
        if rng.random() < 0.1:
            files["devec.json"] = b'{"operation": "combine", "inputs": [], "parameters": {}}'
        name = rng.choice([*files, CONFIG])
        damage = rng.choice(DAMAGES) if name == WEIGHTS else damage_config
        return Case({**files, name: damage(rng, files[name])}, ".")
    data = originals()[name]
    for _ in range(rng.choice([1, 1, 1, 2])):
        data = rng.choice(DAMAGES)(rng, data)
    return Case({"a.safetensors": data}, "a.safetensors", name)
