"""The one-layered autoencoder of Section 6 of Chao et al. (ICML 2023).

    s(x) = R h(Wᵀx + b) + c        J(x) = R diag(h′(Wᵀx + b)) Wᵀ = Σ_k h′_k(x) r_k w_kᵀ

with r_k, w_k the columns of R and W that belong to hidden unit k. The h′_k are generically linearly independent
functions; J = Jᵀ at all x then means that r_k is parallel to w_k for every unit. The paper's criterion is the sum over
units, RWᵀ = WRᵀ, which is necessary, and sufficient for one unit or a linear h alone: W = RS with a symmetric S
satisfies it, too (autoencoder_example/README.md). Either way R and W need not be equal. (Compare Im, Belghazi,
Memisevic, "Conservativeness of Untied Auto-Encoders", AAAI 2016.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.mlp import Swish


class OneLayerAutoencoder(nn.Module):
    """s(x) = R h(Wᵀx + b) + c, with h the Swish with a learnable β for every unit.

    Args:
        dimension: D, of x.
        hidden: H, units.
        generator: R, c, Wᵀ and b are drawn from it in this order, uniformly on [−1, 1]; β is 1 at first.

    Raises:
        ValueError: D or H below 1.
    """

    def __init__(self, dimension: int, hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if dimension < 1 or hidden < 1:
            raise ValueError(f"dimension={dimension}, hidden={hidden}: at least 1")

        def draw(*shape: int) -> Tensor:
            return 2 * torch.rand(shape, generator=generator, device=generator.device) - 1

        self.R = nn.Parameter(draw(dimension, hidden))
        self.c = nn.Parameter(draw(dimension))
        self.W = nn.Parameter(draw(hidden, dimension).T.contiguous())
        self.b = nn.Parameter(draw(hidden))
        self.activation = Swish(hidden)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """s (B, D) at x (B, D). The time is not used: it is there for what takes a score s(x, t)."""
        return self.activation(x @ self.W + self.b) @ self.R.T + self.c

    @torch.no_grad()
    def product_asymmetry(self) -> float:
        """‖RWᵀ − WRᵀ‖_F, the paper's criterion."""
        product = self.R @ self.W.T
        return (product - product.T).norm().item()

    @torch.no_grad()
    def unit_asymmetry(self) -> float:
        """(Σ_k ‖r_k w_kᵀ − w_k r_kᵀ‖²_F)^½, 0 exactly if r_k and w_k are parallel for every unit."""
        products = self.R.T[:, :, None] * self.W.T[:, None, :]
        return (products - products.mT).norm().item()

    @torch.no_grad()
    def weight_difference(self) -> float:
        """‖W − R‖_F, 0 for tied weights."""
        return (self.W - self.R).norm().item()
