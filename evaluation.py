"""How good are the samples: distances and overlaps between sets of images, measured in a feature space, and between the
distributions of other data.

FID, KID, inception score, precision, recall, density and coverage are pure functions, in float64, of features (N, F)
and logits (N, K). They raise a ValueError if the dimensions differ or there are too few rows, and a FloatingPointError
if numbers are not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from experiment.randomness import seed_from

JACKKNIFE_GROUPS = 20
"""Of standard errors, each of which leaves out a twentieth of the samples."""
LEAST_ITEMS = 2 * JACKKNIFE_GROUPS


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N images, stored as float32: of the penultimate layer, ``pool`` (N, F), and unnormalised
    log-probabilities of the classes, ``logits`` (N, K).

    Raises:
        ValueError: a shape is not as above, or N differs.
        FloatingPointError: a number is not finite.
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


def check_matrix(name: str, values: np.ndarray) -> None:
    """Raise a ValueError unless ``values`` is a matrix (N, dimension), a FloatingPointError unless it is finite."""
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape (N, dimension), not {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise FloatingPointError(f"{name} must be finite, but {bad} of {len(values)} rows are not")


@dataclass(frozen=True)
class Backend:
    """An implementation of what the field computes with tensorflow-gan; ``name`` is for reports."""

    name: str
    fid: Callable[[np.ndarray, np.ndarray], float]
    mmd2: Callable[[np.ndarray, np.ndarray], float]
    """The squared kernel distance, see :func:`polynomial_mmd2`."""
    inception_score: Callable[[np.ndarray], float]
    """Of logits (N, K), all of them together."""


def sample_quality(
    real: np.ndarray,
    generated: Features,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
    metrics: Mapping[str, Callable[[np.ndarray, Features], float]] | None = None,
) -> dict[str, float]:
    """All metrics of a generated set against a real one.

    The inception score is that of all images together, as tensorflow-gan computes it, and so as in the tables of Song
    et al. (2021) and Chao et al. (2023). Its standard deviation is over 10 splits (Salimans et al. 2016) from 5000
    images on, and 0 below: a split of a few images would bias the score, which is bounded by the split's size.

    Args:
        real: features of the data, (N, F).
        generated: features and logits of the samples, (M, F) and (M, K).
        seed: chooses the subsets of KID.
        device: see :func:`neighbourhood_metrics`.
        backend: who computes FID, KID and the inception score; None: this module.
        metrics: further ones by name, functions of ``real`` and ``generated``.

    Raises:
        ValueError: the feature dimensions differ or either set has fewer than 4 images.
    """
    backend = backend or OWN_BACKEND
    kid_mean, kid_se = kid(real, generated.pool, seed=seed, mmd2=backend.mmd2)
    splits = 10 if len(generated.pool) >= 5000 else 1
    overlap = neighbourhood_metrics(real, generated.pool, device=device)
    return {
        **{name: float(metric(real, generated)) for name, metric in (metrics or {}).items()},
        "fid": backend.fid(real, generated.pool),
        "kid": kid_mean,
        "kid_se": kid_se,
        "inception_score": backend.inception_score(generated.logits),
        "inception_score_std": inception_score(generated.logits, splits)[1],
        **dict(zip(("precision", "recall", "density", "coverage"), overlap, strict=True)),
    }


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    r"""Squared Fréchet distance of two Gaussians with means (F,) and covariances (F, F), of any rank.

    ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁^½ C₂ C₁^½)^½ (Dowson and Landau 1982). The last trace is the sum of the
    singular values of C₁^½ C₂^½. Unlike the square root of the product C₁C₂, or of eigenvalues that are zero up to
    rounding, this needs no regularisation and loses no digits when the covariances are singular.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mean1, cov1, mean2, cov2))
    root_overlap = np.linalg.svd(_symmetric_root(cov1) @ _symmetric_root(cov2), compute_uv=False).sum()
    return _squared_distance(mean1, mean2, np.trace(cov1), np.trace(cov2), root_overlap)


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
    """
    _check_pools(real, generated, 2, "FID")
    if max(len(real), len(generated)) < real.shape[1]:
        # With centred rows X and Y the covariances are XᵀX/(N−1) and YᵀY/(M−1), and the singular values of
        # C₁^½ C₂^½ are those of XYᵀ/√((N−1)(M−1)): a small matrix where features outnumber images.
        x, y = (np.asarray(a, dtype=np.float64) for a in (real, generated))
        mean1, mean2 = x.mean(axis=0), y.mean(axis=0)
        x, y = (x - mean1) / np.sqrt(len(x) - 1), (y - mean2) / np.sqrt(len(y) - 1)
        root_overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
        return _squared_distance(mean1, mean2, np.sum(x**2), np.sum(y**2), root_overlap)
    return frechet_distance(*_mean_and_covariance(real), *_mean_and_covariance(generated))


def fid_with_error(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """FID of features (N, F), (M, F), M ≥ 40, and its standard error for a fixed real set, by the jackknife.

    The error is that of choosing other samples; the bias of FID, upwards and of order 1/M, is not in it.
    """
    groups = np.arange(len(generated)) % JACKKNIFE_GROUPS
    without = np.array([fid(real, generated[groups != g]) for g in range(JACKKNIFE_GROUPS)])
    return fid(real, generated), float(without.std() * (JACKKNIFE_GROUPS - 1) ** 0.5)


def _squared_distance(mean1: np.ndarray, mean2: np.ndarray, trace1: float, trace2: float, root_overlap: float) -> float:
    distance = np.sum((mean1 - mean2) ** 2) + trace1 + trace2 - 2 * root_overlap
    return max(float(distance), 0.0)  # equal Gaussians may give zero minus rounding


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
    real: np.ndarray,
    generated: np.ndarray,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int,
    mmd2: Callable[[np.ndarray, np.ndarray], float] = polynomial_mmd2,
) -> tuple[float, float]:
    r"""Kernel distance of features (N, F) and (M, F), and its standard error (Bińkowski et al. 2018).

    The mean of ``mmd2`` over random subsets drawn without replacement. A subset never takes more than half
    of the smaller set: small sets shrink it to that, because the error is estimated from how subsets differ.

    Subsets of n out of N overlap, so the variance v over B subsets understates the error of their mean. The
    variance of the mean is estimated as v (n/(N − n) + 1/B), N the smaller set: the delete-d jackknife (Shao and Wu
    1989, d = N − n) and the choice of subsets. It errs on the large side, up to about a factor of two in the standard
    error, when the two distributions are equal or the sets differ much in size.
    """
    _check_pools(real, generated, 4, "KID")
    smaller = min(len(real), len(generated))
    size = min(subset_size, smaller // 2)
    generator = torch.Generator().manual_seed(seed_from(seed, "kid"))

    def subset(pool: np.ndarray) -> np.ndarray:
        return pool[torch.randperm(len(pool), generator=generator)[:size].numpy()]

    values = np.array([mmd2(subset(real), subset(generated)) for _ in range(num_subsets)])
    variance = values.var(ddof=1) * (size / (smaller - size) + 1 / num_subsets)
    return float(values.mean()), float(np.sqrt(variance))


def inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ E_x p(y|x)) from logits (N, K): mean and standard deviation over ``splits`` (Salimans et
    al. 2016).

    The splits are contiguous, so the rows must not be sorted by class. The score lies between 1 and K.
    """
    logits = np.asarray(logits, dtype=np.float64)
    check_matrix("logits", logits)
    log_p = log_softmax(logits, axis=1)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        # In logarithms throughout: a class whose probability underflows everywhere must contribute 0, not 0 · ∞.
        log_marginal = logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_marginal), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def neighbourhood_metrics(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = 3,
    block: int = 512,
    device: torch.device | str = "cpu",
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage of features (N, F) and (M, F).

    Every point has a ball that reaches to its k-th nearest neighbour in its own set; the boundary belongs to it (≤; the
    package ``prdc`` has <). Precision: the fraction of generated points inside any real ball; recall: the same with the
    roles exchanged (Kynkäänniemi et al. 2019, Eqs. 1 and 2). Density: in how many real balls a generated point lies, on
    average, divided by k; equal distributions give 1, and more is possible. Coverage: the fraction of real balls that
    hold any generated point; equal distributions with N = M give about 1 − 2^−k (Naeem et al. 2020).

    Distances are computed for ``block`` rows at a time against a whole set, in double precision: for 50 000 and 50 000
    features of F = 2048 that takes 2.3 GB, where all distances at once would take 20 GB for each pair of sets.
    """
    _check_pools(real, generated, k + 1, f"precision and recall with k = {k}")
    x, y = (torch.from_numpy(a).to(device).to(torch.float64, copy=True) for a in (real, generated))
    centre = x.mean(0)  # distances come from inner products, which cancel less near the origin
    x -= centre
    y -= centre
    # Distances that are equal in exact arithmetic must compare as equal (a sample may be a copy of a neighbour, or
    # many may coincide): radii are rounded up and distances down by the rounding error of an inner product.
    rounding = 2 * x.shape[1] * torch.finfo(torch.float64).eps
    x_norms, y_norms = (torch.cat([rows.square().sum(1) for rows in a.split(block)]) for a in (x, y))

    def squared_radii(points: Tensor, norms: Tensor) -> Tensor:
        radii = []
        for start in range(0, len(points), block):
            part = slice(start, start + block)
            distances = _squared_distances(points[part], norms[part], points, norms, 1 + rounding)
            rows = torch.arange(len(distances), device=points.device)
            distances[rows, start + rows] = torch.inf  # a point is not its own neighbour
            radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
        return torch.cat(radii)

    real_radii, generated_radii = squared_radii(x, x_norms), squared_radii(y, y_norms)
    inside_any_real = balls_entered = 0
    real_inside_any = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    real_covered = torch.zeros_like(real_inside_any)
    for start in range(0, len(y), block):
        part = slice(start, start + block)
        distances = _squared_distances(y[part], y_norms[part], x, x_norms, 1 - rounding)
        in_real_ball = distances <= real_radii
        inside_any_real += int(in_real_ball.any(1).sum())
        balls_entered += int(in_real_ball.sum())
        real_covered |= in_real_ball.any(0)
        real_inside_any |= (distances <= generated_radii[part, None]).any(0)
    return (
        inside_any_real / len(y),
        float(real_inside_any.double().mean()),
        balls_entered / (k * len(y)),
        float(real_covered.double().mean()),
    )


def _squared_distances(a: Tensor, a_norms: Tensor, b: Tensor, b_norms: Tensor, factor: float) -> Tensor:
    """factor · (‖aᵢ‖² + ‖bⱼ‖²) − 2 aᵢᵀbⱼ for rows (N, F) and (M, F) and their squared norms (N,) and (M,): squared
    distances (N, M) when the factor is 1."""
    sums = factor * (a_norms[:, None] + b_norms)
    return sums.addmm_(a, b.T, alpha=-2)


def _check_pools(first: np.ndarray, second: np.ndarray, minimum: int, metric: str) -> None:
    for values in (first, second):
        check_matrix("features", values)
        if len(values) < minimum:
            raise ValueError(f"{metric} needs at least {minimum} images in each set, not {len(values)}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{metric}: feature dimensions differ, {first.shape[1]} and {second.shape[1]}")


OWN_BACKEND = Backend("torch", fid, polynomial_mmd2, lambda logits: inception_score(logits, 1)[0])
"""This module's own functions, in float64."""


# ---------------------------------------------------------------------------------------------------------------
# Of data that are no pictures: distributions of the numbers themselves


def compare_distributions(
    real: np.ndarray, generated: np.ndarray, *, seed: int, bins: int = 50
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """How far samples (M, C, ...) are from held-out data (N, C, ...): numbers, and the curves that they are of.

    ``sliced_w2``: see ``sliced_wasserstein``. ``marginal_w1``: the W₁ distance of the values of a channel, averaged
    over channels. ``spectrum_error``: the root mean square, over channels and wave numbers, of the relative error of
    the power spectrum; vectors have none. None of them is 0 for equal distributions, from finitely many items. The
    standard errors, names with ``_se``, are those of choosing other items, by the jackknife.

    The curves are, for ``real`` and ``generated``, means over items with their standard errors: ``histogram`` (C, bins)
    between ``edges`` (C, bins + 1), as fractions; ``spectrum`` (C, K) at ``wave_number`` (K,), in cycles per length of
    the first axis.

    Raises:
        ValueError: fewer than 40 items in one of the two.
        FloatingPointError: values that are not finite.
    """
    sets = {"real": np.asarray(real, np.float64), "generated": np.asarray(generated, np.float64)}
    for name, values in sets.items():
        if len(values) < LEAST_ITEMS:
            raise ValueError(f"{len(values)} {name} items: to compare distributions takes {LEAST_ITEMS}")
        if not np.isfinite(values).all():
            raise FloatingPointError(f"{name} values are not finite")
    real, generated = sets.values()

    def marginal_w1(real: np.ndarray, generated: np.ndarray) -> float:
        columns = (_quantiles(np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]), 1000) for x in (real, generated))
        return float(np.abs(np.subtract(*columns)).mean())

    def spectrum_error(real: np.ndarray, generated: np.ndarray) -> float:
        power = real.mean(0)
        power = np.maximum(power, 1e-9 * power.max())  # a band-limited signal has none at large wave numbers
        return float(np.sqrt(np.mean(((generated.mean(0) - real.mean(0)) / power) ** 2)))

    slices = functools.partial(sliced_wasserstein, seed=seed)
    metrics, curves = {}, {}
    measured = {"sliced_w2": (slices, real, generated), "marginal_w1": (marginal_w1, real, generated)}
    edges = np.stack([np.linspace(channel.min(), channel.max(), bins + 1) for channel in np.moveaxis(real, 1, 0)])
    edges[:, -1] = np.nextafter(edges[:, -1], np.inf)
    curves["edges"] = edges
    if real.ndim > 2:
        curves["wave_number"], spectra = _power_spectra(real)
        measured["spectrum_error"] = spectrum_error, spectra, _power_spectra(generated)[1]
    for name, (statistic, a, b) in measured.items():
        metrics[name], metrics[f"{name}_se"] = _with_jackknife_error(statistic, a, b)
    for name, values in sets.items():
        flat = np.moveaxis(values.reshape(*values.shape[:2], -1), 1, 0)
        places = [np.searchsorted(own, channel, side="right") - 1 for channel, own in zip(flat, edges, strict=True)]
        counts = np.stack([(np.stack(places, 1) == k).mean(-1) for k in range(bins)], axis=-1)
        shown = {"histogram": counts}
        if real.ndim > 2:
            shown["spectrum"] = _power_spectra(values)[1]
        for curve, by_item in shown.items():
            curves[f"{curve}_{name}"] = by_item.mean(0)
            curves[f"{curve}_{name}_se"] = by_item.std(0, ddof=1) / np.sqrt(len(by_item))
    return metrics, curves


