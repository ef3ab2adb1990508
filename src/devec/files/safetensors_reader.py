"""Reading files of tensors, and refusing malformed files and non-finite values.

safetensors checks offsets, overlaps and dtypes. This module also checks for repeated keys, headers
that are too large, tensors with too many dimensions, and NaN.
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
from devec.files.random_access import OpenFile, TensorSpan
from devec.lazy import LazyMapping, mapped, outlines
from devec.linalg.buffers import empty

STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# 8-bit dtypes, converted to bfloat16 when read, which represents their values exactly.
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_MAX_HEADER = 1 << 25
_MAX_DIMENSIONS = 5
_MAX_KEY = 1000
# Far above any trained weight; squares of larger values exceed the range of float32.
_MAX_VALUE = 1e15
PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")

# The first bytes of other files that failed downloads leave under the name of a safetensors file.
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

# All types that are recognised; those that adapters do not have are refused by name.
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
    """The contents of a file of tensors.

    Attributes:
        tensors: Key → tensor.
        metadata: The strings of the header.
        narrow: Key → stored dtype of the tensors that were converted from 8 bits.
        sha256: Digest of the file; empty if the contents were never in a file.
    """

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]
    narrow: dict[str, torch.dtype]
    sha256: str = ""


def is_tensor_file(path: Path) -> bool:
    """Whether a path has the suffix of a file of tensors."""
    return path.suffix.lower() in (".safetensors", ".sft", *PICKLE_ENDINGS)


def read_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFile:
    """Open a file of tensors; those of a safetensors file are read on access.

    Args:
        path: A safetensors file or, if allowed, a pickle of a state dict.
        allow_pickle: Whether to read a pickle; only tensors are unpickled.

    Returns:
        The contents, with 8-bit floats converted to bfloat16.

    Raises:
        FormatError: If the file cannot be read, is truncated, corrupt or empty, or was replaced
            while it was being opened.
        UnsupportedError: If a tensor has a dtype that adapters do not have.
    """
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str] = {}
    opened = version(path)
    if path.suffix.lower() in PICKLE_ENDINGS:
        tensors = _read_pickle(path, allowed=allow_pickle)
    else:
        tensors, metadata = _open_safetensors(path)
    if not tensors:
        raise FormatError("the file holds no tensors")
    narrow: dict[str, torch.dtype] = {}
    for key, tensor in outlines(tensors).items():
        if tensor.ndim > _MAX_DIMENSIONS:
            raise FormatError(
                f"tensor {key!r} has {tensor.ndim} dimensions, expected {_MAX_DIMENSIONS} at most"
            )
        if len(key) > _MAX_KEY:
            raise FormatError(f"a key has {len(key)} characters, expected {_MAX_KEY} at most")
        if tensor.dtype in FLOAT8_DTYPES:
            narrow[key] = tensor.dtype
        elif tensor.dtype not in SAFETENSORS_TYPES:
            raise UnsupportedError(
                f"tensor {key!r} has type {tensor.dtype}; expected {', '.join(STORAGE_DTYPES)} for "
                "factors, or integers for carried tensors"
            )
    if narrow:
        tensors = mapped(
            tensors, lambda _, t: t.to(torch.bfloat16) if t.dtype in FLOAT8_DTYPES else t
        )
    digest = sha256(path)
    if version(path) != opened:  # the tensors would not be those of the digest
        raise FormatError("it was replaced while it was being opened; run again")
    return TensorFile(tensors, metadata, narrow, digest)


@lru_cache(maxsize=1 << 12)
def outline(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An outline: a meta tensor, cached, since adapters have many tensors of few shapes."""
    with torch.inference_mode(False):  # the cached tensor must not be an inference tensor
        return torch.empty(shape, dtype=dtype, device="meta")


