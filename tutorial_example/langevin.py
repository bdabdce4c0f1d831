"""Langevin dynamics with the true and with a learned score; annealed over noise levels where plain dynamics fails."""

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
from experiment.randomness import uniform
from losses import Objective, denoising_score_matching
from sampling import AnnealedLangevinCorrector, langevin_dynamics
from sde_lib import VE, GeometricSigma, ScoreFunction

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
    two_modes,
)

__all__ = ["AnnealedLangevin", "Langevin"]


def entropy(mixture: GaussianMixture, t: float, half_width: float = 6.0, count: int = 481) -> float:
    """−∫ p log p in nats by the trapezoidal rule on a grid, for densities that vanish at its border."""
    x = plane_grid(half_width, count)
    log_density = mixture.log_prob(x, constant(x, t))
    return -float((log_density.exp() * log_density).sum()) * (2 * half_width / (count - 1)) ** 2


@dataclass(frozen=True)
class Langevin(TutorialFigure):
    """Unadjusted Langevin dynamics of one noised density at several step sizes, with the true and a learned score.

    Args:
        std: σ of the noise in the density that is sampled.
        step_sizes: ε, in units of x².
        duration: ε times the number of steps; means are over its second half.
        particles: independent chains.
        n_iters, batch_size: of the learned score, by denoising score matching.
    """

    std: float = 0.3
    step_sizes: tuple[float, ...] = (0.16, 0.08, 0.04, 0.02, 0.01)
    duration: float = 20.0
    particles: int = 2000
    n_iters: int = 3000
    batch_size: int = 512

    name = "langevin"
    title = "Langevin dynamics with the true and with a learned score"
    kinds = ("true", "learned", "true, Metropolis-adjusted")

    @property
    def steps(self) -> int:
        counts = [self.num_steps(size) for size in self.step_sizes]
        return self.n_iters + len(self.kinds) * sum(counts) + len(counts)

    def num_steps(self, size: float) -> int:
        return round(self.duration / size)

    def compute(self, folder: Path, update: Update) -> Result:
        sde = SDES["VE"]
        mixture = three_modes(sde)
        t = float(sde.time_at_std(torch.tensor(self.std, dtype=torch.float64)))
        model = score_model(sde, self.name)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", step)
            x0 = mixture.sample(self.batch_size, source).float()
            return denoising_score_matching(model, sde, x0, constant(x0, t), source).mean()

        train(model, loss, folder / "score", update, n_iters=self.n_iters)
        mean, covariance = mixture.moments(t)
        rows, arrays = [], {"weights": mixture.weights.numpy()}
        for kind in self.kinds:
            score = reporting(self.double(model) if kind == "learned" else mixture.score, update)
            for size in self.step_sizes:
                chain = self.run_chain(score, mixture, t, size, adjusted="adjusted" in kind)
                late = chain[len(chain) // 2 :]
                rows.append({"score": kind, "step_size": size, **self.measure(late, mixture, t, mean, covariance)})
                if size == min(self.step_sizes):
                    arrays[f"samples, {kind}"] = chain[-1].numpy()
        grid = plane_grid(2.6, 101)
        arrays["density"] = mixture.log_prob(grid, constant(grid, t)).exp().numpy()
        return Result({"entropy": entropy(mixture, t), "rows": rows}, self.claims(rows), arrays)

    @staticmethod
    def double(model: torch.nn.Module) -> ScoreFunction:
        """A network in single precision for a state in double precision."""
        return lambda x, t: model(x.float(), t.float()).double()

    def run_chain(self, score: ScoreFunction, mixture: GaussianMixture, t: float, size: float, *, adjusted: bool):
        """Positions (steps + 1, particles, 2) from N(0, I); all kinds share starts and noise."""
        source = generator(self.name, "chain", repr(size))
        x = torch.randn(self.particles, 2, generator=source, dtype=torch.float64)
        log_density = mixture.log_prob if adjusted else None
        sizes = [size] * self.num_steps(size)
        return langevin_dynamics(score, x, constant(x, t), sizes, log_density=log_density, generator=source).x

    def measure(
        self, late: Tensor, mixture: GaussianMixture, t: float, mean: Tensor, covariance: Tensor
    ) -> dict[str, float | list[float]]:
        """Moments, weights and −E log p of positions (N, particles, 2).

        The particles are independent, their positions in time are not: standard errors are over particles.
        """
        thinned = late[:: max(1, len(late) // 100)]
        flat = thinned.reshape(-1, 2)
        times = constant(flat, t)
        weights = mixture.responsibilities(flat, times).mean(0)
        nll = -mixture.log_prob(flat, times).view(len(thinned), -1).mean(0) - entropy(mixture, t)
        return {
            "mean_error": float((flat.mean(0) - mean).abs().max()),
            "trace_error": float(flat.T.cov().trace() / covariance.trace() - 1),
            "weights": weights.tolist(),
            "weight_error": float((weights - mixture.weights).abs().max()),
            "excess_nll": float(nll.mean()),
            "excess_nll_se": float(nll.std()) / math.sqrt(len(nll)),
        }

    def claims(self, rows: list[dict]) -> list[Claim]:
        by_kind = {kind: [row for row in rows if row["score"] == kind] for kind in self.kinds}
        smallest = {kind: min(chosen, key=lambda row: row["step_size"]) for kind, chosen in by_kind.items()}
        claims = []
        for kind, weight_bound, trace_bound in (("true", 0.02, 0.05), ("learned", 0.03, 0.08)):
            row = smallest[kind]
            where = f"{kind} score, ε = {row['step_size']:g}"
            claims.append(Claim(f"{where}: error of a mode weight", row["weight_error"], "<=", weight_bound))
            claims.append(Claim(f"{where}: error of the variance", abs(row["trace_error"]), "<=", trace_bound))
        claims.append(Claim("true score: order in ε of the bias of −E log p", self.order(rows), ">=", 0.8))
        deviation = max(abs(row["excess_nll"]) / row["excess_nll_se"] for row in by_kind[self.kinds[-1]])
        claims.append(Claim("adjusted: bias of −E log p at any ε, in standard errors", deviation, "<=", 4.0))
        return claims

    def order(self, rows: list[dict]) -> float:
        """Slope of log bias against log ε, true score, over step sizes at which the bias is significant."""
        chosen = [row for row in rows if row["score"] == "true" and row["excess_nll"] > 4 * row["excess_nll_se"]]
        if len(chosen) < 2:
            return 0.0
        x, y = (np.log([row[key] for row in chosen]) for key in ("step_size", "excess_nll"))
        return float(np.polyfit(x, y, 1)[0])

    def table(self, numbers: Mapping) -> str:
        header = ("score", "ε", "steps", "mode weights", "error of the mean", "of the variance", "−E log p − entropy")
        rows = [
            (
                row["score"],
                f"{row['step_size']:g}",
                self.num_steps(row["step_size"]),
                ", ".join(f"{w:.3f}" for w in row["weights"]),
                f"{row['mean_error']:.3f}",
                f"{100 * row['trace_error']:+.1f} %",
                f"{row['excess_nll']:.4f} ± {row['excess_nll_se']:.4f}",
            )
            for row in numbers["rows"]
        ]
        return (
            f"{self.particles} chains from N(0, I), means over the second half; true weights 0.5, 0.3, 0.2; entropy "
            f"{numbers['entropy']:.4f} nats.\n\n" + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        figure = new_figure(8.4, 2.7)
        axes = figure.subplots(1, 3)
        count, width = math.isqrt(len(result.arrays["density"])), 2.6
        smallest = min(self.step_sizes)
        for ax, kind in zip(axes, self.kinds[:2], strict=False):
            ax.contour(
                result.arrays["density"].reshape(count, count),
                levels=6,
                extent=(-width, width, -width, width),
                colors="tab:red",
                linewidths=0.7,
            )
            ax.scatter(*result.arrays[f"samples, {kind}"].T, s=1, color="black", linewidths=0)
            plane(ax, width, f"{kind} score, ε = {smallest:g}")
        ax = axes[-1]
        for kind in self.kinds:
            chosen = [row for row in result.numbers["rows"] if row["score"] == kind]
            sizes = [row["step_size"] for row in chosen]
            excess, error = ([row[key] for row in chosen] for key in ("excess_nll", "excess_nll_se"))
            ax.errorbar(sizes, excess, error, marker=".", label=kind)
        ax.set(xscale="log", xlabel="step size ε", title="−E log p − entropy (nats)")
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set_ylim(-0.02, 2)
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.legend(fontsize=7, loc="upper left")
        return figure


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnealedLangevin(TutorialFigure):
    """NCSN: one score network for a ladder of noise levels, and Langevin dynamics from the largest to the smallest.

    Plain dynamics starts from the same points, U([−8, 8]²), and makes as many steps, all at the smallest level.

    Args:
        sigma_min, sigma_max, levels: the ladder.
        steps_per_level, snr: of the sampler; its step size is 2(snr·σ)².
        particles: samples per seed.
        seeds: of sampling with the true score.
        trainings: of the network, each sampled with one seed.
        n_iters, batch_size: of every network.
    """

    sigma_min: float = 0.5
    sigma_max: float = 20.0
    levels: int = 10
    steps_per_level: int = 100
    snr: float = 0.25
    particles: int = 2000
    seeds: int = 5
    trainings: int = 3
    n_iters: int = 4000
    batch_size: int = 512

    name = "annealed_langevin"
    title = "Noise conditional score networks and annealed Langevin dynamics"

    @property
    def steps(self) -> int:
        return self.trainings * self.n_iters + 2 * (self.seeds + self.trainings) * self.levels * self.steps_per_level

    def compute(self, folder: Path, update: Update) -> Result:
        sde = VE(GeometricSigma(self.sigma_min, self.sigma_max))
        mixture = two_modes(sde)
        rows, arrays = [], {}
        for kind, count in (("true", self.seeds), ("learned", self.trainings)):
            for seed in range(count):
                score, dtype = mixture.score, torch.float64
                if kind == "learned":
                    score, dtype = self.fit_score(mixture, seed, folder / f"seed_{seed}", update), torch.float32
                for sampler, sample in (("plain", self.plain), ("annealed", self.annealed)):
                    source = generator(self.name, "start", seed)
                    start = 16 * uniform((self.particles, 2), source, dtype=torch.float64).to(dtype) - 8
                    x, shares = sample(sde, reporting(score, update), start, source)
                    minor = x.sum(1) < 0
                    rows.append(
                        {
                            "score": kind,
                            "sampler": sampler,
                            "seed": seed,
                            "start": float((start.sum(1) < 0).double().mean()),
                            "minor_weight": float(minor.double().mean()),
                            "std_in_major_mode": float(x[~minor].double().T.cov().trace() / 2) ** 0.5,
                        }
                    )
                    arrays[f"{kind}, {sampler}, share, {seed}"] = np.array(shares)
                    if seed == 0:
                        arrays[f"{kind}, {sampler}"] = x.numpy()
        return Result({"rows": rows}, self.claims(rows), arrays)

    def fit_score(self, mixture: GaussianMixture, seed: int, folder: Path, update: Update) -> torch.nn.Module:
        model = score_model(mixture.sde, self.name, seed, num_scales=self.levels, input_scale=10.0)
        objective = Objective(model)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", seed, step)
            return objective(mixture.sample(self.batch_size, source).float(), source)["loss"]

        train(model, loss, folder, update, n_iters=self.n_iters)
        return model

    def annealed(self, sde: VE, score: ScoreFunction, x: Tensor, source: torch.Generator) -> tuple[Tensor, list[float]]:
        """The samples and, after every level, the share of them with x₁ + x₂ < 0."""
        corrector = AnnealedLangevinCorrector(sde, score, self.snr, self.steps_per_level)
        shares = []
        for t in reversed(sde.ladder(self.levels).time.tolist()):
            x, _ = corrector.step(x, constant(x, t), source)
            shares.append(float((x.sum(1) < 0).double().mean()))
        return x, shares

    def plain(self, sde: VE, score: ScoreFunction, x: Tensor, source: torch.Generator) -> tuple[Tensor, list[float]]:
        corrector = AnnealedLangevinCorrector(sde, score, self.snr, self.steps_per_level)
        shares = []
        for _ in range(self.levels):
            x, _ = corrector.step(x, constant(x, 0.0), source)
            shares.append(float((x.sum(1) < 0).double().mean()))
        return x, shares

    def claims(self, rows: list[dict]) -> list[Claim]:
        claims = []
        for kind in ("true", "learned"):
            off = {
                sampler: [abs(r["minor_weight"] - 0.2) for r in rows if (r["score"], r["sampler"]) == (kind, sampler)]
                for sampler in ("plain", "annealed")
            }
            claims.append(
                Claim(f"annealed, {kind} score: largest error of the weight 0.2", max(off["annealed"]), "<=", 0.05)
            )
            claims.append(Claim(f"plain, {kind} score: smallest error of the weight", min(off["plain"]), ">=", 0.2))
        return claims

    def exact_share(self, std: float) -> float:
        """P(x₁ + x₂ < 0) at a noise level: x₁ + x₂ ~ Σ w_k N(±10, 2(1 + σ²))."""
        scale = math.sqrt(2 * (1 + std**2))
        tail = 0.5 * math.erfc(10 / scale / math.sqrt(2))
        return 0.2 * (1 - tail) + 0.8 * tail

    def table(self, numbers: Mapping) -> str:
        header = ("score", "sampler", "weight 0.2: mean over seeds", "range (seeds)", "standard deviation in a mode")
        rows = []
        for kind in ("true", "learned"):
            for sampler in ("plain", "annealed"):
                chosen = [r for r in numbers["rows"] if (r["score"], r["sampler"]) == (kind, sampler)]
                weights = [r["minor_weight"] for r in chosen]
                spread = np.mean([r["std_in_major_mode"] for r in chosen])
                rows.append(
                    (
                        kind,
                        sampler,
                        f"{np.mean(weights):.3f}",
                        f"{min(weights):.3f} to {max(weights):.3f} ({len(weights)})",
                        f"{spread:.3f}",
                    )
                )
        return (
            f"{self.particles} samples per seed, {self.levels * self.steps_per_level} evaluations of the score each; "
            f"the standard deviation in a mode should be {math.sqrt(1 + self.sigma_min**2):.3f}, that of σ = "
            f"{self.sigma_min:g}. At the start the share is {np.mean([r['start'] for r in numbers['rows']]):.3f}.\n\n"
            + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        figure = new_figure(8.4, 4.6)
        grid = figure.add_gridspec(2, 3)
        for row, kind in enumerate(("true", "learned")):
            for column, sampler in enumerate(("plain", "annealed")):
                ax = figure.add_subplot(grid[row, column])
                ax.scatter(*result.arrays[f"{kind}, {sampler}"].T, s=1, color="black", linewidths=0)
                weight = float((result.arrays[f"{kind}, {sampler}"].sum(1) < 0).mean())
                plane(ax, 9.0, f"{sampler}, {kind} score")
                ax.annotate(f"{weight:.2f}", (-6, -1.0), color="tab:red")
                ax.annotate(f"{1 - weight:.2f}", (4, 0.2), color="tab:red")
        ax = figure.add_subplot(grid[:, 2])
        sigmas = np.geomspace(self.sigma_max, self.sigma_min, self.levels)
        ax.plot(range(self.levels), [self.exact_share(s) for s in sigmas], "k--", label="exact, at the level's σ")
        colours = {("true", "plain"): "tab:blue", ("true", "annealed"): "tab:green"}
        colours |= {("learned", "plain"): "tab:cyan", ("learned", "annealed"): "tab:orange"}
        for (kind, sampler), colour in colours.items():
            count = self.seeds if kind == "true" else self.trainings
            shares = np.array([result.arrays[f"{kind}, {sampler}, share, {seed}"] for seed in range(count)])
            ax.plot(shares.T, color=colour, linewidth=0.8)
            ax.plot([], [], color=colour, label=f"{sampler}, {kind} score")
        ax.axhline(0.2, color="0.6", linewidth=0.8)
        ax.set(xlabel=f"σ of annealed dynamics, {self.steps_per_level} steps each", ylim=(0, 0.65))
        ax.set_title("share of samples with $x_1 + x_2 < 0$")
        ax.set_xticks(range(self.levels)[::3], [f"{s:.2g}" for s in sigmas[::3]])
        ax.legend(fontsize=7)
        return figure
