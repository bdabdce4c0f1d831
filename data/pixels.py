"""The map between pixel levels and model values.

Levels k ∈ {0, …, L−1} become model values in [0, 1] either as k/(L−1), or uniformly dequantised as (k + u)/L with
u ~ U[0, 1). The density p of the dequantised values bounds the probability of the levels from below,
log P(k) ≥ E_u[log p((k + u)/L)] − D log L for D dimensions, which is what makes bits/dim comparable between models
(Theis, van den Oord & Bethge, 2016, arXiv:1511.01844, Sec. 3.1).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.sets import Split
from experiment.files import write_atomically
from experiment.randomness import Generator, uniform

__all__ = [
    "GRID_IMAGES",
    "ImageFormat",
    "random_flip",
    "save_image_grid",
    "scale",
    "to_pixels",
    "to_unit_interval",
    "unscale",
]

GRID_IMAGES = 64


@dataclass(frozen=True)
class ImageFormat:
    """What images of a set are, and how a model sees them: all that sampling needs to know of the data.

    A checkpoint keeps ``as_dict()``; ``ImageFormat(**it)`` makes the same again.

    Args:
        image_shape: (C, H, W).
        num_levels: number L of grey levels.
        num_classes: of the set; None without labels.
        centered: whether model values are in [−1, 1] rather than [0, 1].
        dequantized: whether the model learns uniformly dequantised levels.
    """

    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int | None
    centered: bool
    dequantized: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if not 2 <= self.num_levels <= 256:
            raise ValueError(f"images of {self.num_levels} grey levels: allowed are 2 to 256, which fit 8 bits")

    @classmethod
    def of(cls, split: Split, *, centered: bool, dequantized: bool) -> ImageFormat:
        return cls(split.image_shape, split.num_levels, split.num_classes, centered, dequantized)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def dimension(self) -> int:
        """Number of values of an image, C·H·W."""
        return math.prod(self.image_shape)

    def to_model(self, levels: Tensor, generator: Generator = None, *, dequantize: bool | None = None) -> Tensor:
        """Model values of levels, uint8 (B, C, H, W), on the CPU.

        ``dequantize``, by default as the model learns: with u from ``generator``, or without one with u = ½, the middle
        of a level's cell.
        """
        noise = None
        if self.dequantized if dequantize is None else dequantize:
            noise = torch.full(levels.shape, 0.5) if generator is None else uniform(levels.shape, generator)
        return scale(to_unit_interval(levels, self.num_levels, dequantization=noise), self.centered)

    def to_levels(self, x: Tensor) -> Tensor:
        """The levels, uint8, of model values (B, C, H, W)."""
        return to_pixels(unscale(x.float(), self.centered), self.num_levels, self.dequantized)


def to_unit_interval(images: Tensor, num_levels: int, *, dequantization: Tensor | None = None) -> Tensor:
    """Model values in [0, 1] of pixel levels k: k/(L−1), or (k + u)/L when given uniform noise u.

    u is kept 2 L ε away from 0 and 1, with ε the precision of its type (6e-5 for 256 levels in float32): the value
    stays clear of its neighbours, so that rounding errors cannot carry it into another level.

    Args:
        images: integer levels, any shape.
        num_levels: number L of levels.
        dequantization: u ∈ [0, 1) in the shape of ``images``; the result has its dtype, else the default one.
    """
    if dequantization is None:
        return images.to(torch.get_default_dtype()) / (num_levels - 1)
    margin = 2 * num_levels * torch.finfo(dequantization.dtype).eps
    return (images + dequantization.clamp(margin, 1 - margin)) / num_levels


def scale(x: Tensor, centered: bool) -> Tensor:
    """Values in [0, 1] to the model's range: [−1, 1] if centred, else unchanged."""
    return 2 * x - 1 if centered else x


def unscale(x: Tensor, centered: bool) -> Tensor:
    """The inverse of ``scale``."""
    return (x + 1) / 2 if centered else x


def to_pixels(x01: Tensor, num_levels: int, dequantized: bool) -> Tensor:
    """The uint8 levels that values in [0, 1] stand for; values outside are clipped first.

    Args:
        x01: values, any shape.
        num_levels: number L of levels, at most 256.
        dequantized: whether the values are (k + u)/L, whose level is ⌊L x⌋, rather than k/(L−1), whose level is the
            integer nearest to (L−1) x.
    """
    x = x01.clamp(0, 1)
    levels = (num_levels * x).floor().clamp(max=num_levels - 1) if dequantized else ((num_levels - 1) * x).round()
    return levels.to(torch.uint8)


def random_flip(images: Tensor, generator: Generator = None) -> Tensor:
    """Images (B, C, H, W), each mirrored left to right with probability ½."""
    mirrored = uniform((len(images),), generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def save_image_grid(path: Path, levels: np.ndarray, images: ImageFormat) -> None:
    """Write up to 64 images, uint8 levels (N, H, W, C), as one PNG in rows of eight."""
    pixels = levels[:GRID_IMAGES].astype(np.float32) * (255 / (images.num_levels - 1))
    columns = min(8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    _, height, width, channels = pixels.shape
    gap = 1
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255.0, np.float32)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.round().astype(np.uint8).squeeze())
    enlarge = max(1, 64 // height)  # tiny images would be unreadable pixel for pixel
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    write_atomically(path, lambda file: picture.save(file, format="png"))
