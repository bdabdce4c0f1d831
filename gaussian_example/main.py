"""Section 3.1: a conservative and a non-conservative score of equal error, and where Langevin dynamics takes each.

    python -m gaussian_example.main --workdir=W [--epsilons=0,5e-4,…]

The data are p = N(0, σ²I) in the plane, σ = 0.1. The approximate score is −x/σ² + a(x) d(x): in the CSBM d(x) = x
points outward, in the USBM d(x) = (−x₂, x₁) around the origin. Both are of one length, so the explicit score-matching
error ½E_p‖s − ∇log p‖² is the same, with

    a(x)² = 2 (ε + 10⁻⁶) μ(x) / (p(x) (‖x‖² + ε + 10⁻⁶) + 10⁻⁸),

μ an equal mixture of ten unit Gaussians on a circle of radius 3. Without the 10⁻⁸ that error would be ε, nearly all of
it three units away from the data; the 10⁻⁸ leaves only what lies within about 0.65, some 0.3 % of ε.

Files: W/results.json, W/table.md, W/trajectories.png, W/helmholtz_hodge.png.

Source: Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models"
(ICML 2023), Section 3.1; constants as in its public code.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from torch import Tensor

from conservativeness import HelmholtzHodge, asymmetry, helmholtz_hodge
from experiment.command_line import command
from experiment.figures import new_figure, plane
from experiment.files import claim
from experiment.randomness import normal_like, seed_from
from experiment.results import markdown_table, with_error, write_results
from sampling import langevin_dynamics
from sde_lib import ScoreFunction

EXPERIMENT = "gaussian_example"
SIGMA = 0.1
ENTROPY = math.log(2 * math.pi * math.e * SIGMA**2)
"""Of p, in nats."""
LARGEST_EPSILON = 100.0
"""½E‖∇log p‖² = 1/σ², the error of a score that is zero everywhere."""
ANGLES = 2 * math.pi * torch.arange(10, dtype=torch.float64) / 10
CENTRES = 3 * torch.stack([ANGLES.cos(), ANGLES.sin()])
"""Of the components of μ, (2, 10)."""
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "csbm": lambda x: x,
    "usbm": lambda x: torch.stack([-x[:, 1], x[:, 0]], dim=1),
}

NUM_STEPS, AVERAGED_STEPS = 300, 100
THRESHOLD = 1e-3
HALF_WIDTH, GRID_POINTS = 3.0, 20
CELL_AREA = (2 * HALF_WIDTH / (GRID_POINTS - 1)) ** 2
FINE_FACTOR = 6
FINE_POINTS = FINE_FACTOR * (GRID_POINTS - 1) + 1
"""The decomposition's grid: every sixth node is one of the 20×20 grid."""

METHODS = ("deterministic", "unadjusted", "adjusted")
LANGEVIN_STEP = 0.1 * SIGMA**2
REPETITIONS, PARTICLES = 100, 10

REFERENCE: dict[float, tuple[int, int, float, float]] = {
    0.0: (1, 1, 0.0, 0.0),
    5.0e-4: (2, 4, 1.77e-2, 4.41e-7),
    7.5e-4: (3, 5, 2.65e-2, 6.60e-7),
    1.0e-3: (3, 6, 3.53e-2, 8.78e-7),
    1.5e-3: (4, 57, 5.28e-2, 1.31e-6),
    1.75e-3: (5, 121, 6.15e-2, 1.53e-6),
    2.25e-3: (16, 238, 7.89e-2, 1.96e-6),
}
"""A run of the public code: ε → steps of csbm, steps of usbm, Asym and NAsym of usbm (those of csbm are 0). The paper
prints the last two in one another's place."""


def log_density(x: Tensor, t: Tensor | None = None) -> Tensor:
    """log p(x) in nats, (..., 2) → (...). Nothing here depends on the time."""
    return -(x**2).sum(-1) / (2 * SIGMA**2) - math.log(2 * math.pi * SIGMA**2)


