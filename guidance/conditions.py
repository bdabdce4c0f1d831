"""Conditional sampling: a score and a projection with which any sampler (``sampling``) draws from p(x_0 | condition).

The reverse SDE of p(x_0 | y) has the score ∇ log p_t(x) + ∇ log p_t(y | x). The second term is approximated by

* *DPS*: p_t(y | x) ≈ p(y | x̂_0), with x̂_0 = E[x_0 | x_t] from Tweedie's formula, and a step size ζ;
* *ΠGDM*: p_t(y | x) ≈ N(y; A x̂_0, r_t² AAᵀ + σ_y² I), r_t² a guess at the variance of x_0 given x_t;
* *classifier guidance*: log p_t(y | x) is another network, trained on noised images;
* *classifier-free guidance*: one network has learned both scores, s(x, t, y) and s(x, t).

The last two take a weight γ, s(x, t) + γ ∇ log p_t(y | x): 1 is the conditional distribution, more than 1 favours what
the classifier is sure of. (Ho and Salimans's w is γ − 1.)

*A projection* does without the second term. After every step it replaces the measured part of the state by the
measurement, noised to the same time; the rest of the state follows through the network only. As that noise is drawn
anew at every step, the result is not p(x_0 | y), but it is consistent with y.

Sources: Song et al. (ICLR 2021), Appendix I, and Song, Shen, Xing, Ermon (ICLR 2022), for projections; Kawar, Elad,
Ermon, Song (DDRM, NeurIPS 2022), for measurements with noise in them; Chung, Kim, Mccann, Klasky, Ye (DPS, ICLR 2023);
Song, Vahdat, Mardani, Kautz (ΠGDM, ICLR 2023); Dhariwal and Nichol (NeurIPS 2021); Ho and Salimans (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from conservativeness import vjp
from experiment.randomness import Generator, normal_like
from guidance.measurements import LinearOperator
from sampling import ConditionalScore, Projection
from sde_lib import SDE, ScoreFunction, expand


@dataclass
class MeasurementProjection:
    """Measured coordinates of the state are replaced by those of the measurement, noised to the same time.

    The coordinates c = Vᵀx_t should be N(α (Vᵀx_0)_i, σ²). Given is ȳ_i = (Uᵀy)_i/s_i, which is (Vᵀx_0)_i up to noise
    of standard deviation ν_i = σ_y/s_i, so that

        c_i ← α ȳ_i + √(σ² − α²ν_i²) z_i    where α ν_i ≤ σ,

    with a new z at every step, has exactly that distribution. Where αν_i > σ the measurement is noisier than the state,
    which is not changed. Without noise x_0 satisfies A x_0 = y in the end.
    """

    sde: SDE
    operator: LinearOperator
    y: Tensor
    noise_std: float = 0.0
    """σ_y."""

    def __post_init__(self) -> None:
        values = self.operator.singular_values.to(self.y)
        self.measured = self.operator.spectrum(self.y) / values
        self.measured_std = self.noise_std / values

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t)[:, None].to(x), self.sde.std(t)[:, None].to(x)
        z = self.operator.coordinates(normal_like(x, generator))
        added = std**2 - (alpha * self.measured_std) ** 2
        target = alpha * self.measured + added.clamp(min=0).sqrt() * z
        return self._replace(x, target, added >= 0)

    def finish(self, x: Tensor) -> Tensor:
        return self._replace(x, self.measured, self.measured_std == 0)

    def _replace(self, x: Tensor, target: Tensor, where: Tensor) -> Tensor:
        return x + self.operator.lift(torch.where(where, target - self.operator.coordinates(x), 0.0))


@dataclass
class _MeasurementScore(ConditionalScore):
    """A score that needs the denoised state, x̂_0 = (x + σ² s)/α, and y − A x̂_0."""

    sde: SDE
    score: ScoreFunction
    """The unconditional one."""
    operator: LinearOperator
    y: Tensor
    """Measurements (B, m)."""

    def __post_init__(self) -> None:
        self.spectrum = self.operator.spectrum(self.y)

    def _denoised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """s and x̂_0, both (b, ...) and differentiable."""
        s = self.score(x, t)
        return s, (x + expand(self.sde.std(t), x) ** 2 * s) / expand(self.sde.mean_coefficient(t), x)

    def _residual(self, x0: Tensor, rows: Tensor | None) -> Tensor:
        """Uᵀ(y − A x_0) (b, r). The part of y outside the range of A says nothing about x_0."""
        y = self.spectrum if rows is None else self.spectrum[rows]
        return y - self.operator.spectrum(self.operator(x0))


@dataclass
class PseudoinverseGuidance(_MeasurementScore):
    """ΠGDM: s + γ (∂x̂_0/∂x)ᵀ Aᵀ (r_t² AAᵀ + σ_y² I)⁻¹ (y − A x̂_0) (Song et al., 2023).

    r_t² = v σ²/(v α² + σ²) is the variance of x_0 given x_t for data of variance v in all directions, for which the
    score is exact; the source has v = 1. One backward pass per evaluation.

    For such data ∂x̂_0/∂x is αv/(α²v + σ²), far below 1 at much noise, and Aᵀ(…)⁻¹ is of the order of 1/v. A network's
    x̂_0 is off by about 1 %, its derivative by far more than that small number, and samples would go to infinity. The
    guidance is therefore at most ``TRUST`` times as long as that derivative would make it. (The source multiplies by
    r_t² instead, which removes nearly all guidance at much noise.) For Gaussian data nothing is cut off.
    """

    noise_std: float = 0.0
    """σ_y."""
    prior_variance: float = 1.0
    """v. With 0, for which there must be noise, the likelihood of DPS before its step size (Chung et al., 2023)."""
    weight: float = 1.0
    """γ."""
    TRUST: ClassVar[float] = 5.0

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t)[:, None].to(x), self.sde.std(t)[:, None].to(x)
        variance = self.prior_variance * std**2 / (self.prior_variance * alpha**2 + std**2)
        values = self.operator.singular_values.to(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s, x0 = self._denoised(x, t)
            # Aᵀ (r² AAᵀ + σ_y²)⁻¹ = V S (r² S² + σ_y²)⁻¹ Uᵀ
            pull = values / (variance * values**2 + self.noise_std**2) * self._residual(x0, rows)
            guidance = vjp(x0, x, self.operator.lift(pull).detach())
        if self.prior_variance:
            # αv/(α²v + σ²) = αr²/σ²
            longest = self.TRUST * (alpha * variance / std**2)[:, 0] * pull.detach().norm(dim=1)
            norm = guidance.flatten(1).norm(dim=1).clamp(min=1e-30)
            guidance = guidance * expand((longest / norm).clamp(max=1), guidance)
        return s.detach() + self.weight * guidance


@dataclass
class DiffusionPosteriorSampling(_MeasurementScore):
    """DPS: every step of a predictor is followed by x ← x − ζ/‖y − A x̂_0‖ ∇ₓ‖y − A x̂_0(x)‖² (Chung et al., 2023,
    Algorithm 1), the gradient being taken at the state before the step.

    It is given to a sampler both as the score, which is the unconditional one, and as the projection, which makes that
    move. The move does not shrink with the steps, so ζ must be tuned together with their number. One backward pass per
    evaluation.
    """

    step_size: float
    """ζ."""
    move: Tensor | float = field(default=0.0, init=False, compare=False)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s, x0 = self._denoised(x, t)
            residual = self._residual(x0, rows)
            norm = residual.norm(dim=1, keepdim=True)
            # ∇‖y − A x̂_0‖²/‖y − A x̂_0‖ = −2 (∂x̂_0/∂x)ᵀ Aᵀ (y − A x̂_0)/‖y − A x̂_0‖
            direction = self.operator.adjoint(self.operator.spectrum_adjoint(residual / norm.clamp(min=1e-12)))
            self.move = 2 * self.step_size * vjp(x0, x, direction.detach())
        return s.detach()

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        moved, self.move = x + self.move, 0.0
        return moved

    def finish(self, x: Tensor) -> Tensor:
        return x


@dataclass
class ClassifierGuidance(ConditionalScore):
    """s(x, t) + γ ∇ₓ log p(c | x, t) (Dhariwal and Nichol, 2021; Song et al., 2021, Eq. 14)."""

    score: ScoreFunction
    """The unconditional one."""
    log_probs: Callable[[Tensor, Tensor], Tensor]
    """log p(· | x, t): x (b, ...), t (b,) → (b, K)."""
    labels: Tensor
    """The class c wanted of every sample, int64 (B,)."""
    weight: float = 1.0
    """γ."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        labels = self.labels if rows is None else self.labels[rows]
        with torch.enable_grad():
            position = x.detach().requires_grad_()
            wanted = self.log_probs(position, t).gather(1, labels[:, None])
            (gradient,) = torch.autograd.grad(wanted.sum(), position)
        return self.score(x, t) + self.weight * gradient.to(x.dtype)


