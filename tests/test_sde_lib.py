"""Forward processes against their own moment equations, exact kernels, ladders, and the reversal of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import SDES, gaussian_2d
from scipy.integrate import quad, solve_ivp
from user_classes import Family, HarmonicSigma

from configs.defaults import base_config
from models.score import NoiseLevel
from sde_lib import (
    BETA_SCHEDULES,
    SIGMA_SCHEDULES,
    VE,
    VP,
    ConstantBeta,
    ConstantDiffusionSigma,
    CosineBeta,
    ExponentialBeta,
    Flow,
    GeometricSigma,
    LadderBeta,
    LadderVP,
    LinearBeta,
    PolynomialSigma,
    PowerBeta,
    SquareRootDiffusionSigma,
    StraightPath,
    SubVP,
    make_sde,
)

SIGMAS = {
    "geometric": GeometricSigma(0.02, 7.0),
    "constant": ConstantDiffusionSigma(0.02, 7.0),
    "square_root": SquareRootDiffusionSigma(0.02, 7.0),
    "polynomial": PolynomialSigma(0.02, 7.0, 2.0),
    "polynomial_7": PolynomialSigma(0.02, 7.0, 7.0),
    "polynomial_half": PolynomialSigma(0.02, 7.0, 0.5),
}
BETAS = {
    "linear": LinearBeta(0.1, 20.0),
    "constant": ConstantBeta(0.1, 10.0),
    "power": PowerBeta(0.1, 20.0, 2.0),
    "power_half": PowerBeta(0.1, 20.0, 0.5),
    "exponential": ExponentialBeta(0.1, 30.0),
    "cosine": CosineBeta(999.0),
    "cosine_20": CosineBeta(20.0),
}
every_sigma = pytest.mark.parametrize("schedule", SIGMAS.values(), ids=SIGMAS)
every_beta = pytest.mark.parametrize("schedule", BETAS.values(), ids=BETAS)

EVERY_SDE = {
    **SDES,
    "ve_small": VE(GeometricSigma(0.1, 3.0)),
    "vp_gentle": VP(LinearBeta(0.5, 4.0)),
    "vp_from_zero": VP(LinearBeta(0.0, 10.0)),
    "subvp_gentle": SubVP(LinearBeta(0.5, 4.0)),
    **{f"ve_{name}": VE(schedule) for name, schedule in SIGMAS.items() if name != "geometric"},
    **{f"vp_{name}": VP(schedule) for name, schedule in BETAS.items() if name != "linear"},
    "subvp_power": SubVP(PowerBeta(0.1, 20.0, 2.0)),
    "subvp_cosine": SubVP(CosineBeta(20.0)),
}
GRID = torch.linspace(0, 1, 41, dtype=torch.float64)

every_sde = pytest.mark.parametrize("sde", EVERY_SDE.values(), ids=EVERY_SDE)


def made(family: str, schedule: str = "", **constants):
    return make_sde(family, schedule, dict(sigma_min=0.02, sigma_max=7.0, beta_min=0.3, beta_max=9.0) | constants)


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


# ------------------------------------------------------------------------------------------------------- the schedules


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


TIMES = torch.cat([double(1e-5, 1e-3), GRID[1:]])


@every_sigma
def test_sigma_schedules(schedule):
    torch.testing.assert_close(schedule.sigma(double(0, 1)), double(0.02, 7.0), rtol=1e-13, atol=0)
    t = TIMES.clone().requires_grad_()
    (rate,) = torch.autograd.grad((schedule.sigma(t) ** 2).sum(), t)
    torch.testing.assert_close(schedule.variance_rate(TIMES), rate, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.time(schedule.sigma(TIMES)), TIMES, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.time(double(0.02, 7.0)), double(0, 1), rtol=1e-13, atol=1e-13)


@every_beta
def test_beta_schedules(schedule):
    assert schedule.integral(double(0)) == 0
    t = TIMES.clone().requires_grad_()
    (rate,) = torch.autograd.grad(schedule.integral(t).sum(), t)
    torch.testing.assert_close(schedule.beta(TIMES), rate, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.time(schedule.integral(TIMES)), TIMES, rtol=1e-9, atol=0)
    kink = [schedule.clipping_time] if isinstance(schedule, CosineBeta) else None
    for end in (0.1, 0.7, 1.0):
        area, _ = quad(lambda u: schedule.beta(double(u)).item(), 0, end, epsabs=0, epsrel=1e-12, points=kink)
        assert schedule.integral(double(end)).item() == pytest.approx(area, rel=1e-10)


@pytest.mark.parametrize("schedule", [*SIGMAS.values(), *BETAS.values()], ids=[*SIGMAS, *BETAS])
def test_schedules_in_single_precision(schedule):
    value = schedule.sigma if hasattr(schedule, "sigma") else schedule.integral
    rate = schedule.variance_rate if hasattr(schedule, "sigma") else schedule.beta
    for function in (value, rate):
        assert function(TIMES.float()).dtype == torch.float32
        # Where β is the tangent near a pole, an error in t is one in β/β' ≥ 1/β_max.
        torch.testing.assert_close(function(TIMES.float()).double(), function(TIMES), rtol=2e-4, atol=0)


def test_sigma_schedules_are_those_of_the_paper():
    """At t = ½, and in what distinguishes them: g constant, g ∝ √t, g ∝ (b + at)^(ρ − ½)."""
    half, t = double(0.5), double(0.25, 1.0)
    assert SIGMAS["geometric"].sigma(half).item() == pytest.approx(math.sqrt(0.02 * 7.0))
    assert SIGMAS["constant"].sigma(half).item() == pytest.approx(math.sqrt((0.02**2 + 7.0**2) / 2))
    assert SIGMAS["square_root"].sigma(half).item() == pytest.approx(math.sqrt(0.02**2 + (7.0**2 - 0.02**2) / 4))
    assert SIGMAS["polynomial"].sigma(half).item() == pytest.approx(((math.sqrt(0.02) + math.sqrt(7.0)) / 2) ** 2)
    g = {name: VE(schedule).diffusion(t) for name, schedule in SIGMAS.items()}
    assert g["constant"][0] == g["constant"][1] and g["square_root"][1] / g["square_root"][0] == pytest.approx(2)
    b, a = math.sqrt(0.02), math.sqrt(7.0) - math.sqrt(0.02)
    assert (g["polynomial"][1] / g["polynomial"][0]).item() == pytest.approx(((b + a) / (b + a / 4)) ** 1.5)
    # ρ = 7 on equal steps, from the largest σ: Karras et al. (2022), Eq. 5.
    i, n = np.arange(18), 18
    karras = (7.0 ** (1 / 7) + i / (n - 1) * (0.02 ** (1 / 7) - 7.0 ** (1 / 7))) ** 7
    ours = SIGMAS["polynomial_7"].sigma(torch.linspace(1, 0, n, dtype=torch.float64))
    np.testing.assert_allclose(ours.numpy(), karras, rtol=1e-12)


def test_beta_schedules_are_those_of_the_paper():
    for name, start, end in (("linear", 0.1, 20.0), ("power", 0.1, 20.0), ("exponential", 0.1, 30.0)):
        torch.testing.assert_close(BETAS[name].beta(double(0, 1)), double(start, end), rtol=1e-13, atol=0)
    half = double(0.5)
    assert BETAS["linear"].beta(half).item() == pytest.approx(10.05)
    assert BETAS["constant"].beta(double(0, 0.3, 1)).tolist() == pytest.approx([5.05] * 3)
    assert BETAS["power"].beta(half).item() == pytest.approx(((math.sqrt(0.1) + math.sqrt(20.0)) / 2) ** 2)
    assert BETAS["exponential"].beta(half).item() == pytest.approx(math.sqrt(0.1 * 30.0))


def test_cosine_schedule_against_the_discrete_one():
    """ᾱ(t) = cos²(½π (t+s)/(1+s))/cos²(½π s/(1+s)) below the clipping time; β_i = min(1 − ᾱ_i/ᾱ_{i−1}, 0.999)."""

    def alpha_bar(t):
        return np.cos(0.5 * np.pi * (t + 0.008) / 1.008) ** 2 / np.cos(0.5 * np.pi * 0.008 / 1.008) ** 2

    t = torch.linspace(0, 0.99, 100, dtype=torch.float64)
    np.testing.assert_allclose(VP(BETAS["cosine"]).mean_coefficient(t) ** 2, alpha_bar(t.numpy()), rtol=1e-10)
    assert 0.99 < BETAS["cosine"].clipping_time < 1 and 0.89 < BETAS["cosine_20"].clipping_time < 0.91
    for schedule in (BETAS["cosine"], BETAS["cosine_20"]):
        late = torch.linspace(schedule.clipping_time, 1, 5, dtype=torch.float64)
        assert (schedule.beta(late) == schedule.beta_max).all()
        before = double(schedule.clipping_time * (1 - 1e-12))
        assert schedule.beta(before).item() == pytest.approx(schedule.beta_max, rel=1e-6)  # continuous
    n = 1000
    beta = np.minimum(1 - alpha_bar(np.arange(1, n + 1) / n) / alpha_bar(np.arange(n) / n), 0.999)
    ladder = VP(BETAS["cosine"]).ladder(n)
    # An Euler chain of the same β at neighbouring times: equal to first order in 1/N away from the pole.
    np.testing.assert_allclose(ladder.mean_coefficient[:900].numpy() ** 2, np.cumprod(1 - beta)[:900], rtol=3e-2)


@pytest.mark.parametrize("name", SIGMAS)
def test_network_sees_the_noise_level_of_its_schedule(name):
    sde, t = VE(SIGMAS[name]), torch.linspace(0, 1, 11)
    label, std = NoiseLevel(sde)(t)
    torch.testing.assert_close(label, SIGMAS[name].sigma(t))
    assert torch.equal(label, std)
    label, std = NoiseLevel(sde, 11)(t)
    assert label.tolist() == list(range(10, -1, -1))
    torch.testing.assert_close(std, SIGMAS[name].sigma(t))


@every_sde
def test_weight_of_a_frozen_score(sde):
    """∫ₛᵗ e^{∫ₛᵛ f} g² dv by quadrature; e^{∫ₛᵛ f} is the inverse of the mean coefficient of x_v | x_s."""
    for start, end in ((0.05, 0.1), (0.3, 0.8)):
        s, nodes = double(start), np.polynomial.legendre.leggauss(60)
        v = torch.from_numpy(start + (end - start) * 0.5 * (1 + nodes[0]))
        weights = torch.from_numpy(nodes[1]) * 0.5 * (end - start)
        growth = 1 / sde.transition(s.expand_as(v), v)[0]
        expected = (weights * growth * sde.diffusion(v) ** 2).sum()
        torch.testing.assert_close(sde.frozen_score_weight(s, double(end))[0], expected, rtol=1e-9, atol=0)


@every_sde
def test_time_at_noise_ratio_inverts_the_ratio(sde):
    t = torch.cat([torch.tensor([1e-5, 1e-3], dtype=torch.float64), GRID[1:]])
    torch.testing.assert_close(sde.time_at_noise_ratio(sde.std(t) / sde.mean_coefficient(t)), t, rtol=1e-9, atol=0)


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


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_the_process_at_the_times_of_the_ladder_is_the_chain(name):
    # SMLD: x_i = x_{i−1} + √(σ_i² − σ_{i−1}²) z. DDPM: x_i = √(1 − β_i) x_{i−1} + √β_i z.
    sde, levels = SDES[name], 100
    ladder = sde.ladder(levels)
    torch.testing.assert_close(sde.std(ladder.time), ladder.std, rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.mean_coefficient(ladder.time), ladder.mean_coefficient, rtol=1e-11, atol=0)
    a, b = sde.transition(ladder.time[:-1], ladder.time[1:])
    if name == "ve":
        sigma = torch.from_numpy(np.exp(np.linspace(np.log(0.02), np.log(20.0), levels)))
        expected_a, expected_b = torch.ones(levels - 1).double(), (sigma[1:] ** 2 - sigma[:-1] ** 2).sqrt()
    else:
        beta = torch.linspace(0.1 / levels, 20.0 / levels, levels, dtype=torch.float64)[1:]
        expected_a, expected_b = (1 - beta).sqrt(), beta.sqrt()
    torch.testing.assert_close(a, expected_a, rtol=1e-11, atol=0)
    torch.testing.assert_close(b, expected_b, rtol=1e-10, atol=0)


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


def test_families_by_name():
    for name, family in (("vesde", VE), ("vpsde", VP), ("subvpsde", SubVP), ("user_classes:Family", Family)):
        assert type(made(name)) is family
    one = torch.ones(1, dtype=torch.float64)
    assert made("vesde").std(one).item() == pytest.approx(7.0)
    assert made("vesde").std(0 * one).item() == pytest.approx(0.02)
    for name in ("vpsde", "subvpsde"):
        rate = made(name).drift_rate(torch.tensor([0.0, 1.0]).double())
        torch.testing.assert_close(rate, torch.tensor([0.15, 4.5]).double())


@pytest.mark.parametrize(("family", "schedules"), [("vesde", SIGMA_SCHEDULES), ("subvpsde", BETA_SCHEDULES)])
def test_schedule_by_name(family, schedules):
    """Every name, through the fields of every preset; the empty name is the usual one."""
    model = base_config().model
    for name, schedule in schedules.items():
        chosen = make_sde(family, name, model).schedule
        assert type(chosen) is schedule
        for field in ("sigma_min", "sigma_max", "beta_min", "beta_max", "rho"):
            if hasattr(chosen, field):
                assert getattr(chosen, field) == model[field]
    assert type(make_sde(family, "", model).schedule) is next(iter(schedules.values()))
    harmonic = made("vesde", "user_classes:HarmonicSigma").schedule
    assert harmonic == HarmonicSigma(0.02, 7.0)
    test_sigma_schedules(harmonic)
    test_marginals_solve_the_moment_equations(VE(harmonic))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(family="vpsd"), "training.sde='vpsd': allowed are vesde, vpsde, subvpsde, flow, or module:attribute"),
        (dict(family="vesde", sigma_min=0.0), "model.sigma_min=0.0"),
        (dict(family="vesde", sigma_min=8.0), "sigma_min < sigma_max"),
        (dict(family="vesde", sigma_max=math.inf), "model.sigma_max=inf"),
        (dict(family="vesde", sigma_min=math.nan), "model.sigma_min=nan"),
        (dict(family="vpsde", beta_min=-0.1), "model.beta_min=-0.1"),
        (dict(family="subvpsde", beta_max=0.3), "beta_min < beta_max"),
        (dict(family="vpsde", beta_max=math.nan), "model.beta_max=nan"),
        (dict(family="vesde", schedule="linear"), "model.schedule='linear': allowed are geometric, constant, square_"),
        (dict(family="subvpsde", schedule="geometric"), "model.schedule='geometric': allowed are linear, constant, p"),
        (dict(family="vesde", schedule="math:exp"), "model.schedule='math:exp': must be a dataclass"),
        (dict(family="vesde", schedule="polynomial"), "model.rho is missing: model.schedule='polynomial' needs it"),
        (dict(family="vpsde", schedule="power", rho=2.0, beta_min=0.0), "0 < beta_min < beta_max"),
        (dict(family="vpsde", schedule="cosine", beta_max=0.03), "model.beta_max=0.03: the cosine schedule needs"),
    ],
)
def test_schedules_that_make_no_sense(fields, message):
    with pytest.raises(ValueError) as error:
        made(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


LADDER = tuple(torch.linspace(1e-3, 0.1, 40, dtype=torch.float64).tolist())


@pytest.mark.parametrize("sde", [Flow(StraightPath()), LadderVP(LadderBeta(LADDER))], ids=["flow", "ladder"])
def test_processes_of_other_projects(sde):
    """Drift and diffusion are those of the marginals, and everything else follows from them as for the others."""
    t, h = torch.tensor([0.11, 0.52, 0.83], dtype=torch.float64), 1e-6
    mean, std = sde.mean_coefficient, sde.std
    rate, variance_rate = ((f(t + h) - f(t - h)) / (2 * h) for f in (mean, lambda t: std(t) ** 2))
    torch.testing.assert_close(-sde.drift_rate(t) * mean(t), rate, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        sde.diffusion(t) ** 2 - 2 * sde.drift_rate(t) * std(t) ** 2, variance_rate, rtol=1e-6, atol=0
    )
    s = 0.6 * t
    a, b = sde.transition(s, t)
    torch.testing.assert_close(b**2, std(t) ** 2 - (a * std(s)) ** 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(sde.time_at_noise_ratio(std(t) / mean(t)), t, rtol=1e-9, atol=0)
    v = s + (t - s) * torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
    values = mean(s) / mean(v) * sde.diffusion(v) ** 2
    torch.testing.assert_close(
        sde.frozen_score_weight(s, t),
        torch.trapezoid(values, v, dim=0),
        rtol=1e-4 if sde.name == "vp" else 1e-8,
        atol=0,
    )


def test_ladder_between_its_levels():
    """Levels are Π(1 − β) at i/(N − 1), in single precision too; halfway between two the log-SNR is the mean."""
    sde = LadderVP(LadderBeta(LADDER))
    remaining = torch.cumprod(1 - torch.tensor(LADDER, dtype=torch.float64), 0)
    time, mean, std = sde.ladder(40)
    torch.testing.assert_close(mean**2, remaining, rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2, 1 - remaining, rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.std(time.float()).double(), std, rtol=1e-5, atol=0)
    log_snr = torch.log(remaining / (1 - remaining))
    middle = sde.schedule.integral((time[1:] + time[:-1]) / 2)
    torch.testing.assert_close(-torch.log(torch.expm1(middle)), (log_snr[1:] + log_snr[:-1]) / 2, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"model\.num_scales=9: model\.betas are 40"):
        sde.ladder(9)
    with pytest.raises(ValueError, match=r"model\.betas: need 2 or more numbers between 0 and 1"):
        LadderBeta((0.1, 1.0))
