"""Score matching: explicit, implicit, sliced and denoising losses learn one score, and differ by known constants.

Relative error: ½E‖s − s*‖² over ½E‖s*‖², mean over seeds. Losses at the model of the first seed, on fresh points.
Sources: Hyvärinen (JMLR 2005); Vincent (Neural Computation, 2011); Song, Garg, Shi, Ermon (UAI 2019).
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

import losses
from exact.distributions import GaussianMixture
from experiment.figures import COLOURS, LINES, new_figure
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


def fisher_information(mixture: GaussianMixture, t: float, half_width: float = 6.0, count: int = 481) -> float:
    """E‖∇log p_t‖² by the trapezoidal rule on a grid, for densities that vanish at its border."""
    x = common.plane_grid(half_width, count)
    density = mixture.log_prob(x, constant(x, t)).exp()
    spacing = 2 * half_width / (count - 1)
    return float((density * (mixture.score(x, constant(x, t)) ** 2).sum(1)).sum()) * spacing**2


def run(folder: Path, update: Update, *, n_iters: int = 1000, seeds: int = 3, test_points: int = 50_000) -> Result:
    """A seed is that of weights, data and noise; under one seed the losses share all three."""
    sde = SDES["VE"]
    mixture, t = common.three_modes(sde), float(sde.time_at_noise_ratio(torch.tensor(STD, dtype=torch.float64)))
    fisher = fisher_information(mixture, t)
    constants = dict.fromkeys(LOSSES, -0.5 * fisher) | {"explicit": 0.0, "denoising": -0.5 * fisher + 2 / (2 * STD**2)}

    def trained(name: str, seed: int) -> tuple[nn.Module, list[dict]]:
        """A model, and the log of its training."""
        model = common.score_model(sde, "score_matching", seed)
        own = folder / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"

        def loss(step: int) -> Tensor:
            return loss_of(name, model, mixture, t, 512, seed, step).mean()

        def observe() -> dict[str, float]:
            with torch.no_grad():
                return {"score_error": float(loss_of("explicit", model, mixture, t, 2000, "watched").mean())}

        common.train(model, loss, own, update, n_iters=n_iters, observe=observe)
        return model, [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]

    # Train and measure: errors of the score, and how far each loss is from the explicit one.
    rows, curves, models = [], {}, {}
    for name in LOSSES:
        errors, logs = [], []
        for seed in range(seeds):
            model, log = trained(name, seed)
            error = loss_of("explicit", model, mixture, t, test_points, "test")
            errors.append(float(error.mean()) / (0.5 * fisher))
            logs.append([row["score_error"] / (0.5 * fisher) for row in log])
            if seed == 0:
                models[name] = model
                # The same points, so that what the losses have in common drops out of the difference.
                difference = (loss_of(name, model, mixture, t, test_points, "test").detach() - error).double()
        curves[name] = [row["step"] for row in log], 100 * np.mean(logs, axis=0)
        row = {"loss": name, **dict(zip(("relative_error", "relative_error_se"), mean_and_error(errors), strict=True))}
        row |= {"loss_minus_explicit": float(difference.mean()), "loss_minus_explicit_se": standard_error(difference)}
        rows.append({**row, "constant": constants[name]})

    # What must hold.
    claims = {f"{row['loss']}: error of the score": (row["relative_error"], "<=", 0.02) for row in rows}
    for row in rows[1:]:
        deviation = abs(row["loss_minus_explicit"] - row["constant"]) / row["loss_minus_explicit_se"]
        claims[f"{row['loss']} minus explicit loss, from its constant, in standard errors"] = deviation, "<=", 4.0

    # The picture: the density, the error during training, maps of the error.
    figure = new_figure(8.4, 5.2)
    field, progress, *maps = figure.subplots(2, 3).flat
    common.draw_density(field, mixture, t, WIDTH, f"density and its score, σ = {STD}")
    x = common.plane_grid(0.9 * WIDTH, 10)
    field.quiver(*x.T, *mixture.score(x, constant(x, t)).T, color=COLOURS[0], width=0.006)
    for (name, curve), colour, line in zip(curves.items(), COLOURS, (*LINES, "-"), strict=False):
        progress.plot(*curve, line, color=colour, label=name)
    progress.set(yscale="log", xlabel="step", ylabel="% of ½E‖s*‖²", title="½E‖s − s*‖² during training")
    progress.legend(fontsize=7, loc="upper right")
    x = common.plane_grid(WIDTH, COUNT)
    density = mixture.log_prob(x, constant(x, t)).exp().view(COUNT, COUNT)
    for ax, name in zip(maps, [name for name in LOSSES if name != "explicit"], strict=True):
        error = (models[name](x.float(), constant(x.float(), t)) - mixture.score(x, constant(x, t))).norm(dim=1)
        image = common.draw_map(ax, error, WIDTH, name, norm=LogNorm(0.02, 2))
        ax.contour(density, levels=[0.01], extent=image.get_extent(), colors="white", linewidths=0.7)
    figure.colorbar(image, ax=maps, label="‖s − s*‖", shrink=0.8, extend="both")
    return Result({"fisher_information": fisher, "rows": rows}, claims, figure)
