"""Small networks for points and vectors: of the 2-D examples (Chao et al., ICML 2023, Section 3.2), of the tutorial and
of data of shape (D,)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.registry import resolve
from models.layers import FourierEmbedding, PositionalEmbedding


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
        output_activation: a; 'identity', 'leaky_relu' (slope 0.1), 'elu', or the import path of a module.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self, dimension: int, *, widths: Sequence[int] = (64, 128, 256), output_activation: str = "identity"
    ) -> None:
        super().__init__()
        self.point = _linear_layers((dimension, *widths))
        self.noise = _linear_layers((1, 1, 1, 1))
        self.joint_activation = Swish(widths[-1] + 1)
        self.joint = nn.Linear(widths[-1] + 1, dimension)
        self.output_activation = resolve(output_activation, ACTIVATIONS, "model.output_activation", nn.Module)()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = torch.cat([self.point(x), self.noise(label[:, None].to(x.dtype))], dim=1)
        return x - self.output_activation(self.joint(self.joint_activation(features)))


def _linear_layers(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(widths):
        layers += [nn.Linear(size, following), Swish(following)]
    return nn.Sequential(*layers[:-1])


class TimeConditionalMLP(nn.Module):
    """h(x, label[, class]): points x (B, D), time labels (B,), classes (B,) → (B, E); every layer knows the label.

    z₀ = W x/c, then residual layers z ← z + Lₖ silu((1 + aₖ) z + bₖ), whose scale aₖ and shift bₖ are linear in
    features of the label's sinusoidal embedding, as in the residual blocks of image models; h = W′ silu(z), 0 at first.
    A class adds features of its own.

    Args:
        dimension: D.
        outputs: E; D if not given.
        num_classes: 0, or the number K of classes the network is conditioned on; the label K stands for none.
        condition_channels: how many numbers of a condition follow x, whose size is 1.
        width: of z and of the label's features.
        depth: number of residual layers.
        input_scale: c, the size of typical points.
        fourier_scale: if positive, the label is the noise's σ, embedded as random Fourier features of its logarithm at
            frequencies of this standard deviation, and c = √(1 + σ²) in place of ``input_scale``.
    """

    def __init__(
        self,
        dimension: int,
        *,
        outputs: int | None = None,
        num_classes: int = 0,
        condition_channels: int = 0,
        width: int = 64,
        depth: int = 3,
        input_scale: float = 1.0,
        fourier_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_scale, self.label_is_sigma = input_scale, fourier_scale > 0
        embedding = FourierEmbedding(16, fourier_scale) if fourier_scale else PositionalEmbedding(32)
        self.label = nn.Sequential(embedding, nn.Linear(embedding.out_features, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.dimension = dimension
        self.first = nn.Linear(dimension + condition_channels, width)
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, outputs or dimension)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        features = self.label(label.to(x.dtype))
        if class_labels is not None:
            features = features + self.classes(class_labels)
        features = F.silu(features)
        input_scale = (1 + label[:, None].to(x.dtype) ** 2).sqrt() if self.label_is_sigma else self.input_scale
        points, condition = x[:, : self.dimension] / input_scale, x[:, self.dimension :]
        z = self.first(torch.cat([points, condition], dim=1) if condition.numel() else points)
        for modulation, layer in zip(self.modulations, self.layers, strict=True):
            scale, shift = modulation(features).chunk(2, dim=1)
            z = z + layer(F.silu((1 + scale) * z + shift))
        return self.last(F.silu(z))


def vector_mlp(
    dimension: int,
    image_size: Sequence[int],
    nf: int,
    num_res_blocks: int,
    embedding_type: str,
    fourier_scale: float,
    num_classes: int = 0,
    condition_channels: int = 0,
) -> TimeConditionalMLP:
    """A ``TimeConditionalMLP`` with the options of the U-Net (configs/defaults.py), for data of shape (D,): ``nf`` is
    its width, ``num_res_blocks`` its depth; the embedding 'fourier' is for VE, whose label is σ.

    Raises:
        ValueError: data of another shape.
    """
    if image_size != ():
        raise ValueError("model.name='vector_mlp': is for vectors, data.shape=(D,); 'ncsnpp' is for all others")
    scale = fourier_scale if embedding_type == "fourier" else 0.0
    told = dict(num_classes=num_classes, condition_channels=condition_channels)
    network = TimeConditionalMLP(dimension, width=nf, depth=num_res_blocks, fourier_scale=scale, **told)
    network.last.reset_parameters()  # a conservative score of h = 0 has no gradient to learn from
    return network
