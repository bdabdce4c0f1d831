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

from sde_lib import expand

FORWARD, BACKWARD = "forward", "backward"
LABEL_RANGE = 999.0
"""Networks know an edge by a number between 0 and this, the range of the time labels of VP models."""

MeanMap: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Where an edge leads to on average: x (B, ...) and edges k (B,), integers from 1 to N → (B, ...)."""
Noise: TypeAlias = Callable[[], Tensor]
"""Called once a step for standard normal numbers (B, ...)."""


def opposite(direction: str) -> str:
    return BACKWARD if direction == FORWARD else FORWARD


def edges(k: int, x: Tensor) -> Tensor:
    """Edge k for every sample of x (B, ...): (B,)."""
    return torch.full((len(x),), k, dtype=torch.int64, device=x.device)


def step_sizes(num_steps: int, gamma_min: float, gamma_max: float) -> Tensor:
    """γ_1 … γ_N (N,) float64: linearly from ``gamma_min`` up to ``gamma_max`` in the middle, and the same way down.

    An even number of steps has the largest twice, an odd one once.

    Raises:
        ValueError: γ_max is below γ_min, or there are too few steps to rise and fall.
    """
    if gamma_min > gamma_max:
        raise ValueError(f"bridge.gamma_min={gamma_min}, bridge.gamma_max={gamma_max}: need γ_min ≤ γ_max")
    if num_steps < 3 and gamma_min < gamma_max:
        raise ValueError(f"bridge.num_steps={num_steps}: at least 3 for step sizes that rise and fall")
    half = torch.linspace(gamma_min, gamma_max, (num_steps + 1) // 2, dtype=torch.float64)
    return torch.cat([half, half.flip(0)[num_steps % 2 :]])


class Reference(nn.Module):
    """The process that a bridge is to stay close to: x_k − m = a_k (x_{k−1} − m) + √(2γ_k) z.

    Ornstein–Uhlenbeck with the stationary law N(m, s²), a_k = 1 − γ_k/s², the Euler step of dx = ∇log N(x; m, s²) dt +
    √2 dW; or Brownian motion, a_k = 1, for s² = ∞. Step sizes are (N,), m has the shape of a sample.

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
        self.register_buffer("factor", 1 - self.gammas / variance)
        self.register_buffer("alpha", torch.cat([torch.ones(1).double(), self.factor.cumprod(0)]))
        v = [torch.zeros((), dtype=torch.float64)]
        for factor, gamma in zip(self.factor, self.gammas, strict=True):
            v.append(factor**2 * v[-1] + 2 * gamma)
        self.register_buffer("variance_from_start", torch.stack(v))
        if not self.brownian_variance < 1e12 * float(v[-1]):
            raise ValueError(
                f"bridge.num_steps={len(gammas)} with step sizes of {float(gammas.sum()):.4g} in all: the reference "
                f"keeps {float(self.alpha[-1]):.1g} of where it began; take fewer or smaller steps"
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
    """A mean map from a network h(x, label), x and h (B, ...), label (B,), and step sizes (N,).

    With ``drift`` M_k(x) = x + √(2γ_k) h, the displacement in units of the step's noise; without, M_k(x) = h.
    """

    def __init__(self, network: nn.Module, gammas: Tensor, *, drift: bool) -> None:
        super().__init__()
        self.network, self.drift = network, drift
        self.register_buffer("noise_scale", (2 * gammas).sqrt().float(), persistent=False)

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        """M_k(x) (B, ...) for edges k (B,)."""
        label = LABEL_RANGE * (edge - 1).to(x.dtype) / (len(self.noise_scale) - 1)
        output = self.network(x, label)
        return x + expand(self.noise_scale[edge - 1], x) * output if self.drift else output


@torch.no_grad()
def simulate(
    mean_map: MeanMap, start: Tensor, gammas: Tensor, direction: str, noise: Noise, *, noise_removal: bool = False
) -> tuple[Tensor, Tensor]:
    """A chain of one direction from ``start`` (B, ...), x_0 or x_N, with step sizes (N,).

    ``noise_removal`` leaves the noise out of the last step.

    Returns:
        states x_0 … x_N (N + 1, B, ...), whichever the direction, and means (N, B, ...): M_k of the state before edge k
    """
    order = range(1, len(gammas) + 1) if direction == FORWARD else range(len(gammas), 0, -1)
    states, means = [start], []
    for k in order:
        means.append(mean_map(states[-1], edges(k, start)))
        z = noise()  # drawn even where it is left out, so that both kinds of chains share their noise
        scale = 0.0 if noise_removal and k == order[-1] else math.sqrt(2 * float(gammas[k - 1]))
        states.append(means[-1] + scale * z)
    if direction == BACKWARD:
        states.reverse()
        means.reverse()
    return torch.stack(states), torch.stack(means)
