"""The tutorial's figures: python -m tutorial_example.main --figure=NAME|all --workdir=W [--jobs=2]

Written to W: NAME.png of every figure; table.md (also printed) and results.json of all that W has; runs/NAME/ with the
checkpoints and results of each. Finished figures are kept, interrupted ones continue.

Source of the choice of ideas: Trombetta, "Introduction to Score-based models" (2023).
"""

import importlib
import json
import operator
import sys
from functools import partial
from pathlib import Path

from experiment.command_line import available_cores, check_positive, command
from experiment.figures import save_figure
from experiment.files import claim, write_json
from experiment.jobs import Update, run_all
from experiment.results import markdown_table, with_error, write_results

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
    "probability_flow": 4020,
    "epsilon_and_score": 36,
    "conditional": 12_006,
    "posterior": 15_038,
    "digits": 2000,
}
"""Modules, in the order of the tutorial; how many steps each reports: of training, and evaluations of a score."""


def finished(folder: Path, name: str) -> dict | None:
    """What an earlier call has computed."""
    try:
        return json.loads((folder / "runs" / name / "result.json").read_bytes())
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
    holds = {"<=": operator.le, ">=": operator.ge}
    rows = [
        {"text": text, "measured": m, "relation": relation, "bound": bound, "holds": holds[relation](m, bound)}
        for text, (m, relation, bound) in claims.items()
    ]
    write_json(folder / "runs" / name / "result.json", {"about": module.__doc__, "claims": rows, "numbers": numbers})


def table(rows: list[dict]) -> str:
    """A column for every field; 'x_se' is the error of 'x'."""

    def cell(value: object, error: float | None = None) -> str:
        if isinstance(value, list):
            return ", ".join(map(cell, value))
        if isinstance(value, float):
            return with_error(value, error)
        return {"None": "–", "True": "yes", "False": "**no**"}.get(str(value), str(value))

    names = [name for name in rows[0] if not name.endswith("_se")]
    cells = [[cell(row[name], row.get(f"{name}_se")) for name in names] for row in rows]
    return markdown_table([name.replace("_", " ") for name in names], cells)


def section(name: str, about: str, claims: list[dict], numbers: dict) -> str:
    """Of table.md: what a figure shows, what must hold, all numbers."""
    heading, _, rest = about.partition("\n")
    single = {key: value for key, value in numbers.items() if not isinstance(value, list)}
    tables = [table(rows) for rows in (claims, [single], *numbers.values()) if isinstance(rows, list) and rows[0]]
    return "\n".join([f"## {heading.rstrip('.')}\n\n`--figure={name}`\n{rest}", *tables])


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
