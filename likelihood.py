"""Log-likelihood by the probability-flow ODE.

Along dx/dt = v(x, t) = −f x − ½g² s(x, t) the log-density obeys d ln p/dt = −∇·v, so

    ln p_eps(x) = ln p_1(x(1)) + ∫_eps^1 ∇·v dt.

The divergence is −f D − ½g² tr ∂s/∂x. The trace is exact (D backward passes) or Skilling–Hutchinson's estimate, the
mean of vᵀ(∂s/∂x)v over a few fixed probes v per sample (one backward pass each). Either way one evaluation of the
network serves both drift and divergence. (Antithetic probes, v and −v, would be of no use: they give the same value.)

The equation can be solved in t, or (``log_ratio``) in the logarithm of the noise-to-signal ratio ρ = σ/α, u = ln ρ, for
the state w = x/(α√(¼ + ρ²)). There the drift −f x has gone, and the rest is of order one in every dimension at every
noise: with f and g² expressed by ρ, du/dt = g²/(2σ²) and

    dw/du = −σ² s/(α√(¼ + ρ²)) − w ρ²/(¼ + ρ²),

which vanishes altogether for white data of standard deviation ½.

Sources: Chen, Rubanova, Bettencourt, Duvenaud (NeurIPS 2018); Grathwohl et al., FFJORD (ICLR 2019); Song et al.
(ICLR 2021), Appendix D.2. Images: uniform dequantisation, Theis, van den Oord, Bethge (ICLR 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from conservativeness import divergence
from experiment.randomness import Generator, normal_like, rademacher_like
from ode import check_solver, integrate, state_dtype
from sampling import CountedScore
from sde_lib import SDE, ScoreFunction

__all__ = ["DIVERGENCES", "TIMES", "Likelihood", "LikelihoodEvaluator", "bits_per_dim", "get_likelihood"]

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


class _Time(Protocol):
    """A variable u that stands for the time, and a scale c of the state: w = x/c."""

    def at(self, t: Tensor) -> Tensor:
        """u (b,) at the times t (b,)."""

    def time(self, u: Tensor) -> Tensor:
        """The t (b,) at which the variable is u (b,)."""

    def scale(self, t: Tensor) -> Tensor:
        """c (b,)."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The a and b, each (b,), of dw/du = −a w − b s/c; the divergence of that is −a D − b tr ∂s/∂x."""

    def unit(self, dimension: int) -> float:
        """In what the solver keeps the change of the log-density, in nats."""


class _PlainTime:
    """u = t and w = x."""

    def __init__(self, sde: SDE) -> None:
        self.sde = sde

    def at(self, t: Tensor) -> Tensor:
        return t

    def time(self, u: Tensor) -> Tensor:
        return u

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.sde.drift_rate(t), 0.5 * self.sde.diffusion(t) ** 2

    def unit(self, dimension: int) -> float:
        return 1.0


class _LogRatio:
    """u = ln(σ/α) and w = x/(α√(¼ + ρ²))."""

    variance = 0.25
    """Of the data, about. Nothing but the efficiency depends on it."""

    def __init__(self, sde: SDE) -> None:
        self.sde = sde

    def at(self, t: Tensor) -> Tensor:
        return torch.log(self.sde.std(t) / self.sde.mean_coefficient(t))

    def time(self, u: Tensor) -> Tensor:
        return self.sde.time_at_noise_ratio(u.exp())

    def scale(self, t: Tensor) -> Tensor:
        mean, std = self.sde.mean_coefficient(t), self.sde.std(t)
        return torch.sqrt(self.variance * mean**2 + std**2)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.sde.std(t) ** 2
        return variance / self.scale(t) ** 2, variance

    def unit(self, dimension: int) -> float:
        # The error that an adaptive solver looks at is a mean over all D + 1 numbers. So the log-density per dimension
        # has as much weight in it as the D coordinates together.
        return math.sqrt(dimension)


TIMES: dict[str, type[_Time]] = {"t": _PlainTime, "log_ratio": _LogRatio}


