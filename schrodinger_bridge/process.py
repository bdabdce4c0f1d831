"""Markov chains with Gaussian steps between two distributions: step sizes, the reference process, simulation.

A chain x_0, …, x_N has N edges; edge k joins x_{k−1} and x_k and has the step size γ_k. Both directions take the edge
with their own mean map and the same noise:

    forward   x_k     = F_k(x_{k−1}) + √(2γ_k) z        backward   x_{k−1} = B_k(x_k) + √(2γ_k) z

x_0 follows the data, x_N the prior or a second data set. An edge is known by its number k in training as in sampling,
so the two cannot be out of step with each other.

Source: De Bortoli, Thornton, Heng, Doucet, "Diffusion Schrödinger Bridge with Applications to Score-Based Generative
Modeling" (NeurIPS 2021, arXiv 2106.01357), Sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from experiment.registry import resolve
from sde_lib import expand

FORWARD, BACKWARD = "forward", "backward"
MATCHINGS = ("drift", "mean")
LABEL_RANGE = 999.0
"""Networks know an edge by a number between 0 and this, the range of the time labels of VP models."""

LEAST_GAMMA = 1e-12
"""Noise of √(2γ) is then well within single precision."""
_MOST_FORGOTTEN = 1e12

MeanMap: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Where an edge leads to on average: x (B, ...) and edges k (B,), integers from 1 to N → (B, ...)."""


def opposite(direction: str) -> str:
    return BACKWARD if direction == FORWARD else FORWARD


def edges(k: int, x: Tensor) -> Tensor:
    """Edge k for every sample of x (B, ...): (B,)."""
    return torch.full((len(x),), k, dtype=torch.int64, device=x.device)


LADDERS: dict[str, Callable[[float, float, int], Tensor]] = {
    "constant": lambda low, high, count: torch.full((count,), low, dtype=torch.float64),
    "linear": lambda low, high, count: torch.linspace(low, high, count, dtype=torch.float64),
    "geometric": lambda low, high, count: torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64),
}
"""The rising half: (γ_min, γ_max, count) → (count,)."""


