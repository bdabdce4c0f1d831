"""Langevin dynamics at one time: deterministic, unadjusted and Metropolis-adjusted, on laws known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import assert_moments_match
from torch import Tensor

from experiment.randomness import SampleGenerators
from sampling import CountedScore, langevin_dynamics

LANGEVIN_STD = 0.7
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)


def centred_score(x: Tensor, t: Tensor) -> Tensor:
    """That of N(MEAN, 0.7² I)."""
    return (MEAN - x) / LANGEVIN_STD**2


def centred_log_density(x: Tensor, t: Tensor) -> Tensor:
    return -((x - MEAN) ** 2).sum(1) / (2 * LANGEVIN_STD**2)


def tangential(x: Tensor, t: Tensor) -> Tensor:
    """A score with a rotational part as long as the true one."""
    true = centred_score(x, t)
    return true + torch.stack([-true[:, 1], true[:, 0]], dim=1)


WRONG_SCORES = {
    "exact": centred_score,
    "too small": lambda x, t: 0.3 * centred_score(x, t),
    "too large": lambda x, t: 1.7 * centred_score(x, t),
    "tangential": tangential,
    "zero": lambda x, t: torch.zeros_like(x),
    "of another mean": lambda x, t: centred_score(x + 0.5, t),
}


def run_langevin(score, x: Tensor, step_sizes, **settings):
    generator = torch.Generator().manual_seed(5)
    return langevin_dynamics(score, x, x.new_zeros(len(x)), step_sizes, generator=generator, **settings)


def test_langevin_without_noise_follows_the_closed_form():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = [0.05 * 0.9**i for i in range(20)]
    trajectory = run_langevin(centred_score, x, sizes, noise=False)
    assert trajectory.x.shape == (21, 6, 2) and trajectory.accepted.shape == (20, 6) and trajectory.accepted.all()
    factor = 1.0
    for i, position in enumerate(trajectory.x):
        torch.testing.assert_close(position, MEAN + factor * (x - MEAN), rtol=1e-12, atol=1e-12)
        factor *= 1 - sizes[min(i, 19)] / LANGEVIN_STD**2


def test_unadjusted_langevin_has_the_bias_of_its_step():
    # Forty steps at 1 − α/σ² = 0.6 forget the start to 1e-9. 40 000 samples know a variance to 4 · √(2/40 000) = 2.8 %.
    variance, size = LANGEVIN_STD**2, 0.4 * LANGEVIN_STD**2
    x = run_langevin(centred_score, torch.zeros(40_000, 2, dtype=torch.float64), [size] * 40).x[-1]
    biased = 2 * size / (1 - (1 - size / variance) ** 2)
    assert biased == pytest.approx(1.25 * variance)
    assert_moments_match(x, MEAN, biased * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("name", WRONG_SCORES)
def test_adjusted_langevin_has_no_bias_whatever_the_score(name):
    # Starts from another law, so that a chain that never moves fails, and uses two step sizes in turn. Far out, where
    # a wrong score is refused most, a chain needs its time.
    start = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = [0.4 * LANGEVIN_STD**2, 0.15 * LANGEVIN_STD**2] * 100
    trajectory = run_langevin(WRONG_SCORES[name], start, sizes, log_density=centred_log_density)
    assert_moments_match(trajectory.x[-1], MEAN, LANGEVIN_STD**2 * torch.eye(2, dtype=torch.float64))
    rate = trajectory.accepted[-20:].double().mean()
    assert 0.3 < rate < 0.99
    # Where a move was refused nothing changes, where it was made everything does.
    moved = (trajectory.x[1:] != trajectory.x[:-1]).all(2)
    stayed = (trajectory.x[1:] == trajectory.x[:-1]).all(2)
    assert torch.equal(moved, trajectory.accepted) and torch.equal(stayed, ~trajectory.accepted)


def test_adjusted_langevin_on_a_target_that_is_not_gaussian():
    # p ∝ exp(−x⁴/4): E x² = 2Γ(3/4)/Γ(1/4), E x⁴ = 1, Var x² = 1 − (E x²)².
    def quartic(x: Tensor, t: Tensor) -> Tensor:
        return -(x[:, 0] ** 4) / 4

    start = torch.zeros(20_000, 1, dtype=torch.float64)
    x = run_langevin(lambda x, t: -(x**3), start, [0.3] * 60, log_density=quartic).x[-1]
    second = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert abs((x**2).mean() - second) < 4 * math.sqrt((1 - second**2) / len(x))
    assert abs(x.mean()) < 4 * math.sqrt(second / len(x))


def test_adjusted_langevin_never_leaves_the_support():
    # Outside the unit square log p is −∞, and the score not a number.
    def square(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.abs() < 1).all(1), 0.0, -math.inf)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x.abs() < 1, 0.0, math.nan)

    trajectory = run_langevin(score, torch.zeros(5000, 2, dtype=torch.float64), [0.1] * 60, log_density=square)
    assert (trajectory.x.abs() < 1).all()
    # Uniform on [−1, 1]: variance 1/3, that of x² 4/45.
    error = (trajectory.x[-1] ** 2).mean(0) - 1 / 3
    assert (error.abs() < 4 * math.sqrt(4 / 45 / 5000)).all()


def test_adjusted_langevin_asks_the_score_once_per_step():
    counted = CountedScore(centred_score)
    x = torch.zeros(3, 2, dtype=torch.float64)
    run_langevin(counted, x, [0.1] * 7)
    assert counted.evaluations == 3 * 7
    run_langevin(counted, x, [0.1] * 7, log_density=centred_log_density)
    assert counted.evaluations == 3 * (7 + 8)


def test_langevin_sample_depends_on_its_own_generator_alone():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(rows: slice) -> Tensor:
        generators = SampleGenerators((0, "langevin"), range(8)[rows])
        settings = dict(log_density=centred_log_density, generator=generators)
        return langevin_dynamics(tangential, x[rows], x[rows, 0], [0.2] * 10, **settings).x

    torch.testing.assert_close(run(slice(3, 6)), run(slice(None))[:, 3:6], rtol=0, atol=0)


def test_langevin_keeps_images_and_their_precision():
    x = torch.randn(4, 3, 2, 2)
    trajectory = run_langevin(lambda x, t: -x, x, [0.1] * 5, log_density=lambda x, t: -0.5 * (x**2).flatten(1).sum(1))
    assert trajectory.x.shape == (6, 4, 3, 2, 2) and trajectory.x.dtype == torch.float32
    assert trajectory.accepted.shape == (5, 4) and torch.equal(trajectory.x[0], x)


def test_a_start_without_density_is_refused():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="log_density is not finite at 2 of 3 starting points"):
        run_langevin(centred_score, x, [0.1], log_density=lambda x, t: torch.where(x[:, 0] > 0, 0.0, -math.inf))
    with pytest.raises(ValueError, match="cannot be Metropolis-adjusted"):
        run_langevin(centred_score, x, [0.1], noise=False, log_density=centred_log_density)
