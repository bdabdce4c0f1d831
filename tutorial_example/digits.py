"""The same on images: ancestral sampling of 8×8 digits, latents and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from run_setup import FREE_IN_EVALUATION, Run, Runtime
from torch import Tensor

import run_lib
from experiment.randomness import SampleGenerators
from likelihood import LIKELIHOOD_EPS, bits_per_dim
from sampling import AncestralPredictor, denoise

from .configs import get_config
from .flow import follow_flow, interpolate_latents
from .tutorial_figure import Claim, Result, TutorialFigure, Update, constant, markdown_table, new_figure

__all__ = ["Digits"]


@dataclass(frozen=True)
class Digits(TutorialFigure):
    """A VP model trained by ``run_lib``; its progress bar is its own.

    Args:
        n_iters: of training.
        num_steps: of ancestral sampling.
        samples: how many.
        test_images: for bits/dim.
        pairs: of test images that are interpolated, at ``between`` points.
    """

    n_iters: int = 2000
    num_steps: int = 500
    samples: int = 40
    test_images: int = 120
    pairs: int = 4
    between: int = 9

    name = "digits"
    title = "Digits: ancestral sampling and interpolation between latents"
    own_progress = True
    shown = (1.0, 0.6, 0.4, 0.25, 0.1, 0.0)

    @property
    def steps(self) -> int:
        return 0

    def compute(self, folder: Path, update: Update) -> Result:
        config, runtime = get_config(), Runtime(device="cpu")
        config.training.n_iters = self.n_iters
        run_lib.train(config, folder / "run", runtime)
        run = Run(config, folder / "run", runtime, free_fields=FREE_IN_EVALUATION)
        state = run.store.load_latest()
        run.restore_weights(state, run.store.path(state["step"]))
        arrays = self.sample(run)
        numbers = {**self.likelihood(run), "gaussian_bits_per_dim": gaussian_bits_per_dim(run)}
        numbers["round_trip_levels"], arrays["interpolated"] = self.interpolate(run)
        claims = [
            Claim(
                "bits/dim of test images, minus those of a Gaussian",
                numbers["bits_per_dim"] - numbers["gaussian_bits_per_dim"],
                "<=",
                0.0,
            ),
            Claim("image → latent → image, largest error in grey levels", numbers["round_trip_levels"], "<=", 0.5),
        ]
        return Result(numbers, claims, arrays)

    def sample(self, run: Run) -> dict[str, np.ndarray]:
        """Samples, and the first eight of them on their way; beside them images of the training set."""
        generators = SampleGenerators((run.config.seed, self.name), range(self.samples))
        predictor = AncestralPredictor(run.sde, run.score)
        x = run.sde.prior_sample(torch.empty(self.samples, *run.train_data.image_shape), generators)
        times = torch.linspace(1, run.sde.sampling_eps, self.num_steps + 1).tolist()
        kept = {min(range(self.num_steps), key=lambda k: abs(times[k] - t)): t for t in self.shown[:-1]}
        way = []
        with torch.no_grad():
            for k in range(self.num_steps):
                if k in kept:
                    way.append(x[:8].clone())
                x, _ = predictor.step(x, constant(x, times[k]), constant(x, times[k + 1]), generators)
            x = denoise(run.sde, run.score, x, constant(x, times[-1]))
        way.append(x[:8])
        real = run.train_data.batch(torch.arange(self.samples) * (len(run.train_data) // self.samples))[0]
        return {
            "samples": run.to_pixels(x).numpy(),
            "training images": real.numpy(),
            "way": torch.stack([picture.squeeze(1) for picture in way]).numpy(),
        }

    def likelihood(self, run: Run) -> dict[str, float]:
        x = self.test_points(run, self.test_images, "likelihood")
        generators = SampleGenerators((run.config.seed, "probes"), range(len(x)))
        result = run.likelihood(run.score, x, generators)
        levels = run.train_data.num_levels
        bits = bits_per_dim(result.log_prob, run.dimension, num_levels=levels, centered=True).double()
        return {
            "bits_per_dim": float(bits.mean()),
            "bits_per_dim_se": float(bits.std()) / math.sqrt(len(bits)),
            "nfe": result.nfe,
        }

    def test_points(self, run: Run, count: int, purpose: str) -> Tensor:
        """Evenly spaced, dequantised test images, as the model sees them."""
        indices = torch.arange(count) * (len(run.test_data) // count)
        generators = SampleGenerators((run.config.seed, purpose), indices.tolist())
        return run.to_model(run.test_data.batch(indices)[0], generators, dequantize=True)

    def interpolate(self, run: Run) -> tuple[float, np.ndarray]:
        """The largest error of decoded latents, in grey levels, and interpolations (pairs, between, 8, 8)."""
        x = self.test_points(run, 2 * self.pairs, "interpolation")
        latents = follow_flow(run.sde, run.score, x, LIKELIHOOD_EPS, run.sde.end_time, rtol=1e-5, atol=1e-5)
        between = interpolate_latents(latents[: self.pairs], latents[self.pairs :], self.between)
        flat = between.flatten(0, 1)
        decoded = follow_flow(run.sde, run.score, flat, run.sde.end_time, LIKELIHOOD_EPS, rtol=1e-5, atol=1e-5)
        decoded = decoded.view_as(between)
        # [−1, 1] holds all levels.
        error = (decoded[[0, -1]] - x.view(2, self.pairs, *x.shape[1:])).abs().max() * run.train_data.num_levels / 2
        return float(error), decoded.squeeze(2).transpose(0, 1).numpy()

    def table(self, numbers: Mapping) -> str:
        rows = [
            (
                f"{numbers['bits_per_dim']:.3f} ± {numbers['bits_per_dim_se']:.3f}",
                f"{numbers['gaussian_bits_per_dim']:.3f}",
                f"{numbers['nfe']:.0f}",
                f"{numbers['round_trip_levels']:.3f}",
            )
        ]
        header = ("bits/dim", "of a Gaussian", "NFE", "image → latent → image, largest error (grey levels)")
        return (
            f"VP, {self.n_iters} steps of training; {self.test_images} test images, ± standard error; Gaussian: with "
            "the mean and covariance of the training images, dequantised alike.\n\n" + markdown_table(header, rows)
        )

    def draw(self, result: Result) -> Figure:
        arrays = result.arrays
        figure = new_figure(8.4, 4.6)
        (samples, real), (way, between) = figure.subplots(2, 2)
        _tile(samples, arrays["samples"][:, 0], 10, f"samples, {self.num_steps} ancestral steps")
        _tile(real, arrays["training images"][:, 0], 10, "training images")
        frames = (arrays["way"] + 1) / 2
        _tile(way, frames.reshape(-1, 8, 8), frames.shape[1], "from noise to data", (0, 1))
        way.set_yticks(9 * np.arange(len(self.shown)) + 3.5, [f"{t:g}" for t in self.shown])
        way.set_ylabel("t")
        frames = (arrays["interpolated"] + 1) / 2
        _tile(between, frames.reshape(-1, 8, 8), self.between, "between the latents of two test images", (0, 1))
        return figure


def _tile(axes, images: np.ndarray, columns: int, title: str, limits: tuple[float, float] | None = None) -> None:
    """Images (N, H, W) in rows of ``columns``, one empty pixel between them."""
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1:]
    canvas = np.full((rows * (height + 1), columns * (width + 1)), np.nan)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    low, high = limits or (0, images.max())
    axes.imshow(canvas, cmap="gray_r", vmin=low, vmax=high)
    axes.set(title=title, xticks=[], yticks=[])


def gaussian_bits_per_dim(run: Run) -> float:
    """Bits/dim of the test set under a Gaussian fitted to the training set, both dequantised and scaled."""
    train, test = (
        run.to_model(
            split.batch(torch.arange(len(split)))[0],
            SampleGenerators((run.config.seed, f"gaussian, {split.name}"), range(len(split))),
            dequantize=True,
        )
        .flatten(1)
        .double()
        for split in (run.train_data, run.test_data)
    )
    law = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    bits = bits_per_dim(
        law.log_prob(test), run.dimension, num_levels=run.train_data.num_levels, centered=run.config.data.centered
    )
    return float(bits.mean())
