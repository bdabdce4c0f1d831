"""How far a score is from being a gradient: everything about its Jacobian.

Let J = ∂s/∂x be the Jacobian of a score s(x, t) at one sample, D the dimension. s is conservative, that is, the
gradient of some log-density, exactly if J = Jᵀ. The asymmetry is measured by

    Asym  = tr(JJᵀ) − tr(JJ) = ½‖J − Jᵀ‖²_F              in units of score² per data²
    NAsym = Asym / (2 tr JJᵀ) = ‖J − Jᵀ‖²_F / (4‖J‖²_F)   in [0, 1]

averaged over samples. NAsym is 0 for a conservative field, ½ for a random matrix and 1 for an antisymmetric one.

For probes v with E[vvᵀ] = I (here ±1 with equal probability) two unbiased estimators of Asym use one
Jacobian-vector and one vector-Jacobian product each, both taken from a single evaluation of the score:

* ``trace``, Eq. 9 of the paper:  ‖Jᵀv‖² − (Jᵀv)·(Jv). It may be negative, and at small NAsym its variance is
  dominated by the symmetric part of J.
* ``antisymmetric``:  ½‖Jv − Jᵀv‖² = ½‖(J − Jᵀ)v‖². Never negative, exactly 0 for a conservative field; its
  standard deviation falls with ‖J − Jᵀ‖² rather than with ‖J‖·‖J − Jᵀ‖.

Source: Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models"
(ICML 2023), Sections 2.3 and 4.2. Where the paper writes ‖J − Jᵀ‖²_F for Asym, its code computes the trace form
above, half of that; so do we.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from experiment.randomness import Generator, rademacher_like
from models.second_order.operations import gradients_of, without_autocast
from sde_lib import ScoreFunction

ESTIMATORS = ("antisymmetric", "trace", "exact")
EXACT_MAX_DIMENSION = 256
"""Up to this many dimensions the exact Jacobian is the default: D backward passes."""


class HelmholtzHodge(NamedTuple):
    """Of a field on a grid: potential (H, W), its gradient (H, W, 2) and the rotational rest (H, W, 2)."""

    potential: Tensor
    gradient: Tensor
    rotational: Tensor


class Asymmetry(NamedTuple):
    """Per-sample results: the score (B, ...) itself, Asym (B,) and ‖J‖²_F = tr JJᵀ (B,)."""

    score: Tensor
    asym: Tensor
    jacobian_norm_squared: Tensor

    @property
    def nasym(self) -> Tensor:
        """NAsym (B,). From K probes it is a ratio of two estimates, with a bias of order 1/K."""
        return self.asym / (2 * self.jacobian_norm_squared)


def vjp(value: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """Jᵀv (B, ...) by one backward pass through an already computed score; the graph is kept."""
    if not value.requires_grad:  # a score that does not depend on x at all
        return torch.zeros_like(x)
    with gradients_of("inputs"):
        (jtv,) = torch.autograd.grad(value, x, v, create_graph=create_graph, retain_graph=True, materialize_grads=True)
    return jtv


def jvp_and_vjp(value: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Jv and Jᵀv, both (B, ...), of an already computed score.

    Jᵀu is linear in u, so differentiating it once more, with respect to u in direction v, gives Jv. (A forward-mode
    pass would need an evaluation of its own, and its rule for softmax cannot be differentiated again.)
    """
    u = v.detach().clone().requires_grad_()
    jtv = vjp(value, x, u, create_graph=True)
    if not jtv.requires_grad:  # J vanishes identically
        return torch.zeros_like(value), jtv
    with gradients_of("cotangents"):
        (jv,) = torch.autograd.grad(jtv, u, v, create_graph=create_graph, retain_graph=True, materialize_grads=True)
    return jv, jtv


