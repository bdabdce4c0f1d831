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
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from exact.gaussian_law import DETERMINISTIC, Law, limit_law, sampler_law, wasserstein
from experiment.results import markdown_table, number
from sde_lib import (
    SDE,
    VE,
    VP,
    ConstantBeta,
    ConstantDiffusionSigma,
    CosineBeta,
    ExponentialBeta,
    GeometricSigma,
    LinearBeta,
    PolynomialSigma,
    PowerBeta,
    SigmaSchedule,
    SquareRootDiffusionSigma,
)

SIGMA_MIN = 0.01


class Process(NamedTuple):
    """A forward process on [0, T].

    ``stretched`` makes the process from its horizon: for VE that is σ_max, for VP T with β(t) continued beyond 1, in
    units of time in which T is 1 again. ``horizon`` is that of the configs. ``steps`` and ``error`` are the paper's
    bounds on K and on the score error, ``exponents`` those of 1/ε and d in the former, without logarithms.
    """

    stretched: Callable[[float], SDE]
    horizon: float
    steps: str
    error: str
    exponents: tuple[float, float]


def _ve(schedule: Callable[..., SigmaSchedule], sigma_max: float, *constants: float) -> SDE:
    return VE(schedule(SIGMA_MIN, sigma_max, *constants))


def _polynomial(sigma_max: float) -> SDE:
    return _ve(PolynomialSigma, sigma_max, 2.0)  # ρ = 2: g ∝ (b + at)^c with c = 3/2


def _linear(horizon: float) -> SDE:
    return VP(LinearBeta(horizon * 0.1, horizon * (0.1 + horizon * 19.9)))


def _constant(horizon: float) -> SDE:
    return VP(ConstantBeta(horizon * 0.1, horizon * 10.0))


def _power(horizon: float, rho: float = 2.0) -> SDE:
    start, end = 0.1 ** (1 / rho), 20.0 ** (1 / rho)
    return VP(PowerBeta(horizon * 0.1, horizon * (start + horizon * (end - start)) ** rho, rho))


def _exponential(horizon: float) -> SDE:
    return VP(ExponentialBeta(horizon * 0.1, horizon * 0.1 * 300.0**horizon))


PROCESSES: dict[str, Process] = {
    "ve_geometric": Process(partial(_ve, GeometricSigma), 50.0, "d log(d/ε)/ε²", "ε/log(1/ε)", (2, 1)),
    "ve_constant": Process(partial(_ve, ConstantDiffusionSigma), 50.0, "d^(3/2) log(d/ε)/ε³", "ε/√log(d/ε)", (3, 1.5)),
    "ve_square_root": Process(partial(_ve, SquareRootDiffusionSigma), 50.0, "d^(5/4)/ε^(5/2)", "ε^(3/2)", (2.5, 1.25)),
    "ve_polynomial": Process(_polynomial, 50.0, "d^(9/8)/ε^(9/4)", "ε^(7/4)", (2.25, 1.125)),
    "vp_linear": Process(_linear, 1.0, "d √log(d/ε)/ε²", "ε", (2, 1)),
    "vp_constant": Process(_constant, 1.0, "d log(d/ε)/ε²", "ε", (2, 1)),
    "vp_power": Process(_power, 1.0, "d (log(d/ε))^(1/3)/ε²", "ε", (2, 1)),
    "vp_exponential": Process(_exponential, 1.0, "d log log(d/ε)/ε²", "ε", (2, 1)),
}
SDES: dict[str, SDE] = {name: process.stretched(process.horizon) for name, process in PROCESSES.items()}
# Not in the paper, and with its end fixed: it has no horizon to stretch.
SDES["vp_cosine"] = VP(CosineBeta(999.0))

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
"""Where slopes that 8192 steps do not show yet are measured, in one dimension of the list only."""
ANALYSED = "exponential_integrator"
EPSILONS = (0.4, 0.2, 0.1, 0.05)
HORIZON_EPSILON = 0.1
"""The ε at which K(ε) is measured in every dimension."""
SCORE_ERRORS = (0.0, 0.03, 0.1, 0.3, 1.0)
SCORE_ERROR_STEPS = 1024


