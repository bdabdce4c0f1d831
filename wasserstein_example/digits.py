"""FID against the number of sampling steps for nine forward processes trained on digits, and what theory says to it.

    python -m wasserstein_example.digits --workdir=W [--processes=ve,vp,…] [--seeds=2] [--jobs=2] [--steps=…]

Every process of ``configs/wasserstein/digits.py`` is trained with every seed, and every model sampled with each number
K of steps by three samplers: the exponential integrator, which the paper analyses, ancestral sampling, and Heun's
method for the probability-flow ODE, two network evaluations a step. FID is that of 1000 samples to the training set, in
the features of a classifier of digits, with the jackknife error of ``evaluation.fid_with_error``.

Next to it the exact W₂, in units of a pixel's range, between the Gaussian with mean and covariance of the training set
and the law of the same sampler with that Gaussian's own score (``exact``): what discretisation, starting from the prior
and stopping before t = 0 would cost if the data were Gaussian and nothing had to be learned.

Written to W: ``runs/PROCESS/seed_K/`` (runs of ``main.py``), ``results.json``, ``table.md`` and ``fid.png``.
Interrupted, the same command continues to the same numbers. Finished runs and samples are kept, also when other seeds,
processes or steps are asked for; table and figure are of those that were.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy.stats import spearmanr

import run_lib
from configs.wasserstein.digits import MODELS, VP, get_config
from evaluation import Features, fid_with_error
from exact.gaussian_law import diagonalise, sampler_law, wasserstein
from experiment.command_line import available_cores, check_positive, command
from experiment.figures import new_figure
from experiment.files import claim, read_arrays, read_json, write_json
from experiment.jobs import Update, run_all
from experiment.results import markdown_table, number, write_results
from experiment.runtime import Runtime
from features import FeatureExtractor, extract_features, train_classifier

from . import figures, theory

NAMES = {process: f"{'vp' if process in VP else 've'}_{fields['model.schedule']}" for process, fields in MODELS.items()}
"""The theory's names of the config's processes."""
EVALUATIONS = {"exponential_integrator": 1, "ancestral_sampling": 1, "heun": 2}
"""Network evaluations of a step; one more at the end removes noise."""
FEATURE_SEED = 42
"""Of the feature classifier, which all runs share."""


def run(
    workdir: str,
    *,
    processes: tuple[str, ...] = tuple(MODELS),
    seeds: int = 2,
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 500),
    ancestral_steps: tuple[int, ...] = (5, 10, 20, 50, 100),
    heun_steps: tuple[int, ...] = (5, 10, 20, 50),
    jobs: int = available_cores(),
    device: str = "cpu",
) -> str:
    """Train, sample, compare, write all files and return the table.

    Args:
        workdir: Folder for the runs, results.json, table.md and fid.png.
        processes: Forward processes, names of configs/wasserstein/digits.py.
        seeds: Seeds 0 … N−1 of every process.
        steps: Numbers of steps K of the exponential integrator; like the next two it may be empty.
        ancestral_steps: Those of ancestral sampling.
        heun_steps: Those of Heun's method.
        jobs: Processes that share the runs, about 1 GB each. They change no result.
        device: auto, cpu, cuda or mps.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    processes = tuple(dict.fromkeys(processes))
    steps_of = zip(EVALUATIONS, (steps, ancestral_steps, heun_steps), strict=True)
    plan = [(sampler, k) for sampler, numbers in steps_of for k in numbers]
    if unknown := [process for process in processes if process not in MODELS]:
        raise ValueError(f"--processes={unknown[0]}: allowed are {', '.join(MODELS)}")
    if not processes or not plan:
        raise ValueError("--processes and one of --steps, --ancestral_steps, --heun_steps: give at least one value")
    check_positive(seeds=seeds, jobs=jobs, steps=min(k for _, k in plan))
    runtime = Runtime(device)
    device = runtime.torch_device.type
    base = get_config(processes[0])
    settings = {"device": device, "training_steps": base.training.n_iters, "num_samples": base.eval.num_samples}
    folder = claim(workdir, "wasserstein_example on digits", settings)

    models = [(process, seed) for seed in range(seeds) for process in processes]
    tasks: dict[str, tuple] = {}
    for process, seed in models:
        config = get_config(process)
        config.seed = seed
        run_folder = folder / "runs" / process / f"seed_{seed}"
        tasks[f"{process}, seed {seed}"] = (config, run_folder, str(folder / "cache"), device)
    training = {name: partial(train, *task) for name, task in tasks.items()}
    run_all(training, jobs=jobs, total=base.training.n_iters * len(tasks), unit="step", description="train")

    extractor, _ = reference_features(base, folder / "cache", runtime)  # not by two processes at once
    sampling = {name: partial(sample, *task, plan) for name, task in tasks.items()}
    cost = base.eval.num_samples * sum(evaluations(*case) for case in plan)
    measured = run_all(sampling, jobs=jobs, total=cost * len(tasks), unit="evaluation", description="sample")

    rows = [{"process": p, "seed": s, **row} for (p, s), found in zip(models, measured, strict=True) for row in found]
    results = Results(processes, seeds, plan, rows, gaussian_rows(processes, plan), extractor.test_accuracy)
    content = {"experiment": "wasserstein_example on digits", **results._asdict()}
    return write_results(folder, content, table(results), {"fid": draw_fid(results)})


