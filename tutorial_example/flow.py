"""The probability-flow ODE: trajectories, likelihood against the exact density, interpolation between latents."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from likelihood import LIKELIHOOD_EPS, LikelihoodEvaluator
from losses import Objective
from models.score import ScoreModel
from ode import integrate
from sde_lib import SDE, ScoreFunction

from .tutorial_figure import (
    SDES,
    Claim,
    Result,
    TutorialFigure,
    Update,
    constant,
    generator,
    markdown_table,
    new_figure,
    plane,
    plane_grid,
    score_model,
    three_modes,
    train,
)

__all__ = ["ProbabilityFlow", "follow_flow", "interpolate_latents"]

RARE = 0.01


@torch.no_grad()
def follow_flow(
    sde: SDE, score: ScoreFunction, x: Tensor, start: float, end: float, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Where the probability-flow ODE takes x (B, ...) from one time to another, either way."""
    flow = sde.reverse(score, probability_flow=True)

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return flow.drift(y.to(x.dtype).view(-1, *x.shape[1:]), t.to(x.dtype)).flatten(1).double()

    return integrate(velocity, x.flatten(1).double(), start, end, rtol=rtol, atol=atol).to(x.dtype).view_as(x)


def interpolate_latents(a: Tensor, b: Tensor, count: int) -> Tensor:
    """a cos φ + b sin φ (count, B, ...) with φ from 0 to 90°, from a to b, both (B, ...).

    If a and b are independent draws of N(0, I), so is every point between them; those of a straight line are too short.
    """
    angle = torch.linspace(0, math.pi / 2, count, dtype=a.dtype).view(-1, *(1 for _ in a.shape))
    return a * angle.cos() + b * angle.sin()


