"""Solvers of ordinary differential equations dy/dt = v(y, t) for a batch of independent samples.

``rk45`` is the Dormand–Prince 5(4) pair. Every sample has its own time, step size and error estimate: it does not
depend on the batch it is in, and costs nothing more once it has arrived. ``heun`` and ``adams`` take a fixed number of
equal steps, of second order at two evaluations each and of fourth order at one.

Adams' method gives nearly all its evaluations the same weight. A part of the velocity that oscillates faster than the
steps, such as a network with an embedding of high frequencies in time has, is therefore averaged out. The stages of a
Runge–Kutta step have very different weights and do not average it out, and an adaptive step shortens until it resolves
the oscillation.

Sources: Dormand and Prince, "A family of embedded Runge-Kutta formulae" (1980); Hairer, Nørsett, Wanner,
"Solving Ordinary Differential Equations I" (1993), Section II.4, for the control of the step size, and III.1 for Adams'
formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiment.registry import resolve
from experiment.runtime import to_host

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""v(y, t, rows): states y (b, D), times t (b,), and which rows of the batch they are (b,) → (b, D)."""
BatchVelocity = Callable[[Tensor, float], Tensor]
"""v(y, t): the states (B, D) of the whole batch at one time → (B, D)."""

# Nodes, stage coefficients, and error weights (5th minus 4th order) of Dormand–Prince 5(4). The last stage is
# evaluated at the new point and serves as the first of the next step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_ORDER = 5


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)


def _rms(y: Tensor) -> Tensor:
    return y.pow(2).mean(1).sqrt()


def _initial_step(velocity: Velocity, y: Tensor, t: Tensor, k: Tensor, rows: Tensor, span: float, rtol, atol) -> Tensor:
    """A first step size per sample such that an Euler step changes the slope by little (Hairer et al., II.4)."""
    scale = atol + rtol * y.abs()
    size_y, size_k = _rms(y / scale), _rms(k / scale)
    guess = torch.where((size_y < 1e-5) | (size_k < 1e-5), 1e-6, 0.01 * size_y / size_k).clamp(max=abs(span))
    signed = guess if span > 0 else -guess
    curvature = _rms((velocity(y + signed[:, None] * k, t + signed, rows) - k) / scale) / guess
    largest = torch.maximum(size_k, curvature)
    refined = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / _ORDER))
    return torch.minimum(100 * guess, refined).clamp(max=abs(span))


def _rk45(velocity: Velocity, y: Tensor, start: float, end: float, *, rtol: float, atol: float) -> Tensor:
    arrived = torch.empty_like(y)
    rows = torch.arange(len(y), device=y.device)
    t = torch.full((len(y),), start, dtype=y.dtype, device=y.device)
    slope = velocity(y, t, rows)
    step = _initial_step(velocity, y, t, slope, rows, end - start, rtol, atol)
    direction = 1.0 if end > start else -1.0
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while len(rows):
        remaining = (end - t).abs()
        vanished = (step < 1e-12 * abs(end - start)) | ~torch.isfinite(step)
        if to_host(vanished.any()):
            raise FloatingPointError(
                f"the step size of the ODE solver vanished at t={t[step.argmin()].item():.6g}: the score is not "
                f"finite, or rtol={rtol}, atol={atol} ask for more than its precision"
            )
        last = step >= remaining
        h = (direction * torch.minimum(step, remaining))[:, None]
        slopes = [slope]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            proposal = y + h * _combine(weights, slopes)
            slopes.append(velocity(proposal, t + node * h[:, 0], rows))
        error = _rms(h * _combine(_ERROR, slopes) / (atol + rtol * torch.maximum(y.abs(), proposal.abs())))
        # A NaN compares false, so it counts as a rejection and the step shrinks until the check above.
        accepted = error <= 1
        factor = (0.9 * error.clamp(min=1e-10) ** (-1 / _ORDER)).nan_to_num(nan=0.2).clamp(0.2, 10.0)
        # Right after a rejection the step does not grow.
        step = h[:, 0].abs() * torch.where(rejected & accepted, factor.clamp(max=1.0), factor)
        rejected = ~accepted
        t = torch.where(accepted, t + h[:, 0], t)
        y = torch.where(accepted[:, None], proposal, y)
        slope = torch.where(accepted[:, None], slopes[-1], slope)
        done = accepted & last
        if to_host(done.any()):
            arrived[rows[done]] = y[done]
            going = ~done
            rows, t, y, slope, step, rejected = (a[going] for a in (rows, t, y, slope, step, rejected))
    return arrived


