"""Noised distributions against independent formulas, integrals, Monte Carlo and high-precision arithmetic."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import pairwise

import mpmath
import pytest
import torch
from oracles import assert_moments_match, gaussian_2d, mixture_2d
from scipy.integrate import quad
from scipy.special import ndtr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conservativeness import asymmetry, jacobian
from exact import distributions
from exact.distributions import (
    TWO_DIMENSIONAL,
    BoxMixture,
    Gaussian,
    GaussianMixture,
    NoisedDistribution,
    Spirals,
    checkerboard,
    entropy,
)
from experiment.randomness import SampleGenerators
from sde_lib import SDE, VE, VP, GeometricSigma, LinearBeta

PAPER = VE(GeometricSigma(0.1, 3.0))
"""The SDE of the paper's two-dimensional examples."""
NOISES: dict[str, tuple[SDE, float]] = {
    "sigma 0.1": (PAPER, 0.0),
    "sigma 0.55": (PAPER, 0.5),
    "sigma 3": (PAPER, 1.0),
    "vp": (VP(LinearBeta(0.1, 20.0)), 0.2),
}
"""Noise levels: an SDE and a time. The last has α = 0.81."""


def boxes_3d(sde: SDE) -> BoxMixture:
    """Three boxes of different shapes and weights, two of which overlap."""
    lower = torch.tensor([[-1.0, 0.0, 0.2], [-0.5, 0.5, -1.0], [2.0, -2.0, 0.0]])
    upper = torch.tensor([[1.0, 0.5, 0.9], [0.0, 1.5, 1.0], [2.1, -1.0, 3.0]])
    return BoxMixture(sde, lower, upper, torch.tensor([0.5, 0.3, 0.2]))


def mixture_3d(sde: SDE) -> GaussianMixture:
    """Two Gaussians in general position."""
    factors = 0.3 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.tensor([[1.0, 0.0, -0.5], [-1.0, 0.5, 0.0]])
    return GaussianMixture(sde, torch.tensor([0.7, 0.3]), means, factors @ factors.mT)


DISTRIBUTIONS = TWO_DIMENSIONAL | {
    "gaussian": gaussian_2d,
    "mixture": mixture_2d,
    "mixture_3d": mixture_3d,
    "boxes": boxes_3d,
}
every_noise = pytest.mark.parametrize("noise", NOISES)
every_set = pytest.mark.parametrize("name", TWO_DIMENSIONAL)
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


@cache
def build(name: str, noise: str) -> NoisedDistribution:
    return DISTRIBUTIONS[name](NOISES[noise][0])


def times(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def noised(x0: Tensor, sde: SDE, t: float, seed: int = 1) -> Tensor:
    mean, std = sde.marginal(x0, times(t, x0))
    return mean + std[:, None] * torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).double()


