"""Samples of p(x_0 | y) for measurements y of test images.

Of some test images, spread over the set, a few samples each, which all have the same measurement:

    FOLDER/samples.npz       images (N, S, H, W, C), truth (N, H, W, C), input (N, H, W, C), num_levels, nfe
    FOLDER/grid.png          a row for each of up to eight images: what the measurement alone gives, up to six samples,
                             the truth
    FOLDER/metrics.json      how far the samples are from the measurement
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data import Split, evenly_spaced
from experiment.figures import new_figure, save_figure
from experiment.files import write_arrays, write_json
from experiment.randomness import SampleGenerators, normal_like
from guidance.conditions import condition_on_measurement
from guidance.measurements import LinearOperator, make_operator


class MeasuredImages:
    """Test images, their measurements, and samples given these. Checked, and small things computed, on construction.

    Args:
        score: a ``run_lib.TrainedScore``.
        sampler: what samples with it.
        train_data, test_data: the set; the training half gives the data's variance where it is needed.

    Raises:
        ValueError: the condition does not suit the images, or there are not so many of them.
        FileNotFoundError: there is no such mask or matrix.
    """

    def __init__(self, score, sampler, train_data: Split, test_data: Split) -> None:
        self.score, self.sampler, self.data = score, sampler, test_data
        self.sampling: Mapping = score.config.sampling
        count, available = self.sampling.num_images, len(test_data)
        if count > available:
            raise ValueError(f"sampling.num_images={count}: the test set has only {available}")
        # MPS has no double precision.
        device = "cpu" if score.device.type == "mps" else score.device
        self.operator: LinearOperator = make_operator(self.sampling, score.shape, device)
        self.levels, _ = test_data.batch(evenly_spaced(range(count), count, available))
        self.images = score.images.to_model(self.levels).to(score.device)
        y = self.operator(self.images)
        generator = SampleGenerators((score.config.seed, "measurement"), range(count))
        self.y = y + self.sampling.measurement_noise * normal_like(y, generator)
        self.prior_variance = math.nan
        if self.sampling.conditioning == "pigdm":
            # Of training images' pixels about the mean image, averaged over pixels.
            count = min(1000, len(train_data))
            levels, _ = train_data.batch(evenly_spaced(range(count), count, len(train_data)))
            self.prior_variance = float(score.images.to_model(levels).var(dim=0, unbiased=False).mean())
            if self.prior_variance == 0 and not self.sampling.measurement_noise:
                raise ValueError(
                    "sampling.conditioning='pigdm': the training images do not vary; give sampling.measurement_noise "
                    "> 0"
                )

    def identity(self) -> dict:
        """What is measured. What a mask or a matrix file holds, the measurement tells."""
        y = self.y.cpu().double().numpy()
        return {
            "data": self.data.fingerprint,
            "measurement": [float(y.sum()), float((y**2).sum()), list(y.shape)],
            "prior_variance": str(self.prior_variance),
        }

    def sample(self, folder: Path, settings: dict) -> None:
        """Draw the samples and write ``folder``; ``settings`` decide them, beside weights and measurement."""
        score, each = self.score, self.sampling.samples_per_image
        settings, size = {**settings, **self.identity()}, len(self.images) * each
        arrays = score.stage("measured_samples", size, settings, self._compute, large=("images",))
        if not score.runtime.is_main:
            return
        per_image = {name: values.reshape(len(self.images), each, *values.shape[1:]) for name, values in arrays.items()}
        metrics = self._metrics(per_image)
        images = score.images
        given = images.to_arrays(images.to_data(self.operator.pseudo_inverse(self.y)))
        truth = images.to_arrays(self.levels)
        levels = {} if images.num_levels is None else {"num_levels": images.num_levels}
        write_arrays(
            folder / "samples.npz",
            images=per_image["images"],
            truth=truth,
            input=given,
            **levels,
            nfe=metrics["nfe_sampling"],
        )
        if images.is_picture:
            _save_grid(folder / "grid.png", given, per_image["images"], truth, images.num_levels)
        write_json(folder / "metrics.json", metrics)

    def _compute(self, items: range) -> dict[str, np.ndarray]:
        """Samples number ``items`` (b,), of images number item // samples_per_image."""
        score = self.score
        image = torch.tensor([item // self.sampling.samples_per_image for item in items], device=score.device)
        generator = SampleGenerators((score.config.seed, "samples"), items)
        y = self.y[image]
        conditional, projection = condition_on_measurement(
            self.sampling, score.sde, score, self.operator, y, prior_variance=self.prior_variance
        )
        like = torch.zeros_like(self.images[image])
        try:
            result = self.sampler(
                conditional, like, generator, projection=projection, progress=score.runtime.shows_progress
            )
        except FloatingPointError as error:
            smaller = f"try a smaller sampling.guidance_weight={self.sampling.guidance_weight:g}, or more steps"
            raise FloatingPointError(f"{error}; {smaller}") from error
        levels = score.images.to_data(result.x)
        misfit = self.operator(result.x) - y
        rounded = self.operator(score.images.to_model(levels.cpu()).to(score.device)) - y
        return {
            "images": score.images.to_arrays(levels),
            "nfe": np.full(len(items), result.nfe),
            "misfit_squared": (misfit.double() ** 2).mean(1).cpu().numpy(),
            "misfit_squared_pixels": (rounded.double() ** 2).mean(1).cpu().numpy(),
            "y_squared": (y.double() ** 2).mean(1).cpu().numpy(),
            "error_squared": ((result.x - self.images[image]).double() ** 2).flatten(1).mean(1).cpu().numpy(),
        }

    def _metrics(self, per_image: dict[str, np.ndarray]) -> dict:
        """Measurement consistency, and distance from the truth, over all samples. Of these and of samples that were
        right, the misfit would be as large as the measurement's noise."""
        misfit, y = per_image["misfit_squared"].mean(), per_image["y_squared"].mean()
        images = self.score.images
        largest, unit = (2.0 if images.centered else 1.0), (images.num_levels or 2) - 1
        if images.num_levels is None:
            largest = float(self.images.max() - self.images.min())
        levels = per_image["images"].astype(np.float64) / unit
        return {
            "misfit_rms": float(np.sqrt(misfit)),
            "misfit_relative": float(np.sqrt(misfit / y)),
            "misfit_rms_pixels": float(np.sqrt(per_image["misfit_squared_pixels"].mean())),
            "measurement_noise": self.sampling.measurement_noise,
            "psnr": float(10 * np.log10(largest**2 / per_image["error_squared"].mean())),
            "std_of_samples": float(levels.std(axis=1).mean()),
            "nfe_sampling": float(per_image["nfe"].mean()),
            "num_images": len(self.images),
            "samples_per_image": self.sampling.samples_per_image,
        }


def _save_grid(path: Path, given: np.ndarray, samples: np.ndarray, truth: np.ndarray, num_levels: int) -> None:
    """Of up to eight images, a row each: what is given (N, H, W, C), up to six samples (N, S, H, W, C), the truth."""
    columns = {"given": given} | {f"sample {i + 1}": samples[:, i] for i in range(samples.shape[1])[:6]}
    columns["truth"] = truth
    count = min(len(truth), 8)
    figure = new_figure(0.9 * len(columns), 0.9 * count + 0.25)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for k, (title, images) in enumerate(columns.items()):
        axes[0, k].set_title(title, fontsize=8)
        for ax, image in zip(axes[:, k], images[:count], strict=True):
            ax.imshow(image.squeeze() / (num_levels - 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
    save_figure(figure, path)
