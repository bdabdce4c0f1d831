"""What the figures share: settings, claims, results on disk, the mixtures, training of a small score model.

A figure is a frozen object whose fields are its settings. It computes numbers and arrays, which are kept in
W/runs/NAME/, and makes a table and a picture of them. What must hold is a list of claims, each a number and its bound.
"""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from exact.distributions import GaussianMixture
from experiment.files import write_atomically
from experiment.randomness import seed_from
from models.mlp import TimeConditionalMLP
from models.score import NoiseLevel, UnconstrainedScore
from sde_lib import SDE, VE, VP, GeometricSigma, LinearBeta, ScoreFunction, SubVP
from training import fit

__all__ = [
    "EXPERIMENT",
    "SDES",
    "VERSION",
    "Claim",
    "Result",
    "TutorialFigure",
    "Update",
    "constant",
    "generator",
    "markdown_table",
    "new_figure",
    "plane",
    "plane_grid",
    "read_result",
    "reporting",
    "score_model",
    "three_modes",
    "train",
    "two_modes",
    "write_result",
]

EXPERIMENT = "tutorial_example"
VERSION = 1
"""Part of what a workdir is known by: to be raised when a fix changes what a figure computes."""

SDES: dict[str, SDE] = {
    "VE": VE(GeometricSigma(0.01, 10.0)),
    "VP": VP(LinearBeta(0.1, 20.0)),
    "sub-VP": SubVP(LinearBeta(0.1, 20.0)),
}
"""For data of size 1. With N = 1000 steps the β of VP's ladder run from 1e-4 to 0.02."""

Update = Callable[[int], object]
"""Called with the number of steps just done."""


class Claim(NamedTuple):
    """Something that must hold: in words, the number measured, '<=' or '>=', and the bound."""

    text: str
    measured: float
    relation: str
    bound: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound if self.relation == "<=" else self.measured >= self.bound


class Result(NamedTuple):
    """What a figure computed: numbers (JSON), claims, and the arrays that its picture shows."""

    numbers: dict
    claims: list[Claim]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class TutorialFigure(abc.ABC):
    """One figure and its table; the fields of a subclass are its settings."""

    name: ClassVar[str]
    title: ClassVar[str]
    own_progress: ClassVar[bool] = False
    """Trained by ``run_lib``, which has a progress bar of its own."""

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """How many steps ``compute`` reports: of training, and evaluations of a score while sampling."""

    @abc.abstractmethod
    def compute(self, folder: Path, update: Update) -> Result:
        """Everything that takes time. Training goes on from the checkpoints in ``folder``."""

    @abc.abstractmethod
    def table(self, numbers: Mapping) -> str:
        """Markdown, without heading and claims."""

    @abc.abstractmethod
    def draw(self, result: Result) -> Figure:
        """The picture."""


# ------------------------------------------------------------------------------------------------------ results on disk


def write_result(folder: Path, figure: TutorialFigure, result: Result) -> None:
    """Keep a result in ``folder``; result.json comes last and says that it is complete."""
    write_atomically(folder / "arrays.npz", lambda file: np.savez_compressed(file, **result.arrays))
    record = {
        "settings": asdict(figure),
        "numbers": result.numbers,
        "claims": [claim._asdict() for claim in result.claims],
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "result.json", lambda file: file.write(text.encode()))


def read_result(folder: Path, figure: TutorialFigure) -> Result | None:
    """A result that was kept; None if it is missing, damaged, or of other settings."""
    try:
        record = json.loads((folder / "result.json").read_bytes())
        if record["settings"] != json.loads(json.dumps(asdict(figure))):
            return None
        claims = [Claim(**claim) for claim in record["claims"]]
        with open(folder / "arrays.npz", "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return Result(record["numbers"], claims, {name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, LookupError, TypeError, BadZipFile):
        return None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


# ---------------------------------------------------------------------------------------------------------- densities


def three_modes(sde: SDE) -> GaussianMixture:
    """Three overlapping components of different shapes, weights 0.5, 0.3, 0.2."""
    means = torch.tensor([[1.2, -0.5], [-1.3, -0.6], [0.0, 1.3]])
    covariances = torch.tensor(
        [[[0.20, 0.10], [0.10, 0.25]], [[0.25, -0.08], [-0.08, 0.12]], [[0.30, 0.00], [0.00, 0.10]]]
    )
    return GaussianMixture(sde, torch.tensor([0.5, 0.3, 0.2]), means, covariances)


def two_modes(sde: SDE) -> GaussianMixture:
    """0.2 N((−5, −5), I) + 0.8 N((5, 5), I): modes fourteen standard deviations apart."""
    means = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
    return GaussianMixture(sde, torch.tensor([0.2, 0.8]), means, torch.eye(2).expand(2, 2, 2))


def constant(x: Tensor, t: float) -> Tensor:
    """The time t for every row of x, (B,), in the type of x."""
    return x.new_full((len(x),), t)


def generator(*purpose: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(EXPERIMENT, *purpose))


# ------------------------------------------------------------------------------------------------------------ learning


def score_model(
    sde: SDE, *purpose: int | str, num_scales: int | None = None, input_scale: float = 1.0
) -> UnconstrainedScore:
    """A small network that predicts the noise, as a score; its initial weights are keyed by ``purpose``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(EXPERIMENT, "weights", *purpose))
        network = TimeConditionalMLP(2, input_scale=input_scale)
    return UnconstrainedScore(network, NoiseLevel(sde, num_scales))


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    folder: Path,
    update: Update,
    *,
    n_iters: int,
    learning_rate: float = 3e-3,
    observe: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Minimise ``loss``, a function of the step, by Adam; the rate falls to 0 along a cosine.

    Killed and called again, it goes on from the last checkpoint to the very same weights.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def terms(step: int) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / n_iters))
        return {"loss": loss(step)}

    fit(
        model,
        terms,
        optimizer,
        folder,
        n_iters=n_iters,
        grad_clip=10.0,
        log_freq=max(1, n_iters // 30),
        save_freq=max(1, n_iters // 3),
        observe=observe,
        update=update,
    )
    model.requires_grad_(False)


def reporting(score: ScoreFunction, update: Update) -> ScoreFunction:
    """The same score, which reports every evaluation of a batch as one step."""

    def reported(x: Tensor, t: Tensor) -> Tensor:
        update(1)
        return score(x, t)

    return reported


# ------------------------------------------------------------------------------------------------------------ pictures


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plane_grid(half_width: float, count: int) -> Tensor:
    """The points (count², 2) of a grid on [−w, w]², x₁ running fastest, float64."""
    axis = torch.linspace(-half_width, half_width, count, dtype=torch.float64)
    x2, x1 = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x1.flatten(), x2.flatten()], dim=1)


def plane(axes: Axes, half_width: float, title: str = "") -> None:
    """A square of the plane with few ticks."""
    tick = float(f"{0.7 * half_width:.1g}")
    axes.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal", title=title)
    axes.set(xticks=(-tick, 0, tick), yticks=(-tick, 0, tick), xlabel="$x_1$", ylabel="$x_2$")
    axes.label_outer()