def _steps(start: float, end: float, num_steps: int) -> Iterator[tuple[float, float]]:
    return itertools.pairwise(torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist())


def _heun(velocity: BatchVelocity, y: Tensor, start: float, end: float, *, num_steps: int, **_) -> Tensor:
    for now, after in _steps(start, end, num_steps):
        h = after - now
        slope = velocity(y, now)
        y = y + 0.5 * h * (slope + velocity(y + h * slope, after))
    return y


# Weights of the last slopes, the newest first: of the explicit formula, which predicts, and the implicit one.
_BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
_MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)


def _adams(velocity: BatchVelocity, y: Tensor, start: float, end: float, *, num_steps: int, **_) -> Tensor:
    """Predict, evaluate, correct: one evaluation a step. The first three steps are those of the classical Runge–Kutta
    method, four evaluations each."""
    h = (end - start) / num_steps
    slopes: list[Tensor] = []  # the newest first
    for now, after in _steps(start, end, num_steps):
        if len(slopes) < 3:
            slopes.insert(0, velocity(y, now))
            middle = 0.5 * (now + after)
            second = velocity(y + 0.5 * h * slopes[0], middle)
            third = velocity(y + 0.5 * h * second, middle)
            fourth = velocity(y + h * third, after)
            y = y + h / 6 * (slopes[0] + 2 * second + 2 * third + fourth)
            continue
        if len(slopes) == 3:
            slopes.insert(0, velocity(y, now))
        slopes.insert(0, velocity(y + h * _combine(_BASHFORTH, slopes), after))
        y = y + h * _combine(_MOULTON, slopes[:4])
        slopes.pop()
    return y


SOLVERS = {"rk45": _rk45, "heun": _heun, "adams": _adams}
"""An import path can name another ``solver(velocity, y, start, end, *, rtol, atol, num_steps)`` of a BatchVelocity."""
FIXED = ("heun", "adams")
"""Those that take ``num_steps`` steps; the other chooses its steps by rtol and atol."""


def check_solver(solver: str, num_steps: int, section: str = "") -> None:
    """Raise ValueError if there is no such solver, or if it needs a number of steps; ``section`` is of the config."""
    resolve(solver, SOLVERS, f"{section}solver")
    if solver in FIXED and num_steps < 1:
        raise ValueError(f"{section}num_steps={num_steps}: {section}solver={solver!r} needs at least 1")


def state_dtype(x: Tensor) -> torch.dtype:
    """The precision of a solver's state and times: double, where the device of ``x`` has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def integrate(
    velocity: Velocity,
    y: Tensor,
    start: float,
    end: float,
    *,
    solver: str = "rk45",
    rtol: float = 1e-3,
    atol: float = 1e-5,
    num_steps: int = 0,
) -> Tensor:
    """The state (B, D) at time ``end`` of dy/dt = v(y, t) from y (B, D) at ``start``; either may be the larger.

    Args:
        velocity: see ``Velocity``; called with the rows of the batch that have not arrived yet.
        y: states at ``start``. In double precision the accumulated rounding is below any sensible tolerance.
        solver: a key of ``SOLVERS`` or an import path.
        rtol, atol: tolerances of 'rk45'.
        num_steps: of 'heun' and 'adams'.

    Raises:
        ValueError: unknown solver, or no steps.
        FloatingPointError: the solver cannot meet the tolerance, or velocity or result are not finite.
    """
    check_solver(solver, num_steps)
    if solver == "rk45":  # it shortens its step where the velocity is not finite
        return _rk45(velocity, y, start, end, rtol=rtol, atol=atol)
    rows = torch.arange(len(y), device=y.device)
    # On the device until the end, so that the host does not wait for every step.
    failed_at = y.new_full((), math.nan)

    def batch_velocity(state: Tensor, t: float) -> Tensor:
        nonlocal failed_at
        slope = velocity(state, torch.full_like(y[:, 0], t), rows)
        failed_at = torch.where(failed_at.isfinite() | slope.isfinite().all(), failed_at, t)
        return slope

    solve = resolve(solver, SOLVERS, "solver")
    result = solve(batch_velocity, y, start, end, rtol=rtol, atol=atol, num_steps=num_steps)
    if math.isfinite(t := to_host(failed_at).item()):
        raise FloatingPointError(f"the velocity of the ODE is not finite at t={t:.6g}")
    if not to_host(torch.isfinite(result).all()):
        raise FloatingPointError(f"the solution of the ODE is not finite at t={end:.6g}")
    return result
