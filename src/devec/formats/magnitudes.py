"""The magnitudes of DoRAs in files: their keys, shapes and axes.

``dora_scale`` (LyCORIS, OneTrainer; read by ComfyUI) has the shape in which it multiplies a weight:
(out, 1) or (1, in), with ones behind for a convolution. ``lora_magnitude_vector`` (PEFT, diffusers)
and ``magnitude`` (ai-toolkit) are of outputs only. What LyCORIS and OneTrainer add to the norms
lest they be zero is left out: it is the roundoff of their precision.
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

# What the parts of a module are called that hold magnitudes: of either axis, or of outputs.
MAGNITUDE_PARTS = ("dora_scale", "magnitude")


@dataclass(frozen=True, slots=True)
class MagnitudeSlot:
    """Where the magnitudes of one module are stored, if it has any.

    Attributes:
        key: Their key.
        axis: The axis they were read on, None if there were none.
        shape: The shape they were read with; empty for the usual one.
    """

    key: str
    axis: Axis | None = None
    shape: tuple[int, ...] = ()

    @property
    def everywhere(self) -> bool:
        """Whether readers of the key take all modules of a model for DoRAs if one is."""
        return MAGNITUDE_VECTOR in self.key

    def for_result(self) -> MagnitudeSlot:
        """The same for a result: transformers, and so diffusers' text encoders, want an ending."""
        if not self.key.endswith(MAGNITUDE_VECTOR):
            return self
        return dataclasses.replace(self, key=f"{self.key}.weight")

    def under(self, key: str) -> MagnitudeSlot:
        """The same magnitudes under another key, in the shape that is usual there."""
        return self if key == self.key else dataclasses.replace(self, key=key, shape=())

    def write(
        self, magnitude: Magnitude, kernel: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        """The stored tensor.

        Args:
            magnitude: The magnitudes.
            kernel: Shape of a convolution's kernel.
            dtype: Storage type asked for.

        Returns:
            The tensor, in the shape it was read with or the usual one.

        Raises:
            UnsupportedError: If there is no form for magnitudes of the axis.
            OutputError: If a value is too large for the storage type.
        """
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
    """The storage type of magnitudes: never narrower than they are.

    They are few, and what is rounded off them is a fraction of W0 and not of ΔW.

    Args:
        values: The magnitudes, as they were read or computed.
        wanted: The storage type that is asked for.

    Returns:
        The type.
    """
    return values.dtype if wanted is None else torch.promote_types(values.dtype, wanted)


def find_magnitudes(
    parts: Mapping[str, Tensor], shape: tuple[int, int], kernel: tuple[int, ...]
) -> tuple[Tensor, Axis] | None:
    """The magnitudes among the tensors of a module, and their axis.

    Args:
        parts: Part → tensor.
        shape: Shape (out, in) of the weight, that of a convolution flattened.
        kernel: Shape of a convolution's kernel, as far as it is known.

    Returns:
        The magnitudes as stored and the axis; None if there are none.

    Raises:
        FormatError: If which axis they are on cannot be told, or there are not as many as it needs.
    """
    found = [(part, parts[part]) for part in MAGNITUDE_PARTS if part in parts]
    if not found:
        return None
    if len(found) > 1:
        raise FormatError(
            "there are magnitudes both as dora_scale and as lora_magnitude_vector or magnitude; "
            "take one of them out"
        )
    part, stored = found[0]
    size = stored.numel()
    long = [dim for dim, length in enumerate(stored.shape) if length != 1]
    channels = shape[1] // math.prod(kernel)
    fits: dict[Axis, bool] = {"out": long in ([], [0]) and size == shape[0]}
    if part == "magnitude":
        fits["out"] = len(long) <= 1 and size == shape[0]
        expected = f"({shape[0]},)"
    else:
        # the files of LoHas and LoKrs do not always tell the kernel
        known = bool(kernel) or stored.ndim == 2
        fits["in"] = long in ([], [1]) and (
            size == channels if known else shape[1] % max(size, 1) == 0
        )
        expected = f"({shape[0]}, 1) for outputs or (1, {channels}) for inputs"
    axis = next((axis for axis, fit in fits.items() if fit), None)
    if axis is None or not size or (part == "dora_scale" and stored.ndim < 2):
        raise FormatError(
            f"the magnitudes ({part}) have shape {tuple(stored.shape)}, expected {expected}"
        )
    return stored, axis


def warn_of_signs(where: str, magnitudes: Iterable[tuple[str, Tensor]]) -> None:
    """Tell of magnitudes that are no norms: valid, and hardly meant.

    Args:
        where: The file.
        magnitudes: Module and magnitudes, of the DoRAs of the adapter.
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
    """Why magnitudes of inputs cannot be written."""
    return (
        "it is a DoRA with magnitudes of its inputs, and the format has magnitudes of outputs "
        "only; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA and says how near it "
        "is, and kohya's format (--format kohya) has a form for it"
    )
