"""Log-likelihood by the probability-flow ODE.

Along dx/dt = v(x, t) = −f x − ½g² s(x, t) the log-density obeys d ln p/dt = −∇·v, so

    ln p_eps(x) = ln p_1(x(1)) + ∫_eps^1 ∇·v dt.

The divergence is −f D − ½g² tr ∂s/∂x. The trace is exact (D backward passes) or Skilling–Hutchinson's estimate, the
mean of vᵀ(∂s/∂x)v over a few fixed probes v per sample (one backward pass each). One evaluation of the network gives
both drift and divergence. (Antithetic probes, v and −v, would not help: they give the same value.)

The equation is solved in t, or (``log_ratio``) in u = ln ρ, with the noise-to-signal ratio ρ = σ/α, for the state
w = x/(α√(¼ + ρ²)). As du/dt = g²/(2σ²), f and g² drop out:

    dw/du = −σ² s/(α√(¼ + ρ²)) − w ρ²/(¼ + ρ²),

which is of order one in every dimension at every noise, and zero for white data of standard deviation ½.

Sources: Chen, Rubanova, Bettencourt, Duvenaud (NeurIPS 2018); Grathwohl et al., FFJORD (ICLR 2019); Song et al.
(ICLR 2021), Appendix D.2. Images: uniform dequantisation, Theis, van den Oord, Bethge (ICLR 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from conservativeness import divergence
from experiment.randomness import Generator, normal_like, rademacher_like
from experiment.registry import resolve
from ode import FIXED, check_solver, integrate, state_dtype
from sampling import CountedScore
from sde_lib import SDE, ScoreFunction

LIKELIHOOD_EPS = 1e-5
"""The time of the data, as in the source's public code."""
DIVERGENCES: dict[str, Callable[[Tensor, Generator], Tensor] | None] = {
    "rademacher": rademacher_like,
    "gaussian": normal_like,
    "exact": None,
}
"""Where Hutchinson's probes are drawn from, x (B, ...) ↦ v (B, ...) with E[vvᵀ] = I."""


class Likelihood(NamedTuple):
    """Log-density (B,) in nats at the given points, their latents x(1) (B, ...), network evaluations per sample."""

    log_prob: Tensor
    latent: Tensor
    nfe: float


def bits_per_dim(log_prob: Tensor, dimension: int, log2_unit: float) -> Tensor:
    """Bits per dimension (B,) of data in their own units from the log-density, in nats, of model values.

    ``log2_unit``: log₂ of such a unit in model values, ``DataFormat.log2_unit``. For levels it is that of a cell, which
    is what makes the density of dequantised levels a bound of their probability.
    """
    return -log_prob / (dimension * math.log(2)) - log2_unit


