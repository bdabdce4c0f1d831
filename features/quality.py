"""FID and its relatives of samples against the training set: which features, which reference, which backend.

W/eval/sample_features.npz     features of the samples
CACHE/features-….npz           those of the training images, shared by all models of a set
CACHE/classifier-…/            the small classifier, if its features are asked for
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Split
from evaluation import Features, sample_quality
from experiment.runtime import Runtime
from features.extraction import FeatureExtractor, read_statistics, statistics_file

__all__ = ["SampleQuality"]


class SampleQuality:
    """What could fail only after hours of sampling is checked, and what is small is loaded, on construction.

    Args:
        settings: the fields of ``config.eval``.
        train_data, test_data: the set; its training half is the reference, unless ``stats_path`` is given.
        cache_dir: of features and classifier.
        runtime: device and processes.
        seed: of the classifier and of random splits.

    Raises:
        ValueError: fields that contradict each other or the data, or a file that cannot be used.
    """

    def __init__(
        self, settings: Mapping, train_data: Split, test_data: Split, cache_dir: Path, runtime: Runtime, *, seed: int
    ) -> None:
        _check(settings, train_data)
        self.settings, self.seed = settings, seed
        self.train_data, self.test_data = train_data, test_data
        self.cache_dir, self.runtime = cache_dir, runtime
        self.backend = None  # this project's own
        if settings["backend"] == "tfgan" and runtime.is_main:  # which computes the metrics
            from features.tfgan import tfgan_backend

            self.backend = tfgan_backend()
        # The classifier is trained later: that is work.
        self._extractor = None if settings["features"] == "classifier" else self._load_extractor()
        self.statistics = None
        if settings["stats_path"]:
            self.statistics = read_statistics(settings["stats_path"], self._extractor.dimension)

    @property
    def extractor(self) -> FeatureExtractor:
        """The one that the settings ask for; a classifier is trained if it is not in the cache."""
        if self._extractor is None:
            self._extractor = self._load_extractor()
        return self._extractor

    def _load_extractor(self) -> FeatureExtractor:
        settings, num_levels, device = self.settings, self.train_data.num_levels, self.runtime.torch_device
        if settings["tfhub_inception"]:
            from features.tfgan import TFHubFeatures

            return TFHubFeatures(settings["tfhub_inception"], num_levels=num_levels)
        with self.runtime.accelerator.main_process_first():
            if settings["features"] == "classifier":
                from features.classifier import train_classifier

                return train_classifier(
                    self.train_data,
                    self.test_data,
                    seed=self.seed,
                    cache_dir=self.cache_dir,
                    device=device,
                    progress=self.runtime.shows_progress,
                )
            from features.inception import InceptionFeatures, find_weights

            weights = find_weights(settings["inception_path"])
        return InceptionFeatures(weights, sha256=settings["inception_sha256"], num_levels=num_levels, device=device)

    def reference(self) -> tuple[Path, np.ndarray]:
        """The file of ``pool_3`` and ``logits`` of the images that samples are compared with, and ``pool_3`` (N, F)."""
        if self.statistics is not None:
            return Path(self.settings["stats_path"]), self.statistics
        data, extractor = self.train_data, self.extractor
        # Deviation from QCSBM, which takes as many from a shuffled set.
        count = min(self.settings["num_reference"] or len(data), len(data))
        path, key = statistics_file(data, extractor, self.cache_dir, count)

        def compute(items: range) -> dict[str, np.ndarray]:
            return _features(extractor, data.batch([i * len(data) // count for i in items])[0])

        return path, self._compute(path, key, count, compute)["pool_3"]

    def measure(self, samples: np.ndarray, path: Path, key: str) -> dict:
        """All metrics of samples, uint8 levels (N, H, W, C).

        Args:
            samples: the images.
            path: the file that keeps their features.
            key: what decides the samples.
        """
        images, extractor = torch.from_numpy(samples).permute(0, 3, 1, 2), self.extractor
        reference, real = self.reference()
        generated = self._compute(
            path, f"{key} {extractor.key}", len(images), lambda items: _features(extractor, images[list(items)])
        )
        metrics: dict = {
            "features": extractor.name,
            "feature_test_accuracy": getattr(extractor, "test_accuracy", None),
            "reference": "training images" if self.statistics is None else reference.name,
            "num_reference": len(real),
            "backend": self.settings["backend"],
        }
        if self.runtime.is_main:
            # The distances between features are in double precision, which MPS does not have.
            device = "cpu" if self.runtime.torch_device.type == "mps" else self.runtime.torch_device
            features = Features(generated["pool_3"], generated["logits"])
            metrics |= sample_quality(real, features, seed=self.seed, device=device, backend=self.backend)
        self.runtime.accelerator.wait_for_everyone()
        return metrics

    def _compute(self, path: Path, key: str, size: int, compute) -> dict[str, np.ndarray]:
        batch_size = self.settings["batch_size"]
        return self.runtime.compute(path, key, size, batch_size, compute, description=path.stem)


def _features(extractor: FeatureExtractor, images: Tensor) -> dict[str, np.ndarray]:
    pool, logits = extractor(images)
    return {"pool_3": pool.float().cpu().numpy(), "logits": logits.float().cpu().numpy()}


def _check(settings: Mapping, train_data: Split) -> None:
    if settings["num_samples"] < 4:
        raise ValueError(f"eval.num_samples={settings['num_samples']}: FID and its relatives need at least 4")
    if not settings["stats_path"] and len(train_data) < 4:
        raise ValueError(
            f"{train_data.name}: {len(train_data)} training image(s); FID and its relatives need at least 4"
        )
    if settings["tfhub_inception"] and settings["backend"] != "tfgan":
        raise ValueError(f"eval.tfhub_inception={settings['tfhub_inception']}: needs --config.eval.backend=tfgan")
    if 0 < settings["num_reference"] < 4:
        raise ValueError(
            f"eval.num_reference={settings['num_reference']}: FID and its relatives need at least 4, or 0 for all"
        )
    if settings["features"] == "classifier":
        for field in ("inception_path", "inception_sha256", "stats_path", "tfhub_inception"):
            if settings[field]:
                raise ValueError(f"eval.{field}={settings[field]}: is of Inception, but eval.features='classifier'")
        if train_data.num_classes is None:
            raise ValueError(
                f"eval.features='classifier': {train_data.name} has no labels to train it on; use "
                "--config.eval.features=inception, or --config.eval.enable_sampling=False and --mode=sample"
            )
    elif settings["tfhub_inception"] and (settings["inception_path"] or settings["inception_sha256"]):
        raise ValueError(
            f"eval.tfhub_inception={settings['tfhub_inception']}: takes the place of eval.inception_path and "
            "eval.inception_sha256; leave those empty"
        )
