"""The chains of SMLD and DDPM as steps of the VE and VP SDEs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from exact.gaussian_law import Law, limit_law, sampler_law, wasserstein
from sde_lib import SDE

from .tutorial_figure import SDES, Claim, Result, TutorialFigure, Update, generator, markdown_table, new_figure

__all__ = ["Discretisation"]


def smld_steps(sde: SDE, count: int) -> tuple[Tensor, Tensor]:
    """a and b (N,) of the steps x ← a x + b z, step k from time k/N to (k + 1)/N: a = 1, b² = σ_{k+1}² − σ_k²."""
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    return torch.ones(count, dtype=torch.float64), sde.transition_variance(times[:-1], times[1:]).sqrt()


def ddpm_steps(sde: SDE, count: int) -> tuple[Tensor, Tensor]:
    """The same for the β_k of the ladder of N levels: a² = 1 − β_k, b² = β_k."""
    alpha_bar = sde.ladder(count).mean_coefficient ** 2
    a_squared = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return a_squared.sqrt(), (1 - a_squared).sqrt()


class Chain(NamedTuple):
    """A chain and its SDE."""

    sde: SDE
    steps: Callable[[SDE, int], tuple[Tensor, Tensor]]
    colour: str


CHAINS = {
    "SMLD": Chain(SDES["VE"], smld_steps, "tab:blue"),
    "DDPM": Chain(SDES["VP"], ddpm_steps, "tab:red"),
}


@dataclass(frozen=True)
class Discretisation(TutorialFigure):
    """The chains of SMLD and DDPM driven by the Brownian path of their SDEs; how the difference falls with the steps.

    Args:
        counts: N, numbers of steps.
        simulated: those at which the difference is also simulated.
        paths, fine_steps: of the simulation, in one dimension.
    """

    counts: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    simulated: tuple[int, ...] = (32, 128, 512)
    paths: int = 2000
    fine_steps: int = 8192

    name = "discretisation"
    title = "SMLD and DDPM are discretised SDEs"
    start = 1.5
    data = Law(torch.tensor([0.5, -0.2], dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64))

    @property
    def steps(self) -> int:
        return len(CHAINS) * (len(self.counts) + len(self.simulated))

    def compute(self, folder: Path, update: Update) -> Result:
        rows, arrays = [], {}
        for name, chain in CHAINS.items():
            for count in self.counts:
                row = {
                    "chain": name,
                    "steps": count,
                    "path": self.path_error(chain, count),
                    "marginal": marginal_error(chain, count),
                    "reverse": self.reverse_error(chain.sde, count),
                    "simulated": None,
                    "simulated_se": None,
                }
                update(1)
                if count in self.simulated:
                    row["simulated"], row["simulated_se"] = self.simulate(name, count, arrays)
                    update(1)
                rows.append(row)
        orders = [
            {"chain": name, "error": error, "order": self.order(rows, name, error)}
            for name in CHAINS
            for error in ("path", "marginal", "reverse")
            if not (name == "SMLD" and error == "marginal")  # which is 0
        ]
        return Result({"rows": rows, "orders": orders}, self.claims(rows, orders), arrays)

    def path_error(self, chain: Chain, count: int) -> float:
        """√E|X_1 − x_N|² in one dimension from x_0, exactly.

        Both are x_0 times a constant plus a stochastic integral: X_1 has the kernel h(u) = g(u) α(1)/α(u), the chain
        one that is constant, c_k, on every step. The rest is ∫(h − c)² du, by Gauss–Legendre quadrature in every step.
        """
        sde = chain.sde
        a, b = chain.steps(sde, count)
        remains = torch.cat([a.flip(0).cumprod(0).flip(0)[1:], a.new_ones(1)])
        kernel = (remains * b * math.sqrt(count))[:, None]
        nodes, weights = (torch.from_numpy(v) for v in leggauss(5))
        u = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5 * (1 + nodes)) / count
        one = torch.ones(1, dtype=torch.float64)
        alpha = sde.mean_coefficient(one)
        h = sde.diffusion(u) * alpha / sde.mean_coefficient(u)
        noise = ((h - kernel) ** 2 @ (0.5 * weights / count)).sum()
        return float((noise + (self.start * (alpha - a.prod())) ** 2).sqrt())

    def simulate(self, name: str, count: int, arrays: dict[str, np.ndarray]) -> tuple[float, float]:
        """The same by simulation with common noise; one path of both is kept."""
        sde = CHAINS[name].sde
        a, b = CHAINS[name].steps(sde, count)
        per_step = self.fine_steps // count
        source = generator(self.name, name)
        squares = []
        for part in range(self.paths // 100):
            dw = torch.randn(100, self.fine_steps, generator=source, dtype=torch.float64) / math.sqrt(self.fine_steps)
            # X_t = α(t) (x_0 + ∫₀ᵗ g/α dW), the integrand at the middle of every fine step.
            middle = (torch.arange(self.fine_steps, dtype=torch.float64) + 0.5) / self.fine_steps
            integral = (dw * sde.diffusion(middle) / sde.mean_coefficient(middle)).cumsum(1)
            ends = torch.linspace(0, 1, self.fine_steps + 1, dtype=torch.float64)[1:]
            path = sde.mean_coefficient(ends) * (self.start + integral)
            z = dw.view(100, count, per_step).sum(2) * math.sqrt(count)
            x, states = torch.full((100,), self.start, dtype=torch.float64), []
            for k in range(count):
                x = a[k] * x + b[k] * z[:, k]
                states.append(x)
            squares.append((x - path[:, -1]) ** 2)
            if part == 0 and count == min(self.simulated):
                arrays[f"{name}, path"] = path[0, :: self.fine_steps // 1024].numpy()
                arrays[f"{name}, chain"] = torch.stack([torch.full((), self.start), *(s[0] for s in states)]).numpy()
        square = torch.cat(squares)
        rms = float(square.mean().sqrt())
        return rms, float(square.std()) / math.sqrt(len(square)) / (2 * rms)

    def reverse_error(self, sde: SDE, count: int) -> float:
        """W₂ between the samples of N reverse steps and of infinitely many, Gaussian data, exactly."""
        limit = limit_law(sde, self.data, probability_flow=False)
        return wasserstein(sampler_law(sde, self.data, "reverse_diffusion", count), limit)

    def order(self, rows: list[dict], chain: str, error: str) -> float:
        """Minus the slope of log error against log N over the larger half of the counts."""
        chosen = [row for row in rows if row["chain"] == chain][-((len(self.counts) + 1) // 2) :]
        return -float(np.polyfit(*(np.log([row[key] for row in chosen]) for key in ("steps", error)), 1)[0])

    def claims(self, rows: list[dict], orders: list[dict]) -> list[Claim]:
        names = {
            "path": "one path against the SDE's, rms",
            "marginal": "α and σ against the SDE's",
            "reverse": "reverse chain against its limit, W₂",
        }
        claims = [
            Claim(f"{row['chain']}: {names[row['error']]}: order, from 1", abs(row["order"] - 1), "<=", 0.1)
            for row in orders
        ]
        largest = max(row["marginal"] for row in rows if row["chain"] == "SMLD")
        claims.append(Claim("SMLD: σ of the chain from the SDE's", largest, "<=", 1e-12))
        deviation = max(
            abs(row["simulated"] - row["path"]) / row["simulated_se"] for row in rows if row["simulated"] is not None
        )
        claims.append(Claim("simulated paths from the exact rms, in standard errors", deviation, "<=", 4.0))
        return claims

    def table(self, numbers: Mapping) -> str:
        header = ("chain", "N", "path, rms", "simulated", "α, σ", "reverse chain, W₂")
        rows = [
            (
                row["chain"],
                row["steps"],
                f"{row['path']:.5f}",
                "" if row["simulated"] is None else f"{row['simulated']:.5f} ± {row['simulated_se']:.5f}",
                f"{row['marginal']:.1e}",
                f"{row['reverse']:.5f}",
            )
            for row in numbers["rows"]
        ]
        orders = ", ".join(f"{row['chain']} {row['error']} {row['order']:.3f}" for row in numbers["orders"])
        return (
            "Path: x_N of the chain and X_1 of the SDE with one Brownian motion. α, σ: largest difference between the "
            "chain's marginals and the SDE's. W₂: reverse diffusion on Gaussian data against infinitely many steps.\n\n"
            + markdown_table(header, rows)
            + f"\nMeasured orders: {orders}.\n"
        )

    def draw(self, result: Result) -> Figure:
        figure = new_figure(8.4, 2.8)
        *paths, ax = figure.subplots(1, 3)
        for axes, (name, chain) in zip(paths, CHAINS.items(), strict=True):
            path, states = result.arrays[f"{name}, path"], result.arrays[f"{name}, chain"]
            axes.plot(np.linspace(0, 1, len(path) + 1)[1:], path, color="0.6", linewidth=0.8, label="SDE")
            label = f"N = {len(states) - 1}"
            style = dict(color=chain.colour, markersize=3, linewidth=0.6)
            axes.plot(np.linspace(0, 1, len(states)), states, ".-", label=label, **style)
            axes.set(xlabel="t", ylabel="x", title=f"{name} on a Brownian path")
            axes.legend(fontsize=7)
        styles = {"path": "-", "marginal": ":", "reverse": "--"}
        for (name, chain), (error, style) in itertools.product(CHAINS.items(), styles.items()):
            chosen = [row for row in result.numbers["rows"] if row["chain"] == name]
            if (name, error) != ("SMLD", "marginal"):
                counts, errors = ([row[key] for row in chosen] for key in ("steps", error))
                ax.plot(counts, errors, style, color=chain.colour, label=f"{name}, {error}")
            simulated = [row for row in chosen if row["simulated"] is not None]
            ax.plot([r["steps"] for r in simulated], [r["simulated"] for r in simulated], "x", color=chain.colour)
        ax.set(xscale="log", yscale="log", xlabel="steps N", title="errors (×: path, simulated)")
        ax.legend(fontsize=6)
        return figure


def marginal_error(chain: Chain, count: int) -> float:
    """The largest difference of α or σ between N steps of the chain and the SDE, at the times k/N."""
    sde = chain.sde
    a, b = chain.steps(sde, count)
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    alpha, variance = sde.mean_coefficient(times[:1]), sde.std(times[:1]) ** 2
    largest = 0.0
    for k in range(count):
        alpha, variance = a[k] * alpha, a[k] ** 2 * variance + b[k] ** 2
        exact = sde.mean_coefficient(times[k + 1]), sde.std(times[k + 1])
        largest = max(largest, *(float((v - e).abs()) for v, e in zip((alpha, variance.sqrt()), exact, strict=True)))
    return largest
