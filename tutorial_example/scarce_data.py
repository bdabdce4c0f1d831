"""Learned scores are wrong where data are scarce, the more so the less noise: why NCSN learns many noise levels.

Errors are unweighted means over the square, by how far log p (nats) is below its peak.
Source: Song and Ermon (NeurIPS 2019), Section 3.2.1.
"""

import itertools
import math
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from experiment.figures import draw_map, new_figure, plane_grid
from losses import denoising_score_matching
from sde_lib import VE, GeometricSigma
from tutorial_example import common
from tutorial_example.common import Result, Update, constant, generator

BINS = (0.0, 2.0, 5.0, 10.0, 20.0, math.inf)  # bounds of log(max p / p) in nats
WIDTH, COUNT = 9.0, 91  # of the maps: half their width, and points along an edge
STDS = (0.3, 3.0, 10.0)  # σ of the noise; every level has a model of its own


def run(folder: Path, update: Update, *, num_train: int = 10_000, n_iters: int = 1500) -> Result:
    sde = VE(GeometricSigma(0.1, 20.0))
    mixture = common.two_modes(sde)
    data = mixture.sample(num_train, generator("scarce_data", "data")).float()

    def trained(std: float, t: float) -> nn.Module:
        model = common.score_model(sde, "scarce_data", f"{std:g}", input_scale=5.0)

        def loss(step: int) -> Tensor:
            source = generator("scarce_data", "batch", f"{std:g}", step)
            x0 = data[torch.randint(len(data), (512,), generator=source)]
            return std**2 * denoising_score_matching(model, sde, x0, constant(x0, t), source).mean()

        common.train(model, loss, folder / f"sigma_{std:g}", update, n_iters=n_iters)
        return model

    # Train, and measure the error by the density at the point.
    x, rows, maps = plane_grid(WIDTH, COUNT), [], {}
    for std in STDS:
        t = float(sde.time_at_noise_ratio(torch.tensor(std, dtype=torch.float64)))
        learned = trained(std, t)(x.float(), constant(x.float(), t)).double()
        true, log_density = mixture.score(x, constant(x, t)), mixture.log_prob(x, constant(x, t))
        error, length, below_peak = (learned - true).norm(dim=1), true.norm(dim=1), log_density.max() - log_density
        maps[std] = error / length, below_peak
        for low, high in itertools.pairwise(BINS):
            chosen = (below_peak >= low) & (below_peak < high)
            if chosen.any():
                rms_error, rms_true = (float((v[chosen] ** 2).mean().sqrt()) for v in (error, length))
                row = {"std": std, "below_peak": [low, high if high < math.inf else None]}
                row |= {"area": float(chosen.double().mean()), "rms_error": rms_error}
                rows.append({**row, "relative_error": rms_error / rms_true})

    # What must hold.
    least, most = ([row for row in rows if row["std"] == std] for std in (STDS[0], STDS[-1]))
    ratio, worst = least[-1]["rms_error"] / least[0]["rms_error"], max(row["relative_error"] for row in most)
    claims = {f"σ = {STDS[0]:g}: error in the emptiest part over that near the peaks": (ratio, ">=", 10.0)}
    claims[f"σ = {STDS[-1]:g}: largest relative error in the square"] = worst, "<=", 0.1

    # The picture: some data, and maps of the error with lines of equal density.
    figure = new_figure(8.4, 2.6)
    points, *errors = figure.subplots(1, 1 + len(STDS))
    common.draw_points(points, data[:1000], WIDTH, f"{len(data[:1000])} of the data")
    for ax, (std, (error, below_peak)) in zip(errors, maps.items(), strict=True):
        image = draw_map(ax, error, WIDTH, f"σ = {std:g}", norm=LogNorm(0.003, 3))
        levels = {"levels": BINS[1:-1], "extent": image.get_extent()}
        ax.clabel(ax.contour(below_peak.view(COUNT, COUNT), colors="white", linewidths=0.6, **levels), fontsize=6)
    figure.colorbar(image, ax=errors, label="‖s − s*‖/‖s*‖", extend="both")
    return Result({"rows": rows}, claims, figure)