def draw_by_the_paper(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Section 3.2: the sets as they are constructed there."""

    def u() -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    if name == "gaussian_8":
        angle = (8 * u()).floor() * math.pi / 4
        epsilon = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return (epsilon + 8 * torch.stack([angle.cos(), angle.sin()], 1)) / 2**0.5
    if name == "checkerboard":
        x1 = 4 * u() - 2
        return 3 * torch.stack([x1, u() - 2 * (u() < 0.5).double() + x1.floor() % 2], 1)
    n = 3 * math.pi * u().sqrt()
    point = torch.stack([-n * n.cos() + u() / 2, n * n.sin() + u() / 2], 1)
    return torch.where(u()[:, None] < 0.5, -1, 1) * point * 2.3 / 3


# ------------------------------------------------------------------------------------------------ density and score


@every_noise
@every_distribution
def test_score_is_the_gradient_of_the_density(name, noise):
    sde, t = NOISES[noise]
    distribution = build(name, noise)
    sigma = float(sde.std(torch.tensor(t)))
    x0 = distribution.sample(24, torch.Generator().manual_seed(0))
    # Up to about 15 σ away.
    x = (noised(x0, sde, t) + 5 * sigma * torch.randn(x0.shape)).requires_grad_()
    time = times(t, x)
    (gradient,) = torch.autograd.grad(distribution.log_prob(x, time).sum(), x, create_graph=True)
    score = distribution.score(x, time)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-10 / sigma)
    # The score's own Jacobian is the Hessian of the log-density, and so symmetric.
    hessian = torch.stack(
        [torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True)[0] for i in range(distribution.dimension)], 1
    )
    torch.testing.assert_close(jacobian(distribution.score, x, time)[1], hessian, rtol=1e-7, atol=1e-8 / sigma**2)
    for probes in (None, 2):
        result = asymmetry(distribution.score, x, time, probes=probes)
        assert (result.asym <= 1e-16 * result.jacobian_norm_squared).all()
        assert (result.jacobian_norm_squared > 0).all()


@every_noise
@every_set
def test_density_integrates_to_one(name, noise):
    # The trapezoidal rule with step h = σ errs by about 4 exp(−2π² σ²/h²) = 1e-8 in two dimensions.
    sde, t = NOISES[noise]
    if (name, noise) == ("spiral_2", "sigma 0.1"):
        t = 0.3  # an eighth of the points
    alpha, sigma = float(sde.mean_coefficient(torch.tensor(t))), float(sde.std(torch.tensor(t)))
    extent = {"gaussian_8": 10.5, "checkerboard": 6.0, "spiral_2": 7.6}[name]
    steps = math.ceil((extent * alpha + 7 * sigma) / sigma)
    axis = sigma * torch.arange(-steps, steps + 1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = build(name, noise).log_prob(grid, times(t, grid)).exp().sum() * sigma**2
    assert total.item() == pytest.approx(1, abs=1e-7)


@every_noise
@pytest.mark.parametrize(
    ("name", "source"), [(name, "sample") for name in DISTRIBUTIONS] + [(name, "paper") for name in TWO_DIMENSIONAL]
)
def test_density_is_that_of_noised_samples(name, source, noise):
    # p_t(x) = E N(x; α x_0, σ² I): the mean over 100 000 draws of x_0 at 40 points, within four of its standard errors.
    sde, t = NOISES[noise]
    distribution = build(name, noise)
    generator = torch.Generator().manual_seed(3)
    x = noised(distribution.sample(40, generator), sde, t)
    draw = distribution.sample if source == "sample" else lambda *a: draw_by_the_paper(name, *a)
    mean, std = sde.marginal(draw(100_000, generator), times(t, torch.empty(100_000)))
    sigma = std[0]
    squared = torch.cdist(x, mean, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    kernels = torch.exp(-0.5 * squared / sigma**2) / (2 * math.pi * sigma**2) ** (x.shape[1] / 2)
    density = distribution.log_prob(x, times(t, x)).exp()
    standard_error = kernels.std(1) / kernels.shape[1] ** 0.5
    # Only where enough draws come near for the error to be known: the variance of the mean is about p²/effective draws.
    effective = kernels.shape[1] * density * (4 * math.pi * sigma**2) ** (x.shape[1] / 2)
    met = effective > 60
    assert met.sum() >= 30
    assert ((kernels.mean(1) - density).abs() < 4 * standard_error)[met].all()


@every_noise
@pytest.mark.parametrize("name", ["checkerboard", "boxes"])
def test_boxes_by_normal_cdfs(name, noise):
    sde, t = NOISES[noise]
    distribution = build(name, noise)
    x = noised(distribution.sample(50, torch.Generator().manual_seed(0)), sde, t)
    alpha, sigma = (float(c(torch.tensor(t, dtype=torch.float64))) for c in (sde.mean_coefficient, sde.std))
    edges = (distribution.lower, distribution.upper)
    at_lower, at_upper = (torch.from_numpy(ndtr(((x[:, None] - alpha * e) / sigma).numpy())) for e in edges)
    each = ((at_lower - at_upper) / (alpha * (distribution.upper - distribution.lower))).prod(2)
    torch.testing.assert_close(
        distribution.log_prob(x, times(t, x)).exp(), each @ distribution.weights, rtol=1e-9, atol=0
    )


def test_spirals_by_adaptive_quadrature():
    sde, t = NOISES["sigma 0.1"]
    distribution = Spirals(sde)
    x = noised(distribution.sample(8, torch.Generator().manual_seed(5)), sde, t)
    a, side = 2.3 / 3, 2.3 / 6

    def density(point: list[float]) -> float:
        def along(n: float) -> float:
            value = 0.0
            for sign in (1, -1):
                factors = [
                    (ndtr((sign * p - a * c) / 0.1) - ndtr((sign * p - a * c - side) / 0.1)) / side
                    for p, c in zip(point, (-n * math.cos(n), n * math.sin(n)), strict=True)
                ]
                value += 0.5 * factors[0] * factors[1]
            return value * 2 * n / (9 * math.pi**2)

        ends = [3 * math.pi * i / 30 for i in range(31)]
        return sum(quad(along, *piece, epsabs=1e-13, epsrel=1e-11)[0] for piece in pairwise(ends))

    exact = torch.tensor([density(point) for point in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(distribution.log_prob(x, times(t, x)), exact.log(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("smallest_noise", [0.1, 0.3, 1.0, 3.0])
def test_quadrature_of_the_spirals_has_converged(smallest_noise):
    # Twice the nodes: to 1e-8 up to three σ off the spirals, to 1e-6 up to about six.
    sde = VE(GeometricSigma(smallest_noise, 10.0))
    coarse = Spirals(sde, smallest_noise=smallest_noise)
    fine = Spirals(sde, smallest_noise=1 / (2 / smallest_noise + 60 / 66))
    assert abs(len(fine.weights) - 2 * len(coarse.weights)) <= 2
    x0 = coarse.sample(50, torch.Generator().manual_seed(0))
    offset = torch.randn(x0.shape, dtype=torch.float64)
    offset /= offset.norm(dim=1, keepdim=True)
    for distance, tolerance in ((1, 1e-9), (3, 1e-8), (6, 1e-6)):
        x = x0 + distance * smallest_noise * offset
        t = times(0.0, x)
        torch.testing.assert_close(coarse.log_prob(x, t), fine.log_prob(x, t), rtol=0, atol=tolerance)
        torch.testing.assert_close(
            smallest_noise * coarse.score(x, t), smallest_noise * fine.score(x, t), rtol=0, atol=30 * tolerance
        )


# ------------------------------------------------------------------------------------------------ numerical precision


def exact_edge_density(m: float, h: float) -> tuple[float, float, float]:
    """Log-density of u + z at m, u uniform on [−h, h] and z normal, with its first two derivatives, at 60 digits."""
    with mpmath.workdps(60):
        m, h = mpmath.mpf(m), mpmath.mpf(h)
        a, b = abs(m) - h, abs(m) + h
        mass = (mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2
        at_a, at_b = mpmath.npdf(a), mpmath.npdf(b)
        first = (at_b - at_a) / mass
        second = (a * at_a - b * at_b) / mass - first**2
        return float(mpmath.log(mass / (2 * h))), float(first if m >= 0 else -first), float(second)


@pytest.mark.parametrize("half_width", [1e-12, 1e-6, 1e-3, 0.0199, 0.0201, 0.1, 1.0, 5.0, 21.0, 60.0])
def test_boxes_in_both_tails_and_of_any_width(half_width):
    # One box in one dimension at σ = 1, from its centre to 300 σ beyond its edge.
    sde = VE(GeometricSigma(1.0, 2.0))
    bound = torch.tensor([[half_width]], dtype=torch.float64)
    box = BoxMixture(sde, -bound, bound, torch.ones(1))
    inside = [0.0, 1e-9, 0.3 * half_width, -half_width]
    outside = [half_width + d for d in (1e-3, 1.0, 5.0, 40.0, 300.0)] + [-half_width - d for d in (1.3, 40.0)]
    x = torch.tensor(inside + outside, dtype=torch.float64)[:, None].requires_grad_()
    log_prob, score = box.log_prob(x, times(0.0, x)), box.score(x, times(0.0, x))
    (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), x)
    (jacobian_,) = torch.autograd.grad(score.sum(), x)
    exact = torch.tensor([exact_edge_density(m, half_width) for m in x.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_prob, exact[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score[:, 0], exact[:, 1], rtol=1e-11, atol=1e-80)
    torch.testing.assert_close(gradient[:, 0], exact[:, 1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(jacobian_[:, 0], exact[:, 2], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(curvature[:, 0], exact[:, 2], rtol=1e-10, atol=1e-11)


@every_distribution
def test_far_tails_are_finite(name):
    # 20 to 1e6 data units from the origin, that is, up to 1e7 σ away.
    distribution = build(name, "sigma 0.1")
    direction = torch.randn(40, distribution.dimension, dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    distance = torch.logspace(1, 6, 40, dtype=torch.float64)[:, None] + 12
    x = (distance * direction).requires_grad_()
    t = times(0.0, x)
    log_prob, score = distribution.log_prob(x, t), distribution.score(x, t)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * direction).sum(), x)
    for value in (log_prob, score, gradient, curvature, *torch.autograd.grad(score.sum(), x)):
        assert value.isfinite().all()
    # The shares of the components are differences of log-densities of up to 1e14.
    torch.testing.assert_close(score, gradient, rtol=1e-6, atol=1e-6)
    # Seen from afar everything is at one place, at most 8.5 units from the origin.
    if not isinstance(distribution, Gaussian | GaussianMixture):
        assert ((-(score * direction).sum(1) * 0.1**2 - distance[:, 0]).abs() < 8.5).all()


EIGHTH_TURN = [[0.5**0.5, 0.5**0.5], [-(0.5**0.5), 0.5**0.5]]
TRANSPOSITION = [[0.0, 1.0], [1.0, 0.0]]
POINT_REFLECTION = [[-1.0, 0.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("name", "symmetry"),
    [
        ("gaussian_8", EIGHTH_TURN),
        ("gaussian_8", TRANSPOSITION),
        ("checkerboard", TRANSPOSITION),
        ("checkerboard", POINT_REFLECTION),
        ("spiral_2", POINT_REFLECTION),
    ],
)
def test_symmetries(name, symmetry):
    distribution, symmetry = build(name, "sigma 0.1"), torch.tensor(symmetry, dtype=torch.float64)
    x = 6 * torch.randn(50, 2, dtype=torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    turned = x @ symmetry
    torch.testing.assert_close(distribution.log_prob(turned, t), distribution.log_prob(x, t), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(distribution.score(turned, t), distribution.score(x, t) @ symmetry, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize(
    ("name", "mean_square", "mean_product"),
    [
        # 32 of the centres and 1 of the noise.
        ("gaussian_8", 33.0, 0.0),
        # Both coordinates are uniform on [−6, 6]; the mean product of the midpoints of the squares is 9/4.
        ("checkerboard", 24.0, 2.25),
        # With density 2n/(9π²): E n² = 9π²/2, E n sin n = 2 − 8/9π², E n cos n = −4/3π.
        (
            "spiral_2",
            (2.3 / 3) ** 2 * (9 * math.pi**2 / 2 + 1 / 6 + 1 - 4 / (9 * math.pi**2) + 2 / (3 * math.pi)),
            None,
        ),
    ],
)
def test_moments_of_samples(name, mean_square, mean_product):
    x = build(name, "sigma 0.1").sample(100_000, torch.Generator().manual_seed(0))
    assert x.shape == (100_000, 2) and x.dtype == torch.float64
    square, product = (x**2).sum(1), x.prod(1)
    standard_error = square.std() / len(x) ** 0.5
    assert abs(square.mean() - mean_square) < 4 * standard_error < 0.01 * mean_square
    assert (x.mean(0).abs() < 4 * x.std(0) / len(x) ** 0.5).all()
    if mean_product is not None:
        assert abs(product.mean() - mean_product) < 4 * product.std() / len(x) ** 0.5


@every_set
def test_samples_fill_regions_as_the_papers_do(name):
    # Shares of the cells of a 9 × 9 grid over [−9, 9]² and of squares of side 3 that line up with the checkerboard.
    x = build(name, "sigma 0.1").sample(100_000, torch.Generator().manual_seed(0))
    reference = draw_by_the_paper(name, 100_000, torch.Generator().manual_seed(1))
    for side, offset in ((2.0, 9.0), (3.0, 9.0)):
        cells = [((points + offset) / side).floor().long() for points in (x, reference)]
        share, expected = (torch.bincount(9 * c[:, 0] + c[:, 1], minlength=81).double() / len(c) for c in cells)
        standard_error = ((share * (1 - share) + expected * (1 - expected)) / 100_000).sqrt()
        assert ((share - expected).abs() <= 4 * standard_error).all()
        assert (expected > 0.01).sum() >= 8


def test_samples_of_the_checkerboard_are_on_it():
    x = build("checkerboard", "sigma 0.1").sample(20_000, torch.Generator().manual_seed(0)) / 3
    column, row = x.floor().T
    assert set(column.tolist()) == {-2.0, -1.0, 0.0, 1.0}
    below = row - column % 2
    assert set(below.tolist()) == {-2.0, 0.0}
    counts = torch.unique(torch.stack([column, row]), dim=1, return_counts=True)[1]
    assert len(counts) == 8
    assert ((counts / 20_000 - 1 / 8).abs() < 4 * (7 / 64 / 20_000) ** 0.5).all()


def test_samples_of_the_spirals_are_on_them():
    x = build("spiral_2", "sigma 0.1").sample(500, torch.Generator().manual_seed(0)) * 3 / 2.3
    n = torch.linspace(0, 3 * math.pi, 4001, dtype=torch.float64)
    curve = torch.stack([-n * n.cos(), n * n.sin()], 1)
    # Neighbouring squares are at most 0.0225 apart.
    on_either = [((s * x[:, None] - curve - 0.25).abs() <= 0.25 + 0.0113).all(2).any(1) for s in (1, -1)]
    assert (on_either[0] | on_either[1]).all()
    assert not on_either[0].all() and not on_either[1].all()


@every_distribution
def test_samples_belong_to_their_generators(name):
    distribution = build(name, "sigma 0.1")
    whole = distribution.sample(6, SampleGenerators((0, "x0"), range(6)))
    part = distribution.sample(2, SampleGenerators((0, "x0"), [3, 5]))
    assert torch.equal(whole[[3, 5]], part)
    assert len(torch.unique(whole, dim=0)) == 6


def test_a_mixture_of_one_gaussian_is_that_gaussian():
    sde, t = NOISES["vp"]
    gaussian = gaussian_2d(sde)
    mixture = GaussianMixture(sde, torch.ones(1), gaussian.mean[None], gaussian.covariance[None])
    x = torch.randn(10, 2, dtype=torch.float64)
    for method in ("log_prob", "score", "divergence"):
        expected = getattr(gaussian, method)(x, times(t, x))
        torch.testing.assert_close(getattr(mixture, method)(x, times(t, x)), expected, rtol=1e-12, atol=1e-12)
    for value, expected in zip(mixture.moments(t), gaussian.moments(t), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_components_and_moments_of_a_mixture(noise):
    sde, t = NOISES[noise]
    mixture = mixture_3d(sde)
    x = mixture.sample(100_000, torch.Generator().manual_seed(3))
    mean, std = sde.marginal(x, times(t, x))
    x = mean + std[:, None] * torch.randn(x.shape, dtype=torch.float64)
    expected, covariance = mixture.moments(t)
    assert_moments_match(x, expected, covariance, allowance=0.01)
    # Bayes' rule, one component at a time.
    joint = []
    for k, weight in enumerate(mixture.weights):
        component = GaussianMixture(sde, torch.ones(1), mixture.means[k, None], mixture.covariances[k, None])
        joint.append(weight * component.log_prob(x, times(t, x)).exp())
    shares = mixture.responsibilities(x, times(t, x))
    torch.testing.assert_close(shares, torch.stack(joint, 1) / sum(joint)[:, None], rtol=1e-9, atol=1e-9)
    assert ((shares.mean(0) - mixture.weights).abs() < 4 * (0.25 / len(x)) ** 0.5).all()


# ---------------------------------------------------------------------------------------------- evaluation in chunks


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def derivatives(distribution: NoisedDistribution, x: Tensor, t: Tensor) -> list[Tensor]:
    """Density and score, their derivatives in x and in t, and a second derivative."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    values = distribution.log_prob(x, t), distribution.score(x, t)
    results = [*values]
    for value in values:
        results += torch.autograd.grad(value.sum(), (x, t), create_graph=True)
    results += torch.autograd.grad(results[-2].square().sum(), (x, t))
    return [r.detach() for r in results]


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch):
    distribution = build("spiral_2", "sigma 0.1")
    x, t = 4 * torch.randn(4, 2, dtype=torch.float64), torch.linspace(0, 1, 4, dtype=torch.float64)
    whole = derivatives(distribution, x, t)
    assert 4 * distribution.lower.numel() < distributions._CHUNK_ELEMENTS
    monkeypatch.setattr(distributions, "_CHUNK_ELEMENTS", 3 * distribution.lower.numel())
    with LargestTensor() as largest:
        chunked = derivatives(distribution, x, t)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert largest.numel == 3 * distribution.lower.numel()


