"""The two distributions that a bridge joins: points in the plane, Gaussians, sets of images or one class of them.

A marginal draws samples by a key, any number of times the same ones: a run that goes on draws what it would have drawn.
Of a batch that several processes share each takes its part.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from data import Split, pixels, sets
from experiment.randomness import SampleGenerators, seed_from, uniform

from .point_sets import POINT_SETS

__all__ = ["GaussianMarginal", "ImageMarginal", "Marginal", "PointMarginal", "get_marginals", "moments"]

Key = tuple[int | str, ...]
_STANDARDISING_POINTS = 200_000
_MOMENT_SAMPLES = 2_000
_LEAST_SCALE = 1e-6


class Marginal(Protocol):
    """A distribution of x (…).

    Attributes:
        name: what tables and figures call it.
        shape: of one sample.
        sharp: whether its density has edges that noise would blur, so that the last step towards it goes without.
    """

    name: str
    shape: tuple[int, ...]
    sharp: bool

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        """The ``share`` of ``count`` draws, float32 (b, …); with ``test`` of held-out data where there are such."""
        ...


# --------------------------------------------------------------------------------------------------------- in the plane

_CORRELATED_MEAN = np.array([1.0, -0.5])
_CORRELATED_COVARIANCE = np.array([[0.9, 0.4], [0.4, 0.5]])


@cache
def _centre_and_scale(name: str) -> tuple[np.ndarray, float]:
    points = POINT_SETS[name](_STANDARDISING_POINTS, np.random.default_rng(0))
    return points.mean(0), float(points.std(0).mean())


class PointMarginal:
    """One of ``POINT_SETS``, moved and scaled to mean 0 and a mean standard deviation of ``scale`` per coordinate.

    Raises:
        ValueError: unknown name.
    """

    shape = (2,)
    sharp = True

    def __init__(self, name: str, scale: float) -> None:
        if name not in POINT_SETS:
            raise ValueError(f"data.dataset={name!r}: allowed are {', '.join(POINT_SETS)}")
        self.name, self.scale = name, scale

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        random = np.random.default_rng(seed_from(*key, "test" if test else "train"))
        centre, spread = _centre_and_scale(self.name)
        points = self.scale * (POINT_SETS[self.name](count, random) - centre) / spread
        return torch.from_numpy(points).float()[share]


class GaussianMarginal:
    """N(m, Σ) of any shape.

    Args:
        mean: m, of the shape of a sample.
        root: a matrix R (D, D) with RRᵀ = Σ, or a standard deviation for all coordinates alike.
        name: what tables and figures call it.
    """

    sharp = False

    def __init__(self, mean: Tensor, root: Tensor | float, name: str = "gaussian") -> None:
        self.mean, self.root, self.name = mean.float(), root, name
        self.shape = tuple(mean.shape)

    @property
    def covariance(self) -> Tensor:
        """Σ (D, D), float64, of a vector."""
        if isinstance(self.root, float):
            return self.root**2 * torch.eye(len(self.mean), dtype=torch.float64)
        return self.root.double() @ self.root.double().mT

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(seed_from(*key, "test" if test else "train"))
        z = torch.randn((count, *self.shape), generator=generator)[share]
        scaled = self.root * z if isinstance(self.root, float) else z @ self.root.float().mT
        return self.mean + scaled


# --------------------------------------------------------------------------------------------------------------- images


class ImageMarginal:
    """Images of a set or of one of its classes, uniformly dequantised, drawn with replacement.

    Args:
        halves: training and test images.
        class_label: the class, or −1 for all of them.
        centered: values in [−1, 1] rather than [0, 1].

    Raises:
        ValueError: no such class, or none of its images in one of the halves.
    """

    sharp = True

    def __init__(self, halves: tuple[Split, Split], class_label: int, *, centered: bool, name: str) -> None:
        self.halves, self.centered, self.name = halves, centered, name
        self.shape = halves[0].image_shape
        classes = halves[0].num_classes
        if class_label != -1 and not 0 <= class_label < (classes or 0):
            allowed = f"-1 (all) and 0 to {classes - 1}" if classes else "-1: the set has no classes"
            raise ValueError(f"class_label={class_label} of {halves[0].name}: allowed is {allowed}")
        self.indices = [
            torch.arange(len(half)) if class_label == -1 else (half.labels == class_label).nonzero().flatten()
            for half in halves
        ]
        if not all(len(indices) for indices in self.indices):
            raise ValueError(f"class_label={class_label} of {halves[0].name}: no image in one of the halves")

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        split, indices = self.halves[test], self.indices[test]
        generator = torch.Generator().manual_seed(seed_from(*key, "test" if test else "train"))
        chosen = indices[torch.randint(len(indices), (count,), generator=generator)][share]
        images, _ = split.batch(chosen)
        positions = range(count)[share]
        noise = uniform(images.shape, SampleGenerators((*key, "dequantisation"), positions))
        x = pixels.to_unit_interval(images, split.num_levels, dequantization=noise)
        return pixels.scale(x, self.centered)

    def to_pixels(self, x: Tensor) -> Tensor:
        """uint8 levels (B, C, H, W)."""
        return pixels.to_pixels(pixels.unscale(x, self.centered), self.halves[0].num_levels, True)


# -------------------------------------------------------------------------------------------------------------- factory


def moments(marginal: Marginal, seed: int) -> tuple[Tensor, float]:
    """Mean (…) and the coordinates' mean variance, exact of a Gaussian, otherwise of draws."""
    if isinstance(marginal, GaussianMarginal):
        root = marginal.root
        return marginal.mean, root**2 if isinstance(root, float) else float(marginal.covariance.diag().mean())
    x = marginal.sample(_MOMENT_SAMPLES, (seed, "moments")).double()
    return x.mean(0).float(), float(x.var(0).mean())


