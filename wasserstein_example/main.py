"""The exact 2-Wasserstein distance between Gaussian data and the samples of every sampler, for nine forward processes.

    python -m wasserstein_example.main --workdir=W [--steps=8,16,…] [--dimensions=1,4,…] [--figures=w2,…]

The data are N(m, Σ) with all components of m equal to ``--mean`` and the eigenvalues of Σ between
``--smallest_variance`` and ``--largest_variance``. Three questions: how W₂ falls with the number of steps K; how many
steps K(ε) are needed if, as in the theory, the horizon grows until infinitely many steps leave ε/2; and what an error
of the score costs (``theory``). ``digits`` asks the first of trained networks.

Written to W: ``results.json``, ``tables.md`` (also printed) and the figures as PNG.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
from absl import app, flags

from experiment.command_line import parse_counts, parse_flags
from experiment.files import write_atomically
from experiment.workdir import claim

from .figures import FIGURES, STYLE
from .theory import Results, Settings, compute, tables

EXPERIMENT = "wasserstein_example"


def parse_settings(
    steps: Sequence[str], dimensions: Sequence[str], mean: float, smallest_variance: float, largest_variance: float
) -> Settings:
    """Checked settings.

    Raises:
        ValueError: naming the flag.
    """
    if not math.isfinite(mean):
        raise ValueError(f"--mean={mean}: allowed are finite numbers")
    if not 0 < smallest_variance <= largest_variance < math.inf:
        raise ValueError(
            f"--smallest_variance={smallest_variance}, --largest_variance={largest_variance}: the covariance must be "
            "positive definite, 0 < smallest_variance <= largest_variance"
        )
    counts = parse_counts("steps", steps), parse_counts("dimensions", dimensions)
    return Settings(*counts, mean, smallest_variance, largest_variance)


def run(workdir: str | Path, settings: Settings, figures: Sequence[str]) -> str:
    """Compute, write all files to ``workdir`` and return the tables.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    for name in figures:
        if name not in FIGURES:
            raise ValueError(f"--figures={name}: allowed are {', '.join(FIGURES)}")
    folder = claim(workdir, EXPERIMENT, settings._asdict())
    results = compute(settings)
    content = {"experiment": EXPERIMENT, "settings": settings._asdict()} | {
        name: getattr(results, name) for name in Results._fields[1:]
    }
    text = tables(results)
    for name, written in (("results.json", json.dumps(content, indent=1) + "\n"), ("tables.md", text)):
        write_atomically(folder / name, lambda file, written=written: file.write(written.encode()))
    with matplotlib.rc_context(STYLE):
        for name in figures:
            write_atomically(folder / f"{name}.png", partial(FIGURES[name](results).savefig, format="png"))
    return text


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for results.json, tables.md and the figures.", required=True)
    flags.DEFINE_list("steps", [str(2**k) for k in range(3, 14)], "Numbers of steps K.")
    flags.DEFINE_list("dimensions", ["1", "4", "16", "64", "256"], "Dimensions d of the data.")
    flags.DEFINE_float("mean", 0.5, "Every component of the data's mean.")
    flags.DEFINE_float("smallest_variance", 0.25, "Lower end of the eigenvalues of the data's covariance.")
    flags.DEFINE_float("largest_variance", 1.0, "Upper end of the eigenvalues of the data's covariance.")
    flags.DEFINE_list("figures", list(FIGURES), "Which figures to draw.")


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    given = flags.FLAGS
    try:
        settings = parse_settings(
            given.steps, given.dimensions, given.mean, given.smallest_variance, given.largest_variance
        )
        print(run(given.workdir, settings, given.figures))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
