"""The two distributions that a bridge joins: points in the plane, Gaussians, sets of images or one class of them.

Each has a ``name`` for tables and figures, the ``shape`` of a sample, and is ``sharp`` if its density has edges that
noise would blur, so that the last step towards it goes without. ``sample(count, key, share, test=False)`` gives the
``share`` of ``count`` draws, float32 (b, …), which one of several processes takes; with ``test`` of held-out data where
there are such. The key decides what is drawn: a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from ml_collections import ConfigDict
from sklearn.datasets import make_s_curve, make_swiss_roll
from torch import Tensor

from data import DataFormat, Split, load_dataset
from data.sets import conditions_of
from experiment.randomness import SampleGenerators, seed_from
from experiment.registry import resolve

Key: TypeAlias = tuple[int | str, ...]


DrawPoints: TypeAlias = Callable[[int, np.random.Generator], np.ndarray]
"""(count, random numbers) → points (count, 2)."""


def _seed(key: Key, test: bool) -> int:
    return seed_from(*key, "test" if test else "train")


def _checkerboard(count: int, random: np.random.Generator) -> np.ndarray:
    x1 = random.uniform(-2, 2, count)
    x2 = random.uniform(0, 1, count) - 2 * random.integers(0, 2, count) + np.floor(x1) % 2
    return np.stack([x1, x2], axis=1)


def _on_a_circle(modes: int, deviation: float) -> DrawPoints:
    def draw(count: int, random: np.random.Generator) -> np.ndarray:
        angle = 2 * np.pi * random.integers(0, modes, count) / modes
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) + deviation * random.standard_normal((count, 2))

    return draw


def _moons(count: int, random: np.random.Generator) -> np.ndarray:
    """Two half-circles of radius 1, interleaved, with noise of 0.05."""
    angle, lower = np.pi * random.uniform(size=count), random.integers(0, 2, count)
    sign = 1 - 2 * lower
    points = np.stack([lower + sign * np.cos(angle), 0.5 * lower + sign * np.sin(angle)], axis=1)
    return points + 0.05 * random.standard_normal((count, 2))


def _circles(count: int, random: np.random.Generator) -> np.ndarray:
    """Circles of radius 1 and 1/2, half of the mass on each, with noise of 0.03."""
    angle, radius = 2 * np.pi * random.uniform(size=count), 1 - 0.5 * random.integers(0, 2, count)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.03 * random.standard_normal((count, 2))


def _curve(draw: Callable, noise: float) -> DrawPoints:
    """One of scikit-learn's curved surfaces, seen from the side."""
    return lambda count, random: draw(count, noise=noise, random_state=int(random.integers(2**31)))[0][:, [0, 2]]


# Before they are standardised. Curves get a little noise, so that they have a density. scikit-learn's moons and circles
# are evenly spaced points: two sets of them are closer to each other than independent draws, and so than any model's.
POINT_SETS: dict[str, DrawPoints] = {
    "scurve": _curve(make_s_curve, 0.05),
    "swissroll": _curve(make_swiss_roll, 0.3),
    "circles": _circles,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "8gaussians": _on_a_circle(8, 0.09),
    "mixture": _on_a_circle(4, 0.25),
}


@cache
def _centre_and_scale(draw: DrawPoints) -> tuple[np.ndarray, float]:
    points = draw(200_000, np.random.default_rng(0))
    return points.mean(0), float(points.std(0).mean())


class PointMarginal:
    """Points in the plane, of ``POINT_SETS`` or by 'module:function', moved and scaled to mean 0 and a mean standard
    deviation of 1 per coordinate.

    Raises:
        ValueError: unknown name.
    """

    shape = (2,)
    sharp = True

    def __init__(self, name: str, field: str = "data.dataset") -> None:
        self.draw, self.name = resolve(name, POINT_SETS, field), name

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        centre, deviation = _centre_and_scale(self.draw)
        points = self.draw(count, np.random.default_rng(_seed(key, test)))
        return torch.from_numpy((points - centre) / deviation).float()[share]


