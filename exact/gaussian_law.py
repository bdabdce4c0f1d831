"""What a sampler makes of Gaussian data, exactly: the law of its samples and its 2-Wasserstein distance to the data.

For data N(m, Σ) the score is affine, ∇ log p_t(x) = −(α²Σ + σ²)⁻¹ (x − αm), and so is every step of a sampler without
corrector. In each eigendirection of Σ a step is

    x ← A_k x + c_k + √q_k z,        mean ← A_k mean + c_k,        variance ← A_k² variance + q_k

and the samples are exactly Gaussian. A_k, c_k and q_k are not written down a second time here: they are read off the
predictors of ``sampling`` (the ODE solver of ``ode``), which are asked for all K steps at once. As the eigendirections
are those of the data,

    W₂² = Σ_i (mean_i − m_i)² + (√variance_i − √λ_i)².

``limit_law`` is what the same sampler tends to as K → ∞. It is not the data: sampling starts from the prior instead of
from p_1, and stops at ``sde.sampling_eps``.

Source: Gao, Nguyen, Zhu, "Wasserstein Convergence Guarantees for a General Class of Score-Based Generative Models"
(JMLR 2025), for the question and for Gaussian data as the case in which it has an exact answer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiment.randomness import Generator, normal_like, seed_from
from experiment.registry import resolve
from ode import integrate
from sampling import PREDICTORS, Predictor, denoise
from sde_lib import SDE, ScoreFunction, expand

_CHUNK_STEPS = 512
"""Steps composed at once, so that a temporary of some hundred directions fits into a core's cache."""


class Law(NamedTuple):
    """Independent Gaussians, one for each direction: means and variances (D,), float64."""

    mean: Tensor
    variance: Tensor


