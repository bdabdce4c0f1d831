"""Likelihoods of Gaussians and mixtures against their exact densities; bits per dimension; what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, Gaussian, gaussian_2d, mixture_2d
from torch import Tensor, nn

import likelihood
from configs.defaults import base_config
from data import DataFormat
from experiment.randomness import SampleGenerators
from likelihood import DIVERGENCES, TIMES, LikelihoodEvaluator, bits_per_dim
from models.score import NoiseLevel, UnconstrainedScore
from ode import SOLVERS

EPS = 1e-5
every_family = pytest.mark.parametrize("family", SDES)


def times(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float64)


def evaluator(family: str, divergence: str = "exact", **settings) -> LikelihoodEvaluator:
    return LikelihoodEvaluator(SDES[family], divergence=divergence, **dict(rtol=1e-8, atol=1e-8) | settings)


def with_the_exact_prior(result, oracle, sde) -> Tensor:
    """ln p_eps as it would be had the flow ended in the exact noised density at t = 1 rather than in the prior."""
    latent = result.latent
    return result.log_prob - sde.prior_log_prob(latent) + oracle.log_prob(latent, times(1.0, latent))


# ------------------------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("oracle", [gaussian_2d, mixture_2d])
@every_family
def test_oracles_are_consistent(family, oracle):
    # Score and divergence by automatic differentiation of the log-density, which itself integrates to one.
    oracle = oracle(SDES[family])
    x = torch.randn(6, 2, dtype=torch.float64).requires_grad_()
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), x, create_graph=True)
    torch.testing.assert_close(oracle.score(x, t), gradient, rtol=1e-9, atol=1e-10)
    divergence = sum(torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    torch.testing.assert_close(oracle.divergence(x, t), divergence, rtol=1e-8, atol=1e-9)
    axis = torch.linspace(-8, 8, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = oracle.log_prob(grid, times(0.1, grid)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-6)


@every_family
def test_likelihood_of_a_gaussian(family):
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(8, torch.Generator().manual_seed(0))
    result = evaluator(family)(gaussian.score, x)
    exact = gaussian.log_prob(x, times(EPS, x))
    torch.testing.assert_close(with_the_exact_prior(result, gaussian, sde), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.latent, gaussian.flow(x, times(EPS, x), times(1.0, x)), rtol=1e-6, atol=1e-6)
    # As it stands the result differs by the prior's mismatch: that of N(m, C + σ²) from N(0, σ²), or of α(1) = 0.007.
    mismatch = sde.prior_log_prob(result.latent) - gaussian.log_prob(result.latent, times(1.0, x))
    torch.testing.assert_close(result.log_prob, exact + mismatch, rtol=0, atol=1e-5)
    assert (result.log_prob - exact).abs().max() < 0.1


@every_family
def test_likelihood_of_a_mixture(family):
    sde = SDES[family]
    mixture = mixture_2d(sde)
    x = 1.5 * torch.randn(8, 2, dtype=torch.float64)
    result = evaluator(family)(mixture.score, x)
    exact = mixture.log_prob(x, times(EPS, x))
    torch.testing.assert_close(with_the_exact_prior(result, mixture, sde), exact, rtol=0, atol=1e-4)


def test_likelihood_without_any_correction():
    # A centred Gaussian under VP, whose noised density at t = 1 is the prior up to α² = 4e-5.
    gaussian = Gaussian(SDES["vp"], torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 0.6]]))
    x = gaussian.sample(8, torch.Generator().manual_seed(0))
    result = evaluator("vp")(gaussian.score, x)
    torch.testing.assert_close(result.log_prob, gaussian.log_prob(x, times(EPS, x)), rtol=0, atol=1e-3)


def test_density_integrates_to_one():
    # What is reported is the pull-back of a density by an invertible map, so whatever the score it integrates to one.
    sde = SDES["vp"]
    axis = torch.linspace(-6, 6, 31, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x + 0.3 * torch.sin(x.flip(1)) * torch.tensor([1.0, -2.0])

    result = LikelihoodEvaluator(sde, divergence="exact", rtol=1e-5, atol=1e-5, eps=0.3)(score, grid)
    assert (result.log_prob.exp().sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(solver):
    sde = SDES["vp"]
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(3, torch.Generator().manual_seed(0))
    for time in TIMES:
        # Over t the rate at t = eps is 5e4, more than steps of equal size can take.
        if solver == "adams" and time == "t":
            continue
        evaluate = evaluator("vp", solver=solver, time=time, rtol=1e-6, atol=1e-6, num_steps=250)
        result = evaluate(gaussian.score, x)
        exact = gaussian.log_prob(x, times(EPS, x))
        torch.testing.assert_close(with_the_exact_prior(result, gaussian, sde), exact, rtol=0, atol=1e-3)


@every_family
def test_gaussian_in_the_logarithm_of_the_ratio(family):
    # By the default scheme, in the default number of steps, to five digits and more.
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(8, torch.Generator().manual_seed(0))
    result = evaluator(family, time="log_ratio", solver="adams", num_steps=160)(gaussian.score, x)
    exact = gaussian.log_prob(x, times(EPS, x))
    torch.testing.assert_close(with_the_exact_prior(result, gaussian, sde), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.latent, gaussian.flow(x, times(EPS, x), times(1.0, x)), rtol=1e-5, atol=1e-5)
    assert result.nfe == 170


@pytest.mark.parametrize(("family", "solver", "order"), [*((family, "adams", 4) for family in SDES), ("vp", "heun", 2)])
def test_order_in_the_logarithm_of_the_ratio(family, solver, order):
    sde = SDES[family]
    mixture = mixture_2d(sde)
    x = 1.5 * torch.randn(8, 2, dtype=torch.float64)
    exact = mixture.log_prob(x, times(EPS, x))
    errors = []
    for steps in (160, 320):
        result = evaluator(family, time="log_ratio", solver=solver, num_steps=steps)(mixture.score, x)
        errors.append((with_the_exact_prior(result, mixture, sde) - exact).square().mean().sqrt().item())
    assert errors[-1] < 1e-3
    assert math.log2(errors[0] / errors[-1]) > order - 0.25, errors


@every_family
def test_white_data_stand_still_in_the_logarithm_of_the_ratio(family):
    # Of standard deviation ½: the velocity is zero, so that one step of any solver is exact.
    sde = SDES[family]
    gaussian = Gaussian(sde, torch.zeros(3), 0.25 * torch.eye(3))
    x = gaussian.sample(5, torch.Generator().manual_seed(0))
    result = evaluator(family, time="log_ratio", solver="heun", num_steps=1)(gaussian.score, x)
    exact = gaussian.log_prob(x, times(EPS, x))
    torch.testing.assert_close(with_the_exact_prior(result, gaussian, sde), exact, rtol=0, atol=1e-9)


def test_no_score_is_asked_for_beyond_the_ends():
    for family, sde in SDES.items():
        seen = []

        def score(x: Tensor, t: Tensor, seen=seen) -> Tensor:
            seen.extend(t.tolist())
            return -x

        x = torch.randn(2, 2, dtype=torch.float64)
        LikelihoodEvaluator(sde, time="log_ratio", solver="adams", num_steps=9)(score, x)
        assert min(seen) == pytest.approx(EPS, rel=1e-6) and min(seen) >= EPS, family
        assert max(seen) == pytest.approx(1.0, rel=1e-9) and max(seen) <= 1, family


def test_several_probes_are_the_mean_of_one_each():
    # The score is linear, so that the path does not depend on the probes. One evaluation of the score for all of them.
    sde = SDES["vp"]
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(4, torch.Generator().manual_seed(0))
    settings = dict(time="log_ratio", solver="adams", num_steps=20)
    three = evaluator("vp", "gaussian", probes=3, **settings)(gaussian.score, x, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    one_each = [evaluator("vp", "gaussian", **settings)(gaussian.score, x, generator) for _ in range(3)]
    mean = torch.stack([one.log_prob for one in one_each]).mean(0)
    torch.testing.assert_close(three.log_prob, mean, rtol=1e-9, atol=1e-9)
    assert three.nfe == one_each[0].nfe == 30
    assert (three.log_prob - one_each[0].log_prob).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("divergence", "probes", "tolerance"), [("rademacher", 1500, 1e-6), ("gaussian", 20_000, 1e-3)]
)
def test_hutchinson_is_unbiased(divergence, probes, tolerance):
    # One point, many probes: the mean of their estimates is exact within four standard errors (3e-4 nats for
    # Rademacher, 0.07 for Gaussian probes, whose own length varies), plus the tolerance of the solver.
    mixture = mixture_2d(SDES["vp"])
    point = torch.tensor([[0.4, 0.2]], dtype=torch.float64)
    evaluate = evaluator("vp", divergence, rtol=tolerance, atol=tolerance)
    estimates = evaluate(mixture.score, point.expand(probes, 2), torch.Generator().manual_seed(0)).log_prob
    exact = evaluator("vp")(mixture.score, point).log_prob
    standard_error = estimates.std() / probes**0.5
    assert 1e-4 < standard_error < 0.1
    assert abs(estimates.mean() - exact) < 4 * standard_error + 10 * tolerance


def test_probes_are_of_the_kind_asked_for():
    # A score with a diagonal Jacobian: Rademacher probes give its trace without error, Gaussian ones do not.
    sde = SDES["vp"]
    gaussian = Gaussian(sde, torch.zeros(2), torch.diag(torch.tensor([0.5, 2.0])))
    x = gaussian.sample(4, torch.Generator().manual_seed(0))
    exact, rademacher, normal = (
        evaluator("vp", kind)(gaussian.score, x, torch.Generator().manual_seed(1)).log_prob
        for kind in ("exact", "rademacher", "gaussian")
    )
    torch.testing.assert_close(rademacher, exact, rtol=0, atol=1e-5)
    assert (normal - exact).abs().min() > 1e-3


# -------------------------------------------------------------------------------------------------- bits per dimension


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("centered", [False, True])
def test_bits_of_a_uniform_density_are_log2_of_the_levels(levels, centered):
    dimension = 48
    log_prob = torch.full((3,), -dimension * math.log(2.0 if centered else 1.0), dtype=torch.float64)
    bits = bits_per_dim(log_prob, dimension, DataFormat((1,), levels, None, centered, True).log2_unit)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("centered", [False, True])
def test_bits_of_a_discrete_distribution_are_its_code_length(levels, centered):
    # A density that is constant on cells, p_k divided by the cell's width, is the best model of dequantised data.
    probabilities = torch.rand(levels, dtype=torch.float64).softmax(0)
    pixels = torch.randint(levels, (5, 7), generator=torch.Generator().manual_seed(0))
    width = (2.0 if centered else 1.0) / levels
    log_prob = torch.log(probabilities[pixels] / width).sum(1)
    bits = bits_per_dim(log_prob, 7, DataFormat((7,), levels, None, centered, True).log2_unit)
    torch.testing.assert_close(bits, -torch.log2(probabilities[pixels]).mean(1), rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------- cost, independence


class CountedNetwork(nn.Module):
    """A smooth network of a few weights that counts its forward calls and the samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8, dtype=torch.float64)
        self.calls = self.samples = 0

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        return torch.tanh(self.mix(x.flatten(1))).view_as(x) + x


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("solver", ["rk45", "heun"])
def test_one_evaluation_of_the_network_per_velocity(divergence, solver, monkeypatch):
    velocities = 0

    def counting_integrate(velocity, *args, **settings):
        def counted(*state):
            nonlocal velocities
            velocities += 1
            return velocity(*state)

        return integrate(counted, *args, **settings)

    integrate = likelihood.integrate
    monkeypatch.setattr(likelihood, "integrate", counting_integrate)
    network = CountedNetwork()
    model = UnconstrainedScore(network, NoiseLevel(SDES["vp"]))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    result = evaluator("vp", divergence, solver=solver, rtol=1e-3, atol=1e-3, num_steps=5)(model, x)
    assert network.calls == velocities > 0
    assert result.nfe == network.samples / 3
    if solver == "heun":
        assert result.nfe == 10
    assert result.log_prob.shape == (3,) and result.latent.shape == x.shape
    assert not result.log_prob.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_likelihood_does_not_depend_on_its_batch(divergence):
    mixture = mixture_2d(SDES["ve"])
    x = torch.randn(8, 2, dtype=torch.float64)
    evaluate = evaluator("ve", divergence, rtol=1e-4, atol=1e-4)

    def in_batches(size: int) -> Tensor:
        parts = []
        for start in range(0, 8, size):
            indices = range(start, min(start + size, 8))
            parts.append(evaluate(mixture.score, x[indices], SampleGenerators((1, "probe"), indices)).log_prob)
        return torch.cat(parts)

    for size in (1, 7):
        torch.testing.assert_close(in_batches(size), in_batches(8), rtol=0, atol=1e-9)


