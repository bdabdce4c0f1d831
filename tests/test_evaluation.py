"""Sample quality metrics against closed forms, brute force and torch-fidelity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel

import evaluation
from evaluation import (
    Backend,
    Features,
    fid,
    frechet_distance,
    inception_score,
    kid,
    neighbourhood_metrics,
    polynomial_mmd2,
    sample_quality,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, dimension: int, rank: int) -> np.ndarray:
    factor = normal(seed, dimension, rank)
    return factor @ factor.T


# ---------------------------------------------------------------------------------------------------- Fréchet distance


def test_frechet_distance_of_commuting_gaussians():
    # In a common eigenbasis the distance is Σ (√λ₁ − √λ₂)² + ‖Δμ‖².
    basis = np.linalg.qr(normal(0, 5, 5))[0]
    spectrum1, spectrum2 = np.array([4.0, 1.0, 0.25, 9.0, 0.0]), np.array([1.0, 1.0, 4.0, 0.0, 0.0])
    mean1, mean2 = normal(1, 2, 5)
    expected = np.sum((np.sqrt(spectrum1) - np.sqrt(spectrum2)) ** 2) + np.sum((mean1 - mean2) ** 2)
    distance = frechet_distance(mean1, (basis * spectrum1) @ basis.T, mean2, (basis * spectrum2) @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_general_gaussians():
    mean1, mean2 = normal(0, 2, 6)
    cov1, cov2 = covariance(1, 6, 6), covariance(2, 6, 6)
    assert not np.allclose(cov1 @ cov2, cov2 @ cov1)
    root = scipy.linalg.sqrtm(cov1)
    cross = scipy.linalg.sqrtm(root @ cov2 @ root)
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * cross)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_of_singular_covariances():
    # Rank one, C = aaᵀ and bbᵀ: the optimal coupling maps a to ±b, so the distance is |a|² + |b|² − 2|aᵀb|.
    a, b = normal(0, 2, 40)
    zero = np.zeros(40)
    expected = a @ a + b @ b - 2 * abs(a @ b)
    assert frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-12)
    point_mass = np.zeros((40, 40))
    assert frechet_distance(a, point_mass, b, point_mass) == pytest.approx(np.sum((a - b) ** 2), rel=1e-12)
    # Orthogonal supports: nothing overlaps, down to rounding and not to its square root.
    basis = np.linalg.qr(normal(4, 40, 40))[0]
    cov1, cov2 = basis[:, :20] @ basis[:, :20].T, basis[:, 20:] @ basis[:, 20:].T
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(40, rel=1e-12)
    # Equal, far from full rank: zero to rounding of the trace, not to its square root.
    cov = covariance(3, 40, 5)
    assert frechet_distance(a, cov, a, cov) < 1e-12 * np.trace(cov)


def test_fid_is_the_distance_of_the_fitted_gaussians():
    x, y = normal(0, 300, 7).astype(np.float32), (1.5 * normal(1, 200, 7) + 0.3).astype(np.float32)
    x64, y64 = x.astype(float), y.astype(float)
    expected = frechet_distance(x64.mean(0), np.cov(x64, rowvar=False), y64.mean(0), np.cov(y64, rowvar=False))
    assert fid(x, y) == pytest.approx(expected, rel=1e-11)
    assert fid(x, x[::-1]) < 1e-12


def test_fid_of_fewer_images_than_dimensions():
    x, y = normal(0, 20, 30) + 2, 1.5 * normal(1, 12, 30)
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert fid(x, y) == pytest.approx(expected, rel=1e-11)
    assert fid(x, x[::-1]) < 1e-12
    # One of the two sets is large enough: the general formula.
    large = normal(2, 40, 30)
    assert fid(x, large) == pytest.approx(fid(large, x), rel=1e-11)


def test_fid_accumulates_in_blocks():
    x = normal(0, 50, 3) + 100
    mean, cov = evaluation._mean_and_covariance(x, block=7)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- KID


def test_mmd2_equals_brute_force():
    x, y = normal(0, 30, 5), normal(1, 20, 5) + 0.5
    kernel = {"degree": 3, "gamma": 1 / 5, "coef0": 1}

    def off_diagonal(a: np.ndarray) -> float:
        return polynomial_kernel(a, **kernel)[~np.eye(len(a), dtype=bool)].mean()

    expected = off_diagonal(x) + off_diagonal(y) - 2 * polynomial_kernel(x, y, **kernel).mean()
    assert polynomial_mmd2(x, y) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased_for_equal_distributions():
    values = [kid(normal(2 * i, 40, 4), normal(2 * i + 1, 60, 4), num_subsets=10, seed=i)[0] for i in range(300)]
    standard_error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * standard_error
    # The biased estimator would be off by the mean diagonal excess, many standard errors.
    assert standard_error < 0.02


def test_kid_of_shifted_normals_has_the_expected_value_and_error():
    # E k(x, y) for x ~ N(0, 1), y ~ N(m, 1) in one dimension: E(xy + 1)³ = 1 + 3E(xy)² + 3E(xy) + E(xy)³.
    shift = 1.0
    second = 1 + shift**2
    cross = 1 + 3 * second
    within_x = 1 + 3
    within_y = 1 + 3 * shift**2 + 3 * second**2 + (shift**3 + 3 * shift) ** 2
    expected = within_x + within_y - 2 * cross
    draws = [kid(normal(2 * i, 200, 1), normal(2 * i + 1, 200, 1) + shift, num_subsets=40, seed=i) for i in range(200)]
    values, errors = np.array(draws).T
    spread = values.std(ddof=1)
    assert abs(values.mean() - expected) < 4 * spread / np.sqrt(len(values))
    # The spread itself is known to about 1/√400 = 5 % (heavier tails: somewhat more).
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(spread, rel=0.25)


def test_kid_shrinks_its_subsets_and_is_reproducible():
    x, y = normal(0, 30, 3), normal(1, 9, 3)
    assert kid(x, y, seed=0) == kid(x, y, subset_size=4, seed=0)
    assert kid(x, y, seed=0) != kid(x, y, subset_size=3, seed=0)
    assert kid(x, y, seed=0) != kid(x, y, seed=1)
    assert kid(x, y, seed=0)[1] > 0


# ----------------------------------------------------------------------------------------------------- inception score


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_of_uniform_and_of_certain_predictions(splits):
    assert inception_score(np.full((100, 10), 3.0), splits) == (
        pytest.approx(1, abs=1e-12),
        pytest.approx(0, abs=1e-12),
    )
    one_hot = np.tile(1000 * np.eye(10), (10, 1))
    assert inception_score(one_hot, splits) == (pytest.approx(10, rel=1e-12), pytest.approx(0, abs=1e-12))
    # A class of probability exp(−2000) everywhere, zero in floating point, must not spoil the rest.
    impossible = np.concatenate([one_hot, np.full((100, 1), -1000.0)], axis=1)
    assert inception_score(impossible, splits)[0] == pytest.approx(10, rel=1e-12)


def test_inception_score_of_two_predictions():
    # Rows (p, 1 − p) and (1 − p, p): KL to the uniform marginal is log 2 − entropy, for both.
    p = 0.9
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    logits = np.log([[p, 1 - p], [1 - p, p]])
    assert inception_score(logits, 1) == (pytest.approx(2 * np.exp(-entropy), rel=1e-12), 0.0)
    # Each row alone is its own marginal.
    assert inception_score(logits, 2)[0] == pytest.approx(1, rel=1e-12)


# --------------------------------------------------------------------------------- precision, recall, density, coverage


def test_precision_and_recall_of_separated_modes():
    modes = 100 * np.eye(4)
    real = np.concatenate([m + 0.1 * normal(i, 25, 4) for i, m in enumerate(modes)])
    # Tightly around the middles of two of the four modes.
    half = np.concatenate([m + 0.001 * normal(10 + i, 50, 4) for i, m in enumerate(modes[:2])])
    assert neighbourhood_metrics(real, half)[:2] == (1.0, 0.0)  # the narrow modes reach no real sample
    half = np.concatenate([real[:50], real[:50] + 1e-3])
    assert neighbourhood_metrics(half, real)[:2] == (0.5, 1.0)
    precision, recall, density, coverage = neighbourhood_metrics(real, half)
    assert (precision, recall) == (1.0, 0.5)
    assert coverage == 0.5
    assert density > 1
    far = real + 1e4
    assert neighbourhood_metrics(real, far) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 1000])
def test_neighbourhood_metrics_equal_brute_force(k, block):
    real, generated = normal(0, 60, 3) + 5, 1.3 * normal(1, 45, 3) + 5.3

    def radii(a: np.ndarray) -> np.ndarray:
        return np.sort(cdist(a, a), axis=1)[:, k]

    distances = cdist(real, generated)
    in_real_ball = distances <= radii(real)[:, None]
    precision, recall, density, coverage = neighbourhood_metrics(real, generated, k=k, block=block)
    assert precision == pytest.approx(in_real_ball.any(0).mean(), abs=1e-12)
    assert recall == pytest.approx((distances <= radii(generated)).any(1).mean(), abs=1e-12)
    assert 0 < precision < 1 and 0 < recall < 1
    assert density == pytest.approx(in_real_ball.sum() / (k * len(generated)), abs=1e-12)
    assert coverage == pytest.approx(in_real_ball.any(1).mean(), abs=1e-12)


@pytest.mark.parametrize("block", [16, 512])
def test_copies_of_the_data_lie_exactly_on_its_balls(block):
    # Every real ball holds its centre and k neighbours, the last on its boundary: rounding must not lose that one.
    real = (normal(0, 200, 50) + 1000).astype(np.float32)
    assert neighbourhood_metrics(real, real[::-1].copy(), k=4, block=block) == (1.0, 1.0, 5 / 4, 1.0)
    # Collapsed to one point: balls of radius zero contain that point, and nothing else.
    collapsed = np.repeat(real[:1], 30, axis=0)
    assert neighbourhood_metrics(real, collapsed, k=4, block=block)[:2] == (1.0, 1 / 200)
    assert neighbourhood_metrics(collapsed, collapsed, k=4, block=block)[:2] == (1.0, 1.0)


def test_density_and_coverage_of_equal_distributions():
    # The points of both sets are exchangeable. A real point stays uncovered when its k nearest among all others are
    # real, so the expected coverage is 1 − (N−1)⋯(N−k) / ((2N−1)⋯(2N−k)); the expected density is 1. The standard
    # errors are those of the repetitions.
    covered = 1 - (299 * 298 * 297) / (599 * 598 * 597)
    draws = [neighbourhood_metrics(normal(2 * i, 300, 3), normal(2 * i + 1, 300, 3))[2:] for i in range(10)]
    means, errors = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1) / np.sqrt(10)
    assert abs(means[0] - 1) < 4 * errors[0]
    assert abs(means[1] - covered) < 4 * errors[1]
    assert errors[0] < 0.05 and errors[1] < 0.02


# ------------------------------------------------------------------------------------------------------ torch-fidelity


def test_metrics_agree_with_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    real, generated = normal(0, 400, 16), 1.1 * normal(1, 300, 16) + 0.2
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(a)) for a in (real, generated)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert fid(real, generated) == pytest.approx(theirs, rel=1e-9)

    logits = 3 * normal(2, 203, 10)
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    assert inception_score(logits, 10) == pytest.approx(tuple(theirs.values()), rel=1e-12)

    # Subsets of the whole set, permuted: the complete estimator.
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(real[:300]), torch.from_numpy(generated), kid_subsets=1, kid_subset_size=300, verbose=False
    )
    complete = theirs["kernel_inception_distance_mean"]
    assert polynomial_mmd2(real[:300], generated) == pytest.approx(complete, rel=1e-9)
    mean, standard_error = kid(real[:300], generated, num_subsets=200, seed=0)
    assert abs(mean - complete) < standard_error

    theirs = metric_prc.prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3, verbose=False
    )
    assert neighbourhood_metrics(real, generated)[:2] == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-7
    )


# -------------------------------------------------------------------------------------------------------------- errors


def test_unusable_features_are_refused():
    good = normal(0, 10, 3)
    with pytest.raises(FloatingPointError, match="finite, but 1 of 10 rows"):
        fid(good, np.where(np.arange(30).reshape(10, 3) == 4, np.nan, good))
    with pytest.raises(ValueError, match="dimensions differ, 3 and 2"):
        kid(good, good[:, :2], seed=0)
    with pytest.raises(ValueError, match="at least 2 images in each set, not 1"):
        fid(good, good[:1])
    with pytest.raises(ValueError, match="at least 4 images in each set, not 3"):
        neighbourhood_metrics(good, good[:3])
    with pytest.raises(ValueError, match="at least 4 images in each set, not 3"):
        kid(good[:3], good, seed=0)
    with pytest.raises(ValueError, match=r"shape \(N, dimension\), not \(3,\)"):
        inception_score(good[0], 1)
    with pytest.raises(ValueError, match="10 rows of pool but 9 of logits"):
        Features(good, good[:9])
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        Features(good, np.full((10, 2), np.inf))


# ------------------------------------------------------------------------------------------ sample quality, all in one


def test_sample_quality_collects_the_metrics():
    real = Features(normal(0, 80, 6), normal(1, 80, 5))
    generated = Features(1.2 * normal(2, 70, 6), 3 * normal(3, 70, 5))
    quality = sample_quality(real.pool, generated, seed=4)
    assert quality["fid"] == fid(real.pool, generated.pool)
    assert (quality["kid"], quality["kid_se"]) == kid(real.pool, generated.pool, seed=4)
    assert (quality["inception_score"], quality["inception_score_std"]) == inception_score(generated.logits, 1)
    overlap = tuple(quality[name] for name in ("precision", "recall", "density", "coverage"))
    assert overlap == neighbourhood_metrics(real.pool, generated.pool)
    further = {"mine:distance": lambda data, samples: np.abs(data.mean(0) - samples.pool.mean(0)).max()}
    more = sample_quality(real.pool, generated, seed=4, metrics=further)
    assert more.pop("mine:distance") == np.abs(real.pool.mean(0) - generated.pool.mean(0)).max()
    assert more == quality and len(quality) == 9
    json.dumps(quality)  # plain numbers


def test_the_inception_score_is_of_all_images_and_its_spread_over_ten_splits():
    real = normal(0, 10, 2)
    pool, logits = normal(2, 5000, 2), 2 * normal(3, 5000, 4)
    quality = sample_quality(real, Features(pool, logits), seed=0)
    assert quality["inception_score"] == pytest.approx(inception_score(logits, 1)[0], rel=1e-6)
    assert quality["inception_score_std"] == pytest.approx(inception_score(logits, 10)[1], rel=1e-4)
    assert quality["inception_score_std"] > 0
    assert sample_quality(real, Features(pool[:-1], logits[:-1]), seed=0)["inception_score_std"] == 0


def test_a_backend_computes_what_it_says_it_does():
    """KID as the mean over the same subsets, whoever computes the distance of one."""
    seen = []

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        seen.append((x, y))
        return polynomial_mmd2(x, y) + 1

    real, generated = normal(0, 80, 6), Features(1.2 * normal(2, 70, 6), 3 * normal(3, 70, 5))
    own = sample_quality(real, generated, seed=4)
    other = sample_quality(real, generated, seed=4, backend=Backend("x", lambda a, b: 2.0, distance, lambda z: 3.0))
    assert len(seen) == 100 and seen[0][0].shape == (35, 6)
    assert other["kid"] == pytest.approx(own["kid"] + 1, rel=1e-12)
    assert other["kid_se"] == pytest.approx(own["kid_se"], rel=1e-9)
    assert (other["fid"], other["inception_score"]) == (2.0, 3.0)
    assert all(own[name] == other[name] for name in ("precision", "recall", "density", "coverage"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_are_left_as_they_were(dtype):
    real, generated = normal(0, 20, 3).astype(dtype) + 5, normal(1, 20, 3).astype(dtype)
    kept = real.copy(), generated.copy()
    neighbourhood_metrics(real, generated)
    assert np.array_equal(real, kept[0]) and np.array_equal(generated, kept[1])
