"""The exact 2-Wasserstein distance between Gaussian data and the samples of every sampler, for nine forward processes.

    python -m wasserstein_example.main --workdir=W [--steps=8,16,…] [--dimensions=1,4,…]

How W₂ falls with the number of steps K; how many steps K(ε) are needed if, as in the paper, the horizon grows until
infinitely many steps leave ε/2; what an error of the score costs. ``digits`` asks the first of trained networks.
"""

from __future__ import annotations

import torch

from experiment.command_line import command
from experiment.files import claim
from experiment.results import write_results

from . import figures, theory


def run(
    workdir: str,
    *,
    steps: tuple[int, ...] = tuple(2**k for k in range(3, 14)),
    dimensions: tuple[int, ...] = (1, 4, 16, 64, 256),
) -> str:
    """Compute, write all files and return the tables.

    Args:
        workdir: Folder for results.json, table.md and the figures.
        steps: Numbers of steps K.
        dimensions: Dimensions d of the data; figures and most tables are of the middle one.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    for flag, values in (("steps", steps), ("dimensions", dimensions)):
        if min(values, default=0) < 1:
            raise ValueError(f"--{flag}={','.join(map(str, values))}: allowed are integers from 1 on, at least one")
    settings = theory.Settings(*(tuple(sorted(set(values))) for values in (steps, dimensions)))
    folder = claim(workdir, "wasserstein_example", settings._asdict())

    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    results = theory.compute(settings)
    drawn = {"w2": figures.draw_w2(results), "needed": figures.draw_needed(results)}
    content = {"experiment": "wasserstein_example", **results._asdict(), "settings": settings._asdict()}
    return write_results(folder, content, theory.tables(results), drawn)


if __name__ == "__main__":
    command(run)
