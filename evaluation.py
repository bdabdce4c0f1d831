r"""How good are the samples: distances and overlaps between sets of images, measured in a feature space.

An extractor maps images (B, C, H, W) to features φ (B, F) and class logits (B, K). Every metric is a pure function of
those arrays, in float64:

- FID, the squared Fréchet (2-Wasserstein) distance of the Gaussians with the features' means and covariances,
  ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁^½ C₂ C₁^½)^½                      (Heusel et al. 2017; Dowson and Landau 1982);
- KID, the unbiased squared maximum mean discrepancy under k(x, y) = (xᵀy/F + 1)³            (Bińkowski et al. 2018);
- the inception score exp E_x KL(p(y|x) ‖ p(y))                                                (Salimans et al. 2016);
- precision and recall: the fraction of generated (real) features inside a ball that reaches from a real (generated)
  feature to its k-th nearest neighbour in its own set                                       (Kynkäänniemi et al. 2019);
- density and coverage, which use the balls around real features only                               (Naeem et al. 2020).

Where the usual Inception network makes no sense (8×8 digits, say) the features are those of a small classifier trained
here on the set's own training labels. Such numbers compare models on that set with each other; they cannot be compared
with published Inception FIDs.

Whatever is cached on disk (classifier weights, features of a data split) carries in full the key of what it was made
from. The key is checked on reading, so that statistics of one set, size or extractor are never used for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn
from tqdm import tqdm

from atomic_write import write_atomically
from datasets import Split
from randomness import seed_from, uniform

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "Features",
    "dataset_features",
    "density_coverage",
    "extract_features",
    "fid",
    "frechet_distance",
    "inception_score",
    "kid",
    "polynomial_mmd2",
    "precision_recall",
    "sample_quality",
    "train_classifier",
]

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- features of images


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
            _check_matrix(name, values)
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
    path = Path(cache_dir) / f"features-{_file_stem(dataset.name)}-{_digest(key)}.npz"
    if path.exists():
        try:
            return _read_features(path, key)
        except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or here: the remedy is the same
            logger.warning("%s cannot be used and is computed anew: %s", path, error)

    batches = (dataset.batch(indices)[0] for indices in torch.arange(len(dataset)).split(batch_size))
    features = extract_features(extractor, batches, len(dataset), progress=progress)
    write_atomically(
        path, lambda file: np.savez(file, key=_canonical(key), pool=features.pool, logits=features.logits)
    )
    return features


def _read_features(path: Path, key: dict) -> Features:
    # np.load leaves open a file of its own that turns out not to be an archive.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if str(archive["key"]) != _canonical(key):
            raise ValueError(f"it holds the features of {archive['key']}, not of {_canonical(key)}")
        features = Features(archive["pool"], archive["logits"])
    if len(features) != key["num_images"]:
        raise ValueError(f"it holds {len(features)} images instead of {key['num_images']}")
    return features


# ------------------------------------------------------------------------------------------------------------ metrics


def sample_quality(
    real: Features, generated: Features, *, seed: int, k: int = 3, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """All metrics of a generated set against a real one.

    The inception score uses 10 splits from 5000 generated images on and a single split below (its standard deviation
    over splits is then 0): splits of a few images would bias the score, which is bounded by the split's size.

    Args:
        real: features of the data, (N, F) and (N, K).
        generated: features of the samples, (M, F) and (M, K).
        seed: chooses the subsets of KID.
        k: which nearest neighbour sets the radii of precision, recall, density and coverage.
        device: where distances between features are computed.

    Returns:
        ``fid, kid, kid_se, inception_score, inception_score_std, precision, recall, density, coverage``.

    Raises:
        ValueError: if the feature dimensions differ or either set has fewer than max(k + 1, 4) images.
    """
    kid_mean, kid_se = kid(real.pool, generated.pool, seed=seed)
    score, score_std = inception_score(generated.logits, splits=10 if len(generated) >= 5000 else 1)
    precision, recall, density, coverage = _neighbourhood_overlap(real.pool, generated.pool, k, 512, device)
    return {
        "fid": fid(real.pool, generated.pool),
        "kid": kid_mean,
        "kid_se": kid_se,
        "inception_score": score,
        "inception_score_std": score_std,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    r"""Squared Fréchet distance of two Gaussians with means (F,) and covariances (F, F), of any rank.

    ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁^½ C₂ C₁^½)^½ (Dowson and Landau 1982). The last trace is the sum of the
    singular values of C₁^½ C₂^½. Unlike the square root of the product C₁C₂, or of eigenvalues that are zero up to
    rounding, this needs no regularisation and loses no digits when the covariances are singular.

    Raises:
        ValueError: if shapes disagree or a number is not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mean1, cov1, mean2, cov2))
    shapes = [a.shape for a in (mean1, cov1, mean2, cov2)]
    if mean1.ndim != 1 or shapes != [mean1.shape, 2 * mean1.shape] * 2:
        raise ValueError(f"Fréchet distance needs shapes (F,), (F, F), (F,), (F, F) with one F, not {shapes}")
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("Fréchet distance needs finite means and covariances")

    root_overlap = np.linalg.svd(_symmetric_root(cov1) @ _symmetric_root(cov2), compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * root_overlap
    return max(float(distance), 0.0)  # equal Gaussians may give zero minus rounding


def _symmetric_root(covariance: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    # Eigenvalues that are zero up to rounding would contribute their square root, 1e-8 instead of 1e-16 each.
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues.max()
    roots = np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0))
    return (vectors * roots) @ vectors.T


