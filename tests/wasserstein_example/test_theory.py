"""The law of a sampler on Gaussian data against the samplers themselves, its limits and orders; the whole command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import gaussian_2d
from PIL import Image
from scipy.integrate import quad
from torch import Tensor

import sampling
import sde_lib
from evaluation import frechet_distance
from exact.gaussian_law import DETERMINISTIC, STEPS, Law, diagonalise, limit_law, sampler_law, score_of, wasserstein
from sampling import ODESampler, PCSampler
from sde_lib import VE, VP, BetaRange, GeometricSigma, LinearBeta
from wasserstein_example import main as example
from wasserstein_example import theory

ROOT = Path(__file__).resolve().parents[2]
every_process = pytest.mark.parametrize("process", theory.SDES)
every_sampler = pytest.mark.parametrize("sampler", STEPS)
DATA = Law(torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.25, 1.0, 3.0]).double())


def sampler_of_users(name: str, sde, num_steps: int) -> PCSampler | ODESampler:
    if name == "heun":
        return ODESampler(sde, "heun", num_steps=num_steps, noise_removal=True)
    return PCSampler(sde, name, "none", num_steps=num_steps)


# ------------------------------------------------------------------------------------------------------ the recursion


@every_sampler
@every_process
def test_law_is_that_of_the_sampler_exactly(process, sampler, monkeypatch):
    """Samples are affine in the noise: one unit of each noise variable at a time gives mean and covariance."""
    sde, steps = theory.SDES[process], 5
    gaussian = gaussian_2d(sde)
    error = torch.tensor([0.3, -0.1]).double()  # of the score
    draws = 0

    def unit_noise(x: Tensor, generator) -> Tensor:
        # Row 2k + d gets a one in component d of draw k; the last row gets no noise.
        nonlocal draws
        z = torch.zeros_like(x)
        z[2 * draws + torch.arange(2), torch.arange(2)] = 1.0
        draws += 1
        return z

    for module in (sampling, sde_lib):
        monkeypatch.setattr(module, "normal_like", unit_noise)
    like = torch.zeros(2 * (steps + 1) + 1, 2, dtype=torch.float64)
    data, basis = diagonalise(gaussian.mean, gaussian.covariance)
    x = sampler_of_users(sampler, sde, steps)(lambda x, t: gaussian.score(x, t) + error, like).x
    assert draws == (1 if sampler in DETERMINISTIC else steps + 1)
    mean, response = x[-1], x[:-1] - x[-1]
    monkeypatch.undo()
    law = sampler_law(sde, data, sampler, steps, error=error @ basis)
    scale = float(law.variance.max().sqrt() + law.mean.abs().max())
    torch.testing.assert_close(basis @ law.mean, mean, rtol=0, atol=1e-9 * scale)
    covariance = basis @ law.variance.diag() @ basis.T
    torch.testing.assert_close(covariance, response.T @ response, rtol=0, atol=1e-9 * scale**2)


@every_sampler
@every_process
def test_distance_agrees_with_monte_carlo(process, sampler):
    """100 000 samples; the standard error is that of the mean over 50 batches, each about the full estimate."""
    sde, steps, count, batches = theory.SDES[process], 6, 100_000, 50
    gaussian = gaussian_2d(sde)
    user = sampler_of_users(sampler, sde, steps)
    x = user(gaussian.score, torch.zeros(count, 2, dtype=torch.float64), torch.Generator().manual_seed(7)).x

    def distance(samples: Tensor) -> float:
        return math.sqrt(
            frechet_distance(samples.mean(0), samples.T.cov(), gaussian.mean.numpy(), gaussian.covariance.numpy())
        )

    parts = torch.tensor([distance(part) for part in x.split(count // batches)])
    standard_error = float(parts.std()) / math.sqrt(batches)
    data, _ = diagonalise(gaussian.mean, gaussian.covariance)
    expected = wasserstein(sampler_law(sde, data, sampler, steps), data)
    # W₂ of fitted Gaussians is biased upwards by about (standard deviation)²/W₂ of the estimate.
    assert abs(distance(x) - expected) < 4 * standard_error + 10 * standard_error**2 / expected
    assert standard_error < 0.15 * expected


def test_long_runs_are_composed_of_chunks():
    sde = VP(LinearBeta())
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    times = torch.linspace(1, sde.sampling_eps, 1201, dtype=torch.float64)
    score, zero = score_of(sde, DATA), torch.zeros(1, 3).double()
    for t, s in zip(times[:-1, None], times[1:, None], strict=True):  # the chain as it is taught
        a, b = sde.transition(s, t)
        shift = b**2 * score(zero, t)[0] / a
        factor = (1 + b**2 * (score(zero + 1, t)[0] - score(zero, t)[0])) / a
        mean, variance = factor * mean + shift, factor**2 * variance + (b * sde.std(s) / sde.std(t)) ** 2
    zero, one = sampling.denoise(sde, score, torch.stack([zero[0], zero[0] + 1]), times[-1:].expand(2))
    mean, variance = (one - zero) * mean + zero, (one - zero) ** 2 * variance
    law = sampler_law(sde, DATA, "ancestral_sampling", 1200)
    torch.testing.assert_close(law.mean, mean, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(law.variance, variance, rtol=1e-10, atol=0)


def test_score_and_distance_against_other_implementations():
    sde = VP(LinearBeta())
    gaussian = gaussian_2d(sde)
    data, basis = diagonalise(gaussian.mean, gaussian.covariance)
    x, t = torch.randn(7, 2).double(), torch.linspace(0.1, 1, 7).double()
    torch.testing.assert_close(score_of(sde, data)(x @ basis, t) @ basis.T, gaussian.score(x, t))
    torch.testing.assert_close(basis @ data.variance.diag() @ basis.T, gaussian.covariance)
    other = Law(torch.tensor([0.0, 2.0]).double(), torch.tensor([4.0, 0.1]).double())
    expected = frechet_distance(
        *(a.numpy() for a in (data.mean, data.variance.diag(), other.mean, other.variance.diag()))
    )
    assert wasserstein(data, other) == pytest.approx(math.sqrt(expected), rel=1e-12)


# ------------------------------------------------------------------------------------------------- limits and orders


@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [("exponential_integrator", 1, 0.05), ("probability_flow", 1, 0.05), ("heun", 2, 0.15)],
)
@every_process
def test_order_of_convergence_to_the_limit(process, sampler, order, tolerance):
    """Also a test of the limit: a wrong one would not be approached. Where within a step the kink of the cosine
    schedule falls changes the error of Heun, by a factor that does not grow: it needs a wide range of K."""
    sde, steps = theory.SDES[process], (2**9, 2**16) if process == "vp_cosine" else (2**14, 2**15)
    limit = limit_law(sde, DATA, probability_flow=sampler in DETERMINISTIC)
    errors = [wasserstein(sampler_law(sde, DATA, sampler, k), limit) for k in steps]
    assert theory.slope(steps, errors) == pytest.approx(-order, abs=tolerance)


def test_effect_of_a_score_error():
    """For VE, ∫ λ/(λ + v) dv over the variances v that were added: λ log((λ + σ(1)²)/(λ + σ(ε)²))."""
    sde = VE(GeometricSigma(0.01, 10.0))
    exact = sampler_law(sde, DATA, "exponential_integrator", 8192)
    law = sampler_law(sde, DATA, "exponential_integrator", 8192, error=torch.tensor([0.1, 0.2, 0.3]))
    shift = (law.mean - exact.mean) / torch.tensor([0.1, 0.2, 0.3])
    expected = DATA.variance * torch.log((DATA.variance + 100) / DATA.variance)
    torch.testing.assert_close(shift, expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(law.variance, exact.variance)


def test_bounds_are_those_of_the_paper():
    """f = 0, g = (b + at)^c: K = d^{1/(2(2c+1)) + 1}/ε^{1/(2c+1) + 2}; c = 0, ½ are the cases a and √(2at)."""
    for name, c in (("ve_constant", 0), ("ve_square_root", 0.5), ("ve_polynomial", 1.5)):
        expected = (1 / (2 * c + 1) + 2, 1 / (2 * (2 * c + 1)) + 1)
        assert theory.BOUNDS[name].exponents == pytest.approx(expected)
    for name in ("ve_geometric", "vp_linear", "vp_constant", "vp_power", "vp_exponential"):
        assert theory.BOUNDS[name].exponents == (2, 1)


@pytest.mark.parametrize(
    ("process", "beta"),
    [
        ("vp_linear", lambda t: 0.1 + 19.9 * t),
        ("vp_constant", lambda t: 5.05),
        ("vp_power", lambda t: (0.1**0.5 + (20**0.5 - 0.1**0.5) * t) ** 2),
        ("vp_exponential", lambda t: 0.1 * 300**t),
    ],
)
@pytest.mark.parametrize("horizon", [0.4, 1.0, 1.7])
def test_stretched_horizon_is_the_same_process_for_longer(process, beta, horizon):
    schedule = theory.stretched(process, horizon).schedule
    assert isinstance(schedule, BetaRange)
    for fraction in (0.3, 1.0):
        area, _ = quad(beta, 0, fraction * horizon)
        integral = schedule.integral(torch.tensor(fraction, dtype=torch.float64)).item()
        assert integral == pytest.approx(area, rel=1e-8)


def test_processes_have_the_paper_configs_constants():
    ends = torch.tensor([0.0, 1.0]).double()
    for name, sde in theory.SDES.items():
        if name.startswith("ve"):
            assert sde.std(ends).tolist() == pytest.approx([0.01, 50.0])
    beta = {name: sde.schedule.beta(ends).tolist() for name, sde in theory.SDES.items() if name.startswith("vp")}
    assert beta["vp_linear"] == pytest.approx([0.1, 20.0]) and beta["vp_power"] == pytest.approx([0.1, 20.0])
    assert beta["vp_constant"] == pytest.approx([5.05, 5.05]) and beta["vp_exponential"] == pytest.approx([0.1, 30.0])


def test_needed_steps_are_the_smallest():
    data = theory.data_of(4)
    horizon = theory.horizon_for("ve_geometric", data, 0.1)
    sde = theory.stretched("ve_geometric", horizon)
    assert wasserstein(limit_law(sde, data, probability_flow=False), data) == pytest.approx(0.1, rel=1e-6)
    count = theory.steps_needed(sde, data, 0.2)
    at, before = (wasserstein(sampler_law(sde, data, theory.ANALYSED, k), data) for k in (count, count - 1))
    assert at <= 0.2 < before
    # g constant: sampling stops at a σ that grows with σ_max, so that the limit has a smallest value.
    assert theory.horizon_for("ve_constant", data, 1e-3) is None


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(steps):
    with pytest.raises(ValueError, match=rf"num_steps={steps}: at least 1"):
        sampler_law(VP(LinearBeta()), DATA, "heun", steps)


def test_bad_laws():
    with pytest.raises(ValueError, match=r"sampler='euler': allowed are euler_maruyama, .*heun"):
        sampler_law(VP(LinearBeta()), DATA, "euler", 8)
    for covariance in (
        [[1.0, 2.0], [2.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, 0.5], [0.4, 1.0]],
        [[math.nan] * 2] * 2,
    ):
        with pytest.raises(ValueError, match=r"covariance=.*must be symmetric and positive definite"):
            diagonalise(torch.zeros(2), torch.tensor(covariance))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=(8, 0)), "--steps=8,0: allowed are integers from 1 on"),
        (dict(steps=()), "--steps=: allowed are integers from 1 on, at least one"),
        (dict(dimensions=(0,)), "--dimensions=0"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        example.run(str(tmp_path / "new"), **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- the whole command


def test_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "LONG_STEPS", (2**9, 2**10))
    monkeypatch.setattr(theory, "EPSILONS", (0.4, 0.2))
    monkeypatch.setattr(theory, "HORIZON_EPSILON", 0.2)
    text = example.run(str(tmp_path), steps=(16, 8, 64), dimensions=(4, 1))
    settings = theory.Settings((8, 16, 64), (1, 4))
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert results["settings"] == json.loads(json.dumps(settings._asdict()))
    assert len(rows) == 9 * 6 * 3 * 2 and settings.reference == 4
    assert all(set(row) == {"process", "sampler", "d", "K", "w2", "discretisation"} for row in rows)
    keys = {(row["process"], row["sampler"], row["d"], row["K"]) for row in rows}
    assert keys == {(p, s, d, k) for p in theory.SDES for s in STEPS for d in (1, 4) for k in (8, 16, 64)}
    # The dimensions, computed side by side, are what each is by itself.
    row = next(r for r in rows if (r["process"], r["sampler"], r["d"], r["K"]) == ("vp_cosine", "heun", 4, 16))
    single = wasserstein(sampler_law(theory.SDES["vp_cosine"], theory.data_of(4), "heun", 16), theory.data_of(4))
    assert row["w2"] == pytest.approx(single, rel=1e-10)
    slopes = {(row["process"], row["sampler"]): row for row in results["slopes"]}
    assert slopes["vp_linear", "heun"]["long_slope"] == pytest.approx(-2, abs=0.05)
    assert text == (tmp_path / "table.md").read_text()
    assert f"{slopes['vp_linear', 'heun']['slope']:.3g} ({slopes['vp_linear', 'heun']['long_slope']:.3g})" in text
    assert "nan" not in text.lower() and "inf" not in (tmp_path / "results.json").read_text().lower()
    assert len(results["score_errors"]) == 9 * len(theory.SCORE_ERRORS) and len(results["needed"]) == 8 * 3
    for name in ("w2", "needed"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and image.width > 1000 and len(np.unique(np.asarray(image))) > 20


@pytest.mark.slow
def test_exponents_come_in_the_order_of_the_bounds(monkeypatch):
    """The README's numbers: the exponent of 1/ε from ε = 0.0125 to 0.00625, d = 16, without early stopping."""
    stretched, data, exponents = theory.stretched, theory.data_of(16), {}

    def without_early_stopping(process: str, horizon: float):
        sde = stretched(process, horizon)
        sde.sampling_eps = 1e-12
        return sde

    monkeypatch.setattr(theory, "stretched", without_early_stopping)
    for process in theory.BOUNDS:
        counts = []
        for epsilon in (0.0125, 0.00625):
            sde = theory.stretched(process, theory.horizon_for(process, data, epsilon / 2))
            counts.append(theory.steps_needed(sde, data, epsilon))
        exponents[process] = round(math.log2(counts[1] / counts[0]), 3)
    assert list(exponents.values()) == [1.035, 1.967, 1.465, 1.22, 1.097, 1.178, 1.072, 1.049]
