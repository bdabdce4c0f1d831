"""Figures of a bridge: marginals over time with trajectories, error against iteration, grids of images, animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiment.files import write_atomically
from run_setup import save_image_grid

from .marginals import ImageMarginal
from .process import BACKWARD, FORWARD
from .training import BridgeRun

__all__ = ["draw_all", "draw_comparison", "draw_errors"]

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "legend.fontsize": 8, "savefig.dpi": 160}
COLOURS = {BACKWARD: "tab:blue", FORWARD: "tab:orange"}
ARROWS = {BACKWARD: "backward, to $x_0$", FORWARD: "forward, to $x_N$"}
_COLUMNS = 6
_PATHS = 8
_FIGURE_CHAINS = 2000
_GRID_CHAINS = 64
_TRANSITIONS = 8


def draw_all(run: BridgeRun, *, animate: bool) -> list[Path]:
    """Write every figure of a finished run to its folder; return their paths.

    Args:
        run: with all half-bridges done.
        animate: also write an animation of each direction (GIF).
    """
    with matplotlib.rc_context(STYLE):
        paths = [draw_errors(run)]
        images = isinstance(run.marginals[0], ImageMarginal)
        # Of images those directions that lead to some.
        directions = [d for d in (FORWARD, BACKWARD) if not images or isinstance(run.end_of(d), ImageMarginal)]
        count = _GRID_CHAINS if images else _FIGURE_CHAINS
        states = {d: run.chains(d, count, half_bridge=run.num_half_bridges, key=("figure",)) for d in directions}
        paths += _draw_images(run, states) if images else [_draw_marginals(run, states)]
        if animate:
            draw = _animate_images if images else _animate
            paths += [draw(run, direction, chains) for direction, chains in states.items()]
    return paths


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _plot_with_errors(ax: Axes, rows: Sequence[Mapping], name: str, **style) -> None:
    """A measured number against the iteration, with its standard error where there is one."""
    iterations, values = [row["iteration"] for row in rows], [row[name] for row in rows]
    ax.errorbar(iterations, values, [row.get(f"{name}_error", 0) for row in rows], elinewidth=0.8, **style)


def draw_errors(run: BridgeRun) -> Path:
    """W₂ to the true marginal against the iteration, with the level of chance; and the cost of transport."""
    figure = _figure(7.2, 2.9)
    error, cost = figure.subplots(1, 2)
    sliced = "sliced " if isinstance(run.marginals[0], ImageMarginal) else ""
    for direction in (BACKWARD, FORWARD):
        rows = [row for row in run.history if row["direction"] == direction]
        style = {"color": COLOURS[direction], "linewidth": 1.2, "marker": "o", "markersize": 2.5}
        _plot_with_errors(error, rows, "w2", label=ARROWS[direction], **style)
        error.axhline(run.sampling_errors[direction], color=COLOURS[direction], linestyle=":", linewidth=1)
        _plot_with_errors(cost, rows, "transport_cost", label=ARROWS[direction], **style)
    error.plot([], [], color="0.4", linestyle=":", label="two sets of true samples")
    error.set(yscale="log", ylabel=f"{sliced}W₂ to the true marginal\n(units of the data)")
    cost.set(ylabel="E‖$x_N$ − $x_0$‖²\n(units of the data, squared)")
    for ax in (error, cost):
        ax.set_xlabel(f"iteration of {run.config.bridge.algorithm.upper()} (0: the reference)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, run.workdir / "errors.png")


def draw_comparison(rows: Sequence[Mapping], path: Path) -> None:
    """Of every pair: W₂ at x₀ and the coupling's cost against the iteration, by algorithm, with the static bridge's."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = _figure(7.2, 4.2)
        grid = figure.subplots(2, len(pairs), sharex=True, squeeze=False)
        for (error, cost), pair in zip(grid.T, pairs, strict=True):
            for row in (row for row in rows if row["pair"] == pair):
                colour = {"ipf": "tab:blue", "imf": "tab:red"}[row["algorithm"]]
                history = [entry for entry in row["history"] if entry["direction"] == BACKWARD]
                style = {"color": colour, "linewidth": 1.2, "marker": "o", "markersize": 2}
                for ax, name in ((error, "w2"), (cost, "transport_cost")):
                    _plot_with_errors(ax, history, name, **style)
            error.axhline(row["sampling_error"][BACKWARD], color="0.4", linestyle=":", linewidth=1)
            cost.axhline(row["static_cost"], color="black", linestyle="--", linewidth=1)
            error.set(yscale="log", title=pair)
            cost.set_xlabel("iteration")
            cost.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[0, 0].set_ylabel("W₂ at $x_0$\n(units of the data)")
        grid[1, 0].set_ylabel("cost, backward\n(units of the data, squared)")
        lines = [
            Line2D([], [], color="tab:blue", label="IPF"),
            Line2D([], [], color="tab:red", label="IMF"),
            Line2D([], [], color="0.4", linestyle=":", label="two sets of true samples"),
            Line2D([], [], color="black", linestyle="--", label="static bridge (Sinkhorn)"),
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
        _save(figure, path)


# --------------------------------------------------------------------------------------------------------------- points


def _window(states: Mapping[str, Tensor]) -> float:
    """Half the side of a square that nearly all points lie in."""
    return 1.1 * float(torch.cat([chains.flatten(0, 1) for chains in states.values()]).abs().quantile(0.999))


def _draw_marginals(run: BridgeRun, states: Mapping[str, Tensor]) -> Path:
    count = len(run.gammas)
    columns = sorted({round(k * count / (_COLUMNS - 1)) for k in range(_COLUMNS)})
    time = torch.cat([torch.zeros(1), run.gammas.float().cumsum(0)])
    limit = _window(states)
    figure = _figure(7.2, 2.9)
    grid = figure.subplots(2, len(columns), sharex=True, sharey=True)
    for axes, (direction, chains) in zip(grid, states.items(), strict=True):
        for ax, k in zip(axes, columns, strict=True):
            ax.scatter(*chains[k].T, s=0.8, linewidths=0, color="black", alpha=0.6, rasterized=True)
            for path in range(_PATHS):
                passed = chains[: k + 1, path] if direction == FORWARD else chains[k:, path]
                ax.plot(*passed.T, linewidth=0.5, color=matplotlib.colormaps["tab10"](path))
            ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes[0].set_ylabel(f"{direction}\n$x_2$")
    for ax, k in zip(grid[0], columns, strict=True):
        ax.set_title(f"t = {float(time[k]):.3g}")
    for ax in grid[-1]:
        ax.set_xlabel("$x_1$")
    first, last = (marginal.name for marginal in run.marginals)
    figure.suptitle(f"{first} (t = 0) and {last} (t = {float(time[-1]):.3g})", fontsize=9)
    return _save(figure, run.workdir / "marginals.png")


def _animate(run: BridgeRun, direction: str, chains: Tensor) -> Path:
    limit = _window({direction: chains})
    figure = _figure(3.2, 3.2)
    ax = figure.subplots()
    points = ax.scatter([], [], s=1.5, linewidths=0, color="black")
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    frames = range(len(chains)) if direction == FORWARD else range(len(chains) - 1, -1, -1)

    def show(k: int) -> Sequence:
        points.set_offsets(chains[k].numpy())
        ax.set_title(f"{direction}, step {k} of {len(chains) - 1}")
        return (points,)

    return _write_animation(figure, show, list(frames), run.workdir / f"{direction}.gif")


def _write_animation(figure: Figure, show, frames: list[int], path: Path) -> Path:
    partial = path.with_name(f".{path.name}")  # Pillow wants a name that ends as the file's does
    hold = [frames[-1]] * max(1, len(frames) // 3)
    FuncAnimation(figure, show, frames + hold, blit=False).save(partial, PillowWriter(fps=10), dpi=110)
    partial.replace(path)
    return path


# --------------------------------------------------------------------------------------------------------------- images


def _levels(run: BridgeRun, x: Tensor, direction: str) -> np.ndarray:
    """uint8 levels (B, H, W, C)."""
    return run.end_of(direction).to_pixels(x).permute(0, 2, 3, 1).numpy()


def _draw_images(run: BridgeRun, states: Mapping[str, Tensor]) -> list[Path]:
    """Of each direction that leads to images: a grid of them, and how some come about, a row each."""
    paths = []
    for direction, chains in states.items():
        num_levels = run.end_of(direction).halves[0].num_levels
        order = chains if direction == FORWARD else chains.flip(0)
        columns = [round(i * (len(order) - 1) / (_TRANSITIONS - 1)) for i in range(_TRANSITIONS)]
        rows = order[columns, :_TRANSITIONS].transpose(0, 1).flatten(0, 1)
        for name, x in ((f"{direction}_images", order[-1]), (f"{direction}_transitions", rows)):
            paths.append(run.workdir / f"{name}.png")
            save_image_grid(paths[-1], _levels(run, x, direction), num_levels)
    return paths


def _animate_images(run: BridgeRun, direction: str, chains: Tensor) -> Path:
    frames = list(range(len(chains))) if direction == FORWARD else list(range(len(chains) - 1, -1, -1))
    top = run.end_of(direction).halves[0].num_levels - 1
    figure = _figure(3.2, 3.4)
    axes = list(figure.subplots(8, 8).flat)
    for ax in axes:
        ax.axis("off")
    blank = np.zeros(chains.shape[-2:], np.uint8)
    pictures = [ax.imshow(blank, cmap="gray", vmin=0, vmax=top) for ax in axes]

    def show(k: int) -> Sequence:
        for picture, image in zip(pictures, _levels(run, chains[k], direction), strict=True):
            picture.set_data(image.squeeze() if image.shape[-1] == 1 else image)
        figure.suptitle(f"{direction}, step {k} of {len(chains) - 1}", fontsize=9)
        return pictures

    return _write_animation(figure, show, frames, run.workdir / f"{direction}.gif")
