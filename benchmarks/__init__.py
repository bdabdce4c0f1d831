"""Variants timed in turn in one process: ``python -m benchmarks.NAME`` prints a table of ratios."""

import experiment  # noqa: F401 -- before all else
