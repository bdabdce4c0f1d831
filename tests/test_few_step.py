"""Heun on the EDM grid and DPM-Solver++(2M) against the exact flow of Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import affine_law

from experiment.randomness import SampleGenerators
from sampling import FEW_STEP_SOLVERS, FewStepSampler, ODESampler, edm_times
from sde_lib import SDE, VE, VP, CosineBeta, GeometricSigma, LinearBeta, PolynomialSigma, SubVP, expand

SDES = {
    "ve": VE(GeometricSigma(0.01, 50.0)),
    "ve_polynomial": VE(PolynomialSigma(0.01, 50.0, 7.0)),
    "vp": VP(LinearBeta(0.1, 20.0)),
    "vp_cosine": VP(CosineBeta(20.0)),
    "subvp": SubVP(LinearBeta(0.1, 20.0)),
}
VARIANCES = torch.tensor([0.05, 0.3, 1.0, 2.5], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.2, 2.0], dtype=torch.float64)
EVALUATIONS = {"heun": 2, "dpmpp_2m": 1}
"""A step's, of the solvers without noise."""


def marginal_variance(sde: SDE, t: torch.Tensor) -> torch.Tensor:
    return sde.mean_coefficient(t)[:, None] ** 2 * VARIANCES + sde.std(t)[:, None] ** 2


