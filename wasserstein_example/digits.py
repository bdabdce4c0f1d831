"""FID against the number of sampling steps for nine forward processes trained on digits, and what theory says to it.

    python -m wasserstein_example.digits --workdir=W [--processes=ve,vp,…] [--seeds=2] [--jobs=2] [--steps=…]

Every process of ``configs/wasserstein/digits.py`` is trained with every seed, and every model sampled with each number
K of steps by three samplers: the exponential integrator, which the paper analyses, ancestral sampling, which is common
in practice, and Heun's method for the probability-flow ODE, two network evaluations a step. FID is that of 1000 samples
to the training set, in the features of a classifier of digits (``features.classifier``).

Beside it the exact W₂ between N(m, Σ), with the mean and covariance of the training set, and the law of the same
sampler with that Gaussian's own score (``exact``): what discretisation, starting from the prior and stopping
before t = 0 would cost if the data were Gaussian and nothing had to be learned. Its unit is the range of a pixel, for
all processes.

Errors. Of the samples: the delete-a-group jackknife over G = 20 groups, s² = (G − 1)/G Σ_g (FID_g − mean)², FID_g
without group g. Of training and samples together: the range over seeds, and, as a few seeds say little, the standard
deviation of log FID between seeds pooled over all processes.

Written to W: ``runs/PROCESS/seed_K/`` (runs of ``main.py``), ``results.json``, ``table.md`` (also printed) and
``fid.png``. Interrupted, the same command continues to the same numbers; finished runs and samples are kept, also when
more seeds, processes or steps are asked for.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from ml_collections import ConfigDict
from run_setup import FREE_IN_TRAINING, Run, checked
from scipy.stats import spearmanr

import run_lib
from configs.wasserstein.digits import MODELS, VP, get_config
from data import sets
from evaluation import JACKKNIFE_GROUPS, Features, fid_with_error
from exact.gaussian_law import diagonalise, sampler_law, wasserstein
from experiment.command_line import available_cores, parse_counts, parse_flags
from experiment.files import write_atomically
from experiment.jobs import run_all
from experiment.runtime import Runtime
from experiment.workdir import claim
from features.classifier import train_classifier
from features.extraction import FeatureExtractor, extract_features
from sde_lib import get_sde

from . import figures, theory

logger = logging.getLogger(__name__)

EXPERIMENT = "wasserstein_example on digits"
VERSION = 1
"""To be raised when a fix changes what training, sampling or FID compute; a folder of another version is refused."""


class Sampler(NamedTuple):
    """How it is called, the flag of its numbers of steps, their default, and network evaluations a step."""

    title: str
    flag: str
    steps: tuple[int, ...]
    evaluations: int


SAMPLERS = {
    "exponential_integrator": Sampler("exponential integrator", "steps", (5, 10, 20, 50, 100, 200, 500), 1),
    "ancestral_sampling": Sampler("ancestral", "ancestral_steps", (5, 10, 20, 50, 100), 1),
    "heun": Sampler("flow, Heun", "heun_steps", (5, 10, 20, 50), 2),
}
NAMES = {process: f"{'vp' if process in VP else 've'}_{fields['model.schedule']}" for process, fields in MODELS.items()}
"""The theory's names of the config's processes."""
FEATURE_SEED = 42
"""Of the feature classifier, which all runs share."""


class Task(NamedTuple):
    """A run: one process and seed."""

    process: str
    seed: int
    directory: str
    cache_dir: str
    device: str
    plan: tuple[tuple[str, int], ...]
    """Samplers and their numbers of steps."""
    overrides: dict[str, object]

    def __str__(self) -> str:
        return f"{self.process}, seed {self.seed}"

    @property
    def config(self) -> ConfigDict:
        config = get_config(self.process)
        config.update_from_flattened_dict({"seed": self.seed, **self.overrides})
        return config

    def runtime(self, on_progress: Callable[[int], None] | None = None) -> run_lib.Runtime:
        return run_lib.Runtime(self.device, cache_dir=self.cache_dir, on_progress=on_progress)


def evaluations(sampler: str, steps: int) -> int:
    """Network evaluations for one sample, the last of which removes noise."""
    return SAMPLERS[sampler].evaluations * steps + 1


# ------------------------------------------------------------------------------------------------ training and sampling


def train(task: Task, update: Callable[[int], None]) -> None:
    run_lib.train(task.config, task.directory, task.runtime(update))


def sample(task: Task, update: Callable[[int], None]) -> list[dict]:
    """FID of one model by every sampler and number of steps. Every finished one is kept in its own file."""
    config = task.config
    extractor, real = reference_features(config, task.cache_dir, task.runtime().accelerator().device)
    rows = []
    for sampler, steps in task.plan:
        path = Path(task.directory) / "fid" / f"{sampler}-{steps}.json"
        key = {"process": task.process, "seed": task.seed, "sampler": sampler, "K": steps}
        key["num_samples"] = config.eval.num_samples
        row = _read_row(path, key)
        cost = evaluations(sampler, steps)
        if row is None:
            runtime = task.runtime(lambda images, cost=cost: update(images * cost))
            row = key | measure(sampling_config(config, sampler, steps), task.directory, runtime, extractor, real)
            write_atomically(path, lambda file, row=row: file.write(json.dumps(row).encode()))
        else:
            update(config.eval.num_samples * cost)
        rows.append(row)
    return rows


def _read_row(path: Path, key: Mapping[str, object]) -> dict | None:
    """A stored row, or None if it is missing, damaged, or that of other settings."""
    if not path.exists():
        return None
    try:
        row = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is made again", path, error)
        return None
    return row if key.items() <= row.items() and {"fid", "fid_se", "nfe"} <= row.keys() else None


def sampling_config(config: ConfigDict, sampler: str, steps: int) -> ConfigDict:
    config.sampling.num_steps = steps
    if sampler == "heun":
        config.sampling.update(method="ode", solver="heun")
    else:
        config.sampling.update(method="pc", predictor=sampler)
    return config


def measure(
    config: ConfigDict,
    workdir: str,
    runtime: run_lib.Runtime,
    extractor: FeatureExtractor,
    real: Features,
) -> dict[str, float]:
    """Sample and compare: FID, its jackknife error, and network evaluations as counted."""
    with np.load(run_lib.sample(config, workdir, runtime) / "samples.npz", allow_pickle=False) as file:
        images, nfe = torch.from_numpy(file["images"]).permute(0, 3, 1, 2), float(file["nfe"])
    generated = extract_features(extractor, images, config.eval.batch_size)
    distance, error = fid_with_error(real.pool, generated.pool)
    return {"nfe": nfe, "fid": distance, "fid_se": error}


def reference_features(config: ConfigDict, cache_dir: str, device: torch.device) -> tuple[FeatureExtractor, Features]:
    """The feature classifier, made once, then read from ``cache_dir``, and the features of the training set."""
    train_data, test_data = sets.get_dataset(config)
    extractor = train_classifier(
        train_data, test_data, seed=FEATURE_SEED, cache_dir=cache_dir, runtime=Runtime(device.type)
    )
    images, _ = train_data.batch(torch.arange(len(train_data)))
    return extractor, extract_features(extractor, images, config.eval.batch_size)


# ----------------------------------------------------------------------------------------------------------- the theory


def gaussian_rows(tasks: Sequence[Task]) -> list[dict]:
    """W₂ between the training set's Gaussian and the law of each sampler with its exact score."""
    train_data, _ = sets.get_dataset(tasks[0].config)
    levels = train_data.batch(torch.arange(len(train_data)))[0].flatten(1).double()
    # Of uniformly dequantised levels: (k + u)/L.
    mean = (levels.mean(0) + 0.5) / train_data.num_levels
    covariance = (torch.cov(levels.T) + torch.eye(levels.shape[1]) / 12) / train_data.num_levels**2
    rows = []
    for task in {task.process: task for task in tasks}.values():
        config = task.config
        scale = 2.0 if config.data.centered else 1.0
        data, _ = diagonalise(scale * mean - (scale - 1), scale**2 * covariance)
        for sampler, steps in task.plan:
            distance = wasserstein(sampler_law(get_sde(config), data, sampler, steps), data)
            rows.append({"process": task.process, "sampler": sampler, "K": steps, "w2": distance / scale})
    return rows


