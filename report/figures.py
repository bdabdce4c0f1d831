"""The report's figures: asymmetry against time, samples of equal seeds, training curves.

What cannot be drawn is said in the report instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiment.figures import COLOURS, LINES, new_figure, save_figure
from report.runs import NASYM_ROUND_OFF, Run

__all__ = ["asymmetry_figure", "samples_figure", "training_figure", "write_figures"]

WIDTH = 6.9  # inches: both columns of the page
CIRCLES = {"linestyle": "", "marker": "o", "markersize": 3, "markerfacecolor": "white", "zorder": 4}


def _style(index: int) -> dict[str, Any]:
    """Of run number ``index``."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)], "linewidth": 1.4}


def _legend_below(figure: Figure, entries: dict[str, Any]) -> None:
    columns = 1 if max(map(len, entries)) > 48 else 2
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _fit_y_axis(axes: Axes, values: np.ndarray) -> None:
    """Show the range of ``values``: logarithmic if they are positive and span more than a factor of ten."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low > 0 and high > 10 * low:
        axes.set(yscale="log", ylim=(low * (low / high) ** 0.06, high * (high / low) ** 0.06))
    elif low < high:
        axes.set(ylim=(low - 0.08 * (high - low), high + 0.08 * (high - low)))


def asymmetry_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3a: Asym and NAsym against t, one curve for each run with a band of ±1 standard error."""
    notes = [f"{run.label} has no eval/asymmetry.npz." for run in runs if run.asymmetry is None]
    if len(notes) == len(runs):
        return None, notes
    figure = new_figure(WIDTH, 3.1)
    panels = dict(zip(("asym", "nasym"), figure.subplots(1, 2), strict=True))
    entries: dict[str, Any] = {}
    spanned: dict[str, list[np.ndarray]] = {"asym": [], "nasym": []}
    for i, run in enumerate(runs):
        if run.asymmetry is None:
            continue
        largest = run.asymmetry["nasym"].max()
        if largest < NASYM_ROUND_OFF:
            # No logarithmic axis has room for a zero next to numbers of ordinary size.
            name = f"{run.label}: 0 (NAsym ≤ {largest:.0e}), not drawn"
            entries[name] = Line2D([], [], **_style(i))
            continue
        order = np.argsort(run.asymmetry["t"])
        t = run.asymmetry["t"][order]
        for key, axes in panels.items():
            value, error = (run.asymmetry[name][order].astype(np.float64) for name in (key, f"{key}_se"))
            value = np.where(value > 0, value, np.nan)
            (line,) = axes.plot(t, value, **_style(i), marker="o" if t.size <= 20 else "", markersize=3)
            # A band reaching zero would run off a logarithmic axis: it is cut at a tenth of its curve.
            lower = np.maximum(value - error, 0.1 * value)
            axes.fill_between(t, lower, value + error, color=line.get_color(), alpha=0.22, linewidth=0)
            spanned[key] += [lower, value + error]
            entries.setdefault(run.label, line)
    for key, title in (("asym", "Asym (units of $x^{-4}$)"), ("nasym", "NAsym (dimensionless)")):
        panels[key].set(xlabel="diffusion time $t$", ylabel=title)
        if np.isfinite(np.concatenate(spanned[key] or [[np.nan]])).any():
            _fit_y_axis(panels[key], np.concatenate(spanned[key]))
    _legend_below(figure, entries)
    return figure, notes


