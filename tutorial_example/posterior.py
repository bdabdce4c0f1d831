"""Gaussian data and linear measurements: the posterior is known, and how far from it each conditional sampler ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from exact.distributions import Gaussian
from experiment.randomness import normal_like
from guidance.conditions import DiffusionPosteriorSampling, MeasurementProjection, PseudoinverseGuidance
from guidance.measurements import LinearOperator, Mask, MatrixOperator
from sampling import PCSampler, Projection
from sde_lib import SDE, ScoreFunction

from .tutorial_figure import (
    SDES,
    Claim,
    Result,
    TutorialFigure,
    Update,
    generator,
    markdown_table,
    new_figure,
    reporting,
)

__all__ = ["Posterior", "gaussian_posterior"]

VARIANCE = 0.25
"""Of every component of the data."""

Conditioned = tuple[ScoreFunction, Projection | None]


def correlated(sde: SDE, dimension: int, length: float) -> Gaussian:
    """x_0 ~ N(m, C), C_ij = ¼ exp(−|i − j|/length)."""
    i = torch.arange(dimension, dtype=torch.float64)
    return Gaussian(sde, 0.5 * torch.sin(i), VARIANCE * torch.exp(-(i[:, None] - i[None, :]).abs() / length))


def gaussian_posterior(data: Gaussian, operator: LinearOperator, y: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Means (K, D) and the covariance (D, D) of x_0 given y (K, m), y = A x_0 + n.

    With G = CAᵀ(ACAᵀ + σ_y² I)⁻¹ they are m + G(y − Am) and C − GAC.
    """
    a = operator(torch.eye(data.dimension, dtype=torch.float64)).T
    c = data.covariance
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64))
    return data.mean + (y - data.mean @ a.T) @ gain.T, c - gain @ a @ c