def fid(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, F) and (M, F) (Heusel et al. 2017, Eq. 6).

    The covariances are the unbiased ones. The distance itself is biased upwards, by an amount of order 1/N + 1/M, so
    that only values from equal numbers of samples compare.

    Raises:
        ValueError: if F differs, a set has fewer than 2 rows, or a feature is not finite.
    """
    _check_pools(real, generated, 2, "FID")
    return frechet_distance(*_mean_and_covariance(real), *_mean_and_covariance(generated))


def _mean_and_covariance(pool: np.ndarray, block: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and unbiased covariance (F, F) of rows (N, F); a block at a time is held in float64."""
    mean = pool.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((pool.shape[1], pool.shape[1]))
    for start in range(0, len(pool), block):
        centred = pool[start : start + block] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(pool) - 1)


def polynomial_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of the squared MMD of the distributions of x (N, F) and y (M, F).

    Kernel (xᵀy/F + 1)³; the estimator is the U-statistic without the diagonal terms (Gretton et al. 2012, Eq. 3),
    which may be negative.

    Raises:
        ValueError: if F differs, a set has fewer than 2 rows, or a feature is not finite.
    """
    _check_pools(x, y, 2, "MMD")
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    def kernel(inner_products: np.ndarray) -> np.ndarray:
        base = inner_products / x.shape[1] + 1
        return base * base * base  # a general power is many times slower

    def mean_off_diagonal(a: np.ndarray) -> float:
        diagonal = kernel(np.einsum("ij,ij->i", a, a))
        return (kernel(a @ a.T).sum() - diagonal.sum()) / (len(a) * (len(a) - 1))

    return float(mean_off_diagonal(x) + mean_off_diagonal(y) - 2 * kernel(x @ y.T).mean())


def kid(
    real: np.ndarray, generated: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int
) -> tuple[float, float]:
    r"""Kernel distance of features (N, F) and (M, F), and its standard error (Bińkowski et al. 2018).

    The mean of ``polynomial_mmd2`` over random subsets drawn without replacement. A subset never takes more than half
    of the smaller set: small sets shrink it to that, because the error is estimated from how subsets differ.

    Subsets of n out of N overlap, so the spread v (a variance) over B subsets understates the error of their mean. The
    variance of the mean is estimated as v (n/(N − n) + 1/B), N the smaller set: the delete-d jackknife (Shao and Wu
    1989, d = N − n) and the choice of subsets. It errs on the large side, up to about a factor of two in the standard
    error, when the two distributions are equal or the sets differ much in size.

    Raises:
        ValueError: if F differs, a set has fewer than 4 rows, a feature is not finite, ``num_subsets`` < 2 or
            ``subset_size`` < 2.
    """
    _check_pools(real, generated, 4, "KID")
    if num_subsets < 2 or subset_size < 2:
        raise ValueError(f"KID needs num_subsets and subset_size of at least 2, not {num_subsets} and {subset_size}")
    smaller = min(len(real), len(generated))
    size = min(subset_size, smaller // 2)
    generator = torch.Generator().manual_seed(seed_from(seed, "kid"))

    def subset(pool: np.ndarray) -> np.ndarray:
        return pool[torch.randperm(len(pool), generator=generator)[:size].numpy()]

    values = np.array([polynomial_mmd2(subset(real), subset(generated)) for _ in range(num_subsets)])
    variance = values.var(ddof=1) * (size / (smaller - size) + 1 / num_subsets)
    return float(values.mean()), float(np.sqrt(variance))


def inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ E_x p(y|x)) from logits (N, K): mean and standard deviation over ``splits`` (Salimans et
    al. 2016).

    The splits are contiguous, so the rows must not be sorted by class. The score lies between 1 and K.

    Raises:
        ValueError: if ``splits`` is not between 1 and N, or a logit is not finite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    _check_matrix("logits", logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"inception score: splits must be between 1 and the {len(logits)} images, not {splits}")
    log_p = log_softmax(logits, axis=1)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        # In logarithms throughout: a class whose probability underflows everywhere must contribute 0, not 0 · ∞.
        log_marginal = logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_marginal), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = 3,
    block: int = 512,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Improved precision and recall of features (N, F) and (M, F) (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

    Precision: the fraction of generated features within a real feature's distance to its k-th nearest real neighbour.
    Recall: the same with the roles exchanged. Distances are computed for ``block`` rows at a time against a whole set,
    so that memory grows as block · max(N, M) numbers.

    Raises:
        ValueError: if F differs, a set has fewer than k + 1 rows, a feature is not finite, or k < 1.
    """
    return _neighbourhood_overlap(real, generated, k, block, device)[:2]


