"""Training losses against hand computations, closed forms for Gaussian data, and the textbook's discrete losses."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, Gaussian, gaussian_2d
from scipy.integrate import quad
from torch import Tensor, nn

import losses
from configs.defaults import base_config
from configs.qcsbm.cifar10 import get_config
from conservativeness import asymmetry
from experiment.randomness import SampleGenerators, rademacher_like
from losses import Objective, make_objective
from models.score import ConservativeScore, NoiseLevel, ScoreModel, UnconstrainedScore

every_family = pytest.mark.parametrize("family", SDES)


class Network(nn.Module):
    """A smooth network in double precision that records what it is given; samples (B, 1, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        self.inputs: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.inputs.append((x.detach(), label, class_labels))
        features = torch.cat([x.flatten(1), torch.log1p(label.to(x.dtype))[:, None]], dim=1)
        return self.layers(features).view_as(x)


class Exact(ScoreModel):
    """A closed-form score in place of a network, multiplied by a factor."""

    def __init__(self, gaussian: Gaussian, factor: float = 1.0) -> None:
        super().__init__(nn.Identity(), NoiseLevel(gaussian.sde))
        self.gaussian, self.factor = gaussian, factor

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.factor * self.gaussian.score(x, t)


def model(family: str, num_scales: int | None = None) -> UnconstrainedScore:
    return UnconstrainedScore(Network(), NoiseLevel(SDES[family], num_scales))


def data(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(x0: Tensor) -> tuple[Tensor, Tensor, torch.Generator]:
    """What an objective draws from ``seeded()``: uniforms for the times, noise, and then the probes."""
    generator = seeded()
    u = torch.rand(len(x0), generator=generator, dtype=torch.float64)
    return u, torch.randn(x0.shape, generator=generator, dtype=torch.float64), generator


def per_sample(coefficient: Tensor) -> Tensor:
    return coefficient[:, None, None, None]


# ---------------------------------------------------------------------------------------------- continuous time


@every_family
@pytest.mark.parametrize("likelihood_weighting", [False, True])
@pytest.mark.parametrize("reduce_mean", [False, True])
def test_score_matching_loss_by_hand(family, likelihood_weighting, reduce_mean):
    sde, x0, score = SDES[family], data(), model(family)
    objective = Objective(score, likelihood_weighting=likelihood_weighting, reduce_mean=reduce_mean)
    terms = objective(x0, seeded())
    u, z, _ = draws(x0)
    t = 1e-5 + u * (1 - 1e-5)
    xt = per_sample(sde.mean_coefficient(t)) * x0 + per_sample(sde.std(t)) * z
    # λ ‖s(x_t, t) − ∇ log p(x_t | x_0)‖² with ∇ log p(x_t | x_0) = −z/σ.
    squared = ((score(xt, t) + z / per_sample(sde.std(t))) ** 2).sum((1, 2, 3))
    weight = sde.diffusion(t) ** 2 if likelihood_weighting else sde.std(t) ** 2
    expected = (weight * squared).mean() * (1 / 4 if reduce_mean else 1 / 2)
    torch.testing.assert_close(terms["dsm"], expected, rtol=1e-9, atol=0)
    assert set(terms) == {"loss", "dsm"} and torch.equal(terms["loss"], terms["dsm"])


@every_family
def test_smallest_and_largest_time(family, monkeypatch):
    asked = []

    class Recording(Exact):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            asked.extend(t.tolist())
            return super().forward(x, t)

    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(losses, "uniform", lambda shape, generator, **kwargs: extremes)
    terms = Objective(Recording(gaussian_2d(SDES[family])))(torch.zeros(2, 2, dtype=torch.float64))
    assert asked == pytest.approx([1e-5, 1.0], rel=1e-12)
    assert torch.isfinite(terms["loss"])


@every_family
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_expected_loss_of_the_exact_score(family, likelihood_weighting, monkeypatch):
    # E‖σs + z‖² = Σ_i α²λ_i/(α²λ_i + σ²) over the spectrum λ of the data's covariance; then the mean over t.
    sde = SDES[family]
    gaussian = gaussian_2d(sde)

    def expectation(factor: float) -> float:
        def integrand(t: float) -> float:
            time = torch.tensor(t, dtype=torch.float64)
            alpha, sigma = sde.mean_coefficient(time), sde.std(time)
            variance = alpha**2 * gaussian.spectrum + sigma**2
            # ‖σ·cs + z‖² for a score c·s: D + (c² − 2c) Σ σ²/variance.
            value = 2 + (factor**2 - 2 * factor) * (sigma**2 / variance).sum()
            return 0.5 * (value * (sde.diffusion(time) ** 2 / sigma**2 if likelihood_weighting else 1)).item()

        # In ln t, since the weight g²/σ² varies over many decades.
        area, _ = quad(lambda log_t: integrand(math.exp(log_t)) * math.exp(log_t), math.log(1e-5), 0, limit=200)
        return area / (1 - 1e-5)

    def stratified(shape, generator, **kwargs) -> Tensor:
        # One time in each of equal intervals: the same expectation with far less variance.
        return (torch.arange(shape[0]) + torch.rand(shape, generator=generator, dtype=torch.float64)) / shape[0]

    monkeypatch.setattr(losses, "uniform", stratified)
    generator, batches = seeded(), 20
    exact = Objective(Exact(gaussian), likelihood_weighting=likelihood_weighting)
    scaled = Objective(Exact(gaussian, 1.2), likelihood_weighting=likelihood_weighting)
    results = []
    for _ in range(batches):
        x0, state = gaussian.sample(10_000, generator), generator.get_state()
        exact_loss = exact(x0, generator)["loss"]
        generator.set_state(state)
        results.append(torch.stack([exact_loss, scaled(x0, generator)["loss"]]))
    both = torch.stack(results)
    mean, standard_error = both.mean(0), both.std(0) / batches**0.5
    assert abs(mean[0] - expectation(1.0)) < 4 * standard_error[0]
    assert abs(mean[1] - expectation(1.2)) < 4 * standard_error[1]
    # Sharp enough to tell: four standard errors are at most 3 %, or 20 % with the heavy-tailed likelihood weight.
    assert 4 * standard_error[0] < (0.2 if likelihood_weighting else 0.03) * mean[0]
    # On the same draws the exact score has the smaller loss.
    difference = both[:, 1] - both[:, 0]
    assert difference.mean() > 4 * difference.std() / batches**0.5


def test_mean_over_dimensions():
    """It takes the place of half the sum in L_SM, and of the sum in L_QC."""
    x0 = data()
    total = Objective(model("ve"), qc_weight=0.1)(x0, seeded())
    mean = Objective(model("ve"), qc_weight=0.1, reduce_mean=True)(x0, seeded())
    assert set(mean) == set(total) == {"loss", "dsm", "qc"}
    torch.testing.assert_close(mean["dsm"], total["dsm"] * 2 / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean["qc"], total["qc"] / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean["loss"], mean["dsm"] + 0.1 * mean["qc"], rtol=1e-12, atol=0)


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    x0, objective = data(5), Objective(model("vp"), qc_weight=0.1)
    together = objective(x0, SampleGenerators((0, "loss"), range(5)))
    alone = [objective(x0[i : i + 1], SampleGenerators((0, "loss"), [i])) for i in range(5)]
    for name in together:
        torch.testing.assert_close(together[name], sum(a[name] for a in alone) / 5, rtol=1e-12, atol=0)


def test_gradient_reaches_the_network_and_evaluation_needs_none():
    objective = Objective(model("ve"), qc_weight=0.1)
    terms = objective(data(), seeded())
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())
    with torch.no_grad():
        evaluated = objective(data(), seeded())
    for name in terms:
        assert not evaluated[name].requires_grad
        torch.testing.assert_close(evaluated[name], terms[name].detach(), rtol=1e-12, atol=0)


def test_class_labels_reach_the_network():
    score = model("vp")
    labels = torch.arange(6)
    Objective(score)(data(), seeded(), class_labels=labels)
    Objective(score, qc_weight=1.0)(data(), seeded(), class_labels=labels)
    assert len(score.network.inputs) == 2 and all(torch.equal(given[2], labels) for given in score.network.inputs)


# ------------------------------------------------------------------------------------------------- discrete time


@pytest.mark.parametrize("levels", [25, 1000])
def test_ddpm_loss_is_the_textbooks(levels):
    # Ho et al. (2020), Eq. 14: ‖ε − ε_θ(√ᾱ x_0 + √(1 − ᾱ) ε, i)‖², index i uniform, here halved.
    score, x0 = model("vp", levels), data(40)
    loss = Objective(score)(x0, seeded())["loss"]
    noisy, label, _ = score.network.inputs[-1]
    u, epsilon, _ = draws(x0)
    index = (u * levels).long()
    alpha_bar = torch.cumprod(1 - torch.linspace(0.1 / levels, 20 / levels, levels, dtype=torch.float64), 0)[index]
    xt = per_sample(alpha_bar.sqrt()) * x0 + per_sample((1 - alpha_bar).sqrt()) * epsilon
    torch.testing.assert_close(noisy, xt, rtol=1e-12, atol=1e-12)
    assert torch.equal(label, index.to(label))
    expected = 0.5 * ((epsilon - score.network(xt, index)) ** 2).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("levels", [10, 1000])
def test_smld_loss_is_the_textbooks(levels):
    # Song & Ermon (2019), Eqs. 5 and 6: ½ σ² ‖s(x̃, σ) + (x̃ − x)/σ²‖², the levels numbered from the largest σ.
    score, x0 = model("ve", levels), data(40)
    loss = Objective(score)(x0, seeded())["loss"]
    noisy, label, _ = score.network.inputs[-1]
    u, z, _ = draws(x0)
    sigmas = 20.0 * (0.02 / 20.0) ** (torch.arange(levels, dtype=torch.float64) / (levels - 1))
    index = levels - 1 - (u * levels).long()
    sigma = per_sample(sigmas[index])
    x_tilde = x0 + sigma * z
    torch.testing.assert_close(noisy, x_tilde, rtol=1e-12, atol=1e-12)
    assert torch.equal(label, index)
    value = score.network(x_tilde, index) / sigma
    expected = 0.5 * (sigma**2 * (value + (x_tilde - x0) / sigma**2) ** 2).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_is_drawn_equally_often(dtype, monkeypatch):
    levels = 10
    score = UnconstrainedScore(Network().to(dtype), NoiseLevel(SDES["ve"], levels))
    # The largest number below one, times the number of levels, must not round up to a level beyond the last.
    numbers = (torch.arange(1000, dtype=torch.float64) / 1000).to(dtype)
    numbers[-1] = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    monkeypatch.setattr(losses, "uniform", lambda shape, generator, **kwargs: numbers)
    Objective(score)(torch.zeros(1000, 1, 2, 2, dtype=dtype))
    assert torch.equal(score.network.inputs[-1][1].long().bincount(), torch.full((levels,), 100))


# --------------------------------------------------------------------------------------------- quasi-conservative term


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace", "exact"])
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_qc_term_by_hand(estimator, likelihood_weighting):
    sde, x0, score = SDES["vp"], data(), model("vp")
    objective = Objective(
        score, qc_weight=0.3, qc_probes=2, qc_estimator=estimator, likelihood_weighting=likelihood_weighting
    )
    terms = objective(x0, seeded())
    without = Objective(score, likelihood_weighting=likelihood_weighting)(x0, seeded())
    # The very same perturbed samples: the DSM term is the one without regularisation.
    torch.testing.assert_close(terms["dsm"], without["dsm"], rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["loss"], terms["dsm"] + 0.3 * terms["qc"], rtol=1e-14, atol=0)
    u, z, generator = draws(x0)
    t = 1e-5 + u * (1 - 1e-5)
    xt = per_sample(sde.mean_coefficient(t)) * x0 + per_sample(sde.std(t)) * z
    j = torch.autograd.functional.jacobian(lambda x: score(x, t), xt).reshape(6, 4, 6, 4)
    j = torch.stack([j[i, :, i] for i in range(6)])
    if estimator == "exact":
        asym = ((j @ j.mT).diagonal(dim1=1, dim2=2) - (j @ j).diagonal(dim1=1, dim2=2)).sum(1)
    else:
        asym = torch.zeros(6, dtype=torch.float64)
        for _ in range(2):
            v = rademacher_like(xt, generator).reshape(6, 4, 1)
            jv, jtv = j @ v, j.mT @ v
            form = 0.5 * (jv - jtv) ** 2 if estimator == "antisymmetric" else jtv**2 - jtv * jv
            asym += form.sum((1, 2)) / 2
    weight = sde.diffusion(t) ** 2 if likelihood_weighting else sde.std(t) ** 2
    torch.testing.assert_close(terms["qc"], (weight * asym).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("argument", ["qc", "qc_sampling"])
def test_section_5_trains_with_the_published_loss(argument):
    """Eq. 8 of Chao et al. (2023) and their weight: E[½ ‖σs + z‖² + 1e-4 σ² (tr JJᵀ − tr JJ)], of one perturbation."""
    options = dict(get_config(argument).training) | dict(qc_estimator="exact")
    sde, x0, score = SDES["ve"], data(), model("ve")
    terms = make_objective(score, options)(x0, seeded())
    u, z, _ = draws(x0)
    sigma = sde.std(1e-5 + u * (1 - 1e-5))
    loss = 0.0
    for i in range(6):
        x, t = x0[i : i + 1] + sigma[i] * z[i : i + 1], 1e-5 + u[i : i + 1] * (1 - 1e-5)
        j = torch.autograd.functional.jacobian(lambda x, t=t: score(x, t), x).reshape(4, 4)
        asym = (j @ j.T).trace() - (j @ j).trace()
        loss += (0.5 * ((sigma[i] * score(x, t) + z[i : i + 1]) ** 2).sum() + 1e-4 * sigma[i] ** 2 * asym) / 6
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-12, atol=0)
    assert terms["loss"] - terms["dsm"] > 1e-9 * terms["loss"]  # the term is not lost in rounding


def test_qc_term_costs_no_further_evaluation_of_the_network():
    score = model("vp")
    Objective(score, qc_weight=1.0, qc_probes=3, qc_probe_chunk=3)(data(), seeded())
    assert len(score.network.inputs) == 1


class SumOfWeights(nn.Module):
    """x ↦ x(P + Q): autograd gives P and Q one and the same tensor as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.randn(4, 4, generator=seeded(s), dtype=torch.float64)) for s in (1, 2))

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return (x.flatten(1) @ (self.p + self.q)).view_as(x)


def test_chunks_of_parameters_that_are_added():
    """Gradients of chunks are summed in place: what P and Q share must not be summed twice."""
    found = []
    for size in (3, 1):
        score = UnconstrainedScore(SumOfWeights(), NoiseLevel(SDES["vp"], None))
        Objective(score, qc_weight=0.3, qc_probes=3, qc_probe_chunk=size)(data(), seeded())["loss"].backward()
        found.append([parameter.grad for parameter in score.parameters()])
    for chunked, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=0)


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace", "exact"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_probes_in_chunks_are_the_same_loss(estimator, chunk):
    x0, settings = data(), dict(qc_weight=0.3, qc_probes=5, qc_estimator=estimator, qc_stride=2)
    results = []
    for size in (5, chunk):
        score = model("vp")
        terms = Objective(score, qc_probe_chunk=size, **settings)(x0, seeded())
        (2 * terms["loss"]).backward()  # times a factor, as accumulation and loss scaling have it
        results.append((terms, [p.grad for p in score.parameters()]))
        # Two parts of the batch; the first is evaluated once per chunk.
        assert len(score.network.inputs) == 2 if estimator == "exact" or size == 5 else 1 + math.ceil(5 / chunk)
    (together, expected), (terms, gradients) = results
    for name in together:
        torch.testing.assert_close(terms[name], together[name], rtol=1e-13, atol=0)
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        evaluated = Objective(model("vp"), qc_probe_chunk=chunk, **settings)(x0, seeded())
    torch.testing.assert_close(evaluated["loss"], together["loss"].detach(), rtol=1e-13, atol=0)


def test_lazy_qc_is_unbiased_over_its_interval():
    score, x0 = model("ve"), data()
    eager, lazy = Objective(score, qc_weight=0.2), Objective(score, qc_weight=0.2, qc_interval=4)
    weights = list(score.parameters())
    expected = eager(x0, seeded())
    steps = [lazy(x0, seeded(), step=step) for step in range(8, 12)]
    assert [set(terms) for terms in steps] == [{"loss", "dsm", "qc"}] + 3 * [{"loss", "dsm"}]
    torch.testing.assert_close(steps[0]["qc"], expected["qc"], rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(s["loss"] for s in steps) / 4, expected["loss"], rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(sum(s["loss"] for s in steps) / 4, weights)
    for lazy_gradient, gradient in zip(gradients, torch.autograd.grad(expected["loss"], weights), strict=True):
        torch.testing.assert_close(lazy_gradient, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [2, 3])
def test_qc_term_on_every_kth_sample(stride):
    """L_SM of the whole batch, L_QC of those samples alone, and one evaluation of the network per sample."""
    score, x0 = model("ve"), data()
    weights = list(score.parameters())
    settings = dict(qc_weight=0.2, qc_probes=2, qc_probe_chunk=2)

    def streams() -> SampleGenerators:
        return SampleGenerators((3, "train"), range(len(x0)))

    terms = Objective(score, qc_stride=stride, **settings)(x0, streams())
    assert sum(len(x) for x, _, _ in score.network.inputs) == len(x0)
    whole = Objective(score)(x0, streams())
    some = Objective(score, **settings)(x0[::stride], streams()[::stride])
    torch.testing.assert_close(terms["dsm"], whole["dsm"], rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["qc"], some["qc"], rtol=1e-12, atol=0)
    expected = torch.autograd.grad(whole["dsm"] + 0.2 * some["qc"], weights)
    for ours, gradient in zip(torch.autograd.grad(terms["loss"], weights), expected, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-12)


def test_qc_stride_must_divide_the_batch():
    objective = Objective(model("ve"), qc_weight=1.0, qc_stride=4)
    with pytest.raises(ValueError, match=r"training\.qc_stride=4: must divide the 6 samples"):
        objective(data(), seeded())


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace", "exact"])
def test_a_conservative_model_has_no_qc_loss(estimator):
    score = ConservativeScore(Network(), NoiseLevel(SDES["ve"]))
    terms = Objective(score, qc_weight=1.0, qc_estimator=estimator)(data(), seeded())
    t, xt = torch.full((6,), 0.5, dtype=torch.float64), data()
    scale = asymmetry(score, xt, t).jacobian_norm_squared.mean()
    assert abs(terms["qc"]) < 1e-12 * scale
    torch.testing.assert_close(terms["loss"], terms["dsm"], rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "fields",
    [
        dict(likelihood_weighting=True),
        dict(reduce_mean=True),
        dict(qc_weight=0.6),
        dict(qc_probes=3),
        dict(qc_estimator="trace"),
        dict(qc_estimator="exact"),
        dict(qc_interval=2),
        dict(qc_stride=2),
    ],
)
def test_every_option_is_passed_on(fields):
    def loss(objective: Objective) -> float:
        return objective(data(), seeded())["loss"].item()

    options = dict(base_config().training) | dict(qc_weight=0.5)
    made = loss(make_objective(model("ve"), options | fields))
    assert made == loss(Objective(model("ve"), **dict(qc_weight=0.5) | fields))
    assert made != loss(Objective(model("ve"), qc_weight=0.5))


def test_likelihood_weighting_needs_continuous_time():
    with pytest.raises(ValueError, match=r"training\.likelihood_weighting=True: needs training\.continuous=True"):
        Objective(model("ve", 25), likelihood_weighting=True)


def test_families_without_discrete_losses():
    with pytest.raises(ValueError, match=r"training\.sde='subvpsde' has no discrete-time model"):
        model("subvp", 25)
