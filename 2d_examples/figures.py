"""Figures of the 2-D examples."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from torch import Tensor

from conservativeness import jacobian
from experiment.figures import curve_style, draw_map, new_figure, plane, plane_grid
from experiment.files import read_arrays
from models import ScoreModel

from .configs import MODELS
from .experiment import forward_process, noised_distribution, trained_model
from .table import EXACT, NAMES, values

HALF_WIDTH = 9.0
FIELD_TIME, DENSITY_TIMES = 0.5, (1e-5, 0.5, 0.9)
STYLES = {model: curve_style(k) for k, model in enumerate(("u", "qc", "c"))}

Run = tuple[str, str, int]  # data set, model, seed


def draw_table(configs: Mapping[Run, ConfigDict], folders: Mapping[Run, Path], rows: Sequence[Mapping]) -> dict:
    """By name: densities, samples, fields (all of seed 0), curves against t, NLL by seed."""
    names = list(dict.fromkeys(dataset for dataset, _, _ in configs))
    arrays = {run: read_arrays(folder / "eval" / "arrays.npz") for run, folder in folders.items()}
    figures = {"densities": new_figure(7, 7), "samples": new_figure(9, 6.8), "fields": new_figure(8, 7.2)}

    panels = figures["densities"].subplots(len(DENSITY_TIMES), len(names), squeeze=False)
    for (t, name), axes in zip(product(DENSITY_TIMES, names), panels.flat, strict=True):
        x, config = plane_grid(HALF_WIDTH, 181), configs[name, EXACT, 0]
        density = noised_distribution(config).log_prob(x, torch.full((len(x),), t, dtype=torch.float64)).exp()
        title = f"{name}, σ = {forward_process(config).std(torch.tensor(t)):.2g}"
        draw_map(axes, density, HALF_WIDTH, title, cmap="magma")

    panels = figures["samples"].subplots(len(names), len(MODELS) + 1, squeeze=False)
    for (name, model), axes in zip(product(names, (*MODELS, EXACT)), panels.flat, strict=True):
        axes.scatter(*arrays[name, model, 0]["samples"][:4000].T, s=0.5, linewidths=0, color="black", rasterized=True)
        plane(axes, HALF_WIDTH, f"{name}, {NAMES[model]}")

    panels = figures["fields"].subplots(len(names), len(MODELS), squeeze=False)
    for name, row in zip(names, panels, strict=True):
        scores = [trained_model(configs[name, model, 0], folders[name, model, 0])[0] for model in MODELS]
        rotations = [_score_and_rotation(score, plane_grid(HALF_WIDTH, 121))[1] for score in scores]
        # One scale for a row; the largest values sit in the corners, where there are no data.
        limit = max(np.quantile(np.abs(rotation), 0.98) for rotation in rotations)
        for axes, model, score, rotation in zip(row, MODELS, scores, rotations, strict=True):
            colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            image = draw_map(axes, rotation, HALF_WIDTH, f"{name}, {NAMES[model]}", **colours)
            x = plane_grid(HALF_WIDTH, 19)
            axes.quiver(*x.T, *_score_and_rotation(score, x)[0].T, angles="xy", width=0.004, color="black")
        figures["fields"].colorbar(image, ax=row, label=r"rotation $\partial_1 s_2 - \partial_2 s_1$", shrink=0.9)

    return figures | {"curves": _curves(arrays, names), "nll_by_seed": _nll_by_seed(rows, names)}


def _score_and_rotation(model: ScoreModel, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The score (N, 2) and its rotation ∂s₂/∂x₁ − ∂s₁/∂x₂ (N,)."""
    value, j = jacobian(model, x.float(), torch.full((len(x),), FIELD_TIME))
    return value.detach().numpy(), (j[:, 1, 0] - j[:, 0, 1]).detach().numpy()


def _curves(arrays: Mapping[Run, Mapping[str, np.ndarray]], names: Sequence[str]) -> Figure:
    """Lines: means over seeds; bands: their range."""
    figure = new_figure(9, 5)
    panels = figure.subplots(2, len(names), sharex=True, squeeze=False)
    labels = {"asym": "Asym (units of $x^{-4}$)", "score_error": "½‖s − s*‖² (units of $x^{-2}$)"}
    for (quantity, name), axes in zip(product(labels, names), panels.flat, strict=True):
        for model, style in STYLES.items():
            if (quantity, model) == ("asym", "c"):
                continue  # zero to rounding
            curves = np.stack([curve[quantity] for run, curve in arrays.items() if run[:2] == (name, model)])
            t = arrays[name, model, 0]["t"]
            axes.semilogy(t, curves.mean(0), label=NAMES[model], **style)
            axes.fill_between(t, curves.min(0), curves.max(0), color=style["color"], alpha=0.2, linewidth=0)
        axes.set(title=name, xlabel="time t", ylabel=labels[quantity])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _nll_by_seed(rows: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Points: runs; a grey line joins those of a seed."""
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        nll = np.stack([values(rows, name, model, "nll") for model in STYLES])
        axes.plot(range(len(STYLES)), nll, color="lightgrey", zorder=0)
        for position, style in enumerate(STYLES.values()):
            axes.scatter(np.full(nll.shape[1], position), nll[position], color=style["color"], s=18)
        (exact,) = values(rows, name, EXACT, "nll")
        axes.axhline(exact, color="black", linestyle="--", linewidth=1, label="exact score")
        axes.set_xticks(range(len(STYLES)), [NAMES[model] for model in STYLES])
        axes.set(title=name, xlim=(-0.5, len(STYLES) - 0.5), xlabel="model", ylabel="NLL (nats per point)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return figure