def samples_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3b: rows are runs, columns seeds."""
    notes = [f"{run.label} has no eval/samples.npz." for run in runs if run.samples is None]
    drawn = [run for run in runs if run.samples is not None]
    if not drawn:
        return None, notes
    for what, found in (
        ("sampler", {run.metrics["sampler"] for run in drawn}),
        ("config.seed", {str(run.config["seed"]) for run in drawn}),
    ):
        if len(found) > 1:
            notes.append(f"Equal columns are not comparable: the runs differ in {what} ({', '.join(sorted(found))}).")
    columns = min(len(run.samples) for run in drawn)
    figure = new_figure(WIDTH, 0.1 + (WIDTH / columns + 0.2) * len(drawn))
    for axes, run in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        gap = ((0, 0), (0, 0), (0, max(1, run.samples.shape[2] // 12)), (0, 0))
        row = np.concatenate(np.pad(run.samples[:columns], gap, constant_values=1.0), axis=1)
        axes.imshow(row, cmap="gray", vmin=0, vmax=1)
        axes.set_title(run.label, loc="left")
        axes.set_axis_off()
    return figure, notes


def _series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the key, (N,) each."""
    pairs = [(row["step"], row[key]) for row in run.log if row.get(key) is not None and np.isfinite(row[key])]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours (odd), over those that exist at the ends; shape (N,) to (N,)."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def training_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """DSM loss, and the QC term where there is one, against the training step: raw values faint, a running mean over
    1/10 of the rows on top, the test loss as circles."""
    notes = [f"{run.label} has no training rows in metrics.jsonl." for run in runs if not _series(run, "dsm")[0].size]
    if len(notes) == len(runs):
        return None, notes
    shown = [key for key in ("dsm", "qc") if any(_series(run, key)[0].size for run in runs)]
    figure = new_figure(WIDTH if len(shown) == 2 else 0.62 * WIDTH, 3.1)
    entries: dict[str, Any] = {}
    reduced = {run.config["training"]["reduce_mean"] for run in runs}
    if len(reduced) > 1:
        notes.append("The losses are not on one scale: the runs differ in config.training.reduce_mean.")
    unit = {(True,): " per dim.", (False,): " (½ sum)"}.get(tuple(reduced), "")
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        spanned: list[np.ndarray] = []
        for i, run in enumerate(runs):
            steps, values = _series(run, key)
            if not values.size:
                continue
            colour, smooth = _style(i)["color"], _running_mean(values, 2 * (values.size // 20) + 1)
            axes.plot(steps, values, color=colour, alpha=min(0.4, 0.8 / len(runs)), linewidth=0.5, zorder=1)
            (entries[run.label],) = axes.plot(steps, smooth, **_style(i), zorder=3)
            spanned += [smooth, np.quantile(values, (0.25, 0.75))]
            test_steps, test = _series(run, "eval_loss")
            if key == "dsm" and test.size:
                axes.plot(test_steps, test, color=colour, **CIRCLES)
                entries["test loss"] = Line2D([], [], color="#444444", **CIRCLES)
                spanned.append(test)
        axes.set(xlabel="training step", ylabel={"dsm": "DSM loss", "qc": "QC term $L_\\mathrm{QC}$"}[key] + unit)
        # Single batches scatter far more than the curves differ: the axis spans the means, the test losses and the
        # middle half of the rows.
        _fit_y_axis(axes, np.concatenate(spanned))
    _legend_below(figure, entries)
    return figure, notes


# File, heading, how it is drawn, caption.
_FIGURES: tuple[tuple[str, str, Callable[..., tuple[Figure | None, list[str]]], str], ...] = (
    (
        "asymmetry_vs_t.png",
        "Asym and NAsym against t",
        asymmetry_figure,
        "As Figure 3a of the paper: mean over the test images at each noise level, band ±1 standard error. Asym has "
        "the units of the squared Jacobian of the score, (pixel scale)⁻⁴.",
    ),
    (
        "samples_same_seed.png",
        "Samples from the same seeds",
        samples_figure,
        "As Figure 3b of the paper: each column starts from the same random numbers in every run.",
    ),
    (
        "training_curves.png",
        "Training curves",
        training_figure,
        "Running mean over a tenth of the logged rows; faint: the rows themselves; circles: test loss. The axis "
        "may cut the largest rows. The QC term is shown before it is weighted with λ.",
    ),
)


def write_figures(runs: Sequence[Run], output: Path, prefix: str = "") -> list[str]:
    """Draw every figure and return its section of the report; of one that cannot be drawn, no older file is left.

    ``prefix`` goes before the files' names.
    """
    sections = []
    for file_name, heading, draw, caption in _FIGURES:
        figure, notes = draw(runs)
        path = output / f"{prefix}{file_name}"
        if figure is None:
            path.unlink(missing_ok=True)
            lines = [f"`{path.name}` was not drawn.", *notes]
        else:
            save_figure(figure, path)
            lines = [f"![{heading}]({path.name})", "", caption, *notes]
        sections.append("\n".join([f"## {heading}", "", *lines]))
    return sections
