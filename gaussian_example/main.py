"""Section 3.1: a conservative and a non-conservative score of equal error, and where Langevin dynamics goes with each.

    python -m gaussian_example.main --workdir=W [--epsilons=0,5e-4,…] [--figures=trajectories,…]

The data are p = N(0, σ²I) in the plane, σ = 0.1. The approximate score is −x/σ² + a(x) d(x): in the CSBM d(x) = x
points outward, in the USBM d(x) = (−x₂, x₁) around the origin. Both are of one length, so the explicit score-matching
error ½E_p‖s − ∇log p‖² is the same, with

    a(x)² = 2 (ε + 10⁻⁶) μ(x) / (p(x) (‖x‖² + ε + 10⁻⁶) + 10⁻⁸),

μ an equal mixture of ten unit Gaussians on a circle of radius 3. Without the 10⁻⁸ that error would be ε, nearly all of
it three units away from the data; the 10⁻⁸ leaves only what lies within about 0.65, some 0.3 % of ε.

Written to W: ``results.json``, ``tables.md`` (also printed) and the figures as PNG.

Source: Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models"
(ICML 2023), Section 3.1; constants as in its public code.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from conservativeness import HelmholtzHodge, asymmetry, helmholtz_hodge
from experiment.command_line import parse_flags
from experiment.files import write_atomically
from experiment.randomness import normal_like, seed_from
from experiment.workdir import claim
from sampling import langevin_dynamics
from sde_lib import ScoreFunction

EXPERIMENT = "gaussian_example"
SIGMA = 0.1
EPSILONS = (0.0, 5.0e-4, 7.5e-4, 1.0e-3, 1.5e-3, 1.75e-3, 2.25e-3)
LARGEST_EPSILON = 100.0
"""½E‖∇log p‖² = 1/σ², the error of a score that is zero everywhere."""
ANGLES = 2 * math.pi * torch.arange(10, dtype=torch.float64) / 10
CENTRES = 3 * torch.stack([ANGLES.cos(), ANGLES.sin()])
"""Of the components of μ, (2, 10)."""
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "csbm": lambda x: x,
    "usbm": lambda x: torch.stack([-x[:, 1], x[:, 0]], dim=1),
}

NUM_STEPS = 300
THRESHOLD = 1e-3
HALF_WIDTH, GRID_POINTS = 3.0, 20
CELL_AREA = (2 * HALF_WIDTH / (GRID_POINTS - 1)) ** 2
FINE_FACTOR = 6
FINE_POINTS = FINE_FACTOR * (GRID_POINTS - 1) + 1
"""The decomposition's grid: every sixth node is one of the 20×20 grid."""

LANGEVIN_STEP = 0.1 * SIGMA**2
REPETITIONS, PARTICLES = 100, 10
AVERAGED_STEPS = 100

# ε → steps of csbm, steps of usbm, Asym and NAsym of usbm (those of csbm are 0): a run of the public code. The paper
# prints the last two in one another's place.
REFERENCE: dict[float, tuple[int, int, float, float]] = {
    0.0: (1, 1, 0.0, 0.0),
    5.0e-4: (2, 4, 1.77e-2, 4.41e-7),
    7.5e-4: (3, 5, 2.65e-2, 6.60e-7),
    1.0e-3: (3, 6, 3.53e-2, 8.78e-7),
    1.5e-3: (4, 57, 5.28e-2, 1.31e-6),
    1.75e-3: (5, 121, 6.15e-2, 1.53e-6),
    2.25e-3: (16, 238, 7.89e-2, 1.96e-6),
}


# --------------------------------------------------------------------------------------------------- density and score


def log_density(x: Tensor, t: Tensor) -> Tensor:
    """log p(x) in nats, (B, 2) → (B,)."""
    return -(x**2).sum(-1) / (2 * SIGMA**2) - math.log(2 * math.pi * SIGMA**2)


def entropy() -> float:
    """That of p in nats, log(2πeσ²)."""
    return math.log(2 * math.pi * math.e * SIGMA**2)


