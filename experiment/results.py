"""Numbers with their errors, Markdown tables of them, and the files in which a command leaves its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiment.figures import save_figure
from experiment.files import write_json, write_text


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table whose columns are aligned in plain text, too."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean of independent values (N,) and its standard error, std/√N; None for N = 1."""
    values = np.asarray(values, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, float | int | None]:
    """Mean of a − b (N,) with its 95 % interval ``low`` … ``high`` and p-value (Student's; None for N = 1), and in how
    many seeds a < b."""
    d = a - b
    result = {"mean": float(d.mean()), "low": None, "high": None, "p": None}
    if d.std() > 0:
        test = stats.ttest_1samp(d, 0.0)
        low, high = test.confidence_interval(0.95)
        result |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return result | {"lower_in_seeds": int((d < 0).sum()), "seeds": len(d)}


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values (n,) of n tests, corrected for their number: the chance that any true null hypothesis has one below 0.05
    is at most 5 % (Holm, Scandinavian Journal of Statistics 1979). NaN, of a test that was not made, stays."""
    p_values = np.asarray(p_values, dtype=np.float64)
    corrected, order = p_values.copy(), np.argsort(p_values)[: np.isfinite(p_values).sum()]
    corrected[order] = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)).clip(max=1.0)
    return corrected


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, with an exponent where the number is small or large; '–' for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 10 ** max(digits, 4):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return f"{value:.{max(digits - 2, 0)}e}"


def with_error(mean: float, error: float | None) -> str:
    """'mean ± error', to the second digit of the error; without it, if that is None or NaN."""
    if error is None or math.isnan(error):
        return number(mean, 4)
    exponent = 0 if not mean or 1e-3 <= abs(mean) < 1e4 else math.floor(math.log10(max(abs(mean), error)))
    mean, error = mean / 10.0**exponent, error / 10.0**exponent
    decimals = min(6, max(0, 1 - math.floor(math.log10(error)))) if error else 3
    text = f"{mean:.{decimals}f} ± {error:.{decimals}f}"
    return f"({text})e{exponent}" if exponent else text


def write_results(
    folder: Path, results: Mapping[str, object], table: str, figures: Mapping[str, Figure] | None = None
) -> str:
    """Write ``results.json``, ``table.md`` and every figure, as PNG and PDF, to ``folder``; return the table."""
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table)
    for name, figure in (figures or {}).items():
        save_figure(figure, folder / f"{name}.png")
    return table
