"""Langevin dynamics at one fixed time: with noise, without it, or Metropolis-adjusted.

Sources: Song and Ermon (NeurIPS 2019), Algorithm 1; Roberts and Tweedie (Bernoulli, 1996), for the adjustment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from experiment.randomness import Generator, normal_like, uniform
from sde_lib import ScoreFunction

__all__ = ["LangevinTrajectory", "LogDensity", "langevin_dynamics"]

LogDensity = Callable[[Tensor, Tensor], Tensor]
"""log p_t(x) in nats, up to a constant: takes x (B, ...) and t (B,), returns (B,)."""


class LangevinTrajectory(NamedTuple):
    """The N + 1 states (N+1, B, ...), the start first, and whether each of the N moves was made (N, B)."""

    x: Tensor
    accepted: Tensor


@torch.no_grad()
def langevin_dynamics(
    score: ScoreFunction,
    x: Tensor,
    t: Tensor,
    step_sizes: Sequence[float],
    *,
    noise: bool = True,
    log_density: LogDensity | None = None,
    generator: Generator = None,
) -> LangevinTrajectory:
    """N steps of x ← x + α_i s(x, t) + √(2α_i) z, with t fixed.

    Three samplers:

    * ``noise=True``: unadjusted Langevin (Song and Ermon, 2019, Algorithm 1, one noise level). As α → 0 its stationary
      law is that of the score. At finite α it is not: for N(0, σ²) it has the variance 2α/(1 − (1 − α/σ²)²), which is
      σ²/(1 − α/2σ²).
    * ``noise=False``: x ← x + α_i s(x, t), gradient ascent where s is a gradient. Without Metropolis adjustment only.
    * ``log_density`` given: Metropolis-adjusted Langevin (Roberts and Tweedie, 1996). The step above only proposes x';
      each sample makes the move with probability min(1, p(x') q(x|x') / p(x) q(x'|x)), where
      q(y|x) = N(y; x + α s(x, t), 2α I), and otherwise stays. Then ``log_density`` is stationary at every α, and
      whatever s is: a wrong score costs acceptance, not correctness. A move to where p or q is not finite is not made.

    Args:
        score: s(x, t); N evaluations per sample, N + 1 if adjusted.
        x, t: start (B, ...) and times (B,).
        step_sizes: α_0, …, α_{N−1}, in units of x².
        noise: whether z is drawn or zero.
        log_density: the target of the Metropolis adjustment, need not be normalised.
        generator: draws z and then, if adjusted, one uniform number per sample.

    Returns:
        All states and moves; without adjustment every move is made.

    Raises:
        ValueError: no step sizes, or one that is not positive and finite; a ``log_density`` without noise, or not
            finite at the start.
    """
    for i, size in enumerate(step_sizes):
        if not 0 < size < math.inf:
            raise ValueError(f"step_sizes[{i}]={size}: allowed are positive numbers")
    if len(step_sizes) == 0:
        raise ValueError("step_sizes is empty: at least one step is needed")
    if log_density is not None and not noise:
        raise ValueError("log_density given with noise=False: a move without noise cannot be Metropolis-adjusted")

    states = x.new_empty(len(step_sizes) + 1, *x.shape)
    accepted = torch.ones(len(step_sizes), len(x), dtype=torch.bool, device=x.device)
    states[0] = x
    if log_density is None:
        for i, size in enumerate(step_sizes):
            x = x + size * score(x, t)
            if noise:
                x = x + math.sqrt(2 * size) * normal_like(x, generator)
            states[i + 1] = x
        return LangevinTrajectory(states, accepted)

    gradient, log_p = score(x, t), log_density(x, t)
    if not log_p.isfinite().all():
        raise ValueError(f"log_density is not finite at {int((~log_p.isfinite()).sum())} of {len(x)} starting points")
    for i, size in enumerate(step_sizes):
        z = normal_like(x, generator)
        proposal = x + size * gradient + math.sqrt(2 * size) * z
        proposed_gradient, proposed_log_p = score(proposal, t), log_density(proposal, t)
        back = (x - proposal - size * proposed_gradient) / math.sqrt(2 * size)
        log_q_ratio = 0.5 * (z**2 - back**2).flatten(1).sum(1)  # log q(x|x') − log q(x'|x)
        threshold = uniform((len(x),), generator, device=x.device, dtype=x.dtype).log()
        # A comparison with NaN is false: such a move is refused.
        accepted[i] = (threshold < proposed_log_p - log_p + log_q_ratio) & proposed_log_p.isfinite()
        move = accepted[i].view(-1, *[1] * (x.ndim - 1))
        x = torch.where(move, proposal, x)
        gradient = torch.where(move, proposed_gradient, gradient)
        log_p = torch.where(accepted[i], proposed_log_p, log_p)
        states[i + 1] = x
    return LangevinTrajectory(states, accepted)