def true_score(x: Tensor, t: Tensor | None = None) -> Tensor:
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

    def score(x: Tensor, t: Tensor | None = None) -> Tensor:
        p = log_density(x).exp()
        a = (2 * guarded * mixture_density(x) / (p * ((x**2).sum(1) + guarded) + 1e-8)).sqrt()
        return true_score(x) + a[:, None] * direction(x)

    return score


def trajectory(kind: str, epsilon: float) -> Tensor:
    """Positions (301, 10, 2) of the public code's particles, with its step sizes α_i = α₀ exp(−i/1000): α₀ is σ² if
    the score is exact, 1.25σ² if not."""
    x = torch.from_numpy(np.random.RandomState(0).normal(-2, 0.5, 2 * PARTICLES).reshape(PARTICLES, 2))
    first = SIGMA**2 if epsilon == 0 else 1.25 * SIGMA**2
    step_sizes = [first * math.exp(-i / 1000) for i in range(NUM_STEPS)]
    return langevin_dynamics(perturbed_score(kind, epsilon), x, x.new_zeros(len(x)), step_sizes, noise=False).x


def steps_to_criterion(positions: Tensor) -> Tensor:
    """The first i at which mean max(0, −log(p + 10⁻¹⁶)) < 0.001 before step i, the mean over the last batch dimension;
    the number of steps N if never. (N+1, ..., P, 2) → (...)."""
    p = log_density(positions[:-1]).exp()
    met = (-(p + 1e-16).log()).clamp(min=0).mean(-1) < THRESHOLD
    never = torch.full_like(met[0], fill_value=len(met), dtype=torch.long)
    return torch.where(met.any(0), met.int().argmax(0), never)


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
    return x, area.expand(-1, angular).reshape(-1) * log_density(x).exp()


def measure(kind: str, epsilon: float) -> dict[str, float]:
    """Asym and NAsym, as sums of p·value over the 20×20 grid and as expectations under p; ½E‖s − ∇log p‖²."""
    score = perturbed_score(kind, epsilon)
    x = grid().view(-1, 2)
    p = log_density(x).exp()
    on_grid = asymmetry(score, x, x.new_zeros(len(x)), estimator="exact")
    x, weights = quadrature()
    at_nodes = asymmetry(score, x, x.new_zeros(len(x)), estimator="exact")
    error = 0.5 * ((at_nodes.score - true_score(x)) ** 2).sum(1)
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
    field = perturbed_score(kind, epsilon)(x.view(-1, 2)).view_as(x)
    return helmholtz_hodge(field, 2 * HALF_WIDTH / (FINE_POINTS - 1))


def decomposition_lengths(kind: str, epsilon: float) -> dict[str, float]:
    """Root mean square lengths, over that grid, of the perturbation and of the rotational part."""
    parts = decompose(kind, epsilon)
    perturbation = parts.gradient + parts.rotational - true_score(grid(FINE_POINTS))
    fields = {"perturbation_rms": perturbation, "rotational_rms": parts.rotational}
    return {name: (field**2).sum(-1).mean().sqrt().item() for name, field in fields.items()}


def with_small_steps(kind: str, method: str, epsilon: float) -> dict[str, object]:
    """The same experiment at a constant step size of σ²/10, with random starts and, but for one method, with noise.

    The steps of ``trajectory`` are too large for noise: at α = σ² unadjusted Langevin doubles the variance. Here it
    adds 5.3 %. ``adjusted`` accepts or refuses moves by the true p (the USBM has no density): the score only proposes.
    CSBM and USBM share starts and noise.
    """
    start = torch.Generator().manual_seed(seed_from(EXPERIMENT, "start", repr(epsilon)))
    noise = torch.Generator().manual_seed(seed_from(EXPERIMENT, "noise", method, repr(epsilon)))
    x = -2 + 0.5 * normal_like(torch.empty(REPETITIONS * PARTICLES, 2, dtype=torch.float64), start)
    states, accepted = langevin_dynamics(
        perturbed_score(kind, epsilon),
        x,
        x.new_zeros(len(x)),
        [LANGEVIN_STEP] * NUM_STEPS,
        noise=method != "deterministic",
        log_density=log_density if method == "adjusted" else None,
        generator=noise,
    )
    steps = steps_to_criterion(states.view(-1, REPETITIONS, PARTICLES, 2)).double()
    late_nll = -log_density(states[-AVERAGED_STEPS:]).view(-1, REPETITIONS, PARTICLES).mean((0, 2))
    return {
        "type": kind,
        "method": method,
        "epsilon": epsilon,
        "steps": steps.mean().item(),
        "steps_se": (steps.std() / math.sqrt(REPETITIONS)).item(),
        "not_reached": int((steps == NUM_STEPS).sum()),
        "nll": late_nll.mean().item(),
        "nll_se": (late_nll.std() / math.sqrt(REPETITIONS)).item(),
        "acceptance": accepted.double().mean().item(),
        "late_acceptance": accepted[-AVERAGED_STEPS:].double().mean().item(),
    }


