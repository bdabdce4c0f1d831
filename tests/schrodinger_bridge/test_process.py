"""Schrödinger bridges: the chain's linear algebra, both regressions, and the bridges that they lead to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from schrodinger_bridge.gaussian import (
    AffineChain,
    Normal,
    half_bridge,
    isotropic,
    reference_chain,
    wasserstein_gaussian,
)
from schrodinger_bridge.matching import ALGORITHMS, ipf_regression
from schrodinger_bridge.metrics import entropic_plan, mean_squared_displacement, wasserstein
from schrodinger_bridge.process import BACKWARD, FORWARD, Reference, TransitionMean, simulate, step_sizes

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
FIRST = Normal(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.9, 0.4], [0.4, 0.5]], dtype=torch.float64)
)
LAST = Normal(torch.tensor([-0.5, 0.3], dtype=torch.float64), torch.tensor([[0.6, -0.2], [-0.2, 1.1]]).double())
I2 = torch.eye(2, dtype=torch.float64)


def noise_like(x: torch.Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def draw(law: Normal, count: int, seed: int) -> torch.Tensor:
    z = torch.randn((count, len(law.mean)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return law.mean + z @ torch.linalg.cholesky(law.covariance).mT


def root_of(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.mT


def bridge_covariance(first: torch.Tensor, last: torch.Tensor, brownian_variance: float) -> torch.Tensor:
    """Cov(x_0, x_N) (D, D) of the bridge between covariances Σ₀ and Σ₁ (D, D) for Brownian motion of variance s²:

        C = ½ (Σ₀^½ D Σ₀^−½ − s² I),      D = (4 Σ₀^½ Σ₁ Σ₀^½ + s⁴ I)^½

    Bunne, Hsieh, Cuturi, Krause, "The Schrödinger Bridge between Gaussian Measures has a Closed Form", AISTATS 2023,
    arXiv 2202.05722.
    """
    root, identity = root_of(first), torch.eye(len(first), dtype=torch.float64)
    d = root_of(4 * root @ last @ root + brownian_variance**2 * identity)
    return 0.5 * (root @ d @ torch.linalg.inv(root) - brownian_variance * identity)


# ---------------------------------------------------------------------------------------------------------- step sizes


@pytest.mark.parametrize("count", [3, 4, 8, 9, 30])
def test_step_sizes_rise_and_fall(count):
    """As many step sizes as steps, symmetric, γ_min at the ends and γ_max in the middle, evenly spaced."""
    gammas = step_sizes(count, 1e-4, 0.1)
    assert len(gammas) == count and torch.equal(gammas, gammas.flip(0))
    rising = gammas[: (count + 1) // 2]
    assert float(rising[0]) == pytest.approx(1e-4)
    assert float(rising[-1]) == pytest.approx(0.1)
    steps = rising.diff()
    assert (steps > 0).all() and torch.allclose(steps, steps.mean().expand_as(steps))


def test_equal_step_sizes():
    for count in (2, 7, 40):
        assert step_sizes(count, 0.01, 0.01).tolist() == [0.01] * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 0.1, 0.2), "bridge.num_steps=2: at least 3"), ((5, 0.3, 0.2), "need γ_min ≤ γ_max")],
)
def test_bad_step_sizes(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        step_sizes(*arguments)


# ------------------------------------------------------------------------------------------------------- the reference


def references() -> list[Reference]:
    gammas = step_sizes(7, 0.02, 0.2)
    return [Reference(gammas, MEAN[:1], 1.3), Reference(gammas, MEAN[:1], math.inf)]


def joint_law(reference: Reference) -> np.ndarray:
    """Covariance of (x_0, …, x_N) for a start of variance 1, from the chain's definition: x = L z."""
    count = len(reference.gammas)
    lower = np.zeros((count + 1, count + 1))
    lower[0, 0] = 1
    for k in range(1, count + 1):
        lower[k] = float(reference.factor[k - 1]) * lower[k - 1]
        lower[k, k] = math.sqrt(2 * float(reference.gammas[k - 1]))
    return lower @ lower.T


def conditional(covariance: np.ndarray, wanted: int, given: list[int]) -> tuple[np.ndarray, float]:
    """Coefficients and variance of one coordinate given others."""
    inner = covariance[np.ix_(given, given)]
    coefficients = np.linalg.solve(inner, covariance[given, wanted])
    return coefficients, covariance[wanted, wanted] - coefficients @ covariance[given, wanted]


