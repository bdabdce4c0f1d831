"""Sets of points in the plane, as functions (count, random numbers) → (count, 2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.datasets import make_s_curve, make_swiss_roll

__all__ = ["POINT_SETS"]


def _checkerboard(count: int, random: np.random.Generator) -> np.ndarray:
    x1 = random.uniform(-2, 2, count)
    x2 = random.uniform(0, 1, count) - 2 * random.integers(0, 2, count) + np.floor(x1) % 2
    return np.stack([x1, x2], axis=1)


def _pinwheel(count: int, random: np.random.Generator) -> np.ndarray:
    """Five arms of a Gaussian (radius 1 ± 0.3, width 0.1), bent by 0.25 e^radius."""
    angle = 2 * np.pi * random.integers(0, 5, count) / 5
    radius = 1 + 0.3 * random.standard_normal(count)
    across = 0.1 * random.standard_normal(count)
    angle = angle + 0.25 * np.exp(radius)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([radius * cos - across * sin, radius * sin + across * cos], axis=1)


def _on_a_circle(modes: int, deviation: float) -> Callable[[int, np.random.Generator], np.ndarray]:
    def draw(count: int, random: np.random.Generator) -> np.ndarray:
        angle = 2 * np.pi * random.integers(0, modes, count) / modes
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) + deviation * random.standard_normal((count, 2))

    return draw


def _moons(count: int, random: np.random.Generator) -> np.ndarray:
    """Two half-circles of radius 1, interleaved, with noise of 0.05."""
    angle, lower = np.pi * random.uniform(size=count), random.integers(0, 2, count)
    sign = 1 - 2 * lower
    points = np.stack([lower + sign * np.cos(angle), 0.5 * lower + sign * np.sin(angle)], axis=1)
    return points + 0.05 * random.standard_normal((count, 2))


def _circles(count: int, random: np.random.Generator) -> np.ndarray:
    """Circles of radius 1 and 1/2, half of the mass on each, with noise of 0.03."""
    angle, radius = 2 * np.pi * random.uniform(size=count), 1 - 0.5 * random.integers(0, 2, count)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.03 * random.standard_normal((count, 2))


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))


# Before they are standardised. Curves get a little noise, so that they have a density. scikit-learn's moons and circles
# are evenly spaced points: two sets of them are closer to each other than independent draws, and so than any model's.
POINT_SETS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "scurve": lambda n, random: make_s_curve(n, noise=0.05, random_state=_seed(random))[0][:, [0, 2]],
    "swissroll": lambda n, random: make_swiss_roll(n, noise=0.3, random_state=_seed(random))[0][:, [0, 2]],
    "circles": _circles,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
    "8gaussians": _on_a_circle(8, 0.09),
    "mixture": _on_a_circle(4, 0.25),
}
