"""Numbers with their errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from experiment.results import holm, mean_and_error, with_error


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


def test_holm_keeps_the_chance_of_any_false_finding() -> None:
    """By hand: 4·0.005, 3·0.01, 2·0.03, then the largest so far. Of five true hypotheses the first is rejected with
    probability 1 − 0.99⁵; over 20,000 families its share has a standard error of 0.0015."""
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)
    families = np.random.default_rng(0).uniform(size=(20_000, 5))
    share = np.mean([holm(family).min() < 0.05 for family in families])
    assert abs(share - (1 - 0.99**5)) < 4 * 0.0015