def true_score(x: Tensor, t: Tensor) -> Tensor:
    """−x/σ², (B, 2) → (B, 2)."""
    return -x / SIGMA**2


def mixture_density(x: Tensor) -> Tensor:
    """μ(x), (B, 2) → (B,)."""
    exponents = x @ CENTRES - 0.5 * ((x**2).sum(1, keepdim=True) + 9)  # −½‖x − c‖²
    return exponents.exp().mean(1) / (2 * math.pi)


def perturbed_score(kind: str, epsilon: float) -> ScoreFunction:
    """The approximate score of ``kind`` 'csbm' or 'usbm'; at ε = 0 the true one."""
    if epsilon == 0:
        return true_score
    direction, guarded = DIRECTIONS[kind], epsilon + 1e-6

    def score(x: Tensor, t: Tensor) -> Tensor:
        p = log_density(x, t).exp()
        a = (2 * guarded * mixture_density(x) / (p * ((x**2).sum(1) + guarded) + 1e-8)).sqrt()
        return true_score(x, t) + a[:, None] * direction(x)

    return score


# -------------------------------------------------------------------------------------- deterministic Langevin dynamics


def starting_points() -> Tensor:
    """The ten particles (10, 2) of the public code."""
    return torch.from_numpy(np.random.RandomState(0).normal(-2, 0.5, 2 * PARTICLES).reshape(PARTICLES, 2))


def step_sizes(epsilon: float) -> list[float]:
    """α_i = α₀ exp(−i/1000): σ² at first if the score is exact, 1.25σ² if not."""
    first = SIGMA**2 if epsilon == 0 else 1.25 * SIGMA**2
    return [first * math.exp(-i / 1000) for i in range(NUM_STEPS)]


def trajectory(kind: str, epsilon: float) -> Tensor:
    """Positions (301, 10, 2) of deterministic Langevin dynamics."""
    x = starting_points()
    return langevin_dynamics(perturbed_score(kind, epsilon), x, times(x), step_sizes(epsilon), noise=False).x


def steps_to_criterion(positions: Tensor) -> Tensor:
    """The first i at which mean max(0, −log(p + 10⁻¹⁶)) < 0.001 before step i, the mean over the last batch dimension;
    the number of steps N if never. (N+1, ..., P, 2) → (...)."""
    p = log_density(positions[:-1], times(positions)).exp()
    met = (-(p + 1e-16).log()).clamp(min=0).mean(-1) < THRESHOLD
    never = torch.full_like(met[0], fill_value=len(met), dtype=torch.long)
    return torch.where(met.any(0), met.int().argmax(0), never)


def times(x: Tensor) -> Tensor:
    """Nothing here depends on time."""
    return x.new_zeros(len(x))


# ------------------------------------------------------------------------------------------------ Asym, NAsym and error


def grid(points: int = GRID_POINTS) -> Tensor:
    """(points, points, 2) on [−3, 3]², component k along axis k."""
    axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, points, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)


@cache
def quadrature(radial: int = 200, angular: int = 20, radius: float = 1.2) -> tuple[Tensor, Tensor]:
    """Nodes (Q, 2) and weights (Q,), p included, for expectations under p: Gauss–Legendre in r, equal angles.

    The 20×20 grid is too coarse for that, its spacing is 3σ. Samples of p would not do either: more than half of
    E Asym comes from beyond 5σ, where one sample in 270 000 falls.
    """
    nodes, weights = np.polynomial.legendre.leggauss(radial)
    r = torch.from_numpy(0.5 * radius * (nodes + 1))[:, None]
    angle = 2 * math.pi * torch.arange(angular, dtype=torch.float64) / angular
    x = torch.stack([r * angle.cos(), r * angle.sin()], dim=-1).view(-1, 2)
    area = torch.from_numpy(0.5 * radius * weights)[:, None] * r * (2 * math.pi / angular)
    return x, area.expand(-1, angular).reshape(-1) * log_density(x, times(x)).exp()


