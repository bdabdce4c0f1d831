"""Samplers: from noise to data with a score.

Every sampler follows a grid of times that falls from 1 to eps. At a time t a *corrector* may improve the sample by
Langevin steps; a *predictor* then moves it to the next time s < t. At the end Tweedie's formula

    E[x_0 | x_t] = (x_t + σ_t² s(x_t, t)) / α_t

removes the noise that is left. A condition enters as another score, as a projection after every step, or both
(``guidance``). NFE, the evaluations of the network per sample, are counted while sampling.

*Predictor–corrector.* The size of a step is the spacing of its grid, and the discretisations use the exact transition
between its two times, which for VE is the SMLD chain and for VP the DDPM chain. With the score S = s(x, t),
a = α_t/α_s, b² = Var[x_t | x_s]:

====================  ===========================  ==========================
predictor             mean                         variance
====================  ===========================  ==========================
Euler–Maruyama        x − [−f x − g² S] (t − s)    g² (t − s)
reverse diffusion     (2 − a) x + b² S             b²
ancestral             (x + b² S)/a                 b² σ_s²/σ_t²
exponential           x/a + S ∫ e^{∫ₛᵛ f} g² dv    b²/a²
probability flow      x − [−f x − ½g² S] (t − s)   0
====================  ===========================  ==========================

The exponential integrator is exact except that it keeps the score at its value at t; for VE it is reverse diffusion.

*Few steps.* In y = x/α and the noise-to-signal ratio ρ = σ/α the probability flow of every SDE here is

    dy/dρ = ε(x, t) = −σ s(x, t),

because d(x/α)/dt = −½ g² s/α and dρ/dt = g²/(2σα). With the denoised D = (x + σ² s)/α = y − ρ ε and λ = −log ρ it is
d(y/ρ)/dλ = D/ρ. DPM-Solver++ solves this exactly for a D that is extrapolated from two steps. The reverse SDE is
d(y/ρ²)/dλ = 2 D/ρ² + noise; with the D of one step that is ancestral sampling. The grid is that of EDM, equal steps of
ρ^{1/7}, so that most steps are where there is little noise. EDM's last step, to ρ = 0, is Tweedie's formula.

Sources: Song et al. (ICLR 2021), Appendices E to G; Ho et al. (NeurIPS 2020), Algorithm 2; Song and Ermon
(NeurIPS 2019), Algorithm 1; Gao, Nguyen, Zhu (JMLR 2025), for the exponential integrator; Karras, Aittala, Aila, Laine
(NeurIPS 2022), Eq. 5 and Algorithm 1; Lu et al., "DPM-Solver++" (2022), Algorithm 2 and, with noise, Appendix B;
Roberts and Tweedie (Bernoulli, 1996), for the adjustment of Langevin dynamics.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from experiment.randomness import Generator, normal_like, uniform
from experiment.registry import resolve
from experiment.runtime import to_device, to_host
from ode import FIXED, check_solver, integrate, state_dtype
from sde_lib import SDE, ScoreFunction, expand


class Samples(NamedTuple):
    """Samples (B, ...) in the range of the training data, and network evaluations per sample."""

    x: Tensor
    nfe: float


class ConditionalScore(abc.ABC):
    """A score s(x, t) with its own condition for every sample of a batch: a class, or a measurement."""

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
    """A score that counts how many samples its network has been evaluated at, and shows its calls on a bar."""

    def __init__(self, score: ScoreFunction, bar: tqdm | None = None) -> None:
        self.score = score
        self.bar = bar
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        if self.bar is not None:
            self.bar.update()
        if isinstance(self.score, ConditionalScore):
            self.evaluations += len(x) * self.score.evaluations
            return self.score(x, t, rows)
        self.evaluations += len(x)
        return self.score(x, t)


def _check_finite(x: Tensor, method: str) -> None:
    if bad := int(to_host((~x.isfinite()).flatten(1).any(1).sum())):
        raise FloatingPointError(f"{bad} of {len(x)} samples are not finite ({method})")


def denoise(sde: SDE, score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """Tweedie's formula: the mean of x_0 given x_t (B, ...)."""
    std = expand(sde.std(t), x)
    return (x + std**2 * score(x, t)) / expand(sde.mean_coefficient(t), x)


