"""Explicit, implicit, sliced and denoising score matching on a Gaussian mixture: constants and gradients.

The grid integrates by the trapezoidal rule, which for these smooth densities is exact to about 1e-9: the Fisher
divergence J, its gradient and E‖∇log p_t‖² are known without sampling.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, mixture_2d
from torch import Tensor, nn

from conservativeness import divergence, jacobian
from experiment.randomness import SampleGenerators, rademacher_like
from losses import (
    denoising_score_matching,
    explicit_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)

TIMES = {"ve": 0.3, "vp": 0.1, "subvp": 0.2}
BATCHES, BATCH_SIZE = 100, 400
every_family = pytest.mark.parametrize("family", SDES)


class Score(nn.Module):
    """A small network in place of a score, far from the true one; its Jacobian is not symmetric."""

    def __init__(self, dimension: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(dimension + 1, 8), nn.Tanh(), nn.Linear(8, dimension)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t.to(x)[:, None]], dim=1)).view_as(x)


def times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def grid(family: str) -> tuple[Tensor, Tensor]:
    """Nodes (Q, 2) and weights (Q,), the density included."""
    sde, t = SDES[family], TIMES[family]
    width = 4 + 6 * float(sde.std(torch.tensor(t)))
    axis = torch.linspace(-width, width, 161, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    density = mixture_2d(sde).log_prob(x, times(x, t)).exp()
    return x, density * (axis[1] - axis[0]) ** 2


def gradient(loss: Tensor, score: nn.Module) -> Tensor:
    """With respect to all parameters, (P,)."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(score.parameters()))])


def sampled_losses(family: str, score: nn.Module, seed: int) -> dict[str, Tensor]:
    """Every loss (B,) on fresh points; ``explicit`` shares those of all others but the denoising one."""
    sde, mixture = SDES[family], mixture_2d(SDES[family])
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.sample(BATCH_SIZE, generator)
    t = times(x0, TIMES[family])
    mean, std = sde.marginal(x0, t)
    x = mean + std[:, None] * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return {
        "explicit": explicit_score_matching(score, mixture.score, x, t),
        "implicit": implicit_score_matching(score, x, t),
        "sliced": sliced_score_matching(score, x, t, variance_reduction=False, generator=generator),
        "sliced, variance reduction": sliced_score_matching(score, x, t, generator=generator),
        "denoising": denoising_score_matching(score, sde, x0, t, generator),
    }


@every_family
def test_losses_differ_by_their_constants_and_gradients_agree(family):
    """J, its gradient and the constants by quadrature; the losses by 40 000 samples in 100 batches.

    The standard error is that of the mean over batches; four of it are allowed, for each of the 42 parameters.
    """
    sde, mixture, score = SDES[family], mixture_2d(SDES[family]), Score()
    x, weights = grid(family)
    t = times(x, TIMES[family])
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    fisher = float((weights * (mixture.score(x, t) ** 2).sum(1)).sum())
    exact = (weights * explicit_score_matching(score, mixture.score, x, t)).sum()
    exact_gradient, exact = gradient(exact, score), exact.item()
    std = float(sde.std(t[:1]))
    constants = {
        "explicit": 0.0,
        "implicit": -0.5 * fisher,
        "sliced": -0.5 * fisher,
        "sliced, variance reduction": -0.5 * fisher,
        "denoising": -0.5 * fisher + 2 / (2 * std**2),
    }
    values: dict[str, list[Tensor]] = {name: [] for name in constants}
    gradients: dict[str, list[Tensor]] = {name: [] for name in constants}
    for batch in range(BATCHES):
        for name, loss in sampled_losses(family, score, seed=batch).items():
            assert loss.shape == (BATCH_SIZE,)
            values[name].append(loss.mean().detach())
            gradients[name].append(gradient(loss.mean(), score))
    for name, constant in constants.items():
        value, slope = torch.stack(values[name]), torch.stack(gradients[name])
        value_error, slope_error = value.std() / math.sqrt(BATCHES), slope.std(0) / math.sqrt(BATCHES)
        assert abs(value.mean() - (exact + constant)) < 4 * value_error, name
        assert ((slope.mean(0) - exact_gradient).abs() < 4 * slope_error).all(), name
        # Sharp enough to tell: the gradient as a whole is known to a small part of its length, the loss to well below
        # its constant.
        assert slope_error.norm() < 0.1 * exact_gradient.norm(), name
        assert 4 * value_error < 0.2 * max(abs(constant), exact), name


