"""Sampling of a run, unconditional or not: ``--mode=sample``.

A condition on a class, or none, gives ``eval.num_samples`` samples. A condition that measures images gives, for some
test images spread over the set, a few samples each, which all have the same measurement:

    W/samples/NAME/samples.npz       images (N, S, H, W, C), truth (N, H, W, C), input (N, H, W, C),
                                     num_levels, nfe
    W/samples/NAME/grid.png          a row per image: what the measurement alone gives, samples, the truth
    W/samples/NAME/metrics.json      how far the samples are from the measurement

Without a measurement samples.npz has images (N, H, W, C) and, if they are of classes, labels (N,). The name says with
which sampler and under which condition, and ends with a digest of all settings of sampling, which settings.json holds:
samples under other settings go to another folder.
"""

from __future__ import annotations

import contextlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from data import pixels
from experiment.files import write_atomically
from experiment.randomness import SampleGenerators, normal_like
from features.classifier import train_classifier
from features.extraction import key_digest
from guidance.conditions import CLASS_CONDITIONS, condition_on_measurement
from guidance.measurements import MEASUREMENTS, LinearOperator, make_operator
from run_evaluation import (
    compute_stage,
    load_for_evaluation,
    run_for_evaluation,
    sample_stage,
    sampling_settings,
    spread,
    weights_key,
)
from run_setup import Run, Runtime, checked, save_image_grid, write_arrays, write_text

__all__ = ["sample"]

_VARIANCE_IMAGES = 1000
"""Training images, at most, that the data's variance is estimated from."""