@dataclass
class GivenScore(ConditionalScore):
    """s(x, t, c, y) of a network that is told the class c of each sample, an array y, or both."""

    score: Callable[..., Tensor]
    """s(x, t, c[, y])."""
    labels: Tensor | None = None
    """c (B,)."""
    condition: Tensor | None = None
    """y (B, ...)."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        told = (self.labels,) if self.condition is None else (self.labels, self.condition)
        return self.score(x, t, *(given if given is None or rows is None else given[rows] for given in told))


@dataclass
class ClassifierFreeGuidance(ConditionalScore):
    """s(x, t) + γ (s(x, t, c) − s(x, t)) of one network (Ho and Salimans, 2022, Eq. 6 with w = γ − 1).

    With γ = 0 or 1 only one of the two scores is evaluated.
    """

    score: Callable[..., Tensor]
    """s(x, t, labels)."""
    labels: Tensor
    """The class c wanted of every sample, int64 (B,)."""
    null_label: int
    """The label that means no class."""
    weight: float = 1.0
    """γ."""
    condition: Tensor | None = None
    """An array y (B, ...) that all these scores are told besides."""

    def __post_init__(self) -> None:
        self.evaluations = 1 if self.weight in (0, 1) else 2

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        null = torch.full_like(self.labels, self.null_label)
        with_class, without = (GivenScore(self.score, labels, self.condition) for labels in (self.labels, null))
        if self.weight in (0, 1):
            return (with_class if self.weight else without)(x, t, rows)
        unguided = without(x, t, rows)
        return unguided + self.weight * (with_class(x, t, rows) - unguided)


# ---------------------------------------------------------------------------------------------------------------
# From the options of sampling, such as ``config.sampling``

CONDITION_FIELDS = (
    *("condition", "conditioning", "guidance_weight", "class_label", "mask", "factor", "num_views", "operator"),
    *("measurement_noise", "num_images", "samples_per_image"),
)
"""Options that unconditional sampling does not read."""


def condition_on_measurement(
    options: Mapping[str, object],
    sde: SDE,
    score: ScoreFunction,
    operator: LinearOperator,
    y: Tensor,
    *,
    prior_variance: float,
) -> tuple[ScoreFunction, Projection | None]:
    """The score and the projection that ``options['conditioning']`` makes of the unconditional score and measurements
    y (B, m) by the operator; ΠGDM needs the ``prior_variance`` of the data."""
    noise, weight = options["measurement_noise"], options["guidance_weight"]
    match options["conditioning"]:
        case "projection":
            return score, MeasurementProjection(sde, operator, y, noise)
        case "dps":
            dps = DiffusionPosteriorSampling(sde, score, operator, y, weight)
            return dps, dps
        case "pigdm":
            return PseudoinverseGuidance(sde, score, operator, y, noise, prior_variance, weight), None
        case other:
            raise ValueError(f"sampling.conditioning={other!r}: allowed are projection, dps, pigdm")
