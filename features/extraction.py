"""Features of images: what an extractor makes, which there are, and the archives in which features are kept.

An extractor maps images (B, C, H, W) to features φ (B, F) and class logits (B, K); the metrics of ``evaluation`` are
functions of those arrays. In archives they are called ``pool_3`` and ``logits``, as score_sde_pytorch calls them, for
every extractor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data import Split
from evaluation import Features, check_matrix
from experiment.files import first_line, read_arrays
from experiment.registry import resolve
from experiment.runtime import Runtime

__all__ = [
    "FeatureExtractor",
    "canonical",
    "extract_features",
    "file_stem",
    "key_digest",
    "make_extractor",
    "read_statistics",
    "reproducible_convolutions",
    "statistics_file",
]


class FeatureExtractor(Protocol):
    """Maps uint8 images (B, C, H, W) to ``(pool, logits)``, float tensors (B, F) and (B, K).

    ``name`` is for reports; ``key`` identifies the function computed, weights included; ``dimension`` is F.
    """

    name: str
    key: str
    dimension: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def make_extractor(
    features: str,
    train: Split,
    test: Split,
    *,
    seed: int,
    cache_dir: str | os.PathLike[str],
    runtime: Runtime,
    inception_path: str = "",
    inception_sha256: str = "",
    tfhub_inception: str = "",
) -> FeatureExtractor:
    """The extractor that ``eval.features`` names.

    Args:
        features: ``inception``, ``classifier``, or the import path ``module:function`` of your own function. That is
            called with the keywords ``num_levels`` and ``device`` and returns a ``FeatureExtractor``.
        train: the set whose images are compared; a classifier learns it, and is tested on ``test``.
        seed, cache_dir, runtime: of the classifier, see ``train_classifier``.
        inception_path, inception_sha256: see ``find_weights`` and ``InceptionFeatures``.
        tfhub_inception: a folder to take Inception from, see ``TFHubFeatures``; empty: torch-fidelity's.

    Raises:
        ValueError: unknown name, or the extractor cannot be had.
    """
    from features import classifier, inception, tfgan  # which import this module

    num_levels, device = train.num_levels, runtime.torch_device

    def make_inception(**_) -> FeatureExtractor:
        if tfhub_inception:
            return tfgan.TFHubFeatures(tfhub_inception, num_levels=num_levels)
        with runtime.accelerator.main_process_first():  # it fetches them if they are not there
            weights = inception.find_weights(inception_path)
        return inception.InceptionFeatures(weights, sha256=inception_sha256, num_levels=num_levels, device=device)

    def make_classifier(**_) -> FeatureExtractor:
        return classifier.train_classifier(train, test, seed=seed, cache_dir=cache_dir, runtime=runtime)

    known = {"inception": make_inception, "classifier": make_classifier}
    return resolve(features, known, "eval.features")(num_levels=num_levels, device=device)


def extract_features(extractor: FeatureExtractor, images: Tensor, batch_size: int | None = None) -> Features:
    """Features of uint8 images (N, C, H, W), which the extractor is given in batches, by default all at once."""
    batches = [extractor(batch) for batch in images.split(batch_size or len(images))]
    pool, logits = (torch.cat(parts).float().cpu().numpy() for parts in zip(*batches, strict=True))
    return Features(pool, logits)


def statistics_file(
    dataset: Split, extractor: FeatureExtractor, cache_dir: str | os.PathLike[str], count: int
) -> tuple[Path, str]:
    """Where the features of ``count`` evenly spaced images of a split are kept, and the key that the file must carry.

    The key names the data's fingerprint, the image shape, the numbers of images and the extractor's key, so that the
    statistics of one set, size or extractor are never used for another.
    """
    key = {
        "data": dataset.fingerprint,
        "extractor": extractor.key,
        "image_shape": list(dataset.image_shape),
        "num_images": len(dataset),
    }
    if count < len(dataset):
        key["of_them"] = count
    text = canonical(key)
    return Path(cache_dir) / f"features-{file_stem(dataset.name)}-{key_digest(text)}.npz", text


def read_statistics(path: str | os.PathLike[str], dimension: int) -> np.ndarray:
    """Features of a data set from an archive in score_sde_pytorch's format: ``pool_3`` (N, F).

    The public ``cifar10_stats.npz`` and QCSBM's ``dataset_stat.npz`` are of this kind, and so is what ``--mode=stats``
    writes.

    Args:
        path: the file.
        dimension: the F of the features that it will be compared with.

    Returns:
        ``pool_3``, float32 (N, F).

    Raises:
        ValueError: there is no such file, it is damaged, has no such array, or numbers that are not finite.
    """
    try:
        arrays = read_arrays(Path(path))
        if "pool_3" not in arrays:
            raise ValueError(f"{path} has no array pool_3 (it has {', '.join(arrays) or 'nothing'})")
        pool = arrays["pool_3"]
        if pool.dtype.kind != "f" or pool.ndim != 2 or pool.shape[1] != dimension or len(pool) < 4:
            raise ValueError(
                f"{path}: pool_3 must be floating-point numbers of shape (N, {dimension}) with N of at least 4, not "
                f"{pool.dtype} of shape {pool.shape}"
            )
        check_matrix(f"{path}: pool_3", pool)
    except ValueError as error:
        raise ValueError(f"eval.stats_path: {first_line(error)}") from error
    return pool.astype(np.float32, copy=False)


def reproducible_convolutions() -> AbstractContextManager[None]:
    """On a GPU: deterministic algorithms in full float32. Without effect elsewhere."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def canonical(key: dict) -> str:
    """A key as text, the same for equal keys."""
    return json.dumps(key, sort_keys=True)


def key_digest(key: str) -> str:
    """16 hexadecimal digits of a key."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def file_stem(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
