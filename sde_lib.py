"""Stochastic differential equations that turn data into noise, and their reversal.

Every forward process here is linear,

    dx = −f(t) x dt + g(t) dw,    t ∈ [0, 1],

so that x_t | x_0 is Gaussian with mean α(t) x_0 and standard deviation σ(t), and x_t | x_s likewise for s < t.
A process is a *family* built on a *schedule*:

========  ====================  ==========================  =====================
family    drift rate f          diffusion g²                marginal
========  ====================  ==========================  =====================
VE        0                     dσ²/dt                      α = 1, σ = σ(t)
VP        β/2                   β                           α = e^{−B/2}, σ² = 1 − e^{−B}
sub-VP    β/2                   β (1 − e^{−2B})             α = e^{−B/2}, σ = 1 − e^{−B}
flow      1/(1 − t)             2t/(1 − t)                  α = 1 − t, σ = t
========  ====================  ==========================  =====================

with B(t) = ∫₀ᵗ β. A schedule is a frozen dataclass with three closed forms: σ(t), d(σ²)/dt and the inverse of σ for
VE; β(t), B(t) and the inverse of B for VP and sub-VP (docs/extending.md).

VE starts at σ(0) = σ_min: its t = 0 is data already blurred by σ_min, as in the source.

Sources: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
Differential Equations" (ICLR 2021), Sections 3.4, 4.3 and Appendices B to D, also for the geometric and the linear
schedule; cosine: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (ICML 2021); the other
schedules: Gao, Nguyen, Zhu, "Wasserstein Convergence Guarantees for a General Class of Score-Based Generative Models"
(JMLR 2025).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiment.randomness import Generator, normal_like
from experiment.registry import resolve

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""A score s(x, t) = ∇ log p_t(x): takes x (B, ...) and t (B,), returns (B, ...)."""


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """One coefficient per sample, (B,), shaped (B, 1, ..., 1) to multiply ``x`` of shape (B, ...)."""
    return coefficient.reshape(-1, *(1 for _ in x.shape[1:])).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Schedules


@dataclass(frozen=True)
class SigmaSchedule(abc.ABC):
    """σ(t), increasing from σ(0) = σ_min > 0 to σ(1) = σ_max. Times are tensors of any shape."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"model.sigma_min={self.sigma_min}, model.sigma_max={self.sigma_max}: need 0 < sigma_min < sigma_max"
            )

    @abc.abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """σ(t)."""

    @abc.abstractmethod
    def variance_rate(self, t: Tensor) -> Tensor:
        """d(σ²)/dt."""

    @abc.abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The t at which σ(t) has the given value."""


@dataclass(frozen=True)
class GeometricSigma(SigmaSchedule):
    """σ(t) = σ_min (σ_max/σ_min)^t, the VE schedule of Song et al. (2021), Eq. 30."""

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self.log_ratio)

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * self.log_ratio * self.sigma(t) ** 2

    def time(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / self.log_ratio


@dataclass(frozen=True)
class ConstantDiffusionSigma(SigmaSchedule):
    """σ² = σ_min² + t (σ_max² − σ_min²): the diffusion g is constant (Gao et al., 2025, f = 0, g = a)."""

    @property
    def variance_range(self) -> float:
        return self.sigma_max**2 - self.sigma_min**2

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.sigma_min**2 + t * self.variance_range)

    def variance_rate(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.variance_range)

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma - self.sigma_min) * (sigma + self.sigma_min) / self.variance_range


@dataclass(frozen=True)
class SquareRootDiffusionSigma(ConstantDiffusionSigma):
    """σ² = σ_min² + t² (σ_max² − σ_min²): the diffusion is g = √(2ct) (Gao et al., 2025)."""

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t**2)

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * t * self.variance_range

    def time(self, sigma: Tensor) -> Tensor:
        return super().time(sigma).clamp(min=0).sqrt()  # σ rounded to just below σ_min


