"""Numbers with their errors."""

from __future__ import annotations

import itertools
import math

import pytest

from experiment.results import mean_and_error, with_error


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (3.4567, 0.0123, "3.457 ± 0.012"),
        (3.4567, 0.00123, "3.4567 ± 0.0012"),
        (1.881e8, 1.2e6, "(1.881 ± 0.012)e8"),
        (-3e-4, 5e-4, "(-3.0 ± 5.0)e-4"),
        (1e-13, 4e-13, "(1.0 ± 4.0)e-13"),
        (1e-13, 4.0, "0.0 ± 4.0"),
        (0.0, 0.0, "0.000 ± 0.000"),
        (0.61, None, "0.61"),
        (10.974, math.nan, "10.97"),
    ],
)
def test_the_error_says_how_many_digits(mean: float, error: float | None, expected: str) -> None:
    assert with_error(mean, error) == expected


def test_squared_error_is_unbiased() -> None:
    """Over all samples of three numbers, each equally likely, the mean of error² is the variance of the mean, σ²/3."""
    population = (0.0, 1.0, 5.0)
    variance = sum((x - 2.0) ** 2 for x in population) / 3
    errors = [mean_and_error(sample)[1] ** 2 for sample in itertools.product(population, repeat=3)]
    assert sum(errors) / len(errors) == pytest.approx(variance / 3, rel=1e-12)
    assert mean_and_error([4.0]) == (4.0, None)