# ---------------------------------------------------------------------------------------------------------------
# Predictors


class Predictor(abc.ABC):
    """Moves samples from times t to s < t. It is built for every batch as ``Predictor(sde, score)``, so it may remember
    its last steps."""

    def __init__(self, sde: SDE, score: ScoreFunction) -> None:
        self.sde = sde
        self.score = score

    @abc.abstractmethod
    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The state (B, ...) at times s (B,) from x (B, ...) at t (B,), and its mean before noise was added."""


class EulerMaruyamaPredictor(Predictor):
    """The Euler–Maruyama step of the reverse SDE."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        reverse = self.sde.reverse(self.score)
        mean = x - reverse.drift(x, t) * expand(t - s, x)
        return mean + expand(reverse.diffusion(t) * (t - s).sqrt(), x) * normal_like(x, generator), mean


class ReverseDiffusionPredictor(Predictor):
    """The forward chain x_t = a x_s + b z run backwards (Song et al., 2021, Appendix E)."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = (2 - a) * x + b**2 * self.score(x, t)
        return mean + b * normal_like(x, generator), mean


class AncestralPredictor(Predictor):
    """The Gaussian x_s | x_t, x_0 with x_0 replaced by its mean given x_t; one formula for every linear SDE."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = (x + b**2 * self.score(x, t)) / a
        std = b * expand(self.sde.std(s) / self.sde.std(t), x)
        return mean + std * normal_like(x, generator), mean


class ExponentialIntegratorPredictor(Predictor):
    """The reverse SDE solved exactly with the score at the start of the step (Gao, Nguyen, Zhu, 2025)."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        a, b = (expand(c, x) for c in self.sde.transition(s, t))
        mean = x / a + expand(self.sde.frozen_score_weight(s, t), x) * self.score(x, t)
        return mean + b / a * normal_like(x, generator), mean


class ProbabilityFlowPredictor(Predictor):
    """The Euler step of the probability-flow ODE, without noise."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean = x - self.sde.reverse(self.score, probability_flow=True).drift(x, t) * expand(t - s, x)
        return mean, mean


class _FlowSolver(Predictor):
    """``ode.integrate`` of the probability flow, interval by interval of a grid, with state and times in the precision
    of t."""

    def __init__(self, sde: SDE, score: CountedScore, grid: Tensor, **settings) -> None:
        super().__init__(sde, score)
        self.intervals = itertools.pairwise(grid.tolist())
        self.settings = settings

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        def velocity(y: Tensor, u: Tensor, rows: Tensor) -> Tensor:
            flow = self.sde.reverse(partial(self.score, rows=rows), probability_flow=True)
            position = y.to(x.dtype).reshape(-1, *x.shape[1:])
            return flow.drift(position, u.to(x.dtype)).flatten(1).to(y.dtype)

        y = integrate(velocity, x.flatten(1).to(t.dtype), *next(self.intervals), **self.settings)
        y = y.to(x.dtype).view_as(x)
        return y, y


