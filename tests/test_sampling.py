"""Samplers on Gaussians, whose law after sampling is known exactly or can be propagated exactly.

With a Gaussian's score every step but the ``langevin`` corrector's is affine in the state and in its noise, so the
samples are exactly Gaussian. ``exact_law`` finds their mean and covariance, free of Monte Carlo error.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import SDES, Gaussian, affine_law, assert_moments_match, gaussian_2d, gaussian_16d
from torch import Tensor

import sampling
from experiment.randomness import SampleGenerators, normal_like
from models.score import NoiseLevel
from sampling import (
    PREDICTORS,
    AncestralPredictor,
    AnnealedLangevinCorrector,
    EulerMaruyamaPredictor,
    FewStepSampler,
    LangevinCorrector,
    ODESampler,
    PCSampler,
    ReverseDiffusionPredictor,
    denoise,
    make_sampler,
)

every_family = pytest.mark.parametrize("family", SDES)
AFFINE = [(p, c) for p in PREDICTORS for c in ("none", "ald") if (p, c) != ("none", "none")]


class Calls:
    """A score that counts its calls and the samples it is called with."""

    def __init__(self, score) -> None:
        self.score, self.calls, self.samples = score, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        return self.score(x, t)


@pytest.fixture
def exact_law(monkeypatch):
    """(sampler, gaussian) → mean (D,) and covariance (D, D) of the samples, for an affine sampler."""

    def law(sampler: PCSampler, gaussian: Gaussian) -> tuple[Tensor, Tensor]:
        return affine_law(lambda like: sampler(gaussian.score, like).x, gaussian.dimension, monkeypatch)

    return law


# ---------------------------------------------------------------------------------------- the law of the PC samplers


@every_family
@pytest.mark.parametrize(("predictor", "corrector"), AFFINE)
def test_pc_sampler_reproduces_a_gaussian(family, predictor, corrector, exact_law):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)

    # 3000 samples of 20 steps have exactly the moments that such steps give.
    coarse = PCSampler(sde, predictor, corrector, num_steps=20, snr=0.3, n_steps_each=2, noise_removal=False)
    samples = coarse(gaussian.score, torch.zeros(3000, 2, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert_moments_match(samples.x, *exact_law(coarse, gaussian))

    # With many steps these are the moments of the noised data. Allowances: the first-order error of 100 steps, or of
    # 300 of the probability flow, where no noise corrects earlier errors; the prior, off by 1e-3; for Langevin steps
    # alone, what sizes of (0.5 σ)² still miss where σ is far below the data's own width, as it is sooner for sub-VP.
    if predictor == "none":
        fine = PCSampler(sde, predictor, corrector, num_steps=50, snr=0.5, n_steps_each=20, noise_removal=False)
        allowance = 0.14 if family == "subvp" else 0.03
    else:
        steps = 300 if predictor == "probability_flow" else 100
        fine = PCSampler(sde, predictor, corrector, num_steps=steps, snr=0.1, noise_removal=False)
        allowance = 0.09
    target = gaussian.moments(sde.sampling_eps)
    mean, covariance = exact_law(fine, gaussian)
    assert (mean - target[0]).abs().max() < allowance
    assert (covariance - target[1]).abs().max() < allowance


@every_family
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_langevin_corrector_reproduces_a_gaussian(family, predictor):
    sde = SDES[family]
    gaussian = gaussian_16d(sde)
    if predictor == "none":
        sampler = PCSampler(sde, "none", "langevin", num_steps=60, snr=0.2, n_steps_each=10, noise_removal=False)
    else:
        sampler = PCSampler(sde, predictor, "langevin", num_steps=100, snr=0.16, noise_removal=False)
    x = sampler(gaussian.score, torch.zeros(1000, 16, dtype=torch.float64), torch.Generator().manual_seed(0)).x
    mean, covariance = gaussian.moments(sde.sampling_eps)
    # Allowance: 2/D for a step size that depends on the state (see below), and a few per cent for steps of finite
    # size: first order in the 100 predictor steps, (snr)² in the Langevin steps.
    allowance = 2 / 16 + 0.08
    assert_moments_match(x, mean, covariance, allowance)
    # The total variance in units of the exact one: 16 000 numbers, standard error √2/√16 000 = 1.1 %.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).T, upper=False)
    total, standard_error = (white**2).mean(), (2 / white.numel()) ** 0.5
    assert 1 - 4 * standard_error < total < 1 + allowance + 4 * standard_error


def test_langevin_corrector_at_a_fixed_time():
    # A step size ε(x) proportional to ‖s‖⁻² makes p/ε ∝ p‖s‖² the stationary density in the limit of small steps.
    # For N(0, I) that has E‖x‖² = D + 2; steps of ε = 2 snr² widen this by 1/(1 − ε/2).
    dimension, snr = 16, 0.15
    corrector = LangevinCorrector(SDES["vp"], lambda x, t: -x, snr, num_steps=150)
    x = torch.randn(3000, dimension, dtype=torch.float64)
    x = corrector.step(x, torch.ones(3000), torch.Generator().manual_seed(0))
    expected = (1 + 2 / dimension) / (1 - snr**2)
    assert abs((x**2).mean() / expected - 1) < 4 * (2 / x.numel()) ** 0.5 + snr**4 + 0.005
    assert x.mean(0).abs().max() < 4 * (expected / len(x)) ** 0.5


@every_family
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"])
def test_predictors_are_of_weak_first_order(family, predictor, exact_law):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    steps = (50, 100, 200)
    errors = []
    for n in steps:
        _, covariance = exact_law(PCSampler(sde, predictor, "none", num_steps=n, noise_removal=False), gaussian)
        errors.append((covariance - gaussian.moments(sde.sampling_eps)[1]).abs().max().item())
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    if (family, predictor) == ("ve", "euler_maruyama"):
        assert slope < -1  # the leading terms happen to cancel for a Gaussian without drift
    else:
        assert slope == pytest.approx(-1, abs=0.12)


# ------------------------------------------------------------------------------------------------------- single steps


@every_family
def test_ancestral_step_is_exact_for_a_point_mass(family):
    # All data at m: from x_t ~ N(α_t m, σ_t² I) a step of any size must reach N(α_s m, σ_s² I).
    sde = SDES[family]
    m = torch.tensor([0.7, -0.3], dtype=torch.float64)
    data = Gaussian(sde, m, torch.zeros(2, 2))
    predictor = AncestralPredictor(sde, data.score)
    for t, s in ((1.0, 0.6), (0.9, 0.01), (0.3, 0.29)):
        t, s = (torch.full((2,), time, dtype=torch.float64) for time in (t, s))
        centre, std = sde.marginal(m.expand(2, 2), t)
        x = centre + std[:, None] * torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        new, mean = predictor.step(x, t, s, torch.Generator().manual_seed(0))
        noise = (new - mean) / normal_like(x, torch.Generator().manual_seed(0))
        expected_centre, expected_std = sde.marginal(m.expand(2, 2), s)
        torch.testing.assert_close(mean[0], expected_centre[0], rtol=1e-10, atol=1e-12)
        variance = (mean[1] - mean[0]) ** 2 + noise[0] ** 2
        torch.testing.assert_close(variance, expected_std**2, rtol=1e-10, atol=0)


def test_steps_against_their_formulas():
    sde = SDES["vp"]
    x = torch.randn(3, 4, dtype=torch.float64)
    t, s = (torch.full((3,), time, dtype=torch.float64) for time in (0.5, 0.4))

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) * t[:, None]

    def step(predictor) -> tuple[Tensor, Tensor]:
        new, mean = predictor.step(x, t, s, torch.Generator().manual_seed(3))
        return mean, (new - mean) / normal_like(x, torch.Generator().manual_seed(3))

    beta, decay = 0.1 + 0.5 * 19.9, np.exp(-0.5 * (0.1 * 0.1 + 19.9 * (0.25 - 0.16) / 2))
    mean, std = step(EulerMaruyamaPredictor(sde, score))
    torch.testing.assert_close(mean, x + 0.1 * (0.5 * beta * x + beta * score(x, t)), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, torch.full_like(x, (0.1 * beta) ** 0.5), rtol=1e-9, atol=0)
    mean, std = step(ReverseDiffusionPredictor(sde, score))
    torch.testing.assert_close(mean, (2 - decay) * x + (1 - decay**2) * score(x, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, torch.full_like(x, (1 - decay**2) ** 0.5), rtol=1e-9, atol=0)


@every_family
def test_corrector_step_sizes(family):
    sde, snr, dimension = SDES[family], 0.2, 18
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t[:, None, None, None]) * torch.sin(3 * x)

    s = score(x, t)
    for corrector, size in (
        (LangevinCorrector(sde, score, snr), 2 * snr**2 * dimension / (s**2).sum((1, 2, 3))),
        (AnnealedLangevinCorrector(sde, score, snr), 2 * snr**2 * sde.std(t) ** 2),
    ):
        size = size[:, None, None, None]
        new = corrector.step(x, t, torch.Generator().manual_seed(3))
        z = normal_like(x, torch.Generator().manual_seed(3))
        torch.testing.assert_close(new, x + size * s + (2 * size).sqrt() * z, rtol=1e-12, atol=1e-14)
        # Two steps are one after the other.
        generator = torch.Generator().manual_seed(3)
        twice = corrector.step(corrector.step(x, t, generator), t, generator)
        corrector.num_steps = 2
        assert torch.equal(corrector.step(x, t, torch.Generator().manual_seed(3)), twice)


def test_langevin_corrector_needs_dimensions():
    corrector = LangevinCorrector(SDES["vp"], lambda x, t: -x, 0.1)
    with pytest.raises(ValueError, match=r"sampling\.corrector='langevin' on samples of 15 .* 16; use 'ald'"):
        corrector.step(torch.zeros(2, 15), torch.ones(2), None)
    corrector.step(torch.ones(2, 16), torch.ones(2), None)


# ---------------------------------------------------------------------------------------------------------- denoising


@every_family
def test_tweedie_gives_the_posterior_mean(family):
    # For a Gaussian, E[x_0 | x_t] = m + α C (α² C + σ²)⁻¹ (x_t − α m).
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    for time in (sde.sampling_eps, 0.3, 0.9):
        t = torch.full((5,), time, dtype=torch.float64)
        x = torch.randn(5, 2, dtype=torch.float64)
        mean, covariance = gaussian.moments(time)
        gain = sde.mean_coefficient(t[0]) * gaussian.covariance @ torch.linalg.inv(covariance)
        torch.testing.assert_close(
            denoise(sde, gaussian.score, x, t), gaussian.mean + (x - mean) @ gain.T, rtol=1e-6, atol=1e-7
        )


@every_family
@pytest.mark.parametrize("sampler_class", ["pc", "corrector_only", "ode"])
def test_noise_removal_is_tweedies_formula_at_the_end(family, sampler_class):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)

    def draw(noise_removal: bool) -> tuple[Tensor, float]:
        if sampler_class == "ode":
            sampler = ODESampler(sde, "heun", num_steps=10, noise_removal=noise_removal)
        else:
            names = ("none", "ald") if sampler_class == "corrector_only" else ("ancestral_sampling", "ald")
            sampler = PCSampler(sde, *names, num_steps=10, noise_removal=noise_removal)
        like = torch.zeros(6, 2, dtype=torch.float64)
        return sampler(gaussian.score, like, SampleGenerators((0, "x"), range(6)))

    (noisy, nfe), (clean, nfe_with) = draw(False), draw(True)
    assert nfe_with == nfe + 1
    expected = denoise(sde, gaussian.score, noisy, torch.full((6,), sde.sampling_eps, dtype=torch.float64))
    torch.testing.assert_close(clean, expected, rtol=1e-12, atol=1e-12)
    assert (clean - noisy).abs().max() > 1e-8


def test_corrector_only_sampling_removes_its_noise(exact_law):
    # VE, 10 times: the last has σ(eps) = σ_min = 0.02. The denoised mean of a narrow Gaussian is narrower still.
    sde = SDES["ve"]
    gaussian = Gaussian(sde, torch.tensor([0.3]), torch.tensor([[0.03**2]]))
    settings = dict(predictor="none", corrector="ald", num_steps=10, snr=0.3, n_steps_each=100)
    _, noisy = exact_law(PCSampler(sde, noise_removal=False, **settings), gaussian)
    _, clean = exact_law(PCSampler(sde, noise_removal=True, **settings), gaussian)
    last = sde.std(torch.tensor(sde.sampling_eps, dtype=torch.float64)).item() ** 2
    # Langevin steps of ε = 2·0.3² σ² widen a variance V by 1/(1 − ε/2V) ≤ 1.1.
    assert noisy.item() == pytest.approx(0.03**2 + last, rel=0.1)
    assert clean.item() == pytest.approx(0.03**4 / (0.03**2 + last), rel=0.1)


# ------------------------------------------------------------------------------------------------ discrete-time models


class Recorded:
    """The score of a Gaussian, and the labels that a discrete-time model of N levels would have seen."""

    def __init__(self, gaussian: Gaussian, levels: int) -> None:
        self.score, self.noise_level = gaussian.score, NoiseLevel(gaussian.sde, levels)
        self.labels: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        label, _ = self.noise_level(t)
        assert (label == label[0]).all()
        self.labels.append(label[0].item())
        return self.score(x, t)


@pytest.mark.parametrize("levels", [50, 300])
def test_ancestral_sampling_of_a_discrete_vp_model_is_ddpm(levels):
    # Ho et al. (2020), Algorithm 2 with the posterior variance, in ε = −√(1 − ᾱ) s: every index once, N − 1 first.
    sde = SDES["vp"]
    gaussian = gaussian_2d(sde)
    score = Recorded(gaussian, levels)
    sampler = PCSampler(sde, "ancestral_sampling", "none", num_steps=levels, num_scales=levels)
    like, generator = torch.zeros(3, 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    x, nfe = sampler(score, like, torch.Generator().manual_seed(0))
    assert score.labels == list(range(levels - 1, -1, -1)) and nfe == levels

    beta = torch.linspace(0.1 / levels, 20 / levels, levels, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    y = normal_like(like, generator)
    for i in reversed(range(levels)):
        covariance = alpha_bar[i] * gaussian.covariance + (1 - alpha_bar[i]) * torch.eye(2).double()
        s = -torch.linalg.solve(covariance, (y - alpha_bar[i].sqrt() * gaussian.mean).T).T
        y = (y + beta[i] * s) / (1 - beta[i]).sqrt()
        if i > 0:
            posterior = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta[i]
            y = y + posterior.sqrt() * normal_like(like, generator)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_annealed_langevin_dynamics_of_a_discrete_ve_model():
    # Song & Ermon (2019), Algorithm 1: K steps of ε = 2 (snr σ_i)² at each of the N levels, the largest σ first.
    sde, levels = SDES["ve"], 10
    gaussian = gaussian_2d(sde)
    score = Recorded(gaussian, levels)
    sampler = PCSampler(sde, "none", "ald", num_steps=levels, snr=0.316, n_steps_each=3, num_scales=levels)
    like, generator = torch.zeros(3, 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    x, nfe = sampler(score, like, torch.Generator().manual_seed(0))
    assert score.labels == [i for i in range(levels) for _ in range(3)] + [levels - 1] and nfe == 3 * levels + 1

    def exact_score(y: Tensor, sigma: float) -> Tensor:
        covariance = gaussian.covariance + sigma**2 * torch.eye(2).double()
        return -torch.linalg.solve(covariance, (y - gaussian.mean).T).T

    sigmas = np.exp(np.linspace(np.log(20.0), np.log(0.02), levels))
    y = 20.0 * normal_like(like, generator)
    for sigma in sigmas:
        for _ in range(3):
            size = 2 * (0.316 * sigma) ** 2
            y = y + size * exact_score(y, sigma) + math.sqrt(2 * size) * normal_like(like, generator)
    y = y + sigmas[-1] ** 2 * exact_score(y, sigmas[-1])
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("predictor", "nfe"), [("reverse_diffusion", 10), ("none", 6)])
def test_fewer_steps_visit_evenly_chosen_levels(predictor, nfe):
    sde = SDES["ve"]
    score = Recorded(gaussian_2d(sde), 9)
    sampler = PCSampler(sde, predictor, "ald", num_steps=5, num_scales=9)
    samples = sampler(score, torch.zeros(2, 2, dtype=torch.float64))
    assert samples.nfe == nfe and sorted(set(score.labels)) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match=r"sampling\.num_steps=10: at most model\.num_scales=9"):
        PCSampler(sde, num_steps=10, num_scales=9)


# ---------------------------------------------------------------------------------------------------------------- ODE


@every_family
@pytest.mark.parametrize("solver", ["rk45", "heun", "adams"])
def test_ode_sampler_is_the_gaussian_map(family, solver):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    sampler = ODESampler(sde, solver, rtol=1e-9, atol=1e-9, num_steps=600)
    like = torch.zeros(3, 2, dtype=torch.float64)
    x = sampler(gaussian.score, like, SampleGenerators((0, "x"), range(3))).x
    prior = sde.prior_sample(like, SampleGenerators((0, "x"), range(3)))
    one = torch.ones(3, dtype=torch.float64)
    expected = gaussian.flow(prior, one, sde.sampling_eps * one)
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3 if solver == "heun" else 1e-7)


@every_family
def test_heun_sampler_is_of_second_order(family):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    like = torch.zeros(5, 2, dtype=torch.float64)
    prior = sde.prior_sample(like, torch.Generator().manual_seed(0))
    one = torch.ones(5, dtype=torch.float64)
    expected = gaussian.flow(prior, one, sde.sampling_eps * one)
    steps, errors = (100, 200, 400), []
    for n in steps:
        samples = ODESampler(sde, "heun", num_steps=n)(gaussian.score, like, torch.Generator().manual_seed(0))
        errors.append((samples.x - expected).abs().max().item())
        assert samples.nfe == 2 * n
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(-2, abs=0.1)


def test_ode_samples_have_the_moments_of_the_data():
    sde = SDES["vp"]
    gaussian = gaussian_2d(sde)
    like = torch.zeros(4000, 2, dtype=torch.float64)
    x = ODESampler(sde, rtol=1e-4, atol=1e-4)(gaussian.score, like, torch.Generator().manual_seed(0)).x
    # Allowance: the tolerance, and a prior without the mean α(1) m of the noised data, |α(1)| = 0.007.
    assert_moments_match(x, *gaussian.moments(sde.sampling_eps), allowance=0.008)


# ----------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(predictor="reverse_diffusion", corrector="none"), 12),
        (dict(predictor="none", corrector="ald"), 12),
        (dict(predictor="ancestral_sampling", corrector="langevin"), 24),
        (dict(predictor="euler_maruyama", corrector="ald", n_steps_each=3), 48),
    ],
)
@pytest.mark.parametrize("noise_removal", [False, True])
def test_nfe_of_pc_samplers_is_the_number_of_calls(settings, expected, noise_removal):
    sde = SDES["vp"]
    score = Calls(gaussian_16d(sde).score)
    sampler = PCSampler(sde, num_steps=12, noise_removal=noise_removal, **settings)
    samples = sampler(score, torch.zeros(3, 16, dtype=torch.float64))
    assert samples.nfe == score.calls == expected + noise_removal


@pytest.mark.parametrize("solver", ["rk45", "heun", "adams"])
def test_nfe_of_ode_samplers_is_the_number_of_calls(solver):
    sde = SDES["ve"]
    score = Calls(gaussian_2d(sde).score)
    samples = ODESampler(sde, solver, num_steps=20)(score, torch.zeros(4, 2, dtype=torch.float64))
    # Per sample: rk45 asks only for those that are still on their way.
    assert samples.nfe == score.samples / 4
    if solver == "rk45":
        assert samples.nfe <= score.calls
    else:
        assert samples.nfe == score.calls
    if solver == "heun":
        assert samples.nfe == 40


def test_progress_bars(capfd):
    sde = SDES["vp"]
    score, like = gaussian_2d(sde).score, torch.zeros(2, 2, dtype=torch.float64)
    for sampler in (PCSampler(sde, "none", "ald", num_steps=3), ODESampler(sde)):
        sampler(score, like, progress=False)
        assert capfd.readouterr().err == ""
        sampler(score, like, progress=True)
        assert "evaluation" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- independence of the batch

SAMPLERS = {
    "pc_langevin": lambda sde: PCSampler(sde, "reverse_diffusion", "langevin", num_steps=15, snr=0.16),
    "pc_ald": lambda sde: PCSampler(sde, "ancestral_sampling", "ald", num_steps=15, n_steps_each=2),
    "euler_maruyama": lambda sde: PCSampler(sde, "euler_maruyama", "none", num_steps=15),
    "rk45": lambda sde: ODESampler(sde, "rk45", rtol=1e-4, atol=1e-4, noise_removal=True),
    "heun": lambda sde: ODESampler(sde, "heun", num_steps=10),
}


@every_family
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(family, name):
    sde = SDES[family]
    sampler = SAMPLERS[name](sde)

    def score(x: Tensor, t: Tensor) -> Tensor:
        # Every dimension depends on all others, through sums that do not depend on the size of the batch (a matrix
        # product would, in its last digits, and so would the steps of the ODE).
        total = x.flatten(1).tanh().sum(1)[:, None, None, None]
        return -(x + 0.1 * total) / (0.5 + sde.std(t)[:, None, None, None] ** 2)

    def draw(batch: int) -> Tensor:
        parts = []
        for start in range(0, 10, batch):
            indices = range(start, min(start + batch, 10))
            like = torch.zeros(len(indices), 1, 4, 4, dtype=torch.float64)
            parts.append(sampler(score, like, SampleGenerators((3, "sample"), indices)).x)
        return torch.cat(parts)

    together = draw(10)
    assert together.shape == (10, 1, 4, 4) and together.flatten(1).std(0).min() > 0.1
    for batch in (1, 7):
        torch.testing.assert_close(draw(batch), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_keep_shape_and_precision(name, monkeypatch):
    sde = SDES["ve"]
    asked = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append((x.shape[1:], x.dtype, t.dtype, t.shape == x.shape[:1]))
        return -x / (1 + sde.std(t)[:, None, None, None] ** 2)

    def checked_integrate(velocity, y: Tensor, *args, **settings):
        assert y.dtype == torch.float64  # the state of an ODE, whatever the precision of the score
        return integrate(velocity, y, *args, **settings)

    integrate = sampling.integrate
    monkeypatch.setattr(sampling, "integrate", checked_integrate)
    x = SAMPLERS[name](sde)(score, torch.zeros(2, 3, 4, 4)).x
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32 and not x.requires_grad
    assert set(asked) == {((3, 4, 4), torch.float32, torch.float32, True)}


# ------------------------------------------------------------------------------------------------------------- configs


OPTIONS = dict(
    **dict(method="pc", predictor="euler_maruyama", corrector="ald", num_steps=7, snr=0.3, n_steps_each=2),
    **dict(noise_removal=False, solver="heun", rtol=1e-2, atol=1e-4, condition=""),
)


def made(continuous: bool = True, num_scales: int = 50, **fields):
    return make_sampler(SDES["vp"], OPTIONS | fields, num_scales=num_scales, continuous=continuous)


def test_samplers_from_options():
    sde = SDES["vp"]
    assert made() == PCSampler(sde, "euler_maruyama", "ald", 7, 0.3, 2, False)
    assert made(num_steps=0, noise_removal=True).num_steps == 50
    discrete = made(continuous=False, num_steps=0)
    assert discrete == PCSampler(sde, "euler_maruyama", "ald", 50, 0.3, 2, False, num_scales=50)
    assert made(method="ode") == ODESampler(sde, "heun", 1e-2, 1e-4, 7, False)
    assert made(method="few_step", noise_removal=True) == FewStepSampler(sde, "heun", 7, True)


@pytest.mark.parametrize(
    ("fields", "name", "slug"),
    [
        (
            {},
            "PC, euler_maruyama + ald (snr 0.3, 2 per step), 7 steps, not denoised",
            "pc-euler_maruyama-ald-7",
        ),
        (
            dict(corrector="none", noise_removal=True),
            "PC, euler_maruyama + none, 7 steps",
            "pc-euler_maruyama-none-7",
        ),
        (
            dict(method="few_step", num_steps=0, noise_removal=True),
            "few steps, heun on the EDM grid, 50 steps",
            "few_step-heun-50",
        ),
        (dict(method="ode"), "ODE, heun, 7 steps", "ode-heun-7"),
        (dict(method="ode", solver="rk45"), "ODE, rk45, rtol 0.01, atol 0.0001", "ode-rk45"),
        (
            dict(predictor="user_classes:Predictor", n_steps_each=1),
            "PC, user_classes:Predictor + ald (snr 0.3), 7 steps, not denoised",
            "pc-user_classes.Predictor-ald-7",
        ),
    ],
)
def test_a_sampler_describes_itself(fields, name, slug):
    assert (str(made(**fields)), made(**fields).slug) == (name, slug)


@pytest.mark.parametrize(
    ("fields", "as_path"),
    [
        ({}, dict(predictor="user_classes:Predictor")),
        ({}, dict(corrector="user_classes:Corrector")),
        (dict(method="few_step", solver="dpmpp_2m"), dict(solver="sampling:DPMSolverPlusPlus2M")),
        (dict(method="ode"), dict(solver="ode:_heun")),
        ({}, dict(method="sampling:PCSampler")),
    ],
)
def test_import_paths(fields, as_path):
    """An import path stands for the class of a name: the samples are the same."""

    def draw(**options) -> Tensor:
        like, generator = torch.zeros(3, 2, dtype=torch.float64), torch.Generator().manual_seed(0)
        return made(**fields | options)(gaussian_2d(SDES["vp"]).score, like, generator).x

    assert torch.equal(draw(), draw(**as_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(method="sde"), "sampling.method='sde': allowed are pc, ode, few_step, or module:attribute"),
        (dict(predictor="euler"), "sampling.predictor='euler': allowed are euler_maruyama, "),
        (dict(corrector="mala"), "sampling.corrector='mala': allowed are langevin, ald, none, or module:attribute"),
        (dict(corrector="user_classes:Mala"), "sampling.corrector='user_classes:Mala': module 'user_classes' has no"),
        (dict(predictor="none", corrector="none"), "at least one must be given"),
        (dict(method="ode", solver="rk4"), "sampling.solver='rk4': allowed are rk45, heun, adams"),
        (
            dict(method="few_step", solver="rk45"),
            "sampling.method='few_step', sampling.solver='rk45': allowed are ",
        ),
        (dict(method="ode", num_steps=-3), "sampling.num_steps=-3: sampling.solver='heun' needs at least 1"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError) as error:
        made(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)
