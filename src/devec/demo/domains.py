"""The visual domains of the demo: the digits 0 to 9, rendered in five styles.

All renderers draw the same strokes, so two domains differ in appearance only. `textures` is the
unrelated task: ten kinds of surface without digits, classified by the same ten outputs.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d, interpolate, pad

SIZE = 24
"""Height and width of every image in pixels, three times those of the raw 8 x 8 digits."""

CLASSES = 10
"""Number of outputs of the common classifier head: ten digits, or ten textures."""

Renderer = Callable[[Tensor, Generator], Tensor]
"""Renders raw digits, (n, 8, 8), uint8 in 0..16, as images, (n, 3, SIZE, SIZE), float32 in [0, 1].

The generator is the source of all variation: colours, noise, light.
"""


def ink(digits: Tensor, generator: Generator) -> Tensor:
    """Draw digits in blue-black ink on warm, slightly blotched paper."""
    count = len(digits)
    pressure = _uniform((count, 1, 1, 1), 0.75, 1.0, generator)
    paper = _colour(0.93, 0.89, 0.79) + 0.06 * _noise(count, 6, generator)
    return _blend(paper, _colour(0.08, 0.10, 0.32), pressure * _strokes(digits))


def chalk(digits: Tensor, generator: Generator) -> Tensor:
    """Draw digits in broken chalk strokes on a smeared green blackboard."""
    count = len(digits)
    board = _colour(0.10, 0.22, 0.16) + 0.10 * _noise(count, 4, generator)
    breaks = (_noise(count, SIZE, generator) > -1.0).float()
    return _blend(board, _colour(0.94, 0.94, 0.88), breaks * _strokes(digits))


def sign(digits: Tensor, generator: Generator) -> Tensor:
    """Draw digits on a street sign in two random colours, between parts of other digits."""
    count = len(digits)
    dark = _uniform((count, 3, 1, 1), 0.0, 0.45, generator)
    light = _uniform((count, 3, 1, 1), 0.55, 1.0, generator)
    swap = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    plate, paint = torch.where(swap, light, dark), torch.where(swap, dark, light)
    strokes = _strokes(digits)
    neighbours = strokes[torch.randperm(count, generator=generator)]
    shift = SIZE * 3 // 4
    left, right = pad(neighbours, (0, shift))[..., shift:], pad(neighbours, (shift, 0))[..., :SIZE]
    painted = torch.maximum(strokes, torch.maximum(left, right))
    ramp = torch.linspace(-1.0, 1.0, SIZE) * _uniform((count, 1, 1, 1), -0.2, 0.2, generator)
    grain = 0.05 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (_blend(plate, paint, painted) + ramp + grain).clamp(0.0, 1.0)


def emboss(digits: Tensor, generator: Generator) -> Tensor:
    """Draw digits embossed in brushed metal, visible only by their lit and shaded edges."""
    count = len(digits)
    kernel = torch.tensor([[-1.0, -0.5, 0.0], [-0.5, 0.0, 0.5], [0.0, 0.5, 1.0]]) / 2
    relief = conv2d(pad(_strokes(digits), (1, 1, 1, 1)), kernel.view(1, 1, 3, 3))
    brushed = 0.06 * torch.randn(count, 1, SIZE, 1, generator=generator)
    metal = _colour(0.52, 0.54, 0.58) + _uniform((count, 3, 1, 1), -0.06, 0.06, generator)
    return (metal + brushed + 0.6 * relief).clamp(0.0, 1.0)


def halftone(digits: Tensor, generator: Generator) -> Tensor:
    """Draw digits as a screen of red dots on yellow; darker pixels get larger dots."""
    count = len(digits)
    phase = _uniform((count, 2, 1, 1), 0.0, 2 * math.pi, generator)
    rows, columns = _grid()
    first = torch.cos(math.pi / 3 * (rows + columns) + phase[:, :1])
    second = torch.cos(math.pi / 3 * (rows - columns) + phase[:, 1:])
    screen = 0.5 + 0.25 * (first + second)
    dots = torch.sigmoid(10.0 * (0.15 + 0.8 * _strokes(digits) - screen))
    return _blend(_colour(0.98, 0.90, 0.35), _colour(0.82, 0.12, 0.20), dots)


DOMAINS: dict[str, Renderer] = {
    "ink": ink,
    "chalk": chalk,
    "sign": sign,
    "emboss": emboss,
    "halftone": halftone,
}
"""Name of a domain → its renderer."""


def textures(labels: Tensor, generator: Generator) -> Tensor:
    """Draw coloured surfaces: the task that is unrelated to digits.

    Classes 0 to 4 are stripes, 5 to 9 are checks, each at five orientations 36 degrees apart;
    period, phase, colours and noise vary.

    Args:
        labels: Classes to draw, (n,), integers in 0..9.
        generator: Source of all variation within a class.

    Returns:
        Images, (n, 3, SIZE, SIZE), float32 in [0, 1].
    """
    count = len(labels)
    angle = (labels % 5).view(-1, 1, 1, 1) * (math.pi / 5)
    angle = angle + _uniform((count, 1, 1, 1), -0.1, 0.1, generator)
    wave = 2 * math.pi / _uniform((count, 1, 1, 1), 5.0, 8.0, generator)
    phase = _uniform((count, 2, 1, 1), 0.0, 2 * math.pi, generator)
    rows, columns = _grid()
    along = torch.cos(wave * (columns * angle.cos() + rows * angle.sin()) + phase[:, :1])
    across = torch.cos(wave * (rows * angle.cos() - columns * angle.sin()) + phase[:, 1:])
    checks = (labels >= 5).view(-1, 1, 1, 1)
    pattern = 0.5 + 0.5 * torch.where(checks, along * across, along)
    low = _uniform((count, 3, 1, 1), 0.0, 0.4, generator)
    high = _uniform((count, 3, 1, 1), 0.6, 1.0, generator)
    grain = 0.05 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (_blend(low, high, pattern) + grain).clamp(0.0, 1.0)


def _strokes(digits: Tensor) -> Tensor:
    """The coverage of each pixel by strokes, (n, 1, SIZE, SIZE) in [0, 1]."""
    coverage = digits.unsqueeze(1).float() / 16
    return interpolate(coverage, size=SIZE, mode="bicubic", align_corners=False).clamp(0.0, 1.0)


def _blend(under: Tensor, over: Tensor, cover: Tensor) -> Tensor:
    """One colour over another, with opacity `cover`."""
    return (under + (over - under) * cover).clamp(0.0, 1.0)


def _colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _noise(count: int, cells: int, generator: Generator) -> Tensor:
    """Normal noise on `cells` x `cells` points, interpolated to (count, 1, SIZE, SIZE)."""
    coarse = torch.randn(count, 1, cells, cells, generator=generator)
    return interpolate(coarse, size=SIZE, mode="bilinear", align_corners=False)


def _grid() -> tuple[Tensor, Tensor]:
    """The row and the column of every pixel, (SIZE, 1) and (1, SIZE)."""
    steps = torch.arange(SIZE, dtype=torch.float32)
    return steps.view(-1, 1), steps.view(1, -1)
