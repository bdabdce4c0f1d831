"""Langevin dynamics with the true and with a learned score: how its bias falls with the step size.

Errors of the mean, of the trace of the covariance (relative) and of the modes' weights 0.5, 0.3, 0.2; excess nll:
−E log p − entropy, in nats. Means over the second half of independent chains from N(0, I).
Sources: Song and Ermon (NeurIPS 2019), Algorithm 1; Roberts and Tweedie (Bernoulli, 1996), for the adjustment.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.figures import curve_style, new_figure
from losses import denoising_score_matching
from sampling import langevin_dynamics
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator, standard_error

STD = 0.3  # σ of the noise in the density
STEP_SIZES = (0.16, 0.08, 0.04, 0.02, 0.01)  # ε, in units of x²
WIDTH = 2.6


def run(folder: Path, update: Update, *, duration: float = 20.0, particles: int = 2000, n_iters: int = 3000) -> Result:
    """``duration``: of a chain, the step size ε times the number of steps."""
    sde = SDES["VE"]
    mixture, t = common.three_modes(sde), float(sde.time_at_noise_ratio(torch.tensor(STD, dtype=torch.float64)))
    (mean, covariance), entropy = mixture.moments(t), -common.plane_integral(mixture, t, mixture.log_prob)

    # Train.
    model = common.score_model(sde, "langevin")

    def loss(step: int) -> Tensor:
        source = generator("langevin", "batch", step)
        x0 = mixture.sample(512, source).float()
        return denoising_score_matching(model, sde, x0, constant(x0, t), source).mean()

    common.train(model, loss, folder / "score", update, n_iters=n_iters)

    # Sample; all kinds share starts and noise.
    rows, samples = [], {}
    kinds = {
        "true": (mixture.score, None),
        "learned": (lambda x, t: model(x.float(), t.float()).double(), None),
        "true, Metropolis-adjusted": (mixture.score, mixture.log_prob),
    }
    for kind, (score, log_density) in kinds.items():
        for size in STEP_SIZES:
            source, steps = generator("langevin", "chain", repr(size)), round(duration / size)
            x = torch.randn(particles, 2, generator=source, dtype=torch.float64)
            times, sizes = constant(x, t), [size] * steps
            chain = langevin_dynamics(score, x, times, sizes, log_density=log_density, generator=source).x
            update(steps)
            samples[kind] = chain[-1]  # in the end those of the smallest step size

            # Particles are independent, their positions in time are not: standard errors are over particles.
            late = chain[len(chain) // 2 :]
            late = late[:: max(1, len(late) // 100)]
            x = late.reshape(-1, 2)
            weights = mixture.responsibilities(x, constant(x, t)).mean(0)
            nll = -mixture.log_prob(x, constant(x, t)).view(len(late), -1).mean(0) - entropy
            row = {"score": kind, "step_size": size, "mean_error": float((x.mean(0) - mean).abs().max())}
            row["trace_error"] = float(x.T.cov().trace() / covariance.trace() - 1)
            row |= {"weights": weights.tolist(), "weight_error": float((weights - mixture.weights).abs().max())}
            rows.append({**row, "excess_nll": float(nll.mean()), "excess_nll_se": standard_error(nll)})

    # What must hold.
    by_kind, claims = {kind: [row for row in rows if row["score"] == kind] for kind in kinds}, {}
    for kind, weight_bound, trace_bound in (("true", 0.02, 0.05), ("learned", 0.03, 0.08)):
        row, where = by_kind[kind][-1], f"{kind} score, ε = {STEP_SIZES[-1]:g}"
        claims[f"{where}: error of a mode weight"] = row["weight_error"], "<=", weight_bound
        claims[f"{where}: error of the variance"] = abs(row["trace_error"]), "<=", trace_bound
    # The slope of log bias against log ε, over the step sizes at which the bias is significant.
    chosen = [row for row in by_kind["true"] if row["excess_nll"] > 4 * row["excess_nll_se"]]
    x, y = (np.log([row[key] for row in chosen]) for key in ("step_size", "excess_nll"))
    claims["true score: order in ε of the bias of −E log p"] = float(np.polyfit(x, y, 1)[0]), ">=", 0.8
    deviation = max(abs(row["excess_nll"]) / row["excess_nll_se"] for row in by_kind["true, Metropolis-adjusted"])
    claims["adjusted: bias of −E log p at any ε, in standard errors"] = deviation, "<=", 4.0

    # The picture: the samples of the smallest step size, the bias against the step size.
    figure = new_figure(8.4, 2.7)
    *maps, ax = figure.subplots(1, 3)
    for points, kind in zip(maps, ("true", "learned"), strict=True):
        common.draw_density(points, mixture, t, WIDTH)
        common.draw_points(points, samples[kind], WIDTH, f"{kind} score, ε = {STEP_SIZES[-1]:g}")
    for k, kind in enumerate(kinds):
        sizes, *bias = ([row[key] for row in by_kind[kind]] for key in ("step_size", "excess_nll", "excess_nll_se"))
        ax.errorbar(sizes, *bias, label=kind, **curve_style(k))
    ax.set(xscale="log", xlabel="step size ε", ylabel="nats", title="−E log p − entropy")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(-0.02, 2)
    ax.axhline(0, color="0.6", linewidth=0.8)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=len(kinds), frameon=False)
    return Result({"entropy": entropy, "rows": rows}, claims, figure)
