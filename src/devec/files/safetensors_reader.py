"""Tensors in files: nothing unreadable, odd or non-finite gets past here.

safetensors checks offsets, overlaps and types. What it lets through is checked here: keys that
appear twice, headers beyond all need, tensors of dozens of dimensions, NaN.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.errors import FormatError, OutputError, UnsupportedError, listed
from devec.files.digest import sha256, version
from devec.files.random_access import OpenFile, Place
from devec.lazy import LazyMapping, mapped, outlines
from devec.linalg.buffers import empty

STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Types of eight bits, widened when read: bfloat16 holds each of their values exactly.
_WIDENED = (torch.float8_e4m3fn, torch.float8_e5m2)

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

SAFETENSORS_TYPES = {
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

# What is recognised, to be refused by name where adapters have no such tensors.
_TYPES = {
    **{name: dtype for dtype, name in SAFETENSORS_TYPES.items()},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


class TensorFile(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: Key → tensor.
        metadata: The strings of its header.
        narrow: Key → type, of tensors that were widened.
        sha256: Digest of the file; empty for what only would stand in one.
    """

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]
    narrow: dict[str, torch.dtype]
    sha256: str = ""


def is_tensor_file(path: Path) -> bool:
    """Whether a path is named like a file of tensors."""
    return path.suffix.lower() in (".safetensors", ".sft", *_PICKLES)


def read_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFile:
    """The tensors of a file, those of a safetensors file read when they are asked for.

    Args:
        path: A safetensors file or, if allowed, a pickle of a state dict.
        allow_pickle: Whether a pickle may be read. Nothing but tensors is unpickled from it.

    Returns:
        Key → tensor as stored, types of eight bits widened to bfloat16; the header's strings; the
        types of what was widened; and the digest of the file.

    Raises:
        FormatError: If the file cannot be read, is truncated or corrupt, or is empty, or is another
            one in the end.
        UnsupportedError: If a tensor is of a type that adapters have not.
    """
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str] = {}
    opened = version(path)
    if path.suffix.lower() in _PICKLES:
        tensors = _read_pickle(path, allowed=allow_pickle)
    else:
        tensors, metadata = _open_safetensors(path)
    if not tensors:
        raise FormatError("the file holds no tensors")
    narrow: dict[str, torch.dtype] = {}
    for key, tensor in outlines(tensors).items():
        if tensor.ndim > _MOST_DIMENSIONS:
            raise FormatError(
                f"tensor {key!r} has {tensor.ndim} dimensions, expected {_MOST_DIMENSIONS} at most"
            )
        if len(key) > _LONGEST_KEY:
            raise FormatError(f"a key has {len(key)} characters, expected {_LONGEST_KEY} at most")
        if tensor.dtype in _WIDENED:
            narrow[key] = tensor.dtype
        elif tensor.dtype not in SAFETENSORS_TYPES:
            raise UnsupportedError(
                f"tensor {key!r} has type {tensor.dtype}; expected {', '.join(STORAGE_DTYPES)} for "
                "factors, or integers for what is carried over"
            )
    if narrow:
        tensors = mapped(tensors, lambda _, t: t.to(torch.bfloat16) if t.dtype in _WIDENED else t)
    digest = sha256(path)
    if version(path) != opened:  # of which the tensors are not those of the digest
        raise FormatError("it was replaced while it was being opened; run again")
    return TensorFile(tensors, metadata, narrow, digest)


@lru_cache(maxsize=1 << 12)
def outline(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What is known of a tensor; of all that are alike the same, as there are very many."""
    with torch.inference_mode(False):  # what is kept must not be bound to what the caller is in
        return torch.empty(shape, dtype=dtype, device="meta")


def _open_safetensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, which stays open."""
    try:
        held = OpenFile(path)
        header, start = _read_header(path)
        with safe_open(path, framework="pt") as file:  # checks offsets and types against the size
            metadata, order = file.metadata() or {}, [*map(sys.intern, file.keys())]
        places = {key: _place(header[key], start) for key in order}
        known = {key: outline(place.shape, place.dtype) for key, place in places.items()}
    # safetensors meets sizes that torch cannot address with errors of torch's own
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, FormatError | UnsupportedError):
            raise
        raise FormatError(
            f"not a readable safetensors file, it may be truncated or corrupt ({error})"
        ) from error
    return LazyMapping(known, lambda key: held.read(places[key])), metadata


def _place(entry: Mapping[str, Any], start: int) -> Place:
    """Where the tensor of a header's entry lies."""
    dtype = _TYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedError(
            f"there are tensors of type {entry['dtype']}, which adapters have not"
        )
    return Place(start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the data begins; no excessive size, and no tensor named twice."""
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
        return json.loads(header, object_pairs_hook=_require_distinct), 8 + length
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
    wide = tensor.dtype not in (torch.float16, torch.bfloat16)
    if wide and tensor.numel() and not tensor.is_meta:
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
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    # a sum is not finite if a value is not, and needs no mask as large as a base weight; summing
    # 16 bits in their own type takes a third of the time, and an overflow only a second look
    return 0 if math.isfinite(tensor.sum()) else int((~torch.isfinite(tensor)).sum())


def storable(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is stored, refused where the storage type cannot hold it.

    Args:
        key: Its key, for messages.
        tensor: The tensor.
        dtype: The storage type.

    Returns:
        A contiguous tensor, where the other lies; the same one if it is stored as it is.

    Raises:
        OutputError: If it holds NaN or infinity, or a value too large for the storage type.
    """
    if tensor.is_meta:
        return outline(tuple(tensor.shape), dtype)
    as_it_is = tensor.dtype == dtype and tensor.is_contiguous()
    result = tensor if as_it_is else empty(tensor.shape, dtype, tensor.device).copy_(tensor)
    if _not_finite(result):
        if bad := _not_finite(tensor):
            raise OutputError(
                f"tensor {key!r} holds NaN or infinity in {bad} of its values, so it is not written"
            )
        raise OutputError(
            f"tensor {key!r} has values up to {float(tensor.abs().max()):.3g}, more than {dtype} "
            "can hold; choose a wider type (--dtype float32)"
        )
    return result
