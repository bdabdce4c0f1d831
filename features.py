"""Features of images: arrays that an extractor makes, and their cache.

An extractor maps images (B, C, H, W) to features φ (B, F) and class logits (B, K); the metrics of ``evaluation`` are
functions of those arrays. What is cached on disk carries in full the key of what it was made from. The key is checked
on reading, so that statistics of one set, size or extractor are never used for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from atomic_write import write_atomically
from splits import Split

__all__ = [
    "FeatureExtractor",
    "Features",
    "canonical",
    "check_matrix",
    "dataset_features",
    "extract_features",
    "file_stem",
    "key_digest",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N images.

    Args:
        pool: penultimate-layer features, (N, F), stored as float32.
        logits: unnormalised log-probabilities of the classes, (N, K), stored as float32.

    Raises:
        ValueError: if a shape is not as above, N differs, or a number is not finite.
    """

    pool: np.ndarray
    logits: np.ndarray

    def __post_init__(self) -> None:
        for name in ("pool", "logits"):
            values = np.asarray(getattr(self, name), dtype=np.float32)
            check_matrix(name, values)
            object.__setattr__(self, name, values)
        if len(self.pool) != len(self.logits):
            raise ValueError(f"features have {len(self.pool)} rows of pool but {len(self.logits)} of logits")

    def __len__(self) -> int:
        return len(self.pool)


class FeatureExtractor(Protocol):
    """Maps uint8 images (B, C, H, W) to ``(pool, logits)``, float tensors (B, F) and (B, K).

    ``name`` is for reports; ``key`` identifies the function computed, weights included.
    """

    name: str
    key: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def extract_features(
    extractor: FeatureExtractor, batches: Iterable[Tensor], total: int, *, progress: bool = False
) -> Features:
    """Features of ``total`` uint8 images that come in batches (B, C, H, W) of any size.

    Raises:
        ValueError: if the batches hold another number of images than ``total``, or a feature is not finite.
    """
    pools, logits, count = [], [], 0
    with tqdm(total=total, desc=f"features ({extractor.name})", unit="image", disable=not progress) as bar:
        for images in batches:
            p, z = extractor(images)
            pools.append(p.float().cpu().numpy())
            logits.append(z.float().cpu().numpy())
            count += len(images)
            bar.update(len(images))
    if count != total or total < 1:
        raise ValueError(f"features of {total} images were asked for (at least 1), but the batches hold {count}")
    return Features(np.concatenate(pools), np.concatenate(logits))


def dataset_features(
    dataset: Split,
    extractor: FeatureExtractor,
    *,
    cache_dir: str | os.PathLike[str],
    batch_size: int,
    progress: bool = False,
) -> Features:
    """Features of a whole data split, the last partial batch included, read from ``cache_dir`` when they are there.

    The file's key names the data's fingerprint, the image shape, the number of images and the extractor's key, and is
    compared on reading. A file that is damaged or holds another key is reported by a warning and computed anew.
    """
    key = {
        "data": dataset.fingerprint,
        "extractor": extractor.key,
        "image_shape": list(dataset.image_shape),
        "num_images": len(dataset),
    }
    path = Path(cache_dir) / f"features-{file_stem(dataset.name)}-{key_digest(key)}.npz"
    if path.exists():
        try:
            return _read_features(path, key)
        except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or here: the remedy is the same
            logger.warning("%s cannot be used and is computed anew: %s", path, error)

    batches = (dataset.batch(indices)[0] for indices in torch.arange(len(dataset)).split(batch_size))
    features = extract_features(extractor, batches, len(dataset), progress=progress)
    write_atomically(path, lambda file: np.savez(file, key=canonical(key), pool=features.pool, logits=features.logits))
    return features


def _read_features(path: Path, key: dict) -> Features:
    # np.load leaves open a file of its own that turns out not to be an archive.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if str(archive["key"]) != canonical(key):
            raise ValueError(f"it holds the features of {archive['key']}, not of {canonical(key)}")
        features = Features(archive["pool"], archive["logits"])
    if len(features) != key["num_images"]:
        raise ValueError(f"it holds {len(features)} images instead of {key['num_images']}")
    return features


def check_matrix(name: str, values: np.ndarray) -> None:
    """
    Raises:
        ValueError: ``values`` is not a matrix (N, dimension) of finite numbers.
    """
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape (N, dimension), not {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise ValueError(f"{name} must be finite, but {bad} of {len(values)} rows are not")


# -------------------------------------------------------------------------------------------------------- cached files


def canonical(key: dict) -> str:
    """A key as text, the same for equal keys."""
    return json.dumps(key, sort_keys=True)


def key_digest(key: dict) -> str:
    """16 hexadecimal digits of a key."""
    return hashlib.blake2b(canonical(key).encode(), digest_size=8).hexdigest()


def file_stem(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