@dataclass(frozen=True)
class PolynomialSigma(SigmaSchedule):
    """σ(t) = (b + at)^ρ, b = σ_min^(1/ρ), a = σ_max^(1/ρ) − b, so that g ∝ (b + at)^(ρ − ½) (Gao et al., 2025).

    With ρ = 7 equal steps of t are the noise levels of Karras, Aittala, Aila, Laine (NeurIPS 2022), Eq. 5.
    """

    rho: float = 2.0

    @property
    def start_and_slope(self) -> tuple[float, float]:
        start = self.sigma_min ** (1 / self.rho)
        return start, self.sigma_max ** (1 / self.rho) - start

    def sigma(self, t: Tensor) -> Tensor:
        b, a = self.start_and_slope
        return (b + a * t) ** self.rho

    def variance_rate(self, t: Tensor) -> Tensor:
        b, a = self.start_and_slope
        return 2 * self.rho * a * (b + a * t) ** (2 * self.rho - 1)

    def time(self, sigma: Tensor) -> Tensor:
        b, a = self.start_and_slope
        return (sigma ** (1 / self.rho) - b) / a


class BetaSchedule(abc.ABC):
    """β(t) ≥ 0 with its integral. Times are tensors of any shape."""

    @abc.abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """β(t)."""

    @abc.abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """B(t) = ∫₀ᵗ β."""

    @abc.abstractmethod
    def time(self, integral: Tensor) -> Tensor:
        """The t at which B(t) has the given value."""