def measure(kind: str, epsilon: float) -> dict[str, float]:
    """Asym and NAsym, as sums of p·value over the 20×20 grid and as expectations under p, and ½E‖s − ∇log p‖²."""
    score = perturbed_score(kind, epsilon)
    x = grid().view(-1, 2)
    p = log_density(x, times(x)).exp()
    on_grid = asymmetry(score, x, times(x), estimator="exact")
    x, weights = quadrature()
    at_nodes = asymmetry(score, x, times(x), estimator="exact")
    error = 0.5 * ((at_nodes.score - true_score(x, times(x))) ** 2).sum(1)
    return {
        "asym": (p * on_grid.asym).sum().item(),
        "nasym": (p * on_grid.nasym).sum().item(),
        "asym_expectation": (weights * at_nodes.asym).sum().item(),
        "nasym_expectation": (weights * at_nodes.nasym).sum().item(),
        "score_error": (weights * error).sum().item(),
    }


def decompose(kind: str, epsilon: float) -> HelmholtzHodge:
    """The perturbed score on [−3, 3]², on a grid six times as fine as the 20×20 one."""
    x = grid(FINE_POINTS)
    field = perturbed_score(kind, epsilon)(x.view(-1, 2), times(x)).view_as(x)
    return helmholtz_hodge(field, 2 * HALF_WIDTH / (FINE_POINTS - 1))


def decomposition_lengths(kind: str, epsilon: float) -> dict[str, float]:
    """Root mean square lengths, over that grid, of the perturbation and of the rotational part."""
    parts, x = decompose(kind, epsilon), grid(FINE_POINTS)
    perturbation = parts.gradient + parts.rotational - true_score(x, times(x))
    return {"perturbation_rms": rms(perturbation), "rotational_rms": rms(parts.rotational)}


# ------------------------------------------------------------------------------------------ with noise, with Metropolis

METHODS = ("deterministic", "unadjusted", "adjusted")


def with_small_steps(kind: str, method: str, epsilon: float) -> tuple[dict, Tensor]:
    """The same experiment at a constant step size of σ²/10, with random starts and, but for one method, with noise.

    The steps of ``trajectory`` are too large for noise: at α = σ² unadjusted Langevin doubles the variance. Here it
    adds 5.3 %. ``adjusted`` accepts or refuses moves by the true p (the USBM has no density): the score only proposes.
    CSBM and USBM share starts and noise.

    Returns:
        The row of results, and the mean of ½‖x‖²/σ² by step (301,), that is −log p(x) + log p(0) in nats.
    """
    start = torch.Generator().manual_seed(seed_from(EXPERIMENT, "start", repr(epsilon)))
    noise = torch.Generator().manual_seed(seed_from(EXPERIMENT, "noise", method, repr(epsilon)))
    x = -2 + 0.5 * normal_like(torch.empty(REPETITIONS * PARTICLES, 2, dtype=torch.float64), start)
    walk = langevin_dynamics(
        perturbed_score(kind, epsilon),
        x,
        times(x),
        [LANGEVIN_STEP] * NUM_STEPS,
        noise=method != "deterministic",
        log_density=log_density if method == "adjusted" else None,
        generator=noise,
    )
    steps = steps_to_criterion(walk.x.view(-1, REPETITIONS, PARTICLES, 2)).double()
    nll = -log_density(walk.x, times(walk.x))
    late_nll = nll[-AVERAGED_STEPS:].view(-1, REPETITIONS, PARTICLES).mean((0, 2))
    row = {
        "type": kind,
        "method": method,
        "epsilon": epsilon,
        "steps": steps.mean().item(),
        "steps_se": standard_error(steps),
        "not_reached": int((steps == NUM_STEPS).sum()),
        "nll": late_nll.mean().item(),
        "nll_se": standard_error(late_nll),
        "acceptance": walk.accepted.double().mean().item(),
        "late_acceptance": walk.accepted[-AVERAGED_STEPS:].double().mean().item(),
    }
    return row, nll.mean(1) - math.log(2 * math.pi * SIGMA**2)


def standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


# ------------------------------------------------------------------------------------------------------------- results


