"""The report's figures: asymmetry against time, samples of equal seeds, training curves.

Figures written: ``asymmetry_vs_t.png`` (Figure 3a of the paper), ``samples_same_seed.png`` (Figure 3b) and
``training_curves.png``. What cannot be drawn is said in the report instead.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.files import write_atomically
from report.runs import NASYM_ROUND_OFF, Run, plain_exponent, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["asymmetry_figure", "samples_figure", "training_figure", "write_figures"]

_WIDTH = 6.9  # inches: both columns of the page
_DPI = 200
# Okabe and Ito's palette without its yellow, which is too light for lines on white; told apart by colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_STYLE = {
    "font.size": 8,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
}


_CIRCLES = {
    "linestyle": "",
    "marker": "o",
    "markersize": 3,
    "markerfacecolor": "white",
    "markeredgewidth": 0.9,
    "zorder": 4,
}


def _line_style(index: int) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "linestyle": _DASHES[index % len(_DASHES)]}


def _figure(width: float, height: float, **options: Any) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def _legend_below(figure: Figure, entries: dict[str, Any]) -> None:
    columns = 1 if max(map(len, entries)) > 48 else 2 if max(map(len, entries)) > 24 or len(entries) % 2 == 0 else 3
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.5
    )


def _value_axis(axes: Any, values: np.ndarray) -> None:
    """Fits the y axis to ``values``: logarithmic if they are positive and span more than a factor of ten (below that
    a linear one has the better ticks), with few labels over many decades and plain numbers within two."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low <= 0 or high < 10 * low:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        return
    axes.set_yscale("log")
    axes.set_ylim(low * (low / high) ** 0.06, high * (high / low) ** 0.06)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    if decades > 6:
        axes.yaxis.set_minor_locator(NullLocator())
    elif decades > 2 or low < 1e-3 or high > 1e4:
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=80))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=20))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)


