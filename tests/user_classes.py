"""What a user adds and names by an import path: schedule, predictor, corrector, solver, operator, features."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from guidance.measurements import Mask
from sampling import AnnealedLangevinCorrector, EulerMaruyamaPredictor
from sde_lib import VP, SigmaSchedule


@dataclass(frozen=True)
class HarmonicSigma(SigmaSchedule):
    """1/σ linear in t."""

    def slope(self) -> float:
        return 1 / self.sigma_min - 1 / self.sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        return 1 / (1 / self.sigma_min - self.slope() * t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * self.slope() * self.sigma(t) ** 3

    def time(self, sigma: Tensor) -> Tensor:
        return (1 / self.sigma_min - 1 / sigma) / self.slope()


class Family(VP):
    """VP under another name."""


class Predictor(EulerMaruyamaPredictor):
    """Euler–Maruyama under another name."""


class Corrector(AnnealedLangevinCorrector):
    """``ald`` under another name."""


def euler(velocity, y: Tensor, start: float, end: float, *, num_steps: int, **_) -> Tensor:
    """Euler's method."""
    times = torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()
    for now, after in itertools.pairwise(times):
        y = y + (after - now) * velocity(y, now)
    return y


def first_row(options, image_shape: tuple[int, ...], device) -> Mask:
    """The first row of pixels."""
    known = torch.zeros(image_shape, dtype=torch.bool, device=device)
    known[:, 0] = True
    return Mask(known)


class Moments:
    """Features that are quick to compute, and a count of the images that they have been computed of."""

    name, key, dimension = "moments", "moments-1", 6

    def __init__(self) -> None:
        self.seen = 0
        self.breaks_at: int | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.breaks_at is not None and self.seen >= self.breaks_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        x = images.double().flatten(1)
        return torch.cat([x[:, 20:24], x.mean(1, keepdim=True), x.std(1, keepdim=True)], 1), x[:, 30:35]


def moments(num_levels: int, device) -> Moments:
    return Moments()
