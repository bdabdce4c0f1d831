"""The map between pixel levels and model values.

Levels k ∈ {0, …, L−1} become model values in [0, 1] either as k/(L−1), or uniformly dequantised as (k + u)/L with
u ~ U[0, 1). The density p of the dequantised values bounds the probability of the levels from below,
log P(k) ≥ E_u[log p((k + u)/L)] − D log L for D dimensions, which is what makes bits/dim comparable between models
(Theis, van den Oord & Bethge, 2016, arXiv:1511.01844, Sec. 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiment.randomness import Generator, uniform

__all__ = ["random_flip", "scale", "to_pixels", "to_unit_interval", "unscale"]


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