class Time:
    """A variable u in place of the time, and a scale c of the state, w = x/c. Here u = t and c = 1."""

    def __init__(self, sde: SDE) -> None:
        self.sde = sde

    def at(self, t: Tensor) -> Tensor:
        """u (b,) at the times t (b,)."""
        return t

    def time(self, u: Tensor) -> Tensor:
        """The t (b,) at which the variable is u (b,)."""
        return u

    def scale(self, t: Tensor) -> Tensor:
        """c (b,)."""
        return torch.ones_like(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The a and b, each (b,), of dw/du = −a w − b s/c; the divergence of that is −a D − b tr ∂s/∂x."""
        return self.sde.drift_rate(t), 0.5 * self.sde.diffusion(t) ** 2

    def unit(self, dimension: int) -> float:
        """The unit, in nats, in which the solver is given the change of the log-density."""
        return 1.0


class _LogRatio(Time):
    """u = ln(σ/α) and w = x/(α√(¼ + ρ²))."""

    variance = 0.25
    """Of the data, roughly. It affects only the efficiency."""

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
        # An adaptive solver looks at the mean error of all D + 1 numbers. In this unit the log-density per dimension
        # has as much weight in that mean as the D coordinates together.
        return math.sqrt(dimension)


TIMES: dict[str, type[Time]] = {"t": Time, "log_ratio": _LogRatio}


@dataclass(frozen=True)
class LikelihoodEvaluator:
    """Log-likelihoods of data under a score; the fields are those of ``config.likelihood``, and ``str`` describes it.

    Args:
        sde: the forward process.
        divergence: 'rademacher' or 'gaussian' (Hutchinson with such probes), or 'exact'.
        probes: how many, for Hutchinson; their variance falls as 1/probes.
        time: 't' or 'log_ratio', the variable in which the equation is solved.
        solver, rtol, atol, num_steps: see ``ode.integrate``.
        eps: the time of the data.

    Raises:
        ValueError: unknown divergence, time or solver, or no steps.
    """

    sde: SDE
    divergence: str = "rademacher"
    probes: int = 1
    time: str = "t"
    solver: str = "rk45"
    rtol: float = 1e-3
    atol: float = 1e-5
    num_steps: int = 0
    eps: float = LIKELIHOOD_EPS

    def __post_init__(self) -> None:
        resolve(self.divergence, DIVERGENCES, "likelihood.divergence")
        resolve(self.time, TIMES, "likelihood.time")
        check_solver(self.solver, self.num_steps, "likelihood.")

    def __str__(self) -> str:
        several = f", {self.probes} probes" if self.probes > 1 and self.divergence != "exact" else ""
        variable = " in ln(σ/α)" if self.time == "log_ratio" else ""
        how = f"{self.num_steps} steps" if self.solver in FIXED else f"rtol {self.rtol:g}, atol {self.atol:g}"
        return f"{self.divergence} divergence{several}, {self.solver}{variable}, {how}"

    def __call__(
        self, score: ScoreFunction, x: Tensor, generator: Generator = None, *, progress: bool = False
    ) -> Likelihood:
        """Log-densities of data x (B, ...), scaled as the model expects; the generator draws the probes."""
        draw = resolve(self.divergence, DIVERGENCES, "likelihood.divergence")
        probes = [draw(x, generator) for _ in range(self.probes)] if draw else [None]
        total = {"adams": self.num_steps + 10, "heun": 2 * self.num_steps}.get(self.solver)
        with tqdm(disable=not progress, leave=False, unit="evaluation", total=total) as bar:
            return self.with_probes(CountedScore(score, bar), x, probes)

    @torch.no_grad()
    def with_probes(self, score: ScoreFunction, x: Tensor, probes: Sequence[Tensor | None]) -> Likelihood:
        """The same with given probes, (B, ...) each; None is the exact trace."""
        counted = score if isinstance(score, CountedScore) else CountedScore(score)
        dimension, variable = x[0].numel(), resolve(self.time, TIMES, "likelihood.time")(self.sde)
        unit = variable.unit(dimension)
        ends = torch.tensor([self.eps, self.sde.end_time], dtype=state_dtype(x))
        start, end = variable.at(ends).tolist()
        first_scale, last_scale = variable.scale(ends).tolist()

        def velocity(y: Tensor, u: Tensor, rows: Tensor) -> Tensor:
            # Rounding must not leave the interval.
            t = variable.time(u.clamp(start, end)).clamp(self.eps, self.sde.end_time)
            w, scale = y[:, :dimension], variable.scale(t)[:, None]
            position = (scale * w).to(x.dtype).reshape(-1, *x.shape[1:]).detach().requires_grad_()
            with torch.enable_grad():
                value = counted(position, t.to(x.dtype), rows)
                traces = [divergence(value, position, None if v is None else v[rows]) for v in probes]
            decay, weight = (rate[:, None] for rate in variable.rates(t))
            trace = torch.stack(traces).mean(0)[:, None].to(y.dtype)
            drift = -decay * w - weight / scale * value.flatten(1).to(y.dtype)
            return torch.cat([drift, -(decay * dimension + weight * trace) / unit], dim=1).detach()

        state = F.pad(x.flatten(1).to(ends.dtype) / first_scale, (0, 1))
        settings = dict(solver=self.solver, rtol=self.rtol, atol=self.atol, num_steps=self.num_steps)
        state = integrate(velocity, state, start, end, **settings)
        latent, change = last_scale * state[:, :dimension], unit * state[:, dimension]
        # From the density of w to that of x.
        change = change + dimension * math.log(last_scale / first_scale)
        log_prob = self.sde.prior_log_prob(latent) + change
        return Likelihood(log_prob, latent.to(x.dtype).view_as(x), counted.evaluations / len(x))
