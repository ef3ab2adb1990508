"""Reading safetensors files: nothing unreadable, odd or non-finite gets past here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.errors import FormatError, UnsupportedError

STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_CHUNK = 1 << 22


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: The file.

    Returns:
        Key → tensor, as stored.

    Raises:
        FormatError: If the file cannot be read, is truncated or corrupt, or is empty.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"not a readable safetensors file, it may be truncated or corrupt ({error})"
        ) from error
    if not tensors:
        raise FormatError("the file holds no tensors")
    return tensors


def require_factor(key: str, tensor: Tensor) -> Tensor:
    """Check that a tensor can be computed with.

    Args:
        key: Its name, for messages.
        tensor: The tensor.

    Returns:
        The tensor itself.

    Raises:
        UnsupportedError: If its type is none of `STORAGE_DTYPES`.
        FormatError: If it holds NaN or infinity.
    """
    if tensor.dtype not in STORAGE_DTYPES.values():
        raise UnsupportedError(
            f"tensor {key!r} has type {tensor.dtype}; expected one of {', '.join(STORAGE_DTYPES)}"
        )
    return require_finite(key, tensor)


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
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise FormatError(f"tensor {key!r} holds NaN or infinity in {bad} of its values")
    return tensor


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
