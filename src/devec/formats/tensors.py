"""Tensors in files: nothing unreadable, odd or non-finite gets past here.

safetensors checks offsets, overlaps and types. What it lets through is checked here: keys that
appear twice, headers beyond all need, tensors of dozens of dimensions, NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.errors import FormatError, OutputError, UnsupportedError, listed

STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Types of eight bits, widened when read: bfloat16 holds each of their values exactly.
_WIDENED = (torch.float8_e4m3fn, torch.float8_e5m2)

_CHUNK = 1 << 22
_LARGEST_HEADER = 1 << 25
_MOST_DIMENSIONS = 5
_LONGEST_KEY = 1000
# No trained weight comes near; squares of what is beyond leave the range of float32.
_LARGEST_VALUE = 1e15
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")

# What goes by the name of a safetensors file after a download that failed.
_MAGIC = {
    b"<!doctyp": "a web page",
    b"<html": "a web page",
    b"\x89png": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"pk\x03\x04": "a ZIP archive or a pickle",
    b"version ": "a pointer of Git LFS",
}

_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile(NamedTuple):
    """What a file holds: tensors, the strings of its header, and the types of widened tensors."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    narrow: dict[str, torch.dtype]


def is_tensor_file(path: Path) -> bool:
    """Whether a path is named like a file of tensors."""
    return path.suffix.lower() in (".safetensors", ".sft", *_PICKLES)


def read_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFile:
    """Read all tensors of a file.

    Args:
        path: A safetensors file or, if allowed, a pickle of a state dict.
        allow_pickle: Whether a pickle may be read. Nothing but tensors is unpickled from it.

    Returns:
        Key → tensor as stored, types of eight bits widened to bfloat16; the header's strings; and
        the types of what was widened.

    Raises:
        FormatError: If the file cannot be read, is truncated or corrupt, or is empty.
        UnsupportedError: If a tensor is of a type that adapters have not.
    """
    if path.suffix.lower() in _PICKLES:
        found = TensorFile(_read_pickle(path, allowed=allow_pickle), {}, {})
    else:
        found = _read_safetensors(path)
    if not found.tensors:
        raise FormatError("the file holds no tensors")
    for key, tensor in found.tensors.items():
        if tensor.ndim > _MOST_DIMENSIONS:
            raise FormatError(
                f"tensor {key!r} has {tensor.ndim} dimensions, expected {_MOST_DIMENSIONS} at most"
            )
        if len(key) > _LONGEST_KEY:
            raise FormatError(f"a key has {len(key)} characters, expected {_LONGEST_KEY} at most")
        if tensor.dtype in _WIDENED:
            found.narrow[key] = tensor.dtype
            found.tensors[key] = tensor.to(torch.bfloat16)
        elif tensor.dtype not in _SAFETENSORS_TYPES:
            raise UnsupportedError(
                f"tensor {key!r} has type {tensor.dtype}; expected {', '.join(STORAGE_DTYPES)} for "
                "factors, or integers for what is carried over"
            )
    return found


