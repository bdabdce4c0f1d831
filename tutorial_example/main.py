"""The tutorial's figures: python -m tutorial_example.main --figure=NAME|all --workdir=W [--jobs=2]

Written to W: NAME.png of every figure; table.md (also printed), what must hold and whether it does; results.json, all
numbers; runs/NAME/ with the checkpoints and results of each. Finished figures are kept, interrupted ones continue.

Source of the choice of ideas: Trombetta, "Introduction to Score-based models" (2023).
"""

import importlib
import sys
from functools import partial
from pathlib import Path

from experiment.command_line import available_cores, check_positive, command
from experiment.figures import save_figure
from experiment.files import claim, read_json, write_json
from experiment.jobs import Update, run_all
from experiment.results import markdown_table, number, write_results

from .common import EXPERIMENT

VERSION = 1  # part of what a workdir is known by: to be raised when a fix changes what a figure computes
FIGURES = {
    "score_matching": 15_000,
    "langevin": 14_625,
    "scarce_data": 4500,
    "annealed_langevin": 28_000,
    "ddpm": 6999,
    "sdes": 6006,
    "discretisation": 14,
    "probability_flow": 4004,
    "epsilon_and_score": 36,
    "conditional": 12_006,
    "posterior": 7224,
    "digits": 2000,
}
"""Modules, in the order of the tutorial; how many steps each reports: of training, and evaluations of a score."""


def finished(folder: Path, name: str) -> dict | None:
    """What an earlier call has computed."""
    try:
        return read_json(folder / "runs" / name / "result.json", checksum=True)
    except (OSError, ValueError):  # not there, or damaged
        return None


def work(folder: Path, name: str, update: Update) -> None:
    """Compute a figure, or what is left of it. result.json is written last: with it the figure is finished."""
    if finished(folder, name) and (folder / f"{name}.png").exists():
        update(FIGURES[name])
        return
    module = importlib.import_module(f"{__package__}.{name}")
    numbers, claims, picture = module.run(folder / "runs" / name, update)
    save_figure(picture, folder / f"{name}.png")
    rows = [
        {"text": text, "measured": m, "relation": relation, "bound": b, "holds": m <= b if relation == "<=" else m >= b}
        for text, (m, relation, b) in claims.items()
    ]
    result = {"about": module.__doc__, "claims": rows, "numbers": numbers}
    write_json(folder / "runs" / name / "result.json", result, checksum=True)


def section(name: str, about: str, claims: list[dict], numbers: dict) -> str:
    """Of table.md: what a figure shows, and what must hold."""
    lines = [
        (c["text"], number(c["measured"]), f"{c['relation']} {number(c['bound'])}", "yes" if c["holds"] else "**no**")
        for c in claims
    ]
    heading, _, rest = about.partition("\n")
    table = markdown_table(("what must hold", "measured", "bound", "holds"), lines)
    return f"## {heading.rstrip('.')}\n\n`--figure={name}`\n{rest}\n{table}"


def run(workdir: str | Path, *, figure: str = "all", jobs: int = available_cores()) -> None:
    """Compute figures, or what is left of them; write all files, print the table.

    Args:
        workdir: Folder for figures, table, results and runs.
        figure: Which, several separated by commas, or all.
        jobs: Processes that share the figures, about 1 GB each; they change no result.

    Raises:
        ValueError: bad input, or a workdir of another experiment; nothing has been computed then.
        SystemExit: something that must hold does not.
    """
    names = list(FIGURES) if figure == "all" else list(dict.fromkeys(figure.split(",")))
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"--figure={name}: allowed are {', '.join(FIGURES)}, all")
    check_positive(jobs=jobs)
    folder = claim(workdir, EXPERIMENT, {"version": VERSION})
    names.sort(key=FIGURES.get, reverse=True)  # so that the processes end at about the same time
    tasks = {name: partial(work, folder, name) for name in names}
    run_all(tasks, jobs=jobs, total=sum(map(FIGURES.get, names)), unit="step", description="tutorial")
    records = {name: record for name in FIGURES if (record := finished(folder, name))}
    results = {name: {"claims": record["claims"], **record["numbers"]} for name, record in records.items()}
    text = "\n".join(["# Tutorial\n", *(section(name, **record) for name, record in records.items())])
    print(write_results(folder, {"experiment": EXPERIMENT, "figures": results}, text))
    if not all(c["holds"] for record in records.values() for c in record["claims"]):
        sys.exit("not everything that must hold does: see the table")


if __name__ == "__main__":
    command(run)