def divergence(value: Tensor, x: Tensor, probe: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """∇·s = tr ∂s/∂x (B,) of an already computed score (B, ...).

    Exact, by D backward passes; or, for a probe v (B, ...) with E[vvᵀ] = I, the unbiased estimate vᵀ(∂s/∂x)v of
    Skilling and Hutchinson, by one.
    """
    if probe is not None:
        return (vjp(value, x, probe, create_graph=create_graph) * probe).flatten(1).sum(1)
    trace = value.new_zeros(len(value))
    for i, row in enumerate(_rows(value, x, create_graph)):
        trace = trace + row[:, i]
    return trace


def _rows(value: Tensor, x: Tensor, create_graph: bool) -> Iterator[Tensor]:
    """∂s_i/∂x (B, D) of an already computed score, for i = 1, …, D, by a backward pass each."""
    for i in range(value[0].numel()):
        basis = torch.zeros_like(value).flatten(1)
        basis[:, i] = 1.0
        yield vjp(value, x, basis.view_as(value), create_graph=create_graph).flatten(1)


def jacobian(
    score: ScoreFunction, x: Tensor, t: Tensor, *, create_graph: bool = False, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The score (B, ...) and its exact Jacobian (B, D, D), J[b, i, j] = ∂s_i/∂x_j, by D backward passes."""
    x = _requiring_grad(x)
    with torch.enable_grad():
        value = score(x, t)
        rows = tqdm(_rows(value, x, create_graph), total=x[0].numel(), disable=not progress, leave=False, unit="row")
        return value, torch.stack(list(rows), dim=1)


def asymmetry(
    score: ScoreFunction,
    x: Tensor,
    t: Tensor,
    *,
    probes: int | None = None,
    estimator: str = "antisymmetric",
    generator: Generator = None,
    create_graph: bool = False,
    progress: bool = False,
) -> Asymmetry:
    """Asym and ‖J‖²_F of every sample, exact or estimated.

    Always in the dtype of ``x``, under autocast too: J and Jᵀ of an almost conservative score are almost the same, and
    rounding each to the 8 bits of bfloat16 leaves little of their difference (docs/mixed_precision.md).

    Args:
        score: s(x, t).
        x, t: points (B, ...) and times (B,).
        probes: number K of probes, averaged over; None: the exact Jacobian.
        estimator: 'antisymmetric' or 'trace'; 'exact' ignores ``probes``.
        generator: where the probes come from.
        create_graph: make the results differentiable, for training.
        progress: show a progress bar of the rows of the Jacobian, or of the probes.

    Raises:
        ValueError: unknown estimator; K < 1; or neither probes nor at most 256 dimensions.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: allowed are {', '.join(ESTIMATORS)}")
    dimension = x[0].numel()
    if estimator == "exact" or probes is None:
        if estimator != "exact" and dimension > EXACT_MAX_DIMENSION:
            raise ValueError(
                f"probes=None in {dimension} dimensions: the exact Jacobian is the default up to "
                f"{EXACT_MAX_DIMENSION}; give a number of probes, or estimator='exact'"
            )
        with without_autocast(x):
            value, j = jacobian(score, x, t, create_graph=create_graph, progress=progress)
        result = Asymmetry(value, 0.5 * ((j - j.mT) ** 2).sum((1, 2)), (j**2).sum((1, 2)))
    else:
        if probes < 1:
            raise ValueError(f"probes={probes}: at least 1")
        x = _requiring_grad(x)
        asym, norm = 0.0, 0.0
        with without_autocast(x), torch.enable_grad():
            value = score(x, t)
            for _ in tqdm(range(probes), disable=not progress, leave=False, unit="probe"):
                jv, jtv = jvp_and_vjp(value, x, rademacher_like(x, generator), create_graph=create_graph)
                norm_estimate = (jtv**2).flatten(1).sum(1)
                if estimator == "trace":
                    asym_estimate = norm_estimate - (jtv * jv).flatten(1).sum(1)
                else:
                    asym_estimate = 0.5 * ((jv - jtv) ** 2).flatten(1).sum(1)
                if not create_graph:
                    asym_estimate, norm_estimate = asym_estimate.detach(), norm_estimate.detach()
                asym, norm = asym + asym_estimate / probes, norm + norm_estimate / probes
        result = Asymmetry(value, asym, norm)
    return result if create_graph else Asymmetry(*(part.detach() for part in result))


def helmholtz_hodge(field: Tensor, spacing: float) -> HelmholtzHodge:
    """The field on a rectangle as a gradient plus a rotational part, s = ∇φ + r, with φ minimising ∫‖∇φ − s‖² dx.

    In the continuum r is free of divergence and tangential at the border, the natural condition of the minimum. Here
    the integral is the trapezoidal rule, ⟨a, b⟩ = Σ w_i w_j a_ij·b_ij h² with weights ½ at the border, and ∇_h takes
    central differences, at the border the one-sided three-point differences of second order, which see the checkerboard
    that central differences do not. Up to rounding the two parts add up to the field and are orthogonal in ⟨·,·⟩, and
    the gradient of a quadratic polynomial has no rotational part; φ has mean zero. The error is of second order in h.

    With the weights w and the difference matrix d of an axis, and K = dᵀ diag(w) d, the normal equations are
    K₀ φ diag(w₁) + diag(w₀) φ K₁ = ∇_hᵀ(w₀ w₁ s). They are solved by diagonalising the K of each axis with respect to
    its w, in O(H³ + W³) operations, in double precision on the CPU.

    Args:
        field: (H, W, 2); component k points along axis k of the grid.
        spacing: h, the same along both axes.

    Raises:
        ValueError: a field of another shape, of fewer than 3×3 points or with values that are not finite; spacing ≤ 0.
    """
    if field.ndim != 3 or field.shape[-1] != 2 or min(field.shape[:2]) < 3:
        raise ValueError(f"field of shape {tuple(field.shape)}: need (H, W, 2) with H and W at least 3")
    if not 0 < spacing < math.inf:
        raise ValueError(f"spacing={spacing}: allowed are positive numbers")
    if not field.isfinite().all():
        raise ValueError("field has values that are not finite")
    field = field.detach().cpu().double()
    (d0, w0), (d1, w1) = (_differences(n, spacing) for n in field.shape[:2])
    weights = w0[:, None] * w1
    right_side = d0.T @ (weights * field[..., 0]) + (weights * field[..., 1]) @ d1
    (rates0, basis0), (rates1, basis1) = _modes(d0, w0), _modes(d1, w1)
    rates = rates0[:, None] + rates1
    rates[0, 0] = math.inf  # the constant
    potential = basis0 @ ((basis0.T @ right_side @ basis1) / rates) @ basis1.T
    gradient = torch.stack([d0 @ potential, potential @ d1.T], dim=-1)
    return HelmholtzHodge(potential, gradient, field - gradient)


def _differences(n: int, spacing: float) -> tuple[Tensor, Tensor]:
    """Derivative (n, n) along one axis, exact for parabolas at all points, and trapezoidal weights (n,)."""
    d = torch.zeros(n, n, dtype=torch.float64)
    i = torch.arange(1, n - 1)
    d[i, i - 1], d[i, i + 1] = -0.5, 0.5
    d[0, :3] = torch.tensor([-1.5, 2.0, -0.5], dtype=torch.float64)
    d[-1, -3:] = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)
    weights = torch.ones(n, dtype=torch.float64)
    weights[[0, -1]] = 0.5
    return d / spacing, weights


def _modes(d: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """λ (n,), ascending, and V (n, n) with DᵀWD V = W V diag(λ) and VᵀWV = 1; the first column is constant."""
    root = weights.sqrt()
    rates, vectors = torch.linalg.eigh((weights[:, None] * d).T @ d / (root[:, None] * root))
    return rates, vectors / root[:, None]


def _requiring_grad(x: Tensor) -> Tensor:
    """``x`` itself if it already takes part in a graph, otherwise a leaf that starts one."""
    return x if x.requires_grad else x.detach().requires_grad_()