def sliced_wasserstein(first: np.ndarray, second: np.ndarray, *, seed: int, projections: int = 200) -> float:
    """The root of the mean of W₂² over random directions, of items (N, ...) and (M, ...).

    W₂ along a direction compares quantiles, as many as the smaller set has items.
    """
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (first, second))
    generator = np.random.default_rng(seed_from(seed, "slices"))
    directions = generator.standard_normal((x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    columns = [_quantiles(a @ directions, min(len(x), len(y))) for a in (x, y)]
    return float(np.sqrt(np.mean((columns[0] - columns[1]) ** 2)))


def _quantiles(columns: np.ndarray, count: int) -> np.ndarray:
    """The quantiles (k + ½)/count, k = 0 … count − 1, of each column of (N, ...); of N = count they are its order."""
    columns = np.sort(columns, axis=0)
    position = ((np.arange(count) + 0.5) / count * len(columns) - 0.5).clip(0, len(columns) - 1)
    below = position.astype(int)
    share = (position - below)[:, None]
    return (1 - share) * columns[below] + share * columns[np.minimum(below + 1, len(columns) - 1)]


def _with_jackknife_error(statistic: Callable[..., float], real: np.ndarray, generated: np.ndarray) -> tuple:
    groups = [np.arange(len(items)) % JACKKNIFE_GROUPS for items in (real, generated)]
    without = [statistic(real[groups[0] != g], generated[groups[1] != g]) for g in range(JACKKNIFE_GROUPS)]
    return statistic(real, generated), float(np.std(without) * (JACKKNIFE_GROUPS - 1) ** 0.5)


def _power_spectra(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wave numbers (K,), and of items (N, C, ...) the mean |FFT|² per value at each (N, C, K), over all directions."""
    axes, sizes = tuple(range(2, values.ndim)), values.shape[2:]
    power = np.abs(np.fft.fftn(values, axes=axes)) ** 2 / math.prod(sizes)
    grid = np.meshgrid(*(np.fft.fftfreq(n, 1 / sizes[0]) for n in sizes), indexing="ij")
    shell = np.rint(np.sqrt(sum(axis**2 for axis in grid))).astype(int).ravel()
    shell = np.minimum(shell, sizes[0] // 2)  # the corners belong to the last one
    counts = np.bincount(shell)
    flat = power.reshape(*values.shape[:2], -1)
    sums = np.stack([flat[..., shell == k].sum(-1) for k in np.flatnonzero(counts)], axis=-1)
    return np.flatnonzero(counts).astype(float), sums / counts[counts > 0]