def test_single_precision_data_in_double_precision_steps(monkeypatch):
    gaussian = gaussian_2d(SDES["vp"])
    x = gaussian.sample(5, torch.Generator().manual_seed(0))

    def single_precision_score(y: Tensor, t: Tensor) -> Tensor:
        assert y.dtype == t.dtype == torch.float32
        return gaussian.score(y.double(), t.double()).float()

    def checked_integrate(velocity, y: Tensor, *args, **settings):
        assert y.dtype == torch.float64
        return integrate(velocity, y, *args, **settings)

    integrate = likelihood.integrate
    monkeypatch.setattr(likelihood, "integrate", checked_integrate)
    double = evaluator("vp", rtol=1e-4, atol=1e-4)(gaussian.score, x)
    single = evaluator("vp", rtol=1e-4, atol=1e-4)(single_precision_score, x.float())
    assert single.latent.dtype == torch.float32
    torch.testing.assert_close(single.log_prob.double(), double.log_prob, rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------------------------------------- options


def test_an_evaluator_describes_itself():
    sde = SDES["vp"]
    assert str(LikelihoodEvaluator(sde, **base_config().likelihood)) == (
        "rademacher divergence, adams in ln(σ/α), 160 steps"
    )
    several = LikelihoodEvaluator(sde, divergence="gaussian", probes=2, solver="rk45", rtol=1e-2)
    assert str(several) == "gaussian divergence, 2 probes, rk45, rtol 0.01, atol 1e-05"
    assert (
        str(LikelihoodEvaluator(sde, divergence="exact", probes=2)) == "exact divergence, rk45, rtol 0.001, atol 1e-05"
    )


def test_import_paths():
    """An import path stands for what a name stands for."""
    x = torch.randn(3, 2, dtype=torch.float64)
    values = [
        evaluator("vp", divergence, time=time, solver="adams", num_steps=20)(
            gaussian_2d(SDES["vp"]).score, x, torch.Generator().manual_seed(0)
        ).log_prob
        for divergence, time in (("gaussian", "t"), ("experiment.randomness:normal_like", "likelihood:Time"))
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(divergence="hutchinson"), "likelihood.divergence='hutchinson': allowed are rademacher, gaussian, exact"),
        (dict(solver="euler"), "likelihood.solver='euler': allowed are rk45, heun, adams"),
        (dict(solver="adams", num_steps=0), "likelihood.num_steps=0: likelihood.solver='adams' needs at least 1"),
        (dict(time="log_snr"), "likelihood.time='log_snr': allowed are t, log_ratio"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError) as error:
        LikelihoodEvaluator(SDES["vp"], **fields)
    assert message in str(error.value) and "\n" not in str(error.value)
