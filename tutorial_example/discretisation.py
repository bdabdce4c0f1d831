"""SMLD and DDPM are discretised SDEs: driven by one Brownian path, they come together with order 1 in the steps N.

Path: x_N of the chain and X_1 of the SDE with one Brownian motion, rms; reverse: W₂ of reverse diffusion on Gaussian
data against infinitely many steps.
Source: Song et al. (ICLR 2021), Appendix B.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from exact.gaussian_law import Law, limit_law, sampler_law, wasserstein
from experiment.figures import COLOURS, curve_style, new_figure
from tutorial_example.common import SDES, Result, Update, generator

CHAINS = {"SMLD": SDES["VE"], "DDPM": SDES["VP"]}
COUNTS = (32, 64, 128, 256, 512, 1024, 2048)  # numbers N of steps
START = 1.5  # x_0 of all paths
DATA = Law(torch.tensor([0.5, -0.2], dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64))
ERRORS = {
    "path": "one path against the SDE's, rms",
    "reverse": "reverse chain against its limit, W₂",
}


def chain_steps(name: str, count: int) -> tuple[Tensor, Tensor]:
    """a and b (N,) of the steps x ← a x + b z of a chain, step k from time k/N to (k + 1)/N.

    SMLD: a = 1, b² = σ_{k+1}² − σ_k². DDPM: a² = 1 − β_k, b² = β_k, with the β of the ladder of N levels.
    """
    sde, times = CHAINS[name], torch.linspace(0, 1, count + 1, dtype=torch.float64)
    if name == "SMLD":
        return torch.ones(count, dtype=torch.float64), sde.transition_variance(times[:-1], times[1:]).sqrt()
    alpha_bar = sde.ladder(count).mean_coefficient ** 2
    a_squared = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return a_squared.sqrt(), (1 - a_squared).sqrt()


def path_error(name: str, count: int) -> float:
    """√E|X_1 − x_N|² in one dimension from x_0, exactly.

    Both are x_0 times a constant plus a stochastic integral: X_1 has the kernel h(u) = g(u) α(1)/α(u), the chain one
    that is constant, c_k, on every step. The rest is ∫(h − c)² du, by Gauss–Legendre quadrature in every step.
    """
    sde, (a, b) = CHAINS[name], chain_steps(name, count)
    remains = torch.cat([a.flip(0).cumprod(0).flip(0)[1:], a.new_ones(1)])
    kernel = (remains * b * math.sqrt(count))[:, None]
    nodes, weights = (torch.from_numpy(v) for v in leggauss(5))
    u = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5 * (1 + nodes)) / count
    alpha = sde.mean_coefficient(torch.ones(1, dtype=torch.float64))
    h = sde.diffusion(u) * alpha / sde.mean_coefficient(u)
    noise = ((h - kernel) ** 2 @ (0.5 * weights / count)).sum()
    return float((noise + (START * (alpha - a.prod())) ** 2).sqrt())


def simulate(name: str, count: int, paths: int, fine: int) -> tuple[Tensor, Tensor]:
    """Paths of the SDE (paths, fine) and of the chain (N + 1, paths), with common noise in ``fine`` steps."""
    sde, (a, b), source = CHAINS[name], chain_steps(name, count), generator("discretisation", name)
    dw = torch.randn(paths, fine, generator=source, dtype=torch.float64) / math.sqrt(fine)
    # X_t = α(t) (x_0 + ∫₀ᵗ g/α dW), the integrand at the middle of every fine step.
    middle = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    integral = (dw * sde.diffusion(middle) / sde.mean_coefficient(middle)).cumsum(1)
    ends = torch.linspace(0, 1, fine + 1, dtype=torch.float64)[1:]
    z = dw.view(paths, count, fine // count).sum(2) * math.sqrt(count)
    chain = [torch.full((paths,), START, dtype=torch.float64)]
    for k in range(count):
        chain.append(a[k] * chain[-1] + b[k] * z[:, k])
    return sde.mean_coefficient(ends) * (START + integral), torch.stack(chain)


def run(folder: Path, update: Update, *, fine_steps: int = 8192) -> Result:
    figure = new_figure(8.4, 2.8)
    *examples, errors = figure.subplots(1, 3)
    rows, claims = [], {}
    for k, ((name, sde), ax) in enumerate(zip(CHAINS.items(), examples, strict=True)):
        limit, own = limit_law(sde, DATA, probability_flow=False), []
        for count in COUNTS:
            row = {"chain": name, "steps": count, "path": path_error(name, count)}
            # W₂ between the samples of N reverse steps and of infinitely many, exactly.
            row["reverse"] = wasserstein(sampler_law(sde, DATA, "reverse_diffusion", count), limit)
            update(1)
            own.append(row)
        for i, (error, text) in enumerate(ERRORS.items()):
            errors.plot(COUNTS, [row[error] for row in own], label=f"{name}, {error}", **curve_style(2 * k + i))
            # Minus the slope of log error against log N over the larger half of the counts.
            half = own[-((len(COUNTS) + 1) // 2) :]
            order = -float(np.polyfit(*(np.log([row[key] for row in half]) for key in ("steps", error)), 1)[0])
            claims[f"{name}: {text}: order, from 1"] = abs(order - 1), "<=", 0.1
        path, chain = simulate(name, COUNTS[0], 1, fine_steps)
        ax.plot(np.linspace(0, 1, fine_steps), path[0], color="0.6", linewidth=0.8, label="SDE")
        times, style = np.linspace(0, 1, COUNTS[0] + 1), {"color": COLOURS[0], "markersize": 3, "linewidth": 0.6}
        ax.plot(times, chain[:, 0], ".-", label=f"N = {COUNTS[0]}", **style)
        ax.set(xlabel="t", ylabel="x", title=f"{name} on a Brownian path")
        rows += own
    errors.set(xscale="log", yscale="log", xlabel="steps N", ylabel="error", title="errors")
    handles, labels = [*map(list.__add__, ax.get_legend_handles_labels(), errors.get_legend_handles_labels())]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return Result({"rows": rows}, claims, figure)
