"""The tutorial's figures: python -m tutorial_example.main --figure=NAME|all --workdir=W [--jobs=2]

Written to W: NAME.png of every figure; table.md (also printed) and results.json of all that W has; runs/NAME/ with the
checkpoints and results of each. Finished figures are kept, interrupted ones continue.

Source of the choice of ideas: Trombetta, "Introduction to Score-based models" (2023).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from absl import app, flags
from run_setup import Interrupted

from experiment.command_line import available_cores, parse_flags
from experiment.files import write_atomically
from experiment.jobs import run_all
from experiment.workdir import claim

from .conditional import Conditional
from .diffusion import Ddpm, EpsilonAndScore
from .digits import Digits
from .discretisation import Discretisation
from .flow import ProbabilityFlow
from .langevin import AnnealedLangevin, Langevin
from .posterior import Posterior
from .score_matching import ScarceData, ScoreMatching
from .sdes import Sdes
from .tutorial_figure import EXPERIMENT, VERSION, Result, TutorialFigure, markdown_table, read_result, write_result

FIGURES: dict[str, TutorialFigure] = {
    figure.name: figure
    for figure in (
        ScoreMatching(),
        Langevin(),
        ScarceData(),
        AnnealedLangevin(),
        Ddpm(),
        Sdes(),
        Discretisation(),
        ProbabilityFlow(),
        EpsilonAndScore(),
        Conditional(),
        Posterior(),
        Digits(),
    )
}
"""By name, in the order of the tutorial."""
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "savefig.dpi": 150}


class Task(NamedTuple):
    """A figure to be computed in W."""

    workdir: Path
    figure: TutorialFigure

    @property
    def folder(self) -> Path:
        return self.workdir / "runs" / self.figure.name

    def __str__(self) -> str:
        return self.figure.name


def work(task: Task, update: Callable[[int], object]) -> None:
    """Compute what an earlier call has not finished."""
    if read_result(task.folder, task.figure) is None:
        write_result(task.folder, task.figure, task.figure.compute(task.folder, update))
    else:
        update(task.figure.steps)


def claims_table(result: Result) -> str:
    rows = []
    for c in result.claims:
        sign = {"<=": "≤", ">=": "≥"}[c.relation]
        rows.append((c.text, f"{c.measured:.3g}", f"{sign} {c.bound:.3g}", "yes" if c.holds else "**no**"))
    return markdown_table(("what must hold", "measured", "allowed", "holds"), rows)


def report(results: Mapping[str, tuple[TutorialFigure, Result]]) -> str:
    """table.md: of every figure what must hold, and its table."""
    parts = ["# Tutorial\n"]
    for figure, result in results.values():
        parts.append(f"## {figure.title}\n\n`--figure={figure.name}`\n")
        parts += [claims_table(result), figure.table(result.numbers)]
    return "\n".join(parts)


def run(
    workdir: str | Path, names: str, *, jobs: int = 1, figures: Mapping[str, TutorialFigure] = FIGURES
) -> tuple[str, bool]:
    """Compute figures, or what is left of them; write all files; return the report and whether all claims hold.

    Args:
        workdir: W.
        names: one of ``figures``, several separated by commas, or 'all'.
        jobs: processes; they change no result.
        figures: the registry.

    Raises:
        ValueError: bad input, or a workdir of another experiment or other settings; nothing has been computed then.
    """
    chosen = list(figures) if names == "all" else list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in figures:
            raise ValueError(f"--figure={name}: allowed are {', '.join(figures)}, all")
    if jobs < 1:
        raise ValueError(f"--jobs={jobs}: at least 1")
    settings = {name: asdict(figure) for name, figure in figures.items()}
    folder = claim(workdir, EXPERIMENT, {"version": VERSION, **settings})
    # The longest first, so that the processes end at about the same time.
    tasks = sorted((Task(folder, figures[name]) for name in chosen), key=lambda task: -task.figure.steps)
    shared = [task for task in tasks if not task.figure.own_progress]
    total = sum(task.figure.steps for task in shared)
    run_all(shared, work, jobs=jobs, total=total, unit="step", description="tutorial")
    for task in tasks:
        if task.figure.own_progress:
            work(task, lambda steps: None)
    results = {}
    for name, figure in figures.items():
        if (result := read_result(folder / "runs" / name, figure)) is not None:
            results[name] = figure, result
    with matplotlib.rc_context(STYLE):
        for name in chosen:
            figure, result = results[name]
            write_atomically(folder / f"{name}.png", partial(figure.draw(result).savefig, format="png"))
    text = report(results)
    holds = all(c.holds for _, result in results.values() for c in result.claims)
    record = {
        "experiment": EXPERIMENT,
        "figures": {
            name: {
                "settings": asdict(figure),
                "claims": [{**c._asdict(), "holds": c.holds} for c in result.claims],
                **result.numbers,
            }
            for name, (figure, result) in results.items()
        },
    }
    for name, content in (("results.json", json.dumps(record, indent=1) + "\n"), ("table.md", text)):
        write_atomically(folder / name, lambda file, content=content: file.write(content.encode()))
    return text, holds


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for figures, table, results and runs.", required=True)
    flags.DEFINE_string("figure", "all", f"Which: {', '.join(FIGURES)}; several separated by commas; or all.")
    flags.DEFINE_integer("jobs", available_cores(), "Processes that share the figures, about 1 GB each.")


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    torch.set_num_threads(1)
    try:
        text, holds = run(options.workdir, options.figure, jobs=options.jobs)
    except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the same command resumes")
    print(text)
    if not holds:
        sys.exit("not everything that must hold does: see the table")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
