"""Conditional sampling on Gaussians and mixtures, whose posteriors are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import SDES, affine_law, assert_moments_match, gaussian_2d, mixture_2d
from torch import Tensor

from configs.defaults import base_config
from exact.distributions import Gaussian, GaussianMixture
from experiment.randomness import SampleGenerators, normal_like
from guidance.conditions import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiffusionPosteriorSampling,
    MeasurementProjection,
    PseudoinverseGuidance,
    condition_on_measurement,
)
from guidance.measurements import (
    BlockMean,
    ChannelMean,
    LinearOperator,
    Mask,
    MatrixOperator,
    make_operator,
    radon_transform,
)
from likelihood import LikelihoodEvaluator
from sampling import CountedScore, ODESampler, PCSampler
from sde_lib import SDE, VE, GeometricSigma, expand

every_family = pytest.mark.parametrize("family", SDES)
D = 8


def correlated(sde: SDE, length: float) -> Gaussian:
    """Eight numbers of variance ¼ and correlation e^{−|i−j|/length}, about a mean that is not zero."""
    i = torch.arange(D, dtype=torch.float64)
    distance = (i[:, None] - i[None, :]).abs()
    covariance = torch.exp(-distance / length) if length else torch.eye(D, dtype=torch.float64)
    return Gaussian(sde, 0.5 * torch.sin(i), 0.25 * covariance)


def posterior(data: Gaussian, operator: LinearOperator, y: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of x_0 given y (m,)."""
    a = operator(torch.eye(data.dimension, dtype=torch.float64)).T
    c = data.covariance
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64))
    return data.mean + gain @ (y - a @ data.mean), c - gain @ a @ c


