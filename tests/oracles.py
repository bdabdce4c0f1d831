"""Distributions whose noised versions are known exactly under every linear SDE.

If x_0 is a Gaussian N(m, C), then x_t ~ N(α m, α² C + σ² I); a mixture of Gaussians stays one, with the same weights.
All functions are of x (B, ...), flattened to (B, D), and t (B,), in double precision, and differentiable in x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_lib import SDE, VE, VP, GeometricSigma, LinearBeta, SubVP

SDES: dict[str, SDE] = {
    "ve": VE(GeometricSigma(0.02, 20.0)),
    "vp": VP(LinearBeta(0.1, 20.0)),
    "subvp": SubVP(LinearBeta(0.1, 20.0)),
}


class Gaussian:
    """x_0 ~ N(mean, covariance), noised by an SDE."""

    def __init__(self, sde: SDE, mean: Tensor, covariance: Tensor) -> None:
        self.sde = sde
        self.mean, self.covariance = mean.double(), covariance.double()
        self.spectrum, self.basis = torch.linalg.eigh(self.covariance)

    def moments(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) at one time."""
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = self.sde.mean_coefficient(t), self.sde.std(t)
        return alpha * self.mean, alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()

    def _standardised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (B, D) about the mean in the eigenbasis, and variances (B, D) there."""
        alpha, sigma = self.sde.mean_coefficient(t)[:, None], self.sde.std(t)[:, None]
        return (x.flatten(1) - alpha * self.mean) @ self.basis, alpha**2 * self.spectrum + sigma**2

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        coordinates, variance = self._standardised(x, t)
        return -((coordinates / variance) @ self.basis.T).view_as(x)

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        coordinates, variance = self._standardised(x, t)
        return -0.5 * (coordinates**2 / variance + torch.log(2 * math.pi * variance)).sum(1)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """∇·s (B,)."""
        return -(1 / self._standardised(x, t)[1]).sum(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + (z * self.spectrum.sqrt()) @ self.basis.T

    def flow(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x (B, D) from time s to t: each eigendirection keeps its quantile."""
        coordinates, variance = self._standardised(x, s)
        moved = coordinates * (self._standardised(x, t)[1] / variance).sqrt()
        return self.sde.mean_coefficient(t)[:, None] * self.mean + moved @ self.basis.T


class GaussianMixture:
    """x_0 ~ Σ w_k N(mean_k, covariance_k), noised by an SDE."""

    def __init__(self, sde: SDE, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.log_weights = weights.double().log()
        self.components = [Gaussian(sde, m, c) for m, c in zip(means, covariances, strict=True)]

    def _each(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([c.log_prob(x, t) for c in self.components], 1) + self.log_weights

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        return self._each(x, t).logsumexp(1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        share = self._each(x, t).softmax(1)
        scores = torch.stack([c.score(x, t).flatten(1) for c in self.components], 1)
        return (share[:, :, None] * scores).sum(1).view_as(x)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        share = self._each(x, t).softmax(1)
        scores = torch.stack([c.score(x, t).flatten(1) for c in self.components], 1)
        divergences = torch.stack([c.divergence(x, t) for c in self.components], 1)
        mean = (share[:, :, None] * scores).sum(1)
        return (share * (divergences + (scores**2).sum(2))).sum(1) - (mean**2).sum(1)


def gaussian_2d(sde: SDE) -> Gaussian:
    return Gaussian(sde, torch.tensor([0.6, -0.4]), torch.tensor([[1.0, 0.5], [0.5, 0.6]]))


def gaussian_16d(sde: SDE) -> Gaussian:
    factor = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64)
    return Gaussian(sde, mean, 0.5 * torch.eye(16).double() + factor @ factor.T / 32)


def mixture_2d(sde: SDE) -> GaussianMixture:
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.0]])
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.3, 0.0], [0.0, 0.1]], [[0.15, -0.05], [-0.05, 0.2]]])
    return GaussianMixture(sde, torch.tensor([0.5, 0.3, 0.2]), means, covariances)