def sample(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> Path:
    """Draw samples from a checkpoint under ``config.sampling.condition``; return their folder.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: guidance by a measurement drove samples to infinity.
    """
    with contextlib.ExitStack() as stack:
        with checked():
            conditioning = config.sampling.conditioning
            if runtime.compile and config.sampling.condition in MEASUREMENTS and conditioning != "projection":
                raise ValueError(
                    f"--compile: not with sampling.conditioning={conditioning!r}, which differentiates "
                    "the score; a compiled network is not used for that"
                )
            run = run_for_evaluation(config, workdir, runtime, checkpoint)
            measured = _Measured(run) if config.sampling.condition in MEASUREMENTS else None
            step = load_for_evaluation(run, checkpoint)
            # Samples without a measurement are those that an evaluation draws, and are kept in the same place.
            stack.enter_context(run.alone(f"samples{_condition(config)}" if measured else "evaluation"))
        settings = json.dumps(_settings(run, measured), indent=1, sort_keys=True)
        name = f"step_{step:08d}-{_sampler(config)}{_condition(config)}-{key_digest(settings)[:8]}"
        folder = run.workdir / "samples" / name
        (measured.sample if measured else partial(_sample, run))(folder)
        if run.accelerator.is_main_process:
            write_text(folder / "settings.json", settings + "\n")
    return folder


def _sample(run: Run, folder: Path) -> None:
    """Without a measurement."""
    arrays = sample_stage(run)
    metrics = {"nfe_sampling": float(arrays["nfe"].mean()), "num_samples": len(arrays["images"])}
    if run.accelerator.is_main_process:
        extra = {"nfe": metrics["nfe_sampling"]}
        if run.config.sampling.condition in CLASS_CONDITIONS:
            extra["labels"] = run.wanted_labels(range(len(arrays["images"]))).cpu().numpy()
            metrics.update(_classified_as_wanted(run, arrays["images"], extra["labels"]))
        write_arrays(folder / "samples.npz", images=arrays["images"], num_levels=run.train_data.num_levels, **extra)
        save_image_grid(folder / "grid.png", arrays["images"], run.train_data.num_levels)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    run.accelerator.wait_for_everyone()


def _settings(run: Run, measured: _Measured | None) -> dict:
    """What makes samples of one checkpoint different, beside files that are named here."""
    config = run.config
    return {
        "seed": config.seed,
        "weights": weights_key(run.ema.model),
        "precision": run.runtime.precision,
        "sampling": sampling_settings(run),
        **({"num_samples": config.eval.num_samples} if measured is None else measured.identity()),
    }


def _sampler(config: ConfigDict) -> str:
    sampling = config.sampling
    how = f"{sampling.method}-{sampling.solver}"
    if sampling.method == "pc":
        how = f"pc-{sampling.predictor}-{sampling.corrector}"
    if sampling.method != "ode" or sampling.solver == "heun":
        how += f"-{sampling.num_steps or config.model.num_scales}"
    return how


def _condition(config: ConfigDict) -> str:
    """The condition as the end of a folder's name."""
    sampling = config.sampling
    condition = sampling.condition
    weight = f"-w{sampling.guidance_weight:g}"
    if not condition:
        return ""
    if condition in CLASS_CONDITIONS:
        return f"-{condition}{weight}" + ("" if sampling.class_label == -1 else f"-{sampling.class_label}")
    detail = {
        "inpaint": Path(sampling.mask).stem.replace(",", "_"),
        "super_resolution": sampling.factor,
        "ct": sampling.num_views,
        "linear": Path(sampling.operator).stem,
    }
    parts = [condition, *([str(detail[condition])] if condition in detail else []), sampling.conditioning]
    name = "-" + "-".join(parts) + ("" if sampling.conditioning == "projection" else weight)
    return name + (f"-noise{sampling.measurement_noise:g}" if sampling.measurement_noise else "")


def _classified_as_wanted(run: Run, images: np.ndarray, labels: np.ndarray) -> dict:
    """By the classifier of clean images whose features evaluation uses, which sampling knows nothing of."""
    cache = Path(run.runtime.cache_dir or run.workdir / "eval" / "cache")
    extractor = train_classifier(
        run.train_data, run.test_data, seed=run.config.seed, cache_dir=cache, device=run.device
    )
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(run.config.eval.batch_size)
    found = torch.cat([extractor(batch)[1].argmax(1).cpu() for batch in batches]).numpy()
    return {
        "classified_as_wanted": float((found == labels).mean()),
        "feature_test_accuracy": extractor.test_accuracy,
    }


class _Measured:
    """Test images, their measurements, and samples given these. Checked, and small things computed, on construction.

    Raises:
        ValueError: the condition does not suit the images, or there are not so many of them.
        FileNotFoundError: there is no such mask or matrix.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.sampling = run, run.config.sampling
        count, available = self.sampling.num_images, len(run.test_data)
        if count > available:
            raise ValueError(f"sampling.num_images={count}: the test set has only {available}")
        # MPS has no double precision.
        device = "cpu" if run.device.type == "mps" else run.device
        self.operator: LinearOperator = make_operator(run.config.sampling, run.train_data.image_shape, device)
        self.levels, self.labels = run.test_data.batch(spread(torch.arange(count), count, available))
        self.images = self._to_model(self.levels).to(run.device)
        y = self.operator(self.images)
        generator = SampleGenerators((run.config.seed, "measurement"), range(count))
        self.y = y + self.sampling.measurement_noise * normal_like(y, generator)
        self.prior_variance = self._data_variance() if self.sampling.conditioning == "pigdm" else math.nan
        if self.prior_variance == 0 and not self.sampling.measurement_noise:
            raise ValueError(
                "sampling.conditioning='pigdm': the training images do not vary; give sampling.measurement_noise > 0"
            )

    def sample(self, folder: Path) -> None:
        run, each = self.run, self.sampling.samples_per_image
        name = f"samples{_condition(run.config)}"
        identity = {"sampling": sampling_settings(run), **self.identity()}
        arrays = compute_stage(run, name, len(self.images) * each, identity, self._compute)
        per_image = {name: values.reshape(len(self.images), each, *values.shape[1:]) for name, values in arrays.items()}
        if run.accelerator.is_main_process:
            metrics = self._metrics(per_image)
            given = self.run.to_pixels(self.operator.pseudo_inverse(self.y)).permute(0, 2, 3, 1).cpu().numpy()
            truth = self.levels.permute(0, 2, 3, 1).numpy()
            write_arrays(
                folder / "samples.npz",
                images=per_image["images"],
                truth=truth,
                input=given,
                num_levels=run.train_data.num_levels,
                nfe=metrics["nfe_sampling"],
            )
            _save_grid(folder / "grid.png", given, per_image["images"], truth, run.train_data.num_levels)
            write_text(folder / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        run.accelerator.wait_for_everyone()

    def _compute(self, items: Tensor) -> dict[str, np.ndarray]:
        """Samples number ``items`` (b,), of images number items // samples_per_image."""
        run, image = self.run, (items // self.sampling.samples_per_image).to(self.run.device)
        generator = SampleGenerators((run.config.seed, "samples"), items.tolist())
        y = self.y[image]
        score, projection = condition_on_measurement(
            self.sampling, run.sde, run.score, self.operator, y, prior_variance=self.prior_variance
        )
        like = torch.zeros_like(self.images[image])
        result = run.sampler(score, like, generator, projection=projection, progress=run.accelerator.is_main_process)
        if not bool(result.x.isfinite().all()):
            raise FloatingPointError(
                f"samples are not finite; try a smaller sampling.guidance_weight={self.sampling.guidance_weight:g}, or "
                "more steps"
            )
        levels = run.to_pixels(result.x)
        misfit = self.operator(result.x) - y
        rounded = self.operator(self._to_model(levels.cpu()).to(run.device)) - y
        return {
            "images": levels.permute(0, 2, 3, 1).cpu().numpy(),
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
        largest = 2.0 if self.run.config.data.centered else 1.0
        return {
            "misfit_rms": float(np.sqrt(misfit)),
            "misfit_relative": float(np.sqrt(misfit / y)),
            "misfit_rms_pixels": float(np.sqrt(per_image["misfit_squared_pixels"].mean())),
            "measurement_noise": self.sampling.measurement_noise,
            "psnr": float(10 * np.log10(largest**2 / per_image["error_squared"].mean())),
            "spread": float(
                (per_image["images"].astype(np.float64) / (self.run.train_data.num_levels - 1)).std(axis=1).mean()
            ),
            "nfe_sampling": float(per_image["nfe"].mean()),
            "num_images": len(self.images),
            "samples_per_image": self.sampling.samples_per_image,
        }

    def identity(self) -> dict:
        """What is measured, and how images become numbers."""
        run = self.run
        # What a mask or a matrix file holds, the measurement tells.
        y = self.y.cpu().double().numpy()
        return {
            "data": run.test_data.fingerprint,
            "measurement": [float(y.sum()), float((y**2).sum()), list(y.shape)],
            "prior_variance": str(self.prior_variance),
            "centered": run.config.data.centered,
            "dequantized": run.config.data.uniform_dequantization,
        }

    def _to_model(self, levels: Tensor) -> Tensor:
        """Pixel levels (B, C, H, W), uint8, as model values; those of dequantised data in the middle of their cell."""
        dequantized = self.run.config.data.uniform_dequantization
        x = pixels.to_unit_interval(
            levels,
            self.run.train_data.num_levels,
            dequantization=torch.full(levels.shape, 0.5) if dequantized else None,
        )
        return pixels.scale(x, self.run.config.data.centered)

    def _data_variance(self) -> float:
        """Of a training image's pixels about the mean image, averaged over pixels."""
        data = self.run.train_data
        count = min(_VARIANCE_IMAGES, len(data))
        images, _ = data.batch(spread(torch.arange(count), count, len(data)))
        return float(self._to_model(images).var(dim=0, unbiased=False).mean())


def _save_grid(path: Path, given: np.ndarray, samples: np.ndarray, truth: np.ndarray, num_levels: int) -> None:
    """A row per image, (N, H, W, C), (N, S, H, W, C) and (N, H, W, C): given, up to six samples, truth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = samples[:8, :6]
    titles = ["given", *(f"sample {i + 1}" for i in range(samples.shape[1])), "truth"]
    rows, columns = len(samples), len(titles)
    figure = Figure(figsize=(0.9 * columns, 0.9 * rows + 0.25), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, row in enumerate(axes):
        for ax, image in zip(row, [given[i], *samples[i], truth[i]], strict=True):
            ax.imshow(image.squeeze() / (num_levels - 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))