class Results(NamedTuple):
    """What tables and figures are made from; ``curves`` are by (type, method, ε)."""

    epsilons: tuple[float, ...]
    rows: list[dict]
    stochastic: list[dict]
    curves: dict[tuple[str, str, float], Tensor]

    def as_json(self) -> dict:
        return {
            "experiment": EXPERIMENT,
            "sigma": SIGMA,
            "entropy_nats": entropy(),
            "cell_area": CELL_AREA,
            "rows": self.rows,
            "stochastic": {
                "step_size": LANGEVIN_STEP,
                "num_steps": NUM_STEPS,
                "repetitions": REPETITIONS,
                "particles": PARTICLES,
                "nll_averaged_over_last_steps": AVERAGED_STEPS,
                "rows": self.stochastic,
            },
        }


def compute(epsilons: Sequence[float]) -> Results:
    """Everything but tables and figures."""
    rows = [
        {"type": kind, "epsilon": epsilon, "steps": steps_to_criterion(trajectory(kind, epsilon)).item()}
        | measure(kind, epsilon)
        | decomposition_lengths(kind, epsilon)
        for epsilon in epsilons
        for kind in DIRECTIONS
    ]
    keys = itertools.product(DIRECTIONS, METHODS, epsilons)
    walks = {key: with_small_steps(*key) for key in keys}
    curves = {key: curve for key, (_, curve) in walks.items()}
    return Results(tuple(epsilons), rows, [row for row, _ in walks.values()], curves)


def rms(field: Tensor) -> float:
    """Root mean square length of the vectors (..., 2)."""
    return (field**2).sum(-1).mean().sqrt().item()


# -------------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> str:
    """The paper's two tables and that of the stochastic variants, in Markdown."""
    by_key = {(row["type"], row["epsilon"]): row for row in results.rows}
    known = [REFERENCE.get(epsilon) for epsilon in results.epsilons]
    csbm = [by_key["csbm", epsilon] for epsilon in results.epsilons]
    usbm = [by_key["usbm", epsilon] for epsilon in results.epsilons]
    labels = [f"{epsilon:g}" for epsilon in results.epsilons]

    steps = _table(
        ("ε", "CSBM", "reference", "USBM", "reference"),
        [
            (label, c["steps"], r[0] if r else "–", u["steps"], r[1] if r else "–")
            for label, c, u, r in zip(labels, csbm, usbm, known, strict=True)
        ],
    )
    asymmetries = _table(
        ("ε", "Asym", "reference", "NAsym", "reference", "E Asym", "E NAsym", "CSBM: Asym", "NAsym"),
        [
            (
                label,
                f"{u['asym']:.3e}",
                f"{r[2]:.2e}" if r else "–",
                f"{u['nasym']:.3e}",
                f"{r[3]:.2e}" if r else "–",
                f"{u['asym_expectation']:.3e}",
                f"{u['nasym_expectation']:.3e}",
                f"{c['asym']:.0e}",
                f"{c['nasym']:.0e}",
            )
            for label, c, u, r in zip(labels, csbm, usbm, known, strict=True)
        ],
    )
    parts = _table(
        ("ε", "score error", "perturbation", "CSBM: rotational part", "USBM: rotational part"),
        [
            (
                label,
                f"{u['score_error']:.3e}",
                *(f"{v:.3g}" for v in (u["perturbation_rms"], c["rotational_rms"], u["rotational_rms"])),
            )
            for label, c, u in zip(labels, csbm, usbm, strict=True)
        ],
    )
    walks = {(row["epsilon"], row["type"], row["method"]): row for row in results.stochastic}
    small_steps = _table(
        (
            "ε",
            "type",
            *(f"steps, {method}" for method in METHODS),
            *(f"NLL − entropy (nats), {method}" for method in METHODS[1:]),
            "accepted",
        ),
        [
            (
                label,
                TITLES[kind],
                *(_steps_cell(walks[epsilon, kind, method]) for method in METHODS),
                *(_nll_cell(walks[epsilon, kind, method]) for method in METHODS[1:]),
                f"{walks[epsilon, kind, 'adjusted']['acceptance']:.3f}",
            )
            for label, epsilon in zip(labels, results.epsilons, strict=True)
            for kind in DIRECTIONS
        ],
    )
    return f"""Reference: the public code's numbers. Its published table has the columns Asym and NAsym interchanged.

Steps of deterministic Langevin dynamics until mean max(0, −log p) < {THRESHOLD}:

{steps}
Asymmetry of the USBM, and at the end of the CSBM. Asym, NAsym: sum of p·value over the {GRID_POINTS}×{GRID_POINTS} \
grid, as in the
reference (times {CELL_AREA:.4f}, the area of a cell, a coarse integral). E Asym, E NAsym: the expectation under p, by \
quadrature.

{asymmetries}
Error ½E‖s − ∇log p‖² of either score; and on [−3, 3]², not weighted by p, root mean square lengths of s − ∇log p and \
of the rotational
part of s (Helmholtz–Hodge).

{parts}
Constant step size σ²/10, {NUM_STEPS} steps, {REPETITIONS} repetitions of {PARTICLES} particles; \
mean ± standard error. In parentheses: how many
repetitions have not reached the criterion; they count as {NUM_STEPS} steps. NLL: under p, mean of the last \
{AVERAGED_STEPS} steps.

{small_steps}"""


