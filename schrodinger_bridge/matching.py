"""What a half-bridge learns from: the two algorithms behind one interface.

Both alternate between the directions. To learn one direction they simulate the other with its present mean map and
turn the trajectories into a regression, inputs and targets for every edge.

* **IPF**, iterative proportional fitting (diffusion Schrödinger bridge, De Bortoli et al. 2021, Proposition 3): the
  learned direction reverses the simulated one. For a simulated step x → x′ with mean map M of that edge

      input x′,   target x′ + M(x) − M(x′)

* **IMF**, iterative Markovian fitting (diffusion Schrödinger bridge matching, Shi, De Bortoli, Campbell, Doucet,
  NeurIPS 2023, arXiv 2303.16852): only the ends of the trajectories are kept, and joined anew by the reference process.
  Its Markov projection is the regression of the reference's next state given the end that lies ahead:

      forward   input x_{k−1},  target E[x_k | x_{k−1}, x_N]        backward   input x_k,  target E[x_{k−1} | x_k, x_0]

The chain of means so found, with noise √(2γ), tends to the bridge as the steps get small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .process import BACKWARD, FORWARD, MeanMap, Noise, Reference, edges, opposite, simulate


class Regression(NamedTuple):
    """Inputs and targets (N, B, ...) of the learned direction's mean map at edges 1 … N."""

    inputs: Tensor
    targets: Tensor


@torch.no_grad()
def ipf_regression(learned: str, start: Tensor, mean_map: MeanMap, reference: Reference, noise: Noise) -> Regression:
    """Regression of the direction ``learned`` on chains of the opposite one, from ``start`` (B, ...) by its
    ``mean_map``."""
    states, means = simulate(mean_map, start, reference.gammas, opposite(learned), noise)
    inputs = states[1:] if learned == BACKWARD else states[:-1]
    targets = torch.empty_like(inputs)
    for k, (x, mean) in enumerate(zip(inputs, means, strict=True), 1):
        targets[k - 1] = x + mean - mean_map(x, edges(k, x))
    return Regression(inputs, targets)


@torch.no_grad()
def imf_regression(
    learned: str, start: Tensor, mean_map: MeanMap, reference: Reference, noise: Noise, other_end: Tensor | None = None
) -> Regression:
    """The same for IMF. With ``other_end`` (B, ...) bridges lead there from ``start``, and no chain is simulated."""
    if other_end is None:
        states, _ = simulate(mean_map, start, reference.gammas, opposite(learned), noise)
        first, last = states[0], states[-1]
    else:
        first, last = (start, other_end) if learned == BACKWARD else (other_end, start)
    ahead, towards = (last, reference.towards_end) if learned == FORWARD else (first, reference.towards_start)
    inputs, targets = [], []
    for k in range(1, len(reference.gammas) + 1):
        edge = edges(k, start)
        inputs.append(reference.between(first, last, edge - 1 if learned == FORWARD else edge, noise()))
        targets.append(towards(inputs[-1], ahead, edge))
    return Regression(torch.stack(inputs), torch.stack(targets))


ALGORITHMS = {"ipf": ipf_regression, "imf": imf_regression}
