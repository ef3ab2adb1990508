"""The magnitudes of DoRAs in files: their keys, shapes and axes.

``dora_scale`` (LyCORIS, OneTrainer; read by ComfyUI) broadcasts against the weight: its shape is
(out, 1) or (1, in), followed by ones for a convolution. ``lora_magnitude_vector`` (PEFT, diffusers)
and ``magnitude`` (ai-toolkit) are for outputs only. The epsilon that LyCORIS and OneTrainer add to
the norms is ignored: it is of the size of their roundoff.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.deltas.gains import Axis, Magnitude
from devec.errors import FormatError, UnsupportedError, listed, warn
from devec.files.safetensors_reader import storable
from devec.naming.conventions import DORA_SCALE, MAGNITUDE_VECTOR

# Parts of a module that store magnitudes: on either axis, and of outputs only.
MAGNITUDE_PARTS = ("dora_scale", "magnitude")


@dataclass(frozen=True, slots=True)
class MagnitudeSlot:
    """Where the magnitudes of a module are stored, if it has any.

    Attributes:
        key: Key of the tensor.
        axis: The axis in the file that was read; None if there were no magnitudes.
        shape: The shape in that file; empty for the usual shape.
    """

    key: str
    axis: Axis | None = None
    shape: tuple[int, ...] = ()

    @property
    def everywhere(self) -> bool:
        """Whether readers of the key treat all modules of a model as DoRAs if one is a DoRA."""
        return MAGNITUDE_VECTOR in self.key

    def for_result(self) -> MagnitudeSlot:
        """The slot of a result: transformers, and so diffusers' text encoders, require a suffix."""
        if not self.key.endswith(MAGNITUDE_VECTOR):
            return self
        return dataclasses.replace(self, key=f"{self.key}.weight")

    def under(self, key: str) -> MagnitudeSlot:
        """The slot under another key, with the usual shape there."""
        return self if key == self.key else dataclasses.replace(self, key=key, shape=())

    def write(
        self, magnitude: Magnitude, kernel: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        """The stored tensor, in the shape that was read or the usual one."""
        if magnitude.axis == "in" and not self.key.endswith(DORA_SCALE):
            raise UnsupportedError(of_outputs_only())
        values, shape = magnitude.values, self.shape
        if magnitude.axis != self.axis or not shape:
            ones = (1,) * len(kernel)
            shape = (len(values), 1, *ones) if magnitude.axis == "out" else (1, len(values), *ones)
            if not self.key.endswith(DORA_SCALE):
                shape = (1, len(values), *ones) if kernel and self.everywhere else (len(values),)
        return storable(self.key, values.reshape(shape), magnitude_dtype(values, dtype))


def magnitude_dtype(values: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The storage type of magnitudes: as requested, but never narrower than their own type."""
    # they are few, and their rounding errors are a fraction of W0, not of ΔW
    return values.dtype if wanted is None else torch.promote_types(values.dtype, wanted)


def find_magnitudes(
    parts: Mapping[str, Tensor], shape: tuple[int, int], kernel: tuple[int, ...]
) -> tuple[Tensor, Axis] | None:
    """The magnitudes among the tensors of a module, and their axis.

    Args:
        parts: Part → tensor.
        shape: Shape (out, in) of the weight, that of a convolution flattened.
        kernel: Shape of a convolution's kernel, if the tensors tell it.

    Returns:
        The magnitudes as stored, and the axis; None if there are none.

    Raises:
        FormatError: If their shape fits neither axis.
    """
    present = [(part, parts[part]) for part in MAGNITUDE_PARTS if part in parts]
    if not present:
        return None
    if len(present) > 1:
        raise FormatError(
            "there are magnitudes both as dora_scale and as lora_magnitude_vector or magnitude; "
            "remove one of them"
        )
    part, stored = present[0]
    size = stored.numel()
    long = [dim for dim, length in enumerate(stored.shape) if length != 1]
    channels = shape[1] // math.prod(kernel)
    fits: dict[Axis, bool] = {"out": long in ([], [0]) and size == shape[0]}
    if part == "magnitude":
        fits["out"] = len(long) <= 1 and size == shape[0]
        expected = f"({shape[0]},)"
    else:
        # the tensors of LoHas and LoKrs do not always tell the kernel
        kernel_known = bool(kernel) or stored.ndim == 2
        fits["in"] = long in ([], [1]) and (
            size == channels if kernel_known else shape[1] % max(size, 1) == 0
        )
        expected = f"({shape[0]}, 1) for outputs or (1, {channels}) for inputs"
    axis = next((axis for axis, fit in fits.items() if fit), None)
    if axis is None or not size or (part == "dora_scale" and stored.ndim < 2):
        raise FormatError(
            f"the magnitudes ({part}) have shape {tuple(stored.shape)}, expected {expected}"
        )
    return stored, axis


def warn_of_signs(where: str, magnitudes: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of magnitudes that are not positive: they are valid, but hardly intended.

    Args:
        where: The file.
        magnitudes: Module and magnitudes of each DoRA.
    """
    counts = {m: (int((v == 0).sum()), int((v < 0).sum())) for m, v in magnitudes}
    for what, does, odd in (
        ("zero", "switches an output off", {m: zero for m, (zero, _) in counts.items()}),
        ("negative", "turns an output around", {m: below for m, (_, below) in counts.items()}),
    ):
        if any(odd.values()):
            warn(
                f"{where}: {sum(odd.values())} magnitudes are {what}, each of which {does}; they "
                f"are used as they are, in {listed([m for m, count in odd.items() if count])}"
            )


def of_outputs_only() -> str:
    """The message for magnitudes of inputs that cannot be written."""
    return (
        "it is a DoRA with magnitudes of its inputs, and the format has magnitudes of outputs "
        "only; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA and says how near it "
        "is, and kohya's format (--format kohya) can store it"
    )