def draw_trajectories(epsilons: Sequence[float]) -> Figure:
    """The score on the grid, and the trajectories up to the criterion."""
    figure = new_figure(1.6 * len(epsilons) + 1.0, 3.8, layout="compressed")
    panels = figure.subplots(2, len(epsilons), squeeze=False)
    x = grid().view(-1, 2)
    for (kind, epsilon), axes in zip(itertools.product(DIRECTIONS, epsilons), panels.flat, strict=True):
        arrows = _draw_field(axes, perturbed_score(kind, epsilon)(x), LogNorm(10, 500))
        positions = trajectory(kind, epsilon)
        for path in positions[: steps_to_criterion(positions).item() + 1].unbind(1):
            axes.plot(*path.T, "x-", color="black", linewidth=0.6, markersize=2.5, markeredgewidth=0.6)
        axes.set_title(f"{kind.upper()}, ε = {epsilon:g}")
    figure.colorbar(arrows, ax=panels, shrink=0.8, pad=0.015, label="length of the score ‖s‖ (units of $x^{-1}$)")
    return figure


def draw_decomposition(epsilon: float) -> Figure:
    """Score, gradient part and rotational part."""
    figure = new_figure(6.5, 4.3, layout="compressed")
    panels = figure.subplots(2, 3)
    for kind, row in zip(DIRECTIONS, panels, strict=True):
        _, gradient, rotational = decompose(kind, epsilon)
        fields = {"score": gradient + rotational, "gradient part": gradient, "rotational part": rotational}
        for (name, field), axes in zip(fields.items(), row, strict=True):
            arrows = _draw_field(axes, field[::FINE_FACTOR, ::FINE_FACTOR].reshape(-1, 2), LogNorm(1e-1, 500))
            axes.set_title(f"{kind.upper()}: {name}")
    figure.colorbar(arrows, ax=panels, shrink=0.8, pad=0.015, label=f"length, ε = {epsilon:g}", extend="min")
    return figure


def _draw_field(axes: Axes, field: Tensor, norm: LogNorm) -> Quiver:
    """Arrows of one length on the 20×20 grid, coloured by the field's; none where it is below the scale."""
    plane(axes, 1.1 * HALF_WIDTH)
    length = field.norm(dim=1).clamp(min=1e-300)
    colours = {"norm": norm, "cmap": matplotlib.colormaps["Blues"].with_extremes(under="none")}
    arrows = (*grid().view(-1, 2).T, *(field / length[:, None]).T, length)
    return axes.quiver(*arrows, **colours, pivot="mid", units="xy", scale=3.5, width=0.04)


