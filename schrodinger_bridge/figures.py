"""Figures of a bridge: marginals over time with trajectories, error against iteration, grids of images, animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

from experiment.figures import COLOURS, new_figure, plane

from .half_bridges import BridgeRun
from .marginals import ImageMarginal
from .process import BACKWARD, FORWARD

_COLUMNS, _PATHS, _TRANSITIONS = 6, 8, 8


def chains_of(run: BridgeRun) -> dict[str, Tensor]:
    """States (N + 1, B, …) of a finished run by direction; of images those directions that lead to some."""
    images = isinstance(run.marginals[0], ImageMarginal)
    directions = [d for d in (FORWARD, BACKWARD) if not images or isinstance(run.ends[d], ImageMarginal)]
    return {d: run.chains(d, 64 if images else 2000, ("figure",)) for d in directions}


def draw(run: BridgeRun, chains: Mapping[str, Tensor]) -> dict[str, Figure]:
    """By name: the errors, and marginals in the plane, or of every direction images and how some come about."""
    figures = {"errors": _draw_errors(run)}
    if not isinstance(run.marginals[0], ImageMarginal):
        return figures | {"marginals": _draw_marginals(run, chains)}
    for direction, states in chains.items():
        states = _in_order(states, direction)
        columns = [round(i * (len(states) - 1) / (_TRANSITIONS - 1)) for i in range(_TRANSITIONS)]
        rows = states[columns, :_TRANSITIONS].transpose(0, 1).flatten(0, 1)
        for name, x in (("images", states[-1]), ("transitions", rows)):
            figures[f"{direction}_{name}"] = figure = new_figure(3.2, 3.2)
            axes = figure.subplots()
            axes.imshow(_grid(run, x, direction))
            axes.axis("off")
    return figures


def animate(run: BridgeRun, chains: Mapping[str, Tensor]) -> list[Path]:
    """Write ``DIRECTION.gif`` to the run's folder."""
    paths = [run.workdir / f"{direction}.gif" for direction in chains]
    for path, (direction, states) in zip(paths, chains.items(), strict=True):
        figure, states = new_figure(3.2, 3.4), _in_order(states, direction)
        axes = figure.subplots()

        def show(k: int, direction=direction, states=states, axes=axes) -> None:
            axes.clear()
            title = f"{direction}, {k} of {len(states) - 1} steps"
            if isinstance(run.marginals[0], ImageMarginal):
                axes.imshow(_grid(run, states[k], direction))
                axes.axis("off")
                axes.set_title(title)
            else:
                axes.scatter(*states[k].T, s=1.5, linewidths=0, color="black")
                plane(axes, _half_width(chains), title)

        partial = path.with_name(f".{path.name}")  # Pillow wants a name that ends as the file's does
        frames = [*range(len(states)), *[len(states) - 1] * max(1, len(states) // 3)]
        FuncAnimation(figure, show, frames, init_func=lambda: None).save(partial, PillowWriter(fps=10), dpi=110)
        partial.replace(path)
    return paths


def draw_comparison(rows: Sequence[Mapping]) -> Figure:
    """Of every pair: W₂ at x₀ and the coupling's cost against the iteration, by algorithm, with the static bridge's."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure = new_figure(7.2, 4.2)
    grid = figure.subplots(2, len(pairs), sharex=True, squeeze=False)
    for (error, cost), pair in zip(grid.T, pairs, strict=True):
        for row, colour in zip((row for row in rows if row["pair"] == pair), COLOURS, strict=False):
            history = [entry for entry in row["history"] if entry["direction"] == BACKWARD]
            for axes, name in ((error, "w2"), (cost, "transport_cost")):
                _plot_with_errors(axes, history, name, color=colour, label=row["algorithm"].upper())
        error.axhline(row["sampling_error"][BACKWARD], color="0.4", linestyle=":", label="two sets of true samples")
        cost.axhline(row["static_cost"], color="black", linestyle="--", label="static bridge (Sinkhorn)")
        error.set(yscale="log", title=pair)
        cost.set_xlabel("iteration")
    grid[0, 0].set_ylabel("W₂ at $x_0$\n(units of the data)")
    grid[1, 0].set_ylabel("cost, backward\n(units of the data, squared)")
    lines = {label: line for ax in grid[:, 0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plot_with_errors(axes: Axes, rows: Sequence[Mapping], name: str, **style) -> None:
    """A measured number against the iteration, with its standard error where there is one."""
    iterations, values = [row["iteration"] for row in rows], [row[name] for row in rows]
    errors = [row.get(f"{name}_error", 0) for row in rows]
    axes.errorbar(iterations, values, errors, elinewidth=0.8, linewidth=1.2, marker="o", markersize=2, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_errors(run: BridgeRun) -> Figure:
    """W₂ to the true marginal against the iteration, with the level of chance; and the cost of transport."""
    figure = new_figure(7.2, 2.9)
    error, cost = figure.subplots(1, 2)
    for direction, end, colour in ((BACKWARD, "$x_0$", COLOURS[0]), (FORWARD, "$x_N$", COLOURS[1])):
        rows = [row for row in run.history if row["direction"] == direction]
        for axes, name in ((error, "w2"), (cost, "transport_cost")):
            _plot_with_errors(axes, rows, name, label=f"{direction}, to {end}", color=colour)
            axes.set_xlabel(f"iteration of {run.config.bridge.algorithm.upper()} (0: the reference)")
        error.axhline(run.sampling_errors[direction], color=colour, linestyle=":", linewidth=1)
    error.plot([], [], color="0.4", linestyle=":", label="two sets of true samples")
    sliced = "sliced " if isinstance(run.marginals[0], ImageMarginal) else ""
    error.set(yscale="log", ylabel=f"{sliced}W₂ to the true marginal\n(units of the data)")
    cost.set(ylabel="E‖$x_N$ − $x_0$‖²\n(units of the data, squared)")
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_marginals(run: BridgeRun, chains: Mapping[str, Tensor]) -> Figure:
    columns = sorted({round(k * len(run.gammas) / (_COLUMNS - 1)) for k in range(_COLUMNS)})
    time = torch.cat([torch.zeros(1), run.gammas.float().cumsum(0)])
    figure = new_figure(7.2, 2.9)
    grid = figure.subplots(2, len(columns), sharex=True, sharey=True)
    for row, (direction, states) in zip(grid, chains.items(), strict=True):
        for axes, k in zip(row, columns, strict=True):
            axes.scatter(*states[k].T, s=0.8, linewidths=0, color="black", alpha=0.6, rasterized=True)
            for path in range(_PATHS):
                passed = states[: k + 1, path] if direction == FORWARD else states[k:, path]
                axes.plot(*passed.T, linewidth=0.5, color=matplotlib.colormaps["tab10"](path))
            plane(axes, _half_width(chains), f"t = {float(time[k]):.3g}" if direction == FORWARD else "")
        row[0].set_ylabel(f"{direction}\n$x_2$")
    first, last = (marginal.name for marginal in run.marginals)
    figure.suptitle(f"{first} (t = 0) and {last} (t = {float(time[-1]):.3g})", fontsize=9)
    return figure


def _half_width(chains: Mapping[str, Tensor]) -> float:
    """Of a square that nearly all points lie in."""
    return 1.1 * float(torch.cat([states.flatten(0, 1) for states in chains.values()]).abs().quantile(0.999))


def _in_order(states: Tensor, direction: str) -> Tensor:
    """As they are simulated."""
    return states if direction == FORWARD else states.flip(0)


def _grid(run: BridgeRun, x: Tensor, direction: str) -> Tensor:
    """Images side by side, eight in a row, as one picture (H, W, 3) of values in [0, 1]."""
    end = run.ends[direction]
    return make_grid(end.to_pixels(x) / (end.num_levels - 1), nrow=8, padding=1, pad_value=1).permute(1, 2, 0)