# -------------------------------------------------------------------------------------------------------------- results


class Results(NamedTuple):
    """What table and figure are made from."""

    processes: tuple[str, ...]
    seeds: int
    plan: tuple[tuple[str, int], ...]
    rows: list[dict]
    gaussian: list[dict]
    feature_test_accuracy: float

    @property
    def samplers(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.plan))

    def steps(self, sampler: str) -> list[int]:
        return [steps for name, steps in self.plan if name == sampler]

    def fid(self, sampler: str, steps: int) -> np.ndarray:
        """(processes, seeds)"""
        found = {(r["process"], r["seed"]): r["fid"] for r in self.rows if (r["sampler"], r["K"]) == (sampler, steps)}
        return np.array([[found[process, seed] for seed in range(self.seeds)] for process in self.processes])

    def w2(self, sampler: str, steps: int) -> np.ndarray:
        """(processes,)"""
        found = {r["process"]: r["w2"] for r in self.gaussian if (r["sampler"], r["K"]) == (sampler, steps)}
        return np.array([found[process] for process in self.processes])

    def sampling_error(self, sampler: str, steps: int) -> float:
        """Relative, the median over models."""
        chosen = [r["fid_se"] / r["fid"] for r in self.rows if (r["sampler"], r["K"]) == (sampler, steps)]
        return float(np.median(chosen))

    def seed_deviation(self, sampler: str, steps: int) -> float | None:
        """Standard deviation of log FID between seeds, pooled over processes; None for one seed."""
        if self.seeds == 1:
            return None
        return float(np.sqrt(np.log(self.fid(sampler, steps)).var(axis=1, ddof=1).mean()))

    def rank_correlation(self, sampler: str, steps: int) -> float | None:
        """Spearman's, over processes, between mean FID and the Gaussian's W₂; None for fewer than three."""
        if len(self.processes) < 3:
            return None
        return float(spearmanr(self.fid(sampler, steps).mean(1), self.w2(sampler, steps)).statistic)


