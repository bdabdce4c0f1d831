"""Noise schedules: how fast a forward process turns data into noise.

A schedule is a small frozen object with closed forms: σ(t), d(σ²)/dt and the inverse of σ for VE; β(t), B(t) = ∫₀ᵗ β
and the inverse of B for VP and sub-VP (the families are in ``sde_lib``). A further schedule is one such class and one
entry in the dictionary of its family at the end of this file; nothing else in the project changes
(docs/add_your_own_sde.md):

===========  =============================================  ===========  =============================================
VE           σ(t)                                           VP, sub-VP   β(t)
===========  =============================================  ===========  =============================================
geometric    σ_min (σ_max/σ_min)^t                          linear       β_min + t (β_max − β_min)
constant     σ² linear in t: g constant                     constant     ½ (β_min + β_max)
square_root  σ² linear in t²: g ∝ √t                        power        β^(1/ρ) linear in t
polynomial   σ^(1/ρ) linear in t                            exponential  β_min (β_max/β_min)^t
                                                            cosine       from α² = cos², at most β_max
===========  =============================================  ===========  =============================================

Fields are named after the fields of ``config.model`` that they are built from; times, in [0, 1], are tensors of any
shape.

Sources: geometric and linear are those of Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative
Modeling through Stochastic Differential Equations" (ICLR 2021); cosine: Nichol and Dhariwal, "Improved Denoising
Diffusion Probabilistic Models" (ICML 2021); the others: Gao, Nguyen, Zhu, "Wasserstein Convergence Guarantees for a
General Class of Score-Based Generative Models" (JMLR 2025).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "BETA_SCHEDULES",
    "SIGMA_SCHEDULES",
    "BetaRange",
    "BetaSchedule",
    "ConstantBeta",
    "ConstantDiffusionSigma",
    "CosineBeta",
    "ExponentialBeta",
    "GeometricSigma",
    "LinearBeta",
    "PolynomialSigma",
    "PowerBeta",
    "SigmaSchedule",
    "SquareRootDiffusionSigma",
]


@dataclass(frozen=True)
class SigmaSchedule(abc.ABC):
    """σ(t), increasing from σ(0) = σ_min to σ(1) = σ_max: a schedule of VE. Times are tensors of any shape.

    Raises:
        ValueError: unless 0 < σ_min < σ_max.
    """

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

    Raises:
        ValueError: unless 0 < σ_min < σ_max and ρ > 0.
    """

    rho: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rho(self.rho)

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
    """β(t) ≥ 0 with its integral: a schedule of VP and sub-VP. Times are tensors of any shape."""

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
    """A schedule between β_min and β_max.

    Raises:
        ValueError: unless 0 ≤ β_min < β_max, or, where β_min must be ``positive``, 0 < β_min < β_max.
    """

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
    """β(t) = (b + at)^ρ, b = β_min^(1/ρ), a = β_max^(1/ρ) − b (Gao et al., 2025).

    Raises:
        ValueError: unless 0 < β_min < β_max and ρ > 0.
    """

    rho: float = 2.0
    positive = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rho(self.rho)

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
    """β(t) = β_min (β_max/β_min)^t (Gao et al., 2025).

    Raises:
        ValueError: unless 0 < β_min < β_max.
    """

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

    That is β = π/(1 + s) tan θ, which is infinite at t = 1. From the time t_c at which it reaches β_max on, β = β_max,
    exactly: the source's limit on β_i of 0.999 in N = 1000 steps is β_max = 999.

    Raises:
        ValueError: unless β(0) = 0.0391 < β_max.
    """

    beta_max: float = 999.0
    shift: ClassVar[float] = 0.008

    def __post_init__(self) -> None:
        if not self._rate * math.tan(self._start) < self.beta_max < math.inf:
            raise ValueError(
                f"model.beta_max={self.beta_max}: the cosine schedule needs beta_max > "
                f"{self._rate * math.tan(self._start):.3g}, its value at t = 0"
            )

    @property
    def _rate(self) -> float:
        """2 dθ/dt."""
        return math.pi / (1 + self.shift)

    @property
    def _start(self) -> float:
        """θ₀."""
        return 0.5 * self._rate * self.shift

    @property
    def clipping_time(self) -> float:
        """t_c."""
        return 2 / self._rate * math.atan(self.beta_max / self._rate) - self.shift

    def beta(self, t: Tensor) -> Tensor:
        angle = self._start + 0.5 * self._rate * t.clamp(max=self.clipping_time)
        return torch.where(t < self.clipping_time, self._rate * torch.tan(angle), self.beta_max)

    def integral(self, t: Tensor) -> Tensor:
        return self._unclipped(t.clamp(max=self.clipping_time)) + self.beta_max * (t - self.clipping_time).clamp(min=0)

    def _unclipped(self, t: Tensor) -> Tensor:
        # −2 log(cos θ/cos θ₀), in terms of δ = θ − θ₀ as that is small at first.
        delta = 0.5 * self._rate * t
        return -2 * torch.log1p(-2 * torch.sin(0.5 * delta) ** 2 - math.tan(self._start) * torch.sin(delta))

    def time(self, integral: Tensor) -> Tensor:
        before = integral.clamp(max=self._unclipped(torch.tensor(self.clipping_time, dtype=torch.float64)).item())
        cosine = math.cos(self._start) * torch.exp(-0.5 * before)
        sine = torch.sqrt(math.sin(self._start) ** 2 - math.cos(self._start) ** 2 * torch.expm1(-before))
        return 2 / self._rate * (torch.atan2(sine, cosine) - self._start) + (integral - before) / self.beta_max


def _check_rho(rho: float) -> None:
    if not 0 < rho < math.inf:
        raise ValueError(f"model.rho={rho}: allowed are positive numbers")


SIGMA_SCHEDULES: dict[str, type[SigmaSchedule]] = {
    "geometric": GeometricSigma,
    "constant": ConstantDiffusionSigma,
    "square_root": SquareRootDiffusionSigma,
    "polynomial": PolynomialSigma,
}
"""The schedules of VE by name, the usual one first."""
BETA_SCHEDULES: dict[str, type[BetaSchedule]] = {
    "linear": LinearBeta,
    "constant": ConstantBeta,
    "power": PowerBeta,
    "exponential": ExponentialBeta,
    "cosine": CosineBeta,
}
"""The schedules of VP and sub-VP by name, the usual one first."""
