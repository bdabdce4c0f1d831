"""Digits: ancestral sampling and interpolation between latents, of a VP model that run_lib has trained.

Bits/dim of test images, and under a Gaussian with the mean and covariance of the training images, dequantised alike;
round trip: image → latent → image, largest error in grey levels.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import run_lib
from data import Split, pixels
from experiment.figures import new_figure
from experiment.randomness import SampleGenerators, uniform
from likelihood import LIKELIHOOD_EPS as EPS
from likelihood import bits_per_dim
from sampling import AncestralPredictor, denoise
from tutorial_example.common import Result, Update, constant
from tutorial_example.configs import get_config
from tutorial_example.probability_flow import follow_flow, interpolate_latents

TIMES = (1.0, 0.6, 0.4, 0.25, 0.1, 0.0)  # when samples are shown on their way from noise to data
SAMPLES, PAIRS, BETWEEN = 40, 4, 9
"""Samples that are drawn; pairs of test images that are interpolated, and images in a row of these."""


def draw_images(axes: Axes, images: np.ndarray, columns: int, title: str, highest: float) -> None:
    """Images (N, 8, 8) with values from 0 to ``highest``, in rows, one empty pixel between them."""
    canvas = np.full((9 * math.ceil(len(images) / columns), 9 * columns), np.nan)
    for k, image in enumerate(images):
        top, left = 9 * (k // columns), 9 * (k % columns)
        canvas[top : top + 8, left : left + 8] = image
    axes.imshow(canvas, cmap="gray_r", vmin=0, vmax=highest)
    axes.set(title=title, xticks=[], yticks=[])


def run(folder: Path, update: Update, *, n_iters: int = 2000, num_steps: int = 500, test_images: int = 120) -> Result:
    config = get_config()
    config.training.n_iters = n_iters
    train, test = run_lib.load_data(config)
    levels, dimension = train.num_levels, math.prod(train.image_shape)

    def points(split: Split, indices: Tensor, purpose: str) -> Tensor:
        """Dequantised images, as the model sees them."""
        images, generators = split.batch(indices)[0], SampleGenerators((config.seed, purpose), indices.tolist())
        x = pixels.to_unit_interval(images, levels, dequantization=uniform(images.shape, generators))
        return pixels.scale(x, config.data.centered)

    def bits(log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, dimension, num_levels=levels, centered=config.data.centered).double()

    # Train.
    run_lib.train(config, folder / "run", run_lib.Runtime(device="cpu", on_progress=update))
    score = run_lib.load(folder / "run")
    sde = score.sde

    # Ancestral sampling; the first eight samples on their way.
    generators = SampleGenerators((config.seed, "digits"), range(SAMPLES))
    predictor, way = AncestralPredictor(sde, score), []
    x = sde.prior_sample(torch.empty(SAMPLES, *train.image_shape), generators)
    times = torch.linspace(1, sde.sampling_eps, num_steps + 1).tolist()
    kept = [min(range(num_steps), key=lambda k: abs(times[k] - t)) for t in TIMES[:-1]]
    for k in range(num_steps):
        if k in kept:
            way.append(x[:8])
        x, _ = predictor.step(x, constant(x, times[k]), constant(x, times[k + 1]), generators)
    x = denoise(sde, score, x, constant(x, times[-1]))
    way.append(x[:8])

    # Bits/dim of test images, and those under a Gaussian fitted to the training images, dequantised alike.
    indices = torch.arange(test_images) * (len(test) // test_images)
    probes = SampleGenerators((config.seed, "probes"), range(test_images))
    found = score.likelihood(score, points(test, indices, "likelihood"), probes)
    model_bits = bits(found.log_prob)
    fitted, scored = (
        points(half, torch.arange(len(half)), f"gaussian, {half.name}").flatten(1).double() for half in (train, test)
    )
    gaussian = torch.distributions.MultivariateNormal(fitted.mean(0), fitted.T.cov())
    numbers = {
        "bits_per_dim": float(model_bits.mean()),
        "bits_per_dim_se": float(model_bits.std()) / math.sqrt(len(model_bits)),
        "nfe": found.nfe,
        "gaussian_bits_per_dim": float(bits(gaussian.log_prob(scored)).mean()),
    }

    # To the latents of test images, between them, and back.
    ends = points(test, torch.arange(2 * PAIRS) * (len(test) // (2 * PAIRS)), "interpolation")
    latents = follow_flow(sde, score, ends, EPS, sde.end_time)
    between = interpolate_latents(latents[:PAIRS], latents[PAIRS:], BETWEEN)
    decoded = follow_flow(sde, score, between.flatten(0, 1), sde.end_time, EPS).view_as(between)
    error = (decoded[[0, -1]] - ends.view(2, PAIRS, *ends.shape[1:])).abs().max()
    numbers["round_trip_levels"] = float(error * levels / 2)  # [−1, 1] holds all levels

    # What must hold.
    difference = numbers["bits_per_dim"] - numbers["gaussian_bits_per_dim"]
    claims = {
        "bits/dim of test images, minus those of a Gaussian": (difference, "<=", 0.0),
        "image → latent → image, largest error in grey levels": (numbers["round_trip_levels"], "<=", 0.5),
    }

    # The picture.
    figure = new_figure(8.4, 4.6)
    (drawn, real), (path, rows) = figure.subplots(2, 2)
    images = pixels.to_pixels(pixels.unscale(x, config.data.centered), levels, config.data.uniform_dequantization)
    draw_images(drawn, images[:, 0], 10, f"samples, {num_steps} ancestral steps", levels - 1)
    images = train.batch(torch.arange(SAMPLES) * (len(train) // SAMPLES))[0]
    draw_images(real, images[:, 0], 10, "training images", levels - 1)
    draw_images(path, (torch.cat(way)[:, 0] + 1) / 2, 8, "from noise to data", 1)
    path.set_yticks(9 * np.arange(len(TIMES)) + 3.5, [f"{t:g}" for t in TIMES])
    path.set_ylabel("t")
    images = (decoded[:, :, 0].transpose(0, 1).flatten(0, 1) + 1) / 2
    draw_images(rows, images, BETWEEN, "between the latents of two test images", 1)
    return Result(numbers, claims, figure)