def density_coverage(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = 3,
    block: int = 512,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Density and coverage of features (N, F) and (M, F) (Naeem et al. 2020).

    Density: in how many real balls a generated feature lies, on average, divided by k; equal distributions give 1, and
    more is possible. Coverage: the fraction of real balls that hold any generated feature; equal distributions with
    N = M give about 1 − 2^−k. The balls, memory and errors are those of :func:`precision_recall`.
    """
    return _neighbourhood_overlap(real, generated, k, block, device)[2:]


def _neighbourhood_overlap(
    real: np.ndarray, generated: np.ndarray, k: int, block: int, device: torch.device | str
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage from one pass over the distances between the two sets."""
    if k < 1:
        raise ValueError(f"precision and recall: k must be at least 1, not {k}")
    _check_pools(real, generated, k + 1, f"precision and recall with k = {k}")
    x = torch.from_numpy(np.asarray(real, dtype=np.float64)).to(device)
    y = torch.from_numpy(np.asarray(generated, dtype=np.float64)).to(device)
    centre = x.mean(0)  # distances come from inner products, which cancel less near the origin
    x, y = x - centre, y - centre
    # Distances that are equal in exact arithmetic must compare as equal (a sample may be a copy of a neighbour, or
    # many may coincide): radii are rounded up and distances down by the rounding error of an inner product.
    rounding = 2 * x.shape[1] * torch.finfo(torch.float64).eps

    def squared_radii(points: Tensor) -> Tensor:
        radii = []
        for start in range(0, len(points), block):
            distances = _squared_distances(points[start : start + block], points, 1 + rounding)
            rows = torch.arange(len(distances), device=points.device)
            distances[rows, start + rows] = torch.inf  # a point is not its own neighbour
            radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
        return torch.cat(radii)

    real_radii, generated_radii = squared_radii(x), squared_radii(y)
    inside_any_real = balls_entered = 0
    real_inside_any = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    real_covered = torch.zeros_like(real_inside_any)
    for start in range(0, len(y), block):
        distances = _squared_distances(y[start : start + block], x, 1 - rounding)
        in_real_ball = distances <= real_radii
        inside_any_real += int(in_real_ball.any(1).sum())
        balls_entered += int(in_real_ball.sum())
        real_covered |= in_real_ball.any(0)
        real_inside_any |= (distances <= generated_radii[start : start + block, None]).any(0)
    return (
        inside_any_real / len(y),
        float(real_inside_any.double().mean()),
        balls_entered / (k * len(y)),
        float(real_covered.double().mean()),
    )


def _squared_distances(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor · (‖aᵢ‖² + ‖bⱼ‖²) − 2 aᵢᵀbⱼ for rows (N, F) and (M, F): squared distances (N, M) when the factor is 1."""
    sums = factor * (a.square().sum(1)[:, None] + b.square().sum(1))
    return sums.addmm_(a, b.T, alpha=-2)


def _check_pools(first: np.ndarray, second: np.ndarray, minimum: int, metric: str) -> None:
    for values in (first, second):
        _check_matrix("features", values)
        if len(values) < minimum:
            raise ValueError(f"{metric} needs at least {minimum} images in each set, not {len(values)}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{metric}: feature dimensions differ, {first.shape[1]} and {second.shape[1]}")


def _check_matrix(name: str, values: np.ndarray) -> None:
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape (N, dimension), not {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise ValueError(f"{name} must be finite, but {bad} of {len(values)} rows are not")


# --------------------------------------------------------------------------------------------- classifier for features

# A change to the network or to its training must change this number: it is part of the cache key.
_CLASSIFIER_VERSION = 1
_WIDTH = 64
_BATCH = 64
_IMAGES_SEEN = 100_000
_PEAK_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-2


class _Classifier(nn.Module):
    """A small convolutional network: (B, C, H, W) in [−1, 1] -> pooled features (B, 64) and logits (B, K).

    Strided convolutions halve the image until it is about 4×4, so that digits (8×8) and CIFAR-10 (32×32) end alike.
    """

    def __init__(self, image_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())

        stages = [stage(channels, _WIDTH // 2, stride=1)]
        outputs, size = _WIDTH // 2, max(height, width)
        while size > 4:
            stages.append(stage(outputs, _WIDTH, stride=2))
            outputs, size = _WIDTH, (size + 1) // 2
        stages.append(stage(outputs, _WIDTH, stride=1))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(_WIDTH, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.stages(x).mean((2, 3))
        return pool, self.head(pool)


class ClassifierFeatures:
    """A trained classifier as feature extractor: uint8 images (B, C, H, W) -> pooled features (B, 64), logits (B, K).

    Made by :func:`train_classifier`.

    Attributes:
        name: for reports.
        key: names the data, architecture, training settings and a hash of the weights. The hash matters because the
            same training on another device or library version gives slightly different weights.
        test_accuracy: fraction of the test split classified correctly.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        key: str,
        test_accuracy: float,
        image_shape: tuple[int, int, int],
        num_levels: int,
        device: torch.device | str,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.name = name
        self.key = key
        self.test_accuracy = test_accuracy
        self.image_shape = tuple(image_shape)
        self.num_levels = num_levels
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch.

        Raises:
            ValueError: if the images are not uint8, or not of the shape and levels the classifier was trained on.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"{self.name}: images must be uint8 of shape (B, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) and int(images.max()) >= self.num_levels:
            raise ValueError(f"{self.name}: pixels must be 0 … {self.num_levels - 1}, but one is {int(images.max())}")
        with _reproducible_convolutions():
            return self.network(_scaled(images.to(self.device), self.num_levels))


def train_classifier(
    train: Split,
    test: Split,
    *,
    seed: int,
    cache_dir: str | os.PathLike[str],
    device: torch.device | str,
    progress: bool = True,
) -> ClassifierFeatures:
    """Train a small classifier on a set's own training labels, or read it from ``cache_dir``.

    AdamW with a one-cycle learning rate for 10 to 30 epochs (about 100 000 images where that lies between), on images
    shifted at random by up to an eighth of their size. Training depends on ``seed`` alone and leaves torch's global
    random state as it was. The weights (``.pt``) and their accuracy (``.json``) are cached under a key that names
    data, architecture, version of the training settings and seed; a damaged pair is reported and trained anew.

    Args:
        train: split whose labels are learned; ``test``: split whose accuracy is reported.
        seed: of initialisation, order and shifts.
        cache_dir: folder, made if missing.
        device: where to train and to evaluate.
        progress: show a progress bar.

    Raises:
        ValueError: if the set has no labels, or the two splits differ in image shape, levels or classes.
    """
    for split in (train, test):
        if split.num_classes is None:
            raise ValueError(f"dataset {split.name!r} has no labels to train a classifier on: choose other features")
    described = [(tuple(s.image_shape), s.num_levels, s.num_classes) for s in (train, test)]
    if described[0] != described[1]:
        raise ValueError(
            f"dataset {train.name!r}: (image shape, levels, classes) is {described[0]} in training but "
            f"{described[1]} in testing"
        )

    recipe = {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "image_shape": list(train.image_shape),
        "num_levels": train.num_levels,
        "num_classes": train.num_classes,
        "network": f"cnn{_WIDTH}",
        "version": _CLASSIFIER_VERSION,
        "seed": seed,
    }
    weights_path = Path(cache_dir) / f"classifier-{_file_stem(train.name)}-{_digest(recipe)}.pt"
    record_path = weights_path.with_suffix(".json")

    network = None
    if weights_path.exists():
        try:
            network, record = _read_classifier(weights_path, record_path, recipe)
        except Exception as error:  # damage shows in torch, zipfile, json or here: the remedy is the same
            logger.warning("%s cannot be used and is trained anew: %s", weights_path, error)
    if network is None:
        network = _initial_classifier(train.image_shape, train.num_classes, seed).to(device)
        _fit(network, train, seed=seed, device=device, progress=progress)
        record = {
            "recipe": recipe,
            "weights": _weights_digest(network.state_dict()),
            "test_accuracy": _accuracy(network, test, device),
        }
        state = {name: value.cpu() for name, value in network.state_dict().items()}
        write_atomically(weights_path, lambda file: torch.save(state, file))
        write_atomically(record_path, lambda file: file.write(json.dumps(record, indent=2).encode()))
        logger.info("trained %s: test accuracy %.4f", weights_path.stem, record["test_accuracy"])
    return ClassifierFeatures(
        network,
        name=f"classifier-{_file_stem(train.name)}",
        key=f"classifier-{_digest(recipe)}-{record['weights']}",
        test_accuracy=record["test_accuracy"],
        image_shape=train.image_shape,
        num_levels=train.num_levels,
        device=device,
    )


def _initial_classifier(image_shape: Sequence[int], num_classes: int, seed: int) -> _Classifier:
    # Constructing modules draws from the global stream: fork it, and seed the CPU's generator alone (the function
    # torch.manual_seed would reseed every accelerator as well).
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_from(seed, "classifier weights"))
        return _Classifier(image_shape, num_classes)


def _read_classifier(weights_path: Path, record_path: Path, recipe: dict) -> tuple[_Classifier, dict]:
    record = json.loads(record_path.read_text())
    if record["recipe"] != recipe:
        raise ValueError(f"it was trained as {record['recipe']}, not as {recipe}")
    state = torch.load(weights_path, map_location="cpu", weights_only=True)
    if _weights_digest(state) != record["weights"]:
        raise ValueError(f"the weights are not those of {record_path.name}")
    network = _initial_classifier(recipe["image_shape"], recipe["num_classes"], recipe["seed"])
    network.load_state_dict(state)
    return network, record


def _fit(network: nn.Module, train: Split, *, seed: int, device: torch.device | str, progress: bool) -> None:
    epochs = min(max(round(_IMAGES_SEEN / len(train)), 10), 30)
    steps = epochs * -(-len(train) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed_from(seed, "classifier training"))
    network.train()
    with (
        _reproducible_convolutions(),
        tqdm(total=steps, desc="feature classifier", unit="step", disable=not progress) as bar,
    ):
        for _ in range(epochs):
            for indices in torch.randperm(len(train), generator=generator).split(_BATCH):
                images, labels = train.batch(indices)
                x = _shifted(_scaled(images.to(device), train.num_levels), generator)
                _, logits = network(x)
                loss = F.cross_entropy(logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    network.eval()


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) moved by its own offset of at most an eighth of its size; edges are repeated."""
    batch, channels, height, width = x.shape
    reach = min(height, width) // 8
    offsets = (uniform((batch, 2), generator, device=x.device) * (2 * reach + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def _accuracy(network: nn.Module, split: Split, device: torch.device | str) -> float:
    correct = 0
    with _reproducible_convolutions():
        for indices in torch.arange(len(split)).split(512):
            images, labels = split.batch(indices)
            _, logits = network(_scaled(images.to(device), split.num_levels))
            correct += int((logits.argmax(1) == labels.to(device)).sum())
    return correct / len(split)


def _scaled(images: Tensor, num_levels: int) -> Tensor:
    """Levels 0 … num_levels − 1 to [−1, 1]."""
    return images.float() * (2 / (num_levels - 1)) - 1


def _reproducible_convolutions() -> AbstractContextManager[None]:
    """On a GPU: deterministic algorithms in full float32. Without effect elsewhere."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


# -------------------------------------------------------------------------------------------------------- cached files


def _canonical(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(key: dict) -> str:
    return hashlib.blake2b(_canonical(key).encode(), digest_size=8).hexdigest()


def _weights_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _file_stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
