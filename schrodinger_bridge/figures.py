"""Figures of a bridge: marginals over time with trajectories, error against iteration, grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.format import save_grid
from experiment.figures import COLOURS, curve_style, new_figure, plane

from .half_bridges import BridgeRun
from .marginals import ImageMarginal
from .process import BACKWARD, FORWARD


def draw(run: BridgeRun) -> dict[str, Figure]:
    """Of a finished run by name: the errors, and of points the marginals."""
    figures = {"errors": _draw_errors(run)}
    return figures if isinstance(run.marginals[0], ImageMarginal) else figures | {"marginals": _draw_marginals(run)}


def save_images(run: BridgeRun) -> None:
    """Write what each direction that leads to images makes, 64 of them, and how eight come about, one in a row."""
    for direction, end in run.ends.items():
        if isinstance(end, ImageMarginal):
            states = run.chains(direction, 64, ("figure",))
            states = states if direction == FORWARD else states.flip(0)
            times = [round(i * (len(states) - 1) / 7) for i in range(8)]
            for name, x in (("images", states[-1]), ("transitions", states[times, :8].transpose(0, 1).flatten(0, 1))):
                levels = end.images.to_data(x).permute(0, 2, 3, 1).numpy()
                save_grid(run.workdir / f"{direction}_{name}.png", levels, end.images)


def draw_comparison(rows: Sequence[Mapping]) -> Figure:
    """Of every pair: W₂ at x₀ and the coupling's cost against the iteration, by algorithm, with the static bridge's."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure = new_figure(7.2, 4.2)
    grid = figure.subplots(2, len(pairs), sharex=True, squeeze=False)
    for (error, cost), pair in zip(grid.T, pairs, strict=True):
        for k, row in enumerate(row for row in rows if row["pair"] == pair):
            _plot_history(error, cost, row["history"], BACKWARD, k, row["algorithm"].upper())
        error.axhline(row["sampling_error"][BACKWARD], color="0.4", linestyle=":", label="two sets of true samples")
        cost.axhline(row["static_cost"], color="black", linestyle="--", label="static bridge (Sinkhorn)")
        error.set_title(pair)
        cost.set_xlabel("iteration")
    grid[0, 0].set_ylabel("W₂ at $x_0$\n(units of the data)")
    grid[1, 0].set_ylabel("cost, backward\n(units of the data, squared)")
    lines = {label: line for ax in grid[:, 0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plot_history(error: Axes, cost: Axes, history: Sequence[Mapping], direction: str, index: int, label: str) -> None:
    """W₂ and cost of one direction against the iteration, with their standard errors where there are, as curve number
    ``index``."""
    rows = [row for row in history if row["direction"] == direction]
    style = {"elinewidth": 0.8, "label": label, **curve_style(index, len(rows))}
    for axes, name in ((error, "w2"), (cost, "transport_cost")):
        errors = [row.get(f"{name}_error", 0) for row in rows]
        axes.errorbar([row["iteration"] for row in rows], [row[name] for row in rows], errors, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    error.set_yscale("log")


def _draw_errors(run: BridgeRun) -> Figure:
    """W₂ to the true marginal against the iteration, with the level of chance; and the cost of transport."""
    figure = new_figure(7.2, 2.9)
    error, cost = figure.subplots(1, 2)
    for k, (direction, end) in enumerate(((BACKWARD, "$x_0$"), (FORWARD, "$x_N$"))):
        _plot_history(error, cost, run.history, direction, k, f"{direction}, to {end}")
        error.axhline(run.sampling_errors[direction], color=COLOURS[k], linestyle=":", linewidth=1)
    for axes in (error, cost):
        axes.set_xlabel(f"iteration of {run.config.bridge.algorithm.upper()} (0: the reference)")
    error.plot([], [], color="0.4", linestyle=":", label="two sets of true samples")
    sliced = "sliced " if isinstance(run.marginals[0], ImageMarginal) else ""
    error.set_ylabel(f"{sliced}W₂ to the true marginal\n(units of the data)")
    cost.set_ylabel("E‖$x_N$ − $x_0$‖²\n(units of the data, squared)")
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_marginals(run: BridgeRun) -> Figure:
    columns = sorted({round(k * len(run.gammas) / 5) for k in range(6)})
    time = torch.cat([torch.zeros(1), run.gammas.float().cumsum(0)]).tolist()
    chains = {direction: run.chains(direction, 2000, ("figure",)) for direction in (FORWARD, BACKWARD)}
    # Of a square that nearly all points lie in.
    half_width = 1.1 * float(torch.cat([states.flatten(0, 1) for states in chains.values()]).abs().quantile(0.999))
    figure = new_figure(7.2, 2.9)
    grid = figure.subplots(2, len(columns), sharex=True, sharey=True)
    for row, (direction, states) in zip(grid, chains.items(), strict=True):
        for axes, k in zip(row, columns, strict=True):
            axes.scatter(*states[k].T, s=0.8, linewidths=0, color="0.6", rasterized=True)
            for path in range(8):
                passed = states[: k + 1, path] if direction == FORWARD else states[k:, path]
                axes.plot(*passed.T, linewidth=0.8, color=COLOURS[path % 6])
            plane(axes, half_width, f"t = {time[k]:.3g}" if direction == FORWARD else "")
        row[0].set_ylabel(f"{direction}\n$x_2$")
    first, last = (marginal.name for marginal in run.marginals)
    figure.suptitle(f"{first} (t = 0) and {last} (t = {time[-1]:.3g})", fontsize=9)
    return figure
