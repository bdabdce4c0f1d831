"""The report's figures: asymmetry against time, samples of equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiment.figures import curve_style, new_figure, save_figure
from report.page import figure as figure_text
from report.runs import NASYM_ROUND_OFF, Run

WIDTH = 6.9  # inches: both columns of the page


def asymmetry_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3a: Asym and NAsym against t, one curve for each run with a band of ±1 standard error."""
    notes = [f"{run.label} has no eval/asymmetry.npz." for run in runs if run.asymmetry is None]
    if len(notes) == len(runs):
        return None, notes
    figure = new_figure(WIDTH, 3.1)
    panels = dict(zip(("asym", "nasym"), figure.subplots(1, 2), strict=True))
    entries: dict[str, Any] = {}
    for i, run in enumerate(runs):
        if run.asymmetry is None:
            continue
        largest = run.asymmetry["nasym"].max()
        if largest < NASYM_ROUND_OFF:
            # No logarithmic axis has room for a zero next to numbers of ordinary size.
            name = f"{run.label}: 0 (NAsym ≤ {largest:.0e}), not drawn"
            entries[name] = Line2D([], [], **curve_style(i))
            continue
        order = np.argsort(run.asymmetry["t"])
        t = run.asymmetry["t"][order]
        for key, axes in panels.items():
            value, error = (run.asymmetry[name][order].astype(np.float64) for name in (key, f"{key}_se"))
            value = np.where(value > 0, value, np.nan)
            (line,) = axes.plot(t, value, **curve_style(i, t.size))
            # A band reaching zero would run off a logarithmic axis: it is cut at a tenth of its curve.
            lower = np.maximum(value - error, 0.1 * value)
            axes.fill_between(t, lower, value + error, color=line.get_color(), alpha=0.22, linewidth=0)
            entries.setdefault(run.label, line)
    for key, title in (("asym", "Asym (units of $x^{-4}$)"), ("nasym", "NAsym (dimensionless)")):
        low, high = panels[key].dataLim.intervaly
        decades = low > 0 and high > 10 * low
        panels[key].set(xlabel="diffusion time $t$", ylabel=title, yscale="log" if decades else "linear")
        if low < high:
            panels[key].margins(y=0.06 if decades else 0.08)
    columns = 1 if max(map(len, entries)) > 48 else 2
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
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


# By what the text speaks of: file, heading, how it is drawn, caption.
_FIGURES: dict[str, tuple[str, str, Callable[..., tuple[Figure | None, list[str]]], str]] = {
    "asymmetry": (
        "asymmetry_vs_t.png",
        "Asym and NAsym against t",
        asymmetry_figure,
        "Asym and NAsym against t, as Figure 3a of the paper: mean over the test images at each noise level, band ±1 "
        "standard error. Asym has the units of the squared Jacobian of the score, (pixel scale)⁻⁴.",
    ),
    "samples": (
        "samples_same_seed.png",
        "Samples from the same seeds",
        samples_figure,
        "Samples of the evaluation, as Figure 3b of the paper: each column starts from the same random numbers in "
        "every run.",
    ),
}


def write_figures(runs: Sequence[Run], output: Path, prefix: str = "") -> dict[str, str]:
    """Draw every figure; of each that can be drawn its Markdown, by name. Of one that cannot, no older file is left.

    ``prefix`` goes before the files' names.
    """
    texts = {}
    for name, (file_name, heading, draw, caption) in _FIGURES.items():
        drawn, notes = draw(runs)
        path = output / f"{prefix}{file_name}"
        if drawn is None:
            path.unlink(missing_ok=True)
            path.with_suffix(".pdf").unlink(missing_ok=True)
        else:
            save_figure(drawn, path)
            texts[name] = figure_text(path.name, heading, " ".join([caption, *notes]))
    return texts
