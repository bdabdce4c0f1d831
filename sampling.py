"""Samplers: from noise to data with a score.

The predictor–corrector loop walks a grid of times 1 = t_K > … > t_0 = eps. At each t a corrector may improve the
sample with Langevin steps; a predictor then moves it to the next time. Both are small objects whose ``step``
returns a new state and its noise-free mean. After the last step Tweedie's formula

    E[x_0 | x_t] = (x_t + σ_t² s(x_t, t)) / α_t

removes the noise that is left. The probability-flow ODE goes the same way without noise.

One step is exact about its own grid: its size is the spacing t_{k+1} − t_k, and the discretisations use the exact
transition kernel between the two times, which for VE is the SMLD chain and for VP the DDPM chain. The times of a
discrete-time model are those of its own noise levels. With

    a = α_t/α_s,   b² = Var[x_t | x_s]        (s < t)

====================  ===========================  ==========================
predictor             mean                         variance
====================  ===========================  ==========================
Euler–Maruyama        x − [−f x − g² s] (t − s)    g² (t − s)
reverse diffusion     (2 − a) x + b² s             b²
ancestral             (x + b² s)/a                 b² σ_s²/σ_t²
exponential           x/a + s ∫ e^{∫ₛᵛ f} g² dv    b²/a²
probability flow      x − [−f x − ½g² s] (t − s)   0
====================  ===========================  ==========================

The exponential integrator is exact but for the score, which stays what it was at t; for VE it is reverse diffusion.

A condition enters as another score, as a projection that follows every step, or both (``guidance``).

NFE is counted, not computed: evaluations of the network per sample.

Solvers for a handful of steps follow the same flow in the variables in which it is simplest. With x_t = α x_0 + σ z,
y = x/α and the noise-to-signal ratio ρ = σ/α every one of our SDEs has the flow

    dy/dρ = ε(x, t) = −σ s(x, t),

because d(x/α)/dt = −½ g² s/α and dρ/dt = g²/(2σα). With the denoised D = (x + σ² s)/α = y − ρ ε and λ = −log ρ the same
flow is d(y/ρ)/dλ = D/ρ, which DPM-Solver++ solves exactly but for D, and D is extrapolated from two steps.
The reverse SDE is as simple, d(y/ρ²)/dλ = 2 D/ρ² + noise; with the D of one step it would be ancestral sampling.

The grid is that of EDM: ρ^{1/7} in equal steps from its value at t = 1 to that at eps, so that most steps go where
there is little noise. EDM's own last step, an Euler step to ρ = 0, is ``noise_removal``.

Sources: Song et al. (ICLR 2021), Appendices E to G; Ho et al. (NeurIPS 2020), Algorithm 2; Song and Ermon
(NeurIPS 2019), Algorithm 1; Gao, Nguyen, Zhu (JMLR 2025), for the exponential integrator; Karras, Aittala, Aila, Laine
(NeurIPS 2022), Eq. 5 and Algorithm 1; Lu et al., "DPM-Solver++" (2022), Algorithm 2 and, with noise, Appendix B;
Roberts and Tweedie (Bernoulli, 1996), for the adjustment of Langevin dynamics.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from experiment.randomness import Generator, normal_like, uniform
from ode import check_solver, integrate
from sde_lib import SDE, ScoreFunction, expand

__all__ = [
    "CORRECTORS",
    "FEW_STEP_SOLVERS",
    "PREDICTORS",
    "AncestralPredictor",
    "AnnealedLangevinCorrector",
    "ConditionalScore",
    "CountedScore",
    "DPMSolverPlusPlus2M",
    "EDMHeun",
    "EulerMaruyamaPredictor",
    "ExponentialIntegratorPredictor",
    "FewStepSampler",
    "FewStepSolver",
    "LangevinCorrector",
    "LangevinTrajectory",
    "LogDensity",
    "ODESampler",
    "PCSampler",
    "ProbabilityFlowPredictor",
    "Projection",
    "ReverseDiffusionPredictor",
    "SDEDPMSolverPlusPlus2M",
    "Samples",
    "denoise",
    "edm_times",
    "get_sampler",
    "langevin_dynamics",
]


class Samples(NamedTuple):
    """Samples (B, ...) in the range of the training data, and network evaluations per sample."""

    x: Tensor
    nfe: float


class ConditionalScore(abc.ABC):
    """A score s(x, t) with a condition of its own for every sample of a batch: a class, or a measurement."""

    evaluations: ClassVar[int] | int = 1
    """Of the network, for one of this score."""

    @abc.abstractmethod
    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The score (b, ...) at x (b, ...) and t (b,), which are those ``rows`` (b,) of the batch; None: all of it."""


