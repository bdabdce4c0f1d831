"""How good a bridge is: distances between samples, cost of transport, and the entropic optimum that it is to reach.

Source of the algorithms: POT (Flamary et al., "POT: Python Optimal Transport", JMLR 2021).
"""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor

# POT would import every array library that is installed: TensorFlow takes seconds and prints pages.
for _library in ("TENSORFLOW", "JAX", "CUPY"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{_library}", "1")
import ot  # noqa: E402


def wasserstein(a: Tensor, b: Tensor, seed: int) -> float:
    """W₂ between the empirical measures of samples (n, …) and (m, …), in units of the data.

    Exact for points of at most three coordinates (network simplex). Otherwise *sliced*: the root of the mean of W₂²
    over 200 random directions, which ``seed`` chooses, the same ones for all comparisons.

    Raises:
        FloatingPointError: samples that are not finite, of which POT's answer would be 0, or no solution found.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        raise FloatingPointError("samples are not finite; try a smaller optim.lr")
    a, b = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    if a.shape[1] > 3:
        return float(ot.sliced_wasserstein_distance(a, b, n_projections=200, seed=seed % 2**32))
    squared, log = ot.emd2([], [], ot.dist(a, b), numItermax=10_000_000, log=True)  # []: equal weights
    if log["warning"] is not None:
        raise FloatingPointError(f"exact transport of {len(a)} samples: {log['warning']}")
    return float(np.sqrt(squared))


def mean_squared_displacement(first: Tensor, last: Tensor) -> float:
    """E‖x_N − x_0‖² of pairs (n, …), the cost of the coupling, in squared units of the data."""
    return float(((last - first).double() ** 2).flatten(1).sum(1).mean())


def entropic_plan(a: Tensor, b: Tensor, brownian_variance: float) -> tuple[float, float]:
    """The static Schrödinger bridge between samples (n, D) and (m, D): min_P ⟨P, ‖x − y‖²⟩ + ε Σ P log P.

    ε = 2s², s² = ``Reference.brownian_variance``, makes P ∝ exp(−‖x − y‖²/2s²), the coupling that Brownian motion of
    that variance is closest to. Sinkhorn's iteration on logarithms.

    Returns:
        its cost ⟨P, ‖x − y‖²⟩, and the larger ℓ₁ distance of its marginals to those wanted.
    """
    a, b = a.double().numpy(), b.double().numpy()
    cost = ot.dist(a, b)
    options = {"method": "sinkhorn_log", "numItermax": 2000, "stopThr": 1e-7, "warn": False}
    plan = ot.sinkhorn([], [], cost, 2 * brownian_variance, **options)
    violation = max(np.abs(plan.sum(axis) - 1 / len(points)).sum() for axis, points in ((1, a), (0, b)))
    return float((plan * cost).sum()), float(violation)