def evaluations(sampler: str, steps: int) -> int:
    """Network evaluations for one sample."""
    return EVALUATIONS[sampler] * steps + 1


def train(config: ConfigDict, workdir: Path, cache_dir: str, device: str, update: Update) -> None:
    run_lib.train(config, workdir, Runtime(device, cache_dir=cache_dir, on_progress=update))


def sample(
    config: ConfigDict, workdir: Path, cache_dir: str, device: str, plan: Sequence[tuple[str, int]], update: Update
) -> list[dict]:
    """FID of one model by every sampler and number of steps, with the network evaluations as counted. Every finished
    one is kept in its own file."""
    extractor, real = reference_features(config, cache_dir, Runtime(device))
    rows, count = [], config.eval.num_samples
    for sampler, steps in plan:
        path, cost = workdir / "fid" / f"{sampler}-{steps}.json", evaluations(sampler, steps)
        try:
            rows.append(read_json(path, checksum=True))
            update(count * cost)
        except (OSError, ValueError):  # there is none yet, or it is damaged
            is_ode = sampler == "heun"
            method = {"method": "ode", "solver": sampler} if is_ode else {"method": "pc", "predictor": sampler}
            config.sampling.update(num_steps=steps, num_samples=count, **method)
            runtime = Runtime(device, cache_dir=cache_dir, on_progress=lambda images, cost=cost: update(images * cost))
            drawn = read_arrays(run_lib.sample(config, workdir, runtime) / "samples.npz")
            images = torch.from_numpy(drawn["images"]).permute(0, 3, 1, 2)
            generated = extract_features(extractor, images, config.eval.batch_size)
            fid, error = fid_with_error(real.pool, generated.pool)
            row = {"sampler": sampler, "K": steps, "num_samples": count, "nfe": float(drawn["nfe"])}
            rows.append(row | {"fid": fid, "fid_se": error})
            write_json(path, rows[-1], checksum=True)
    return rows


def reference_features(
    config: ConfigDict, cache_dir: str | Path, runtime: Runtime
) -> tuple[FeatureExtractor, Features]:
    """The feature classifier, made once, then read from ``cache_dir``, and the features of the training set."""
    train_data, test_data = run_lib.load_data(config)
    extractor = train_classifier(train_data, test_data, seed=FEATURE_SEED, cache_dir=cache_dir, runtime=runtime)
    images, _ = train_data.batch(torch.arange(len(train_data)))
    return extractor, extract_features(extractor, images, config.eval.batch_size)


def gaussian_rows(processes: Sequence[str], plan: Sequence[tuple[str, int]]) -> list[dict]:
    """W₂ between the training set's Gaussian and the law of each sampler with its exact score."""
    train_data, _ = run_lib.load_data(get_config(processes[0]))
    levels = train_data.batch(torch.arange(len(train_data)))[0].flatten(1).double()
    # Of uniformly dequantised levels: (k + u)/L.
    mean = (levels.mean(0) + 0.5) / train_data.num_levels
    covariance = (torch.cov(levels.T) + torch.eye(levels.shape[1]) / 12) / train_data.num_levels**2
    rows = []
    for process in processes:
        config = get_config(process)
        scale = 2.0 if config.data.centered else 1.0
        data, _ = diagonalise(scale * mean - (scale - 1), scale**2 * covariance)
        for sampler, steps in plan:
            distance = wasserstein(sampler_law(run_lib.build_sde(config), data, sampler, steps), data)
            rows.append({"process": process, "sampler": sampler, "K": steps, "w2": distance / scale})
    return rows


