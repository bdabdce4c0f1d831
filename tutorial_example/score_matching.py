"""Score matching: four losses against the closed-form score, and what is learned where data are scarce."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from exact.distributions import GaussianMixture
from experiment.randomness import normal_like
from losses import (
    denoising_score_matching,
    explicit_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)
from sde_lib import SDE, VE, GeometricSigma, ScoreFunction, expand

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
    two_modes,
)

__all__ = ["ScarceData", "ScoreMatching"]


class Batch(NamedTuple):
    """Data x_0, their noised version x, both (B, 2), times t (B,); the generators of that noise and of directions."""

    x0: Tensor
    x: Tensor
    t: Tensor
    noise: torch.Generator
    directions: torch.Generator


def draw_batch(mixture: GaussianMixture, t: float, count: int, *purpose: int | str) -> Batch:
    """Single precision, everything keyed by ``purpose``."""
    x0 = mixture.sample(count, generator("data", *purpose)).float()
    times = constant(x0, t)
    mean, std = mixture.sde.marginal(x0, times)
    x = mean + expand(std, x0) * normal_like(x0, generator("noise", *purpose))
    return Batch(x0, x, times, generator("noise", *purpose), generator("directions", *purpose))


LOSSES: dict[str, Callable[[ScoreFunction, GaussianMixture, Batch], Tensor]] = {
    "explicit": lambda score, mixture, b: explicit_score_matching(score, mixture.score, b.x, b.t),
    "implicit": lambda score, mixture, b: implicit_score_matching(score, b.x, b.t),
    "sliced": lambda score, mixture, b: sliced_score_matching(
        score, b.x, b.t, variance_reduction=False, generator=b.directions
    ),
    "sliced, variance reduction": lambda score, mixture, b: sliced_score_matching(
        score, b.x, b.t, generator=b.directions
    ),
    # Draws the noise that is in b.x once more.
    "denoising": lambda score, mixture, b: denoising_score_matching(score, mixture.sde, b.x0, b.t, b.noise),
}
"""(B,) of one batch, all at the same points."""


def fisher_information(mixture: GaussianMixture, t: float, half_width: float = 6.0, count: int = 481) -> float:
    """E‖∇log p_t‖² by the trapezoidal rule on a grid, for densities that vanish at its border."""
    x = plane_grid(half_width, count)
    times = constant(x, t)
    density = mixture.log_prob(x, times).exp()
    spacing = 2 * half_width / (count - 1)
    return float((density * (mixture.score(x, times) ** 2).sum(1)).sum()) * spacing**2


@dataclass(frozen=True)
class ScoreMatching(TutorialFigure):
    """Explicit, implicit, sliced and denoising score matching of one noised density.

    Args:
        std: σ of the noise.
        n_iters, batch_size: of every model.
        seeds: of weights, data and noise; the losses of one seed share all three.
        test_points: fresh points on which errors and losses are measured.
        largest_relative_error: allowed of ½E‖s − s*‖²/½E‖s*‖².
    """

    std: float = 0.3
    n_iters: int = 1000
    batch_size: int = 512
    seeds: int = 3
    test_points: int = 50_000
    largest_relative_error: float = 0.02

    name = "score_matching"
    title = "Score matching: four losses, one score"

    @property
    def steps(self) -> int:
        return len(LOSSES) * self.seeds * self.n_iters

    def density(self) -> tuple[GaussianMixture, float]:
        """The mixture and the time at which it is looked at."""
        sde = SDES["VE"]
        return three_modes(sde), float(sde.time_at_std(torch.tensor(self.std, dtype=torch.float64)))

    def compute(self, folder: Path, update: Update) -> Result:
        mixture, t = self.density()
        fisher = fisher_information(mixture, t)
        constants = dict.fromkeys(LOSSES, -0.5 * fisher)
        constants |= {"explicit": 0.0, "denoising": -0.5 * fisher + 2 / (2 * self.std**2)}
        grid = plane_grid(2.6, 81)
        true = mixture.score(grid, constant(grid, t))
        rows, arrays = [], {"density": mixture.log_prob(grid, constant(grid, t)).exp().numpy(), "true": true.numpy()}
        for name in LOSSES:
            errors, curves = [], []
            for seed in range(self.seeds):
                run = folder / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"
                model, curve = self.fit_score(name, mixture, t, seed, run, update)
                test = draw_batch(mixture, t, self.test_points, "test")
                error = explicit_score_matching(model, mixture.score, test.x, test.t)
                errors.append(float(error.mean()) / (0.5 * fisher))
                curves.append(curve)
                if seed == 0:
                    loss = LOSSES[name](model, mixture, test).detach()
                    # The same points, so that what the losses have in common drops out of the difference.
                    difference = (loss - error).double()
                    value = model(grid.float(), constant(grid.float(), t)).double()
                    arrays[f"error of {name}"] = (value - true).norm(dim=1).numpy()
            arrays[f"curve of {name}"] = np.array(curves)[:, :, 1] / (0.5 * fisher)
            arrays["steps"] = np.array(curves)[0, :, 0]
            rows.append(
                {
                    "loss": name,
                    "relative_error": float(np.mean(errors)),
                    "relative_error_se": _standard_error(errors),
                    "loss_minus_explicit": float(difference.mean()),
                    "loss_minus_explicit_se": float(difference.std()) / math.sqrt(len(difference)),
                    "constant": constants[name],
                }
            )
        claims = [
            Claim(f"{row['loss']}: error of the score", row["relative_error"], "<=", self.largest_relative_error)
            for row in rows
        ]
        for row in rows[1:]:
            deviation = abs(row["loss_minus_explicit"] - row["constant"]) / row["loss_minus_explicit_se"]
            claims.append(
                Claim(f"{row['loss']} minus explicit loss, from its constant, in standard errors", deviation, "<=", 4.0)
            )
        return Result({"fisher_information": fisher, "rows": rows}, claims, arrays)

    def fit_score(
        self, name: str, mixture: GaussianMixture, t: float, seed: int, folder: Path, update: Update
    ) -> tuple[nn.Module, list[tuple[float, float]]]:
        """A trained model and its error (step, ½E‖s − s*‖²) while it was trained."""
        model = score_model(mixture.sde, self.name, seed)
        watched = draw_batch(mixture, t, 2000, "watched")

        def loss(step: int) -> Tensor:
            return LOSSES[name](model, mixture, draw_batch(mixture, t, self.batch_size, seed, step)).mean()

        def observe() -> dict[str, float]:
            with torch.no_grad():
                error = explicit_score_matching(model, mixture.score, watched.x, watched.t)
            return {"score_error": float(error.mean())}

        train(model, loss, folder, update, n_iters=self.n_iters, observe=observe)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return model, [(row["step"], row["score_error"]) for row in log]

    def table(self, numbers: Mapping) -> str:
        header = ("loss", "error of the learned score", "loss − explicit loss", "their constant")
        rows = [
            (
                row["loss"],
                f"{100 * row['relative_error']:.3f} ± {100 * row['relative_error_se']:.3f} %",
                f"{row['loss_minus_explicit']:.3f} ± {row['loss_minus_explicit_se']:.3f}",
                f"{row['constant']:.3f}",
            )
            for row in numbers["rows"]
        ]
        return (
            f"Error: ½E‖s − s*‖² in per cent of ½E‖s*‖² = {0.5 * numbers['fisher_information']:.3f}, mean ± standard "
            f"error over {self.seeds} seeds. Losses at the model of seed 0, on {self.test_points} fresh points.\n\n"
            + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        arrays, width = result.arrays, 2.6
        count = math.isqrt(len(arrays["density"]))
        extent = (-width, width, -width, width)
        figure = new_figure(8.4, 5.2)
        axes = figure.subplots(2, 3)
        field, curves, *maps = axes.flat
        field.imshow(arrays["density"].reshape(count, count), origin="lower", extent=extent, cmap="Greys")
        coarse = np.s_[4::8]
        grid = plane_grid(width, count).numpy().reshape(count, count, 2)[coarse, coarse]
        true = arrays["true"].reshape(count, count, 2)[coarse, coarse]
        field.quiver(*grid.reshape(-1, 2).T, *true.reshape(-1, 2).T, color="tab:blue", width=0.006)
        plane(field, width, f"density and its score, σ = {self.std}")
        for name in LOSSES:
            curves.plot(arrays["steps"], 100 * arrays[f"curve of {name}"].mean(0), label=name)
        curves.set(yscale="log", xlabel="step", title="½E‖s − s*‖² in % of ½E‖s*‖²")
        curves.legend(fontsize=7, loc="upper right")
        for ax, name in zip(maps, [name for name in LOSSES if name != "explicit"], strict=True):
            error = arrays[f"error of {name}"].reshape(count, count)
            image = ax.imshow(error, origin="lower", extent=extent, norm=LogNorm(0.02, 2), cmap="viridis")
            ax.contour(
                arrays["density"].reshape(count, count), levels=[0.01], extent=extent, colors="white", linewidths=0.7
            )
            plane(ax, width, name)
        figure.colorbar(image, ax=maps, label="‖s − s*‖", shrink=0.8, extend="both")
        return figure


def _standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------


BINS = (0.0, 2.0, 5.0, 10.0, 20.0, math.inf)
"""Bounds of log(max p / p) in nats."""


@dataclass(frozen=True)
class ScarceData(TutorialFigure):
    """The error of a learned score as a map, against the density of the data, at several noise levels.

    Args:
        stds: σ of the noise; one model each.
        num_train: how many data there are.
        n_iters, batch_size: of every model.
    """

    stds: tuple[float, ...] = (0.3, 3.0, 10.0)
    num_train: int = 10_000
    n_iters: int = 1500
    batch_size: int = 512

    name = "scarce_data"
    title = "Learned scores are wrong where data are scarce"
    half_width = 9.0
    count = 91

    @property
    def steps(self) -> int:
        return len(self.stds) * self.n_iters

    def compute(self, folder: Path, update: Update) -> Result:
        sde = VE(GeometricSigma(0.1, 20.0))
        mixture = two_modes(sde)
        data = mixture.sample(self.num_train, generator(self.name, "data")).float()
        grid = plane_grid(self.half_width, self.count)
        rows, arrays = [], {"data": data[:1000].numpy()}
        for std in self.stds:
            t = float(sde.time_at_std(torch.tensor(std, dtype=torch.float64)))
            model = self.fit_score(sde, data, t, std, folder / f"sigma_{std:g}", update)
            true = mixture.score(grid, constant(grid, t))
            error = (model(grid.float(), constant(grid.float(), t)).double() - true).norm(dim=1)
            log_density = mixture.log_prob(grid, constant(grid, t))
            below_peak = log_density.max() - log_density
            for low, high in itertools.pairwise(BINS):
                chosen = (below_peak >= low) & (below_peak < high)
                if chosen.any():
                    rms_error, rms_true = (float((v[chosen] ** 2).mean().sqrt()) for v in (error, true.norm(dim=1)))
                    rows.append(
                        {
                            "std": std,
                            "below_peak": [low, high if high < math.inf else None],
                            "area": float(chosen.double().mean()),
                            "rms_error": rms_error,
                            "relative_error": rms_error / rms_true,
                        }
                    )
            arrays[f"relative error {std:g}"] = (error / true.norm(dim=1)).numpy()
            arrays[f"below peak {std:g}"] = below_peak.numpy()
        return Result({"rows": rows}, self.claims(rows), arrays)

    def claims(self, rows: list[dict]) -> list[Claim]:
        by_level = {std: [row for row in rows if row["std"] == std] for std in self.stds}
        least, most = by_level[min(self.stds)], by_level[max(self.stds)]
        ratio = least[-1]["rms_error"] / least[0]["rms_error"]
        return [
            Claim(f"σ = {min(self.stds):g}: error in the emptiest part over that near the peaks", ratio, ">=", 10.0),
            Claim(
                f"σ = {max(self.stds):g}: largest relative error in the square",
                max(row["relative_error"] for row in most),
                "<=",
                0.1,
            ),
        ]

    def fit_score(self, sde: SDE, data: Tensor, t: float, std: float, folder: Path, update: Update) -> nn.Module:
        model = score_model(sde, self.name, f"{std:g}", input_scale=5.0)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", f"{std:g}", step)
            chosen = torch.randint(len(data), (self.batch_size,), generator=source)
            x0 = data[chosen]
            return std**2 * denoising_score_matching(model, sde, x0, constant(x0, t), source).mean()

        train(model, loss, folder, update, n_iters=self.n_iters)
        return model

    def table(self, numbers: Mapping) -> str:
        header = ("σ", "log(max p/p) (nats)", "share of the square", "rms ‖s − s*‖", "relative to rms ‖s*‖")
        rows = []
        for row in numbers["rows"]:
            low, high = row["below_peak"]
            between = f"{low:g} to {high:g}" if high is not None else f"above {low:g}"
            error = f"{row['rms_error']:.3g}"
            rows.append((f"{row['std']:g}", between, f"{row['area']:.3f}", error, f"{row['relative_error']:.3f}"))
        return (
            f"{self.num_train} data; unweighted means over the square [−{self.half_width:g}, {self.half_width:g}]².\n\n"
            + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        arrays, width = result.arrays, self.half_width
        extent = (-width, width, -width, width)
        figure = new_figure(8.4, 2.6)
        data, *maps = figure.subplots(1, 1 + len(self.stds))
        data.scatter(*arrays["data"].T, s=1, color="black", linewidths=0)
        plane(data, width, f"{len(arrays['data'])} of the data")
        for ax, std in zip(maps, self.stds, strict=True):
            error = arrays[f"relative error {std:g}"].reshape(self.count, self.count)
            image = ax.imshow(error, origin="lower", extent=extent, norm=LogNorm(0.003, 3), cmap="viridis")
            below = arrays[f"below peak {std:g}"].reshape(self.count, self.count)
            lines = ax.contour(below, levels=BINS[1:-1], extent=extent, colors="white", linewidths=0.6)
            ax.clabel(lines, fontsize=6)
            plane(ax, width, f"σ = {std:g}")
        figure.colorbar(image, ax=maps, label="‖s − s*‖/‖s*‖", extend="both")
        return figure
