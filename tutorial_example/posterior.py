"""Inverse problems: conditional samplers against the posterior of Gaussian data, which is known.

Error of the mean: in units of how far a measurement moves it; of the covariance: relative, in the Frobenius norm;
misfit: root mean square of Ax − y.
Projection (Song et al., ICLR 2021 and 2022), DPS (Chung et al., ICLR 2023), ΠGDM (Song et al., ICLR 2023).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exact.distributions import Gaussian
from experiment.figures import COLOURS, new_figure
from experiment.randomness import normal_like
from guidance.conditions import DiffusionPosteriorSampling, MeasurementProjection, PseudoinverseGuidance
from guidance.measurements import LinearOperator, Mask, MatrixOperator
from sampling import PCSampler, Projection
from sde_lib import SDE, ScoreFunction
from tutorial_example.common import SDES, Result, Update, generator

DIMENSION, VARIANCE = 8, 0.25  # of the data; of every component
LENGTHS = (1.0, 4.0)  # correlation lengths of the data, in components
NOISE, MEASUREMENTS = 0.2, 6  # σ_y of the measurements that have noise; how many different y


def problems() -> dict[str, tuple[LinearOperator, float]]:
    """Name → A, σ_y."""
    d = DIMENSION
    pairs = torch.kron(torch.eye(d // 2, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64))
    sums = normal_like(torch.empty(3, d, dtype=torch.float64), generator("posterior", "sums")) / d**0.5
    return {
        "half of them": (Mask(torch.arange(d) < d // 2), 0.0),
        "means of pairs": (MatrixOperator(pairs, (d,)), 0.0),
        "three sums, noisy": (MatrixOperator(sums, (d,)), NOISE),
    }


def methods(
    data: Gaussian, a: LinearOperator, y: Tensor, noise: float
) -> dict[str, tuple[ScoreFunction, Projection | None]]:
    """Name → score, projection."""
    dps = DiffusionPosteriorSampling(data.sde, data.score, a, y, step_size=0.1)
    pigdm = partial(PseudoinverseGuidance, data.sde, data.score, a, y, noise)
    return {
        "projection": (data.score, MeasurementProjection(data.sde, a, y, noise)),
        "DPS, ζ = 0.1": (dps, dps),
        "ΠGDM, v = 1": (pigdm(prior_variance=1.0), None),
        "ΠGDM, v of the data": (pigdm(prior_variance=VARIANCE), None),
    }


def correlated(sde: SDE, length: float) -> Gaussian:
    """x_0 ~ N(m, C), C_ij = ¼ exp(−|i − j|/length)."""
    i = torch.arange(DIMENSION, dtype=torch.float64)
    return Gaussian(sde, 0.5 * torch.sin(i), VARIANCE * torch.exp(-(i[:, None] - i[None, :]).abs() / length))


def gaussian_posterior(data: Gaussian, operator: LinearOperator, y: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Means (K, D) and the covariance (D, D) of x_0 given y (K, m), y = A x_0 + n.

    With G = CAᵀ(ACAᵀ + σ_y² I)⁻¹ they are m + G(y − Am) and C − GAC.
    """
    a = operator(torch.eye(data.dimension, dtype=torch.float64)).T
    c = data.covariance
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64))
    return data.mean + (y - data.mean @ a.T) @ gain.T, c - gain @ a @ c


def measure(x: Tensor, means: Tensor, covariance: Tensor, prior_mean: Tensor) -> dict[str, float]:
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
    scatter = (4 * (error @ own * error).sum() / n + 2 * len(x) * (own**2).sum() / n**2).sqrt()
    mean_error = (squared / unit).sqrt()
    return {
        "mean_error": float(mean_error),
        "mean_error_se": float(scatter / unit / (2 * mean_error).clamp(min=float((scatter / unit).sqrt()))),
        "covariance_error": float((own - covariance).norm() / covariance.norm()),
    }


def run(folder: Path, update: Update, *, samples: int = 1000, num_steps: int = 300) -> Result:
    """``samples`` of x_0 for every measurement."""
    sde = SDES["VP"]
    figure = new_figure(8.4, 3.6)
    i = torch.arange(DIMENSION)

    # Measure data, sample with every method, compare with the posterior.
    rows, claims = [], {}
    sampler = PCSampler(sde, "euler_maruyama", "none", num_steps=num_steps)
    for ax, length in zip(figure.subplots(1, len(LENGTHS), sharey=True), LENGTHS, strict=True):
        data = correlated(sde, length)
        for problem, (operator, noise) in problems().items():
            source = generator("posterior", "measurements", repr(length), problem)
            y = operator(data.sample(MEASUREMENTS, source))
            y = y + noise * normal_like(y, source)
            means, covariance = gaussian_posterior(data, operator, y, noise)
            y = y.repeat_interleave(samples, 0)
            if problem == "half of them":
                mean, std = means[0], covariance.diagonal().sqrt()
                ax.fill_between(i, mean - std, mean + std, color="0.85", label="posterior, ± one standard deviation")
                ax.plot(i, mean, color="black", linewidth=1, label="posterior mean")
            for k, (method, (score, projection)) in enumerate(methods(data, operator, y, noise).items()):
                like, source = torch.empty(len(y), DIMENSION, dtype=torch.float64), generator("posterior", "samples")
                x, nfe = sampler(score, like, source, projection=projection)
                update(round(nfe))
                misfit = float(((operator(x) - y) ** 2).mean().sqrt())
                x = x.view(MEASUREMENTS, samples, DIMENSION)
                row = {"length": length, "problem": problem, "noise": noise, "method": method}
                row |= {**measure(x, means, covariance, data.mean), "misfit": misfit}
                rows.append(row)
                where = f"{problem}, correlation length {length:g}"
                if method == "ΠGDM, v of the data" and length == LENGTHS[0]:
                    claims[f"ΠGDM, {where}: error of the mean"] = row["mean_error"], "<=", 0.05
                if method == "projection" and not noise:
                    claims[f"projection, {where}: root mean square of Ax − y"] = misfit, "<=", 1e-6
                if problem == "half of them":
                    style = {"fmt": "osD^"[k], "color": COLOURS[k], "markersize": 3, "linewidth": 1, "label": method}
                    ax.errorbar(i + 0.12 * (k - 1.5), x[0].mean(0), x[0].std(0), **style)
        ax.axvline(DIMENSION / 2 - 0.5, color="0.5", linestyle=":", linewidth=1)
        ax.set(xlabel="component (left of the line: known)", title=f"correlation length {length:g}")
    figure.axes[0].set_ylabel("value")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return Result({"rows": rows}, claims, figure)