class GaussianMarginal:
    """N(m, I) with m of the shape of a sample, or N(m, RRᵀ) of vectors (D,) with a ``root`` R (D, D)."""

    sharp = False

    def __init__(self, mean: Tensor, root: Tensor | None = None, name: str = "gaussian") -> None:
        self.mean, self.root, self.name, self.shape = mean.float(), root, name, tuple(mean.shape)

    @property
    def covariance(self) -> Tensor:
        """(D, D), float64, of a vector."""
        return torch.eye(len(self.mean)).double() if self.root is None else self.root.double() @ self.root.double().mT

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(key, test))
        z = torch.randn((count, *self.shape), generator=generator)[share]
        return self.mean + (z if self.root is None else z @ self.root.float().mT)


class ImageMarginal:
    """Training and test images of a set or, with a ``class_label`` other than −1, of one of its classes, uniformly
    dequantised, in [−1, 1] if ``centered`` and else in [0, 1], drawn with replacement.

    Raises:
        ValueError: there are no such images in one of the halves.
    """

    sharp = True

    def __init__(
        self, halves: tuple[Split, Split], class_label: int, *, centered: bool, name: str, field: str = "data"
    ) -> None:
        self.halves, self.images = halves, DataFormat.of(halves[0], centered=centered, dequantized=True)
        self.name = name if class_label == -1 else f"{name}, class {class_label}"
        self.shape = self.images.shape
        self.indices = [
            torch.arange(len(half)) if class_label == -1 else (half.labels == class_label).nonzero().flatten()
            for half in halves
        ]
        if not all(len(indices) for indices in self.indices):
            raise ValueError(f"{field}.class_label={class_label}: allowed are -1 (all) and the classes of {name}")

    def sample(self, count: int, key: Key, share: slice = slice(None), *, test: bool = False) -> Tensor:
        split, indices = self.halves[test], self.indices[test]
        generator = torch.Generator().manual_seed(_seed(key, test))
        levels, _ = split.batch(indices[torch.randint(len(indices), (count,), generator=generator)][share])
        return self.images.to_model(levels, SampleGenerators((*key, "dequantisation"), range(count)[share]))


Marginal: TypeAlias = PointMarginal | GaussianMarginal | ImageMarginal


def moments(marginal: Marginal, seed: int) -> tuple[Tensor, float]:
    """Mean (…) and the coordinates' mean variance, exact of a Gaussian, otherwise of draws."""
    if isinstance(marginal, GaussianMarginal):
        return marginal.mean, 1.0 if marginal.root is None else float(marginal.covariance.diag().mean())
    x = marginal.sample(2000, (seed, "moments")).double()
    return x.mean(0).float(), float(x.var(0).mean())


def get_marginals(data: ConfigDict, final: ConfigDict) -> tuple[Marginal, Marginal]:
    """Of x_0 and of x_N.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with them.
    """
    first = _marginal(data, "data")
    if final.dataset == "gaussian":
        return first, GaussianMarginal(torch.zeros(first.shape))
    last = _marginal(final, "final")
    if last.shape != first.shape:
        raise ValueError(f"final.dataset={final.dataset!r}: samples {last.shape}, but those of data {first.shape}")
    return first, last


def _marginal(data: ConfigDict, field: str) -> Marginal:
    name = data.dataset
    if name == "correlated_gaussian":
        covariance = np.array([[0.9, 0.4], [0.4, 0.5]])
        return GaussianMarginal(torch.tensor([1.0, -0.5]), torch.from_numpy(np.linalg.cholesky(covariance)), name)
    if "image_size" not in data or name in POINT_SETS:
        return PointMarginal(name, f"{field}.dataset")
    sizes = {key: data[key] for key in ("image_size", "num_channels", "path", "root", "download", "resize")}
    halves = load_dataset(name, **sizes)
    if conditions_of(halves[0]) is not None:
        raise ValueError(f"{field}.dataset={name!r}: has conditions, which a bridge takes none of")
    return ImageMarginal(halves, data.class_label, centered=data.centered, name=name, field=field)