def _noise_to_signal(sde: SDE, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α, σ and ρ, to be multiplied with x."""
    mean, std = expand(sde.mean_coefficient(t), x), expand(sde.std(t), x)
    return mean, std, std / mean


class EDMHeun(Predictor):
    """Heun's method in ρ: order two, two evaluations a step."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean_t, std_t, ratio_t = _noise_to_signal(self.sde, t, x)
        mean_s, std_s, ratio_s = _noise_to_signal(self.sde, s, x)
        y, size = x / mean_t, ratio_s - ratio_t
        slope = -std_t * self.score(x, t)
        slope_after = -std_s * self.score(mean_s * (y + size * slope), s)
        x = mean_s * (y + 0.5 * size * (slope + slope_after))
        return x, x


class DPMSolverPlusPlus2M(Predictor):
    """DPM-Solver++(2M): order two, one evaluation a step. The first step is of order one."""

    noise: ClassVar[bool] = False
    previous: tuple[Tensor, Tensor] | None = None
    """D and λ of the last step."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean_t, std_t, ratio_t = _noise_to_signal(self.sde, t, x)
        mean_s, _, ratio_s = _noise_to_signal(self.sde, s, x)
        denoised = (x + std_t**2 * self.score(x, t)) / mean_t
        extrapolated = denoised
        if self.previous is not None:
            before, log_ratio_before = self.previous
            # Half a step further, in λ, along the line through the last two.
            slope = (denoised - before) / (log_ratio_before - ratio_t.log())
            extrapolated = denoised + 0.5 * (ratio_t.log() - ratio_s.log()) * slope
        self.previous = denoised, ratio_t.log()
        shrink = (ratio_s / ratio_t) ** (2 if self.noise else 1)
        mean = shrink * (x / mean_t) + (1 - shrink) * extrapolated
        y = mean + ratio_s * (1 - shrink).sqrt() * normal_like(x, generator) if self.noise else mean
        return mean_s * y, mean_s * mean


class SDEDPMSolverPlusPlus2M(DPMSolverPlusPlus2M):
    """SDE-DPM-Solver++(2M), the same for the reverse SDE: one evaluation a step, noise in every step."""

    noise = True


# ---------------------------------------------------------------------------------------------------------------
# Correctors


class Corrector(abc.ABC):
    """Improves samples at fixed times by ``num_steps`` Langevin steps, x ← x + ε s + √(2ε) z, whose size ε is set by a
    signal-to-noise ratio. It is built for every batch as ``Corrector(sde, score, snr, num_steps)``."""

    def __init__(self, sde: SDE, score: ScoreFunction, snr: float, num_steps: int = 1) -> None:
        self.sde = sde
        self.score = score
        self.snr = snr
        self.num_steps = num_steps

    @abc.abstractmethod
    def step_size(self, score: Tensor, t: Tensor) -> Tensor:
        """ε (B,), where the score has the values (B, ...)."""

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        """The state (B, ...) after all steps at the times t (B,)."""
        for _ in range(self.num_steps):
            score = self.score(x, t)
            size = expand(self.step_size(score, t), x)
            x = x + size * score + (2 * size).sqrt() * normal_like(x, generator)
        return x


class LangevinCorrector(Corrector):
    """ε = 2 (snr·√D/‖s‖)² (Song et al., 2021, Algorithms 4 and 5).

    Both norms are those of one sample, √D that of a typical z. The source averages them over the batch, which would
    make a sample depend on its neighbours. The price is a bias: a step size that varies as ‖s‖⁻² has the stationary
    density p‖s‖², whose variance is (D + 2)/D times that of a Gaussian p. That is 0.07 % for CIFAR-10, 3 % for 8×8
    digits, and no sampler at all in a few dimensions; ``ald`` has no such bias.

    Raises:
        ValueError: (in ``step``) samples of fewer than 16 dimensions.
    """

    def step_size(self, score: Tensor, t: Tensor) -> Tensor:
        if score[0].numel() < 16:
            raise ValueError(
                f"sampling.corrector='langevin' on samples of {score[0].numel()} dimensions: its step size needs at "
                "least 16; use 'ald'"
            )
        norm = score.flatten(1).norm(dim=1).clamp(min=1e-30)
        return 2 * (self.snr * math.sqrt(score[0].numel()) / norm) ** 2


class AnnealedLangevinCorrector(Corrector):
    """ε = 2 (snr·σ_t)²: the step sizes of annealed Langevin dynamics."""

    def step_size(self, score: Tensor, t: Tensor) -> Tensor:
        return 2 * (self.snr * self.sde.std(t)) ** 2


PREDICTORS: dict[str, type[Predictor] | None] = {
    "euler_maruyama": EulerMaruyamaPredictor,
    "reverse_diffusion": ReverseDiffusionPredictor,
    "ancestral_sampling": AncestralPredictor,
    "exponential_integrator": ExponentialIntegratorPredictor,
    "probability_flow": ProbabilityFlowPredictor,
    "none": None,
}
CORRECTORS: dict[str, type[Corrector] | None] = {
    "langevin": LangevinCorrector,
    "ald": AnnealedLangevinCorrector,
    "none": None,
}
FEW_STEP_SOLVERS: dict[str, type[Predictor]] = {
    "heun": EDMHeun,
    "dpmpp_2m": DPMSolverPlusPlus2M,
    "dpmpp_2m_sde": SDEDPMSolverPlusPlus2M,
}


# ---------------------------------------------------------------------------------------------------------------
# Samplers


Plan = tuple[Tensor, Corrector | None, Predictor | None]
"""A grid of times, falling, in the precision that corrector and predictor are given them in; the corrector, which acts
at its first ``num_steps`` times; the predictor, which moves from each of its times to the next."""


class Sampler(abc.ABC):
    """From the prior along a grid of times to samples; what a method adds is its ``plan``, and ``str`` describes it."""

    sde: SDE
    num_steps: int
    noise_removal: bool

    @abc.abstractmethod
    def plan(self, score: CountedScore, like: Tensor, projected: bool) -> Plan:
        """For samples like ``like`` (B, ...); ``projected``: whether a projection is to follow every step."""

    @property
    @abc.abstractmethod
    def slug(self) -> str:
        """A short name for files and folders."""

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
        """Samples in the shape (B, ...), dtype and device of ``like``.

        The generator draws the prior and all noise; with per-sample generators a sample depends on its own only. A
        projection follows the prior and every step of predictor and corrector.

        Raises:
            FloatingPointError: samples, or the velocity of an ODE on the way, are not finite.
        """

        def project(x: Tensor, t: Tensor) -> Tensor:
            return x if projection is None else projection.step(x, t.to(x.dtype), generator)

        with tqdm(disable=not progress, leave=False, unit="evaluation") as bar:
            counted = CountedScore(score, bar)
            grid, corrector, predictor = self.plan(counted, like, projected=projection is not None)
            times = to_device(grid, like.device)[:, None].expand(-1, len(like))  # one row per time, on the device once
            x = project(self.sde.prior_sample(like, generator), times[0])
            for k, t in enumerate(times):
                if corrector is not None and k < self.num_steps:
                    x = project(corrector.step(x, t, generator), t)
                if predictor is not None and k + 1 < len(times):
                    s = times[k + 1]
                    x = project(predictor.step(x, t, s, generator)[0], s)
                bar.total = bar.total or bar.n * (len(times) - 1)  # as many again for every further step
            if self.noise_removal:
                x = denoise(self.sde, counted, x, times[-1].to(x.dtype))
        if projection is not None:
            x = projection.finish(x)
        _check_finite(x, str(self))
        return Samples(x, counted.evaluations / len(like))


@dataclass(frozen=True)
class PCSampler(Sampler):
    """Predictor–corrector sampling in ``num_steps`` steps.

    The grid is ``num_steps`` equal intervals of time; the corrector acts at the start of each. A corrector without a
    predictor acts at ``num_steps`` times from 1 to eps, both included. So does the sampler of a discrete-time model,
    whose times are those of its ``num_scales`` levels, all or evenly chosen ones; its last predictor step is the
    removal of the noise. These are annealed Langevin dynamics, SMLD and DDPM as they are defined.

    Raises:
        ValueError: unknown predictor or corrector, none of either, or more steps than levels.
    """

    sde: SDE
    predictor: str = "reverse_diffusion"
    corrector: str = "langevin"
    num_steps: int = 1000
    snr: float = 0.16
    n_steps_each: int = 1
    noise_removal: bool = True
    num_scales: int | None = None

    def __post_init__(self) -> None:
        self._classes()  # raises for an unknown name
        if self.predictor == self.corrector == "none":
            raise ValueError("sampling.predictor='none', sampling.corrector='none': at least one must be given")
        if self.num_scales is not None and self.num_steps > self.num_scales:
            raise ValueError(
                f"sampling.num_steps={self.num_steps}: at most model.num_scales={self.num_scales}, the noise levels of "
                "this discrete-time model"
            )

    def _classes(self) -> tuple[type[Predictor] | None, type[Corrector] | None]:
        predictor = resolve(self.predictor, PREDICTORS, "sampling.predictor", Predictor)
        return predictor, resolve(self.corrector, CORRECTORS, "sampling.corrector", Corrector)

    def plan(self, score: CountedScore, like: Tensor, projected: bool) -> Plan:
        if self.num_scales is not None:
            levels = torch.linspace(self.num_scales - 1, 0, self.num_steps, dtype=torch.float64)
            grid = self.sde.ladder(self.num_scales).time[levels.round().long()]
        else:
            stops = self.num_steps if self.predictor == "none" else self.num_steps + 1
            grid = torch.linspace(self.sde.end_time, self.sde.sampling_eps, stops, dtype=torch.float64)
        predictor, corrector = self._classes()
        corrector = corrector and corrector(self.sde, score, self.snr, self.n_steps_each)
        return grid.to(like.dtype), corrector, predictor and predictor(self.sde, score)

    @property
    def slug(self) -> str:
        return f"pc-{self.predictor}-{self.corrector}-{self.num_steps}".replace(":", ".")

    def __str__(self) -> str:
        corrector = self.corrector
        if corrector != "none":
            repeats = f", {self.n_steps_each} per step" if self.n_steps_each > 1 else ""
            corrector += f" (snr {self.snr:g}{repeats})"
        end = "" if self.noise_removal else ", not denoised"
        return f"PC, {self.predictor} + {corrector}, {self.num_steps} steps{end}"


@dataclass(frozen=True)
class ODESampler(Sampler):
    """Sampling by the probability flow, from t = 1 to eps; with a projection after every step of ``heun``.

    Raises:
        ValueError: unknown solver, or no steps; in a call, a projection and another solver.
    """

    sde: SDE
    solver: str = "rk45"
    rtol: float = 1e-5
    atol: float = 1e-5
    num_steps: int = 50
    noise_removal: bool = False

    def __post_init__(self) -> None:
        check_solver(self.solver, self.num_steps, "sampling.")

    def plan(self, score: CountedScore, like: Tensor, projected: bool) -> Plan:
        if projected and self.solver != "heun":
            raise ValueError(f"sampling.solver={self.solver!r}: a projection follows every step, so needs 'heun'")
        intervals = self.num_steps if projected else 1
        grid = torch.linspace(self.sde.end_time, self.sde.sampling_eps, intervals + 1, dtype=torch.float64)
        settings = dict(solver=self.solver, rtol=self.rtol, atol=self.atol, num_steps=self.num_steps // intervals)
        grid = grid.to(state_dtype(like))
        return grid, None, _FlowSolver(self.sde, score, grid, **settings)

    @property
    def slug(self) -> str:
        steps = f"-{self.num_steps}" if self.solver in FIXED else ""
        return f"ode-{self.solver}{steps}".replace(":", ".")

    def __str__(self) -> str:
        if self.solver in FIXED:
            return f"ODE, {self.solver}, {self.num_steps} steps"
        return f"ODE, {self.solver}, rtol {self.rtol:g}, atol {self.atol:g}"


def edm_times(sde: SDE, num_steps: int, exponent: float = 7) -> Tensor:
    """The grid of EDM (num_steps + 1,), float64, from the end time to where sampling stops: ρ^{1/7} in equal steps."""
    ends = torch.tensor([sde.end_time, sde.sampling_eps], dtype=torch.float64)
    first, last = (sde.std(ends) / sde.mean_coefficient(ends)) ** (1 / exponent)
    ratio = (first + torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) * (last - first)) ** exponent
    times = sde.time_at_noise_ratio(ratio)
    times[0], times[-1] = ends  # but for rounding they are
    return times


@dataclass(frozen=True)
class FewStepSampler(Sampler):
    """Sampling in 10 to 40 evaluations: ``num_steps`` steps on the EDM grid. ValueError for an unknown solver."""

    sde: SDE
    solver: str = "dpmpp_2m_sde"
    num_steps: int = 19
    noise_removal: bool = True

    def __post_init__(self) -> None:
        self._predictor()  # raises for an unknown name

    def _predictor(self) -> type[Predictor]:
        return resolve(self.solver, FEW_STEP_SOLVERS, "sampling.method='few_step', sampling.solver", Predictor)

    def plan(self, score: CountedScore, like: Tensor, projected: bool) -> Plan:
        return edm_times(self.sde, self.num_steps).to(like.dtype), None, self._predictor()(self.sde, score)

    @property
    def slug(self) -> str:
        return f"few_step-{self.solver}-{self.num_steps}".replace(":", ".")

    def __str__(self) -> str:
        end = "" if self.noise_removal else ", not denoised"
        return f"few steps, {self.solver} on the EDM grid, {self.num_steps} steps{end}"


METHODS: dict[str, type[Sampler]] = {"pc": PCSampler, "ode": ODESampler, "few_step": FewStepSampler}


def make_sampler(sde: SDE, options: Mapping[str, object], *, num_scales: int, continuous: bool) -> Sampler:
    """The sampler of ``options['method']``, a key of ``METHODS`` or the import path of another Sampler, a dataclass.

    Args:
        sde: the forward process.
        options: the fields of the sampler by name, such as ``config.sampling``; ``num_steps`` 0 means ``num_scales``.
        num_scales: the noise levels of a discrete-time model.
        continuous: whether the model is of continuous time instead.

    Raises:
        ValueError: unknown method, predictor, corrector or solver, or fields that do not go together.
    """
    method = resolve(options["method"], METHODS, "sampling.method", Sampler)
    steps = options["num_steps"] or num_scales
    given = {**options, "num_steps": steps, "num_scales": None if continuous else num_scales}
    return method(sde, **{field.name: given[field.name] for field in fields(method) if field.name in given})


# ---------------------------------------------------------------------------------------------------------------
# Langevin dynamics at one fixed time


class LangevinTrajectory(NamedTuple):
    """The N + 1 states (N+1, B, ...), the start first, and whether each of the N moves was made (N, B): without
    Metropolis adjustment, all."""

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
    log_density: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: Generator = None,
) -> LangevinTrajectory:
    """N steps of x ← x + α_i s(x, t) + √(2α_i) z, with t fixed.

    * Unadjusted (Song and Ermon, 2019, Algorithm 1, one noise level): as α → 0 its stationary law is that of the score.
      For N(0, σ²) and finite α it has the variance 2α/(1 − (1 − α/σ²)²) = σ²/(1 − α/(2σ²)).
    * Without ``noise``: x ← x + α_i s(x, t), gradient ascent where s is a gradient.
    * Metropolis-adjusted (Roberts and Tweedie, 1996), if ``log_density`` is given: the step above proposes x', and a
      sample moves there with probability min(1, p(x') q(x|x') / p(x) q(x'|x)), q(y|x) = N(y; x + α s(x, t), 2α I).
      Then ``log_density`` is stationary at every α and for every s: a wrong score costs acceptance, not correctness.
      A move to where p or q is not finite is not made.

    Args:
        score: s(x, t); N evaluations per sample, N + 1 if adjusted.
        x, t: start (B, ...) and times (B,).
        step_sizes: α_0, …, α_{N−1}, in units of x².
        noise: whether z is drawn or zero.
        log_density: log p(x, t) (B,), the target of the Metropolis adjustment, need not be normalised.
        generator: draws z and then, if adjusted, one uniform number per sample.

    Raises:
        ValueError: ``log_density`` is not finite at the start, or is given for moves without noise.
        FloatingPointError: unadjusted samples are not finite in the end.
    """
    if log_density is not None and not noise:
        raise ValueError("log_density given with noise=False: a move without noise cannot be Metropolis-adjusted")
    states = [x]
    accepted = torch.ones(len(step_sizes), len(x), dtype=torch.bool, device=x.device)
    if log_density is None:
        for size in step_sizes:
            x = x + size * score(x, t)
            if noise:
                x = x + math.sqrt(2 * size) * normal_like(x, generator)
            states.append(x)
        _check_finite(x, "Langevin dynamics")
        return LangevinTrajectory(torch.stack(states), accepted)

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
        states.append(x)
    return LangevinTrajectory(torch.stack(states), accepted)