def tables(rows: Sequence[Mapping], small_steps: Sequence[Mapping]) -> str:
    """The paper's two tables, that of the errors, and that of the small steps, in Markdown."""
    steps, asymmetries, errors = [], [], []
    for c, u in zip(rows[::2], rows[1::2], strict=True):
        epsilon, known = f"{c['epsilon']:g}", REFERENCE.get(c["epsilon"])
        csbm, usbm, asym, nasym = (*known[:2], *(f"{value:.2e}" for value in known[2:])) if known else "––––"
        steps.append((epsilon, c["steps"], csbm, u["steps"], usbm))
        sums, means = ([f"{u[name + of]:.3e}" for name in ("asym", "nasym")] for of in ("", "_expectation"))
        asymmetries.append((epsilon, sums[0], asym, sums[1], nasym, *means, f"{c['asym']:.0e}", f"{c['nasym']:.0e}"))
        lengths = (u["perturbation_rms"], c["rotational_rms"], u["rotational_rms"])
        errors.append((epsilon, f"{u['score_error']:.3e}", *(f"{length:.3g}" for length in lengths)))
    stochastic = []
    for row in sorted(small_steps, key=lambda row: (row["epsilon"], row["type"])):
        cells = (with_error(row["steps"], row["steps_se"]), row["not_reached"], f"{row['acceptance']:.3f}")
        nll = with_error(row["nll"] - ENTROPY, row["nll_se"])
        stochastic.append((f"{row['epsilon']:g}", row["type"].upper(), row["method"], *cells, nll))

    header = ("ε", "Asym", "reference", "NAsym", "reference", "E Asym", "E NAsym", "CSBM: Asym", "NAsym")
    return f"""Reference: the public code's numbers. Its published table has the columns Asym and NAsym interchanged.

Steps of deterministic Langevin dynamics until mean max(0, −log p) < {THRESHOLD}:

{markdown_table(("ε", "CSBM", "reference", "USBM", "reference"), steps)}
Asymmetry of the USBM, and at the end of the CSBM. Asym, NAsym: the sum of p·value over the {GRID_POINTS}×{GRID_POINTS}
grid, as in the reference (times {CELL_AREA:.4f}, the area of a cell, a coarse integral). E Asym, E NAsym: the
expectation under p, by quadrature.

{markdown_table(header, asymmetries)}
Error ½E‖s − ∇log p‖² of either score; and on [−3, 3]², not weighted by p, root mean square lengths of s − ∇log p and of
the rotational part of s (Helmholtz–Hodge).

{markdown_table(("ε", "score error", "perturbation", "CSBM: rotational part", "USBM: rotational part"), errors)}
Constant step size σ²/10, {REPETITIONS} repetitions of {PARTICLES} particles; mean ± standard error. Missed: repetitions
that have not reached the criterion; they count as {NUM_STEPS} steps. NLL: under p, of the last {AVERAGED_STEPS} steps.

{markdown_table(("ε", "type", "method", "steps", "missed", "accepted", "NLL − entropy (nats)"), stochastic)}"""


def run(workdir: str | Path, *, epsilons: Sequence[float] = tuple(REFERENCE)) -> str:
    """Measure both scores at every ε; write results, table and figures to ``workdir``; return the tables.

    Args:
        workdir: W, a folder.
        epsilons: errors of the score, numbers from 0 to 100.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    if not epsilons or not all(0 <= epsilon <= LARGEST_EPSILON for epsilon in epsilons):
        given = ",".join(map(str, epsilons))
        raise ValueError(f"--epsilons={given}: allowed are numbers from 0 to {LARGEST_EPSILON:.0f}, at least one")
    epsilons = sorted(set(epsilons))
    folder = claim(workdir, EXPERIMENT, {"epsilons": epsilons})

    rows = [
        {"type": kind, "epsilon": epsilon, "steps": steps_to_criterion(trajectory(kind, epsilon)).item()}
        | measure(kind, epsilon)
        | decomposition_lengths(kind, epsilon)
        for epsilon, kind in itertools.product(epsilons, DIRECTIONS)
    ]
    small_steps = [with_small_steps(*key) for key in itertools.product(DIRECTIONS, METHODS, epsilons)]
    stochastic = {"step_size": LANGEVIN_STEP, "repetitions": REPETITIONS, "rows": small_steps}
    results = {"experiment": EXPERIMENT, "entropy_nats": ENTROPY, "rows": rows, "stochastic": stochastic}
    figures = {"trajectories": draw_trajectories(epsilons[:4]), "helmholtz_hodge": draw_decomposition(epsilons[-1])}
    return write_results(folder, results, tables(rows, small_steps), figures)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    command(run)