@dataclass(frozen=True)
class ProbabilityFlow(TutorialFigure):
    """The ODE of VP with the true score and with a learned one.

    Args:
        n_iters, batch_size: of the network.
        points: at which likelihoods are compared with the density.
        probes: of Skilling and Hutchinson, one evaluation each, averaged.
        pairs: of data that are interpolated, at ``between`` points.
        tolerance: of the solver where it goes there and back.
    """

    n_iters: int = 4000
    batch_size: int = 512
    points: int = 1000
    probes: tuple[int, ...] = (1, 8)
    pairs: int = 400
    between: int = 21
    tolerance: float = 1e-8

    name = "probability_flow"
    title = "Probability-flow ODE: trajectories, likelihood, interpolation"

    @property
    def steps(self) -> int:
        return self.n_iters + 2 * (1 + sum(self.probes)) + 2

    def compute(self, folder: Path, update: Update) -> Result:
        sde = SDES["VP"]
        mixture = three_modes(sde)
        model = score_model(sde, self.name)
        objective = Objective(model)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", step)
            return objective(mixture.sample(self.batch_size, source).float(), source)["loss"]

        train(model, loss, folder / "score", update, n_iters=self.n_iters)
        x = mixture.sample(self.points, generator(self.name, "points"))
        exact = mixture.log_prob(x, constant(x, LIKELIHOOD_EPS))
        rows, interpolated, arrays = [], [], {"exact": exact.numpy()}
        for kind, score, points in (("true", mixture.score, x), ("learned", model, x.float())):
            rows += self.likelihoods(kind, sde, score, points, exact, arrays, update)
            there_and_back = self.round_trip(sde, score if kind == "true" else in_double(model), x[:100])
            interpolated.append({**self.interpolate(kind, sde, score, points, arrays), "round_trip": there_and_back})
            arrays |= self.trajectories(kind, sde, score, points.dtype)
            update(1)
        return Result({"likelihood": rows, "interpolation": interpolated}, self.claims(rows, interpolated), arrays)

    def likelihoods(
        self,
        kind: str,
        sde: SDE,
        score: ScoreFunction | ScoreModel,
        x: Tensor,
        exact: Tensor,
        arrays: dict[str, np.ndarray],
        update: Update,
    ) -> list[dict]:
        """log p by the exact trace, and by the estimated one with several numbers of probes."""
        rows = []
        for divergence, probes in (("exact", 1), *(("rademacher", count) for count in self.probes)):
            evaluator = LikelihoodEvaluator(sde, divergence=divergence, rtol=1e-5, atol=1e-5)
            values, nfe = [], 0.0
            for probe in range(probes):
                result = evaluator(score, x, generator(self.name, "probe", probe))
                values.append(result.log_prob.double())
                nfe += result.nfe
                update(1)
            log_prob = torch.stack(values).mean(0)
            error = log_prob - exact
            rows.append(
                {
                    "score": kind,
                    "trace": divergence,
                    "probes": probes,
                    "mean_absolute_error": float(error.abs().mean()),
                    "mean_error": float(error.mean()),
                    "mean_error_se": float(error.std()) / math.sqrt(len(error)),
                    "nfe": nfe,
                }
            )
            if probes == 1:
                arrays[f"{kind}, {divergence}"] = log_prob.numpy()
        return rows

    def round_trip(self, sde: SDE, score: ScoreFunction, x: Tensor) -> float:
        """The largest error of data that were followed to their latents and back."""
        settings = dict(rtol=self.tolerance, atol=self.tolerance)
        latent = follow_flow(sde, score, x, LIKELIHOOD_EPS, sde.end_time, **settings)
        back = follow_flow(sde, score, latent, sde.end_time, LIKELIHOOD_EPS, **settings)
        return float((back - x).abs().max())

    def interpolate(
        self, kind: str, sde: SDE, score: ScoreFunction, x: Tensor, arrays: dict[str, np.ndarray]
    ) -> dict[str, float | str]:
        """How often what lies between pairs of data, or between their latents, is rare."""
        mixture, eps = three_modes(sde), LIKELIHOOD_EPS
        a, b = x[: self.pairs], x[self.pairs : 2 * self.pairs]
        latent_a, latent_b = (follow_flow(sde, score, end, eps, sde.end_time) for end in (a, b))
        latents = interpolate_latents(latent_a, latent_b, self.between)
        decoded = follow_flow(sde, score, latents.flatten(0, 1), sde.end_time, eps).view_as(latents)
        share = torch.linspace(0, 1, self.between, dtype=x.dtype)[:, None, None]
        straight = torch.lerp(a, b, share)
        data = mixture.sample(100_000, generator(self.name, "rare"))
        threshold = mixture.log_prob(data, constant(data, eps)).quantile(RARE)

        def rare(points: Tensor) -> Tensor:
            """Of every pair, the share of what lies between that is rarer than 99 % of the data."""
            flat = points[1:-1].flatten(0, 1)
            below = mixture.log_prob(flat, constant(flat, eps)) < threshold
            return below.double().view(self.between - 2, -1).mean(0)

        between_latents, between_data = rare(decoded), rare(straight)
        difference = between_data - between_latents
        far = (a - b).norm(dim=1).argsort(descending=True)[:4]
        arrays[f"{kind}, decoded"] = decoded[:, far].numpy()
        return {
            "score": kind,
            "rare_between_latents": float(between_latents.mean()),
            "rare_between_latents_se": _standard_error(between_latents),
            "rare_between_data": float(between_data.mean()),
            "rare_between_data_se": _standard_error(between_data),
            "difference": float(difference.mean()),
            "difference_se": _standard_error(difference),
        }

    def trajectories(self, kind: str, sde: SDE, score: ScoreFunction, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """From draws of the prior to the data."""
        x = sde.prior_sample(torch.empty(40, 2, dtype=torch.float64), generator(self.name, "latents")).to(dtype)
        times = torch.linspace(sde.end_time, LIKELIHOOD_EPS, 61, dtype=torch.float64).tolist()
        path = [x]
        for t, s in itertools.pairwise(times):
            path.append(follow_flow(sde, score, path[-1], t, s, rtol=1e-4, atol=1e-4))
        return {f"{kind}, path": torch.stack(path).numpy(), "times": np.array(times)}

    def claims(self, rows: list[dict], interpolated: list[dict]) -> list[Claim]:
        claims = []
        for row in rows:
            how = f"{row['score']} score, {row['trace']} trace"
            if row["trace"] == "exact":
                bound = 0.002 if row["score"] == "true" else 0.1
                text = f"{how}: mean absolute error of log p (nats)"
                claims.append(Claim(text, row["mean_absolute_error"], "<=", bound))
        for kind in ("true", "learned"):
            exact, *estimated = (row for row in rows if row["score"] == kind)
            for row in estimated:
                deviation = abs(row["mean_error"] - exact["mean_error"]) / row["mean_error_se"]
                text = f"{kind} score, {row['probes']} probe{'s' if row['probes'] > 1 else ''}: bias in standard errors"
                claims.append(Claim(text, deviation, "<=", 4.0))
        for row in interpolated:
            claims.append(Claim(f"{row['score']} score: there and back", row["round_trip"], "<=", 1e-4))
            # Four standard errors each, here those of one point per pair: points of a pair are rare together.
            share, bound = abs(row["rare_between_latents"] - RARE), 4 * math.sqrt(RARE * (1 - RARE) / self.pairs)
            text = f"{row['score']} score: share of rare points between latents, from 1 %"
            claims.append(Claim(text, share, "<=", bound))
            text = f"{row['score']} score: how much larger the share between data is"
            claims.append(Claim(text, row["difference"], ">=", 4 * row["difference_se"]))
        return claims

    def table(self, numbers: Mapping) -> str:
        header = ("score", "trace", "probes", "mean absolute error (nats)", "mean error", "NFE")
        rows = [
            (
                row["score"],
                row["trace"],
                row["probes"] if row["trace"] != "exact" else "",
                f"{row['mean_absolute_error']:.5f}",
                f"{row['mean_error']:+.5f} ± {row['mean_error_se']:.5f}",
                f"{row['nfe']:.0f}",
            )
            for row in numbers["likelihood"]
        ]
        between = [
            (
                row["score"],
                f"{row['round_trip']:.1e}",
                f"{100 * row['rare_between_latents']:.1f} ± {100 * row['rare_between_latents_se']:.1f} %",
                f"{100 * row['rare_between_data']:.1f} ± {100 * row['rare_between_data_se']:.1f} %",
            )
            for row in numbers["interpolation"]
        ]
        between_header = ("score", "there and back, largest error", "rare between latents", "between data")
        return (
            f"log p at {self.points} points, by the ODE (rtol = atol = 1e-5) against the mixture's density:\n\n"
            + markdown_table(header, rows)
            + f"\nInterpolation between {self.pairs} pairs; rare: of lower density than 99 % of the data, so that "
            "1 % is right:\n\n" + markdown_table(between_header, between)
        )

    def draw(self, result: Result) -> Figure:
        arrays, width, sde = result.arrays, 2.8, SDES["VP"]
        fine = plane_grid(width, 101)
        density = three_modes(sde).log_prob(fine, constant(fine, LIKELIHOOD_EPS)).exp().view(101, 101).numpy()
        extent = (-width, width, -width, width)
        figure = new_figure(8.4, 5.2)
        axes = figure.subplots(2, 3)
        for row, kind in zip(axes, ("true", "learned"), strict=True):
            for ax in row[:2]:
                ax.imshow(density, origin="lower", extent=extent, cmap="Greys", vmax=1.3 * density.max())
            for path in arrays[f"{kind}, path"].transpose(1, 0, 2):
                row[0].plot(*path.T, color="tab:blue", linewidth=0.6)
                row[0].plot(*path[0], "o", color="tab:blue", markersize=1.5)
                row[0].plot(*path[-1], "x", color="tab:red", markersize=3)
            plane(row[0], width, f"from latents (•) to data (×), {kind} score")
            for line in arrays[f"{kind}, decoded"].transpose(1, 0, 2):
                row[1].plot(*line.T, ".-", markersize=3, linewidth=0.6)
            plane(row[1], width, "decoded interpolations")
            exact = arrays["exact"]
            for trace, label, colour in (("rademacher", "one probe", "0.7"), ("exact", "exact trace", "tab:red")):
                row[2].plot(exact, arrays[f"{kind}, {trace}"] - exact, ".", markersize=2, color=colour, label=label)
            row[2].set(xlabel="exact log p (nats)", title="log p by the ODE − exact (nats)", ylim=(-1.5, 1.5))
            row[2].legend(fontsize=7)
        return figure


def in_double(model: ScoreModel) -> ScoreModel:
    """A copy in double precision."""
    return copy.deepcopy(model).double()


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
