"""The SDEs and the exactly known distributions that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from distributions import Gaussian, GaussianMixture
from schedules import GeometricSigma, LinearBeta
from sde_lib import SDE, VE, VP, SubVP

SDES: dict[str, SDE] = {
    "ve": VE(GeometricSigma(0.02, 20.0)),
    "vp": VP(LinearBeta(0.1, 20.0)),
    "subvp": SubVP(LinearBeta(0.1, 20.0)),
}


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


def assert_moments_match(x: Tensor, mean: Tensor, covariance: Tensor, allowance: float = 0.0) -> None:
    """Mean and covariance of samples within four standard errors, plus an allowance in units of the variances."""
    n, variance = len(x), covariance.diagonal()
    mean_error = (variance / n).sqrt()
    covariance_error = ((variance[:, None] * variance[None, :] + covariance**2) / n).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * mean_error + allowance * variance.sqrt()).all()
    scale = (variance[:, None] * variance[None, :]).sqrt()
    assert ((x.T.cov() - covariance).abs() < 4 * covariance_error + allowance * scale).all()
