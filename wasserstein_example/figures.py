"""The figures of this folder: what ``theory`` computes, drawn to be read at column width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import theory

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "legend.fontsize": 8, "savefig.dpi": 200}
COLOURS = {
    name: matplotlib.colormaps["tab10"](i) for i, name in zip((0, 2, 9, 4, 3, 1, 5, 6, 7), theory.SDES, strict=True)
}
FAMILIES = {"VE": [p for p in theory.SDES if p.startswith("ve")], "VP": [p for p in theory.SDES if p.startswith("vp")]}


def draw_w2(results: theory.Results) -> Figure:
    """W₂ to the data against K: exponential integrator and Heun, one panel per family."""
    figure = new_figure(7.2, 3.7)
    for ax, (family, processes) in zip(figure.subplots(1, 2), FAMILIES.items(), strict=True):
        for process in processes:
            for sampler, line in ((theory.ANALYSED, "-"), ("heun", "--")):
                ax.plot(*results.curve(process, sampler, "w2"), line, color=COLOURS[process], linewidth=1.2)
        first = [results.curve(process, theory.ANALYSED, "w2")[1][0] for process in processes]
        _guide(ax, results.settings.steps, 1.5 * max(first), -1)
        ax.set(xscale="log", yscale="log", xlabel="steps K", title=f"{family}, d = {results.settings.reference}")
        handles = [Line2D([], [], color=COLOURS[p], label=theory.TITLES[p][3:]) for p in processes]
        ax.legend(handles=handles, loc="best", frameon=False)
    figure.axes[0].set_ylabel("W₂ to the data")
    lines = [
        Line2D([], [], color="0.3", label="exponential integrator"),
        Line2D([], [], color="0.3", linestyle="--", label="probability flow, Heun"),
        Line2D([], [], color="0.6", linestyle=":", label="1/K"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_discretisation(results: theory.Results) -> Figure:
    """The discretisation error against K, one panel per sampler."""
    figure = new_figure(7.2, 5.2)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for ax, (sampler, title) in zip(axes.flat, theory.SAMPLER_TITLES.items(), strict=True):
        for process in theory.SDES:
            curve = results.curve(process, sampler, "discretisation")
            ax.plot(*curve, "-" if process.startswith("ve") else "--", color=COLOURS[process], linewidth=1.1)
        _guide(ax, results.settings.steps, 300, -2 if sampler == "heun" else -1)
        ax.set(xscale="log", yscale="log", title=title, ylim=(1e-8, 1e4))
    for ax in axes[1]:
        ax.set_xlabel("steps K")
    for ax in axes[:, 0]:
        ax.set_ylabel("W₂ to K = ∞")
    lines = [
        Line2D([], [], color=COLOURS[p], linestyle="-" if p.startswith("ve") else "--", label=theory.TITLES[p])
        for p in theory.SDES
    ]
    lines.append(Line2D([], [], color="0.6", linestyle=":", label="1/K; Heun: 1/K²"))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_needed(results: theory.Results) -> Figure:
    """K(ε) with the horizon of the theory, against 1/ε and against d."""
    figure = new_figure(7.2, 3.7)
    by_epsilon, by_d = figure.subplots(1, 2)
    reference = results.settings.reference
    for process in theory.PROCESSES:
        known = [row for row in results.needed if row["process"] == process and row["K"] is not None]
        style = {"color": COLOURS[process], "linewidth": 1.2, "markersize": 3.5}
        line = "o-" if process.startswith("ve") else "s--"
        points = [(1 / row["epsilon"], row["K"]) for row in known if row["d"] == reference]
        by_epsilon.plot(*np.array(points).reshape(-1, 2).T, line, label=theory.TITLES[process], **style)
        points = sorted((row["d"], row["K"]) for row in known if row["epsilon"] == theory.HORIZON_EPSILON)
        by_d.plot(*np.array(points).reshape(-1, 2).T, line, **style)
    for ax, exponents, x in (
        (by_epsilon, (1, 2), 1 / np.array(theory.EPSILONS)),
        (by_d, (0.5, 1), np.array(results.settings.dimensions)),
    ):
        for exponent, line in zip(exponents, (":", "-."), strict=True):
            ax.plot(x, 4 * (x / x[0]) ** exponent, line, color="0.6", linewidth=1)
        ax.set(xscale="log", yscale="log", ylabel="K(ε)")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.set_xticks([], minor=True)
    by_epsilon.set(xlabel="1/ε", title=f"d = {reference}; grey: 1/ε (lower bound), 1/ε²")
    by_d.set(xlabel="dimension d", title=f"ε = {theory.HORIZON_EPSILON:g}; grey: √d (lower bound), d")
    figure.legend(*by_epsilon.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


FIGURES: dict[str, Callable[[theory.Results], Figure]] = {
    "w2": draw_w2,
    "discretisation": draw_discretisation,
    "needed": draw_needed,
}


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _guide(ax, steps: Sequence[int], height: float, exponent: float) -> None:
    k = np.array([min(steps), max(steps)], dtype=float)
    ax.plot(k, height * (k / k[0]) ** exponent, ":", color="0.6", linewidth=1)