class HeunStep(Predictor):
    """One step of ``ode.integrate(..., solver="heun")`` along the probability flow; every row has times of its own.

    The solver has one clock for all rows, so it is given the time τ ∈ [0, 1] within the step.
    """

    def step(self, x: Tensor, t: Tensor, s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        flow = self.sde.reverse(self.score, probability_flow=True)

        def velocity(y: Tensor, tau: Tensor, rows: Tensor) -> Tensor:
            return flow.drift(y, torch.lerp(t, s, tau)) * expand(s - t, y)

        mean = integrate(velocity, x, 0.0, 1.0, solver="heun", num_steps=1)
        return mean, mean


STEPS: dict[str, Callable[[SDE, ScoreFunction], Predictor]] = {
    **{name: PREDICTORS[name] for name in PREDICTORS if name != "none"},
    "heun": HeunStep,
}
"""The samplers by name: ``PCSampler`` with each predictor and no corrector, and ``ODESampler`` with ``heun``."""
DETERMINISTIC = ("probability_flow", "heun")
"""Those of the probability-flow ODE."""


def diagonalise(mean: Tensor, covariance: Tensor) -> tuple[Law, Tensor]:
    """N(m, Σ), m (D,) and Σ (D, D), as a Law in the eigendirections of Σ; and these in columns (D, D).

    Raises:
        ValueError: Σ is not symmetric and positive definite.
    """
    mean, covariance = mean.double(), covariance.double()
    if bool(((covariance - covariance.T).abs() <= 1e-12 * covariance.abs().max()).all()):  # false for NaN
        spectrum, basis = torch.linalg.eigh(covariance)
        if spectrum.min() > 0:
            return Law(mean @ basis, spectrum), basis
    raise ValueError(f"covariance={covariance.tolist()}: must be symmetric and positive definite")


def score_of(sde: SDE, data: Law, error: float | Tensor = 0.0) -> ScoreFunction:
    """The score of the noised data plus a constant ``error`` (D,): x (B, D), t (B,) → (B, D)."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.mean_coefficient(t)[:, None], sde.std(t)[:, None]
        return (alpha * data.mean - x) / (alpha**2 * data.variance + sigma**2) + error

    return score


def wasserstein(a: Law, b: Law) -> float:
    """The 2-Wasserstein distance of two laws of the same directions."""
    return float(((a.mean - b.mean) ** 2 + (a.variance.sqrt() - b.variance.sqrt()) ** 2).sum().sqrt())


def sampler_law(sde: SDE, data: Law, sampler: str, num_steps: int, *, error: float | Tensor = 0.0) -> Law:
    """The law of the samples that ``num_steps`` steps and Tweedie's formula at the end make of the prior.

    Args:
        sde: the forward process.
        data: N(m, Σ) in the eigendirections of Σ.
        sampler: a key of ``STEPS``.
        num_steps: K ≥ 1.
        error: added to the score, (D,) or a number for all directions.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: at least 1")
    score = score_of(sde, data, error)
    predictor = resolve(sampler, STEPS, "sampler")(sde, score)
    times = torch.linspace(sde.end_time, sde.sampling_eps, num_steps + 1, dtype=torch.float64)
    law = _prior(sde, data)
    for t, s in zip(times[:-1].split(_CHUNK_STEPS), times[1:].split(_CHUNK_STEPS), strict=True):
        law = _compose(law, *_affine(predictor, t, s, len(data.mean)))
    return _denoised(sde, score, law)


def limit_law(sde: SDE, data: Law, *, probability_flow: bool) -> Law:
    """The law after exact integration from the prior to ``sampling_eps`` with the exact score, and Tweedie's formula.

    Between t = 1 and ε, x_ε − α_ε m has the coefficient c on x_1 − α_1 m. In an eigendirection of variance
    V(t) = α²λ + σ² it is c = (α_1/α_ε) V(ε)/V(1) for the reverse SDE, which adds the variance V(ε) − c² V(1), and
    c = √(V(ε)/V(1)) for the probability flow, which adds none.
    """
    times = torch.tensor([sde.end_time, sde.sampling_eps], dtype=torch.float64)
    alpha, sigma = sde.mean_coefficient(times)[:, None], sde.std(times)[:, None]
    mean, variance = alpha * data.mean, alpha**2 * data.variance + sigma**2
    ratio = variance[1] / variance[0]
    c = ratio.sqrt() if probability_flow else alpha[0] / alpha[1] * ratio
    prior = _prior(sde, data)
    law = Law(mean[1] + c * (prior.mean - mean[0]), variance[1] + c**2 * (prior.variance - variance[0]))
    return _denoised(sde, score_of(sde, data), law)


def _prior(sde: SDE, data: Law) -> Law:
    return Law(torch.zeros_like(data.mean), torch.full_like(data.mean, sde.prior_std**2))


def _affine(predictor: Predictor, t: Tensor, s: Tensor, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, c (K, D) and q (K, 1) of the steps from the times t to the times s, both (K,)."""
    zero = torch.zeros(len(t), dimension, dtype=torch.float64)
    seed = seed_from("gaussian_law")
    noisy, c = predictor.step(zero, t, s, torch.Generator().manual_seed(seed))
    _, moved = predictor.step(zero + 1, t, s, torch.Generator().manual_seed(seed))
    # The noise is the same number √q for all directions; every direction has drawn its z.
    z = normal_like(zero, torch.Generator().manual_seed(seed))
    scale = ((noisy - c) * z).sum(1, keepdim=True) / (z**2).sum(1, keepdim=True)
    return moved - c, c, scale**2


def _compose(law: Law, a: Tensor, c: Tensor, q: Tensor) -> Law:
    """The law after the steps x ← A_k x + c_k + √q_k z, k = 0 … K − 1; A, c (K, D), q (K, 1)."""
    # What remains of step k at the end: A_{K−1} ⋯ A_{k+1}.
    remains = torch.cat([torch.ones_like(a[:1]), a.flip(0)[:-1].cumprod(0)]).flip(0)
    whole = remains[0] * a[0]
    return Law(whole * law.mean + (remains * c).sum(0), whole**2 * law.variance + (remains**2 * q).sum(0))


def _denoised(sde: SDE, score: ScoreFunction, law: Law) -> Law:
    t = torch.full((2,), sde.sampling_eps, dtype=torch.float64)
    zero, one = denoise(sde, score, torch.stack([torch.zeros_like(law.mean), torch.ones_like(law.mean)]), t)
    return Law((one - zero) * law.mean + zero, (one - zero) ** 2 * law.variance)