def first_half() -> Mask:
    return Mask(torch.arange(D) < D // 2)


def three_of_eight() -> MatrixOperator:
    generator = torch.Generator().manual_seed(3)
    return MatrixOperator(torch.randn(3, D, generator=generator, dtype=torch.float64) / D**0.5, (D,))


MEASUREMENTS = {
    "half": (first_half, 0.0),
    "half, noisy": (first_half, 0.2),
    "matrix": (three_of_eight, 0.0),
    "matrix, noisy": (three_of_eight, 0.2),
}
every_measurement = pytest.mark.parametrize("measurement", MEASUREMENTS)


def measured(data: Gaussian, measurement: str) -> tuple[LinearOperator, float, Tensor]:
    """An operator, its noise, and a measurement (1, m) of a draw from the data."""
    make, noise_std = MEASUREMENTS[measurement]
    operator = make()
    generator = torch.Generator().manual_seed(5)
    y = operator(data.sample(1, generator))
    return operator, noise_std, y + noise_std * normal_like(y, generator)


def extrapolated_law(
    sample: Callable[[Tensor, int], Tensor], dimension: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``sample(like, num_steps)`` for many steps, from 50 and 100: the samplers are of first
    order (of VP's variance Euler–Maruyama misses 1.5 % in 100 steps, 0.3 % extrapolated)."""
    coarse, fine = (affine_law(lambda like, n=n: sample(like, n), dimension, monkeypatch) for n in (50, 100))
    return 2 * fine[0] - coarse[0], 2 * fine[1] - coarse[1]


# --------------------------------------------------------------------------------------------------- the projection


@every_family
@every_measurement
def test_projected_coordinates_have_the_law_of_the_noised_data(family, measurement):
    """Given y, and as long as it is less noisy than the state, the coordinates are N(α x_0, σ²) about the true ones."""
    sde = SDES[family]
    data = correlated(sde, 1.0)
    make, noise_std = MEASUREMENTS[measurement]
    operator, n = make(), 2000
    generator = torch.Generator().manual_seed(0)
    x0 = data.sample(1, generator)
    y = operator(x0.expand(n, -1))
    y = y + noise_std * normal_like(y, generator)
    projection = MeasurementProjection(sde, operator, y, noise_std)
    for time in (1.0, 0.6, 0.2):
        t = torch.full((n,), time, dtype=torch.float64)
        alpha, std = float(sde.mean_coefficient(t)[0]), float(sde.std(t)[0])
        before = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        after = projection.step(before, t, generator)
        c, c_before = operator.coordinates(after), operator.coordinates(before)
        taken = alpha * noise_std / operator.singular_values.double() <= std
        torch.testing.assert_close(c[:, ~taken], c_before[:, ~taken])
        if taken.any():
            centre = alpha * operator.coordinates(x0)[0, taken]
            assert_moments_match(c[:, taken], centre, std**2 * torch.eye(int(taken.sum()), dtype=torch.float64))
        # What A does not see is not touched.
        hidden = (after - before) - operator.lift(operator.coordinates(after - before))
        assert hidden.abs().max() < 1e-10


@every_family
def test_noisier_measurements_are_left_out_later(family):
    """Without this the test above would be vacuous for noisy measurements: both cases occur."""
    sde = SDES[family]
    std = sde.std(torch.tensor([1.0, sde.sampling_eps], dtype=torch.float64))
    assert std[0] > 0.2 > std[1]


@pytest.mark.parametrize("sampler", ["pc", "pc with corrector", "corrector only", "euler_maruyama", "heun"])
def test_inpainting_of_a_point_mass(sampler):
    """All data at m, so that Tweedie's formula is exact: what is given is kept, what is unknown is m without noise.

    σ_min = 0.3 is the noise that is left in the unknown region if it is not denoised.
    """
    sde = VE(GeometricSigma(0.3, 20.0))
    m = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 4, 4)
    data = Gaussian(sde, m.flatten(), torch.zeros(16, 16))
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[:, :, :2] = True
    operator = Mask(known)
    given = m.expand(5, 1, 4, 4) + 0.25  # not what the data would have: it must come through nevertheless
    projection = MeasurementProjection(sde, operator, operator(given))
    make = {
        "pc": PCSampler(sde, "reverse_diffusion", "none", num_steps=20),
        "pc with corrector": PCSampler(sde, "ancestral_sampling", "langevin", num_steps=20),
        "corrector only": PCSampler(sde, "none", "ald", num_steps=20),
        "euler_maruyama": PCSampler(sde, "euler_maruyama", "none", num_steps=20),
        "heun": ODESampler(sde, "heun", num_steps=20, noise_removal=True),
    }[sampler]
    x = make(data.score, torch.zeros_like(given), torch.Generator().manual_seed(0), projection=projection).x
    torch.testing.assert_close(x[:, known], given[:, known], rtol=0, atol=1e-12)
    torch.testing.assert_close(x[:, ~known], m.expand_as(x)[:, ~known], rtol=0, atol=1e-9)


def test_colourisation_is_replacement_in_a_decoupled_basis():
    """Against an orthonormal basis of the channels whose first vector is grey, and a mask in that basis."""
    sde = SDES["ve"]
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(3, 1), torch.randn(3, 2, generator=generator)], 1).double())

    def decouple(x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, basis)

    def couple(x: Tensor) -> Tensor:
        return torch.einsum("bdhw,cd->bchw", x, basis)

    x, image = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.full((2,), 0.4, dtype=torch.float64)
    operator = ChannelMean((3, 4, 4))
    projected = MeasurementProjection(sde, operator, operator(image)).step(x, t, torch.Generator().manual_seed(7))

    z = normal_like(x, torch.Generator().manual_seed(7))
    known = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    mean, std = sde.marginal(decouple(image), t)
    noised = mean + expand(std, mean) * decouple(z)
    expected = couple(decouple(x) * (1 - known) + noised * known)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "operator",
    [BlockMean((1, 8, 8), 2), radon_transform((1, 8, 8), 5)],
    ids=["super-resolution", "ct"],
)
def test_samples_by_projection_are_consistent(operator):
    sde = SDES["vp"]
    data = Gaussian(sde, torch.zeros(64), torch.eye(64))
    x0 = data.sample(3, torch.Generator().manual_seed(0)).view(3, 1, 8, 8)
    projection = MeasurementProjection(sde, operator, operator(x0))
    sampler = PCSampler(sde, "euler_maruyama", "none", num_steps=10)
    x = sampler(data.score, torch.zeros_like(x0), torch.Generator().manual_seed(0), projection=projection).x
    assert (operator(x) - operator(x0)).norm() < 1e-3 * operator(x0).norm()
    assert (x - x0).norm() > 0.1 * x0.norm()  # the measurement does not determine the image


