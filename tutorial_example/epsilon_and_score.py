"""Noise prediction and score are one: s = −ε/σ and ε = −σ s, both ways, and ε as a conditional expectation.

s → ε → s in double and single precision: largest relative differences, in which rounding is 1.1e-16 and 6.0e-8; −σ s
and E[ε|x], put together from the components' posterior means of x_0: largest difference.
"""

from pathlib import Path

import torch
from torch import Tensor

from exact.distributions import GaussianMixture
from experiment.figures import COLOURS, new_figure, plane_grid
from sde_lib import expand
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator

TIMES = 12  # between the smallest time of sampling and 1
SHOWN_TIME, WIDTH = 0.1, 2.8


def to_epsilon(score: Tensor, std: Tensor) -> Tensor:
    """ε = −σ s."""
    return -expand(std, score) * score


def to_score(epsilon: Tensor, std: Tensor) -> Tensor:
    """s = −ε/σ."""
    return -epsilon / expand(std, epsilon)


def expected_noise(mixture: GaussianMixture, x: Tensor, t: float) -> Tensor:
    """E[ε|x] = (x − α E[x_0|x])/σ (B, 2), with E[x_0|x] = Σ_k r_k (m_k + α C_k (α² C_k + σ² I)⁻¹ (x − α m_k))."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = mixture.sde.mean_coefficient(time), mixture.sde.std(time)
    share, x0 = mixture.responsibilities(x, constant(x, t)), torch.zeros_like(x)
    for k, (m, c) in enumerate(zip(mixture.means, mixture.covariances, strict=True)):
        gain = alpha * c @ torch.linalg.inv(alpha**2 * c + sigma**2 * torch.eye(2, dtype=torch.float64))
        x0 += share[:, k : k + 1] * (m + (x - alpha * m) @ gain.T)
    return (x - alpha * x0) / sigma


def relative(value: Tensor, exact: Tensor) -> float:
    """The largest relative difference."""
    return float(((value - exact).abs() / exact.abs().clamp(min=1e-30)).max())


def run(folder: Path, update: Update, *, points: int = 20_000) -> Result:
    # Convert the true score at points of every time.
    rows, claims = [], {}
    for name, sde in SDES.items():
        mixture = common.three_modes(sde)
        found = []
        for t in torch.linspace(sde.sampling_eps, 1, TIMES, dtype=torch.float64).tolist():
            source = generator("epsilon_and_score", "points", repr(t))
            x0 = mixture.sample(points, source)
            time = constant(x0, t)
            x, std = common.noised(sde, x0, time, source), sde.std(time)
            score = mixture.score(x, time)
            single, single_std = score.float(), std.float()
            row = {"double": relative(to_score(to_epsilon(score, std), std), score)}
            row["single"] = relative(to_score(to_epsilon(single, single_std), single_std), single)
            row["expectation"] = float((to_epsilon(score, std) - expected_noise(mixture, x, t)).abs().max())
            found.append(row)
            update(1)
        rows.append({"sde": name, **{key: max(row[key] for row in found) for key in found[0]}})

    # What must hold.
    for row in rows:
        for text, key, bound in (
            ("s → ε → s, relative, double precision", "double", 4 * 2**-53),
            ("s → ε → s, relative, single precision", "single", 4 * 2**-24),
            ("−σ s from the mean of ε given x", "expectation", 1e-9),
        ):
            claims[f"{row['sde']}: {text}"] = row[key], "<=", bound

    # The picture: both as fields over the density.
    figure = new_figure(5.6, 2.8)
    mixture, x = common.three_modes(SDES["VP"]), plane_grid(WIDTH, 15)
    score, epsilon = mixture.score(x, constant(x, SHOWN_TIME)), expected_noise(mixture, x, SHOWN_TIME)
    for ax, field, title in zip(figure.subplots(1, 2), (score, epsilon), ("score s", "E[ε|x] = −σ s"), strict=True):
        common.draw_density(ax, mixture, SHOWN_TIME, WIDTH, f"{title}, VP, t = {SHOWN_TIME}")
        ax.quiver(*x.T, *field.T, color=COLOURS[0], width=0.006)
    return Result({"rows": rows}, claims, figure)