def _steps_cell(row: dict) -> str:
    missed = f" ({row['not_reached']})" if row["not_reached"] else ""
    return f"{row['steps']:.1f} ± {row['steps_se']:.1f}{missed}"


def _nll_cell(row: dict) -> str:
    return f"{row['nll'] - entropy():.3f} ± {row['nll_se']:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in cells)


# ------------------------------------------------------------------------------------------------------------- figures

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "savefig.dpi": 200}
COLOURS = {"csbm": "tab:blue", "usbm": "tab:red"}
LINES = {"deterministic": ":", "unadjusted": "-", "adjusted": "--"}
TITLES = {"csbm": "CSBM", "usbm": "USBM"}


def draw_trajectories(results: Results) -> Figure:
    """The score on the grid and the trajectories up to the criterion, at the first four ε."""
    epsilons = results.epsilons[:4]
    figure = _figure(1.6 * len(epsilons) + 1.0, 3.6)
    axes = figure.subplots(2, len(epsilons), squeeze=False)
    x = grid().view(-1, 2)
    norm = LogNorm(10, 500)
    for i, kind in enumerate(DIRECTIONS):
        axes[i, 0].set_ylabel(TITLES[kind])
        for ax, epsilon in zip(axes[i], epsilons, strict=True):
            arrows = _quiver(ax, x, perturbed_score(kind, epsilon)(x, times(x)), norm)
            positions = trajectory(kind, epsilon)
            positions = positions[: steps_to_criterion(positions).item() + 1]
            for path in positions.unbind(1):
                ax.plot(*path.T, "x-", color="tab:red", linewidth=0.5, markersize=2.5, markeredgewidth=0.6)
            if i == 1:
                ax.set_xlabel(f"ε = {epsilon:g}")
    figure.colorbar(arrows, ax=axes, shrink=0.8, pad=0.015, label="‖s‖")
    return figure


def draw_helmholtz_hodge(results: Results) -> Figure:
    """Score, gradient part and rotational part at the largest ε."""
    epsilon = max(results.epsilons)
    figure = _figure(6.5, 4.1)
    axes = figure.subplots(2, 3)
    norm = LogNorm(1e-1, 500)
    for i, kind in enumerate(DIRECTIONS):
        parts = decompose(kind, epsilon)
        axes[i, 0].set_ylabel(TITLES[kind])
        for ax, field in zip(axes[i], (parts.gradient + parts.rotational, *parts[1:]), strict=True):
            shown = field[::FINE_FACTOR, ::FINE_FACTOR].reshape(-1, 2)
            arrows = _quiver(ax, grid().view(-1, 2), shown, norm)
    for ax, title in zip(axes[0], (f"score, ε = {epsilon:g}", "gradient part", "rotational part"), strict=True):
        ax.set_title(title)
    figure.colorbar(arrows, ax=axes, shrink=0.8, pad=0.015, label="length", extend="min")
    return figure