def step_sizes(ladder: str, num_steps: int, gamma_min: float, gamma_max: float) -> Tensor:
    """γ_1 … γ_N (N,) float64: from ``gamma_min`` up to ``gamma_max`` in the middle and the same way down.

    An even number of steps has the largest twice, an odd one once.

    Raises:
        ValueError: an unknown ladder, or one that the numbers do not fit.
    """
    rising = resolve(ladder, LADDERS, "bridge.ladder")
    given = f"bridge.gamma_min={gamma_min}, bridge.gamma_max={gamma_max}"
    if not LEAST_GAMMA <= gamma_min <= gamma_max < math.inf:
        raise ValueError(f"{given}: need {LEAST_GAMMA:g} ≤ γ_min ≤ γ_max")
    if ladder == "constant" and gamma_min < gamma_max:
        raise ValueError(f"{given}: a constant ladder has one step size")
    if num_steps < 3 and gamma_min < gamma_max:
        raise ValueError(f"bridge.num_steps={num_steps}: at least 3 for step sizes that rise and fall")
    half = rising(gamma_min, gamma_max, (num_steps + 1) // 2)
    return torch.cat([half, half.flip(0)[num_steps % 2 :]])


class Reference(nn.Module):
    """The process that a bridge is to stay close to: x_k − m = a_k (x_{k−1} − m) + √(2γ_k) z.

    Ornstein–Uhlenbeck with the stationary law N(m, s²), a_k = 1 − γ_k/s², the Euler step of dx = ∇log N(x; m, s²) dt +
    √2 dW; or Brownian motion, a_k = 1, for s² = ∞.

    Args:
        gammas: (N,).
        mean: m, of the shape of a sample.
        variance: s².

    Attributes:
        alpha, variance_from_start: (N + 1,), of x_k given x_0: N(m + α_k (x_0 − m), v_k).

    Raises:
        ValueError: a step that is not small against s², or so many that x_N knows nothing of x_0 in double precision.
    """

    def __init__(self, gammas: Tensor, mean: Tensor, variance: float) -> None:
        super().__init__()
        if not variance > float(gammas.max()):
            raise ValueError(
                f"bridge.gamma_max={float(gammas.max())}: must be below the variance of the prior, {variance:.4g}"
            )
        self.register_buffer("gammas", gammas.double())
        self.register_buffer("mean", mean)
        a = 1 - gammas.double() / variance
        alpha, v = [torch.ones((), dtype=torch.float64)], [torch.zeros((), dtype=torch.float64)]
        for factor, gamma in zip(a, gammas.double(), strict=True):
            alpha.append(factor * alpha[-1])
            v.append(factor**2 * v[-1] + 2 * gamma)
        self.register_buffer("factor", a)
        self.register_buffer("alpha", torch.stack(alpha))
        self.register_buffer("variance_from_start", torch.stack(v))
        if not self.brownian_variance < _MOST_FORGOTTEN * float(v[-1]):
            raise ValueError(
                f"bridge.num_steps={len(gammas)} with step sizes of {float(gammas.sum()):.4g} in all: the reference "
                f"keeps {float(alpha[-1]):.1g} of where it began; take fewer or smaller steps"
            )

    @property
    def brownian_variance(self) -> float:
        """s² of the Brownian motion whose bridge joins the same two marginals in the same way: v_N/α_N.

        Only −α_N x·y/v_N of the exponent of the reference's transition couples its ends.
        """
        return float(self.variance_from_start[-1] / self.alpha[-1])

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        """F_k(x) (B, ...)."""
        return self.mean + _per_sample(self.factor[edge - 1], x) * (x - self.mean)

    def between(self, start: Tensor, end: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """A draw of x_k given x_0 and x_N (B, ...), k (B,) from 0 to N, with standard normal ``noise`` (B, ...)."""
        v, (to_end, v_to_end) = self.variance_from_start[index], self._to_end(index)
        prior, correction = self._conditioned(start, end, self.alpha[index], v, to_end, v_to_end)
        variance = v * v_to_end / (to_end**2 * v + v_to_end)
        return self.mean + (prior + correction) + _per_sample(variance.sqrt(), start) * noise

    def towards_end(self, x: Tensor, end: Tensor, edge: Tensor) -> Tensor:
        """E[x_k | x_{k−1}, x_N] (B, ...) for edges k (B,)."""
        factor, noise = self.factor[edge - 1], 2 * self.gammas[edge - 1]
        prior, correction = self._conditioned(x, end, factor, noise, *self._to_end(edge))
        return self.mean + prior + correction

    def towards_start(self, x: Tensor, start: Tensor, edge: Tensor) -> Tensor:
        """E[x_{k−1} | x_k, x_0] (B, ...) for edges k (B,)."""
        alpha, v = self.alpha[edge - 1], self.variance_from_start[edge - 1]
        prior, correction = self._conditioned(start, x, alpha, v, self.factor[edge - 1], 2 * self.gammas[edge - 1])
        return self.mean + prior + correction

    def _conditioned(
        self, start: Tensor, end: Tensor, alpha: Tensor, v: Tensor, to_end: Tensor, v_to_end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of y ~ N(m + α (start − m), v) its mean less m, and what is added to it given an end that follows
        N(m + α′ (y − m), v′), in Kálmán's way."""
        gain = v * to_end / (to_end**2 * v + v_to_end)
        prior = _per_sample(alpha, start) * (start - self.mean)
        return prior, _per_sample(gain, start) * (end - self.mean - _per_sample(to_end, start) * prior)

    def _to_end(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """α and v of x_N given x_k, (B,) each."""
        to_end = self.alpha[-1] / self.alpha[index]
        return to_end, self.variance_from_start[-1] - to_end**2 * self.variance_from_start[index]


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    return expand(value.to(x.dtype), x)


class TransitionMean(nn.Module):
    """A mean map from a network h(x, label).

    ``drift``: M_k(x) = x + √(2γ_k) h, the displacement in units of the step's noise; ``mean``: M_k(x) = h.

    Args:
        network: (x (B, ...), label (B,)) → (B, ...).
        gammas: (N,).
        matching: one of ``MATCHINGS``.

    Raises:
        ValueError: unknown matching.
    """

    def __init__(self, network: nn.Module, gammas: Tensor, matching: str) -> None:
        super().__init__()
        if matching not in MATCHINGS:
            raise ValueError(f"bridge.matching={matching!r}: allowed are {', '.join(MATCHINGS)}")
        self.network = network
        self.matching = matching
        self.register_buffer("noise_scale", (2 * gammas).sqrt().float(), persistent=False)

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        """M_k(x) (B, ...) for edges k (B,)."""
        label = LABEL_RANGE * (edge - 1).to(x.dtype) / (len(self.noise_scale) - 1)
        output = self.network(x, label)
        return output if self.matching == "mean" else x + expand(self.noise_scale[edge - 1], x) * output


@torch.no_grad()
def simulate(
    mean_map: MeanMap,
    start: Tensor,
    gammas: Tensor,
    direction: str,
    noise: Callable[[], Tensor],
    *,
    noise_removal: bool = False,
) -> tuple[Tensor, Tensor]:
    """A chain's states x_0 … x_N (N + 1, B, ...), whichever direction they are simulated in.

    Args:
        mean_map: of that direction.
        start: x_0 (B, ...) of a forward chain, x_N of a backward one.
        gammas: (N,).
        direction: 'forward' or 'backward'.
        noise: called once a step for standard normal numbers (B, ...).
        noise_removal: leave the noise out of the last step.

    Returns:
        states, and means (N, B, ...): M_k of the state before edge k.
    """
    count = len(gammas)
    states, means = [start], []
    for position, k in enumerate(range(1, count + 1) if direction == FORWARD else range(count, 0, -1), 1):
        mean = mean_map(states[-1], edges(k, start))
        z = noise()  # drawn even where it is left out, so that both kinds of chains share their noise
        last = noise_removal and position == count
        states.append(mean if last else mean + math.sqrt(2 * float(gammas[k - 1])) * z)
        means.append(mean)
    if direction == BACKWARD:
        states.reverse()
        means.reverse()
    return torch.stack(states), torch.stack(means)
