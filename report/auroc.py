"""How well a score tells two data sets apart: ``python -m report.auroc IN.csv OUT.csv``.

The files are those of ``main.py --mode=score``, of data like the training data and of other data. For each column,
AUROC is the probability that an item of OUT has a larger value than one of IN, equal ones counted half; ½ is chance.
The standard error is DeLong's, which lets the two sets vary: with V_i the fraction of OUT above item i of IN and W_j
that of IN below item j of OUT, √(var(V)/n + var(W)/m) (DeLong, DeLong, Clarke-Pearson, Biometrics 1988).
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from experiment.command_line import command
from experiment.results import markdown_table, with_error


def auroc(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """AUROC of values (n,) and (m,), and its standard error; a ValueError if one has fewer than two."""
    if min(len(inside), len(outside)) < 2:
        raise ValueError(f"AUROC of {len(inside)} and {len(outside)} items: at least 2 of each")

    def fraction_below(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        order = np.sort(values)
        both = np.searchsorted(order, points, side="left") + np.searchsorted(order, points, side="right")
        return both / (2 * len(values))

    above, below = 1 - fraction_below(outside, inside), fraction_below(inside, outside)
    error = np.sqrt(above.var(ddof=1) / len(inside) + below.var(ddof=1) / len(outside))
    return float(below.mean()), float(error)


def write_auroc(*files: str | Path) -> str:
    """Return the table of two files of scores."""
    if len(files) != 2:
        raise ValueError(f"{len(files)} files are given; needed are two, IN.csv and OUT.csv")
    inside, outside = (_read(Path(file)) for file in files)
    shared = [name for name in inside if name in outside and name not in ("index", "label")]
    if not shared:
        raise ValueError(f"{files[0]} and {files[1]} have no column in common")
    return markdown_table(
        ["column", "AUROC"], [[name, with_error(*auroc(inside[name], outside[name]))] for name in shared]
    )


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        header, *rows = csv.reader(file.read_text().splitlines())
        columns = np.array(rows, dtype=float).reshape(len(rows), len(header)).T
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no file of --mode=score: {str(error).partition(chr(10))[0]}") from None
    return dict(zip(header, columns, strict=True))


if __name__ == "__main__":
    command(write_auroc)
