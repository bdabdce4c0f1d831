"""Denoising diffusion: the ladder of DDPM, ε-prediction and ancestral sampling; what ε has to do with the score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from exact.distributions import GaussianMixture
from experiment.randomness import normal_like
from losses import Objective
from models.score import ScoreModel
from sampling import AncestralPredictor, PCSampler
from sde_lib import VP, Ladder, expand

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
    reporting,
    score_model,
    three_modes,
    train,
)

__all__ = ["Ddpm", "EpsilonAndScore", "moment_errors"]


def moment_errors(x: Tensor, mixture: GaussianMixture, t: float) -> dict[str, float | list[float]]:
    """How samples (B, 2) differ from p_t: mean in standard deviations, covariance relative, weights of the components.

    Errors are the largest over components; the covariance's are relative to √(C_ii C_jj).
    """
    x = x.double()
    mean, covariance = mixture.moments(t)
    std = covariance.diagonal().sqrt()
    weights = mixture.responsibilities(x, constant(x, t)).mean(0)
    return {
        "mean_error": float(((x.mean(0) - mean) / std).abs().max()),
        "covariance_error": float(((x.T.cov() - covariance) / (std[:, None] * std)).abs().max()),
        "weights": weights.tolist(),
        "weight_error": float((weights - mixture.weights).abs().max()),
    }


@dataclass(frozen=True)
class Ddpm(TutorialFigure):
    """β from 1e-4 to 0.02 in N steps; a network that predicts ε; ancestral sampling with it and with the true score.

    Args:
        levels: N.
        n_iters, batch_size: of the network.
        samples: of each sampler.
    """

    levels: int = 1000
    n_iters: int = 4000
    batch_size: int = 512
    samples: int = 4000

    name = "ddpm"
    title = "DDPM: the ladder, ε-prediction, ancestral sampling"

    @property
    def shown(self) -> list[int]:
        """The levels whose points are drawn."""
        return [round(share * (self.levels - 1)) for share in (0.0, 0.1, 0.25, 1.0)]

    @property
    def steps(self) -> int:
        # Two samplers, whose last step removes the noise; the learned one once more, without that, for the picture.
        return self.n_iters + 3 * self.levels - 1

    def compute(self, folder: Path, update: Update) -> Result:
        sde = SDES["VP"]
        mixture, ladder = three_modes(sde), sde.ladder(self.levels)
        model = score_model(sde, self.name, num_scales=self.levels)
        objective = Objective(model)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", step)
            return objective(mixture.sample(self.batch_size, source).float(), source)["loss"]

        train(model, loss, folder / "score", update, n_iters=self.n_iters)
        alpha_bar = ladder.mean_coefficient**2
        rows, arrays = [], {}
        sampler = PCSampler(sde, "ancestral_sampling", "none", num_steps=self.levels, num_scales=self.levels)
        for kind, score, dtype in (("true", mixture.score, torch.float64), ("learned", model, torch.float32)):
            like = torch.empty(self.samples, 2, dtype=dtype)
            x = sampler(reporting(score, update), like, generator(self.name, "samples")).x
            rows.append({"score": kind, **moment_errors(x, mixture, 0.0)})
            arrays[f"samples, {kind}"] = x.numpy()
        arrays |= self.snapshots(mixture, model, update)
        times, errors, optimum = self.epsilon_error(mixture, model)
        arrays |= {"levels": times, "epsilon error": errors, "epsilon optimum": optimum}
        numbers = {
            "beta_first": float(1 - alpha_bar[0]),
            "beta_last": float(1 - alpha_bar[-1] / alpha_bar[-2]),
            "alpha_bar_last": float(alpha_bar[-1]),
            "posterior_difference": posterior_difference(sde, ladder),
            "epsilon_error": float(errors.mean()),
            "epsilon_optimum": float(optimum.mean()),
            "rows": rows,
        }
        return Result(numbers, self.claims(numbers), arrays)

    def snapshots(self, mixture: GaussianMixture, model: ScoreModel, update: Update) -> dict[str, np.ndarray]:
        """Data noised to the levels ``shown``, and samples on their way back at the same levels."""
        sde, ladder = mixture.sde, mixture.sde.ladder(self.levels)
        count, arrays = 1000, {}
        x0 = mixture.sample(count, generator(self.name, "noised"))
        for level in self.shown:
            t = constant(x0, float(ladder.time[level]))
            mean, std = sde.marginal(x0, t)
            x = mean + expand(std, x0) * normal_like(x0, generator(self.name, "noise", level))
            arrays[f"forward, {level}"] = x.numpy()
        predictor = AncestralPredictor(sde, reporting(model, update))
        source = generator(self.name, "reverse")
        x = sde.prior_sample(torch.empty(count, 2), source)
        times = ladder.time.tolist()
        for level in reversed(range(self.levels)):
            if level in self.shown:
                arrays[f"reverse, {level}"] = x.numpy()
            if level > 0:
                x, _ = predictor.step(x, constant(x, times[level]), constant(x, times[level - 1]), source)
        return arrays

    def epsilon_error(self, mixture: GaussianMixture, model: ScoreModel, count: int = 4000) -> tuple[np.ndarray, ...]:
        """At 25 levels: mean squared error of ε beyond that of E[ε|x], and that of E[ε|x] itself, per dimension."""
        sde, ladder = mixture.sde, mixture.sde.ladder(self.levels)
        levels = torch.linspace(0, self.levels - 1, 25).round().long()
        excess, optimum = [], []
        for level in levels.tolist():
            source = generator(self.name, "error", level)
            x0 = mixture.sample(count, source)
            t = constant(x0, float(ladder.time[level]))
            mean, std = sde.marginal(x0, t)
            z = normal_like(x0, source)
            x = mean + expand(std, x0) * z
            best = -expand(std, x0) * mixture.score(x, t)
            learned = -expand(std, x0) * model(x.float(), t.float())
            excess.append(float(((learned - best) ** 2).mean()))
            optimum.append(float(((z - best) ** 2).mean()))
        return levels.numpy(), np.array(excess), np.array(optimum)

    def claims(self, numbers: Mapping) -> list[Claim]:
        claims = [
            Claim("β_1, distance from 1e-4", abs(numbers["beta_first"] - 1e-4), "<=", 1e-12),
            Claim("β_N, distance from 0.02", abs(numbers["beta_last"] - 0.02), "<=", 1e-12),
            Claim("step of ancestral sampling from the posterior q", numbers["posterior_difference"], "<=", 1e-9),
            Claim("squared error of ε beyond the least possible", numbers["epsilon_error"], "<=", 0.01),
        ]
        for row in numbers["rows"]:
            bounds = (0.08, 0.1, 0.03)
            for (name, key), bound in zip(
                (("mean", "mean_error"), ("covariance", "covariance_error"), ("weights", "weight_error")),
                bounds,
                strict=True,
            ):
                claims.append(Claim(f"samples, {row['score']} score: error of the {name}", row[key], "<=", bound))
        return claims

    def table(self, numbers: Mapping) -> str:
        header = ("score", "error of the mean (standard deviations)", "of the covariance", "component weights")
        rows = [
            (
                row["score"],
                f"{row['mean_error']:.3f}",
                f"{100 * row['covariance_error']:.1f} %",
                ", ".join(f"{w:.3f}" for w in row["weights"]),
            )
            for row in numbers["rows"]
        ]
        return (
            f"β from {numbers['beta_first']:.4g} to {numbers['beta_last']:.4g} in {self.levels} steps, ᾱ at the end "
            f"{numbers['alpha_bar_last']:.3g}. ε: mean squared error {numbers['epsilon_error']:.4f} beyond "
            f"{numbers['epsilon_optimum']:.3f}, that of E[ε|x], per dimension, mean over levels. {self.samples} "
            f"samples; standard errors {1 / math.sqrt(self.samples):.3f} of the mean, "
            f"{100 * math.sqrt(2 / self.samples):.1f} % of a variance; true weights 0.5, 0.3, 0.2.\n\n"
            + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        figure = new_figure(8.4, 4.4)
        grid = figure.add_gridspec(2, len(self.shown) + 1, width_ratios=[1] * len(self.shown) + [1.3])
        for row, way in enumerate(("forward", "reverse")):
            for column, level in enumerate(self.shown):
                ax = figure.add_subplot(grid[row, column])
                ax.scatter(*result.arrays[f"{way}, {level}"].T, s=1, color="black", linewidths=0)
                plane(ax, 3.2, f"{way}, i = {level + 1}")
        ax = figure.add_subplot(grid[:, -1])
        ax.plot(result.arrays["levels"], result.arrays["epsilon optimum"], "k--", label="E[ε|x]")
        ax.plot(result.arrays["levels"], result.arrays["epsilon error"], label="network, beyond that")
        ax.set(yscale="log", xlabel="level i", title="mean squared error of ε")
        ax.legend(fontsize=7, loc="lower left")
        return figure


def posterior_difference(sde: VP, ladder: Ladder) -> float:
    """How far the steps of ancestral sampling are from q(x_{i−1} | x_i, x_0) if the data are one point x_0.

    q is had in two ways: in Ho et al.'s closed form (2020, Eqs. 6 and 7) and as the product of the Gaussians
    q(x_i | x_{i−1}) and q(x_{i−1} | x_0), whose precisions add. The largest difference of a mean or standard deviation
    over all levels, relative to the standard deviation.
    """
    t, s = ladder.time[1:], ladder.time[:-1]
    x0 = torch.tensor([0.7, -1.1], dtype=torch.float64).expand(len(t), 2)
    x = torch.tensor([-0.4, 0.9], dtype=torch.float64).expand(len(t), 2)

    def score_of_the_point(x: Tensor, t: Tensor) -> Tensor:
        return -(x - expand(sde.mean_coefficient(t), x) * x0) / expand(sde.std(t), x) ** 2

    predictor = AncestralPredictor(sde, score_of_the_point)
    moved, mean = predictor.step(x, t, s, generator("posterior"))
    std = (moved - mean) / normal_like(x, generator("posterior"))

    before, after = (ladder.mean_coefficient[part, None] ** 2 for part in (slice(None, -1), slice(1, None)))
    beta = 1 - after / before
    closed_mean = before.sqrt() * beta / (1 - after) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - after) * x
    closed_std = ((1 - before) / (1 - after) * beta).sqrt()
    product_mean, product_std = _product((1 - beta).sqrt(), beta.sqrt(), x, before.sqrt(), (1 - before).sqrt(), x0)
    differences = [mean - closed_mean, std - closed_std, product_mean - closed_mean, product_std - closed_std]
    return max(float((difference / closed_std).abs().max()) for difference in differences)


def _product(a: Tensor, b: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of y given N(x; a y, b²) and y ~ N(α x_0, σ²)."""
    precision = a**2 / b**2 + 1 / sigma**2
    return (a / b**2 * x + alpha / sigma**2 * x0) / precision, precision.rsqrt()


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpsilonAndScore(TutorialFigure):
    """s = −ε/σ and ε = −σ s: conversions both ways, and ε as a conditional expectation.

    Args:
        points: per time.
        times: how many, between the smallest time of sampling and 1.
    """

    points: int = 20_000
    times: int = 12

    name = "epsilon_and_score"
    title = "Noise prediction and score are one"

    @property
    def steps(self) -> int:
        return len(SDES) * self.times

    def compute(self, folder: Path, update: Update) -> Result:
        rows, arrays = [], {}
        for name, sde in SDES.items():
            mixture = three_modes(sde)
            model = score_model(sde, self.name)
            torch.nn.init.normal_(model.network.last.weight, generator=generator(self.name, "weights"))
            largest: dict[str, float] = {}
            curve = []
            times = torch.linspace(sde.sampling_eps, 1, self.times, dtype=torch.float64)
            for t in times.tolist():
                found = self.differences(mixture, model, t)
                largest = {key: max(value, largest.get(key, 0.0)) for key, value in found.items()}
                curve.append(found["expectation"])
                update(1)
            rows.append({"sde": name, **largest})
            arrays |= {f"{name}, times": times.numpy(), f"{name}, expectation": np.array(curve)}
        t, mixture = 0.1, three_modes(SDES["VP"])
        grid = plane_grid(2.8, 15)
        arrays["grid"] = grid.numpy()
        arrays["score"] = mixture.score(grid, constant(grid, t)).numpy()
        arrays["epsilon"] = expected_noise(mixture, grid, t).numpy()
        fine = plane_grid(2.8, 81)
        arrays["density"] = mixture.log_prob(fine, constant(fine, t)).exp().numpy()
        claims = []
        for row in rows:
            claims += [
                Claim(f"{row['sde']}: s → ε → s, relative, double precision", row["double"], "<=", 4 * 2**-53),
                Claim(f"{row['sde']}: s → ε → s, relative, single precision", row["single"], "<=", 4 * 2**-24),
                Claim(f"{row['sde']}: network → score → ε, relative", row["network"], "<=", 4 * 2**-24),
                Claim(f"{row['sde']}: −σ s from the mean of ε given x", row["expectation"], "<=", 1e-9),
            ]
        return Result({"rows": rows}, claims, arrays)

    def differences(self, mixture: GaussianMixture, model: ScoreModel, t: float) -> dict[str, float]:
        """Largest differences over the points, relative to the value they belong to or, for E[ε|x], to 1."""
        sde = mixture.sde
        source = generator(self.name, "points", repr(t))
        x0 = mixture.sample(self.points, source)
        times = constant(x0, t)
        mean, std = sde.marginal(x0, times)
        x = mean + expand(std, x0) * normal_like(x0, source)
        score = mixture.score(x, times)
        single = score.float()
        predicted = -model.sign * model.network(x.float(), model.noise_level(times.float())[0])
        single_std = model.noise_level(times.float())[1]
        converted = to_epsilon(model(x.float(), times.float()), single_std)
        return {
            "double": _relative(to_score(to_epsilon(score, std), std), score),
            "single": _relative(to_score(to_epsilon(single, std.float()), std.float()), single),
            "network": _relative(converted.detach(), predicted.detach()),
            "expectation": float((to_epsilon(score, std) - expected_noise(mixture, x, t)).abs().max()),
        }

    def table(self, numbers: Mapping) -> str:
        header = ("SDE", "s → ε → s, double", "single", "network → score → ε", "−σ s and the mean of ε given x")
        rows = [
            (row["sde"], *(f"{row[key]:.1e}" for key in ("double", "single", "network", "expectation")))
            for row in numbers["rows"]
        ]
        return (
            f"Largest relative differences (the last: absolute, ε is of size 1) over {self.points} points at each of "
            f"{self.times} times. Rounding is {2.0**-53:.1e} and {2.0**-24:.1e}. The mean of ε given x is put together "
            "from the components' posterior means of x_0.\n\n" + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        arrays = result.arrays
        figure = new_figure(8.4, 2.8)
        axes = figure.subplots(1, 3)
        count = math.isqrt(len(arrays["density"]))
        for ax, key, title in zip(axes, ("score", "epsilon"), ("score s", "E[ε|x] = −σ s"), strict=False):
            extent = (-2.8, 2.8, -2.8, 2.8)
            ax.imshow(arrays["density"].reshape(count, count), origin="lower", extent=extent, cmap="Greys")
            ax.quiver(*arrays["grid"].T, *arrays[key].T, color="tab:blue", width=0.006)
            plane(ax, 2.8, f"{title}, VP, t = 0.1")
        for name in SDES:
            axes[-1].plot(arrays[f"{name}, times"], arrays[f"{name}, expectation"], marker=".", label=name)
        axes[-1].set(yscale="log", xlabel="t", title="largest |−σ s − E[ε|x]|")
        axes[-1].legend(fontsize=7)
        return figure


def to_epsilon(score: Tensor, std: Tensor) -> Tensor:
    """ε = −σ s."""
    return -expand(std, score) * score


def to_score(epsilon: Tensor, std: Tensor) -> Tensor:
    """s = −ε/σ."""
    return -epsilon / expand(std, epsilon)


def expected_noise(mixture: GaussianMixture, x: Tensor, t: float) -> Tensor:
    """E[ε|x] = (x − α E[x_0|x])/σ (B, 2), with E[x_0|x] = Σ_k r_k (m_k + α C_k (α² C_k + σ² I)⁻¹ (x − α m_k))."""
    sde = mixture.sde
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = sde.mean_coefficient(time), sde.std(time)
    share = mixture.responsibilities(x, constant(x, t))
    x0 = torch.zeros_like(x)
    for k, (m, c) in enumerate(zip(mixture.means, mixture.covariances, strict=True)):
        gain = alpha * c @ torch.linalg.inv(alpha**2 * c + sigma**2 * torch.eye(2, dtype=torch.float64))
        x0 += share[:, k : k + 1] * (m + (x - alpha * m) @ gain.T)
    return (x - alpha * x0) / sigma


def _relative(value: Tensor, exact: Tensor) -> float:
    return float(((value - exact).abs() / exact.abs().clamp(min=1e-30)).max())