def get_marginals(config: ConfigDict) -> tuple[Marginal, Marginal]:
    """Of x_0, ``config.data``, and of x_N, ``config.final``.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with them.
    """
    first = _marginal(config, config.data, None)
    return first, _marginal(config, config.final, first)


def _marginal(config: ConfigDict, data: ConfigDict, first: Marginal | None) -> Marginal:
    field = "data" if first is None else "final"
    if data.dataset == "gaussian":
        if first is None:
            raise ValueError("data.dataset='gaussian': a prior, for final.dataset")
        return GaussianMarginal(torch.zeros(first.shape), _scale_of(data, field))
    if data.dataset == "correlated_gaussian" or data.dataset in POINT_SETS:
        scale = _scale_of(data, field)
        marginal: Marginal = PointMarginal(data.dataset, scale) if data.dataset in POINT_SETS else _correlated(scale)
    elif "image_size" in data:
        halves, label = sets.get_dataset(ConfigDict({"data": data})), data.class_label
        name = data.dataset if label == -1 else f"{data.dataset}, class {label}"
        try:
            marginal = ImageMarginal(halves, label, centered=data.centered, name=name)
        except ValueError as error:
            raise ValueError(f"{field}.{error}") from None
    else:
        names = ", ".join((*POINT_SETS, "correlated_gaussian", *(["gaussian"] if first is not None else [])))
        raise ValueError(f"{field}.dataset={data.dataset!r}: allowed are {names}")
    if first is not None and marginal.shape != first.shape:
        raise ValueError(f"final.dataset={data.dataset!r}: samples {marginal.shape}, but those of data {first.shape}")
    return marginal


def _correlated(scale: float) -> GaussianMarginal:
    root = torch.from_numpy(scale * np.linalg.cholesky(_CORRELATED_COVARIANCE))
    return GaussianMarginal(torch.from_numpy(scale * _CORRELATED_MEAN), root, "correlated_gaussian")


def _scale_of(data: ConfigDict, field: str) -> float:
    if "scale" not in data:
        raise ValueError(f"{field}.dataset={data.dataset!r}: needs {field}.scale, which configs of images do not have")
    if not _LEAST_SCALE <= data.scale <= 1 / _LEAST_SCALE:
        raise ValueError(f"{field}.scale={data.scale}: allowed are {_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}")
    return float(data.scale)