def table(results: Results) -> str:
    """In Markdown."""
    parts = [
        f"FID of {results.rows[0]['num_samples']} samples to the training set: mean over {results.seeds} seed(s), in "
        "parentheses the smallest and the largest; features of a classifier with a test accuracy of "
        f"{100 * results.feature_test_accuracy:.1f} %. Below the processes: the median relative standard error of one "
        "FID from its samples; the standard deviation of log FID between seeds, pooled over processes; Spearman's rank "
        "correlation, over processes, with the W₂ of the table that follows.\n"
    ]
    titles = [theory.TITLES[NAMES[process]] for process in results.processes]
    for sampler in results.samplers:
        name, steps = SAMPLERS[sampler].title, results.steps(sampler)
        columns = [results.fid(sampler, k) for k in steps]
        rows = [(title, *(_with_range(fid[i]) for fid in columns)) for i, title in enumerate(titles)]
        below = {
            "error of the samples": results.sampling_error,
            "deviation between seeds": results.seed_deviation,
            "rank correlation": results.rank_correlation,
        }
        rows += [(label, *(theory.number(of(sampler, k)) for k in steps)) for label, of in below.items()]
        header = (name, *(f"K = {k}" for k in steps))
        parts.append(theory.markdown_table(header, rows))
        columns = [results.w2(sampler, k) for k in steps]
        rows = [(title, *(f"{w2[i]:.2g}" for w2 in columns)) for i, title in enumerate(titles)]
        parts.append(f"W₂ on the Gaussian with the digits' mean and covariance, exact score: {name}.\n")
        parts.append(theory.markdown_table(header, rows))
    return "\n".join(parts)


