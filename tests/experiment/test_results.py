"""Numbers with their errors."""

from __future__ import annotations

import math

import pytest

from experiment.results import with_error


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