class LikelihoodEvaluator:
    """Computes log-likelihoods of data under a score.

    Args:
        sde: the forward process.
        divergence: 'rademacher' or 'gaussian' (Hutchinson with such probes), or 'exact'.
        probes: how many, for Hutchinson; their variance falls as 1/probes.
        time: 't' or 'log_ratio', the variable in which the equation is solved.
        solver, rtol, atol, num_steps: see ``ode.integrate``.
        eps: the time at which the data are taken to live.

    Raises:
        ValueError: unknown divergence, time or solver, or a setting outside its range.
    """

    def __init__(
        self,
        sde: SDE,
        *,
        divergence: str = "rademacher",
        probes: int = 1,
        time: str = "t",
        solver: str = "rk45",
        rtol: float = 1e-3,
        atol: float = 1e-5,
        num_steps: int = 0,
        eps: float = LIKELIHOOD_EPS,
    ) -> None:
        if divergence not in DIVERGENCES:
            raise ValueError(f"likelihood.divergence={divergence!r}: allowed are {', '.join(DIVERGENCES)}")
        if probes < 1:
            raise ValueError(f"likelihood.probes={probes}: at least 1")
        if time not in TIMES:
            raise ValueError(f"likelihood.time={time!r}: allowed are {', '.join(TIMES)}")
        check_solver(solver, num_steps, "likelihood.")
        self.sde = sde
        self.divergence = divergence
        self.probes = probes
        self.time = TIMES[time](sde)
        self.settings = dict(solver=solver, rtol=rtol, atol=atol, num_steps=num_steps)
        self.eps = eps

    @torch.no_grad()
    def __call__(self, score: ScoreFunction, x: Tensor, generator: Generator = None) -> Likelihood:
        """Log-densities of data x (B, ...), scaled as the model expects; the generator draws the probes."""
        if self.divergence == "exact":
            return self.with_probes(score, x, [None])
        draw = rademacher_like if self.divergence == "rademacher" else normal_like
        return self.with_probes(score, x, [draw(x, generator) for _ in range(self.probes)])

    @torch.no_grad()
    def with_probes(self, score: ScoreFunction, x: Tensor, probes: Sequence[Tensor | None]) -> Likelihood:
        """The same with given probes, (B, ...) each; None is the exact trace."""
        counted = CountedScore(score)
        dimension = x[0].numel()
        unit = self.time.unit(dimension)
        ends = torch.tensor([self.eps, self.sde.end_time], dtype=state_dtype(x), device=x.device)
        start, end = self.time.at(ends).tolist()
        first_scale, last_scale = self.time.scale(ends).tolist()

        def velocity(y: Tensor, u: Tensor, rows: Tensor) -> Tensor:
            # Neither rounding nor dopri5's search for a first step may lead out of the interval.
            t = self.time.time(u.clamp(start, end)).clamp(self.eps, self.sde.end_time)
            w, scale = y[:, :dimension], self.time.scale(t)[:, None]
            position = (scale * w).to(x.dtype).reshape(-1, *x.shape[1:]).detach().requires_grad_()
            with torch.enable_grad():
                value = counted(position, t.to(x.dtype), rows)
                traces = [divergence(value, position, None if v is None else v[rows]) for v in probes]
            decay, weight = (rate[:, None] for rate in self.time.rates(t))
            trace = torch.stack(traces).mean(0)[:, None].to(y.dtype)
            drift = -decay * w - weight / scale * value.flatten(1).to(y.dtype)
            return torch.cat([drift, -(decay * dimension + weight * trace) / unit], dim=1).detach()

        state = torch.cat([x.flatten(1).to(ends.dtype) / first_scale, ends.new_zeros(len(x), 1)], dim=1)
        state = integrate(velocity, state, start, end, **self.settings)
        latent, change = last_scale * state[:, :dimension], unit * state[:, dimension]
        # From the density of w to that of x.
        change = change + dimension * math.log(last_scale / first_scale)
        log_prob = self.sde.prior_log_prob(latent) + change
        return Likelihood(log_prob, latent.to(x.dtype).view_as(x), counted.evaluations / len(x))


def get_likelihood(config, sde: SDE) -> LikelihoodEvaluator:
    """The evaluator of ``config.likelihood``; ``probes`` and ``time`` may be missing: one, and t.

    Raises:
        ValueError: a field outside what is allowed.
    """
    settings = config.likelihood
    return LikelihoodEvaluator(
        sde,
        divergence=settings.divergence,
        probes=settings.get("probes", 1),
        time=settings.get("time", "t"),
        solver=settings.solver,
        rtol=settings.rtol,
        atol=settings.atol,
        num_steps=settings.num_steps,
    )