@pytest.mark.parametrize("kind", [0, 1], ids=["ornstein_uhlenbeck", "brownian"])
def test_reference_bridges_are_conditional_laws(kind):
    """Every formula of the reference against conditioning the joint Gaussian of the whole chain."""
    reference = references()[kind]
    covariance, count, mean = joint_law(reference), 7, MEAN[:1]
    values = torch.tensor([[0.7], [-1.9]], dtype=torch.float64)  # of the two that are given
    first, last = values  # deviations from the mean

    for k in range(count + 1):
        zero = reference.between((mean + first)[None], (mean + last)[None], torch.tensor([k]), torch.zeros(1, 1))
        one = reference.between((mean + first)[None], (mean + last)[None], torch.tensor([k]), torch.ones(1, 1))
        if k in (0, count):
            assert torch.allclose(zero, mean + (first if k == 0 else last)) and torch.allclose(one, zero)
            continue
        coefficients, variance = conditional(covariance, k, [0, count])
        expected = mean + coefficients[0] * first + coefficients[1] * last
        assert torch.allclose(zero[0], expected, atol=1e-12)
        assert float(one - zero) == pytest.approx(math.sqrt(variance))
    for k in range(1, count):
        coefficients, _ = conditional(covariance, k, [k - 1, count])
        found = reference.towards_end((mean + first)[None], (mean + last)[None], torch.tensor([k]))
        assert torch.allclose(found[0], mean + coefficients[0] * first + coefficients[1] * last, atol=1e-12)
        coefficients, _ = conditional(covariance, k, [k + 1, 0])
        found = reference.towards_start((mean + first)[None], (mean + last)[None], torch.tensor([k + 1]))
        assert torch.allclose(found[0], mean + coefficients[0] * first + coefficients[1] * last, atol=1e-12)
    # Given what it is to reach in one step, it goes there.
    assert torch.allclose(reference.towards_end(values, values.flip(0), torch.tensor([count] * 2)), values.flip(0))
    assert torch.allclose(reference.towards_start(values, values.flip(0), torch.tensor([1] * 2)), values.flip(0))


def test_reference_must_take_small_steps():
    with pytest.raises(ValueError, match=r"bridge\.gamma_max=0\.2: must be below the variance of the prior, 0\.1"):
        Reference(step_sizes(3, 0.2, 0.2), MEAN, 0.1)


# ---------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_chains_are_ordered_forward_in_time(direction):
    """x_0 first whichever way they run; the edges in that direction's order; noise √(2γ); none in the last step."""
    gammas, seen = step_sizes(5, 0.01, 0.3), []

    def shift(x, edge):
        seen.append(int(edge[0]))
        return x + 10.0 ** int(edge[0])

    start = torch.zeros(4, 2, dtype=torch.float64)
    states, means = simulate(shift, start, gammas, direction, lambda: torch.ones_like(start), noise_removal=True)
    order = [1, 2, 3, 4, 5] if direction == FORWARD else [5, 4, 3, 2, 1]
    assert seen == order and len(states) == 6 and len(means) == 5
    assert torch.equal(states[0 if direction == FORWARD else 5], start)
    for k in order:
        before, after = (states[k - 1], states[k]) if direction == FORWARD else (states[k], states[k - 1])
        assert torch.allclose(means[k - 1], before + 10.0**k)
        scale = 0.0 if k == order[-1] else math.sqrt(2 * float(gammas[k - 1]))
        assert torch.allclose(after - means[k - 1], torch.full_like(start, scale), atol=1e-9)


@pytest.mark.parametrize("drift", [True, False])
def test_transition_mean(drift):
    """Networks are told each edge once and for all; what they give is a displacement in units of noise, or the mean."""
    labels = []

    def network(x, label):
        labels.append(label)
        return 2 * x

    gammas = step_sizes(4, 0.02, 0.5)
    transition = TransitionMean(_Function(network), gammas, drift=drift)
    x, edge = torch.randn(4, 3), torch.arange(1, 5)
    found = transition(x, edge)
    expected = x + (2 * gammas).sqrt().float()[:, None] * 2 * x if drift else 2 * x
    torch.testing.assert_close(found, expected)
    assert labels[0].tolist() == pytest.approx([0, 333, 666, 999])


