"""FID and its relatives of samples against the training set: which features, which reference, which backend.

W/eval/stages/sample_features-KEY.npz   features of the samples
CACHE/features-SET-KEY.npz              those of the training images, shared by all models of a set

In these files features (N, F) are called ``pool_3`` and logits (N, K) ``logits``, whatever the extractor, as
score_sde_pytorch calls them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data import Split, evenly_spaced
from evaluation import OWN_BACKEND, Features, check_matrix, sample_quality
from experiment.files import first_line, read_arrays
from experiment.registry import resolve
from experiment.runtime import Runtime
from features import tfgan
from features.classifier import train_classifier
from features.extraction import FeatureExtractor, extract_features, file_stem, key_digest
from features.inception import InceptionFeatures, find_weights

LEAST_IMAGES = 4
"""For FID and its relatives."""


def make_extractor(
    settings: Mapping, train: Split, test: Split, *, seed: int, cache_dir: str | Path, runtime: Runtime
) -> FeatureExtractor:
    """The extractor that ``settings['features']`` names: ``inception``, ``classifier``, or the import path of your own
    function, which is called with the keywords ``num_levels`` and ``device``.

    Args:
        settings: the fields of ``config.eval``.
        train: the set whose images are compared; a classifier learns it, and is tested on ``test``.
        seed, cache_dir, runtime: of the classifier, see ``train_classifier``.

    Raises:
        ValueError: unknown name, or the extractor cannot be had.
    """

    def inception(num_levels: int, device: torch.device) -> FeatureExtractor:
        if settings["tfhub_inception"]:
            return tfgan.TFHubFeatures(settings["tfhub_inception"], num_levels=num_levels)
        with runtime.accelerator.main_process_first():  # it fetches them if they are not there
            weights = find_weights(settings["inception_path"])
        return InceptionFeatures(weights, sha256=settings["inception_sha256"], num_levels=num_levels, device=device)

    def classifier(**_) -> FeatureExtractor:
        return train_classifier(train, test, seed=seed, cache_dir=cache_dir, runtime=runtime)

    make = resolve(settings["features"], {"inception": inception, "classifier": classifier}, "eval.features")
    return make(num_levels=train.num_levels, device=runtime.torch_device)


class SampleQuality:
    """Computes FID and its relatives. Construction checks all that is cheap to check, before hours of sampling.

    Args:
        settings: the fields of ``config.eval``, checked.
        train_data, test_data: the set; its training split is the reference, unless ``stats_path`` is given.
        cache_dir: of features and classifier.
        runtime: device and processes.
        seed: of the classifier and of random splits.

    Raises:
        ValueError: too few images, no labels for a classifier, or a file that cannot be used.
    """

    def __init__(
        self, settings: Mapping, train_data: Split, test_data: Split, cache_dir: Path, runtime: Runtime, *, seed: int
    ) -> None:
        needed = f"FID and its relatives need at least {LEAST_IMAGES}"
        if settings["num_samples"] < LEAST_IMAGES:
            raise ValueError(f"eval.num_samples={settings['num_samples']}: {needed}")
        if not settings["stats_path"] and len(train_data) < LEAST_IMAGES:
            raise ValueError(f"{train_data.name}: {len(train_data)} training image(s); {needed}")
        self.classifies = settings["features"] == "classifier"
        if self.classifies and train_data.num_classes is None:
            raise ValueError(
                f"eval.features='classifier': {train_data.name} has no labels to train it on; use "
                "--config.eval.features=inception, or --config.eval.enable_sampling=False and --mode=sample"
            )
        self.settings, self.seed, self.runtime = settings, seed, runtime
        self.train_data, self.test_data, self.cache_dir = train_data, test_data, cache_dir
        self.backend = OWN_BACKEND
        if runtime.is_main:  # which computes the metrics
            known = {"torch": lambda: OWN_BACKEND, "tfgan": tfgan.tfgan_backend}
            self.backend = resolve(settings["backend"], known, "eval.backend")()
        self.metrics = {name: resolve(name, {}, "eval.metrics") for name in settings["metrics"]}
        if not self.classifies:  # to train the classifier is work, and comes later
            _ = self.extractor
        self.statistics = None
        if settings["stats_path"]:
            size = train_data.shape[-1]
            self.statistics = _read_statistics(settings["stats_path"], self.extractor.dimension, image_size=size)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The one that the settings ask for; a classifier is trained if it is not in the cache."""
        options = dict(seed=self.seed, cache_dir=self.cache_dir, runtime=self.runtime)
        return make_extractor(self.settings, self.train_data, self.test_data, **options)

    def reference(self) -> tuple[Path, np.ndarray]:
        """The file of ``pool_3`` and ``logits`` of the images that samples are compared with, and ``pool_3`` (N, F)."""
        if self.statistics is not None:
            return Path(self.settings["stats_path"]), self.statistics
        data = self.train_data
        # Deviation from QCSBM, which takes as many from a shuffled set.
        count = min(self.settings["num_reference"] or len(data), len(data))
        identity = {
            "data": data.fingerprint,
            "extractor": self.extractor.key,
            "image_shape": list(data.shape),
            "num_images": len(data),
        }
        if count < len(data):
            identity["of_them"] = count
        key = json.dumps(identity, sort_keys=True)
        path = Path(self.cache_dir) / f"features-{file_stem(data.name)}-{key_digest(key)}.npz"

        def images(items: range) -> torch.Tensor:
            return data.batch(evenly_spaced(items, count, len(data)))[0]

        return path, self._features(path, key, count, images).pool

    def measure(
        self, samples: np.ndarray | None, count: int, folder: Path, key: str, labels: np.ndarray | None = None
    ) -> dict:
        """All metrics of samples, uint8 levels (N, H, W, C).

        Args:
            samples: the images; in another process than the main one those of its share, if it has any.
            count: N.
            folder: where their features are kept.
            key: what decides the samples.
            labels: the classes (N,) that were asked for, of conditional samples.
        """
        extractor, first = self.extractor, 0 if self.runtime.is_main else self.runtime.share(count).start

        def images(items: range) -> torch.Tensor:
            return torch.from_numpy(samples[items.start - first : items.stop - first]).permute(0, 3, 1, 2)

        reference, real = self.reference()
        key = key_digest(f"{key} {extractor.key}")
        path = folder / f"sample_features-{key}.npz"
        generated = self._features(path, key, count, images)
        metrics: dict = {
            "features": extractor.name,
            "feature_test_accuracy": getattr(extractor, "test_accuracy", None),
            "reference": "training images" if self.statistics is None else reference.name,
            "num_reference": len(real),
            "backend": self.backend.name,
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
            # Of a CPU, where a batch of Inception takes a minute, in parts, to show that something is happening.
            size = 16 if self.runtime.torch_device.type == "cpu" and not self.classifies else None
            found = extract_features(self.extractor, images(items), size, progress=self.runtime.shows_progress)
            return {"pool_3": found.pool, "logits": found.logits}

        arrays = self.runtime.compute(
            path, key, size, self.settings["batch_size"], compute, description=path.stem.rpartition("-")[0]
        )
        return Features(arrays["pool_3"], arrays["logits"])


def _read_statistics(path: str, dimension: int, *, image_size: int) -> np.ndarray:
    """``pool_3``, float32 (N, dimension), from an archive in score_sde_pytorch's format: its ``cifar10_stats.npz``,
    QCSBM's ``dataset_stat.npz``, or what ``--mode=stats`` writes; a ValueError if it is none."""
    try:
        arrays = read_arrays(Path(path))
        if "pool_3" not in arrays:
            raise ValueError(f"{path} has no array pool_3 (it has {', '.join(arrays) or 'nothing'})")
        pool = arrays["pool_3"]
        if pool.dtype.kind != "f" or pool.ndim != 2 or pool.shape[1] != dimension or len(pool) < LEAST_IMAGES:
            raise ValueError(
                f"{path}: pool_3 must be floating-point numbers of shape (N, {dimension}) with N of at least "
                f"{LEAST_IMAGES}, not {pool.dtype} of shape {pool.shape}"
            )
        if image_size >= 256 and dimension == 2048 and "key" not in arrays:
            raise ValueError(
                f"{path} is not from --mode=stats; of images of 256 pixels or more the public code's statistics are "
                "those of another Inception, TF-Hub's inception_v3, and not to be compared with ours. Leave the field "
                "empty, and they are computed"
            )
        check_matrix(f"{path}: pool_3", pool)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"eval.stats_path: {first_line(error)}") from error
    return pool.astype(np.float32, copy=False)
