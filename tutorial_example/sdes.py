"""VE, VP and sub-VP: forward simulation against the marginals, samplers of the reverse SDE against the data.

Forward, by Euler–Maruyama: how far mean and variance are from those of that chain, which follow from a recursion, in
standard errors; bias of the chain's variance. Backward, with the true score: errors of the mean in standard deviations,
of the covariance relative, of the components' weights 0.5, 0.3, 0.2.
Source: Song et al. (ICLR 2021).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from experiment.figures import new_figure
from experiment.randomness import normal_like
from sampling import PCSampler
from sde_lib import SDE, expand
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator
from tutorial_example.ddpm import moment_errors

TIMES = (0.1, 0.25, 0.5, 1.0)
SAMPLERS = {"Euler–Maruyama": ("euler_maruyama", "none"), "predictor–corrector": ("reverse_diffusion", "ald")}
"""Predictor and corrector, one step per time."""


def euler_maruyama_marginal(sde: SDE, num_steps: int) -> tuple[Tensor, Tensor]:
    """α and σ (N + 1,) of the chain x ← x − f x Δt + g √Δt z at the times k/N: what N steps make of the marginals."""
    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f, g = sde.drift_rate(times), sde.diffusion(times)
    alphas, variances = [sde.mean_coefficient(times[:1])], [sde.std(times[:1]) ** 2]
    for k in range(num_steps):
        factor = 1 - f[k : k + 1] / num_steps
        alphas.append(factor * alphas[-1])
        variances.append(factor**2 * variances[-1] + g[k : k + 1] ** 2 / num_steps)
    return torch.cat(alphas), torch.cat(variances).sqrt()


def run(folder: Path, update: Update, *, num_steps: int = 500, samples: int = 10_000) -> Result:
    forward, reverse, claims, pictures = [], [], {}, {}
    for name, sde in SDES.items():
        mixture = common.three_modes(sde)

        # Forward by Euler–Maruyama: moments against those of the chain, and of the chain against the SDE's marginals.
        source = generator("sdes", "forward", name)
        x = mixture.sample(samples, source)
        x = common.noised(sde, x, constant(x, 0.0), source)
        mean, covariance = mixture.moments(0.0)
        covariance = covariance - float(sde.std(torch.zeros(()))) ** 2 * torch.eye(2, dtype=torch.float64)
        rows, marginals = [], torch.stack(euler_maruyama_marginal(sde, num_steps), dim=1)
        for k in range(num_steps):
            t = constant(x, k / num_steps)
            drift, g = sde.drift(x, t), expand(sde.diffusion(t), x)
            x = x + drift / num_steps + g / math.sqrt(num_steps) * normal_like(x, source)
            time = (k + 1) / num_steps
            if any(abs(time - t) < 0.5 / num_steps for t in TIMES):
                alpha, std = marginals[k + 1]
                variance = (alpha**2 * covariance + std**2 * torch.eye(2, dtype=torch.float64)).diagonal()
                mean_error = (x.mean(0) - alpha * mean).abs() / (variance / len(x)).sqrt()
                # Of a sum of Gaussian parts the fourth moment is not 3σ⁴, so the error of a variance is estimated.
                centred = (x - x.mean(0)) ** 2
                variance_error = (centred.mean(0) - variance).abs() / (centred.std(0) / math.sqrt(len(x)))
                exact = mixture.moments(time)[1].diagonal()
                row = {"sde": name, "t": time, "mean_deviation": float(mean_error.max())}
                row |= {"variance_deviation": float(variance_error.max())}
                rows.append({**row, "chain_bias": float((variance / exact - 1).abs().max())})
                pictures[name, f"forward, t = {time:g}"] = x[:1500], max(3.0, 3.5 * math.sqrt(exact.max()))
        update(num_steps)
        forward += rows
        deviation = max(max(row["mean_deviation"], row["variance_deviation"]) for row in rows)
        claims[f"{name} forward: moments from those of {num_steps} steps, in standard errors"] = deviation, "<=", 4.0
        bias = max(row["chain_bias"] for row in rows)
        claims[f"{name} forward: variance of {num_steps} steps from the marginal"] = bias, "<=", 0.03

        # Backward from the prior, with the true score.
        for title, (predictor, corrector) in SAMPLERS.items():
            sampler = PCSampler(sde, predictor, corrector, num_steps=num_steps, snr=0.16)
            source = generator("sdes", "reverse", name, predictor)
            x, nfe = sampler(mixture.score, torch.empty(samples, 2, dtype=torch.float64), source)
            update(round(nfe))
            row = {"sde": name, "predictor": predictor, "corrector": corrector, "nfe": nfe}
            reverse.append({**row, **moment_errors(x, mixture)})
            pictures[name, title] = x[:1500], 3.0
    for row in reverse:
        how = f"{row['sde']} {row['predictor']}" + (" + ald" if row["corrector"] == "ald" else "")
        claims[f"{how}: error of the mean (standard deviations)"] = row["mean_error"], "<=", 0.05
        claims[f"{how}: error of the covariance"] = row["covariance_error"], "<=", 0.06
        claims[f"{how}: error of a component's weight"] = row["weight_error"], "<=", 0.02

    # The picture: a row for every SDE, forward in time, then what the samplers make of noise.
    figure = new_figure(8.4, 5.2)
    columns = [f"forward, t = {t:g}" for t in TIMES if t != 0.25] + list(SAMPLERS)
    for axes, name in zip(figure.subplots(len(SDES), len(columns)), SDES, strict=True):
        for ax, column in zip(axes, columns, strict=True):
            x, width = pictures[name, column]
            common.draw_points(ax, x, width, column if name == "VE" else "")
            ax.tick_params(labelsize=7, labelleft=True)
        axes[0].set_ylabel(f"{name}\n$x_2$")
    return Result({"forward": forward, "reverse": reverse}, claims, figure)