def draw_stochastic(results: Results) -> Figure:
    """Mean negative log-likelihood against the step, at the smallest positive and the largest ε."""
    positive = [epsilon for epsilon in results.epsilons if epsilon > 0] or [0.0]
    epsilons = sorted({min(positive), max(positive)})
    figure = _figure(3.4 * len(epsilons), 2.3 + 1.2 / len(epsilons))
    axes = figure.subplots(1, len(epsilons), sharey=True, squeeze=False)[0]
    for ax, epsilon in zip(axes, epsilons, strict=True):
        for method, kind in itertools.product(METHODS, DIRECTIONS):
            label = f"{TITLES[kind]}, {method}"
            ax.plot(results.curves[kind, method, epsilon], LINES[method], color=COLOURS[kind], label=label)
        ax.axhline(1, color="0.5", linewidth=0.8, label="samples of p")
        ax.set(title=f"ε = {epsilon:g}", xlabel="step", yscale="log", ylim=(0.05, 2000))
    axes[0].set_ylabel("mean −log p(x) + log p(0)  (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(epsilons))
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "trajectories": draw_trajectories,
    "helmholtz_hodge": draw_helmholtz_hodge,
    "stochastic": draw_stochastic,
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def _quiver(ax, x: Tensor, field: Tensor, norm: LogNorm):
    """Arrows of one length, coloured by the field's; none where it is below the scale."""
    length = field.norm(dim=1).clamp(min=1e-300)
    unit = field / length[:, None]
    colours = matplotlib.colormaps["Blues"].with_extremes(under="none")
    arrows = ax.quiver(*x.T, *unit.T, length, norm=norm, cmap=colours, pivot="mid", units="xy", scale=3.5, width=0.04)
    ax.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), xticks=[], yticks=[], aspect="equal")
    return arrows


# ----------------------------------------------------------------------------------------------------------------- main


def parse_epsilons(values: Sequence[str]) -> tuple[float, ...]:
    """Distinct numbers from 0 to 100, in increasing order.

    Raises:
        ValueError: no value, or one that is not such a number.
    """
    epsilons = set()
    for value in values:
        try:
            epsilon = float(value)
        except ValueError:
            epsilon = math.nan
        if not 0 <= epsilon <= LARGEST_EPSILON:
            raise ValueError(f"--epsilons={value}: allowed are numbers from 0 to {LARGEST_EPSILON:.0f}")
        epsilons.add(epsilon)
    if not epsilons:
        raise ValueError("--epsilons is empty: give at least one number")
    return tuple(sorted(epsilons))


def run(workdir: str | Path, epsilons: Sequence[str], figures: Sequence[str]) -> str:
    """Check the input, compute, write all files to ``workdir`` and return the tables.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    checked = parse_epsilons(epsilons)
    for name in figures:
        if name not in FIGURES:
            raise ValueError(f"--figures={name}: allowed are {', '.join(FIGURES)}")
    folder = claim(workdir, EXPERIMENT, {"epsilons": [float(epsilon) for epsilon in checked]})
    results = compute(checked)
    text = tables(results)
    for name, content in (("results.json", json.dumps(results.as_json(), indent=1) + "\n"), ("tables.md", text)):
        write_atomically(folder / name, lambda file, content=content: file.write(content.encode()))
    with matplotlib.rc_context(STYLE):
        for name in figures:
            write_atomically(folder / f"{name}.png", partial(FIGURES[name](results).savefig, format="png"))
    return text


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for results.json, tables.md and the figures.", required=True)
    flags.DEFINE_list("epsilons", [f"{epsilon:g}" for epsilon in EPSILONS], "Errors of the score.")
    flags.DEFINE_list("figures", list(FIGURES), "Which figures to draw.")


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    try:
        print(run(flags.FLAGS.workdir, flags.FLAGS.epsilons, flags.FLAGS.figures))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was kept")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
