"""VE, VP and sub-VP: forward simulation against the marginals, samplers of the reverse SDE against the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiment.randomness import normal_like
from sampling import PCSampler
from sde_lib import SDE, expand

from .diffusion import moment_errors
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
    reporting,
    three_modes,
)

__all__ = ["Sdes", "euler_maruyama_marginal"]


def euler_maruyama_marginal(sde: SDE, num_steps: int) -> tuple[Tensor, Tensor]:
    """α and σ (N + 1,) of the chain x ← x − f x Δt + g √Δt z at the times k/N: what N steps make of the marginals."""
    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f, g = sde.drift_rate(times), sde.diffusion(times)
    alpha, variance = sde.mean_coefficient(times[:1]), sde.std(times[:1]) ** 2
    alphas, variances = [alpha], [variance]
    for k in range(num_steps):
        factor = 1 - f[k : k + 1] / num_steps
        alpha, variance = factor * alpha, factor**2 * variance + g[k : k + 1] ** 2 / num_steps
        alphas.append(alpha)
        variances.append(variance)
    return torch.cat(alphas), torch.cat(variances).sqrt()


@dataclass(frozen=True)
class Sdes(TutorialFigure):
    """Forward simulation against the marginals; reverse Euler–Maruyama and predictor–corrector, with the true score.

    Args:
        num_steps: N, of the forward simulation and of both samplers.
        snr: of the corrector, annealed Langevin, one step per time.
        samples: in each simulation.
    """

    num_steps: int = 500
    snr: float = 0.16
    samples: int = 10_000

    name = "sdes"
    title = "VE, VP and sub-VP, forwards and backwards"
    looked_at = (0.1, 0.25, 0.5, 1.0)
    samplers = (("euler_maruyama", "none"), ("reverse_diffusion", "ald"))

    @property
    def steps(self) -> int:
        # A corrector doubles the evaluations; one more removes the noise.
        return len(SDES) * (self.num_steps + (self.num_steps + 1) + (2 * self.num_steps + 1))

    def compute(self, folder: Path, update: Update) -> Result:
        forward, reverse, arrays = [], [], {}
        for name, sde in SDES.items():
            mixture = three_modes(sde)
            rows, snapshots = self.simulate(name, sde, update)
            forward += rows
            arrays |= {f"{name}, t = {t:g}": x[:1500].numpy() for t, x in snapshots.items()}
            for predictor, corrector in self.samplers:
                sampler = PCSampler(sde, predictor, corrector, num_steps=self.num_steps, snr=self.snr)
                like = torch.empty(self.samples, 2, dtype=torch.float64)
                source = generator(self.name, "reverse", name, predictor)
                x, nfe = sampler(reporting(mixture.score, update), like, source)
                reverse.append(
                    {
                        "sde": name,
                        "predictor": predictor,
                        "corrector": corrector,
                        "nfe": nfe,
                        **moment_errors(x, mixture, 0.0),
                    }
                )
                arrays[f"{name}, {predictor}"] = x[:1500].numpy()
        return Result({"forward": forward, "reverse": reverse}, self.claims(forward, reverse), arrays)

    def simulate(self, name: str, sde: SDE, update: Update) -> tuple[list[dict], dict[float, Tensor]]:
        """Moments of Euler–Maruyama against those of the chain, and of the chain against the SDE's marginals."""
        mixture = three_modes(sde)
        source = generator(self.name, "forward", name)
        x = mixture.sample(self.samples, source)
        x = sde.marginal(x, constant(x, 0.0))[0] + expand(sde.std(constant(x, 0.0)), x) * normal_like(x, source)
        chain_alpha, chain_std = euler_maruyama_marginal(sde, self.num_steps)
        mean, covariance = three_modes(sde).moments(0.0)
        covariance = covariance - float(sde.std(torch.zeros(()))) ** 2 * torch.eye(2, dtype=torch.float64)
        rows, snapshots = [], {}
        for k in range(self.num_steps):
            t = constant(x, k / self.num_steps)
            drift, g = sde.drift(x, t), expand(sde.diffusion(t), x)
            x = x + drift / self.num_steps + g / math.sqrt(self.num_steps) * normal_like(x, source)
            update(1)
            time = (k + 1) / self.num_steps
            if any(abs(time - t) < 0.5 / self.num_steps for t in self.looked_at):
                alpha, std = chain_alpha[k + 1], chain_std[k + 1]
                expected = alpha**2 * covariance + std**2 * torch.eye(2, dtype=torch.float64)
                variance = expected.diagonal()
                mean_error = (x.mean(0) - alpha * mean).abs() / (variance / len(x)).sqrt()
                # Of a sum of Gaussian parts the fourth moment is not 3σ⁴, so the error of a variance is estimated.
                centred = (x - x.mean(0)) ** 2
                variance_error = (centred.mean(0) - variance).abs() / (centred.std(0) / math.sqrt(len(x)))
                exact = mixture.moments(time)[1].diagonal()
                snapshots[time] = x
                rows.append(
                    {
                        "sde": name,
                        "t": time,
                        "mean_deviation": float(mean_error.max()),
                        "variance_deviation": float(variance_error.max()),
                        "chain_bias": float((variance / exact - 1).abs().max()),
                        "variance_error": float((centred.mean(0) / exact - 1).abs().max()),
                    }
                )
        return rows, snapshots

    def claims(self, forward: list[dict], reverse: list[dict]) -> list[Claim]:
        claims = []
        for name in SDES:
            rows = [row for row in forward if row["sde"] == name]
            deviation = max(max(row["mean_deviation"], row["variance_deviation"]) for row in rows)
            bias = max(row["chain_bias"] for row in rows)
            text = f"{name} forward: moments from those of {self.num_steps} steps, in standard errors"
            claims.append(Claim(text, deviation, "<=", 4.0))
            text = f"{name} forward: variance of {self.num_steps} steps from the marginal"
            claims.append(Claim(text, bias, "<=", 0.03))
        for row in reverse:
            how = f"{row['sde']} {row['predictor']}" + (" + ald" if row["corrector"] == "ald" else "")
            claims.append(Claim(f"{how}: error of the mean (standard deviations)", row["mean_error"], "<=", 0.05))
            claims.append(Claim(f"{how}: error of the covariance", row["covariance_error"], "<=", 0.06))
            claims.append(Claim(f"{how}: error of a component's weight", row["weight_error"], "<=", 0.02))
        return claims

    def table(self, numbers: Mapping) -> str:
        forward = markdown_table(
            ("SDE", "t", "mean: standard errors from the chain's", "variance: likewise", "chain's variance − SDE's"),
            [
                (
                    row["sde"],
                    f"{row['t']:g}",
                    f"{row['mean_deviation']:.1f}",
                    f"{row['variance_deviation']:.1f}",
                    f"{100 * row['chain_bias']:.2f} %",
                )
                for row in numbers["forward"]
            ],
        )
        reverse = markdown_table(
            ("SDE", "predictor", "corrector", "NFE", "error of the mean", "of the covariance", "component weights"),
            [
                (
                    row["sde"],
                    row["predictor"],
                    row["corrector"],
                    f"{row['nfe']:g}",
                    f"{row['mean_error']:.3f}",
                    f"{100 * row['covariance_error']:.1f} %",
                    ", ".join(f"{w:.3f}" for w in row["weights"]),
                )
                for row in numbers["reverse"]
            ],
        )
        return (
            f"{self.samples} samples, {self.num_steps} steps. Forward, by Euler–Maruyama; the moments of that chain "
            f"follow from a recursion:\n\n{forward}\nBackward, from the prior; errors of the mean in standard "
            f"deviations of the data (standard error {1 / math.sqrt(self.samples):.3f}), of a variance in per cent "
            f"({100 * math.sqrt(2 / self.samples):.1f} %); true weights 0.5, 0.3, 0.2:\n\n{reverse}"
        )

    def draw(self, result: Result) -> Figure:
        drawn = (self.looked_at[0], *self.looked_at[2:])
        columns = [f"t = {t:g}" for t in drawn] + [predictor for predictor, _ in self.samplers]
        titles = [f"forward, t = {t:g}" for t in drawn] + ["Euler–Maruyama", "predictor–corrector"]
        figure = new_figure(8.4, 5.2)
        axes = figure.subplots(len(SDES), len(columns))
        for row, (name, sde) in zip(axes, SDES.items(), strict=True):
            for ax, column, title in zip(row, columns, titles, strict=True):
                x = result.arrays[f"{name}, {column}"]
                ax.scatter(*x.T, s=1, color="black", linewidths=0)
                forward = column.startswith("t")
                scale = three_modes(sde).moments(float(column[4:]))[1].diagonal().max() if forward else 0.0
                width = max(3.0, 3.5 * math.sqrt(scale))
                ax.set(xlim=(-width, width), ylim=(-width, width), aspect="equal")
                ticks = (-int(0.7 * width), 0, int(0.7 * width))
                ax.set(xticks=ticks, yticks=ticks)
                ax.tick_params(labelsize=7)
                if name == next(iter(SDES)):
                    ax.set_title(title)
            row[0].set_ylabel(f"{name}\n$x_2$")
        for ax in axes[-1]:
            ax.set_xlabel("$x_1$")
        return figure
