"""The figures of this folder: what ``theory`` computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiment.figures import COLOURS, new_figure

from . import theory

FAMILIES = {name: [process for process in theory.SDES if process.startswith(name)] for name in ("ve", "vp")}
STYLES: dict[str, dict] = {
    process: {"color": colour, "marker": "os^Dv"[FAMILIES[process[:2]].index(process)], "linewidth": 1.1}
    | {"markersize": 3.5, "linestyle": "-" if process.startswith("ve") else "--", "label": theory.TITLES[process]}
    for process, colour in zip(theory.SDES, COLOURS, strict=True)
}
"""VE solid, VP dashed; a colour for every process, a marker for each of one family."""


def draw_w2(results: theory.Results) -> Figure:
    """W₂ to the data against K: exponential integrator and Heun, one panel per family."""
    figure = new_figure(7.2, 4.2)
    for axes, (family, processes) in zip(figure.subplots(1, 2), FAMILIES.items(), strict=True):
        for process in processes:
            style = STYLES[process]
            axes.plot(*results.curve(process, theory.ANALYSED, "w2"), **style | {"linestyle": "-"})
            axes.plot(*results.curve(process, "heun", "w2"), **style | {"linestyle": ":", "label": None})
        first = [results.curve(process, theory.ANALYSED, "w2")[1][0] for process in processes]
        _guide(axes, results.settings.steps, 1.5 * max(first), -1)
        title = f"{family.upper()}, d = {results.settings.reference}"
        axes.set(xscale="log", yscale="log", xlabel="sampling steps K", ylabel="W₂ to the data", title=title)
    lines = [line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]]
    lines += [
        Line2D([], [], color="0.3", label="exponential integrator"),
        Line2D([], [], color="0.3", linestyle=":", label="probability flow, Heun"),
        Line2D([], [], color="0.6", linewidth=3, alpha=0.5, label="1/K"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_needed(results: theory.Results) -> Figure:
    """K(ε) with the horizon of the theory, against 1/ε and against d."""
    figure = new_figure(7.2, 3.7)
    by_epsilon, by_d = figure.subplots(1, 2)
    reference = results.settings.reference
    for process in theory.BOUNDS:
        for axes, points in zip((by_epsilon, by_d), results.counts(process), strict=True):
            axes.plot(*np.array(points).reshape(-1, 2).T, **STYLES[process])
    for axes, exponents, x in (
        (by_epsilon, (1, 2), [1 / epsilon for epsilon in theory.EPSILONS]),
        (by_d, (0.5, 1), results.settings.dimensions),
    ):
        for exponent in exponents:
            _guide(axes, x, 4, exponent)
        axes.set(xscale="log", yscale="log", ylabel="steps K(ε)")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)
    by_epsilon.set(xlabel="1/ε", title=f"d = {reference}; grey: 1/ε (lower bound), 1/ε²")
    by_d.set(xlabel="dimension d", title=f"ε = {theory.HORIZON_EPSILON:g}; grey: √d (lower bound), d")
    figure.legend(*by_epsilon.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _guide(axes: Axes, x: Sequence[float], height: float, exponent: float) -> None:
    """A broad grey line of the slope ``exponent`` from ``height`` at the smallest x."""
    ends = np.array([min(x), max(x)], dtype=float)
    axes.plot(ends, height * (ends / ends[0]) ** exponent, color="0.6", linewidth=3, alpha=0.5, zorder=0)