@every_family
def test_implicit_is_explicit_without_sampling(family):
    """Integration by parts, on the grid: J and its gradient to rounding of the quadrature."""
    mixture, score = mixture_2d(SDES[family]), Score()
    x, weights = grid(family)
    t = times(x, TIMES[family])
    fisher = (weights * (mixture.score(x, t) ** 2).sum(1)).sum()
    explicit = (weights * explicit_score_matching(score, mixture.score, x, t)).sum()
    implicit = (weights * implicit_score_matching(score, x, t)).sum()
    torch.testing.assert_close(implicit, explicit - 0.5 * fisher, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(implicit, score), gradient(explicit, score), rtol=1e-6, atol=1e-6)


def test_what_variance_reduction_removes():
    """Of a score whose component i depends on x_i alone, vᵀ(∂s/∂x)v does not vary with v = ±1, and (vᵀs)² does."""
    x = torch.randn(2000, 2, dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x)

    implicit = implicit_score_matching(score, x, times(x, 0.5))
    reduced = sliced_score_matching(score, x, times(x, 0.5))
    torch.testing.assert_close(reduced, implicit, rtol=1e-12, atol=1e-12)
    difference = sliced_score_matching(score, x, times(x, 0.5), variance_reduction=False) - implicit
    torch.testing.assert_close(difference.abs(), score(x, x).prod(1).abs(), rtol=1e-12, atol=1e-12)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(x))


@pytest.mark.parametrize("variance_reduction", [False, True])
def test_sliced_by_hand(variance_reduction):
    score, probes = Score(4), 3
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    t = times(x, 0.5)
    value, j = jacobian(score, x, t)
    generator = torch.Generator().manual_seed(1)
    expected = torch.zeros(5, dtype=torch.float64)
    for _ in range(probes):
        v = rademacher_like(x, generator).flatten(1)
        square = (value**2).sum((1, 2, 3)) if variance_reduction else (v * value.flatten(1)).sum(1) ** 2
        expected += (torch.einsum("bi,bij,bj->b", v, j, v) + 0.5 * square) / probes
    generator = torch.Generator().manual_seed(1)
    loss = sliced_score_matching(score, x, t, probes=probes, variance_reduction=variance_reduction, generator=generator)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_sliced_in_one_dimension_is_implicit():
    score, x = Score(1), torch.randn(6, 1, dtype=torch.float64)
    implicit = implicit_score_matching(score, x, times(x, 0.5))
    for variance_reduction in (False, True):
        sliced = sliced_score_matching(score, x, times(x, 0.5), variance_reduction=variance_reduction)
        torch.testing.assert_close(sliced, implicit, rtol=1e-12, atol=1e-12)


def test_divergence_is_the_trace_of_the_jacobian():
    score, x = Score(4), torch.randn(5, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    value = score(x, times(x, 0.5))
    _, j = jacobian(score, x, times(x, 0.5))
    torch.testing.assert_close(divergence(value, x), j.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    v = torch.randn_like(x)
    estimate = torch.einsum("bi,bij,bj->b", v.flatten(1), j, v.flatten(1))
    torch.testing.assert_close(divergence(value, x, v), estimate, rtol=1e-12, atol=1e-12)
    assert not divergence(value, x).requires_grad and divergence(value, x, create_graph=True).requires_grad


def test_losses_without_gradients():
    score, x = Score(), torch.randn(7, 2, dtype=torch.float64)
    t, sde = times(x, 0.4), SDES["vp"]

    def losses() -> list[Tensor]:
        generator = SampleGenerators((0, "losses"), range(7))
        return [
            explicit_score_matching(score, mixture_2d(sde).score, x, t),
            implicit_score_matching(score, x, t),
            sliced_score_matching(score, x, t, generator=generator),
            denoising_score_matching(score, sde, x, t, generator),
        ]

    with torch.no_grad():
        evaluated = losses()
    for loss, other in zip(evaluated, losses(), strict=True):
        assert not loss.requires_grad and other.requires_grad
        torch.testing.assert_close(loss, other.detach(), rtol=1e-12, atol=0)
    assert not x.requires_grad


def test_sliced_needs_a_probe():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="probes=0: at least 1"):
        sliced_score_matching(Score(), x, times(x, 0.5), probes=0)
