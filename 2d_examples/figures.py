"""Figures of the 2-D examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conservativeness import jacobian
from exact.distributions import NoisedDistribution
from experiment.files import write_atomically
from sde_lib import ScoreFunction

from .configs import DATASETS, MODELS
from .experiment import Run
from .table import EXACT, Task, values

__all__ = ["draw_run", "draw_table"]

HALF_WIDTH = 9.0
NAMES = {"u": "U", "c": "C", "qc": "QC", EXACT: "exact"}
COLOURS = {"u": "tab:blue", "c": "tab:green", "qc": "tab:red"}
FIELD_TIME = 0.5


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
    plt.close(figure)


def _plane(axes: Axes) -> None:
    axes.set(xlim=(-HALF_WIDTH, HALF_WIDTH), ylim=(-HALF_WIDTH, HALF_WIDTH), aspect="equal")
    axes.set_xticks((-5, 0, 5))
    axes.set_yticks((-5, 0, 5))


def _outer_labels(grid: np.ndarray) -> None:
    for axes in grid[-1]:
        axes.set_xlabel("$x_1$")
    for axes in grid[:, 0]:
        axes.set_ylabel("$x_2$")
    for axes in grid.flat:
        axes.label_outer()


def _grid_points(count: int) -> tuple[np.ndarray, torch.Tensor]:
    """Coordinates (count,) along an axis and the count² points (count², 2), x₁ running fastest."""
    axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, count, dtype=torch.float64)
    x2, x1 = torch.meshgrid(axis, axis, indexing="ij")
    return axis.numpy(), torch.stack([x1.flatten(), x2.flatten()], dim=1)


def _draw_density(axes: Axes, distribution: NoisedDistribution, t: float) -> None:
    count = 181
    _, points = _grid_points(count)
    density = distribution.log_prob(points, torch.full((len(points),), t, dtype=torch.float64)).exp()
    extent = (-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH)
    axes.imshow(density.view(count, count).numpy(), origin="lower", extent=extent, cmap="magma")
    _plane(axes)


def _draw_samples(axes: Axes, points: np.ndarray) -> None:
    axes.scatter(*points[:4000].T, s=0.5, linewidths=0, color="black", rasterized=True)
    _plane(axes)


def _rotation(score: ScoreFunction, points: torch.Tensor, t: float) -> tuple[np.ndarray, np.ndarray]:
    """The score (N, 2) and its rotation ∂s₂/∂x₁ − ∂s₁/∂x₂ (N,)."""
    value, j = jacobian(score, points, torch.full((len(points),), t, device=points.device))
    return value.detach().cpu().numpy(), (j[:, 1, 0] - j[:, 0, 1]).detach().cpu().numpy()


def _draw_field(axes: Axes, score: ScoreFunction, t: float, limit: float | None, device: torch.device) -> object:
    """Arrows of the score, over its rotation in colour; returns the coloured image."""
    count = 121
    _, points = _grid_points(count)
    _, rotation = _rotation(score, points.float().to(device), t)
    extent = (-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH)
    limit = limit or float(np.abs(rotation).max()) or 1.0
    image = axes.imshow(
        rotation.reshape(count, count), origin="lower", extent=extent, cmap="RdBu_r", vmin=-limit, vmax=limit
    )
    _, coarse = _grid_points(19)
    arrows, _ = _rotation(score, coarse.float().to(device), t)
    axes.quiver(*coarse.numpy().T, *arrows.T, angles="xy", width=0.004, color="black")
    _plane(axes)
    return image


def draw_run(run: Run) -> Path:
    """W/eval/run.png of one evaluated run: its samples, and its score with the rotation in colour."""
    with np.load(run.workdir / "eval" / "arrays.npz", allow_pickle=False) as arrays:
        samples = arrays["samples"]
    figure, grid = plt.subplots(1, 2, figsize=(7.2, 3.4), squeeze=False, layout="constrained")
    _draw_samples(grid[0, 0], samples)
    grid[0, 0].set_title("samples")
    image = _draw_field(grid[0, 1], run.model, FIELD_TIME, None, run.device)
    grid[0, 1].set_title(f"score and its rotation, t = {FIELD_TIME}")
    figure.colorbar(image, ax=grid[0, 1], label=r"$\partial_1 s_2 - \partial_2 s_1$", shrink=0.85)
    _outer_labels(grid)
    path = run.workdir / "eval" / "run.png"
    _save(figure, path)
    return path


def draw_table(workdir: Path, results: Mapping, tasks: Sequence[Task]) -> list[Path]:
    """The figures of W/results.json: densities, samples, fields (all of seed 0), curves against t, NLL by seed."""
    runs: dict[tuple[str, str], Run] = {}
    for task in tasks:
        if task.seed == 0:
            run = Run(task.config, Path(task.directory), task.device)
            if task.model != EXACT:
                run.load()
            runs[task.dataset, task.model] = run
    drawn = {
        "densities.png": _densities(runs),
        "samples.png": _samples(runs),
        "fields.png": _fields(runs),
        "curves.png": _curves(tasks),
        "nll_by_seed.png": _nll_by_seed(results["rows"]),
    }
    for name, figure in drawn.items():
        _save(figure, workdir / name)
    return [workdir / name for name in drawn]


def _densities(runs: Mapping[tuple[str, str], Run]) -> Figure:
    times = (1e-5, 0.5, 0.9)
    figure, grid = plt.subplots(len(times), len(DATASETS), figsize=(7, 7), squeeze=False, layout="constrained")
    for column, dataset in enumerate(DATASETS):
        run = runs[dataset, EXACT]
        grid[0, column].set_title(dataset)
        for row, t in enumerate(times):
            _draw_density(grid[row, column], run.distribution, t)
    _outer_labels(grid)
    for axes, t in zip(grid[:, 0], times, strict=True):
        sigma = float(runs["gaussian_8", EXACT].sde.std(torch.tensor(t)))
        axes.set_ylabel(f"σ = {sigma:.2g}\n$x_2$")
    return figure


def _samples(runs: Mapping[tuple[str, str], Run]) -> Figure:
    models = (*MODELS, EXACT)
    figure, grid = plt.subplots(len(DATASETS), len(models), figsize=(9, 6.8), squeeze=False, layout="constrained")
    for (dataset, model), run in runs.items():
        axes = grid[list(DATASETS).index(dataset), models.index(model)]
        with np.load(run.workdir / "eval" / "arrays.npz", allow_pickle=False) as arrays:
            _draw_samples(axes, arrays["samples"])
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(f"{NAMES[model]}" + (" score" if model == EXACT else ""))
    _outer_labels(grid)
    for axes, dataset in zip(grid[:, 0], DATASETS, strict=True):
        axes.set_ylabel(f"{dataset}\n$x_2$")
    return figure


def _fields(runs: Mapping[tuple[str, str], Run]) -> Figure:
    figure, grid = plt.subplots(len(DATASETS), len(MODELS), figsize=(8, 7.2), squeeze=False, layout="constrained")
    for row, dataset in enumerate(DATASETS):
        _, points = _grid_points(61)
        device = runs[dataset, "u"].device
        points = points.float().to(device)
        # One scale for a row; the largest values sit in the corners, where there are no data.
        limit = max(
            float(np.quantile(np.abs(_rotation(runs[dataset, m].model, points, FIELD_TIME)[1]), 0.98)) for m in MODELS
        )
        for column, model in enumerate(MODELS):
            run = runs[dataset, model]
            image = _draw_field(grid[row, column], run.model, FIELD_TIME, limit, device)
            if row == 0:
                grid[row, column].set_title(NAMES[model])
        figure.colorbar(image, ax=grid[row], label=r"rotation $\partial_1 s_2 - \partial_2 s_1$", shrink=0.9)
    _outer_labels(grid)
    for axes, dataset in zip(grid[:, 0], DATASETS, strict=True):
        axes.set_ylabel(f"{dataset}\n$x_2$")
    return figure


def _curves(tasks: Sequence[Task]) -> Figure:
    figure, grid = plt.subplots(2, len(DATASETS), figsize=(9, 5), sharex=True, squeeze=False, layout="constrained")
    for column, dataset in enumerate(DATASETS):
        grid[0, column].set_title(dataset)
        for model in MODELS:
            curves = []
            for task in tasks:
                if (task.dataset, task.model) == (dataset, model):
                    with np.load(Path(task.directory) / "eval" / "arrays.npz", allow_pickle=False) as arrays:
                        curves.append({name: arrays[name] for name in ("t", "asym", "score_error")})
            for row, name in enumerate(("asym", "score_error")):
                if name == "asym" and model == "c":
                    continue  # zero to rounding
                stack = np.stack([curve[name] for curve in curves])
                axes, t = grid[row, column], curves[0]["t"]
                axes.semilogy(t, stack.mean(0), color=COLOURS[model], label=NAMES[model], marker=".", markersize=3)
                axes.fill_between(t, stack.min(0), stack.max(0), color=COLOURS[model], alpha=0.2, linewidth=0)
    for axes in grid[1]:
        axes.set_xlabel("time t")
    grid[0, 0].set_ylabel("Asym")
    grid[1, 0].set_ylabel(r"score error $\frac{1}{2}\|s - s^*\|^2$")
    grid[1, 0].legend(frameon=False)
    return figure


def _nll_by_seed(rows: Sequence[Mapping]) -> Figure:
    figure, grid = plt.subplots(1, len(DATASETS), figsize=(9, 3.2), squeeze=False, layout="constrained")
    order = ("u", "qc", "c")
    for axes, dataset in zip(grid[0], DATASETS, strict=True):
        nll = np.stack([values(rows, dataset, model, "nll") for model in order])
        axes.plot(range(len(order)), nll, color="lightgrey", zorder=0)  # the runs of a seed
        for position, model in enumerate(order):
            axes.scatter(np.full(nll.shape[1], position), nll[position], color=COLOURS[model], s=18)
        exact = values(rows, dataset, EXACT, "nll")[0]
        axes.axhline(exact, color="black", linestyle="--", linewidth=1, label="exact score, seed 0")
        axes.set_xticks(range(len(order)), [NAMES[model] for model in order])
        axes.set(title=dataset, xlim=(-0.5, len(order) - 0.5))
    grid[0, 0].set_ylabel("NLL (nats per point)")
    grid[0, 0].legend(frameon=False)
    return figure
