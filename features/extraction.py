"""Features of images: what an extractor makes, and the archives in which they are kept.

An extractor maps images (B, C, H, W) to features φ (B, F) and class logits (B, K); the metrics of ``evaluation`` are
functions of those arrays. In archives they are called ``pool_3`` and ``logits``, as score_sde_pytorch calls them, for
every extractor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Split
from experiment.files import first_line, write_atomically

__all__ = [
    "FeatureExtractor",
    "Features",
    "canonical",
    "check_matrix",
    "dataset_features",
    "extract_features",
    "file_stem",
    "key_digest",
    "read_statistics",
    "reproducible_convolutions",
    "statistics_file",
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

    ``name`` is for reports; ``key`` identifies the function computed, weights included; ``dimension`` is F.
    """

    name: str
    key: str
    dimension: int

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


def dataset_features(
    dataset: Split,
    extractor: FeatureExtractor,
    *,
    cache_dir: str | os.PathLike[str],
    batch_size: int,
    progress: bool = False,
) -> Features:
    """Features of a whole data split, the last partial batch included, read from ``cache_dir`` when they are there.

    A file that is damaged or holds another key is reported by a warning and computed anew.
    """
    path, key = statistics_file(dataset, extractor, cache_dir, len(dataset))
    if path.exists():
        try:
            return _read_features(path, key, len(dataset))
        except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or here: the remedy is the same
            logger.warning("%s cannot be used and is computed anew: %s", path, error)

    batches = (dataset.batch(indices)[0] for indices in torch.arange(len(dataset)).split(batch_size))
    features = extract_features(extractor, batches, len(dataset), progress=progress)
    write_atomically(path, lambda file: np.savez(file, key=key, pool_3=features.pool, logits=features.logits))
    return features


def _read_features(path: Path, key: str, size: int) -> Features:
    # np.load leaves open a file of its own that turns out not to be an archive.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if str(archive["key"]) != key:
            raise ValueError(f"it holds the features of {archive['key']}, not of {key}")
        features = Features(archive["pool_3"], archive["logits"])
    if len(features) != size:
        raise ValueError(f"it holds {len(features)} images instead of {size}")
    return features


def read_statistics(path: str | os.PathLike[str], dimension: int) -> np.ndarray:
    """Features of a data set from an archive in score_sde_pytorch's format: ``pool_3`` (N, F) and perhaps ``logits``.

    The public ``cifar10_stats.npz`` and QCSBM's ``dataset_stat.npz`` are of this kind, and so is what ``--mode=stats``
    writes. Logits (called ``logit`` by QCSBM) are not needed of data, but must fit where they are given.

    Args:
        path: the file.
        dimension: the F of the features that it will be compared with.

    Returns:
        ``pool_3``, float32 (N, F).

    Raises:
        ValueError: there is no such file, it is damaged, has other arrays or shapes, or numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"eval.stats_path={path}: no such file")
    try:
        # np.load leaves open a file of its own that turns out not to be an archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array, not an .npz archive")
            if "pool_3" not in archive.files:
                raise ValueError(f"it has no array pool_3 (it has {', '.join(archive.files) or 'nothing'})")
            pool = archive["pool_3"]
            shapes = {name: archive[name].shape for name in ("logits", "logit") if name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"eval.stats_path={path}: {first_line(error)}") from error
    if pool.dtype.kind != "f" or pool.ndim != 2 or pool.shape[1] != dimension or len(pool) < 4:
        raise ValueError(
            f"eval.stats_path={path}: pool_3 must be floating-point numbers of shape (N, {dimension}) with N of at "
            f"least 4, not {pool.dtype} of shape {pool.shape}"
        )
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] != len(pool):
            raise ValueError(f"eval.stats_path={path}: {name} must have shape ({len(pool)}, K), not {shape}")
    try:
        check_matrix("pool_3", pool)
    except ValueError as error:
        raise ValueError(f"eval.stats_path={path}: {error}") from None
    return pool.astype(np.float32, copy=False)


def reproducible_convolutions() -> AbstractContextManager[None]:
    """On a GPU: deterministic algorithms in full float32. Without effect elsewhere."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


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


def key_digest(key: str) -> str:
    """16 hexadecimal digits of a key."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def file_stem(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