class _Function(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


# ------------------------------------------------------------------------------------------------------ Gaussian oracle


def fitted(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of every edge: matrices (N, D, D) and offsets (N, D)."""
    ones = torch.ones_like(inputs[..., :1])
    solution = torch.linalg.lstsq(torch.cat([inputs, ones], dim=-1), targets).solution
    return solution[:, :-1].mT, solution[:, -1]


def mean_map_of(matrices: torch.Tensor, offsets: torch.Tensor, shift: int = 0):
    """x ↦ A_k x + c_k; with a shift, those of another edge."""

    def mean_map(x, edge):
        k = (edge - 1 + shift) % len(matrices)
        return torch.einsum("bij,bj->bi", matrices[k], x) + offsets[k]

    return mean_map


def ipf_errors(shift: int) -> list[float]:
    """Ten iterations of IPF by least squares on 40 000 chains, and by linear algebra: the largest difference of the
    laws of any state, in standard errors of their estimation, for every half-bridge."""
    count, n = 40_000, 6
    reference = Reference(step_sizes(n, 0.02, 0.2), LAST.mean, 1.0)
    exact = reference_chain(reference, FIRST)
    mean_map, errors = reference, []
    for number in range(20):
        learned = FORWARD if number % 2 else BACKWARD
        start = draw(FIRST if learned == BACKWARD else LAST, count, number)
        # Each half-bridge begins at the exact one before it, so that errors do not add up.
        regression = ipf_regression(learned, start, mean_map, reference, noise_like(start, 100 + number))
        matrices, offsets = fitted(*regression)
        exact = half_bridge(exact, LAST if learned == BACKWARD else FIRST)
        laws, _ = AffineChain(learned, exact.start, matrices, offsets, exact.noise).law()
        expected, _ = exact.law()
        errors.append(max(_distance(a, b) for a, b in zip(laws, expected, strict=True)) * math.sqrt(count))
        mean_map = mean_map_of(exact.matrices, exact.offsets, shift)
    return errors


def _distance(a: Normal, b: Normal) -> float:
    """Of means and covariances, in units of the standard deviation: an entry is estimated to about 1/√count."""
    root = torch.linalg.cholesky(b.covariance)
    mean = torch.linalg.solve_triangular(root, (a.mean - b.mean)[:, None], upper=False)
    half = torch.linalg.solve_triangular(root, a.covariance, upper=False)
    spread = torch.linalg.solve_triangular(root, half.mT, upper=False) - I2
    return float(max(mean.abs().max(), spread.abs().max() / math.sqrt(2)))


def test_ipf_follows_the_exact_recursion():
    """Ten iterations, both directions: within five standard errors (120 comparisons; a chain adds its steps' up)."""
    assert max(ipf_errors(shift=0)) < 5


def test_a_step_out_of_line_is_noticed():
    """Were the mean map of another edge used in simulation than in training, the recursion would be left far behind."""
    assert max(ipf_errors(shift=1)[1:]) > 50


@pytest.mark.parametrize("kind", ["ornstein_uhlenbeck", "brownian"])
def test_limit_of_ipf_is_the_bridge(kind):
    """Small steps, many iterations: both marginals, and the covariance of the ends in closed form within 2 %."""
    reference = Reference(step_sizes(400, 5e-4, 2e-3), LAST.mean, 1.0 if kind != "brownian" else math.inf)
    chain = reference_chain(reference, FIRST)
    for number in range(60):
        chain = half_bridge(chain, FIRST if number % 2 else LAST)
    assert chain.direction == FORWARD
    laws, cross = chain.law()
    assert wasserstein_gaussian(laws[-1], LAST) < 0.02 * math.sqrt(float(torch.trace(LAST.covariance)))
    expected = bridge_covariance(FIRST.covariance, LAST.covariance, reference.brownian_variance)
    assert float((cross - expected).norm() / expected.norm()) < 0.02
    # The bound tells the bridge from the independent coupling and from optimal transport.
    transport = bridge_covariance(FIRST.covariance, LAST.covariance, 0.0)
    assert float((transport - expected).norm() / expected.norm()) > 0.2


def test_closed_form_of_the_bridge():
    """In one dimension: a coupling proportional to exp(xy/s²), and so with −1/s² off the diagonal of its precision."""
    a, b, s2 = 0.7, 1.9, 0.6
    c = float(bridge_covariance(torch.tensor([[a]]).double(), torch.tensor([[b]]).double(), s2))
    determinant = a * b - c**2
    assert c / determinant == pytest.approx(1 / s2)


def learned_by_least_squares(algorithm: str, reference: Reference, half_bridges: int) -> AffineChain:
    count, mean_map = 40_000, reference
    for number in range(half_bridges):
        learned = FORWARD if number % 2 else BACKWARD
        start = draw(FIRST if learned == BACKWARD else LAST, count, number)
        options = {"other_end": draw(LAST, count, 99)} if algorithm == "imf" and number == 0 else {}
        noise = noise_like(start, 100 + number)
        matrices, offsets = fitted(*ALGORITHMS[algorithm](learned, start, mean_map, reference, noise, **options))
        mean_map = mean_map_of(matrices, offsets)
    return AffineChain(FORWARD, FIRST, matrices, offsets, isotropic(reference.gammas, 2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_between_gaussians(algorithm):
    """Four iterations, each learned from 40 000 chains of the one before: Cov(x_0, x_N) within 4 %, three times what
    seeds differ by, as errors are handed on. Of IPF to the exact recursion; of IMF, from the independent coupling, to
    the closed form of the bridge."""
    reference = Reference(step_sizes(30, 0.02, 0.02), LAST.mean, 1.0)
    laws, cross = learned_by_least_squares(algorithm, reference, 8).law()
    if algorithm == "ipf":
        chain = reference_chain(reference, FIRST)
        for number in range(8):
            chain = half_bridge(chain, FIRST if number % 2 else LAST)
        expected_laws, expected = chain.law()
        wanted = expected_laws[-1]
    else:
        expected, wanted = bridge_covariance(FIRST.covariance, LAST.covariance, reference.brownian_variance), LAST
    assert float((cross - expected).norm() / expected.norm()) < 0.04
    assert wasserstein_gaussian(laws[-1], wanted) < 0.04


def test_the_first_order_half_bridge_forgets_the_reference_and_the_exact_one_does_not():
    """What the README says: finite steps change the coupling a little every iteration, though the marginals fit, unless
    every edge is reversed exactly."""
    reference = Reference(step_sizes(100, 0.006, 0.006), LAST.mean, 1.0)
    expected = bridge_covariance(FIRST.covariance, LAST.covariance, reference.brownian_variance)
    errors = {}
    for exact in (False, True):
        chain = reference_chain(reference, FIRST)
        for number in range(200):
            chain = half_bridge(chain, FIRST if number % 2 else LAST, exact_reversal=exact)
            if number in (15, 199):
                laws, cross = chain.law()
                errors[exact, number] = float((cross - expected).norm() / expected.norm())
                assert wasserstein_gaussian(laws[-1], LAST) < (1e-5 if exact else 0.03)
    assert errors[False, 15] < 0.02 and errors[False, 199] > 0.03
    assert errors[True, 15] < 1e-6 and errors[True, 199] < 1e-6


# ------------------------------------------------------------------------------------------------------------- metrics


def test_wasserstein_of_a_translation():
    """W₂ between points and the same points moved by d is ‖d‖; sliced, the root mean square of ⟨θ, d⟩ is ‖d‖/√D."""
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    assert wasserstein(x, x + torch.tensor([3.0, -4.0]), 0) == pytest.approx(5.0, rel=1e-5)
    images = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    d = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
    # 200 directions: relative standard error of the mean of ⟨θ, d⟩² √2/√200 = 0.1, of its root 0.05.
    assert wasserstein(images, images + d, 0) == pytest.approx(float(d.norm()) / 8, rel=0.15)
    assert wasserstein(images, images + d, 0) == wasserstein(images, images + d, 0)


def test_wasserstein_of_gaussians():
    """Sampled against closed form; a sample of 2000 from each adds about 0.1² to W₂²."""
    a, b = draw(FIRST, 2000, 0), draw(LAST, 2000, 1)
    assert wasserstein(a, b, 0) == pytest.approx(wasserstein_gaussian(FIRST, LAST), rel=0.03)


def test_mean_squared_displacement():
    x = torch.randn(10, 1, 2, 2)
    assert mean_squared_displacement(x, x + 2) == pytest.approx(16.0, rel=1e-5)


def test_entropic_plan_of_gaussians():
    """Sinkhorn on 1000 samples (1.5 %) against the closed form: ε = 2s² is the Brownian motion of variance s²."""
    s2 = 0.5
    cost, violation = entropic_plan(draw(FIRST, 1000, 0), draw(LAST, 1000, 1), s2)
    cross = bridge_covariance(FIRST.covariance, LAST.covariance, s2)
    exact = torch.trace(FIRST.covariance + LAST.covariance - 2 * cross) + ((FIRST.mean - LAST.mean) ** 2).sum()
    assert cost == pytest.approx(float(exact), rel=0.04) and violation < 1e-3
    doubled = (
        torch.trace(
            FIRST.covariance + LAST.covariance - 2 * bridge_covariance(FIRST.covariance, LAST.covariance, 2 * s2)
        )
        + ((FIRST.mean - LAST.mean) ** 2).sum()
    )
    assert abs(float(doubled) / float(exact) - 1) > 0.1  # what the bound can tell apart
