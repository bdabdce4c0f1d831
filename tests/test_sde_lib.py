"""Forward processes against their own moment equations, exact kernels, ladders, and the reversal of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from oracles import SDES, gaussian_2d
from scipy.integrate import quad, solve_ivp

from sde_lib import VE, VP, GeometricSigma, LinearBeta, SubVP, get_sde

EVERY_SDE = {
    **SDES,
    "ve_small": VE(GeometricSigma(0.1, 3.0)),
    "vp_gentle": VP(LinearBeta(0.5, 4.0)),
    "vp_from_zero": VP(LinearBeta(0.0, 10.0)),
    "subvp_gentle": SubVP(LinearBeta(0.5, 4.0)),
}
GRID = torch.linspace(0, 1, 41, dtype=torch.float64)

every_sde = pytest.mark.parametrize("sde", EVERY_SDE.values(), ids=EVERY_SDE)


def config(sde: str, **fields) -> ConfigDict:
    model = dict(sigma_min=0.02, sigma_max=7.0, beta_min=0.3, beta_max=9.0) | fields
    return ConfigDict(dict(model=model, training=dict(sde=sde)))


def moments_by_integration(sde, start: float, variance: float, times: np.ndarray) -> np.ndarray:
    """Mean and variance (2, T) of x_t from dm = −f m dt, dv = (−2fv + g²) dt with mean 1 at the start."""

    def rate(t: float, y: np.ndarray) -> list[float]:
        time = torch.tensor([t], dtype=torch.float64)
        f, g = sde.drift_rate(time).item(), sde.diffusion(time).item()
        return [-f * y[0], -2 * f * y[1] + g * g]

    return solve_ivp(rate, (start, 1), [1.0, variance], "DOP853", times, rtol=1e-12, atol=1e-18).y


@every_sde
def test_marginals_solve_the_moment_equations(sde):
    times = GRID[1:]
    mean, variance = moments_by_integration(sde, 0.0, sde.std(GRID[:1]).item() ** 2, times.numpy())
    x0 = torch.tensor([[2.0, -3.0]], dtype=torch.float64).expand(len(times), 2)
    marginal_mean, std = sde.marginal(x0, times)
    np.testing.assert_allclose(marginal_mean.numpy(), mean[:, None] * x0.numpy(), rtol=1e-8)
    np.testing.assert_allclose(std.numpy() ** 2, variance, rtol=1e-8)


@every_sde
def test_transitions_solve_the_moment_equations(sde):
    times = torch.tensor([0.41, 0.7, 1.0], dtype=torch.float64)
    mean, variance = moments_by_integration(sde, 0.4, 0.0, times.numpy())
    a, b = sde.transition(torch.full_like(times, 0.4), times)
    np.testing.assert_allclose(a.numpy(), mean, rtol=1e-8)
    np.testing.assert_allclose(b.numpy() ** 2, variance, rtol=1e-8)


@every_sde
def test_transitions_compose(sde):
    s, u, t = torch.tensor([[0.0, 0.1, 0.5], [0.3, 0.2, 0.9], [1.0, 0.8, 0.95]], dtype=torch.float64)
    (a1, b1), (a2, b2), (a, b) = sde.transition(s, u), sde.transition(u, t), sde.transition(s, t)
    torch.testing.assert_close(a, a1 * a2, rtol=1e-12, atol=0)
    torch.testing.assert_close(b**2, (a2 * b1) ** 2 + b2**2, rtol=1e-10, atol=0)
    # From data: the marginal, where for VE "data" already has σ_min.
    zero = torch.zeros_like(t)
    a, b = sde.transition(zero, t)
    torch.testing.assert_close(sde.mean_coefficient(t), a, rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.std(t) ** 2, (a * sde.std(zero)) ** 2 + b**2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_at_time_zero_there_is_no_noise(name):
    zero = torch.zeros(1, dtype=torch.float64)
    assert SDES[name].std(zero) == 0 and SDES[name].mean_coefficient(zero) == 1


@every_sde
def test_short_transitions_keep_their_precision(sde):
    # b² = g² dt + O(dt²), and the midpoint removes the second order. Differences of variances would lose 1e-16/1e-6.
    s = torch.tensor([0.2, 0.6, 0.99], dtype=torch.float64)
    dt = 2.0**-20
    _, b = sde.transition(s, s + dt)
    g2_at_middle = sde.diffusion(s + dt / 2) ** 2 * (1 - 2 * sde.drift_rate(s) * dt / 2)
    torch.testing.assert_close(b**2, g2_at_middle * dt, rtol=1e-8, atol=0)


def test_ve_diffusion_is_the_derivative_of_the_variance():
    t = GRID.clone().requires_grad_()
    (rate,) = torch.autograd.grad((SDES["ve"].std(t) ** 2).sum(), t)
    torch.testing.assert_close(SDES["ve"].diffusion(GRID) ** 2, rate, rtol=1e-12, atol=0)
    assert torch.equal(SDES["ve"].drift_rate(GRID), torch.zeros_like(GRID))


def test_geometric_sigma():
    schedule = GeometricSigma(0.01, 50.0)
    half = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.01, math.sqrt(0.01 * 50), 50.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(half), expected, rtol=1e-14, atol=0)


def test_linear_beta():
    schedule = LinearBeta(0.1, 20.0)
    ends = schedule.beta(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.1, 10.05, 20.0], dtype=torch.float64), rtol=1e-14, atol=0)
    for t in (0.1, 0.7, 1.0):
        area, _ = quad(lambda u: schedule.beta(torch.tensor(u, dtype=torch.float64)).item(), 0, t, epsabs=0)
        assert schedule.integral(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(area, rel=1e-12)


@every_sde
def test_time_at_std_inverts_std(sde):
    t = torch.cat([torch.tensor([1e-5, 1e-3], dtype=torch.float64), GRID[1:]])
    torch.testing.assert_close(sde.time_at_std(sde.std(t)), t, rtol=1e-9, atol=0)


@every_sde
def test_drift_is_linear(sde):
    x = torch.randn(41, 2, 3, dtype=torch.float64)
    expected = -sde.drift_rate(GRID)[:, None, None] * x
    assert torch.equal(sde.drift(x, GRID), expected)
    assert sde.drift(x.float(), GRID.float()).dtype == torch.float32


@every_sde
def test_prior(sde):
    x = 2 * torch.randn(5, 3, 2, dtype=torch.float64)
    reference = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(sde.prior_std).double())
    torch.testing.assert_close(sde.prior_log_prob(x), reference.log_prob(x).sum((1, 2)), rtol=1e-12, atol=0)
    like = torch.zeros(20_000, 2, dtype=torch.float64)
    draw = sde.prior_sample(like, torch.Generator().manual_seed(0)) / sde.prior_std
    # 40 000 numbers: the mean has standard error 1/200, the mean square √2/200.
    assert abs(draw.mean()) < 4 / 200
    assert abs((draw**2).mean() - 1) < 4 * 2**0.5 / 200


@pytest.mark.parametrize(("name", "expected"), [("ve", 20.0), ("vp", 1.0), ("subvp", 1.0)])
def test_prior_std_is_that_of_a_fully_noised_sample(name, expected):
    sde = SDES[name]
    assert sde.prior_std == pytest.approx(expected, rel=1e-12)
    # σ(1)² = 1 − e^{−10.05} for VP, so the prior is off by less than one part in 10⁴.
    assert sde.std(torch.ones(1).double()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("levels", [10, 999, 1000])
def test_smld_ladder(levels):
    sde = SDES["ve"]
    ladder = sde.ladder(levels)
    expected = np.exp(np.linspace(np.log(0.02), np.log(20.0), levels))
    np.testing.assert_allclose(ladder.std.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(ladder.mean_coefficient.numpy(), 1.0)
    times = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    torch.testing.assert_close(ladder.std, sde.std(times), rtol=1e-12, atol=0)


@pytest.mark.parametrize("levels", [25, 999, 1000])
def test_ddpm_ladder(levels):
    ladder = SDES["vp"].ladder(levels)
    product = 1.0
    for i, beta in enumerate(np.linspace(0.1 / levels, 20.0 / levels, levels)):
        product *= 1 - beta
        assert ladder.mean_coefficient[i].item() == pytest.approx(math.sqrt(product), rel=1e-11)
        assert ladder.std[i].item() == pytest.approx(math.sqrt(1 - product), rel=1e-11)


def test_ddpm_ladder_approaches_the_continuous_marginal():
    # Level i of N belongs to t_i = i/(N−1), and the chain is an Euler step of length 1/N: first order in 1/N.
    gaps = []
    for levels in (500, 1000, 2000):
        ladder = SDES["vp"].ladder(levels)
        t = torch.linspace(0, 1, levels, dtype=torch.float64)
        gaps.append((ladder.mean_coefficient - SDES["vp"].mean_coefficient(t)).abs().max().item())
    assert gaps[1] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1) and gaps[1] / gaps[2] == pytest.approx(2, abs=0.1)


def test_families_without_a_ladder_and_ladders_too_short():
    with pytest.raises(ValueError, match=r"training\.sde='subvpsde'.*training\.continuous=True"):
        SDES["subvp"].ladder(1000)
    # β_max/N ≥ 1 would make the variance of the last steps negative.
    with pytest.raises(ValueError, match=r"model\.num_scales=20: .* more than 20 levels"):
        SDES["vp"].ladder(20)


@pytest.mark.parametrize("name", SDES)
def test_reversal_of_a_gaussian(name):
    # The probability flow carries N(μ_t, V_t) along; in an eigendirection its velocity is μ' + (x − μ) V'/(2V).
    sde = SDES[name]
    gaussian = gaussian_2d(sde)
    x = torch.randn(20, 2, dtype=torch.float64) * 3
    times = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)

    def moments(t):
        alpha, sigma = sde.mean_coefficient(t), sde.std(t)
        mean = alpha[:, None] * (gaussian.mean @ gaussian.basis)
        return mean, alpha[:, None] ** 2 * gaussian.spectrum + sigma[:, None] ** 2

    (mean, variance), (mean_rate, variance_rate) = torch.func.jvp(moments, (times,), (torch.ones_like(times),))
    expected = (mean_rate + (x @ gaussian.basis - mean) * variance_rate / (2 * variance)) @ gaussian.basis.T
    flow = sde.reverse(gaussian.score, probability_flow=True)
    torch.testing.assert_close(flow.drift(x, times), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(flow.diffusion(times), torch.zeros_like(times))

    # The reverse SDE has the same marginals: its drift differs by −½g² ∇log p, here −½g²·(−V⁻¹(x − μ)).
    log_density_gradient = -((x @ gaussian.basis - mean) / variance) @ gaussian.basis.T
    expected = expected - 0.5 * sde.diffusion(times)[:, None] ** 2 * log_density_gradient
    reverse = sde.reverse(gaussian.score)
    torch.testing.assert_close(reverse.drift(x, times), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(reverse.diffusion(times), sde.diffusion(times))


def test_sde_from_a_config():
    for name, family in (("vesde", "ve"), ("vpsde", "vp"), ("subvpsde", "subvp"), ("VESDE", "ve")):
        assert get_sde(config(sde=name)).name == family
    one = torch.ones(1, dtype=torch.float64)
    assert get_sde(config(sde="vesde")).std(one).item() == pytest.approx(7.0)
    assert get_sde(config(sde="vesde")).std(0 * one).item() == pytest.approx(0.02)
    for name in ("vpsde", "subvpsde"):
        rate = get_sde(config(sde=name)).drift_rate(torch.tensor([0.0, 1.0]).double())
        torch.testing.assert_close(rate, torch.tensor([0.15, 4.5]).double())
    with pytest.raises(ValueError, match=r"training\.sde='vpsd': allowed are subvpsde, vesde, vpsde"):
        get_sde(config(sde="vpsd"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sde="vesde", sigma_min=0.0), "model.sigma_min=0.0"),
        (dict(sde="vesde", sigma_min=8.0), "sigma_min < sigma_max"),
        (dict(sde="vesde", sigma_max=math.inf), "model.sigma_max=inf"),
        (dict(sde="vesde", sigma_min=math.nan), "model.sigma_min=nan"),
        (dict(sde="vpsde", beta_min=-0.1), "model.beta_min=-0.1"),
        (dict(sde="subvpsde", beta_max=0.3), "beta_min < beta_max"),
        (dict(sde="vpsde", beta_max=math.nan), "model.beta_max=nan"),
    ],
)
def test_schedules_that_make_no_sense(fields, message):
    with pytest.raises(ValueError) as error:
        get_sde(config(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)
