"""Digits: samples and interpolation between latents, of a VP model that run_lib has trained.

Bits/dim of test images, and under a Gaussian with the mean and covariance of the training images, dequantised alike;
round trip: image → latent → image, largest error in grey levels.
"""

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.utils import make_grid

import run_lib
from data import Split
from data import format as pixels
from experiment.figures import new_figure
from experiment.randomness import SampleGenerators, uniform
from likelihood import LIKELIHOOD_EPS as EPS
from likelihood import bits_per_dim
from tutorial_example.common import Result, Update, standard_error
from tutorial_example.configs import get_config
from tutorial_example.probability_flow import follow_flow, interpolate_latents

SAMPLES, PAIRS, BETWEEN = 40, 4, 9
"""Samples that are drawn; pairs of test images that are interpolated, and images in a row of these."""


def draw_images(axes: Axes, images: Tensor, columns: int, title: str, highest: float) -> None:
    """Images (N, 1, 8, 8) with values from 0 to ``highest``, in rows."""
    canvas = make_grid(images.float(), columns, padding=1, pad_value=math.nan)[0].numpy()
    axes.imshow(canvas, cmap="gray_r", vmin=0, vmax=highest)
    axes.set(title=title, xticks=[], yticks=[])


def run(folder: Path, update: Update, *, n_iters: int = 2000, num_steps: int = 500, test_images: int = 120) -> Result:
    config = get_config()
    config.training.n_iters = n_iters
    train, test = run_lib.load_data(config)
    levels, dimension = train.num_levels, math.prod(train.shape)

    def points(split: Split, indices: Tensor, purpose: str) -> Tensor:
        """Dequantised images, as the model sees them."""
        images, generators = split.batch(indices)[0], SampleGenerators((config.seed, purpose), indices.tolist())
        x = pixels.to_unit_interval(images, levels, dequantization=uniform(images.shape, generators))
        return pixels.scale(x, config.data.centered)

    def bits(log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, dimension, math.log2(2 / levels)).double()  # of [−1, 1]

    # Train, and sample.
    run_lib.train(config, folder / "run", run_lib.Runtime(device="cpu", on_progress=update))
    score = run_lib.load(folder / "run")
    sde, drawn = score.sde, score.images.to_data(score.sample(SAMPLES, num_steps=num_steps))

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
        "bits_per_dim_se": standard_error(model_bits),
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
    figure = new_figure(8.4, 2.4)
    samples, real, rows = figure.subplots(1, 3)
    draw_images(samples, drawn, 10, f"samples, {num_steps} ancestral steps", levels - 1)
    images = train.batch(torch.arange(SAMPLES) * (len(train) // SAMPLES))[0]
    draw_images(real, images, 10, "training images", levels - 1)
    images = (decoded.transpose(0, 1).flatten(0, 1) + 1) / 2
    draw_images(rows, images, BETWEEN, "between the latents of two test images", 1)
    return Result(numbers, claims, figure)
