"""All nine pairs of data set and model over several seeds: results, the table, and what its differences are worth.

Statistics. A number is the mean over seeds ± its standard error (standard deviation over seeds / √N). Two models are
compared seed by seed, d_i = a_i − b_i: they share training points, noise, order, test points and, U and QC, initial
weights. The interval is mean(d) ± t(0.975, N − 1)·std(d)/√N (Student); one that contains 0 does not tell the models
apart. For N = 1 there are no errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiment.files import write_atomically
from experiment.jobs import run_all
from experiment.workdir import claim

from .configs import DATASETS, MODELS, get_config
from .experiment import METRICS, VERSION, Run, evaluate, train

__all__ = ["EXACT", "REFERENCE", "claim_run", "make_table", "make_tasks", "markdown", "paired_difference", "values"]

EXACT = "exact"
"""The exact score, measured like a model (seed 0)."""

# What the public code gives by its own protocol (2 or 3 seeds; score error at matched noise levels, seed 0).
REFERENCE: dict[tuple[str, str], dict[str, str]] = {
    key: dict(zip(("nll", "asym", "nasym", "precision", "recall", "score_error"), values, strict=True))
    for key, values in {
        ("gaussian_8", "u"): ("5.034, 5.063, 5.087", "1.2–2.1e-2", "1.8–3.0e-3", ".94–.96", ".92–.93", ".273"),
        ("gaussian_8", "c"): ("5.168, 5.241, 5.286", "0", "0", ".84–.93", ".86–.92", ".237"),
        ("gaussian_8", "qc"): ("5.021, 5.092, 5.054", "1.0–1.9e-2", "1.5–2.7e-3", ".94–.96", ".92–.93", ".272"),
        ("checkerboard", "u"): ("5.167, 5.083, 5.292", "7.3–11e-2", "1.9–2.4e-2", ".94", ".93–.94", ".667"),
        ("checkerboard", "c"): ("5.096, 5.225, 5.275", "0", "0", ".89–.91", ".93–.95", ".804"),
        ("checkerboard", "qc"): ("5.170, 5.080, 5.307", "5.5–6.4e-2", "1.4–1.7e-2", ".94", ".93–.94", ".670"),
        ("spiral_2", "u"): ("4.932", "1.02", "7.3e-2", ".71", ".84", "2.03"),
        ("spiral_2", "c"): ("5.248", "0", "0", ".34", ".95", "3.14"),
        ("spiral_2", "qc"): ("4.778", "4.3e-1", "5.7e-2", ".66", ".86", "2.14"),
    }.items()
}

TITLES = {
    "nll": "NLL, prior N(0, 9I) (nats)",
    "nll_matched_prior": "NLL, exact prior (nats)",
    "score_error": "score error",
    "asym": "Asym",
    "nasym": "NAsym",
    "precision": "precision",
    "recall": "recall",
    "nfe_sampling": "NFE sampling",
    "nfe_likelihood": "NFE likelihood",
}


class Task(NamedTuple):
    """One row of the results."""

    dataset: str
    model: str
    seed: int
    directory: str
    device: str
    overrides: dict[str, object]

    def __str__(self) -> str:
        return f"{self.dataset}-{self.model}, seed {self.seed}"

    @property
    def config(self) -> ConfigDict:
        config = get_config(f"{self.dataset}-{'u' if self.model == EXACT else self.model}")
        config.update_from_flattened_dict({"seed": self.seed, **self.overrides})
        return config


def claim_run(run: Run) -> None:
    """Refuse a folder that belongs to anything but this run."""
    settings = {**json.loads(run.config.to_json()), "device": run.device.type, "version": VERSION}
    claim(run.workdir, "2d_examples run", settings)


def work(task: Task, update: Callable[[int], None]) -> dict[str, object]:
    """Train and evaluate, or take what an earlier call has finished; a row of the results."""
    run = Run(task.config, Path(task.directory), task.device)
    claim_run(run)
    exact = task.model == EXACT
    step = 0 if exact else task.config.training.n_iters
    if not exact:
        train(run, update)
    metrics = run.evaluation(step)
    if metrics is None:
        metrics = evaluate(run, run.distribution.score if exact else run.model, step=step, exact=exact)
    return {"dataset": task.dataset, "model": task.model, "seed": task.seed, **metrics}


def make_tasks(
    workdir: Path, *, seeds: int, device: str = "cpu", overrides: Mapping[str, object] | None = None
) -> list[Task]:
    """The exact scores, and all nine pairs with seeds 0 … N − 1, seed by seed.

    Args:
        workdir: W; seed k of a pair lives in W/runs/DATASET-MODEL/seed_k.
        seeds: N.
        device: of every run.
        overrides: of fields of every config.

    Raises:
        ValueError: fewer than one seed, or a bad override.
    """
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: at least 1")
    names = [(dataset, EXACT, 0) for dataset in DATASETS]
    names += [(dataset, model, seed) for seed in range(seeds) for dataset in DATASETS for model in MODELS]
    tasks = [
        Task(*name, str(workdir / "runs" / f"{name[0]}-{name[1]}" / f"seed_{name[2]}"), device, dict(overrides or {}))
        for name in names
    ]
    for task in tasks:  # all configs are good before any work starts
        Run(task.config, Path(task.directory), device)
    return tasks


def make_table(workdir: Path, tasks: Sequence[Task], *, jobs: int) -> dict:
    """Train and evaluate every task; write W/results.json and W/table.md; return what results.json holds.

    Finished runs are kept and interrupted ones continue. The number of processes, ``jobs``, changes no result.

    Raises:
        ValueError: fewer than one job, or a workdir that belongs to something else.
    """
    if jobs < 1:
        raise ValueError(f"--jobs={jobs}: at least 1")
    claim(workdir, "2d_examples table", {**tasks[0].overrides, "device": tasks[0].device, "version": VERSION})
    total = sum(task.config.training.n_iters for task in tasks if task.model != EXACT)
    rows = run_all(tasks, work, jobs=jobs, total=total, unit="step", description="2-D examples")
    results = {"experiment": "2d_examples", "seeds": len({task.seed for task in tasks}), "rows": rows}
    results["paired_differences"] = [
        {
            "dataset": dataset,
            "difference": f"qc - {other}",
            "metric": metric,
            **paired_difference(values(rows, dataset, "qc", metric), values(rows, dataset, other, metric)),
        }
        for dataset in DATASETS
        for other in ("u", "c")
        for metric in METRICS
    ]
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(workdir / "results.json", lambda file: file.write(text.encode()))
    write_atomically(workdir / "table.md", lambda file: file.write(markdown(results).encode()))
    return results


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def values(rows: Sequence[Mapping], dataset: str, model: str, metric: str) -> np.ndarray:
    """A metric of a pair (N,), in the order of the seeds."""
    chosen = [row for row in rows if (row["dataset"], row["model"]) == (dataset, model)]
    return np.array([row[metric] for row in sorted(chosen, key=lambda row: row["seed"])])


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, float | int | None]:
    """Mean of a − b (N,) with its 95 % interval ``low`` … ``high`` (None for N = 1), and in how many seeds a < b."""
    d = a - b
    result = {"mean": float(d.mean()), "low": None, "high": None, "lower_in_seeds": int((d < 0).sum()), "seeds": len(d)}
    if len(d) > 1:
        half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
        result |= {"low": float(d.mean() - half), "high": float(d.mean() + half)}
    return result


# ---------------------------------------------------------------------------------------------------------------
# Markdown


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    return f"{value:.1e}"


def _with_error(sample: np.ndarray) -> str:
    mean = float(sample.mean())
    if len(sample) == 1:
        return _number(mean)
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    if mean and 1e-3 <= abs(mean) < 1e3:
        digits = max(0, 1 - math.floor(math.log10(error))) if error else 3
        return f"{mean:.{digits}f} ± {error:.{digits}f}" if digits <= 6 else f"{mean:.4g} ± {error:.1e}"
    return f"{mean:.1e} ± {error:.1e}"


def markdown(results: Mapping) -> str:
    """The table and the paired differences, with the public code's numbers under ours."""
    rows, seeds = results["rows"], results["seeds"]
    lines = [f"# 2-D examples, {seeds} seed{'s' if seeds > 1 else ''}", "", "Mean ± standard error over seeds.", ""]
    names = {"u": "U", "c": "C", "qc": "QC", EXACT: "exact score"}
    for dataset in DATASETS:
        lines += [f"## {dataset}", "", "| model | " + " | ".join(TITLES[m] for m in METRICS) + " |"]
        lines.append("|---" * (len(METRICS) + 1) + "|")
        for model in (*MODELS, EXACT):
            cells = [_with_error(values(rows, dataset, model, metric)) for metric in METRICS]
            lines.append(f"| {names[model]} | " + " | ".join(cells) + " |")
            if model != EXACT:
                reference = REFERENCE[dataset, model]
                lines.append("| *public code* | " + " | ".join(reference.get(m, "") for m in METRICS) + " |")
        exact = next(row for row in rows if (row["dataset"], row["model"]) == (dataset, EXACT))
        lines += [
            "",
            f"Entropy of the density at t = 1e-5: {exact['entropy']:.4f} nats. Its cross-entropy with the test points "
            f"of seed 0, what a perfect model with the exact prior scores: {exact['cross_entropy']:.4f}.",
            "",
        ]
    lines += [
        "## Paired differences",
        "",
        "Mean over seeds of the difference, 95 % interval, and in how many seeds QC has the lower value.",
        "",
        "| data set | metric | QC − U | QC − C |",
        "|---|---|---|---|",
    ]
    cells = {(d["dataset"], d["metric"], d["difference"]): _difference(d) for d in results["paired_differences"]}
    for dataset in DATASETS:
        for metric in METRICS:
            pair = (cells[dataset, metric, "qc - u"], cells[dataset, metric, "qc - c"])
            lines.append(f"| {dataset} | {TITLES[metric]} | {pair[0]} | {pair[1]} |")
    return "\n".join(lines) + "\n"


def _difference(d: Mapping) -> str:
    text = f"{d['mean']:+.2g}"
    if d["low"] is None:
        return text
    text += f" [{d['low']:+.2g}, {d['high']:+.2g}], {d['lower_in_seeds']}/{d['seeds']}"
    return f"**{text}**" if d["low"] > 0 or d["high"] < 0 else text
