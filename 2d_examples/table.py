"""The table of all nine pairs of data set and model over several seeds, and what its differences are worth.

Statistics. A number is the mean over seeds ± its standard error (standard deviation over seeds / √N). Two models are
compared seed by seed, d_i = a_i − b_i: they share training points, noise, order, test points and, U and QC, initial
weights. The interval is mean(d) ± t(0.975, N − 1)·std(d)/√N (Student); one that contains 0 does not tell the models
apart. For N = 1 there are no errors.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from experiment.results import holm, markdown_table, mean_and_error, paired_difference, with_error

from .configs import MODELS

EXACT = "exact"
"""The exact score, measured like a model (seed 0)."""
NAMES = {"u": "U", "c": "C", "qc": "QC", EXACT: "exact score"}

METRICS = {
    "nll": "NLL, prior N(0, 9I) (nats)",
    "nll_matched_prior": "NLL, exact prior (nats)",
    "score_error": "score error",
    "asym": "Asym",
    "nasym": "NAsym",
    "precision": "precision",
    "recall": "recall",
    "nfe_sampling": "NFE sampling",
    "nfe_likelihood": "NFE likelihood",
}

# What the public code gives by its own protocol (2 or 3 seeds; score error at matched noise levels, seed 0).
REFERENCE: dict[tuple[str, str], dict[str, str]] = {
    key: dict(zip(("nll", "asym", "nasym", "precision", "recall", "score_error"), values, strict=True))
    for key, values in {
        ("gaussian_8", "u"): ("5.034, 5.063, 5.087", "1.2–2.1e-2", "1.8–3.0e-3", ".94–.96", ".92–.93", ".273"),
        ("gaussian_8", "c"): ("5.168, 5.241, 5.286", "0", "0", ".84–.93", ".86–.92", ".237"),
        ("gaussian_8", "qc"): ("5.021, 5.092, 5.054", "1.0–1.9e-2", "1.5–2.7e-3", ".94–.96", ".92–.93", ".272"),
        ("checkerboard", "u"): ("5.167, 5.083, 5.292", "7.3–11e-2", "1.9–2.4e-2", ".94", ".93–.94", ".667"),
        ("checkerboard", "c"): ("5.096, 5.225, 5.275", "0", "0", ".89–.91", ".93–.95", ".804"),
        ("checkerboard", "qc"): ("5.170, 5.080, 5.307", "5.5–6.4e-2", "1.4–1.7e-2", ".94", ".93–.94", ".670"),
        ("spiral_2", "u"): ("4.932", "1.02", "7.3e-2", ".71", ".84", "2.03"),
        ("spiral_2", "c"): ("5.248", "0", "0", ".34", ".95", "3.14"),
        ("spiral_2", "qc"): ("4.778", "4.3e-1", "5.7e-2", ".66", ".86", "2.14"),
    }.items()
}


def values(rows: Sequence[Mapping], dataset: str, model: str, metric: str) -> np.ndarray:
    """A metric of a pair (N,), in the order of the rows, that is of the seeds."""
    return np.array([row[metric] for row in rows if (row["dataset"], row["model"]) == (dataset, model)])


def paired_differences(rows: Sequence[Mapping]) -> list[dict]:
    """QC against U and against C, in every metric on every data set; ``p_holm`` is corrected for all outcomes of one of
    the two comparisons."""
    found: list[dict] = []
    for other in ("u", "c"):
        outcomes = [
            {"dataset": dataset, "difference": f"qc - {other}", "metric": metric}
            | paired_difference(values(rows, dataset, "qc", metric), values(rows, dataset, other, metric))
            for dataset, metric in product(dict.fromkeys(row["dataset"] for row in rows), METRICS)
        ]
        corrected = holm([math.nan if d["p"] is None else d["p"] for d in outcomes])
        found += [
            d | {"p_holm": None if d["p"] is None else float(p)} for d, p in zip(outcomes, corrected, strict=True)
        ]
    return found


def markdown(rows: Sequence[Mapping], differences: Sequence[Mapping]) -> str:
    """All numbers, with the public code's under ours, and the paired differences."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    text = "# 2-D examples\n\nMean ± standard error over seeds.\n"
    for name in names:
        lines = []
        for model in (*MODELS, EXACT):
            cells = [with_error(*mean_and_error(values(rows, name, model, metric))) for metric in METRICS]
            lines.append((NAMES[model], *cells))
            if model != EXACT:
                lines.append(("*public code*", *(REFERENCE[name, model].get(metric, "") for metric in METRICS)))
        own, cross = (values(rows, name, EXACT, quantity)[0] for quantity in ("entropy", "cross_entropy"))
        text += f"""
## {name}

{markdown_table(("model", *METRICS.values()), lines)}
Entropy of the density at t = 1e-5: {own:.4f} nats. Its cross-entropy with the test points of seed 0, what a perfect
model with the exact prior scores: {cross:.4f}.
"""
    found = {(d["dataset"], d["metric"], d["difference"]): _interval(d) for d in differences}
    pairs = ("qc - u", "qc - c")
    lines = [(name, METRICS[m], *(found[name, m, pair] for pair in pairs)) for name, m in product(names, METRICS)]
    return f"""{text}
## Paired differences

Mean over seeds of the difference, 95 % interval, and in how many seeds QC has the lower value. Bold: p < 0.05 after
Holm's correction for all differences of the column.

{markdown_table(("data set", "metric", "QC − U", "QC − C"), lines)}"""


def _interval(d: Mapping) -> str:
    text = f"{d['mean']:+.2g}"
    if d["low"] is None:
        return text
    text += f" [{d['low']:+.2g}, {d['high']:+.2g}], {d['lower_in_seeds']}/{d['seeds']}"
    return f"**{text}**" if d["p_holm"] < 0.05 else text
