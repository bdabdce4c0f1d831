"""The small network of the 2-D examples (Chao et al., ICML 2023, Section 3.2 and its code)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "NoiseConditionalMLP", "Swish"]


class Swish(nn.Module):
    """z·sigmoid(βz) with a learnable β for every unit, 1 at first (Ramachandran, Zoph, Le, 2017)."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(units))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


ACTIVATIONS = {"identity": nn.Identity, "leaky_relu": lambda: nn.LeakyReLU(0.1), "elu": nn.ELU}


class NoiseConditionalMLP(nn.Module):
    """h(x, σ) = x − a(o(x, σ)) for points x (B, D) and labels σ (B,) → (B, D).

    x passes linear layers D → 64 → 128 → 256 and σ linear layers 1 → 1 → 1 → 1, all with Swish between; the two
    results side by side pass Swish and a linear layer, which gives o. The noise level therefore only shifts one
    input of the last layer: the paper's setting, weak as it is.

    Args:
        dimension: D.
        widths: of the layers of x.
        output_activation: a; 'identity', 'leaky_relu' (slope 0.1) or 'elu'.

    Raises:
        ValueError: unknown activation, or no width.
    """

    def __init__(
        self, dimension: int, *, widths: tuple[int, ...] = (64, 128, 256), output_activation: str = "identity"
    ) -> None:
        super().__init__()
        if output_activation not in ACTIVATIONS:
            raise ValueError(f"model.output_activation={output_activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if dimension < 1 or not widths or min(widths) < 1:
            raise ValueError(f"dimension={dimension}, model.widths={widths}: need positive numbers")
        self.point = _linear_layers((dimension, *widths))
        self.noise = _linear_layers((1, 1, 1, 1))
        self.joint_activation = Swish(widths[-1] + 1)
        self.joint = nn.Linear(widths[-1] + 1, dimension)
        self.output_activation = ACTIVATIONS[output_activation]()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = torch.cat([self.point(x), self.noise(label[:, None].to(x.dtype))], dim=1)
        return x - self.output_activation(self.joint(self.joint_activation(features)))


def _linear_layers(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(widths):
        layers += [nn.Linear(size, following), Swish(following)]
    return nn.Sequential(*layers[:-1])