class Results(NamedTuple):
    """What table and figure are made from."""

    processes: tuple[str, ...]
    seeds: int
    plan: Sequence[tuple[str, int]]
    rows: list[dict]
    gaussian: list[dict]
    feature_test_accuracy: float

    def steps(self) -> dict[str, list[int]]:
        """Numbers of steps by sampler."""
        return {name: [k for sampler, k in self.plan if sampler == name] for name, _ in self.plan}

    def values(self, key: str, sampler: str, steps: int) -> np.ndarray:
        """(processes, seeds); of the Gaussian's ``w2`` (processes, 1)."""
        rows = self.gaussian if key == "w2" else self.rows
        chosen = [row for row in rows if (row["sampler"], row["K"]) == (sampler, steps)]
        return np.array([[row[key] for row in chosen if row["process"] == process] for process in self.processes])

    def statistics(self, sampler: str, steps: int) -> dict[str, float | None]:
        """What stands below the processes in the table."""
        fid, error, w2 = (self.values(key, sampler, steps) for key in ("fid", "fid_se", "w2"))
        several, enough = self.seeds > 1, len(self.processes) > 2
        correlation = spearmanr(fid.mean(1), w2[:, 0]) if enough else None
        return {
            "error of the samples": np.median(error / fid),
            "deviation between seeds": np.sqrt(np.log(fid).var(axis=1, ddof=1).mean()) if several else None,
            "rank correlation": correlation.statistic if enough else None,
            "its p-value": correlation.pvalue if enough else None,
        }


def table(results: Results) -> str:
    """In Markdown."""
    parts = [
        f"FID of {results.rows[0]['num_samples']} samples to the training set: mean over {results.seeds} seed(s), in "
        "parentheses the smallest and the largest; features of a classifier with a test accuracy of "
        f"{100 * results.feature_test_accuracy:.1f} %. Below the processes: the median relative standard error of one "
        "FID from its samples; the standard deviation of log FID between seeds, pooled over processes; Spearman's rank "
        "correlation, over processes, with the W₂ of the table that follows, and its p-value, not corrected for their "
        "number.\n"
    ]
    titles = [theory.TITLES[NAMES[process]] for process in results.processes]
    for sampler, steps in results.steps().items():
        header = (theory.SAMPLER_TITLES[sampler], *(f"K = {k}" for k in steps))
        statistics = [results.statistics(sampler, k) for k in steps]
        fid = [
            [*map(_with_range, results.values("fid", sampler, k)), *(number(value, 2) for value in below.values())]
            for k, below in zip(steps, statistics, strict=True)
        ]
        w2 = [[number(value, 2) for value in results.values("w2", sampler, k)[:, 0]] for k in steps]
        parts.append(markdown_table(header, [*zip([*titles, *statistics[0]], *fid, strict=True)]))
        parts.append(f"W₂ on the Gaussian with the digits' mean and covariance, exact score: {header[0]}.\n")
        parts.append(markdown_table(header, [*zip(titles, *w2, strict=True)]))
    return "\n".join(parts)


def _with_range(values: np.ndarray) -> str:
    """Mean over seeds (n,), with the smallest and the largest."""
    extremes = f" ({number(values.min())}–{number(values.max())})" if len(values) > 1 else ""
    return number(values.mean()) + extremes


def draw_fid(results: Results) -> Figure:
    """Digits: FID against the number of steps, and below it W₂ on the Gaussian of the same mean and covariance.

    Bars reach from the smallest to the largest FID of all seeds.
    """
    figure, samplers = new_figure(7.2, 5.6), results.steps()
    panels = figure.subplots(2, len(samplers), sharex="col", sharey="row", squeeze=False)
    for (measured, predicted), (sampler, steps) in zip(panels.T, samplers.items(), strict=True):
        fid, w2 = (np.array([results.values(key, sampler, k) for k in steps]) for key in ("fid", "w2"))
        for i, process in enumerate(results.processes):
            style, mean = figures.STYLES[NAMES[process]], fid[:, i].mean(1)
            reach = np.abs(np.stack((fid[:, i].min(1), fid[:, i].max(1))) - mean)
            measured.errorbar(steps, mean, reach, capsize=1.5, elinewidth=0.8, **style)
            predicted.plot(steps, w2[:, i], **style)
        measured.set(title=theory.SAMPLER_TITLES[sampler], ylabel="trained networks:\nFID (digits features)")
        predicted.set(xlabel="sampling steps K", ylabel="Gaussian, exact score:\nW₂ (range of a pixel)")
        for axes in (measured, predicted):
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(steps, map(str, steps))
            axes.set_xticks([], minor=True)
            axes.label_outer()
    figure.legend(handles=panels[1, 0].get_lines(), loc="outside lower center", ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    command(run)