def _with_range(values: np.ndarray) -> str:
    """Mean over seeds (n,), with the smallest and the largest."""

    def text(value: float) -> str:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    if len(values) == 1:
        return text(values[0])
    return f"{text(values.mean())} ({text(values.min())}–{text(values.max())})"


def draw_fid(results: Results) -> Figure:
    """Digits: FID against the number of steps, and below it W₂ on the Gaussian of the same mean and covariance.

    Bars reach from the smallest to the largest FID of all seeds.
    """
    figure = figures.new_figure(7.2, 5.6)
    axes = figure.subplots(2, len(results.samplers), sharex="col", sharey="row", squeeze=False)
    handles = []
    for (measured, predicted), sampler in zip(axes.T, results.samplers, strict=True):
        steps = results.steps(sampler)
        for i, process in enumerate(results.processes):
            name, line = NAMES[process], "o--" if process in VP else "o-"
            style = {"color": figures.COLOURS[name], "linewidth": 1.0, "markersize": 2.2}
            values = np.array([results.fid(sampler, k)[i] for k in steps])
            mean = values.mean(1)
            reach = np.abs(np.stack((values.min(1), values.max(1))) - mean)
            measured.errorbar(steps, mean, reach, fmt=line, capsize=1.5, elinewidth=0.8, **style)
            predicted.plot(steps, [results.w2(sampler, k)[i] for k in steps], line, **style)
            if measured is axes[0, 0]:
                handles.append(Line2D([], [], linestyle=line[1:], color=style["color"], label=theory.TITLES[name]))
        for ax in (measured, predicted):
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(steps, [str(k) for k in steps])
            ax.set_xticks([], minor=True)
        measured.set_title(SAMPLERS[sampler].title)
        predicted.set_xlabel("sampling steps K")
    axes[0, 0].set_ylabel("trained networks:\nFID (digits features)")
    axes[1, 0].set_ylabel("Gaussian, exact score:\nW₂ (range of a pixel)")
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def make_tasks(
    workdir: str | Path,
    *,
    processes: Sequence[str],
    seeds: int,
    steps: Mapping[str, Sequence[int]],
    device: str = "cpu",
    overrides: Mapping[str, object] | None = None,
) -> list[Task]:
    """All runs, seed by seed; W/runs/PROCESS/seed_K is the folder of one.

    Args:
        workdir: W.
        processes: names of ``configs/wasserstein/digits.py``.
        seeds: seeds 0 … N − 1.
        steps: numbers of steps of each of ``SAMPLERS``; one that is not named, or has none, is left out.
        device: of every run.
        overrides: of fields of every config.

    Raises:
        ValueError: an unknown process, none, fewer than one seed, or no steps at all; a bad override; a folder that
            holds another run.
    """
    for process in processes:
        if process not in MODELS:
            raise ValueError(f"--processes={process}: allowed are {', '.join(MODELS)}")
    if not processes:
        raise ValueError("--processes is empty: give at least one")
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: at least 1")
    plan = tuple((sampler, k) for sampler in SAMPLERS for k in steps.get(sampler, ()))
    if not plan:
        names = ", ".join(f"--{sampler.flag}" for sampler in SAMPLERS.values())
        raise ValueError(f"{names} are all empty: give at least one number of steps")
    root = Path(workdir)
    tasks = [
        Task(process, seed, str(root / "runs" / process / f"seed_{seed}"), str(root / "cache"), device, plan, {})
        for seed in range(seeds)
        for process in dict.fromkeys(processes)
    ]
    tasks = [task._replace(overrides=dict(overrides or {})) for task in tasks]
    for task in tasks:  # all configs and folders are good before any work starts
        count = task.config.eval.num_samples
        if count < 2 * JACKKNIFE_GROUPS:
            raise ValueError(f"eval.num_samples={count}: FID and its error need at least {2 * JACKKNIFE_GROUPS}")
        with checked():
            Run(task.config, task.directory, task.runtime(), free_fields=FREE_IN_TRAINING)
    return tasks