@dataclass(frozen=True)
class BetaRange(BetaSchedule):
    """A schedule of 0 ≤ β_min < β_max; ``positive`` ones need 0 < β_min."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    positive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min < self.beta_max < math.inf or (self.positive and self.beta_min == 0):
            raise ValueError(
                f"model.beta_min={self.beta_min}, model.beta_max={self.beta_max}: need "
                f"0 {'<' if self.positive else '<='} beta_min < beta_max"
            )


@dataclass(frozen=True)
class LinearBeta(BetaRange):
    """β(t) = β_min + t (β_max − β_min), the VP schedule of Song et al. (2021), Eq. 32."""

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time(self, integral: Tensor) -> Tensor:
        # The positive root of a quadratic, in its stable form.
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


@dataclass(frozen=True)
class ConstantBeta(BetaRange):
    """β = ½ (β_min + β_max), the mean of the linear schedule: an Ornstein–Uhlenbeck process (Gao et al., 2025)."""

    @property
    def mean(self) -> float:
        return 0.5 * (self.beta_min + self.beta_max)

    def beta(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.mean)

    def integral(self, t: Tensor) -> Tensor:
        return self.mean * t

    def time(self, integral: Tensor) -> Tensor:
        return integral / self.mean


@dataclass(frozen=True)
class PowerBeta(BetaRange):
    """β(t) = (b + at)^ρ, b = β_min^(1/ρ), a = β_max^(1/ρ) − b (Gao et al., 2025)."""

    rho: float = 2.0
    positive = True

    @property
    def relative_slope(self) -> float:
        """a/b."""
        return (self.beta_max / self.beta_min) ** (1 / self.rho) - 1

    @property
    def scale(self) -> float:
        """b^(ρ+1)/(a (ρ+1))."""
        return self.beta_min / (self.relative_slope * (self.rho + 1))

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min * (1 + self.relative_slope * t) ** self.rho

    def integral(self, t: Tensor) -> Tensor:
        return self.scale * torch.expm1((self.rho + 1) * torch.log1p(self.relative_slope * t))

    def time(self, integral: Tensor) -> Tensor:
        return torch.expm1(torch.log1p(integral / self.scale) / (self.rho + 1)) / self.relative_slope


@dataclass(frozen=True)
class ExponentialBeta(BetaRange):
    """β(t) = β_min (β_max/β_min)^t (Gao et al., 2025)."""

    positive = True

    @property
    def log_ratio(self) -> float:
        return math.log(self.beta_max / self.beta_min)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min * torch.exp(self.log_ratio * t)

    def integral(self, t: Tensor) -> Tensor:
        return self.beta_min / self.log_ratio * torch.expm1(self.log_ratio * t)

    def time(self, integral: Tensor) -> Tensor:
        return torch.log1p(self.log_ratio / self.beta_min * integral) / self.log_ratio


@dataclass(frozen=True)
class CosineBeta(BetaSchedule):
    """α(t) = cos θ/cos θ₀, θ = ½π (t + s)/(1 + s), s = 0.008, θ₀ = θ(0) (Nichol and Dhariwal, 2021, Eq. 17).

    That is β = π/(1 + s) tan θ, from 0.0391 at t = 0 to infinity at t = 1. From the time t_c at which it reaches β_max
    on, β = β_max, exactly: the source's limit on β_i of 0.999 in N = 1000 steps is β_max = 999.
    """

    beta_max: float = 999.0
    SHIFT: ClassVar[float] = 0.008
    RATE: ClassVar[float] = math.pi / (1 + SHIFT)
    """2 dθ/dt."""
    START: ClassVar[float] = 0.5 * RATE * SHIFT
    """θ₀."""

    def __post_init__(self) -> None:
        least = self.RATE * math.tan(self.START)
        if not least < self.beta_max < math.inf:
            raise ValueError(
                f"model.beta_max={self.beta_max}: the cosine schedule needs beta_max > {least:.3g}, its value at t = 0"
            )

    @property
    def clipping_time(self) -> float:
        """t_c."""
        return 2 / self.RATE * math.atan(self.beta_max / self.RATE) - self.SHIFT

    def beta(self, t: Tensor) -> Tensor:
        angle = self.START + 0.5 * self.RATE * t.clamp(max=self.clipping_time)
        return torch.where(t < self.clipping_time, self.RATE * torch.tan(angle), self.beta_max)

    def integral(self, t: Tensor) -> Tensor:
        return self._unclipped(t.clamp(max=self.clipping_time)) + self.beta_max * (t - self.clipping_time).clamp(min=0)

    def _unclipped(self, t: Tensor) -> Tensor:
        # −2 log(cos θ/cos θ₀), in terms of δ = θ − θ₀ as that is small at first.
        delta = 0.5 * self.RATE * t
        return -2 * torch.log1p(-2 * torch.sin(0.5 * delta) ** 2 - math.tan(self.START) * torch.sin(delta))

    def time(self, integral: Tensor) -> Tensor:
        before = integral.clamp(max=self._unclipped(torch.tensor(self.clipping_time, dtype=torch.float64)).item())
        cosine = math.cos(self.START) * torch.exp(-0.5 * before)
        sine = torch.sqrt(math.sin(self.START) ** 2 - math.cos(self.START) ** 2 * torch.expm1(-before))
        return 2 / self.RATE * (torch.atan2(sine, cosine) - self.START) + (integral - before) / self.beta_max


@dataclass(frozen=True)
class LadderBeta(BetaSchedule):
    """The noise of DDPM's N steps, 0 < β_i < 1, at times i/(N − 1): e^{−B} = ᾱ_i = Π_{j≤i} (1 − β_j), so that it is not
    0 at t = 0. Between two of these times the log-SNR λ = ln ᾱ/(1 − ᾱ) is linear in t."""

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.betas) < 2 or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError("model.betas: need 2 or more numbers between 0 and 1")

    @cached_property
    def _log_snr(self) -> Tensor:
        log_mean_squared = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0)
        return log_mean_squared - torch.log(-torch.expm1(log_mean_squared))

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where t is from one of the N times to the next, from 0 to 1, and λ at both."""
        levels, position = self._log_snr.to(t.device, t.dtype), t * (len(self.betas) - 1)
        before = position.floor().clamp(0, len(self.betas) - 2).long()
        return position - before, levels[before], levels[before + 1]

    def beta(self, t: Tensor) -> Tensor:
        part, start, end = self._interval(t)
        return (start - end) * (len(self.betas) - 1) * torch.sigmoid(-torch.lerp(start, end, part))

    def integral(self, t: Tensor) -> Tensor:
        part, start, end = self._interval(t)
        return F.softplus(-torch.lerp(start, end, part), threshold=50)

    def time(self, integral: Tensor) -> Tensor:
        log_snr = -torch.log(torch.expm1(integral))
        levels = self._log_snr.to(integral.device, integral.dtype)
        after = torch.searchsorted(-levels, -log_snr.contiguous()).clamp(1, len(levels) - 1)
        start, end = levels[after - 1], levels[after]
        return (after - 1 + (start - log_snr) / (start - end)) / (len(levels) - 1)


@dataclass(frozen=True)
class StraightPath:
    """α = 1 − t, σ = t, from data to noise along straight lines, as flow matching has it."""