@every_family
def test_projection_is_exact_where_coordinates_are_independent(family, monkeypatch):
    """Unknown and known parts that know nothing of each other: known exactly as given, unknown as the data."""
    sde = SDES[family]
    variances = torch.linspace(0.2, 1.0, 4, dtype=torch.float64)
    data = Gaussian(sde, torch.linspace(-0.5, 0.5, 4, dtype=torch.float64), torch.diag(variances))
    operator = Mask(torch.tensor([True, False, True, False]))
    y = torch.tensor([0.3, -0.9], dtype=torch.float64)

    def sample(like: Tensor, num_steps: int) -> Tensor:
        projection = MeasurementProjection(sde, operator, y.expand(len(like), -1))
        return PCSampler(sde, "euler_maruyama", "none", num_steps)(data.score, like, projection=projection).x

    mean, covariance = extrapolated_law(sample, 4, monkeypatch)
    true_mean, true_covariance = posterior(data, operator, y, 0.0)
    assert (mean - true_mean).abs().max() < 0.01 and (covariance - true_covariance).abs().max() < 0.01


# ------------------------------------------------------------------------------------------- guidance by a measurement


def pseudoinverse_errors(data: Gaussian, measurement: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Of ΠGDM with the data's variance: mean error in units of ‖posterior mean − prior mean‖, covariance error in units
    of the posterior's."""
    operator, noise_std, y = measured(data, measurement)
    sde = data.sde

    def sample(like: Tensor, num_steps: int) -> Tensor:
        given = y.expand(len(like), -1)
        guided = PseudoinverseGuidance(sde, data.score, operator, given, noise_std, prior_variance=0.25)
        return PCSampler(sde, "euler_maruyama", "none", num_steps)(guided, like).x

    mean, covariance = extrapolated_law(sample, D, monkeypatch)
    true_mean, true_covariance = posterior(data, operator, y[0], noise_std)
    return (
        (mean - true_mean).norm() / (true_mean - data.mean).norm(),
        (covariance - true_covariance).norm() / true_covariance.norm(),
    )


@every_family
@every_measurement
def test_pseudoinverse_guidance_is_exact_for_white_data(family, measurement, monkeypatch):
    """Data of one variance in all directions: r_t² is then the truth."""
    errors = pseudoinverse_errors(correlated(SDES[family], 0.0), measurement, monkeypatch)
    assert max(errors) < 0.01


@every_family
@every_measurement
def test_pseudoinverse_guidance_is_nearly_right_for_correlated_data(family, measurement, monkeypatch):
    mean_error, _ = pseudoinverse_errors(correlated(SDES[family], 1.0), measurement, monkeypatch)
    assert mean_error < 0.05


def test_pseudoinverse_guidance_bears_a_network_that_is_a_little_wrong():
    """A score that at much noise is off by 0.3 of its own size: its x̂_0 then depends on x_t a hundred times as much as
    it should, and guidance by that derivative is bounded or drives the samples to infinity."""
    sde = SDES["ve"]
    data = correlated(sde, 1.0)
    operator, noise_std, y = measured(data, "half")

    def score(x: Tensor, t: Tensor) -> Tensor:
        return data.score(x, t) + 0.3 * x.roll(1, dims=1) / (expand(sde.std(t), x) ** 2 + 25)

    guided = PseudoinverseGuidance(sde, score, operator, y.expand(100, -1), noise_std, prior_variance=0.25)
    sampler = PCSampler(sde, "reverse_diffusion", "none", num_steps=100)
    x = sampler(guided, torch.zeros(100, D, dtype=torch.float64), torch.Generator().manual_seed(0)).x
    assert (operator(x) - y).abs().max() < 0.1
    mean, covariance = posterior(data, operator, y[0], noise_std)
    assert ((x - mean) ** 2).sum(1).mean() < 2 * covariance.trace()
    guided.TRUST = torch.inf
    x = sampler(guided, torch.zeros(100, D, dtype=torch.float64), torch.Generator().manual_seed(0)).x
    assert not x.abs().max() < 100


def test_pseudoinverse_guidance_in_the_probability_flow():
    """Heun and the solver with a step size per sample, on white data: the mean of 2000 samples, deterministic but for
    the prior."""
    sde = SDES["vp"]
    data = correlated(sde, 0.0)
    operator, noise_std, y = measured(data, "matrix, noisy")
    n = 2000
    guided = PseudoinverseGuidance(sde, data.score, operator, y.expand(n, -1), noise_std, prior_variance=0.25)
    mean, covariance = posterior(data, operator, y[0], noise_std)
    for solver in ("heun", "rk45"):
        sampler = ODESampler(sde, solver, rtol=1e-4, atol=1e-4, num_steps=60)
        x = sampler(guided, torch.zeros(n, D, dtype=torch.float64), torch.Generator().manual_seed(0)).x
        assert_moments_match(x, mean, covariance, allowance=0.03)


@every_family
def test_diffusion_posterior_sampling_makes_the_move_of_its_algorithm(family):
    """With a Gaussian's score x̂_0 = m + G (x − αm) and ∇‖r‖ = −GᵀAᵀ r/‖r‖ in closed form."""
    sde = SDES[family]
    data = correlated(sde, 1.0)
    operator, _, y = measured(data, "matrix")
    zeta, n = 0.3, 3
    dps = DiffusionPosteriorSampling(sde, data.score, operator, y.expand(n, -1), step_size=zeta)
    x, t = torch.randn(n, D, dtype=torch.float64), torch.linspace(0.2, 0.9, n, dtype=torch.float64)
    assert torch.equal(dps.step(x, t, None), x)  # no step has been made yet
    torch.testing.assert_close(dps(x, t), data.score(x, t))
    after_predictor = torch.randn(n, D, dtype=torch.float64)
    moved = dps.step(after_predictor, t, None)
    a = operator(torch.eye(D, dtype=torch.float64)).T
    for i in range(n):
        alpha, std = float(sde.mean_coefficient(t)[i]), float(sde.std(t)[i])
        gain = (
            alpha
            * data.covariance
            @ torch.linalg.inv(alpha**2 * data.covariance + std**2 * torch.eye(D, dtype=torch.float64))
        )
        residual = y[0] - a @ (data.mean + gain @ (x[i] - alpha * data.mean))
        # −ζ/‖r‖ ∇‖r‖² = 2ζ GᵀAᵀ r/‖r‖
        expected = after_predictor[i] + 2 * zeta * gain.T @ a.T @ residual / residual.norm()
        torch.testing.assert_close(moved[i], expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(dps.step(x, t, None), x)  # one move per step


def test_diffusion_posterior_sampling_follows_the_measurement():
    """1000 samples at a small ζ: the residual is far below an unconditional sample's, and the mean near the truth."""
    sde = SDES["ve"]
    data = correlated(sde, 1.0)
    operator, _, y = measured(data, "half")
    given, like = y.expand(1000, -1), torch.zeros(1000, D, dtype=torch.float64)
    dps = DiffusionPosteriorSampling(sde, data.score, operator, given, step_size=0.05)
    sampler = PCSampler(sde, "ancestral_sampling", "none", num_steps=200)
    x = sampler(dps, like, torch.Generator().manual_seed(0), projection=dps).x
    free = sampler(data.score, like, torch.Generator().manual_seed(0)).x
    assert (operator(x) - given).norm() < 0.2 * (operator(free) - given).norm()
    mean, covariance = posterior(data, operator, y[0], 0.0)
    standard_error = (covariance.trace() / len(x)).sqrt() / (mean - data.mean).norm()
    assert (x.mean(0) - mean).norm() / (mean - data.mean).norm() < 0.15 + 4 * standard_error


# --------------------------------------------------------------------------------------------------- guidance by class


def classes(sde: SDE) -> list[GaussianMixture]:
    """The three components of a mixture as two classes: {0, 2} and {1}."""
    whole = mixture_2d(sde)
    return [
        GaussianMixture(sde, whole.weights[k] / whole.weights[k].sum(), whole.means[k], whole.covariances[k])
        for k in ([0, 2], [1])
    ]


def class_log_probs(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """Exact log p(c | x, t) (B, 2), up to a constant per row."""
    prior = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    joint = torch.stack([c.log_prob(x, t) for c in classes(sde)], 1) + prior
    return joint - joint.logsumexp(1, keepdim=True)


@every_family
def test_classifier_guidance_with_the_exact_classifier_is_the_conditional_score(family):
    sde = SDES[family]
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.linspace(0.05, 1, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    whole = mixture_2d(sde)
    conditional = torch.stack([classes(sde)[c].score(x, t)[i] for i, c in enumerate(labels.tolist())])

    def log_probs(x, t):
        return class_log_probs(sde, x, t)

    guided = ClassifierGuidance(whole.score, log_probs, labels)
    torch.testing.assert_close(guided(x, t), conditional, rtol=1e-7, atol=1e-9)
    twice = ClassifierGuidance(whole.score, log_probs, labels, weight=2.0)
    torch.testing.assert_close(twice(x, t), 2 * conditional - whole.score(x, t), rtol=1e-7, atol=1e-9)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(guided(x[rows], t[rows], rows), conditional[rows], rtol=1e-7, atol=1e-9)


def label_score(sde: SDE):
    """The exact s(x, t, c), with 2 for no class."""
    scores = [*(c.score for c in classes(sde)), mixture_2d(sde).score]

    def score(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        every = torch.stack([s(x, t) for s in scores])
        return every[labels, torch.arange(len(x))]

    return score


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_classifier_free_guidance(weight):
    sde = SDES["vp"]
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.linspace(0.1, 1, 4, dtype=torch.float64)
    labels, score = torch.tensor([0, 1, 1, 0]), label_score(sde)
    guided = ClassifierFreeGuidance(score, labels, 2, weight=weight)
    without, wanted = score(x, t, torch.full_like(labels, 2)), score(x, t, labels)
    torch.testing.assert_close(guided(x, t), without + weight * (wanted - without), rtol=1e-12, atol=1e-12)
    counted = CountedScore(guided)
    counted(x, t)
    assert counted.evaluations == (8 if weight == 2.5 else 4)


@every_family
def test_class_conditional_samples_have_the_moments_of_the_class(family):
    """1000 samples of each class from one call, by classifier and classifier-free; the classes alternate."""
    sde = SDES[family]
    n = 2000
    labels = torch.arange(n) % 2
    sampler = PCSampler(sde, "euler_maruyama", "none", num_steps=100)
    for guided in (
        ClassifierGuidance(mixture_2d(sde).score, lambda x, t: class_log_probs(sde, x, t), labels),
        ClassifierFreeGuidance(label_score(sde), labels, 2),
    ):
        x = sampler(guided, torch.zeros(n, 2, dtype=torch.float64), torch.Generator().manual_seed(0)).x
        for c, law in enumerate(classes(sde)):
            mean = law.weights @ law.means
            spread = law.means - mean
            second = law.covariances + spread[:, :, None] * spread[:, None, :]
            covariance = (law.weights[:, None, None] * second).sum(0)
            # The standard errors are a Gaussian's; a mixture of two has larger ones of its covariance. Allowance for
            # that, and for the first-order error of 100 steps.
            assert_moments_match(x[labels == c], mean, covariance, allowance=0.08)


def test_every_sample_keeps_its_own_class_when_others_have_arrived():
    """The solver with a step size per sample drops rows as they arrive: a batch gives what its samples give alone."""
    sde = SDES["vp"]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    sampler = ODESampler(sde, "rk45", rtol=1e-5, atol=1e-5)

    def sample(chosen: list[int]) -> Tensor:
        guided = ClassifierFreeGuidance(label_score(sde), labels[chosen], 2)
        like = torch.zeros(len(chosen), 2, dtype=torch.float64)
        return sampler(guided, like, SampleGenerators((0, "samples"), chosen)).x

    together = sample(list(range(6)))
    for i in range(6):
        torch.testing.assert_close(sample([i])[0], together[i], rtol=1e-9, atol=1e-9)


def test_likelihood_given_the_class():
    """Points of two classes in one batch, each under its own class's density."""
    sde = SDES["vp"]
    labels = torch.tensor([0, 1, 0, 1])
    x = torch.cat([c.sample(2, torch.Generator().manual_seed(i)) for i, c in enumerate(classes(sde))])[[0, 2, 1, 3]]
    evaluate = LikelihoodEvaluator(sde, divergence="exact", rtol=1e-6, atol=1e-6)
    log_prob = evaluate(ClassifierFreeGuidance(label_score(sde), labels, 2), x).log_prob
    t = torch.full((4,), 1e-5, dtype=torch.float64)
    exact = torch.stack([classes(sde)[c].log_prob(x[i : i + 1], t[:1])[0] for i, c in enumerate(labels.tolist())])
    torch.testing.assert_close(log_prob, exact, rtol=0, atol=5e-3)


# -------------------------------------------------------------------------------------------------------- the one loop


class Recorder:
    """A projection that changes nothing and records the times it is called at; None is the end."""

    def __init__(self) -> None:
        self.times: list[float | None] = []

    def step(self, x: Tensor, t: Tensor, generator) -> Tensor:
        self.times.append(round(float(t[0]), 3))
        return x

    def finish(self, x: Tensor) -> Tensor:
        self.times.append(None)
        return x


@pytest.mark.parametrize(
    ("sampler", "times"),
    [
        (lambda sde: PCSampler(sde, "reverse_diffusion", "none", 2), [1.0, 0.5, 0.0, None]),
        (lambda sde: PCSampler(sde, "reverse_diffusion", "ald", 2), [1.0, 1.0, 0.5, 0.5, 0.0, None]),
        (lambda sde: PCSampler(sde, "none", "ald", 2), [1.0, 1.0, 0.0, None]),
        (lambda sde: ODESampler(sde, "heun", num_steps=2), [1.0, 0.5, 0.0, None]),
    ],
    ids=["predictor", "predictor and corrector", "corrector", "heun"],
)
def test_the_projection_follows_every_step_at_the_time_of_the_state(sampler, times):
    data = gaussian_2d(SDES["ve"])
    recorder = Recorder()
    like = torch.zeros(3, 2, dtype=torch.float64)
    with_it = sampler(data.sde)(data.score, like, torch.Generator().manual_seed(0), projection=recorder)
    assert recorder.times == times
    without = sampler(data.sde)(data.score, like, torch.Generator().manual_seed(0))
    torch.testing.assert_close(with_it.x, without.x, rtol=1e-9, atol=1e-9)
    assert with_it.nfe == without.nfe


def test_a_sample_depends_on_its_own_stream_alone():
    """A batch under a projection gives what its samples give alone."""
    sde = SDES["ve"]
    data = correlated(sde, 1.0)
    operator, _, _ = measured(data, "half")
    y = operator(data.sample(5, torch.Generator().manual_seed(0)))
    sampler = PCSampler(sde, "reverse_diffusion", "ald", num_steps=8)

    def sample(chosen: list[int]) -> Tensor:
        projection = MeasurementProjection(sde, operator, y[chosen])
        like = torch.zeros(len(chosen), D, dtype=torch.float64)
        return sampler(data.score, like, SampleGenerators((0, "samples"), chosen), projection=projection).x

    together = sample([0, 1, 2, 3, 4])
    torch.testing.assert_close(torch.cat([sample([3, 1]), sample([4])]), together[[3, 1, 4]], rtol=1e-9, atol=1e-9)


def test_projections_are_for_fixed_steps():
    sde = SDES["ve"]
    data = gaussian_2d(sde)
    projection = MeasurementProjection(sde, Mask(torch.tensor([True, False])), torch.zeros(1, 1))
    for solver in ("rk45", "adams"):
        with pytest.raises(ValueError, match=rf"sampling\.solver='{solver}': a projection follows every step"):
            ODESampler(sde, solver)(data.score, torch.zeros(1, 2), projection=projection)


# ------------------------------------------------------------------------------------------------------------- options


def test_conditions_by_name_and_import_path():
    data = correlated(SDES["ve"], 1.0)
    options = dict(base_config().sampling) | dict(condition="user_classes:first_row", measurement_noise=0.2)
    options |= dict(guidance_weight=0.5, conditioning="pigdm")
    operator = make_operator(options, (1, 2, 4))
    x = torch.arange(8.0).view(1, 1, 2, 4)
    y = operator(x)
    assert y.tolist() == [[0, 1, 2, 3]]
    given = data.sde, data.score, operator, y
    score, projection = condition_on_measurement(options, *given, prior_variance=0.3)
    assert score == PseudoinverseGuidance(*given, 0.2, 0.3, 0.5) and projection is None
    score, projection = condition_on_measurement(options | dict(conditioning="dps"), *given, prior_variance=0.3)
    assert score is projection and score == DiffusionPosteriorSampling(*given, 0.5)
    projected = condition_on_measurement(options | dict(conditioning="projection"), *given, prior_variance=0.3)
    assert projected == (data.score, MeasurementProjection(data.sde, operator, y, 0.2))
