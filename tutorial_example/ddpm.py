"""DDPM: the ladder of β, a network that predicts ε, ancestral sampling with it and with the true score.

Errors of the mean in standard deviations, of the covariance relative, of the components' weights 0.5, 0.3, 0.2; of ε
squared, per dimension, mean over levels, beyond that of E[ε|x], the least possible.
Source: Ho, Jain, Abbeel (NeurIPS 2020).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exact.distributions import GaussianMixture
from experiment.figures import new_figure
from experiment.randomness import normal_like
from sampling import AncestralPredictor, PCSampler
from sde_lib import VP, expand
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator

LEVELS = 1000
SHOWN = (0, 100, 250, 999)  # levels whose points are drawn


def moment_errors(x: Tensor, mixture: GaussianMixture) -> dict[str, float | list[float]]:
    """How samples (B, 2) differ from p_0: mean in standard deviations, covariance relative to √(C_ii C_jj), weights of
    the components; each the largest over components."""
    x = x.double()
    mean, covariance = mixture.moments(0.0)
    std = covariance.diagonal().sqrt()
    weights = mixture.responsibilities(x, constant(x, 0.0)).mean(0)
    return {
        "mean_error": float(((x.mean(0) - mean) / std).abs().max()),
        "covariance_error": float(((x.T.cov() - covariance) / (std[:, None] * std)).abs().max()),
        "weights": weights.tolist(),
        "weight_error": float((weights - mixture.weights).abs().max()),
    }


def posterior_difference(sde: VP, levels: int) -> float:
    """How far the steps of ancestral sampling are from q(x_{i−1} | x_i, x_0) if the data are one point x_0.

    q is Ho et al.'s Eqs. 6 and 7. The largest difference of a mean or standard deviation over all levels, relative to
    the standard deviation.
    """
    ladder = sde.ladder(levels)
    x0, x = (torch.tensor(point, dtype=torch.float64).expand(levels - 1, 2) for point in ([0.7, -1.1], [-0.4, 0.9]))

    def score_of_the_point(x: Tensor, t: Tensor) -> Tensor:
        return -(x - expand(sde.mean_coefficient(t), x) * x0) / expand(sde.std(t), x) ** 2

    predictor = AncestralPredictor(sde, score_of_the_point)
    moved, mean = predictor.step(x, ladder.time[1:], ladder.time[:-1], generator("posterior"))
    std = (moved - mean) / normal_like(x, generator("posterior"))

    before, after = (ladder.mean_coefficient[part, None] ** 2 for part in (slice(None, -1), slice(1, None)))
    beta = 1 - after / before
    closed_mean = before.sqrt() * beta / (1 - after) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - after) * x
    closed_std = ((1 - before) / (1 - after) * beta).sqrt()
    return max(float((difference / closed_std).abs().max()) for difference in (mean - closed_mean, std - closed_std))


def run(folder: Path, update: Update, *, n_iters: int = 4000, samples: int = 4000) -> Result:
    sde = SDES["VP"]
    mixture, ladder = common.three_modes(sde), sde.ladder(LEVELS)
    times = ladder.time.tolist()

    # Train.
    model = common.score_model(sde, "ddpm", num_scales=LEVELS)
    loss = common.denoising_loss(model, mixture, "ddpm", "batch")
    common.train(model, loss, folder / "score", update, n_iters)

    # Sample; once more, for the picture, with the points of some levels kept.
    rows, shown = [], {}
    sampler = PCSampler(sde, "ancestral_sampling", "none", num_steps=LEVELS, num_scales=LEVELS)
    for kind, score, dtype in (("true", mixture.score, torch.float64), ("learned", model, torch.float32)):
        x, nfe = sampler(score, torch.empty(samples, 2, dtype=dtype), generator("ddpm", "samples"))
        update(round(nfe))
        rows.append({"score": kind, **moment_errors(x, mixture)})
    predictor, source = AncestralPredictor(sde, model), generator("ddpm", "reverse")
    x = sde.prior_sample(torch.empty(1000, 2), source)
    for level in reversed(range(LEVELS)):
        if level in SHOWN:
            shown[level] = x
        if level > 0:
            x, _ = predictor.step(x, constant(x, times[level]), constant(x, times[level - 1]), source)
    update(LEVELS - 1)

    # The squared error of ε beyond that of E[ε|x], per dimension.
    excess = []
    for level in torch.linspace(0, LEVELS - 1, 25).round().long().tolist():
        source = generator("ddpm", "error", level)
        x0 = mixture.sample(4000, source)
        t = constant(x0, times[level])
        (mean, std), z = sde.marginal(x0, t), normal_like(x0, source)
        x = mean + expand(std, x0) * z
        best, learned = -expand(std, x0) * mixture.score(x, t), -expand(std, x0) * model(x.float(), t.float())
        excess.append(float(((learned - best) ** 2).mean()))
    alpha_bar = ladder.mean_coefficient**2
    numbers = {
        "beta_first": float(1 - alpha_bar[0]),
        "beta_last": float(1 - alpha_bar[-1] / alpha_bar[-2]),
        "alpha_bar_last": float(alpha_bar[-1]),
        "posterior_difference": posterior_difference(sde, LEVELS),
        "epsilon_error": float(np.mean(excess)),
        "rows": rows,
    }

    # What must hold.
    claims = {
        "β_1, distance from 1e-4": (abs(numbers["beta_first"] - 1e-4), "<=", 1e-12),
        "β_N, distance from 0.02": (abs(numbers["beta_last"] - 0.02), "<=", 1e-12),
        "step of ancestral sampling from the posterior q": (numbers["posterior_difference"], "<=", 1e-9),
        "squared error of ε beyond the least possible": (numbers["epsilon_error"], "<=", 0.01),
    }
    for row in rows:
        where = f"samples, {row['score']} score: error of the"
        claims[f"{where} mean"] = row["mean_error"], "<=", 0.08
        claims[f"{where} covariance"] = row["covariance_error"], "<=", 0.1
        claims[f"{where} weights"] = row["weight_error"], "<=", 0.03

    # The picture: points on their way from noise to data.
    figure = new_figure(8.4, 2.7)
    for ax, (level, x) in zip(figure.subplots(1, len(SHOWN)), shown.items(), strict=True):
        common.draw_points(ax, x, 3.2, f"i = {level + 1}")
    return Result(numbers, claims, figure)