class Projection(Protocol):
    """Brings samples in line with a condition."""

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        """The state (B, ...) at times t (B,), after the step that led there."""

    def finish(self, x: Tensor) -> Tensor:
        """The samples (B, ...), after their noise was removed."""


class CountedScore:
    """A score that counts how many samples its network has been evaluated at."""

    def __init__(self, score: ScoreFunction) -> None:
        self.score = score
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        if isinstance(self.score, ConditionalScore):
            self.evaluations += len(x) * self.score.evaluations
            return self.score(x, t, rows)
        self.evaluations += len(x)
        return self.score(x, t)


def denoise(sde: SDE, score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """Tweedie's formula: the mean of x_0 given x_t (B, ...)."""
    std = expand(sde.std(t), x)
    return (x + std**2 * score(x, t)) / expand(sde.mean_coefficient(t), x)


# ---------------------------------------------------------------------------------------------------------------
# Predictors


class Predictor(Protocol):
    """Moves a sample from time t to an earlier time s."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The new state (B, ...) and its mean before noise was added."""


@dataclass
class EulerMaruyamaPredictor:
    """The Euler–Maruyama step of the reverse SDE."""

    sde: SDE
    score: ScoreFunction

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        reverse = self.sde.reverse(self.score)
        mean = x - reverse.drift(x, t) * expand(t - s, x)
        return mean + expand(reverse.diffusion(t) * (t - s).sqrt(), x) * normal_like(x, generator), mean


@dataclass
class ReverseDiffusionPredictor:
    """The forward chain x_t = a x_s + b z run backwards (Song et al., 2021, Appendix E)."""

    sde: SDE
    score: ScoreFunction

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = (2 - a) * x + b**2 * self.score(x, t)
        return mean + b * normal_like(x, generator), mean


@dataclass
class AncestralPredictor:
    """The Gaussian x_s | x_t, x_0 with x_0 replaced by its mean given x_t; one formula for every linear SDE."""

    sde: SDE
    score: ScoreFunction

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = (x + b**2 * self.score(x, t)) / a
        std = b * expand(self.sde.std(s) / self.sde.std(t), x)
        return mean + std * normal_like(x, generator), mean


@dataclass
class ExponentialIntegratorPredictor:
    """The reverse SDE solved exactly with the score frozen at the start of the step (Gao, Nguyen, Zhu, 2025)."""

    sde: SDE
    score: ScoreFunction

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = x / a + expand(self.sde.frozen_score_weight(s, t), x) * self.score(x, t)
        return mean + b / a * normal_like(x, generator), mean


@dataclass
class ProbabilityFlowPredictor:
    """The Euler step of the probability-flow ODE, without noise."""

    sde: SDE
    score: ScoreFunction

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean = x - self.sde.reverse(self.score, probability_flow=True).drift(x, t) * expand(t - s, x)
        return mean, mean


# ---------------------------------------------------------------------------------------------------------------
# Correctors


class Corrector(Protocol):
    """Improves a sample at a fixed time."""

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The new state (B, ...) and its mean before noise was added."""


@dataclass
class LangevinCorrector:
    """x ← x + ε s + √(2ε) z with ε = 2 (snr·√D/‖s‖)² (Song et al., 2021, Algorithms 4 and 5).

    The signal-to-noise ratio is set per sample, with the norm √D of a typical z: the source averages both norms
    over the batch, which would make a sample depend on its neighbours. The price is a bias: a step size that varies
    as ‖s‖⁻² has the stationary density p‖s‖², whose variance is (D + 2)/D times that of a Gaussian p. That is 0.07 %
    for CIFAR-10, 3 % for 8×8 digits, and no sampler at all in a few dimensions; ``ald`` has no such bias.

    Raises:
        ValueError: (in ``step``) samples of fewer than 16 dimensions.
    """

    score: ScoreFunction
    snr: float
    num_steps: int = 1

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if x[0].numel() < 16:
            raise ValueError(
                f"sampling.corrector='langevin' on samples of {x[0].numel()} dimensions: its step size needs at "
                "least 16; use 'ald'"
            )
        mean = x
        for _ in range(self.num_steps):
            gradient = self.score(x, t)
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
            size = expand(2 * (self.snr * math.sqrt(x[0].numel()) / norm) ** 2, x)
            mean = x + size * gradient
            x = mean + (2 * size).sqrt() * normal_like(x, generator)
        return x, mean


@dataclass
class AnnealedLangevinCorrector:
    """x ← x + ε s + √(2ε) z with ε = 2 (snr·σ_t)²: the step sizes of annealed Langevin dynamics."""

    sde: SDE
    score: ScoreFunction
    snr: float
    num_steps: int = 1

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean = x
        size = expand(2 * (self.snr * self.sde.std(t)) ** 2, x)
        for _ in range(self.num_steps):
            mean = x + size * self.score(x, t)
            x = mean + (2 * size).sqrt() * normal_like(x, generator)
        return x, mean


PREDICTORS: dict[str, Callable[[SDE, ScoreFunction], Predictor | None]] = {
    "euler_maruyama": EulerMaruyamaPredictor,
    "reverse_diffusion": ReverseDiffusionPredictor,
    "ancestral_sampling": AncestralPredictor,
    "exponential_integrator": ExponentialIntegratorPredictor,
    "probability_flow": ProbabilityFlowPredictor,
    "none": lambda sde, score: None,
}
CORRECTORS: dict[str, Callable[[SDE, ScoreFunction, float, int], Corrector | None]] = {
    "langevin": lambda sde, score, snr, num_steps: LangevinCorrector(score, snr, num_steps),
    "ald": AnnealedLangevinCorrector,
    "none": lambda sde, score, snr, num_steps: None,
}


# ---------------------------------------------------------------------------------------------------------------
# Solvers for a handful of steps


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


# ---------------------------------------------------------------------------------------------------------------
# Samplers


Move = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From x at the time t to s, which is None at the end of the grid."""


def _walk(
    sampler: PCSampler | FewStepSampler,
    score: CountedScore,
    like: Tensor,
    generator: Generator,
    times: Tensor,
    stays: Move | None,
    goes: Move | None,
    *,
    projection: Projection | None,
    progress: bool,
) -> Samples:
    """From the prior along a grid: at each time a move that stays there, then one that goes to the next. A projection
    follows the prior and every move."""
    # One row per time, on the device once, in the precision of the state.
    times = times.to(like.dtype).to(like.device)[:, None].expand(-1, len(like))

    def project(x: Tensor, t: Tensor) -> Tensor:
        return x if projection is None else projection.step(x, t, generator)

    x = project(sampler.sde.prior_sample(like, generator), times[0])
    for step in tqdm(range(sampler.num_steps), disable=not progress, leave=False, unit="step"):
        t, s = times[step], times[step + 1] if step + 1 < len(times) else None
        if stays is not None:
            x = project(stays(x, t, s), t)
        if goes is not None and s is not None:
            x = project(goes(x, t, s), s)
    if sampler.noise_removal:
        x = denoise(sampler.sde, score, x, times[-1])
    if projection is not None:
        x = projection.finish(x)
    return Samples(x, score.evaluations / len(like))


@dataclass(frozen=True)
class PCSampler:
    """Predictor–corrector sampling in ``num_steps`` steps.

    The grid is ``num_steps`` equal intervals of time from 1 to eps; the corrector acts at the start of each. With a
    corrector alone there are no intervals to cross: it acts at ``num_steps`` times from 1 to eps, both included. So
    does the sampler of a discrete-time model of ``num_scales`` levels: its times are those of the levels, all or evenly
    chosen ones, and its last predictor step is the removal of the noise. These are annealed Langevin dynamics, SMLD
    and DDPM as they are defined.

    Raises:
        ValueError: unknown predictor or corrector, none of either, or a number outside its range.
    """

    sde: SDE
    predictor: str = "reverse_diffusion"
    corrector: str = "langevin"
    num_steps: int = 1000
    snr: float = 0.16
    corrector_steps: int = 1
    noise_removal: bool = True
    num_scales: int | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("predictor", PREDICTORS), ("corrector", CORRECTORS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"sampling.{field}={getattr(self, field)!r}: allowed are {', '.join(allowed)}")
        if self.predictor == self.corrector == "none":
            raise ValueError("sampling.predictor='none', sampling.corrector='none': at least one must be given")
        if self.num_steps < 1 or self.corrector_steps < 1:
            raise ValueError(
                f"sampling.num_steps={self.num_steps}, sampling.n_steps_each={self.corrector_steps}: at least 1 each"
            )
        if self.num_scales is not None and self.num_steps > self.num_scales:
            raise ValueError(
                f"sampling.num_steps={self.num_steps}: at most model.num_scales={self.num_scales}, the noise levels of "
                "this discrete-time model"
            )
        if not self.snr > 0:
            raise ValueError(f"sampling.snr={self.snr}: allowed are positive numbers")

    def times(self) -> Tensor:
        """The grid, float64, falling: ``num_steps`` times, or as many intervals."""
        if self.num_scales is not None:
            levels = torch.linspace(self.num_scales - 1, 0, self.num_steps, dtype=torch.float64)
            return self.sde.ladder(self.num_scales).time[levels.round().long()]
        stops = self.num_steps if self.predictor == "none" else self.num_steps + 1
        return torch.linspace(self.sde.end_time, self.sde.sampling_eps, stops, dtype=torch.float64)

    @torch.no_grad()
    def __call__(
        self,
        score: ScoreFunction,
        like: Tensor,
        generator: Generator = None,
        *,
        projection: Projection | None = None,
        progress: bool = False,
    ) -> Samples:
        """Samples in the shape (B, ...), dtype and device of ``like``; with per-sample generators sample i depends
        on its own stream alone. A projection follows the prior and every predictor's and corrector's step."""
        counted = CountedScore(score)
        predictor = PREDICTORS[self.predictor](self.sde, counted)
        corrector = CORRECTORS[self.corrector](self.sde, counted, self.snr, self.corrector_steps)

        def stays(x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
            return corrector.step(x, t, generator)[0]

        def goes(x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
            return predictor.step(x, t, s, generator)[0]

        moves = None if corrector is None else stays, None if predictor is None else goes
        return _walk(self, counted, like, generator, self.times(), *moves, projection=projection, progress=progress)


@dataclass(frozen=True)
class ODESampler:
    """Sampling by the probability-flow ODE dx/dt = −f x − ½g² s from t = 1 to eps.

    Raises:
        ValueError: unknown solver or a setting outside its range.
    """

    sde: SDE
    solver: str = "rk45"
    rtol: float = 1e-5
    atol: float = 1e-5
    num_steps: int = 50
    noise_removal: bool = False

    def __post_init__(self) -> None:
        try:
            check_solver(self.solver, rtol=self.rtol, atol=self.atol, num_steps=self.num_steps)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from None

    @torch.no_grad()
    def __call__(
        self,
        score: ScoreFunction,
        like: Tensor,
        generator: Generator = None,
        *,
        projection: Projection | None = None,
        progress: bool = False,
    ) -> Samples:
        """Samples in the shape (B, ...), dtype and device of ``like``; the generator draws the prior, and what a
        projection asks for, which follows the prior and every step of ``heun``.

        Raises:
            ValueError: a projection and a solver that chooses its own steps.
        """
        if projection is not None and self.solver != "heun":
            raise ValueError(f"sampling.solver={self.solver!r}: a projection follows every step, so needs 'heun'")
        counted = CountedScore(score)
        bar = tqdm(disable=not progress, leave=False, unit="evaluation")

        def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            bar.update()
            x = y.to(like.dtype).reshape(-1, *like.shape[1:])
            flow = self.sde.reverse(partial(counted, rows=rows), probability_flow=True)
            return flow.drift(x, t.to(like.dtype)).flatten(1).to(y.dtype)

        def solve(x: Tensor, start: float, end: float, num_steps: int) -> Tensor:
            y = x.flatten(1).to(_state_dtype(like))
            settings = dict(solver=self.solver, rtol=self.rtol, atol=self.atol, num_steps=num_steps)
            return integrate(velocity, y, start, end, **settings).to(like.dtype).view_as(like)

        x = self.sde.prior_sample(like, generator)
        start, end = self.sde.end_time, self.sde.sampling_eps
        with bar:
            if projection is None:
                x = solve(x, start, end, self.num_steps)
            else:
                x = projection.step(x, x.new_full((len(x),), start), generator)
                times = torch.linspace(start, end, self.num_steps + 1, dtype=torch.float64)
                for t, s in itertools.pairwise(times.tolist()):
                    x = projection.step(solve(x, t, s, 1), x.new_full((len(x),), s), generator)
        if self.noise_removal:
            x = denoise(self.sde, counted, x, x.new_full((len(x),), end))
        if projection is not None:
            x = projection.finish(x)
        return Samples(x, counted.evaluations / len(like))


@dataclass(frozen=True)
class FewStepSampler:
    """Sampling in 10 to 40 evaluations: ``num_steps`` steps on the EDM grid by a solver of ``few_step``.

    Raises:
        ValueError: unknown solver or fewer than one step.
    """

    sde: SDE
    solver: str = "dpmpp_2m_sde"
    num_steps: int = 19
    noise_removal: bool = True

    def __post_init__(self) -> None:
        if self.solver not in FEW_STEP_SOLVERS:
            allowed = ", ".join(FEW_STEP_SOLVERS)
            raise ValueError(f"sampling.solver={self.solver!r}: allowed with method='few_step' are {allowed}")
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps={self.num_steps}: at least 1")

    @torch.no_grad()
    def __call__(
        self,
        score: ScoreFunction,
        like: Tensor,
        generator: Generator = None,
        *,
        projection: Projection | None = None,
        progress: bool = False,
    ) -> Samples:
        """Samples in the shape (B, ...), dtype and device of ``like``; a projection follows the prior and every
        step."""
        counted = CountedScore(score)
        solver = FEW_STEP_SOLVERS[self.solver](self.sde, counted)
        times = edm_times(self.sde, self.num_steps)

        def goes(x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
            return solver.step(x, t, s, generator)

        return _walk(self, counted, like, generator, times, None, goes, projection=projection, progress=progress)


def _state_dtype(like: Tensor) -> torch.dtype:
    """Solvers keep their state in double precision, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def get_sampler(config, sde: SDE) -> PCSampler | ODESampler | FewStepSampler:
    """The sampler of ``config.sampling``; ``num_steps`` 0 means ``config.model.num_scales``.

    Raises:
        ValueError: unknown method, predictor, corrector or solver, or a number outside its range.
    """
    sampling = config.sampling
    num_steps = sampling.num_steps or config.model.num_scales
    if sampling.method == "pc":
        return PCSampler(
            sde,
            predictor=sampling.predictor,
            corrector=sampling.corrector,
            num_steps=num_steps,
            snr=sampling.snr,
            corrector_steps=sampling.n_steps_each,
            noise_removal=sampling.noise_removal,
            num_scales=None if config.training.continuous else config.model.num_scales,
        )
    if sampling.method == "ode":
        return ODESampler(
            sde,
            solver=sampling.solver,
            rtol=sampling.rtol,
            atol=sampling.atol,
            num_steps=num_steps,
            noise_removal=sampling.noise_removal,
        )
    if sampling.method == "few_step":
        return FewStepSampler(sde, sampling.solver, num_steps=num_steps, noise_removal=sampling.noise_removal)
    raise ValueError(f"sampling.method={sampling.method!r}: allowed are pc, ode, few_step")


# ---------------------------------------------------------------------------------------------------------------
# Langevin dynamics at one fixed time


LogDensity = Callable[[Tensor, Tensor], Tensor]
"""log p_t(x) in nats, up to a constant: takes x (B, ...) and t (B,), returns (B,)."""


class LangevinTrajectory(NamedTuple):
    """The N + 1 states (N+1, B, ...), the start first, and whether each of the N moves was made (N, B)."""

    x: Tensor
    accepted: Tensor


@torch.no_grad()
def langevin_dynamics(
    score: ScoreFunction,
    x: Tensor,
    t: Tensor,
    step_sizes: Sequence[float],
    *,
    noise: bool = True,
    log_density: LogDensity | None = None,
    generator: Generator = None,
) -> LangevinTrajectory:
    """N steps of x ← x + α_i s(x, t) + √(2α_i) z, with t fixed.

    Three samplers:

    * ``noise=True``: unadjusted Langevin (Song and Ermon, 2019, Algorithm 1, one noise level). As α → 0 its stationary
      law is that of the score. At finite α it is not: for N(0, σ²) it has the variance 2α/(1 − (1 − α/σ²)²), which is
      σ²/(1 − α/2σ²).
    * ``noise=False``: x ← x + α_i s(x, t), gradient ascent where s is a gradient. Without Metropolis adjustment only.
    * ``log_density`` given: Metropolis-adjusted Langevin (Roberts and Tweedie, 1996). The step above only proposes x';
      each sample makes the move with probability min(1, p(x') q(x|x') / p(x) q(x'|x)), where
      q(y|x) = N(y; x + α s(x, t), 2α I), and otherwise stays. Then ``log_density`` is stationary at every α, and
      whatever s is: a wrong score costs acceptance, not correctness. A move to where p or q is not finite is not made.

    Args:
        score: s(x, t); N evaluations per sample, N + 1 if adjusted.
        x, t: start (B, ...) and times (B,).
        step_sizes: α_0, …, α_{N−1}, in units of x².
        noise: whether z is drawn or zero.
        log_density: the target of the Metropolis adjustment, need not be normalised.
        generator: draws z and then, if adjusted, one uniform number per sample.

    Returns:
        All states and moves; without adjustment every move is made.

    Raises:
        ValueError: no step sizes, or one that is not positive and finite; a ``log_density`` without noise, or not
            finite at the start.
    """
    for i, size in enumerate(step_sizes):
        if not 0 < size < math.inf:
            raise ValueError(f"step_sizes[{i}]={size}: allowed are positive numbers")
    if len(step_sizes) == 0:
        raise ValueError("step_sizes is empty: at least one step is needed")
    if log_density is not None and not noise:
        raise ValueError("log_density given with noise=False: a move without noise cannot be Metropolis-adjusted")

    states = x.new_empty(len(step_sizes) + 1, *x.shape)
    accepted = torch.ones(len(step_sizes), len(x), dtype=torch.bool, device=x.device)
    states[0] = x
    if log_density is None:
        for i, size in enumerate(step_sizes):
            x = x + size * score(x, t)
            if noise:
                x = x + math.sqrt(2 * size) * normal_like(x, generator)
            states[i + 1] = x
        return LangevinTrajectory(states, accepted)

    gradient, log_p = score(x, t), log_density(x, t)
    if not log_p.isfinite().all():
        raise ValueError(f"log_density is not finite at {int((~log_p.isfinite()).sum())} of {len(x)} starting points")
    for i, size in enumerate(step_sizes):
        z = normal_like(x, generator)
        proposal = x + size * gradient + math.sqrt(2 * size) * z
        proposed_gradient, proposed_log_p = score(proposal, t), log_density(proposal, t)
        back = (x - proposal - size * proposed_gradient) / math.sqrt(2 * size)
        log_q_ratio = 0.5 * (z**2 - back**2).flatten(1).sum(1)  # log q(x|x') − log q(x'|x)
        threshold = uniform((len(x),), generator, device=x.device, dtype=x.dtype).log()
        # A comparison with NaN is false: such a move is refused.
        accepted[i] = (threshold < proposed_log_p - log_p + log_q_ratio) & proposed_log_p.isfinite()
        move = accepted[i].view(-1, *[1] * (x.ndim - 1))
        x = torch.where(move, proposal, x)
        gradient = torch.where(move, proposed_gradient, gradient)
        log_p = torch.where(accepted[i], proposed_log_p, log_p)
        states[i + 1] = x
    return LangevinTrajectory(states, accepted)