def test_derivative_in_time():
    # Of the chunked evaluation: against central differences, with an error of order step² = 1e-10.
    distribution = build("checkerboard", "sigma 0.1")
    x, step = 4 * torch.randn(9, 2, dtype=torch.float64), 1e-5
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(distribution.log_prob(x, t).sum(), t)
    with torch.no_grad():
        difference = (distribution.log_prob(x, t + step) - distribution.log_prob(x, t - step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- interface


@every_distribution
def test_shapes_and_types(name):
    distribution = build(name, "sigma 0.55")
    dimension = distribution.dimension
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.randn(3, dimension).double()
    log_prob, score = distribution.log_prob(x, t), distribution.score(x, t)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = x.to(dtype)
        assert distribution.log_prob(rounded, t).dtype == torch.float64
        assert distribution.score(rounded, t).dtype == dtype
        # Double precision throughout: only the input and the score's own type are rounded.
        exact = distribution.score(rounded.double(), t)
        assert torch.equal(distribution.score(rounded, t), exact.to(dtype))
    assert torch.equal(distribution.score(x, t.float()), distribution.score(x, t.float().double()))
    single = distribution.score(x.float(), t.float()).double()
    torch.testing.assert_close(single, score, rtol=1e-4, atol=1e-4)
    image = x.view(3, 1, dimension, 1)
    assert torch.equal(distribution.score(image, t), score.view_as(image))
    assert torch.equal(distribution.log_prob(image, t), log_prob)
    assert distribution.log_prob(x[:0], t[:0]).shape == (0,)
    assert distribution.score(x[:0], t[:0]).shape == (0, dimension)


@every_distribution
def test_arguments_that_do_not_fit(name):
    distribution = build(name, "sigma 0.55")
    x, t = torch.zeros(4, distribution.dimension), torch.zeros(4)
    for method in (distribution.log_prob, distribution.score):
        for wrong, message in (
            (torch.zeros(4, distribution.dimension + 1), f"{distribution.dimension} each"),
            (torch.zeros(distribution.dimension), f"{distribution.dimension} each"),
            (x.long(), "torch.int64"),
        ):
            with pytest.raises(ValueError, match=message):
                method(wrong, t)
        for wrong in (t[:3], t[:, None], t[0]):
            with pytest.raises(ValueError, match="one time for each of 4 points"):
                method(x, wrong)


EYE = torch.eye(2)
PAIR = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Gaussian(PAPER, torch.zeros(2), -EYE), "positive semi-definite"),
        (lambda: Gaussian(PAPER, torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "must be symmetric"),
        (lambda: Gaussian(PAPER, torch.zeros(2), EYE * torch.nan), "positive semi-definite"),
        (lambda: GaussianMixture(PAPER, torch.tensor([0.5, 0.6]), PAIR, EYE.expand(2, 2, 2)), "weights=[0.5, 0.6"),
        (lambda: GaussianMixture(PAPER, torch.tensor([1.5, -0.5]), PAIR, EYE.expand(2, 2, 2)), "weights=[1.5, -0.5]"),
        (lambda: GaussianMixture(PAPER, torch.tensor([1.0]), PAIR, EYE.expand(2, 2, 2)), "need 2 positive numbers"),
        (lambda: BoxMixture(PAPER, PAIR, PAIR + 1, torch.tensor([1.0, torch.nan])), "weights=[1.0, nan]"),
        (lambda: BoxMixture(PAPER, PAIR, PAIR + 1, torch.tensor([[0.5, 0.5]])), "need 2 positive numbers"),
        (lambda: BoxMixture(PAPER, PAIR, PAIR + 1, torch.ones(1)), "need 2 positive numbers"),
    ],
)
def test_distributions_that_make_no_sense(construct, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        construct()


def test_noise_below_what_is_resolved_is_refused():
    x = torch.zeros(2, 2)
    vp = VP(LinearBeta(0.1, 20.0))
    with pytest.raises(ValueError, match=r"sigma/alpha = 0; need it above 0"):
        checkerboard(vp).score(x, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"sigma/alpha = 0\.027.*smallest_noise=0\.1"):
        Spirals(vp).log_prob(x, torch.tensor([0.5, 0.005]))
    assert Spirals(vp, smallest_noise=0.02).log_prob(x, torch.tensor([0.5, 0.005])).isfinite().all()
    # The paper's smallest noise, in single precision.
    assert Spirals(PAPER).score(x, PAPER.time_at_noise_ratio(torch.tensor([0.1, 0.1]))).isfinite().all()


def test_entropy_of_a_gaussian_in_closed_form():
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    gaussian = Gaussian(PAPER, torch.tensor([0.5, -1.0]), covariance)
    for t in (0.0, 0.5):
        noised = covariance.double() + float(PAPER.std(torch.tensor(t, dtype=torch.float64))) ** 2 * torch.eye(2)
        expected = 1 + math.log(2 * math.pi) + 0.5 * math.log(float(torch.linalg.det(noised)))
        assert entropy(gaussian, t) == pytest.approx(expected, abs=1e-7)
