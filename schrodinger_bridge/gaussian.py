"""IPF between Gaussians in closed form: the oracle of the learned one.

With affine mean maps all states stay Gaussian, so that every half-bridge is linear algebra. Let the forward chain have
F_k(x) = A_k x + c_k and x_k ~ N(μ_k, S_k). The regression of IPF (``matching.ipf_regression``) is then solved by

    B_k(x) = (2 − A_k − 2γ_k S_k⁻¹) x − c_k + 2γ_k S_k⁻¹ μ_k

(2 the twofold identity), which is −f + 2γ∇log p in terms of drifts; and in the other direction likewise with the
moments of the backward chain. That is the time reversal to first order in γ, with noise of covariance 2γ_k. An edge
x_{k+1} = A_k x_k + c_k + N(0, Q_k) is reversed exactly, by Bayes' theorem, by

    B_k = S_k A_kᵀ S_{k+1}⁻¹,    B_k(x) = μ_k + B_k (x − μ_{k+1}),    with noise of covariance S_k − B_k A_k S_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .process import BACKWARD, FORWARD, Reference, opposite


class Normal(NamedTuple):
    """N(mean (D,), covariance (D, D)), float64."""

    mean: Tensor
    covariance: Tensor


class AffineChain(NamedTuple):
    """A chain of one direction from the law ``start``, with mean maps x ↦ A_k x + c_k and noise N(0, Q_k): A_k and Q_k
    (N, D, D), c_k (N, D)."""

    direction: str
    start: Normal
    matrices: Tensor
    offsets: Tensor
    noise: Tensor

    def law(self) -> tuple[list[Normal], Tensor]:
        """Laws of x_0 … x_N, and Cov(x_0, x_N) (D, D)."""
        count, laws, cross = len(self.noise), [self.start], self.start.covariance
        for i in range(count) if self.direction == FORWARD else range(count - 1, -1, -1):
            a, c, (mean, covariance) = self.matrices[i], self.offsets[i], laws[-1]
            laws.append(Normal(a @ mean + c, a @ covariance @ a.mT + self.noise[i]))
            cross = cross @ a.mT
        # ``cross`` is Cov(first simulated, last simulated).
        return (laws, cross) if self.direction == FORWARD else (laws[::-1], cross.mT)


def isotropic(gammas: Tensor, dimension: int) -> Tensor:
    """Covariances 2γ_k of the noise (N, D, D), for γ_k (N,)."""
    return 2 * gammas[:, None, None].cpu() * torch.eye(dimension, dtype=torch.float64)


def reference_chain(reference: Reference, start: Normal) -> AffineChain:
    """The reference process, begun at ``start``."""
    factor, mean = reference.factor.cpu(), reference.mean.double().cpu()
    matrices = factor[:, None, None] * torch.eye(len(mean), dtype=torch.float64)
    noise = isotropic(reference.gammas, len(mean))
    return AffineChain(FORWARD, start, matrices, (1 - factor)[:, None] * mean, noise)


def half_bridge(chain: AffineChain, start: Normal, *, exact_reversal: bool = False) -> AffineChain:
    """The chain of the other direction that IPF learns from this one, begun at ``start``; ``exact_reversal``: the one
    it would learn if it reversed every edge exactly, its noise included."""
    laws, _ = chain.law()
    # Of the regression's inputs, states at the far end of each edge, and of its targets.
    near, far = (laws[:-1], laws[1:]) if chain.direction == FORWARD else (laws[1:], laws[:-1])
    mean, covariance = (torch.stack(column) for column in zip(*far, strict=True))
    if exact_reversal:
        near_mean, near_covariance = (torch.stack(column) for column in zip(*near, strict=True))
        matrices = near_covariance @ chain.matrices.mT @ torch.linalg.inv(covariance)
        offsets = near_mean - (matrices @ mean[:, :, None])[:, :, 0]
        noise = near_covariance - matrices @ chain.matrices @ near_covariance
    else:
        precision, noise = chain.noise @ torch.linalg.inv(covariance), chain.noise
        matrices = 2 * torch.eye(len(start.mean), dtype=torch.float64) - chain.matrices - precision
        offsets = (precision @ mean[:, :, None])[:, :, 0] - chain.offsets
    return AffineChain(opposite(chain.direction), start, matrices, offsets, noise)


def ipf_rows(reference: Reference, first: Normal, last: Normal, half_bridges: int) -> list[dict[str, float]]:
    """Of the reference and the exact iterates of IPF: W₂ between the law of the end and the wanted one, and
    E‖x_N − x_0‖²."""
    chain, rows = reference_chain(reference, first), []
    for number in range(half_bridges + 1):
        laws, cross = chain.law()
        end, wanted = (laws[0], first) if chain.direction == BACKWARD else (laws[-1], last)
        displacement = laws[0].covariance + laws[-1].covariance - cross - cross.mT
        cost = float(torch.trace(displacement) + ((laws[0].mean - laws[-1].mean) ** 2).sum())
        rows.append({"half_bridge": number, "w2": wasserstein_gaussian(end, wanted), "transport_cost": cost})
        chain = half_bridge(chain, wanted)
    return rows


def wasserstein_gaussian(p: Normal, q: Normal) -> float:
    """W₂ between two Gaussians: W₂² = ‖m − m′‖² + tr(Σ + Σ′ − 2 (Σ^½ Σ′ Σ^½)^½)."""
    root = _root(p.covariance)
    cross = _root(root @ q.covariance @ root)
    squared = ((p.mean - q.mean) ** 2).sum() + torch.trace(p.covariance + q.covariance - 2 * cross)
    return float(squared.clamp(min=0).sqrt())


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
