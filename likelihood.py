"""Log-likelihood by the probability-flow ODE.

Along dx/dt = v(x, t) = −f x − ½g² s(x, t) the log-density obeys d ln p/dt = −∇·v, so

    ln p_eps(x) = ln p_1(x(1)) + ∫_eps^1 ∇·v dt.

The divergence is −f D − ½g² tr ∂s/∂x. The trace is exact (D backward passes) or Skilling–Hutchinson's estimate
vᵀ(∂s/∂x)v with one fixed probe per sample (one backward pass). Either way one evaluation of the network serves
both drift and divergence.

Sources: Chen, Rubanova, Bettencourt, Duvenaud (NeurIPS 2018); Grathwohl et al., FFJORD (ICLR 2019); Song et al.
(ICLR 2021), Appendix D.2. Images: uniform dequantisation, Theis, van den Oord, Bethge (ICLR 2016).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from conservativeness import divergence
from ode import check_solver, integrate
from randomness import Generator, normal_like, rademacher_like
from sampling import CountedScore, _state_dtype
from sde_lib import SDE, ScoreFunction, expand

__all__ = ["DIVERGENCES", "Likelihood", "LikelihoodEvaluator", "bits_per_dim", "get_likelihood"]

DIVERGENCES = ("rademacher", "gaussian", "exact")
LIKELIHOOD_EPS = 1e-5
"""Data are taken to live at this time, as in the source's public code."""


class Likelihood(NamedTuple):
    """Log-density (B,) in nats at the given points, their latents x(1) (B, ...), network evaluations per sample."""

    log_prob: Tensor
    latent: Tensor
    nfe: float


def bits_per_dim(log_prob: Tensor, dimension: int, *, num_levels: int, centered: bool) -> Tensor:
    """Bits per dimension (B,) of discrete data from the log-density, in nats, of their dequantised version.

    A pixel with L levels fills a cell of width 1/L of [0, 1], or 2/L of [−1, 1] if ``centered``.
    """
    cell = (2.0 if centered else 1.0) / num_levels
    return -log_prob / (dimension * math.log(2)) - math.log2(cell)


class LikelihoodEvaluator:
    """Computes log-likelihoods of data under a score.

    Args:
        sde: the forward process.
        divergence: 'rademacher' or 'gaussian' (Hutchinson with that probe), or 'exact'.
        solver, rtol, atol, num_steps: see ``ode.integrate``.
        eps: the time at which the data are taken to live.

    Raises:
        ValueError: unknown divergence or solver, or a setting outside its range.
    """

    def __init__(
        self,
        sde: SDE,
        *,
        divergence: str = "rademacher",
        solver: str = "rk45",
        rtol: float = 1e-3,
        atol: float = 1e-5,
        num_steps: int = 0,
        eps: float = LIKELIHOOD_EPS,
    ) -> None:
        if divergence not in DIVERGENCES:
            raise ValueError(f"likelihood.divergence={divergence!r}: allowed are {', '.join(DIVERGENCES)}")
        try:
            check_solver(solver, rtol=rtol, atol=atol, num_steps=num_steps)
        except ValueError as error:
            raise ValueError(f"likelihood.{error}") from None
        self.sde = sde
        self.divergence = divergence
        self.settings = dict(solver=solver, rtol=rtol, atol=atol, num_steps=num_steps)
        self.eps = eps

    @torch.no_grad()
    def __call__(self, score: ScoreFunction, x: Tensor, generator: Generator = None) -> Likelihood:
        """Log-densities of data x (B, ...), scaled as the model expects; the generator draws the probes."""
        counted = CountedScore(score)
        probe = None
        if self.divergence != "exact":
            probe = (rademacher_like if self.divergence == "rademacher" else normal_like)(x, generator)
        dimension = x[0].numel()

        def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            position = y[:, :dimension].to(x.dtype).reshape(-1, *x.shape[1:]).detach().requires_grad_()
            time = t.to(x.dtype)
            with torch.enable_grad():
                value = counted(position, time, rows)
                trace = divergence(value, position, None if probe is None else probe[rows])
            rate, half_g2 = self.sde.drift_rate(time), 0.5 * self.sde.diffusion(time) ** 2
            drift = self.sde.drift(position, time) - expand(half_g2, value) * value
            flow_divergence = -rate * dimension - half_g2 * trace
            return torch.cat([drift.flatten(1), flow_divergence[:, None]], dim=1).detach().to(y.dtype)

        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1).to(_state_dtype(x))
        end = integrate(velocity, start, self.eps, self.sde.end_time, **self.settings)
        latent, change = end[:, :dimension], end[:, dimension]
        log_prob = self.sde.prior_log_prob(latent) + change
        return Likelihood(log_prob, latent.to(x.dtype).view_as(x), counted.evaluations / len(x))


def get_likelihood(config, sde: SDE) -> LikelihoodEvaluator:
    """The evaluator of ``config.likelihood``.

    Raises:
        ValueError: a field outside what is allowed.
    """
    settings = config.likelihood
    return LikelihoodEvaluator(
        sde,
        divergence=settings.divergence,
        solver=settings.solver,
        rtol=settings.rtol,
        atol=settings.atol,
        num_steps=settings.num_steps,
    )