def _open_safetensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Lazy tensors and metadata of a safetensors file, which stays open."""
    try:
        opened = OpenFile(path)
        header, start = _read_header(path)
        with safe_open(path, framework="pt") as file:  # checks offsets and types against the size
            metadata, order = file.metadata() or {}, [*map(sys.intern, file.keys())]
        spans = {key: _span(header[key], start) for key in order}
        known = {key: outline(span.shape, span.dtype) for key, span in spans.items()}
    # for sizes that torch cannot address, safetensors passes on errors of torch
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, FormatError | UnsupportedError):
            raise
        raise FormatError(
            f"not a readable safetensors file, it may be truncated or corrupt ({error})"
        ) from error
    return LazyMapping(known, lambda key: opened.read(spans[key])), metadata


def _span(entry: Mapping[str, Any], start: int) -> TensorSpan:
    """The span of the tensor of a header's entry; the data begins at offset `start`."""
    dtype = _TYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedError(
            f"there are tensors of type {entry['dtype']}, which adapters do not have"
        )
    return TensorSpan(start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of its data."""
    with path.open("rb") as file:
        start = file.read(8)
        for magic, what in _MAGIC.items():
            if start.lower().startswith(magic):
                raise FormatError(f"this is {what}, not a safetensors file")
        if not start:
            raise FormatError("the file is empty")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > _MAX_HEADER:
            raise FormatError(
                f"not a readable safetensors file: its header would have {length} bytes, expected "
                f"{_MAX_HEADER} at most"
            )
        header = file.read(length)
    try:
        return json.loads(header, object_pairs_hook=_without_repeated_keys), 8 + length
    except RecursionError as error:
        raise FormatError("not a readable safetensors file: its header is nested") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs, refused if a key is repeated."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = sorted(key for key, count in counts.items() if count > 1)
        raise FormatError(f"the header names {listed(repeated)} more than once")
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
            warnings.simplefilter("ignore")  # about pickle protocols
            # from memory, so that no size that the file declares is allocated
            loaded = torch.load(BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes can make the unpickler raise anything
        raise FormatError(
            "not a readable pickle of tensors: it is corrupt, or holds something else, which was "
            "not run"
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise FormatError(f"expected a pickled dictionary of tensors, got {type(loaded).__name__}")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others or not all(isinstance(key, str) for key in loaded):
        raise FormatError(f"expected names and tensors, but {listed(others)} are something else")
    return {key: tensor.detach() for key, tensor in loaded.items()}


def require_factor(key: str, tensor: Tensor) -> Tensor:
    """Refuse a factor with a dtype not in `STORAGE_DTYPES`, or with NaN, infinity or huge value."""
    if tensor.dtype not in STORAGE_DTYPES.values():
        raise UnsupportedError(
            f"tensor {key!r} has type {tensor.dtype}; expected one of {', '.join(STORAGE_DTYPES)}"
        )
    require_finite(key, tensor)
    wide = tensor.dtype not in (torch.float16, torch.bfloat16)
    if wide and tensor.numel() and not tensor.is_meta:
        largest = float(tensor.abs().max())
        if largest > _MAX_VALUE:
            raise FormatError(
                f"tensor {key!r} holds values up to {largest:.3g}, expected at most "
                f"{_MAX_VALUE:.0e}"
            )
    return tensor


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """Refuse a tensor, of any dtype, with NaN or infinity."""
    if bad := _count_not_finite(tensor):
        raise FormatError(f"tensor {key!r} holds NaN or infinity in {bad} of its values")
    return tensor


def _count_not_finite(tensor: Tensor) -> int:
    """The number of values of a tensor that are NaN or infinity."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    # the sum is finite only if all values are, and needs no mask of the size of a base weight;
    # 16-bit values are summed in 16 bits, which is faster, and an overflow only costs a recount
    return 0 if math.isfinite(tensor.sum()) else int((~torch.isfinite(tensor)).sum())


def storable(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor converted to its storage dtype and contiguous, refused if values do not fit."""
    if tensor.is_meta:
        return outline(tuple(tensor.shape), dtype)
    unchanged = tensor.dtype == dtype and tensor.is_contiguous()
    result = tensor if unchanged else empty(tensor.shape, dtype, tensor.device).copy_(tensor)
    if _count_not_finite(result):
        if bad := _count_not_finite(tensor):
            raise OutputError(
                f"tensor {key!r} holds NaN or infinity in {bad} of its values, so it is not written"
            )
        raise OutputError(
            f"tensor {key!r} has values up to {float(tensor.abs().max()):.3g}, more than {dtype} "
            "can hold; choose a wider type (--dtype float32)"
        )
    return result
