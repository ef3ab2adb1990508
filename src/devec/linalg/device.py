"""Devices that tensors can be put on."""

from __future__ import annotations

import torch

from devec.errors import IncompatibleError


def require_device(device: torch.device | str) -> None:
    """Check that tensors can be put on a device.

    Args:
        device: The device.

    Raises:
        IncompatibleError: If they cannot.
    """
    try:
        torch.zeros(1, device=device).item()
    # torch asserts that it was built for a device before it raises anything of its own
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on at length
        raise IncompatibleError(
            f"device {str(device)!r} cannot be used ({reason}); leave it out to compute on the CPU"
        ) from error