def run(workdir: str | Path, tasks: Sequence[Task], *, jobs: int) -> Results:
    """Train, sample and write all files to ``workdir``. The number of processes, ``jobs``, changes no result.

    Raises:
        ValueError: fewer than one job, or a folder that belongs to something else; nothing has been written.
    """
    if jobs < 1:
        raise ValueError(f"--jobs={jobs}: at least 1")
    _check_results_kept(Path(workdir) / "results.json", tasks)
    folder = claim(workdir, EXPERIMENT, {**tasks[0].overrides, "device": tasks[0].device, "version": VERSION})
    config, plan = tasks[0].config, tasks[0].plan
    run_all(
        tasks,
        train,
        jobs=jobs,
        total=config.training.n_iters * len(tasks),
        unit="step",
        description="train",
    )
    device = tasks[0].runtime().accelerator().device
    extractor, _ = reference_features(config, tasks[0].cache_dir, device)  # not by two processes at once
    cost = config.eval.num_samples * sum(evaluations(*pair) for pair in plan)
    rows = run_all(tasks, sample, jobs=jobs, total=cost * len(tasks), unit="evaluation", description="sample")
    results = Results(
        tuple(dict.fromkeys(task.process for task in tasks)),
        len({task.seed for task in tasks}),
        plan,
        [row for of_task in rows for row in of_task],
        gaussian_rows(tasks),
        extractor.test_accuracy,
    )
    text = json.dumps({"experiment": EXPERIMENT, **results._asdict()}, indent=1) + "\n"
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    write_atomically(folder / "table.md", lambda file: file.write(table(results).encode()))
    with matplotlib.rc_context(figures.STYLE):
        write_atomically(folder / "fid.png", partial(draw_fid(results).savefig, format="png"))
    return results


def _check_results_kept(path: Path, tasks: Sequence[Task]) -> None:
    """Refuse to write fewer results over more."""
    if not path.exists():
        return
    try:
        rows = json.loads(path.read_bytes())["rows"]
        stored = {(row["process"], row["seed"], row["sampler"], row["K"]) for row in rows}
    except (ValueError, KeyError, TypeError):  # damaged; it is made anew from the rows of the runs
        return
    if lost := stored - {(task.process, task.seed, *pair) for task in tasks for pair in task.plan}:
        raise ValueError(
            f"--workdir={path.parent}: {path.name} holds {len(lost)} rows that are not asked for now, e.g. "
            f"{', '.join(map(str, min(lost)))}; ask for all of them, or choose another folder"
        )


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for the runs, results.json, table.md and fid.png.", required=True)
    flags.DEFINE_list("processes", list(MODELS), "Forward processes, names of configs/wasserstein/digits.py.")
    flags.DEFINE_integer("seeds", 2, "Seeds 0 … N−1 of every process.")
    for sampler in SAMPLERS.values():
        description = f"Numbers of steps K: {sampler.title}. Empty: without it."
        flags.DEFINE_list(sampler.flag, [str(k) for k in sampler.steps], description)
    flags.DEFINE_integer("jobs", available_cores(), "Processes that share the runs, about 1 GB each.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        steps = {
            name: parse_counts(sampler.flag, given[sampler.flag].value) if given[sampler.flag].value else ()
            for name, sampler in SAMPLERS.items()
        }
        tasks = make_tasks(
            given.workdir, processes=given.processes, seeds=given.seeds, steps=steps, device=given.device
        )
        print(table(run(given.workdir, tasks, jobs=given.jobs)))
    except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")
    except run_lib.Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
