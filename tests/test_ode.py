"""Solvers against known solutions, against scipy, and for samples that must not notice one another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ode import FIXED, SOLVERS, integrate

RATES = torch.tensor([0.5, 3.0, 30.0, 300.0], dtype=torch.float64)
"""Decay rates of four samples: their stable step sizes differ by a factor of 600."""


class Tracking:
    """y' = −λ(y − cos ωt) − ω sin ωt per sample, solved by cos ωt + c e^{−λt}; counts what it is asked."""

    def __init__(self, rates: Tensor, frequency: float = 4.0) -> None:
        self.rates, self.frequency = rates, frequency
        self.evaluations = torch.zeros(len(rates), dtype=torch.long)

    def velocity(self, y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert y.shape == (len(rows), 2) and t.shape == rows.shape
        self.evaluations[rows] += 1
        assert self.evaluations.max() < 20_000, "the solver does not get on"
        angle = self.frequency * t[:, None]
        return -self.rates[rows, None] * (y - torch.cos(angle)) - self.frequency * torch.sin(angle)

    def solution(self, y: Tensor, start: float, end: float) -> Tensor:
        decay = torch.exp(-self.rates[:, None] * (end - start))
        return math.cos(self.frequency * end) + (y - math.cos(self.frequency * start)) * decay


START = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.5, 1.0], [0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_rk45_meets_its_tolerance_for_every_sample(tolerance):
    problem = Tracking(RATES)
    y = integrate(problem.velocity, START, 0.0, 1.0, rtol=tolerance, atol=tolerance)
    # Errors of single steps within the tolerance add up, here to no more than ten of them.
    assert (y - problem.solution(START, 0.0, 1.0)).abs().max() < 10 * tolerance


def test_rk45_error_falls_with_the_tolerance():
    def error(tolerance: float) -> float:
        problem = Tracking(RATES[:2], frequency=20.0)
        y = integrate(problem.velocity, START[:2], 0.0, 1.0, rtol=tolerance, atol=tolerance)
        return (y - problem.solution(START[:2], 0.0, 1.0)).abs().max().item()

    assert error(1e-8) < 1e-2 * error(1e-4)
    assert error(1e-11) < 1e-2 * error(1e-8)


def test_rk45_sample_does_not_depend_on_its_batch():
    together = Tracking(RATES)
    y = integrate(together.velocity, START, 0.0, 1.0, rtol=1e-6, atol=1e-6)
    for i in range(len(RATES)):
        alone = Tracking(RATES[i : i + 1])
        y_alone = integrate(alone.velocity, START[i : i + 1], 0.0, 1.0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y[i : i + 1], y_alone, rtol=1e-14, atol=1e-14)
        assert together.evaluations[i] == alone.evaluations[0]
    # A stiff neighbour costs the others nothing.
    assert together.evaluations[0] < together.evaluations[3] / 3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_rk45_of_one_sample_is_scipys(tolerance):
    # The same formulas and the same control of the step, also where steps are rejected: a bump it may stumble over.
    count = 0

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return 100 * torch.exp(-(((t[:, None] - 0.95) / 0.02) ** 2)) * y - y

    y0 = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        reference = solve_ivp(
            lambda t, y: 100 * np.exp(-(((t - 0.95) / 0.02) ** 2)) * y - y,
            (start, end),
            y0[0].numpy(),
            rtol=tolerance,
            atol=tolerance,
        )
        count = 0
        y = integrate(velocity, y0, start, end, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(y[0].numpy(), reference.y[:, -1], rtol=1e-8)
        assert count == reference.nfev


@pytest.mark.parametrize("solver", SOLVERS)
def test_backward_integration_returns(solver):
    frequency = 3.0

    def rotation(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return frequency * (1 + t[:, None]) * torch.stack([-y[:, 1], y[:, 0]], 1)

    settings = dict(solver=solver, rtol=1e-10, atol=1e-10, num_steps=600)
    end = integrate(rotation, START, 0.2, 1.0, **settings)
    # The angle is 3 ∫ (1 + t) dt = 3 (0.8 + 0.48).
    cosine, sine = math.cos(3 * 1.28), math.sin(3 * 1.28)
    exact = START @ torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    tolerance = 1e-4 if solver == "heun" else 1e-6
    torch.testing.assert_close(end, exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(integrate(rotation, end, 1.0, 0.2, **settings), START, rtol=0, atol=tolerance)


def test_rk45_at_a_tight_tolerance():
    # Rapid in time, so that a clock of single precision (relative error 6e-8) would show.
    problem = Tracking(RATES[:2], frequency=100.0)
    y = integrate(problem.velocity, START[:2], 0.1, 0.9, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, problem.solution(START[:2], 0.1, 0.9), rtol=0, atol=2e-8)
    assert problem.evaluations.max() < 5000


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.9, 0.1)])
def test_no_solver_looks_beyond_the_interval(solver, start, end):
    # Beyond it the velocity may not exist: a VP score at t < 0, for instance.
    times = []

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        times.extend(t.tolist())
        return -y

    integrate(velocity, START, start, end, solver=solver, num_steps=7)
    assert min(times) >= 0.1 - 1e-15 and max(times) <= 0.9 + 1e-15
    assert {start, end} <= {round(t, 12) for t in times}


def test_heun_is_of_second_order_and_keeps_time_in_double_precision():
    problem = Tracking(RATES[:2], frequency=6.0)
    steps = (40, 80, 160, 320)
    errors = []
    for n in steps:
        problem.evaluations.zero_()
        y = integrate(problem.velocity, START[:2], 0.0, 1.0, solver="heun", num_steps=n)
        errors.append((y - problem.solution(START[:2], 0.0, 1.0)).abs().max().item())
        assert torch.equal(problem.evaluations, torch.tensor([2 * n, 2 * n]))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
    # For y' = t the rule is exact, up to the rounding of time.
    y = integrate(lambda y, t, rows: t[:, None] + 0 * y, START[:1], 1e-5, 0.3, solver="heun", num_steps=7)
    torch.testing.assert_close(y, START[:1] + 0.5 * (0.09 - 1e-10), rtol=0, atol=1e-14)


def test_a_solver_by_import_path():
    """Euler's method on y' = −y: (1 − h)^n."""
    y = integrate(lambda y, t, rows: -y, START, 0.0, 1.0, solver="user_classes:euler", num_steps=10)
    torch.testing.assert_close(y, START * 0.9**10, rtol=1e-12, atol=0)


def test_adams_is_of_fourth_order_and_weighs_evaluations_alike():
    problem = Tracking(RATES[:2], frequency=6.0)
    steps = (40, 80, 160, 320)
    errors = []
    for n in steps:
        problem.evaluations.zero_()
        y = integrate(problem.velocity, START[:2], 0.0, 1.0, solver="adams", num_steps=n)
        errors.append((y - problem.solution(START[:2], 0.0, 1.0)).abs().max().item())
        assert torch.equal(problem.evaluations, torch.tensor([n + 10, n + 10]))
    slope = np.polyfit(np.log(steps[1:]), np.log(errors[1:]), 1)[0]
    assert slope == pytest.approx(-4, abs=0.3), errors
    # Cubic polynomials of t are integrated exactly, few steps or many.
    for n in (1, 2, 3, 4, 5, 9):
        y = integrate(lambda y, t, rows: t[:, None] ** 3 + 0 * y, START[:1], 0.2, 1.7, solver="adams", num_steps=n)
        torch.testing.assert_close(y, START[:1] + (1.7**4 - 0.2**4) / 4, rtol=0, atol=1e-13)
    # Of a velocity of noise alone: the sum over n steps of size h of independent numbers has the variance n h².
    generator = torch.Generator().manual_seed(0)

    def noise(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=generator, dtype=y.dtype)

    end = integrate(noise, torch.zeros(1000, 2, dtype=torch.float64), 0.0, 1.0, solver="adams", num_steps=100)
    assert end.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("since", [0.0, 0.5])
def test_a_velocity_that_is_not_finite(solver, since):
    calls = 0

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert calls < 10_000, "the solver does not stop"
        # One sample of the batch is enough.
        bad = (t[:, None] >= since) & (rows[:, None] == 1)
        return torch.where(bad, torch.nan, -y)

    with pytest.raises(FloatingPointError, match="finite") as error:
        integrate(velocity, torch.ones(3, 2, dtype=torch.float64), 0.0, 1.0, solver=solver, num_steps=10)
    assert "\n" not in str(error.value)


def test_a_solution_that_ends_before_the_interval():
    # y' = y² from 1 reaches infinity at t = 1.
    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return y**2

    with pytest.raises(FloatingPointError):
        integrate(velocity, torch.ones(1, 1, dtype=torch.float64), 0.0, 2.0, rtol=1e-6, atol=1e-6)


def test_rk45_of_nothing():
    assert integrate(lambda y, t, rows: -y, torch.ones(0, 3, dtype=torch.float64), 0.0, 1.0).shape == (0, 3)


def test_rk45_at_rest_and_in_single_precision():
    still = integrate(lambda y, t, rows: torch.zeros_like(y), START, 0.0, 1.0)
    assert torch.equal(still, START)
    y = integrate(lambda y, t, rows: -y, START.float(), 0.0, 1.0, rtol=1e-5, atol=1e-5)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, START.float() * math.exp(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(solver="rk4"), "solver='rk4': allowed are rk45, heun, adams, or module:attribute"),
        (dict(solver="heun"), "num_steps=0: solver='heun' needs at least 1"),
        (dict(solver="adams", num_steps=-3), "num_steps=-3: solver='adams' needs at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError) as error:
        integrate(lambda y, t, rows: -y, START, 0.0, 1.0, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("solver", FIXED)
def test_velocity_that_is_not_finite_is_named_with_the_first_time(solver):

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return torch.where(t[:, None] > 0.45, math.nan, y)

    y = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"the velocity of the ODE is not finite at t=0\.5$"):
        integrate(velocity, y, 0.0, 1.0, solver=solver, num_steps=8 if solver == "heun" else 4)
