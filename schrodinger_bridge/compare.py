"""IPF and IMF on the same pairs in the plane, next to the static bridge that both are to reach.

python -m schrodinger_bridge.compare --workdir=W [--pairs=scurve,moons-8gaussians] [--jobs=2]

Every pair is learned by iterative proportional fitting, and by iterative Markovian fitting that starts from the
independent coupling, with the same networks, steps and numbers of samples. The static bridge between as many true
samples comes from Sinkhorn's iteration (``metrics.entropic_plan``): the cost of a bridge's coupling is to be its cost.

Written to W: ``runs/PAIR/ALGORITHM/`` (runs of ``schrodinger_bridge.main``), ``results.json``, ``table.md`` (also
printed) and ``comparison.png``. Stopped at any moment, the same command goes on to the same result.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from ml_collections import ConfigDict

from experiment.command_line import available_cores, command
from experiment.files import claim
from experiment.jobs import Update, run_all
from experiment.results import markdown_table, with_error, write_results
from experiment.runtime import Runtime

from .figures import draw_comparison
from .half_bridges import BridgeRun
from .metrics import entropic_plan
from .process import BACKWARD, FORWARD

ALGORITHMS = {"ipf": {}, "imf": {"bridge.algorithm": "imf", "bridge.coupling": "independent"}}
get_config = importlib.import_module("configs.dsb.2d").get_config  # no name of a module begins with a digit


def run(workdir: str, pairs: tuple[str, ...] = ("scurve", "moons-8gaussians"), jobs: int = available_cores()) -> str:
    """Learn all pairs by both algorithms, write all files and return the table.

    Args:
        workdir: Folder for the runs, results.json, table.md and figure.
        pairs: Arguments of configs/dsb/2d.py.
        jobs: Processes that share the runs, about 1 GB each.

    Raises:
        ValueError: an unknown pair, none, fewer than one job, or a folder of something else.
    """
    if not pairs:
        raise ValueError("--pairs is empty: give at least one")
    tasks, total = {}, 0
    for pair in dict.fromkeys(pairs):
        for algorithm, fields in ALGORITHMS.items():
            config = get_config(pair)
            config.update_from_flattened_dict(fields)
            total += 2 * config.bridge.num_ipf * config.training.n_iters
            tasks[f"{pair}, {algorithm}"] = partial(learn, config, pair, Path(workdir, "runs", pair, algorithm))
    folder = claim(workdir, "schrodinger_bridge comparison", {"pairs": list(dict.fromkeys(pairs))})
    rows = run_all(tasks, jobs=jobs, total=total, unit="step", description="bridges")
    results = {"experiment": "schrodinger_bridge comparison", "rows": rows}
    return write_results(folder, results, table(rows), {"comparison": draw_comparison(rows)})


def learn(config: ConfigDict, pair: str, folder: Path, update: Update) -> dict[str, object]:
    """One bridge, or what an earlier call has learned; a row of the results."""
    bridge = BridgeRun(config, folder, Runtime("cpu", on_progress=update))
    bridge.train()
    count, plans = config.evaluation.num_samples, []
    for i in range(config.evaluation.num_sets):
        ends = [m.sample(count, (config.seed, "static", i, k), test=True) for k, m in enumerate(bridge.marginals)]
        plans.append(entropic_plan(*ends, bridge.reference.brownian_variance))
    costs, violations = zip(*plans, strict=True)
    return {
        "pair": pair,
        "algorithm": config.bridge.algorithm,
        "num_samples": count,
        "history": bridge.history,
        "sampling_error": bridge.sampling_errors,
        "static_cost": fmean(costs),
        "static_violation": max(violations),
    }


def table(rows: Sequence[Mapping]) -> str:
    """In Markdown."""
    lines = []
    for row in rows:
        distances, costs = [], []
        for direction in (BACKWARD, FORWARD):
            history = [entry for entry in row["history"] if entry["direction"] == direction and entry["iteration"]]
            first, last = (with_error(entry["w2"], entry.get("w2_error")) for entry in (history[0], history[-1]))
            distances.append(f"{first} → {last} ({row['sampling_error'][direction]:.3f})")
            cost, error = history[-1]["transport_cost"], history[-1].get("transport_cost_error")
            costs.append(f"{with_error(cost, error)} ({100 * (cost / row['static_cost'] - 1):+.1f} %)")
        lines.append([row["pair"], row["algorithm"].upper(), *distances, *costs, f"{row['static_cost']:.3f}"])
    header = ["pair", "algorithm", "W₂ at x₀", "W₂ at x_N", "cost, backward", "cost, forward", "static bridge"]
    return (
        f"Exact W₂ of {rows[0]['num_samples']} samples to the true marginal, after the first and after "
        f"{rows[0]['history'][-1]['iteration']} iterations, ± its standard error (in parentheses: two sets of true "
        "samples); and the coupling's cost E‖x_N − x₀‖² after the last, with its difference from the static bridge's; "
        "in units of the data.\n\n" + markdown_table(header, lines)
    )


if __name__ == "__main__":
    command(run)
