"""The analysis of the README's plan: primary tests, secondary differences, table and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiment.figures import COLOURS, new_figure
from experiment.results import holm, markdown_table, mean_and_error, number, paired_difference, with_error

from .arms import Part

MARGIN = 0.01
"""Bits/dim: differences in likelihood below this are of no interest."""
LEVEL = 0.05
MEASURES = {
    "nll": "NLL (bits/dim)",
    "bound": "bound by the SDE (bits/dim)",
    "bound_gap": "bound − NLL (bits/dim)",
    "dsm": "test loss",
    "asym": "Asym",
    "nasym": "NAsym",
    "fid_pc": "FID, PC",
    "fid_ode": "FID, ODE",
    "fid_few_step": "FID, few steps",
    "path_excess": "path length/chord − 1",
    "circulation": "circulation",
    "inconsistency": "inconsistency",
}


def values(rows: Sequence[Mapping], model: str, measure: str) -> np.ndarray:
    """A measure of a model (N,), by seed."""
    return np.array([row[measure] for row in rows if row["model"] == model])


def primary(differences: Mapping[str, np.ndarray]) -> list[dict]:
    """Of paired differences (N,) by stage: Student's test of 0, and two one-sided tests of ±MARGIN, whose p-value is
    the larger one. Each of the two is corrected by Holm for the number of stages; of one seed there are none."""
    found = []
    for stage, d in differences.items():
        row = {"stage": stage, **paired_difference(d, np.zeros_like(d)), "p_equivalent": None}
        if row["p"] is not None:
            mean, error = mean_and_error(d)
            row["p_equivalent"] = float(stats.t.sf((MARGIN - abs(mean)) / error, len(d) - 1))
        found.append(row)
    for name in ("p", "p_equivalent"):
        corrected = holm([np.nan if row[name] is None else row[name] for row in found])
        for row, p in zip(found, corrected, strict=True):
            row[f"{name}_holm"] = None if np.isnan(p) else float(p)
    return [row | {"verdict": verdict(row)} for row in found]


def verdict(row: Mapping) -> str:
    """What the plan lets be said of one stage."""
    differs, equivalent = (p is not None and p < LEVEL for p in (row["p_holm"], row["p_equivalent_holm"]))
    if not differs:
        return f"no difference of {MARGIN:g} or more" if equivalent else "undecided"
    return f"QC {'lower' if row['mean'] < 0 else 'higher'}" + (f", by less than {MARGIN:g}" if equivalent else "")


def primary_differences(rows: Sequence[Mapping], part: Part) -> dict[str, np.ndarray]:
    """ΔNLL of QC with the primary weight against U at equal compute, by fork."""
    weight = part.weights[-1]
    return {
        str(fork): values(rows, f"qc-{fork}-{weight:g}", "nll") - values(rows, f"u-{fork}-compute", "nll")
        for fork in part.forks
    }


def comparisons(part: Part) -> dict[str, tuple[str, str]]:
    """All pairs of models whose differences are reported."""
    pairs = {}
    for fork in part.forks:
        for weight in part.weights:
            for control in ("steps", "compute"):
                name = f"QC {weight:g} − U, fork {fork}, equal {control}"
                pairs[name] = f"qc-{fork}-{weight:g}", f"u-{fork}-{control}"
    if (fork := part.controls_at) is not None:
        qc, u = f"qc-{fork}-{part.weights[-1]:g}", f"u-{fork}-compute"
        pairs |= {
            "placebo − QC, equal steps": ("placebo", qc),
            "placebo − U, equal steps": ("placebo", f"u-{fork}-steps"),
            "placebo − U, equal compute": ("placebo", "u-placebo-compute"),
            "lazy QC − U, equal compute": ("lazy", u),
            "decay − U, equal compute": ("decay", u),
            "QC − decay, equal compute": (qc, "decay"),
            "QC from scratch − U, equal compute": ("scratch", u),
            "QC from scratch − QC, equal compute": ("scratch", qc),
        }
    return pairs


def secondary(
    rows: Sequence[Mapping], pairs: Mapping[str, tuple[str, str]], measures: Sequence[str]
) -> list[dict[str, object]]:
    """Paired differences with 95 % intervals and p-values that are corrected for nothing."""
    return [
        {"comparison": name, "measure": m, **paired_difference(values(rows, a, m), values(rows, b, m))}
        for name, (a, b) in pairs.items()
        for m in measures
    ]


def primary_table(found: Sequence[Mapping]) -> str:
    """In Markdown."""
    lines = [
        (r["stage"], interval(r), number(r["p_holm"]), number(r["p_equivalent_holm"]), r["verdict"]) for r in found
    ]
    header = ("fork", "ΔNLL (bits/dim) [95 %]", "p, Holm", "p of equivalence, Holm", "verdict")
    return markdown_table(header, lines)


def secondary_table(found: Sequence[Mapping], titles: Mapping[str, str]) -> str:
    """In Markdown, a line for each comparison."""
    cells = {(d["comparison"], d["measure"]): interval(d) for d in found}
    names = dict.fromkeys(d["comparison"] for d in found)
    return markdown_table(
        ("difference", *titles.values()), [(name, *(cells[name, m] for m in titles)) for name in names]
    )


def models_table(rows: Sequence[Mapping], titles: Mapping[str, str]) -> str:
    """Mean ± standard error over seeds of every model, in Markdown."""
    names = dict.fromkeys(row["model"] for row in rows)
    lines = [(name, *(with_error(*mean_and_error(values(rows, name, m))) for m in titles)) for name in names]
    return markdown_table(("model", *titles.values()), lines)


def interval(d: Mapping) -> str:
    """Mean and interval of a difference."""
    return f"{d['mean']:+.2g}" + ("" if d["low"] is None else f" [{d['low']:+.2g}, {d['high']:+.2g}]")


def draw_delta(rows: Sequence[Mapping], part: Part) -> Figure:
    """ΔNLL of QC against U by the fork, at equal steps and at equal compute: a point for each seed, the mean and its
    95 % interval. Grey: the margin of equivalence."""
    figure = new_figure(7.2, 3.0)
    for axes, control in zip(figure.subplots(1, 2, sharey=True), ("steps", "compute"), strict=True):
        axes.axhspan(-MARGIN, MARGIN, color="0.9")
        axes.axhline(0, color="0.5", linewidth=0.6)
        for i, weight in enumerate(part.weights):
            for k, fork in enumerate(part.forks):
                pair = values(rows, f"qc-{fork}-{weight:g}", "nll"), values(rows, f"u-{fork}-{control}", "nll")
                found, place = paired_difference(*pair), k + 0.3 * (i - (len(part.weights) - 1) / 2)
                axes.plot(np.full(len(pair[0]), place - 0.05), pair[0] - pair[1], ".", color=COLOURS[i], markersize=4)
                reach = 0 if found["low"] is None else found["mean"] - found["low"]
                label = f"λ = {weight:g}" if k == 0 else None
                style = dict(color=COLOURS[i], marker="_", capsize=3, linestyle="", label=label)
                axes.errorbar(place + 0.05, found["mean"], reach, **style)
        axes.set(xlabel="fork (step of U)", title=f"equal {control}")
        axes.set_xticks(range(len(part.forks)), map(str, part.forks))
    figure.axes[0].set_ylabel("NLL of QC − U (bits/dim)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
