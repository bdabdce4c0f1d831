"""The SDEs and the exactly known distributions that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sampling
import sde_lib
from exact.distributions import Gaussian, GaussianMixture
from guidance import conditions
from sde_lib import SDE, VE, VP, GeometricSigma, LinearBeta, SubVP

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


def affine_law(
    sample: Callable[[Tensor], Tensor], dimension: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of what ``sample(like)`` makes in the shape (B, D), if it is affine in its noise:
    it is fed one unit of each of its noise variables at a time."""
    draws = 0

    def no_noise(x: Tensor, generator) -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros_like(x)

    def unit_noise(x: Tensor, generator) -> Tensor:
        # Row k·D + d gets a one in component d of draw k; the last row gets no noise at all.
        nonlocal draws
        z = torch.zeros_like(x)
        z[draws * dimension + torch.arange(dimension), torch.arange(dimension)] = 1.0
        draws += 1
        return z

    modules = (sampling, sde_lib, conditions)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "normal_like", no_noise)
        sample(torch.zeros(1, dimension, dtype=torch.float64))
        rows, draws = draws * dimension + 1, 0
        for module in modules:
            patch.setattr(module, "normal_like", unit_noise)
        x = sample(torch.zeros(rows, dimension, dtype=torch.float64))
    response = x[:-1] - x[-1]
    return x[-1], response.T @ response


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
