"""Exact W₂ between Gaussian data and the law of every sampler, for nine forward processes: computation and tables.

The data are N(m, Σ) with the eigenvalues of Σ in geometric progression, at the midpoints of d equal intervals, so that
every d has about the same error per direction. The score is exact; what is left is

* the discretisation error, the distance to the law of the same sampler with infinitely many steps, and
* the limit, the distance of that law to the data: sampling starts from the prior and stops before t = 0.

Source: Gao, Nguyen, Zhu, "Wasserstein Convergence Guarantees for a General Class of Score-Based Generative Models"
(JMLR 2025): the processes, upper and lower bounds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from exact.gaussian_law import DETERMINISTIC, Law, limit_law, sampler_law, wasserstein
from experiment.results import markdown_table, number
from sde_lib import SDE, make_sde


class Bounds(NamedTuple):
    """The paper's, on K and on the score error, and the exponents of 1/ε and d in the former, without logarithms."""

    steps: str
    error: str
    exponents: tuple[float, float]


BOUNDS = {
    "ve_geometric": Bounds("d log(d/ε)/ε²", "ε/log(1/ε)", (2, 1)),
    "ve_constant": Bounds("d^(3/2) log(d/ε)/ε³", "ε/√log(d/ε)", (3, 1.5)),
    "ve_square_root": Bounds("d^(5/4)/ε^(5/2)", "ε^(3/2)", (2.5, 1.25)),
    "ve_polynomial": Bounds("d^(9/8)/ε^(9/4)", "ε^(7/4)", (2.25, 1.125)),  # g ∝ (b + at)^c with c = 3/2
    "vp_linear": Bounds("d √log(d/ε)/ε²", "ε", (2, 1)),
    "vp_constant": Bounds("d log(d/ε)/ε²", "ε", (2, 1)),
    "vp_power": Bounds("d (log(d/ε))^(1/3)/ε²", "ε", (2, 1)),
    "vp_exponential": Bounds("d log log(d/ε)/ε²", "ε", (2, 1)),
}
"""By forward process, family and schedule."""
HORIZONS = {"ve": 50.0, "vp": 1.0}
"""Of the paper's configs: σ_max, and the length T of time."""


def stretched(process: str, horizon: float) -> SDE:
    """A process with the paper's constants on another horizon: for VE that is σ_max, for VP T with β(t) continued
    beyond 1, in units of time in which T is 1 again."""
    family, _, schedule = process.partition("_")
    if family == "ve":
        return make_sde("vesde", schedule, {"sigma_min": 0.01, "sigma_max": horizon, "rho": 2.0})
    beta_max = {  # T β(T)
        "linear": horizon * (0.1 + horizon * 19.9),
        "constant": horizon * 10.0,
        "power": horizon * (0.1**0.5 + horizon * (20.0**0.5 - 0.1**0.5)) ** 2,
        "exponential": horizon * 0.1 * 300.0**horizon,
    }
    return make_sde("vpsde", schedule, {"beta_min": horizon * 0.1, "beta_max": beta_max[schedule], "rho": 2.0})


SDES = {process: stretched(process, HORIZONS[process[:2]]) for process in BOUNDS}
# Not in the paper, and with its end fixed: it has no horizon to stretch.
SDES["vp_cosine"] = make_sde("vpsde", "cosine", {"beta_max": 999.0})

SAMPLER_TITLES = {
    "euler_maruyama": "Euler–Maruyama",
    "reverse_diffusion": "reverse diffusion",
    "ancestral_sampling": "ancestral",
    "exponential_integrator": "exponential integrator",
    "probability_flow": "flow, Euler",
    "heun": "flow, Heun",
}
TITLES = {name: f"{name[:2].upper()} {name[3:].replace('_', ' ')}" for name in SDES}

LONG_STEPS = (2**14, 2**15, 2**16)
"""At which the slope is measured again, nearer to its limit, in the reference dimension only."""
ANALYSED = "exponential_integrator"
EPSILONS = (0.4, 0.2, 0.1, 0.05)
HORIZON_EPSILON = 0.1
"""The ε at which K(ε) is measured in every dimension."""
SCORE_ERRORS = (0.0, 0.03, 0.1, 0.3, 1.0)
SCORE_ERROR_STEPS = 1024