def asymmetry_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3a: Asym and NAsym against t, one curve for each run with a band of ±1 standard error."""
    notes = [f"{run.label} has no eval/asymmetry.npz." for run in runs if run.asymmetry is None]
    drawn = [(i, run) for i, run in enumerate(runs) if run.asymmetry is not None]
    if not drawn:
        return None, notes
    figure = _figure(_WIDTH, 2.75, layout="constrained")
    panels = figure.subplots(1, 2)
    entries: dict[str, Any] = {}
    spanned: dict[str, list[np.ndarray]] = {"asym": [], "nasym": []}
    for i, run in drawn:
        arrays = run.asymmetry
        largest = arrays["nasym"].max()
        if largest < NASYM_ROUND_OFF:
            # No logarithmic axis has room for a zero beside numbers of ordinary size.
            shown = f"NAsym ≤ {plain_exponent(f'{largest:.0e}')}" if largest > 0 else "exactly"
            entries[f"{run.label}: 0 ({shown}), not drawn"] = panels[0].plot([], [], **_line_style(i))[0]
            continue
        order = np.argsort(arrays["t"])
        t = arrays["t"][order]
        for axes, key in zip(panels, ("asym", "nasym"), strict=True):
            value, error = arrays[key][order].astype(np.float64), arrays[f"{key}_se"][order].astype(np.float64)
            value = np.where(value > 0, value, np.nan)
            marker = {"marker": "o", "markersize": 3} if t.size <= 20 else {}
            (line,) = axes.plot(t, value, **_line_style(i), **marker)
            # A band reaching zero would run off a logarithmic axis: it is cut at a tenth of its curve.
            lower = np.maximum(value - error, 0.1 * value)
            axes.fill_between(t, lower, value + error, color=line.get_color(), alpha=0.22, linewidth=0)
            spanned[key] += [lower, value + error]
            entries.setdefault(run.label, line)
    titles = {"asym": "Asym (units of $x^{-4}$)", "nasym": "NAsym (dimensionless)"}
    for axes, key in zip(panels, titles, strict=True):
        axes.set_xlabel("diffusion time $t$")
        axes.set_ylabel(titles[key])
        if np.isfinite(np.concatenate(spanned[key] or [[np.nan]])).any():
            _value_axis(axes, np.concatenate(spanned[key]))
    _legend_below(figure, entries)
    return figure, notes


def samples_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3b: rows are runs, columns seeds. Images are enlarged by a whole number, so that pixels stay sharp."""
    notes = [f"{run.label} has no eval/samples.npz." for run in runs if run.samples is None]
    drawn = [run for run in runs if run.samples is not None]
    if not drawn:
        return None, notes
    shapes = {run.samples.shape[1:] for run in drawn}
    if len(shapes) > 1:
        return None, [*notes, f"The samples differ in size: {', '.join(map(str, sorted(shapes)))} (H, W, C)."]
    for what, found in (
        ("sampler", {run.metrics["sampler"] for run in drawn}),
        ("config.seed", {run.config.get("seed") for run in drawn}),
    ):
        if len(found) > 1:
            notes.append(f"Equal columns are not comparable: the runs differ in {what} ({_join(found)}).")
    height, width, _ = drawn[0].samples.shape[1:]
    labels = []
    for run in drawn:
        wrapped = textwrap.fill(run.name, 22, break_on_hyphens=False)
        labels.append(f"{run.model}{f', λ = {short(run.qc_weight)}' if run.kind == 'QC' else ''}\n{wrapped}")
    # In pixels of the figure; 13 is more than a character of 8 pt needs on average.
    margin, gap, header, footer = 24 + 13 * max(len(line) for text in labels for line in text.split("\n")), 4, 12, 78
    room = round(_WIDTH * _DPI) - margin
    columns = max(1, min(10, room // (width + gap), *(len(run.samples) for run in drawn)))
    zoom = max(1, min(room // columns - gap, 220) // max(width, height))
    cell_h, cell_w = zoom * height + gap, zoom * width + gap
    canvas = np.ones((cell_h * len(drawn) - gap, cell_w * columns - gap, 3))
    for row, run in enumerate(drawn):
        for column in range(columns):
            image = np.kron(run.samples[column], np.ones((zoom, zoom, 1)))
            top, left = row * cell_h, column * cell_w
            canvas[top : top + zoom * height, left : left + zoom * width] = image
    total_w, total_h = margin + canvas.shape[1] + gap, header + canvas.shape[0] + footer
    figure = _figure(total_w / _DPI, total_h / _DPI)
    axes = figure.add_axes(
        (margin / total_w, footer / total_h, canvas.shape[1] / total_w, canvas.shape[0] / total_h), frameon=False
    )
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.grid(False)
    axes.set_yticks([row * cell_h + (cell_h - gap) / 2 for row in range(len(drawn))], labels)
    axes.set_xticks([column * cell_w + (cell_w - gap) / 2 for column in range(columns)], map(str, range(columns)))
    axes.tick_params(length=0)
    axes.set_xlabel("sample index (one column: the same seed in every run)", labelpad=2)
    return figure, notes


def _join(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours (odd), over those that exist at the ends; shape (N,) to (N,)."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def training_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """DSM loss, and the QC term where there is one, against the training step: raw values faint, a running mean over
    1/10 of the rows on top, the test loss as circles."""
    from matplotlib.lines import Line2D

    notes = [f"{run.label} has no metrics.jsonl." for run in runs if run.log is None]
    panels_of = {
        key: [(i, run, *_series(run.log, key)) for i, run in enumerate(runs) if run.log is not None]
        for key in ("dsm", "qc", "eval_loss")
    }
    panels_of = {key: [entry for entry in entries if entry[2].size] for key, entries in panels_of.items()}
    logged = {entry[0] for entry in panels_of["dsm"]}
    notes += [
        f"metrics.jsonl of {run.label} has no training rows."
        for i, run in enumerate(runs)
        if run.log is not None and i not in logged
    ]
    if not panels_of["dsm"]:
        return None, notes
    shown = [key for key in ("dsm", "qc") if panels_of[key]]
    figure = _figure(_WIDTH if len(shown) == 2 else 0.62 * _WIDTH, 2.75, layout="constrained")
    entries: dict[str, Any] = {}
    last_step = max(entry[2].max() for entry in panels_of["dsm"])
    unit, unit_name = (1000.0, "training step (thousands)") if last_step >= 10_000 else (1.0, "training step")
    reduced = {run.config["training"].get("reduce_mean") for run in runs}
    if len(reduced) > 1:
        notes.append("The losses are not on one scale: the runs differ in config.training.reduce_mean.")
    scale = {(True,): " per dim.", (False,): " (½ sum)"}.get(tuple(reduced), "")
    faint = {"alpha": min(0.3, 0.6 / len(runs)), "linewidth": 0.5, "zorder": 1}
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        spanned: list[np.ndarray] = []
        for i, run, steps, values in panels_of[key]:
            smooth = _running_mean(values, min(max(3, 2 * (values.size // 20) + 1), values.size))
            axes.plot(steps / unit, values, color=_line_style(i)["color"], **faint)
            (line,) = axes.plot(steps / unit, smooth, **_line_style(i), zorder=3)
            entries.setdefault(run.label, line)
            spanned += [smooth, np.quantile(values, (0.25, 0.75))]
        for i, _, steps, values in panels_of["eval_loss"] if key == "dsm" else ():
            axes.plot(steps / unit, values, color=_line_style(i)["color"], **_CIRCLES)
            spanned.append(values)
        axes.set_xlabel(unit_name)
        axes.set_ylabel({"dsm": "DSM loss", "qc": "QC term $L_\\mathrm{QC}$"}[key] + scale)
        # Single batches scatter far more than the curves differ: the axis spans the means, the test losses and the
        # middle half of the rows.
        _value_axis(axes, np.concatenate(spanned))
    if panels_of["eval_loss"]:
        entries["test loss"] = Line2D([], [], color="#444444", **_CIRCLES)
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
    """Draws every figure and returns its section of the report; of one that cannot be drawn, no older file stays.

    ``prefix`` goes before the files' names.
    """
    import matplotlib

    sections = []
    with matplotlib.rc_context(_STYLE):
        for file_name, heading, draw, caption in _FIGURES:
            figure, notes = draw(runs)
            file_name = prefix + file_name
            if figure is None:
                (output / file_name).unlink(missing_ok=True)
                lines = [f"`{file_name}` was not drawn.", *notes]
            else:
                write_atomically(output / file_name, partial(figure.savefig, format="png"))
                lines = [f"![{heading}]({file_name})", "", caption, *notes]
            sections.append("\n".join([f"## {heading}", "", *lines]))
    return sections
