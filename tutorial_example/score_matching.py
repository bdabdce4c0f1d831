"""Score matching: explicit, implicit, sliced and denoising losses learn one score, and differ by known constants.

Relative error: ½E‖s − s*‖² over ½E‖s*‖², mean over seeds. Losses at the model of the first seed, on fresh points.
Sources: Hyvärinen (JMLR 2005); Vincent (Neural Computation, 2011); Song, Garg, Shi, Ermon (UAI 2019).
"""

from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

import losses
from exact.distributions import GaussianMixture
from experiment.figures import COLOURS, draw_map, new_figure, plane_grid
from experiment.results import mean_and_error
from sde_lib import ScoreFunction
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator, standard_error

LOSSES = ("explicit", "implicit", "sliced", "sliced, variance reduction", "denoising")
STD = 0.3  # σ of the noise in the density
WIDTH, COUNT = 2.6, 81  # of the maps: half their width, and points along an edge


def loss_of(name: str, s: ScoreFunction, mixture: GaussianMixture, t: float, count: int, *key: int | str) -> Tensor:
    """One of ``LOSSES`` at ``count`` draws of p_t, (count,); under one key all of them are at the same points."""
    x0 = mixture.sample(count, generator("data", *key)).float()
    times = constant(x0, t)
    x = common.noised(mixture.sde, x0, times, generator("noise", *key))
    if name == "explicit":
        return losses.explicit_score_matching(s, mixture.score, x, times)
    if name == "implicit":
        return losses.implicit_score_matching(s, x, times)
    if name == "denoising":  # draws the noise that is in x once more
        return losses.denoising_score_matching(s, mixture.sde, x0, times, generator("noise", *key))
    reduced, directions = name.endswith("reduction"), generator("directions", *key)
    return losses.sliced_score_matching(s, x, times, variance_reduction=reduced, generator=directions)


def run(folder: Path, update: Update, *, n_iters: int = 1000, seeds: int = 3, test_points: int = 50_000) -> Result:
    """A seed is that of weights, data and noise; under one seed the losses share all three."""
    sde = SDES["VE"]
    mixture, t = common.three_modes(sde), float(sde.time_at_noise_ratio(torch.tensor(STD, dtype=torch.float64)))
    fisher = common.plane_integral(mixture, t, lambda x, t: (mixture.score(x, t) ** 2).sum(1))
    constants = dict.fromkeys(LOSSES, -0.5 * fisher) | {"explicit": 0.0, "denoising": -0.5 * fisher + 2 / (2 * STD**2)}

    def trained(name: str, seed: int) -> nn.Module:
        model = common.score_model(sde, "score_matching", seed)
        own = folder / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"

        def loss(step: int) -> Tensor:
            return loss_of(name, model, mixture, t, 512, seed, step).mean()

        common.train(model, loss, own, update, n_iters)
        return model

    # Train and measure: errors of the score, and how far each loss is from the explicit one.
    rows, models = [], {}
    for name in LOSSES:
        errors = []
        for seed in range(seeds):
            model = trained(name, seed)
            error = loss_of("explicit", model, mixture, t, test_points, "test")
            errors.append(float(error.mean()) / (0.5 * fisher))
            if seed == 0:
                models[name] = model
                # The same points, so that what the losses have in common drops out of the difference.
                difference = (loss_of(name, model, mixture, t, test_points, "test").detach() - error).double()
        row = {"loss": name, **dict(zip(("relative_error", "relative_error_se"), mean_and_error(errors), strict=True))}
        row |= {"loss_minus_explicit": float(difference.mean()), "loss_minus_explicit_se": standard_error(difference)}
        rows.append({**row, "constant": constants[name]})

    # What must hold.
    claims = {f"{row['loss']}: error of the score": (row["relative_error"], "<=", 0.02) for row in rows}
    for row in rows[1:]:
        deviation = abs(row["loss_minus_explicit"] - row["constant"]) / row["loss_minus_explicit_se"]
        claims[f"{row['loss']} minus explicit loss, from its constant, in standard errors"] = deviation, "<=", 4.0

    # The picture: the density, maps of the error.
    figure = new_figure(8.4, 5.2)
    field, *maps = figure.subplots(2, 3).flat
    common.draw_density(field, mixture, t, WIDTH, f"density and its score, σ = {STD}")
    x = plane_grid(0.9 * WIDTH, 10)
    field.quiver(*x.T, *mixture.score(x, constant(x, t)).T, color=COLOURS[0], width=0.006)
    x = plane_grid(WIDTH, COUNT)
    density = mixture.log_prob(x, constant(x, t)).exp().view(COUNT, COUNT)
    for ax, (name, model) in zip(maps, models.items(), strict=True):
        error = (model(x.float(), constant(x.float(), t)) - mixture.score(x, constant(x, t))).norm(dim=1)
        image = draw_map(ax, error, WIDTH, name, norm=LogNorm(0.02, 2))
        ax.contour(density, levels=[0.01], extent=image.get_extent(), colors="white", linewidths=0.7)
    figure.colorbar(image, ax=maps, label="‖s − s*‖", shrink=0.8, extend="both")
    return Result({"fisher_information": fisher, "rows": rows}, claims, figure)