class Settings(NamedTuple):
    """Numbers of steps and dimensions, ascending."""

    steps: tuple[int, ...]
    dimensions: tuple[int, ...]

    @property
    def reference(self) -> int:
        """The dimension that figures and most tables are of: the middle one."""
        return self.dimensions[len(self.dimensions) // 2]


def data_of(dimension: int) -> Law:
    """N(m, Σ): all components of m are ½, and the eigenvalues of Σ lie between ¼ and 1."""
    fractions = (torch.arange(dimension, dtype=torch.float64) + 0.5) / dimension
    return Law(torch.full_like(fractions, 0.5), 0.25 * 4.0**fractions)


def distances(settings: Settings, process: str, sampler: str) -> list[dict]:
    """Rows of W₂ to the data and to the sampler's own limit, for every K and d.

    Directions are independent, so the data of all dimensions go through the sampler together.
    """
    sde = SDES[process]
    parts = [data_of(d) for d in settings.dimensions]
    data = Law(*(torch.cat(column) for column in zip(*parts, strict=True)))
    limit = limit_law(sde, data, probability_flow=sampler in DETERMINISTIC)
    rows = []
    for num_steps in settings.steps:
        laws = (sampler_law(sde, data, sampler, num_steps), data, limit)
        split = [zip(*(column.split(settings.dimensions) for column in law), strict=True) for law in laws]
        for d, *columns in zip(settings.dimensions, *split, strict=True):
            of_sampler, of_data, of_limit = (Law(*pair) for pair in columns)
            row = {"process": process, "sampler": sampler, "d": d, "K": num_steps}
            row["w2"], row["discretisation"] = (wasserstein(of_sampler, other) for other in (of_data, of_limit))
            rows.append(row)
    return rows


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Least-squares slope of log error against log K."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def measured_slope(settings: Settings, process: str, sampler: str, rows: Sequence[dict]) -> dict:
    """Of the discretisation error: over the last four octaves of ``--steps``, and at more steps than these."""
    sde, data = SDES[process], data_of(settings.reference)
    limit = limit_law(sde, data, probability_flow=sampler in DETERMINISTIC)
    errors = [wasserstein(sampler_law(sde, data, sampler, k), limit) for k in LONG_STEPS]
    rows = [row for row in rows if row["d"] == settings.reference and row["K"] >= max(settings.steps) / 16]
    short = slope([row["K"] for row in rows], [row["discretisation"] for row in rows]) if len(rows) > 1 else None
    return {"process": process, "sampler": sampler, "slope": short, "long_slope": slope(LONG_STEPS, errors)}


def horizon_for(process: str, data: Law, limit: float) -> float | None:
    """The smallest horizon at which the reverse SDE's limit is ``limit``; none if it never gets there."""

    def missing(horizon: float) -> float:
        return wasserstein(limit_law(stretched(process, horizon), data, probability_flow=False), data) - limit

    # From a horizon at which next to no noise is added, by 5 % at a time: the limit need not fall for ever, because
    # sampling stops at a fixed fraction of the horizon.
    usual = HORIZONS[process[:2]]
    low = high = 0.02 * usual
    while missing(high) > 0:
        low, high = high, 1.05 * high
        if high > 20 * usual:
            return None
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if missing(middle) > 0 else (low, middle)
    return high


def steps_needed(sde: SDE, data: Law, epsilon: float) -> int:
    """The smallest K at which W₂ of the exponential integrator is at most ε, if W₂ falls up to there."""

    def reached(num_steps: int) -> bool:
        return wasserstein(sampler_law(sde, data, ANALYSED, num_steps), data) <= epsilon

    high = 1
    while not reached(high):
        high *= 2
    return high // 2 + 1 + bisect_left(range(high // 2 + 1, high), True, key=reached)


def needed(settings: Settings) -> list[dict]:
    """K(ε) with the horizon of the theory: by ε in the reference dimension, by d at one ε."""
    cases = [(settings.reference, epsilon) for epsilon in EPSILONS]
    cases += [(d, HORIZON_EPSILON) for d in settings.dimensions if d != settings.reference]
    rows = []
    for process in tqdm(BOUNDS, desc="K(ε)", leave=False):
        for d, epsilon in cases:
            data = data_of(d)
            horizon = horizon_for(process, data, epsilon / 2)
            count = None if horizon is None else steps_needed(stretched(process, horizon), data, epsilon)
            rows.append({"process": process, "d": d, "epsilon": epsilon, "horizon": horizon, "K": count})
    return rows


def score_errors(settings: Settings) -> list[dict]:
    """W₂ if the score is off by a constant vector of length M, the same in all directions; and how far the mean of the
    samples is then moved, per M, which does not depend on M."""
    d = settings.reference
    data, rows = data_of(d), []
    for process, sde in SDES.items():
        exact = sampler_law(sde, data, ANALYSED, SCORE_ERROR_STEPS)
        for size in SCORE_ERRORS:
            law = sampler_law(sde, data, ANALYSED, SCORE_ERROR_STEPS, error=size / math.sqrt(d))
            rows.append({"process": process, "d": d, "K": SCORE_ERROR_STEPS, "M": size, "w2": wasserstein(law, data)})
            if size:
                rows[-1]["shift_per_error"] = float((law.mean - exact.mean).norm()) / size
    return rows


class Results(NamedTuple):
    """What tables and figures are made from."""

    settings: Settings
    rows: list[dict]
    limits: list[dict]
    slopes: list[dict]
    needed: list[dict]
    score_errors: list[dict]

    def curve(self, process: str, sampler: str, quantity: str) -> tuple[list[int], list[float]]:
        """K and the quantity in the reference dimension."""
        case = (process, sampler, self.settings.reference)
        chosen = [row for row in self.rows if (row["process"], row["sampler"], row["d"]) == case]
        return [row["K"] for row in chosen], [row[quantity] for row in chosen]

    def counts(self, process: str) -> tuple[list[tuple[float, int]], list[tuple[int, int]]]:
        """(1/ε, K(ε)) in the reference dimension, and (d, K(ε)) at one ε, where K(ε) is known."""
        known = [row for row in self.needed if row["process"] == process and row["K"] is not None]
        by_epsilon = [(1 / row["epsilon"], row["K"]) for row in known if row["d"] == self.settings.reference]
        return by_epsilon, sorted((row["d"], row["K"]) for row in known if row["epsilon"] == HORIZON_EPSILON)


def compute(settings: Settings) -> Results:
    """Everything but tables and figures."""
    rows, limits, slopes = [], [], []
    for process, sampler in tqdm([(p, s) for p in SDES for s in SAMPLER_TITLES], desc="W₂", leave=False):
        of_case = distances(settings, process, sampler)
        rows += of_case
        slopes.append(measured_slope(settings, process, sampler, of_case))
    for process, sde in SDES.items():
        for d in settings.dimensions:
            data = data_of(d)
            of_sde, of_ode = (wasserstein(limit_law(sde, data, probability_flow=flow), data) for flow in (False, True))
            limits.append({"process": process, "d": d, "sde": of_sde, "ode": of_ode})
    return Results(settings, rows, limits, slopes, needed(settings), score_errors(settings))


def tables(results: Results) -> str:
    """In Markdown."""
    settings, d, last = results.settings, results.settings.reference, max(results.settings.steps)
    others = [other for other in settings.dimensions if other != d]
    by_sampler, w2, bounds, by_error = [], [], [], []
    for name, title in TITLES.items():
        slopes = [row for row in results.slopes if row["process"] == name]
        by_sampler.append((title, *(f"{number(row['slope'])} ({number(row['long_slope'])})" for row in slopes)))
        [limit] = [row for row in results.limits if (row["process"], row["d"]) == (name, d)]
        at_last = [results.curve(name, sampler, "w2")[1][-1] for sampler in SAMPLER_TITLES]
        w2.append((title, *map(number, (limit["sde"], limit["ode"], *at_last))))
        rows = [row for row in results.score_errors if row["process"] == name]
        numbers = map(number, (*(row["w2"] for row in rows), rows[-1]["shift_per_error"]))
        by_error.append((title, *numbers, BOUNDS[name].error if name in BOUNDS else "–"))
    for name, bound in BOUNDS.items():
        count = {(row["d"], row["epsilon"]): row["K"] or "–" for row in results.needed if row["process"] == name}
        of_epsilon, of_d = (
            f"{number(slope(*zip(*points, strict=True)) if len(points) > 1 else None)} ({exponent:g})"
            for points, exponent in zip(results.counts(name), bound.exponents, strict=True)
        )
        at_d, at_others = [count[d, epsilon] for epsilon in EPSILONS], [count[x, HORIZON_EPSILON] for x in others]
        bounds.append((TITLES[name], bound.steps, *at_d, of_epsilon, *at_others, of_d))
    bounds.append(("lower bound", "√d/ε", *("" for _ in EPSILONS), "(1)", *("" for _ in others), "(0.5)"))
    titles = list(SAMPLER_TITLES.values())
    counts = (f"K({epsilon:g})" for epsilon in EPSILONS), (f"K({HORIZON_EPSILON:g}), d = {other}" for other in others)
    return f"""\
Slope of log(discretisation error) against log K, d = {d}, between K = {last // 16} and {last}; in parentheses between
{LONG_STEPS[0]} and {LONG_STEPS[-1]}.

{markdown_table(("process", *titles), by_sampler)}
W₂ to the data, d = {d}: in the limit of infinitely many steps, and at K = {last}.

{markdown_table(("process", "limit, SDE", "limit, ODE", *titles), w2)}
Steps K(ε) of the exponential integrator with the horizon at which the limit is ε/2; d = {d} unless given. Exponents:
fitted to the measured K, in parentheses the paper's (without logarithms). –: the limit does not get down to ε/2.

{markdown_table(("process", "upper bound on K", *counts[0], "exponent of 1/ε", *counts[1], "exponent of d"), bounds)}
W₂ of the exponential integrator with {SCORE_ERROR_STEPS} steps and a constant error of length M in the score, d = {d};
how far the mean of the samples moves, divided by M.

{markdown_table(("process", *(f"M = {m:g}" for m in SCORE_ERRORS), "shift/M", "the paper's M for ε"), by_error)}"""
