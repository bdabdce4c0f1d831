"""What the figures share: the form of a result, densities that are known, the training of a small network."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from exact.distributions import GaussianMixture
from experiment.figures import draw_map, plane, plane_grid
from experiment.jobs import Update
from experiment.randomness import Generator, normal_like, seed_from
from experiment.runtime import Runtime
from losses import Objective
from models.mlp import TimeConditionalMLP
from models.score import NoiseLevel, ScoreModel, UnconstrainedScore
from sde_lib import SDE, VE, VP, GeometricSigma, LinearBeta, SubVP, expand
from training import fit

Loss = Callable[[int], Tensor]

EXPERIMENT = "tutorial_example"
SDES = {
    "VE": VE(GeometricSigma(0.01, 10.0)),
    "VP": VP(LinearBeta(0.1, 20.0)),
    "sub-VP": SubVP(LinearBeta(0.1, 20.0)),
}
"""For data of size 1. With N = 1000 steps the β of VP's ladder run from 1e-4 to 0.02."""


class Result(NamedTuple):
    """Of a figure: numbers (JSON), what must hold, as {text: (measured, '<=' or '>=', bound)}, and the picture."""

    numbers: dict
    claims: dict[str, tuple[float, str, float]]
    picture: Figure


def three_modes(sde: SDE) -> GaussianMixture:
    """Three overlapping components of different shapes, weights 0.5, 0.3, 0.2."""
    means = torch.tensor([[1.2, -0.5], [-1.3, -0.6], [0.0, 1.3]])
    first, second, third = [[0.20, 0.10], [0.10, 0.25]], [[0.25, -0.08], [-0.08, 0.12]], [[0.30, 0.0], [0.0, 0.10]]
    return GaussianMixture(sde, torch.tensor([0.5, 0.3, 0.2]), means, torch.tensor([first, second, third]))


def two_modes(sde: SDE) -> GaussianMixture:
    """0.2 N((−5, −5), I) + 0.8 N((5, 5), I): modes fourteen standard deviations apart."""
    means = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
    return GaussianMixture(sde, torch.tensor([0.2, 0.8]), means, torch.eye(2).expand(2, 2, 2))


def constant(x: Tensor, t: float) -> Tensor:
    """The time t for every row of x, (B,), in the type of x."""
    return x.new_full((len(x),), t)


def noised(sde: SDE, x0: Tensor, t: Tensor, source: Generator) -> Tensor:
    """x_t = α x_0 + σ z of data (B, 2) at times (B,)."""
    mean, std = sde.marginal(x0, t)
    return mean + expand(std, x0) * normal_like(x0, source)


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def generator(*purpose: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(EXPERIMENT, *purpose))


def network(*purpose: int | str, **options: float) -> TimeConditionalMLP:
    """For points of the plane; its first weights are keyed by ``purpose``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(EXPERIMENT, "weights", *purpose))
        return TimeConditionalMLP(2, **options)


def score_model(sde: SDE, *purpose: int | str, num_scales: int | None = None, **options: float) -> UnconstrainedScore:
    """A network that predicts the noise, as a score."""
    return UnconstrainedScore(network(*purpose, **options), NoiseLevel(sde, num_scales))


def train(model: nn.Module, loss: Loss, folder: Path, update: Update, n_iters: int) -> None:
    """Minimise ``loss``, a function of the step, by Adam; the rate falls from 0.003 to 0 along a cosine."""
    fit(
        model,
        torch.optim.Adam(model.parameters(), fused=True),
        lambda module, step, positions: {"loss": loss(step)},
        folder,
        n_iters=n_iters,
        learning_rate=lambda step: 3e-3 * 0.5 * (1 + math.cos(math.pi * step / n_iters)),
        grad_clip=10.0,
        log_freq=max(1, n_iters // 30),
        save_freq=max(1, n_iters // 3),
        runtime=Runtime("cpu", on_progress=update),
    )
    model.requires_grad_(False)


def denoising_loss(model: ScoreModel, mixture: GaussianMixture, *purpose: int | str) -> Loss:
    """Denoising score matching at all times, on 512 new draws of ``mixture`` at every step."""
    objective = Objective(model)

    def loss(step: int) -> Tensor:
        source = generator(*purpose, step)
        return objective(mixture.sample(512, source).float(), source)["loss"]

    return loss


def plane_integral(mixture: GaussianMixture, t: float, values: Callable[[Tensor, Tensor], Tensor]) -> float:
    """E[values(x, t)] under p_t by the trapezoidal rule on a grid, at whose border the densities here vanish."""
    half_width, count = 6.0, 481
    x = plane_grid(half_width, count)
    density = mixture.log_prob(x, constant(x, t)).exp()
    return float((density * values(x, constant(x, t))).sum()) * (2 * half_width / (count - 1)) ** 2


def draw_density(axes: Axes, mixture: GaussianMixture, t: float, half_width: float, title: str = "") -> None:
    grid = plane_grid(half_width, 101)
    density = mixture.log_prob(grid, constant(grid, t)).exp()
    draw_map(axes, density, half_width, title, cmap="Greys", vmax=1.3 * float(density.max()))


def draw_points(axes: Axes, x: Tensor, half_width: float, title: str = "") -> None:
    axes.scatter(*x.T, s=1, color="black", linewidths=0)
    plane(axes, half_width, title)