def _read_safetensors(path: Path) -> TensorFile:
    """Tensors and metadata of a safetensors file."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # safetensors meets sizes that torch cannot address with errors of torch's own
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"not a readable safetensors file, it may be truncated or corrupt ({error})"
        ) from error
    return TensorFile(tensors, metadata, {})


def _check_header(path: Path) -> None:
    """Refuse headers of excessive size and those that name a tensor twice."""
    with path.open("rb") as file:
        start = file.read(8)
        for magic, what in _MAGIC.items():
            if start.lower().startswith(magic):
                raise FormatError(f"this is {what}, not a safetensors file")
        if not start:
            raise FormatError("the file is empty")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > _LARGEST_HEADER:
            raise FormatError(
                f"not a readable safetensors file: its header would have {length} bytes, expected "
                f"{_LARGEST_HEADER} at most"
            )
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=_require_distinct)
    except RecursionError as error:
        raise FormatError("not a readable safetensors file: its header is nested") from error


def _require_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys appears twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise FormatError(f"the header names {listed(twice)} more than once")
    return result


def _read_pickle(path: Path, *, allowed: bool) -> dict[str, Tensor]:
    """The tensors of a pickled state dict."""
    if not allowed:
        raise FormatError(
            "this is a pickle, which can run code when it is read. If you trust where it comes "
            "from, allow it (--allow-pickle, allow_pickle=True)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols, which are not the user's concern
            # from memory, so that no length that the file claims is allocated
            held = torch.load(BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make the unpickler raise whatever they spell
        raise FormatError(
            "not a readable pickle of tensors: it is broken, or holds something else, which was "
            "not run"
        ) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict):
        raise FormatError(f"expected a pickled dictionary of tensors, got {type(held).__name__}")
    odd = [str(key) for key, value in held.items() if not isinstance(value, Tensor)]
    if odd or not all(isinstance(key, str) for key in held):
        raise FormatError(f"expected names and tensors, but {listed(odd)} are something else")
    return {key: tensor.detach() for key, tensor in held.items()}


def require_factor(key: str, tensor: Tensor) -> Tensor:
    """Check that a tensor can be computed with.

    Args:
        key: Its name, for messages.
        tensor: The tensor.

    Returns:
        The tensor itself.

    Raises:
        UnsupportedError: If its type is none of `STORAGE_DTYPES`.
        FormatError: If it holds NaN, infinity or values beyond all reason.
    """
    if tensor.dtype not in STORAGE_DTYPES.values():
        raise UnsupportedError(
            f"tensor {key!r} has type {tensor.dtype}; expected one of {', '.join(STORAGE_DTYPES)}"
        )
    require_finite(key, tensor)
    if tensor.dtype not in (torch.float16, torch.bfloat16) and tensor.numel():
        largest = float(tensor.abs().max())
        if largest > _LARGEST_VALUE:
            raise FormatError(
                f"tensor {key!r} holds values up to {largest:.3g}, expected at most "
                f"{_LARGEST_VALUE:.0e}"
            )
    return tensor


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """Check that a tensor has no NaN and no infinity.

    Args:
        key: Its name, for messages.
        tensor: The tensor, of any type.

    Returns:
        The tensor itself.

    Raises:
        FormatError: If it has.
    """
    if bad := _not_finite(tensor):
        raise FormatError(f"tensor {key!r} holds NaN or infinity in {bad} of its values")
    return tensor


def _not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinity."""
    if not tensor.is_floating_point():
        return 0
    # a sum is not finite if a value is not, and needs no mask as large as a base weight
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return 0 if math.isfinite(total) else int((~torch.isfinite(tensor)).sum())


def storable(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is stored, refused where the storage type cannot hold it.

    Args:
        key: Its key, for messages.
        tensor: The tensor.
        dtype: The storage type.

    Returns:
        A contiguous tensor of its own, where the other lies.

    Raises:
        OutputError: If a value is too large for the storage type.
    """
    result = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    as_read = tensor.dtype == dtype in (torch.float16, torch.bfloat16)  # none are computed in these
    if not as_read and _not_finite(result):
        raise OutputError(
            f"tensor {key!r} has values up to {float(tensor.abs().max()):.3g}, more than {dtype} "
            "can hold; choose a wider type (--dtype float32)"
        )
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing but what is in it.

    The safetensors library writes the same tensors with the metadata in another order each time.

    Args:
        path: Where to write.
        tensors: Key → tensor.
        metadata: The header's strings.
    """
    order = _in_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key in order:
        tensor = tensors[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            file.write(_bytes(tensors[key]))


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the data that `write_tensors` writes after the header."""
    digest = hashlib.sha256()
    for key in _in_order(tensors):
        digest.update(_bytes(tensors[key]))
    return digest.hexdigest()


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys in the order of the data: wide types first, so that every tensor is aligned."""
    return sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