def exact_score(sde: SDE):
    """Of data N(MEAN, diag(VARIANCES))."""

    def score(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        mean, _ = sde.marginal(MEAN.expand_as(x), t)
        return (mean - x) / marginal_variance(sde, t)

    return score


def exact_end(sde: SDE, x: torch.Tensor, end: float) -> torch.Tensor:
    """Where the flow takes x from t = 1: deviations from the mean scale with the standard deviation."""
    start, end = torch.full((len(x),), sde.end_time).double(), torch.full((len(x),), end).double()
    factor = (marginal_variance(sde, end) / marginal_variance(sde, start)).sqrt()
    mean = [expand(sde.mean_coefficient(t), x) * MEAN for t in (start, end)]
    return mean[1] + factor * (x - mean[0])


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", EVALUATIONS)
def test_order_two_on_gaussian_data(name, solver):
    sde, like = SDES[name], torch.zeros(50, 4, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160, 320):
        sampler = FewStepSampler(sde, solver, steps, noise_removal=False)
        result = sampler(exact_score(sde), like, torch.Generator().manual_seed(0))
        prior = sde.prior_sample(like, torch.Generator().manual_seed(0))
        errors.append(float((result.x - exact_end(sde, prior, sde.sampling_eps)).square().mean().sqrt()))
        assert result.nfe == EVALUATIONS[solver] * steps
    orders = -np.diff(np.log2(errors))
    assert orders[-1] == pytest.approx(2.0, abs=0.15), errors


@pytest.mark.parametrize("solver", EVALUATIONS)
def test_eighteen_steps_do_what_equal_steps_in_time_do_not(solver):
    """EDM's number of steps on CIFAR-10; the same evaluations in Heun steps that are equal in time."""
    sde, like = SDES["ve"], torch.zeros(200, 4, dtype=torch.float64)
    prior = sde.prior_sample(like, torch.Generator().manual_seed(0))

    def error(sampler) -> float:
        result = sampler(exact_score(sde), like, torch.Generator().manual_seed(0))
        return float((result.x - exact_end(sde, prior, sde.sampling_eps)).square().mean().sqrt())

    few = FewStepSampler(sde, solver, 36 // EVALUATIONS[solver], noise_removal=False)
    assert error(few) < 0.3 * error(ODESampler(sde, "heun", num_steps=18))


@pytest.mark.parametrize("name", SDES)
def test_grid_is_that_of_edm(name):
    sde = SDES[name]
    times = edm_times(sde, 12)
    assert times[0] == sde.end_time and times[-1] == sde.sampling_eps and (times.diff() < 0).all()
    root = (sde.std(times) / sde.mean_coefficient(times)) ** (1 / 7)
    assert torch.allclose(root.diff(), root.diff().mean().expand(12), rtol=1e-6)


def test_first_step_of_dpm_solver_and_a_step_to_no_noise_are_ddim():
    """Order one: x_s = α_s D + σ_s ε. Removing the noise that is left gives D."""
    sde, like = SDES["vp"], torch.zeros(3, 4, dtype=torch.float64)
    x = sde.prior_sample(like, torch.Generator().manual_seed(0))
    t, s = (torch.full((3,), value, dtype=torch.float64) for value in (1.0, sde.sampling_eps))
    epsilon = -expand(sde.std(t), x) * exact_score(sde)(x, t)
    denoised = (x - expand(sde.std(t), x) * epsilon) / expand(sde.mean_coefficient(t), x)
    ddim = expand(sde.mean_coefficient(s), x) * denoised + expand(sde.std(s), x) * epsilon
    sampler = FewStepSampler(sde, "dpmpp_2m", 1, noise_removal=False)
    assert torch.allclose(sampler(exact_score(sde), like, torch.Generator().manual_seed(0)).x, ddim, rtol=1e-12)


def test_second_step_of_dpm_solver_is_the_published_formula():
    sde, like = SDES["vp"], torch.zeros(3, 4, dtype=torch.float64)
    score, times = exact_score(sde), edm_times(sde, 2)
    alpha, sigma = sde.mean_coefficient(times), sde.std(times)
    log_snr = (alpha / sigma).log()
    x0 = sde.prior_sample(like, torch.Generator().manual_seed(0))

    def data_prediction(x, i):
        return (x + sigma[i] ** 2 * score(x, times[i].expand(3))) / alpha[i]

    h = log_snr.diff()
    d0 = data_prediction(x0, 0)
    x1 = sigma[1] / sigma[0] * x0 - alpha[1] * math.expm1(-h[0]) * d0
    r = h[0] / h[1]
    combined = (1 + 1 / (2 * r)) * data_prediction(x1, 1) - 1 / (2 * r) * d0
    x2 = sigma[2] / sigma[1] * x1 - alpha[2] * math.expm1(-h[1]) * combined
    result = FewStepSampler(sde, "dpmpp_2m", 2, noise_removal=False)(score, like, torch.Generator().manual_seed(0))
    assert torch.allclose(result.x, x2, rtol=1e-10)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_law_of_samples_with_noise_converges_with_order_one_at_least(name, monkeypatch):
    sde = SDES[name]
    end = torch.tensor([sde.sampling_eps], dtype=torch.float64)
    variance, mean = marginal_variance(sde, end)[0], sde.mean_coefficient(end) * MEAN
    distances = []
    for steps in (40, 80, 160):
        sampler = FewStepSampler(sde, "dpmpp_2m_sde", steps, noise_removal=False)
        found_mean, covariance = affine_law(lambda x, run=sampler: run(exact_score(sde), x).x, 4, monkeypatch)
        squared = (found_mean - mean) ** 2 + (covariance.diagonal().sqrt() - variance.sqrt()) ** 2
        distances.append(float(squared.sum().sqrt()))  # W₂ of Gaussians with diagonal covariance
    assert distances[-1] < 0.02 and (-np.diff(np.log2(distances)) > 0.9).all(), distances


def test_noise_belongs_to_the_sample():
    sde, score = SDES["vp"], exact_score(SDES["vp"])
    sampler = FewStepSampler(sde, "dpmpp_2m_sde", 5)
    both = sampler(score, torch.zeros(2, 4, dtype=torch.float64), SampleGenerators((0, "x"), range(2))).x
    second = sampler(score, torch.zeros(1, 4, dtype=torch.float64), SampleGenerators((0, "x"), [1])).x
    assert torch.equal(both[1:], second) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
def test_noise_removal_is_one_more_evaluation(solver):
    sde, like = SDES["ve"], torch.zeros(3, 4, dtype=torch.float64)
    kept, removed = (
        FewStepSampler(sde, solver, 6, noise_removal=removal)(exact_score(sde), like, torch.Generator().manual_seed(0))
        for removal in (False, True)
    )
    assert removed.nfe == kept.nfe + 1
    t = torch.full((3,), sde.sampling_eps, dtype=torch.float64)
    assert torch.allclose(removed.x, kept.x + sde.std(t)[:, None] ** 2 * exact_score(sde)(kept.x, t), rtol=1e-12)
