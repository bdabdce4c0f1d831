"""IPF and IMF on the same pairs in the plane, beside the static bridge that both are to reach.

python -m schrodinger_bridge.compare --workdir=W [--pairs=scurve,moons-8gaussians] [--jobs=2]

Every pair is learned by iterative proportional fitting, and by iterative Markovian fitting that starts from the
independent coupling, with the same networks, steps and numbers of samples. The static bridge between as many true
samples comes from Sinkhorn's iteration (``metrics.entropic_plan``): the cost of a bridge's coupling is to be its cost.

Written to W: ``runs/PAIR/ALGORITHM/`` (runs of ``schrodinger_bridge.main``), ``results.json``, ``table.md`` (also
printed) and ``comparison.png``. Stopped at any moment, the same command goes on to the same result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from absl import app, flags

from experiment.command_line import available_cores, parse_flags

from .main import with_error

ALGORITHMS = {"ipf": {}, "imf": {"bridge.algorithm": "imf", "bridge.coupling": "independent"}}
PAIRS = ("scurve", "moons-8gaussians")


class Task(NamedTuple):
    """A bridge to be learned: its pair, algorithm, folder, and overrides of its config."""

    pair: str
    algorithm: str
    directory: str
    overrides: dict[str, object]

    def __str__(self) -> str:
        return f"{self.pair}, {self.algorithm}"

    def bridge_run(self):
        import importlib

        from run_setup import Runtime

        from .training import BridgeRun

        config = importlib.import_module("configs.dsb.2d").get_config(self.pair)
        config.update_from_flattened_dict({**ALGORITHMS[self.algorithm], **self.overrides})
        return BridgeRun(config, self.directory, Runtime("cpu"))


def make_tasks(workdir: Path, pairs: Sequence[str], overrides: Mapping[str, object] | None = None) -> list[Task]:
    """Both algorithms on every pair, all checked.

    Raises:
        ValueError: an unknown pair, none, or a bad override.
    """
    if not pairs:
        raise ValueError("--pairs is empty: give at least one")
    tasks = [
        Task(pair, algorithm, str(workdir / "runs" / pair / algorithm), dict(overrides or {}))
        for pair in dict.fromkeys(pairs)
        for algorithm in ALGORITHMS
    ]
    for task in tasks:
        try:
            task.bridge_run()
        except ValueError as error:
            raise ValueError(f"--pairs={','.join(pairs)}: {error}") from None
    return tasks


def work(task: Task, update: Callable[[int], None]) -> dict[str, object]:
    """Learn, or take what an earlier call has learned; a row of the results."""
    from .metrics import entropic_plan

    run = task.bridge_run()
    run.claim()
    run.restore()
    run.train(update)
    count = run.config.evaluation.num_samples
    plans = [
        entropic_plan(
            *(m.sample(count, (run.config.seed, "static", i, end), test=True) for end, m in enumerate(run.marginals)),
            run.reference.brownian_variance,
        )
        for i in range(run.config.evaluation.num_sets)
    ]
    return {
        "pair": task.pair,
        "algorithm": task.algorithm,
        "num_samples": count,
        "history": run.history,
        "sampling_error": run.sampling_errors,
        "static_cost": fmean(plan.cost for plan in plans),
        "static_violation": max(plan.violation for plan in plans),
    }


def table(rows: Sequence[Mapping]) -> str:
    """In Markdown."""
    iterations = max(entry["iteration"] for entry in rows[0]["history"])
    lines = [
        f"Exact W₂ of {rows[0]['num_samples']} samples to the true marginal, after the first and after {iterations} "
        "iterations, ± its standard error (in parentheses: two sets of true samples); and the coupling's cost "
        "E‖x_N − x₀‖² after the last, with its difference from the static bridge's; in units of the data.",
        "",
        "| pair | algorithm | W₂ at x₀ | W₂ at x_N | cost, backward | cost, forward | static bridge |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        history = {(entry["iteration"], entry["direction"]): entry for entry in row["history"]}
        cells = [row["pair"], row["algorithm"].upper()]
        for direction in ("backward", "forward"):
            first, last = (with_error(history[iteration, direction], "w2") for iteration in (1, iterations))
            cells.append(f"{first} → {last} ({row['sampling_error'][direction]:.3f})")
        for direction in ("backward", "forward"):
            last = history[iterations, direction]
            difference = 100 * (last["transport_cost"] / row["static_cost"] - 1)
            cells.append(f"{with_error(last, 'transport_cost')} ({difference:+.1f} %)")
        lines.append("| " + " | ".join([*cells, f"{row['static_cost']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def run(workdir: str | Path, tasks: Sequence[Task], *, jobs: int) -> list[dict[str, object]]:
    """Learn all, write all files to ``workdir``, return the rows. ``jobs`` processes change no result.

    Raises:
        ValueError: fewer than one job, or a folder that belongs to something else.
    """
    from experiment.files import write_atomically
    from experiment.jobs import run_all
    from experiment.workdir import claim

    from .figures import draw_comparison

    if jobs < 1:
        raise ValueError(f"--jobs={jobs}: at least 1")
    settings = {"pairs": list(dict.fromkeys(task.pair for task in tasks)), **tasks[0].overrides}
    folder = claim(workdir, "schrodinger_bridge comparison", settings)
    config = tasks[0].bridge_run().config
    total = 2 * config.bridge.num_ipf * config.training.n_iters * len(tasks)
    rows = run_all(tasks, work, jobs=jobs, total=total, unit="step", description="bridges")
    text = json.dumps({"experiment": "schrodinger_bridge comparison", "rows": rows}, indent=1) + "\n"
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    write_atomically(folder / "table.md", lambda file: file.write(table(rows).encode()))
    draw_comparison(rows, folder / "comparison.png")
    return rows


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    try:
        tasks = make_tasks(Path(options.workdir), options.pairs)
        print(table(run(options.workdir, tasks, jobs=options.jobs)))
    except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for the runs, results.json, table.md and figure.", required=True)
    flags.DEFINE_list("pairs", list(PAIRS), "Arguments of configs/dsb/2d.py.")
    flags.DEFINE_integer("jobs", available_cores(), "Processes that share the runs, about 1 GB each.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
