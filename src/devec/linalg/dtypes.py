"""Working precisions, their tolerances, and devices."""

from __future__ import annotations

import torch
from torch import Tensor

from devec.errors import IncompatibleError

# Singular values below this fraction of the largest are rounding: a few units of roundoff of the
# precision in which factors are combined.
RANK_RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}

# If less than this fraction of the terms of a squared norm remains, cancellation has cost digits.
# The entries themselves are then summed, in blocks of BLOCK_ROWS rows.
CANCELLATION = 0.1
BLOCK_ROWS = 128


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision in which factors are combined: float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def basis_dtype(device: torch.device) -> torch.dtype:
    """The precision in which bases are computed: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_float64_device(matrix: Tensor) -> Tensor:
    """A small matrix on a device with float64: its own device, or the CPU."""
    return matrix.cpu() if matrix.device.type == "mps" else matrix


def to_float64(matrix: Tensor) -> Tensor:
    """A small matrix in float64, on a device that supports it."""
    return on_float64_device(matrix).double()


def require_device(device: torch.device | str) -> None:
    """Raise `IncompatibleError` unless tensors can be placed on the device."""
    try:
        torch.zeros(1, device=device).item()
    # torch asserts that it was built for a device before it raises an error of its own
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest is long
        raise IncompatibleError(
            f"device {str(device)!r} cannot be used ({reason}); leave it out to compute on the CPU"
        ) from error