@dataclass(frozen=True)
class Posterior(TutorialFigure):
    """Mean and covariance of the samples of every method against the posterior's.

    Args:
        dimension: D.
        lengths: correlation lengths of the data, in components.
        noise: σ_y of the measurements that have noise.
        measurements: how many different y.
        samples: of x_0 for each.
        num_steps: of the sampler, Euler–Maruyama.
    """

    dimension: int = 8
    lengths: tuple[float, ...] = (1.0, 4.0)
    noise: float = 0.2
    measurements: int = 6
    samples: int = 1000
    num_steps: int = 300

    name = "posterior"
    title = "Inverse problems: conditional samplers against a posterior that is known"

    @property
    def problems(self) -> dict[str, tuple[LinearOperator, float]]:
        """Name → A, σ_y."""
        d = self.dimension
        pairs = torch.kron(torch.eye(d // 2, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64))
        sums = normal_like(torch.empty(3, d, dtype=torch.float64), generator(self.name, "sums")) / d**0.5
        return {
            "half of them": (Mask(torch.arange(d) < d // 2), 0.0),
            "means of pairs": (MatrixOperator(pairs, (d,)), 0.0),
            "three sums, noisy": (MatrixOperator(sums, (d,)), self.noise),
        }

    @property
    def methods(self) -> dict[str, tuple[Callable[..., Conditioned], str]]:
        """Name → (data, A, y, σ_y) ↦ score and projection; corrector."""

        def projection(data: Gaussian, a: LinearOperator, y: Tensor, noise: float) -> Conditioned:
            return data.score, MeasurementProjection(data.sde, a, y, noise)

        def dps(step_size: float) -> Callable[..., Conditioned]:
            def condition(data: Gaussian, a: LinearOperator, y: Tensor, noise: float) -> Conditioned:
                guided = DiffusionPosteriorSampling(data.sde, data.score, a, y, step_size=step_size)
                return guided, guided

            return condition

        def pigdm(prior_variance: float) -> Callable[..., Conditioned]:
            def condition(data: Gaussian, a: LinearOperator, y: Tensor, noise: float) -> Conditioned:
                return PseudoinverseGuidance(data.sde, data.score, a, y, noise, prior_variance=prior_variance), None

            return condition

        return {
            "projection": (projection, "none"),
            "projection, 2 Langevin steps": (projection, "ald"),
            "DPS, ζ = 0.02": (dps(0.02), "none"),
            "DPS, ζ = 0.1": (dps(0.1), "none"),
            "DPS's likelihood": (pigdm(0.0), "none"),
            "ΠGDM, v = 1": (pigdm(1.0), "none"),
            "ΠGDM, v of the data": (pigdm(VARIANCE), "none"),
        }

    @property
    def cases(self) -> list[tuple[float, str, str]]:
        """Length, problem and method. DPS's likelihood is that of the noise: without noise there is none."""
        return [
            (length, problem, method)
            for length in self.lengths
            for problem, (_, noise) in self.problems.items()
            for method in self.methods
            if noise or method != "DPS's likelihood"
        ]

    @property
    def steps(self) -> int:
        langevin = sum(self.methods[method][1] != "none" for _, _, method in self.cases)
        return len(self.cases) * (self.num_steps + 1) + langevin * 2 * self.num_steps

    def compute(self, folder: Path, update: Update) -> Result:
        rows, arrays = [], {}
        for length, problem, method in self.cases:
            data = correlated(SDES["VP"], self.dimension, length)
            operator, noise = self.problems[problem]
            source = generator(self.name, "measurements", repr(length), problem)
            y = operator(data.sample(self.measurements, source))
            y = y + noise * normal_like(y, source)
            condition, corrector = self.methods[method]
            score, projection = condition(data, operator, y.repeat_interleave(self.samples, 0), noise)
            sampler = PCSampler(
                data.sde, "euler_maruyama", corrector, num_steps=self.num_steps, snr=0.3, n_steps_each=2
            )
            like = torch.empty(self.measurements * self.samples, self.dimension, dtype=torch.float64)
            x = sampler(reporting(score, update), like, generator(self.name, "samples"), projection=projection).x.view(
                self.measurements, self.samples, self.dimension
            )
            means, covariance = gaussian_posterior(data, operator, y, noise)
            measured = self.measure(x, means, covariance, data.mean)
            misfit = operator(x.flatten(0, 1)) - y.repeat_interleave(self.samples, 0)
            measured["misfit"] = float((misfit**2).mean().sqrt())
            rows.append({"length": length, "problem": problem, "noise": noise, "method": method, **measured})
            arrays[f"{length:g} {problem} {method}"] = torch.stack([x[0].mean(0), x[0].std(0)]).numpy()
            arrays[f"{length:g} {problem} truth"] = torch.stack([means[0], covariance.diagonal().sqrt()]).numpy()
        numbers = {"rows": rows}
        return Result(numbers, self.claims(numbers), arrays)

    def measure(self, x: Tensor, means: Tensor, covariance: Tensor, prior_mean: Tensor) -> dict[str, float]:
        """Errors of samples (K, n, D) against posterior means (K, D) and the covariance (D, D).

        The mean's is its root mean square over measurements in units of how far these move the mean; of its square the
        samples' own scatter, tr C/n, is taken off.
        """
        n = x.shape[1]
        centred = x - x.mean(1, keepdim=True)
        own = torch.einsum("kni,knj->ij", centred, centred) / (len(x) * (n - 1))
        error = x.mean(1) - means
        unit = ((means - prior_mean) ** 2).sum()
        squared = ((error**2).sum() - len(x) * own.trace() / n).clamp(min=0)
        spread = (4 * (error @ own * error).sum() / n + 2 * len(x) * (own**2).sum() / n**2).sqrt()
        mean_error = (squared / unit).sqrt()
        return {
            "mean_error": float(mean_error),
            "mean_error_se": float(spread / unit / (2 * mean_error).clamp(min=float((spread / unit).sqrt()))),
            "covariance_error": float((own - covariance).norm() / covariance.norm()),
            "variance_ratio": float(own.trace() / covariance.trace()),
        }

    def claims(self, numbers: Mapping) -> list[Claim]:
        claims = []
        for row in numbers["rows"]:
            where = f"{row['problem']}, correlation length {row['length']:g}"
            if row["method"] == "ΠGDM, v of the data" and row["length"] == self.lengths[0]:
                claims.append(Claim(f"ΠGDM, {where}: error of the mean", row["mean_error"], "<=", 0.05))
            if row["method"] == "projection" and not row["noise"]:
                claims.append(Claim(f"projection, {where}: root mean square of Ax − y", row["misfit"], "<=", 1e-6))
        return claims

    def table(self, numbers: Mapping) -> str:
        header = ("data, what is measured", "method", "mean, % off", "covariance, % off", "variance", "Ax − y")
        rows, before = [], ""
        for row in numbers["rows"]:
            what = f"length {row['length']:g}: {row['problem']}"
            rows.append(
                (
                    what if what != before else "",
                    row["method"],
                    f"{100 * row['mean_error']:.1f} ± {100 * row['mean_error_se']:.1f}",
                    f"{100 * row['covariance_error']:.0f}",
                    f"{row['variance_ratio']:.2f}",
                    f"{row['misfit']:.1g}" if row["misfit"] < 1e-3 else f"{row['misfit']:.3f}",
                )
            )
            before = what
        return (
            f"{self.dimension} numbers of variance {VARIANCE:g} with the correlation exp(−|i − j|/length); "
            f"{self.measurements} measurements, {self.samples} samples for each, {self.num_steps} steps of "
            f"Euler–Maruyama on VP. Noise: σ_y = {self.noise:g}. Mean: error in units of how far the measurement moves "
            "the mean; covariance: in the Frobenius norm; variance: total, over the posterior's; Ax − y: root mean "
            "square, of the posterior's own samples σ_y or 0.\n\n" + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        problem = "half of them"
        shown = {
            "projection": "tab:blue",
            "DPS, ζ = 0.1": "tab:orange",
            "ΠGDM, v = 1": "tab:olive",
            "ΠGDM, v of the data": "tab:green",
        }
        figure = new_figure(8.4, 3.6)
        i = torch.arange(self.dimension)
        axes = figure.subplots(1, len(self.lengths), sharey=True, squeeze=False)[0]
        for ax, length in zip(axes, self.lengths, strict=True):
            mean, std = result.arrays[f"{length:g} {problem} truth"]
            ax.fill_between(i, mean - std, mean + std, color="0.85", label="posterior, ± one standard deviation")
            ax.plot(i, mean, color="black", linewidth=1, label="posterior mean")
            for k, (method, colour) in enumerate(shown.items()):
                mean, std = result.arrays[f"{length:g} {problem} {method}"]
                ax.errorbar(
                    i + 0.12 * (k - 1.5), mean, std, fmt="o", markersize=3, linewidth=1, color=colour, label=method
                )
            ax.axvline(self.dimension / 2 - 0.5, color="0.5", linestyle=":", linewidth=1)
            ax.set(xlabel="component (left of the line: known)", title=f"correlation length {length:g}")
        figure.axes[0].set_ylabel("value")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure
