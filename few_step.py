"""Solvers for a handful of steps: Heun's method on the EDM grid, and DPM-Solver++(2M) with and without noise.

They follow the probability-flow ODE in the variables in which it is simplest. With x_t = α x_0 + σ z, y = x/α and the
noise-to-signal ratio ρ = σ/α every one of our SDEs has the flow

    dy/dρ = ε(x, t) = −σ s(x, t),

because d(x/α)/dt = −½ g² s/α and dρ/dt = g²/(2σα). With the denoised D = (x + σ² s)/α = y − ρ ε and λ = −log ρ the same
flow is d(y/ρ)/dλ = D/ρ, which DPM-Solver++ solves exactly but for D, and D is extrapolated from two steps.
The reverse SDE is as simple, d(y/ρ²)/dλ = 2 D/ρ² + noise; with the D of one step it would be ancestral sampling.

The grid is that of EDM: ρ^{1/7} in equal steps from its value at t = 1 to that at eps, so that most steps go where
there is little noise. EDM's own last step, an Euler step to ρ = 0, is ``noise_removal``.

Sources: Karras, Aittala, Aila, Laine (NeurIPS 2022), Eq. 5 and Algorithm 1; Lu et al., "DPM-Solver++" (2022),
Algorithm 2 and, with noise, Appendix B.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from experiment.randomness import Generator, normal_like
from sde_lib import SDE, ScoreFunction, expand

__all__ = ["FEW_STEP_SOLVERS", "DPMSolverPlusPlus2M", "EDMHeun", "FewStepSolver", "SDEDPMSolverPlusPlus2M", "edm_times"]

_GRID_EXPONENT = 7


def edm_times(sde: SDE, num_steps: int) -> Tensor:
    """The grid (num_steps + 1,), float64, falling from the end time to where sampling stops."""
    ends = torch.tensor([sde.end_time, sde.sampling_eps], dtype=torch.float64)
    first, last = (sde.std(ends) / sde.mean_coefficient(ends)) ** (1 / _GRID_EXPONENT)
    ratio = (first + torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) * (last - first)) ** _GRID_EXPONENT
    times = sde.time_at_noise_ratio(ratio)
    times[0], times[-1] = ends  # but for rounding they are
    return times


class FewStepSolver(Protocol):
    """One trajectory; a solver may remember its last steps."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> Tensor:
        """From x (B, ...) at the times t (B,) to s < t."""


class _Solver:
    def __init__(self, sde: SDE, score: ScoreFunction) -> None:
        self.sde, self.score = sde, score

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and ρ, to be multiplied with x."""
        mean, std = expand(self.sde.mean_coefficient(t), x), expand(self.sde.std(t), x)
        return mean, std, std / mean


class EDMHeun(_Solver):
    """Heun's method in ρ: order two, two evaluations a step."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> Tensor:
        mean_t, std_t, ratio_t = self.coefficients(t, x)
        mean_s, std_s, ratio_s = self.coefficients(s, x)
        y, size = x / mean_t, ratio_s - ratio_t
        slope = -std_t * self.score(x, t)
        slope_after = -std_s * self.score(mean_s * (y + size * slope), s)
        return mean_s * (y + 0.5 * size * (slope + slope_after))


class DPMSolverPlusPlus2M(_Solver):
    """DPM-Solver++(2M): order two, one evaluation a step. The first step is of order one."""

    def __init__(self, sde: SDE, score: ScoreFunction) -> None:
        super().__init__(sde, score)
        self.previous: tuple[Tensor, Tensor] | None = None  # D and λ of the step before

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> Tensor:
        mean_t, std_t, ratio_t = self.coefficients(t, x)
        mean_s, _, ratio_s = self.coefficients(s, x)
        denoised = (x + std_t**2 * self.score(x, t)) / mean_t
        extrapolated = denoised
        if self.previous is not None:
            before, log_ratio_before = self.previous
            # Half a step further, in λ, along the line through the last two.
            slope = (denoised - before) / (log_ratio_before - ratio_t.log())
            extrapolated = denoised + 0.5 * (ratio_t.log() - ratio_s.log()) * slope
        self.previous = denoised, ratio_t.log()
        return mean_s * self.move(x / mean_t, extrapolated, ratio_t, ratio_s, generator)

    def move(self, y: Tensor, denoised: Tensor, ratio_t: Tensor, ratio_s: Tensor, generator: Generator) -> Tensor:
        """y at ρ_s < ρ_t if the denoised image does not change in between."""
        shrink = ratio_s / ratio_t
        return shrink * y + (1 - shrink) * denoised


class SDEDPMSolverPlusPlus2M(DPMSolverPlusPlus2M):
    """SDE-DPM-Solver++(2M), the same for the reverse SDE: one evaluation a step, noise in every step."""

    def move(self, y: Tensor, denoised: Tensor, ratio_t: Tensor, ratio_s: Tensor, generator: Generator) -> Tensor:
        shrink = (ratio_s / ratio_t) ** 2
        return shrink * y + (1 - shrink) * denoised + ratio_s * (1 - shrink).sqrt() * normal_like(y, generator)


FEW_STEP_SOLVERS: dict[str, type[FewStepSolver]] = {
    "heun": EDMHeun,
    "dpmpp_2m": DPMSolverPlusPlus2M,
    "dpmpp_2m_sde": SDEDPMSolverPlusPlus2M,
}