class Settings(NamedTuple):
    """Checked input."""

    steps: tuple[int, ...]
    dimensions: tuple[int, ...]
    mean: float
    smallest_variance: float
    largest_variance: float

    @property
    def reference(self) -> int:
        """The dimension that figures and most tables are of: the middle one."""
        return self.dimensions[len(self.dimensions) // 2]

    def data(self, dimension: int) -> Law:
        fractions = (torch.arange(dimension, dtype=torch.float64) + 0.5) / dimension
        ratio = self.largest_variance / self.smallest_variance
        return Law(torch.full_like(fractions, self.mean), self.smallest_variance * ratio**fractions)


# -------------------------------------------------------------------------------------------------------- computation


def distances(settings: Settings, process: str, sampler: str) -> list[dict]:
    """Rows of W₂ to the data and to the sampler's own limit, for every K and d.

    Directions are independent, so the data of all dimensions go through the sampler together.
    """
    sde = SDES[process]
    parts = [settings.data(d) for d in settings.dimensions]
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


def measured_slopes(settings: Settings, rows: Sequence[dict]) -> list[dict]:
    """Of the discretisation error of each sampler and process: over the last four octaves of ``--steps``, and at more
    steps than these."""
    first = max(settings.steps) / 16
    data = settings.data(settings.reference)
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["d"] == settings.reference and row["K"] >= first:
            curves.setdefault((row["process"], row["sampler"]), []).append((row["K"], row["discretisation"]))
    slopes = []
    for (process, sampler), points in tqdm(curves.items(), desc="slopes", leave=False):
        sde = SDES[process]
        limit = limit_law(sde, data, probability_flow=sampler in DETERMINISTIC)
        errors = [wasserstein(sampler_law(sde, data, sampler, k), limit) for k in LONG_STEPS]
        short = slope(*zip(*points, strict=True)) if len(points) > 1 else None
        long = slope(LONG_STEPS, errors)
        slopes.append({"process": process, "sampler": sampler, "slope": short, "long_slope": long})
    return slopes


def horizon_for(process: Process, data: Law, limit: float) -> float | None:
    """The smallest horizon at which the reverse SDE's limit is ``limit``; none if it never gets there."""

    def missing(horizon: float) -> float:
        return wasserstein(limit_law(process.stretched(horizon), data, probability_flow=False), data) - limit

    # From a horizon at which next to no noise is added, by 5 % at a time: the limit need not fall for ever, because
    # sampling stops at a fixed fraction of the horizon.
    low = high = 0.02 * process.horizon
    while missing(high) > 0:
        low, high = high, 1.05 * high
        if high > 20 * process.horizon:
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
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def needed(settings: Settings) -> list[dict]:
    """K(ε) with the horizon of the theory: by ε in the reference dimension, by d at one ε."""
    cases = [(settings.reference, epsilon) for epsilon in EPSILONS]
    cases += [(d, HORIZON_EPSILON) for d in settings.dimensions if d != settings.reference]
    rows = []
    for name, process in tqdm(PROCESSES.items(), desc="K(ε)", leave=False):
        for d, epsilon in cases:
            data = settings.data(d)
            horizon = horizon_for(process, data, epsilon / 2)
            count = None if horizon is None else steps_needed(process.stretched(horizon), data, epsilon)
            rows.append({"process": name, "d": d, "epsilon": epsilon, "horizon": horizon, "K": count})
    return rows


def score_errors(settings: Settings) -> list[dict]:
    """W₂ if the score is off by a constant vector of length M, the same in all directions; and how far the mean of the
    samples is then moved, per M, which does not depend on M."""
    d = settings.reference
    data, rows = settings.data(d), []
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


def compute(settings: Settings) -> Results:
    """Everything but tables and figures."""
    cases = [(process, sampler) for process in SDES for sampler in SAMPLER_TITLES]
    rows = [row for case in tqdm(cases, desc="W₂", leave=False) for row in distances(settings, *case)]
    limits = []
    for process, sde in SDES.items():
        for d in settings.dimensions:
            data = settings.data(d)
            of_sde, of_ode = (wasserstein(limit_law(sde, data, probability_flow=flow), data) for flow in (False, True))
            limits.append({"process": process, "d": d, "sde": of_sde, "ode": of_ode})
    slopes = measured_slopes(settings, rows)
    return Results(settings, rows, limits, slopes, needed(settings), score_errors(settings))


# -------------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> str:
    """In Markdown."""
    settings, d, last = results.settings, results.settings.reference, max(results.settings.steps)
    slopes = {(r["process"], r["sampler"]): f"{number(r['slope'])} ({number(r['long_slope'])})" for r in results.slopes}
    by_sampler = [(TITLES[p], *(slopes[p, s] for s in SAMPLER_TITLES)) for p in SDES]
    distances = {row["process"]: [row["sde"], row["ode"]] for row in results.limits if row["d"] == d}
    for p in SDES:
        distances[p] += [results.curve(p, s, "w2")[1][-1] for s in SAMPLER_TITLES]
    w2 = [(TITLES[p], *map(number, distances[p])) for p in SDES]
    count = {(row["process"], row["d"], row["epsilon"]): row["K"] or "–" for row in results.needed}
    others = [other for other in settings.dimensions if other != d]
    bounds = []
    for name, process in PROCESSES.items():
        of_epsilon, of_d = measured_exponents(results, name)
        bounds.append(
            (
                TITLES[name],
                process.steps,
                *(count[name, d, epsilon] for epsilon in EPSILONS),
                f"{number(of_epsilon)} ({process.exponents[0]:g})",
                *(count[name, other, HORIZON_EPSILON] for other in others),
                f"{number(of_d)} ({process.exponents[1]:g})",
            )
        )
    bounds.append(("lower bound", "√d/ε", *("" for _ in EPSILONS), "(1)", *("" for _ in others), "(0.5)"))
    by_error = []
    for p in SDES:
        rows = [row for row in results.score_errors if row["process"] == p]
        numbers = [*(row["w2"] for row in rows), rows[-1]["shift_per_error"]]
        by_error.append((TITLES[p], *map(number, numbers), PROCESSES[p].error if p in PROCESSES else "–"))
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


def measured_exponents(results: Results, process: str) -> tuple[float | None, float | None]:
    """Of 1/ε, over all ε in the reference dimension, and of d, over all dimensions at one ε, in K(ε)."""
    known = [row for row in results.needed if row["process"] == process and row["K"] is not None]
    of_epsilon = [(1 / row["epsilon"], row["K"]) for row in known if row["d"] == results.settings.reference]
    of_d = [(row["d"], row["K"]) for row in known if row["epsilon"] == HORIZON_EPSILON]
    return tuple(slope(*zip(*points, strict=True)) if len(points) > 1 else None for points in (of_epsilon, of_d))