SIGMA_SCHEDULES: dict[str, type[SigmaSchedule]] = {
    "geometric": GeometricSigma,
    "constant": ConstantDiffusionSigma,
    "square_root": SquareRootDiffusionSigma,
    "polynomial": PolynomialSigma,
}
BETA_SCHEDULES: dict[str, type[BetaSchedule]] = {
    "linear": LinearBeta,
    "constant": ConstantBeta,
    "power": PowerBeta,
    "exponential": ExponentialBeta,
    "cosine": CosineBeta,
}


# ---------------------------------------------------------------------------------------------------------------
# Families


class Ladder(NamedTuple):
    """The N noise levels of a discrete-time model, the smallest first: x_i = mean·x_0 + std·z, each (N,).

    Level i has the mean and the noise of the continuous process at ``time`` i, so that the exact transitions between
    these times are the discrete-time chain.
    """

    time: Tensor
    mean_coefficient: Tensor
    std: Tensor


class SDE(abc.ABC):
    """A linear forward SDE on [0, 1]. Times t are tensors (B,), states x are (B, ...); coefficients come as (B,)."""

    name: ClassVar[str]
    schedules: ClassVar[Mapping[str, type]] = {}
    """By name, the usual one first."""
    sampling_eps: ClassVar[float]
    """Where sampling stops. Song et al. (2021), Appendix C: 1e-5 for VE, 1e-3 for VP and sub-VP."""
    end_time: ClassVar[float] = 1.0
    prior_std: float
    """Standard deviation of the Gaussian from which sampling starts."""

    def __init__(self, schedule) -> None:
        self.schedule = schedule

    @abc.abstractmethod
    def drift_rate(self, t: Tensor) -> Tensor:
        """f(t) of dx = −f(t) x dt + g(t) dw."""

    @abc.abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    @abc.abstractmethod
    def mean_coefficient(self, t: Tensor) -> Tensor:
        """α(t): E[x_t | x_0] = α(t) x_0."""

    @abc.abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """σ(t): the standard deviation of x_t | x_0 in each dimension."""

    @abc.abstractmethod
    def transition_variance(self, s: Tensor, t: Tensor) -> Tensor:
        """Variance of x_t | x_s in each dimension, s ≤ t, in a form free of cancellation."""

    @abc.abstractmethod
    def frozen_score_weight(self, s: Tensor, t: Tensor) -> Tensor:
        """∫ₛᵗ e^{∫ₛᵛ f} g(v)² dv: what a score that is constant from t back to s adds to x_s in the reverse SDE."""

    @abc.abstractmethod
    def time_at_noise_ratio(self, ratio: Tensor) -> Tensor:
        """The t at which σ(t)/α(t) has the given value."""

    @abc.abstractmethod
    def ladder(self, num_scales: int) -> Ladder:
        """The N noise levels of this family's discrete-time model (SMLD or DDPM), float64 on the CPU.

        Raises:
            ValueError: the family has no discrete-time model.
        """

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """−f(t) x."""
        return -expand(self.drift_rate(t), x) * x

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (B,) of x_t given x_0."""
        return expand(self.mean_coefficient(t), x0) * x0, self.std(t)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean coefficient a and standard deviation b of the exact kernel x_t | x_s = N(a x_s, b² I), s ≤ t.

        On any grid of times this is the SMLD chain for VE, and for VP the DDPM chain with β_i = 1 − e^{−(B(t)−B(s))}
        (Song et al., 2021, Eqs. 20 and 22).
        """
        return self.mean_coefficient(t) / self.mean_coefficient(s), self.transition_variance(s, t).sqrt()

    def prior_sample(self, like: Tensor, generator: Generator = None) -> Tensor:
        """A draw from the prior N(0, prior_std² I) in the shape, dtype and device of ``like``."""
        return self.prior_std * normal_like(like, generator)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) of the prior, in nats."""
        flat = x.flatten(1) / self.prior_std
        return -0.5 * (flat**2).sum(1) - flat.shape[1] * (math.log(self.prior_std) + 0.5 * math.log(2 * math.pi))

    def reverse(self, score: ScoreFunction, *, probability_flow: bool = False) -> ReverseSDE:
        """The reverse-time SDE, or the probability-flow ODE, that a score belongs to."""
        return ReverseSDE(self, score, probability_flow)


@dataclass(frozen=True)
class ReverseSDE:
    """dx = [−f x − c g² s(x, t)] dt + g dw̄ with c = 1, or with c = ½ and no noise for the probability-flow ODE.

    Time still runs from 0 to 1; sampling integrates with negative dt. Song et al. (2021), Eqs. 6 and 13.
    """

    sde: SDE
    score: ScoreFunction
    probability_flow: bool = False

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        weight = 0.5 if self.probability_flow else 1.0
        return self.sde.drift(x, t) - weight * expand(self.sde.diffusion(t) ** 2, x) * self.score(x, t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t) if self.probability_flow else self.sde.diffusion(t)


class VE(SDE):
    """Variance exploding: dx = √(dσ²/dt) dw."""

    name = "ve"
    schedules = SIGMA_SCHEDULES
    sampling_eps = 1e-5
    schedule: SigmaSchedule

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.schedule.variance_rate(t).sqrt()

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(t)

    def transition_variance(self, s: Tensor, t: Tensor) -> Tensor:
        sigma_s, sigma_t = self.schedule.sigma(s), self.schedule.sigma(t)
        return (sigma_t - sigma_s) * (sigma_t + sigma_s)

    def frozen_score_weight(self, s: Tensor, t: Tensor) -> Tensor:
        return self.transition_variance(s, t)

    def time_at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return self.schedule.time(ratio)

    @property
    def prior_std(self) -> float:
        return float(self.schedule.sigma(torch.tensor(self.end_time, dtype=torch.float64)))

    def ladder(self, num_scales: int) -> Ladder:
        """SMLD: σ_i = σ(t_i) with t_i = i/(N−1)."""
        times = torch.linspace(0, self.end_time, num_scales, dtype=torch.float64)
        std = self.schedule.sigma(times)
        return Ladder(times, torch.ones_like(std), std)


class VP(SDE):
    """Variance preserving: dx = −½β x dt + √β dw."""

    name = "vp"
    schedules = BETA_SCHEDULES
    sampling_eps = 1e-3
    prior_std = 1.0
    schedule: BetaSchedule

    def drift_rate(self, t: Tensor) -> Tensor:
        return 0.5 * self.schedule.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.schedule.beta(t).sqrt()

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.schedule.integral(t))

    def std(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.schedule.integral(t))).sqrt()

    def transition_variance(self, s: Tensor, t: Tensor) -> Tensor:
        return -torch.expm1(self.schedule.integral(s) - self.schedule.integral(t))

    def frozen_score_weight(self, s: Tensor, t: Tensor) -> Tensor:
        return 2 * torch.expm1(0.5 * (self.schedule.integral(t) - self.schedule.integral(s)))

    def time_at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return self.schedule.time(torch.log1p(ratio**2))  # e^{−B} = 1/(1 + ratio²)

    def ladder(self, num_scales: int) -> Ladder:
        """DDPM: β_i = β(i/(N−1))/N and ᾱ_i = Π_{j≤i} (1 − β_j) (Ho, Jain, Abbeel, 2020, Section 2).

        The process has this noise where e^{−B(t)} = ᾱ_i: near (i + 1)/N, and for the last level just beyond the end.
        """
        times = torch.linspace(0, self.end_time, num_scales, dtype=torch.float64)
        beta = self.schedule.beta(times) / num_scales
        if beta.max() >= 1:
            raise ValueError(
                f"model.num_scales={num_scales}: DDPM needs every beta(t)/N below 1, so more than "
                f"{float(beta.max()) * num_scales:g} levels"
            )
        log_mean_squared = torch.log1p(-beta).cumsum(0)
        mean_coefficient, std = torch.exp(0.5 * log_mean_squared), (-torch.expm1(log_mean_squared)).sqrt()
        return Ladder(self.schedule.time(-log_mean_squared), mean_coefficient, std)


class SubVP(VP):
    """Sub-VP: the drift of VP with less noise, dx = −½β x dt + √(β(1 − e^{−2B})) dw."""

    name = "subvp"

    def diffusion(self, t: Tensor) -> Tensor:
        return (-self.schedule.beta(t) * torch.expm1(-2 * self.schedule.integral(t))).sqrt()

    def std(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.schedule.integral(t))

    def transition_variance(self, s: Tensor, t: Tensor) -> Tensor:
        # σ(t)² − e^{−(B_t−B_s)} σ(s)² with σ = 1 − e^{−B} factors exactly.
        integral_s, integral_t = self.schedule.integral(s), self.schedule.integral(t)
        return torch.expm1(integral_s - integral_t) * torch.expm1(-integral_s - integral_t)

    def frozen_score_weight(self, s: Tensor, t: Tensor) -> Tensor:
        # VP's, less ∫ e^{(B−B_s)/2 − 2B} dB.
        integral_s, integral_t = self.schedule.integral(s), self.schedule.integral(t)
        missing = -2 / 3 * torch.exp(-2 * integral_s) * torch.expm1(1.5 * (integral_s - integral_t))
        return super().frozen_score_weight(s, t) - missing

    def time_at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return self.schedule.time(2 * torch.asinh(ratio / 2))  # ratio = e^{B/2} − e^{−B/2}

    def ladder(self, num_scales: int) -> Ladder:
        raise ValueError("training.sde='subvpsde' has no discrete-time model: set training.continuous=True")


class LadderVP(VP):
    """VP of the noise levels of a discrete-time model; t = 0 is the lowest of them."""

    schedules: ClassVar = {"ladder": LadderBeta}
    sampling_eps = 0.0
    schedule: LadderBeta

    def ladder(self, num_scales: int) -> Ladder:
        if num_scales != len(self.schedule.betas):
            raise ValueError(f"model.num_scales={num_scales}: model.betas are {len(self.schedule.betas)}")
        times = torch.linspace(0, self.end_time, num_scales, dtype=torch.float64)
        return Ladder(times, self.mean_coefficient(times), self.std(times))


class Flow(SDE):
    """x_t = (1 − t) x_0 + t z, which flow matching and rectified flows learn: Lipman, Chen, Ben-Hamu, Nickel, Le
    (ICLR 2023) and Liu, Gong, Liu (ICLR 2023). It ends at t = 0.999, where some of the data is left."""

    name = "flow"
    schedules: ClassVar = {"linear": StraightPath}
    sampling_eps = 1e-3
    end_time = 0.999
    prior_std = 0.999

    def drift_rate(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t / (1 - t))

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return 1 - t

    def std(self, t: Tensor) -> Tensor:
        return t

    def transition_variance(self, s: Tensor, t: Tensor) -> Tensor:
        # t² − s² (1 − t)²/(1 − s)², of which (t − s)/(1 − s) is a factor.
        return (t - s) / (1 - s) * (t + s * (1 - t) / (1 - s))

    def frozen_score_weight(self, s: Tensor, t: Tensor) -> Tensor:
        # ∫ₛᵗ (1 − s)/(1 − v) · 2v/(1 − v) dv.
        return 2 * ((t - s) / (1 - t) + (1 - s) * torch.log1p(-(t - s) / (1 - s)))

    def time_at_noise_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def ladder(self, num_scales: int) -> Ladder:
        raise ValueError("training.sde='flow' has no discrete-time model: set training.continuous=True")


FAMILIES: dict[str, type[SDE]] = {"vesde": VE, "vpsde": VP, "subvpsde": SubVP, "flow": Flow}


def make_sde(family: str, schedule: str, constants: Mapping[str, float]) -> SDE:
    """The SDE of a family and a schedule, each given by its name or import path.

    Args:
        family: a key of ``FAMILIES``, or a subclass of SDE that is built from its schedule alone.
        schedule: a key of the family's ``schedules``, or a dataclass; '': the usual one of the family.
        constants: where the fields of the schedule are found by name, such as ``config.model``.

    Raises:
        ValueError: unknown name, a constant that is missing, or constants that make no schedule.
    """
    family_class = resolve(family, FAMILIES, "training.sde", SDE)
    name = schedule or next(iter(family_class.schedules), "")
    schedule_class = resolve(name, family_class.schedules, "model.schedule")
    if not is_dataclass(schedule_class):
        raise ValueError(f"model.schedule={name!r}: must be a dataclass, whose fields are its constants")
    names = [field.name for field in fields(schedule_class)]
    for constant in names:
        if constant not in constants:
            raise ValueError(f"model.{constant} is missing: model.schedule={name!r} needs it")
    return family_class(schedule_class(**{constant: constants[constant] for constant in names}))
