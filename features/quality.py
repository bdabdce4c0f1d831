"""FID and its relatives of samples against the training set: which features, which reference, which backend.

W/eval/sample_features.npz     features of the samples
CACHE/features-….npz           those of the training images, shared by all models of a set
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data import Split, evenly_spaced
from evaluation import Features, sample_quality
from experiment.registry import resolve
from experiment.runtime import Runtime
from features.extraction import (
    FeatureExtractor,
    extract_features,
    key_digest,
    make_extractor,
    read_statistics,
    statistics_file,
)

__all__ = ["SampleQuality"]

LEAST_IMAGES = 4
"""For FID and its relatives."""


class SampleQuality:
    """What could fail only after hours of sampling is checked, and what is small is loaded, on construction.

    Args:
        settings: the fields of ``config.eval``, checked.
        train_data, test_data: the set; its training half is the reference, unless ``stats_path`` is given.
        cache_dir: of features and classifier.
        runtime: device and processes.
        seed: of the classifier and of random splits.

    Raises:
        ValueError: too few images, no labels for a classifier, or a file that cannot be used.
    """

    def __init__(
        self, settings: Mapping, train_data: Split, test_data: Split, cache_dir: Path, runtime: Runtime, *, seed: int
    ) -> None:
        if settings["num_samples"] < LEAST_IMAGES:
            raise ValueError(
                f"eval.num_samples={settings['num_samples']}: FID and its relatives need at least {LEAST_IMAGES}"
            )
        if not settings["stats_path"] and len(train_data) < LEAST_IMAGES:
            raise ValueError(
                f"{train_data.name}: {len(train_data)} training image(s); FID and its relatives need at least "
                f"{LEAST_IMAGES}"
            )
        self.classifies = settings["features"] == "classifier"
        if self.classifies and train_data.num_classes is None:
            raise ValueError(
                f"eval.features='classifier': {train_data.name} has no labels to train it on; use "
                "--config.eval.features=inception, or --config.eval.enable_sampling=False and --mode=sample"
            )
        self.settings, self.seed, self.runtime = settings, seed, runtime
        self.train_data, self.test_data, self.cache_dir = train_data, test_data, cache_dir
        self.backend = None
        if settings["backend"] != "torch" and runtime.is_main:  # which computes the metrics
            from features.tfgan import make_backend

            self.backend = make_backend(settings["backend"])
        self.metrics = {name: resolve(name, {}, "eval.metrics") for name in settings["metrics"]}
        if not self.classifies:  # to train the classifier is work, and comes later
            _ = self.extractor
        self.statistics = None
        if settings["stats_path"]:
            self.statistics = read_statistics(settings["stats_path"], self.extractor.dimension)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The one that the settings ask for; a classifier is trained if it is not in the cache."""
        names = ("inception_path", "inception_sha256", "tfhub_inception")
        return make_extractor(
            self.settings["features"],
            self.train_data,
            self.test_data,
            seed=self.seed,
            cache_dir=self.cache_dir,
            runtime=self.runtime,
            **{name: self.settings[name] for name in names},
        )

    def reference(self) -> tuple[Path, np.ndarray]:
        """The file of ``pool_3`` and ``logits`` of the images that samples are compared with, and ``pool_3`` (N, F)."""
        if self.statistics is not None:
            return Path(self.settings["stats_path"]), self.statistics
        data = self.train_data
        # Deviation from QCSBM, which takes as many from a shuffled set.
        count = min(self.settings["num_reference"] or len(data), len(data))
        path, key = statistics_file(data, self.extractor, self.cache_dir, count)

        def images(items: range) -> torch.Tensor:
            return data.batch(evenly_spaced(items, count, len(data)))[0]

        return path, self._features(path, key, count, images).pool

    def measure(self, samples: np.ndarray, path: Path, key: str, labels: np.ndarray | None = None) -> dict:
        """All metrics of samples, uint8 levels (N, H, W, C).

        Args:
            samples: the images.
            path: the file that keeps their features.
            key: what decides the samples.
            labels: the classes (N,) that were asked for, of conditional samples.
        """
        images, extractor = torch.from_numpy(samples).permute(0, 3, 1, 2), self.extractor
        reference, real = self.reference()
        key = key_digest(f"{key} {extractor.key}")
        generated = self._features(path, key, len(images), lambda items: images[list(items)])
        metrics: dict = {
            "features": extractor.name,
            "feature_test_accuracy": getattr(extractor, "test_accuracy", None),
            "reference": "training images" if self.statistics is None else reference.name,
            "num_reference": len(real),
            "backend": self.settings["backend"] if self.backend is None else self.backend.name,
        }
        if labels is not None and self.classifies:
            metrics["classified_as_wanted"] = float((generated.logits.argmax(1) == labels).mean())
        if self.runtime.is_main:
            # The distances between features are in double precision, which MPS does not have.
            device = "cpu" if self.runtime.torch_device.type == "mps" else self.runtime.torch_device
            options = dict(seed=self.seed, device=device, backend=self.backend, metrics=self.metrics)
            metrics |= sample_quality(real, generated, **options)
        self.runtime.accelerator.wait_for_everyone()
        return metrics

    def _features(self, path: Path, key: str, size: int, images) -> Features:
        def compute(items: range) -> dict[str, np.ndarray]:
            found = extract_features(self.extractor, images(items))
            return {"pool_3": found.pool, "logits": found.logits}

        batch_size = self.settings["batch_size"]
        arrays = self.runtime.compute(path, key, size, batch_size, compute, description=path.stem)
        return Features(arrays["pool_3"], arrays["logits"])
